//! Containers, through a Docker engine. One function for each thing the [`Reconciler`](orca_cluster::node) can want,
//! and no decision: what is asked for twice is done once, what is already gone is a success, and what the engine
//! refuses comes back as a typed [`Cause`].
//!
//! What is ours is known by labels, never by a list kept here, so that a restarted agent finds everything again.
//! Docker's restart policies are not used: the node's brain alone decides when something is started again.

mod create;
mod error;
mod events;
mod exec;
mod life;
mod listening;
mod logs;
mod mounts;
mod network;
mod pull;
pub(crate) mod secrets;
mod stats;

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bollard::models::{ContainerInspectResponse, ContainerStateStatusEnum, ContainerSummary};
use bollard::query_parameters::{InspectContainerOptions, ListContainersOptionsBuilder};
use orca_cluster::id::{ReplicaId, Revision, ServiceName};
use orca_cluster::node::{Condition, Exited, Found};
use orca_cluster::replica::{Cause, Engine};
use orca_cluster::time::Timestamp;

use crate::clock::now;

pub use error::Error;
pub use events::{Events, Notice};
pub use exec::{Ended, Exec, ExecInput, ExecRequest, Output, Screen, Size};
pub use logs::{LogLine, LogRequest, Source};
pub use secrets::{Open, Unopened, resolve};
pub use stats::Measurements;

/// Marks what belongs to this cluster; its value is the cluster's id.
const LABEL_CLUSTER: &str = "orca.cluster";
const LABEL_REPLICA: &str = "orca.replica";
const LABEL_SERVICE: &str = "orca.service";
const LABEL_REVISION: &str = "orca.revision";
const LABEL_DIGEST: &str = "orca.digest";
/// The service's port, so that a container found again has an address without its goal.
const LABEL_PORT: &str = "orca.port";

const SOCKET_DEFAULT: &str = "/var/run/docker.sock";

/// How long the engine may take to begin an answer; under load creating a container takes seconds, not minutes.
const ANSWER_MAX: Duration = Duration::from_secs(120);

#[derive(Debug, Clone)]
pub struct Config {
    /// The engine's Unix socket; [`socket_from_environment`] has the usual one.
    pub socket: PathBuf,
    /// Whose containers these are.
    pub cluster: String,
    /// Where the files of secrets go: below this if it is on tmpfs, else wherever memory is to be had.
    pub runtime_directory: PathBuf,
    /// Directories no container may mount any part of: Orca's own state.
    pub state_directories: Vec<PathBuf>,
}

/// `DOCKER_HOST` if it names a Unix socket, else Docker's default.
pub fn socket_from_environment() -> PathBuf {
    let host = std::env::var("DOCKER_HOST").unwrap_or_default();
    host.strip_prefix("unix://").unwrap_or(SOCKET_DEFAULT).into()
}

/// A handle on the engine; cheap to clone, and made without asking whether one is there.
#[derive(Debug, Clone)]
pub struct Docker {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: Config,
    /// Held while a network is made and joined, or found unused and removed: in between, it must not go.
    networks: tokio::sync::Mutex<()>,
    /// When any pull last showed a sign of life.
    pulls_moved: std::sync::Mutex<tokio::time::Instant>,
}

impl Docker {
    pub fn new(config: Config) -> Docker {
        let (networks, pulls_moved) = (tokio::sync::Mutex::new(()), tokio::time::Instant::now().into());
        Docker { inner: Arc::new(Inner { config, networks, pulls_moved }) }
    }

    /// What the engine says of itself, or why it says nothing.
    pub async fn engine(&self) -> Engine {
        let version = match self.client() {
            Ok(client) => client.version().await.map_err(|error| self.cause(error)),
            Err(error) => Err(error),
        };
        match version {
            Ok(version) => Engine::Ready { version: version.version.unwrap_or_default() },
            Err(Cause::NoEngine { reason }) => Engine::Unreachable { reason },
            Err(other) => Engine::Unreachable { reason: error::words(&other) },
        }
    }

    fn config(&self) -> &Config {
        &self.inner.config
    }

    /// Connections are made for each request, so there is nothing to keep and nothing that goes stale.
    fn client(&self) -> Result<bollard::Docker, Cause> {
        self.client_within(ANSWER_MAX)
    }

    fn client_within(&self, answer: Duration) -> Result<bollard::Docker, Cause> {
        let socket = self.config().socket.to_string_lossy();
        bollard::Docker::connect_with_unix(&socket, answer.as_secs().max(1), bollard::API_DEFAULT_VERSION)
            .map(|client| client.with_request_modifier(pull::url_safe_credentials))
            .map_err(|error| self.cause(error))
    }

    fn cause(&self, error: bollard::errors::Error) -> Cause {
        error::cause(error, &self.config().socket)
    }

    /// This cluster's containers with these labels besides, in whatever state.
    async fn list(&self, labels: &[(&str, String)]) -> Result<Vec<ContainerSummary>, Cause> {
        let mut wanted = vec![format!("{LABEL_CLUSTER}={}", self.config().cluster)];
        wanted.extend(labels.iter().map(|(name, value)| format!("{name}={value}")));
        let filters = HashMap::from([("label", wanted)]);
        let options = ListContainersOptionsBuilder::default().all(true).filters(&filters).build();
        self.client()?.list_containers(Some(options)).await.map_err(|error| self.cause(error))
    }

    /// The container of a replica, if there is one.
    async fn find(&self, replica: ReplicaId) -> Result<Option<String>, Cause> {
        let mut found = self.list(&[(LABEL_REPLICA, replica.to_string())]).await?;
        Ok(found.pop().and_then(|container| container.id))
    }

    /// [`None`] when there is no such container (any more).
    async fn inspect(&self, container: &str) -> Result<Option<ContainerInspectResponse>, Cause> {
        match self.client()?.inspect_container(container, None::<InspectContainerOptions>).await {
            Ok(inspected) => Ok(Some(inspected)),
            Err(error) if error::status(&error) == Some(404) => Ok(None),
            Err(error) => Err(self.cause(error)),
        }
    }

    /// What a container of ours is, from its labels and its state.
    async fn found(&self, inspected: &ContainerInspectResponse) -> Option<Found> {
        let identity = Identity::of(inspected.config.as_ref()?.labels.as_ref()?)?;
        let state = inspected.state.as_ref()?;
        let condition = match state.status? {
            ContainerStateStatusEnum::CREATED => Condition::Created,
            ContainerStateStatusEnum::RUNNING
            | ContainerStateStatusEnum::PAUSED
            | ContainerStateStatusEnum::RESTARTING
            | ContainerStateStatusEnum::STOPPING => Condition::Running {
                address: address(inspected),
                since: state.started_at.as_deref().and_then(timestamp).unwrap_or_default(),
            },
            ContainerStateStatusEnum::EXITED | ContainerStateStatusEnum::DEAD => Condition::Exited(Exited {
                code: state.exit_code.unwrap_or_default(),
                out_of_memory: state.oom_killed.unwrap_or_default(),
                last_lines: self.last_lines(inspected, None).await,
            }),
            ContainerStateStatusEnum::REMOVING | ContainerStateStatusEnum::EMPTY => return None,
        };
        Some(identity.found(condition))
    }
}

/// Who a container is: its labels.
struct Identity {
    cluster: String,
    replica: ReplicaId,
    service: ServiceName,
    revision: Revision,
    digest: Option<String>,
}

impl Identity {
    fn of(labels: &HashMap<String, String>) -> Option<Identity> {
        Some(Identity {
            cluster: labels.get(LABEL_CLUSTER)?.clone(),
            replica: labels.get(LABEL_REPLICA)?.parse().ok()?,
            service: labels.get(LABEL_SERVICE)?.parse().ok()?,
            revision: labels.get(LABEL_REVISION)?.parse().ok()?,
            digest: labels.get(LABEL_DIGEST).cloned(),
        })
    }

    fn found(self, condition: Condition) -> Found {
        let Identity { replica, service, revision, digest, .. } = self;
        Found { replica, service, revision, digest, condition }
    }
}

/// Where a running container can be reached on its service's port.
fn address(inspected: &ContainerInspectResponse) -> Option<SocketAddr> {
    let port = inspected.config.as_ref()?.labels.as_ref()?.get(LABEL_PORT)?.parse().ok()?;
    if is_on_host_network(inspected) {
        return Some((Ipv4Addr::LOCALHOST, port).into());
    }
    let networks = inspected.network_settings.as_ref()?.networks.as_ref()?;
    let address = networks.values().find_map(|network| network.ip_address.as_deref()?.parse::<IpAddr>().ok())?;
    Some((address, port).into())
}

fn is_on_host_network(inspected: &ContainerInspectResponse) -> bool {
    let mode = inspected.host_config.as_ref().and_then(|host| host.network_mode.as_deref());
    mode == Some("host")
}

fn is_running(inspected: &ContainerInspectResponse) -> bool {
    inspected.state.as_ref().is_some_and(|state| state.running.unwrap_or_default())
}

/// Docker writes times as RFC 3339 with nanoseconds, and the year 1 for never.
fn timestamp(text: &str) -> Option<Timestamp> {
    let time: jiff::Timestamp = text.parse().ok()?;
    u64::try_from(time.as_millisecond()).ok().map(Timestamp)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_docker_writes_them() {
        assert_eq!(timestamp("1970-01-01T00:00:01.5Z"), Some(Timestamp(1500)));
        assert_eq!(timestamp("2026-11-22T16:02:03.163531889Z"), Some(Timestamp(1_795_363_323_163)));
        assert_eq!(timestamp("0001-01-01T00:00:00Z"), None);
        assert_eq!(timestamp("soon"), None);
    }
}

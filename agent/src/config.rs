//! Starting an agent: what it needs, in the order in which it is needed.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use orca_cluster::goal::Goal;
use orca_cluster::node::Reconciler;
use orca_cluster::traffic::Legacy;
use orca_dataplane::DataPlane;
use orca_wire::cause::chain;
use orca_wire::endpoint::LocalError;
use orca_wire::identity::{Identity, Peer, SealError, SealingKey};
use orca_wire::{Access, Client, Endpoint, Plane};
use std::net::SocketAddr;
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinError, JoinSet};
use tracing::error;

use crate::docker::{self, Docker};
use crate::driver::{Driver, USAGE_INTERVAL};
use crate::errand::Errands;
use crate::hands::{Hands, Tools};
use crate::ledger::Ledger;
use crate::module_log::Logs;
use crate::session::Session;
use crate::wasm;

/// Goals that may wait to be taken; only the newest is used.
const GOALS_MAX: usize = 4;

#[derive(Debug)]
pub struct Config {
    /// The agent's own part of the data directory: ledger, modules, logs.
    pub directory: PathBuf,
    /// Where the node's sealing key is.
    pub keys: PathBuf,
    /// Directories that no container may mount any part of.
    pub state_directories: Vec<PathBuf>,
    /// Files of secrets go below this, if it is on tmpfs.
    pub runtime_directory: PathBuf,
    pub docker_socket: PathBuf,
    /// Where control nodes are.
    pub control: Vec<SocketAddr>,
    /// Who the node is; whoever renews its certificate puts the new one here.
    pub identity: watch::Receiver<Identity>,
    /// What its operator says of the node, for `placement.labels`.
    pub labels: BTreeMap<String, String>,
    /// What the node was last told to do, as [recalled](Agent::recall).
    pub goal: Option<Goal>,
    /// What the proxy that hands over to this one leaves, from before this one accepts anything.
    pub legacy: Option<watch::Receiver<Legacy>>,
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("the certificate in {} is not a node's", .0.display())]
    NotANode(PathBuf),
    #[error("the directory {} cannot be used", path.display())]
    Directory {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the node's sealing key cannot be used")]
    SealingKey(#[from] SealError),
    #[error(transparent)]
    Wasm(#[from] wasm::EngineError),
    #[error("no endpoint to reach control nodes from")]
    Endpoint(#[from] LocalError),
}

/// What of the agent the data plane needs before it starts.
#[derive(Debug)]
pub struct Modules {
    engine: wasm::Engine,
    pub replicas: Arc<wasm::Replicas>,
}

/// A running agent; dropped, it stops where it is. What it runs in containers goes on.
#[derive(Debug)]
pub struct Agent {
    tasks: JoinSet<()>,
}

/// Without the agent a node would look alive and do nothing it is told, so that the process must end.
#[derive(Debug, thiserror::Error)]
pub enum AgentEnded {
    #[error("the agent has ended without being told to")]
    Untold,
    #[error("the agent has failed")]
    Panicked(#[source] JoinError),
}

impl Agent {
    /// The Wasm engine, which the proxy calls into. `runtime` is where modules run.
    pub fn modules(directory: &std::path::Path, runtime: tokio::runtime::Handle) -> Result<Modules, StartError> {
        let engine = wasm::Engine::new(directory.join("compiled"), runtime)?;
        Ok(Modules { engine, replicas: Arc::default() })
    }

    /// The goal in the ledger: what belongs on this node without asking anyone.
    pub fn recall(directory: &std::path::Path) -> Option<Goal> {
        Ledger::in_directory(directory).read().unwrap_or_else(|fault| {
            error!(error = chain(&fault), "the ledger is not used; a control node will say what belongs here");
            None
        })
    }

    pub async fn start(config: Config, modules: Modules, dataplane: DataPlane) -> Result<Agent, StartError> {
        let Config {
            directory,
            keys,
            state_directories,
            runtime_directory,
            docker_socket,
            control,
            mut identity,
            labels,
            goal,
            mut legacy,
        } = config;
        let present = identity.borrow_and_update().clone();
        let Peer::Node { node, .. } = *present.peer() else {
            return Err(StartError::NotANode(directory));
        };
        let cluster = present.cluster();
        let sealing_key = SealingKey::load_or_create(&keys)?;
        let logs = Logs::open(directory.join("logs"))
            .map_err(|source| StartError::Directory { path: directory.join("logs"), source })?;
        let docker = Docker::new(docker::Config {
            socket: docker_socket,
            cluster: cluster.to_string(),
            runtime_directory,
            state_directories,
        });
        let endpoint = Endpoint::client(Access::Certificate(present))?;
        let session = Session::new(Client::new(endpoint.clone(), Plane::Agent, control));
        let (hands, finished) = Hands::new(Tools {
            docker: docker.clone(),
            wasm: modules.engine,
            replicas: modules.replicas,
            logs: logs.clone(),
            dataplane: dataplane.clone(),
            session: session.clone(),
            cluster,
            node,
            sealing_key,
            modules: directory.join("modules"),
        });
        let (goals, goals_taken) = mpsc::channel(GOALS_MAX);
        let (reports, reports_sent) = watch::channel(None);
        let errands = Errands { docker: docker.clone(), logs, node };
        let now = crate::clock::now();
        let mut brain = Reconciler::new(goal, now);
        if let Some(legacy) = &mut legacy {
            brain.handle_legacy(legacy.borrow_and_update().clone(), now);
        }
        let driver = Driver {
            brain,
            hands,
            finished,
            ledger: Ledger::in_directory(&directory),
            events: docker.events(),
            usage: docker.measure(USAGE_INTERVAL),
            dataplane,
            goals: goals_taken,
            legacy,
            reports,
            data: directory,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            labels,
        };
        let mut tasks = JoinSet::new();
        tasks.spawn(keep_certified(endpoint, identity));
        tasks.spawn(driver.run());
        tasks.spawn(session.run(reports_sent, goals, errands));
        Ok(Agent { tasks })
    }

    /// Waits for what should never be: the end of any of its parts.
    pub async fn ended(&mut self) -> AgentEnded {
        match self.tasks.join_next().await {
            Some(Err(failed)) if failed.is_panic() => AgentEnded::Panicked(failed),
            Some(Ok(()) | Err(_)) | None => AgentEnded::Untold,
        }
    }
}

/// A certificate lasts for days and a connection may be lost at any time: the next one takes the newest.
async fn keep_certified(endpoint: Endpoint, mut identity: watch::Receiver<Identity>) {
    while identity.changed().await.is_ok() {
        let newest = identity.borrow_and_update().clone();
        if let Err(fault) = endpoint.renew(newest) {
            error!(error = chain(&fault), "the node's new certificate cannot be used");
        }
    }
    // Nobody renews it any more. That the rest goes on as long as it can is none of this task's business.
    std::future::pending().await
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime, UNIX_EPOCH};

    use orca_cluster::id::{ClusterId, NodeId};
    use orca_cluster::time::Timestamp;
    use orca_wire::Wanted;
    use orca_wire::identity::{Authority, KeyRequest};

    use super::*;

    #[tokio::test]
    async fn a_renewed_certificate_is_shown_by_the_next_connection() {
        let now = Timestamp(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64);
        let authority = Authority::create(ClusterId(7), now);
        let node = |number, raft| {
            let request = KeyRequest::generate();
            let issued = authority.issue_node(&request.request(), NodeId(number), raft, now).unwrap();
            request.into_identity(&issued).unwrap()
        };
        let (server, mut accepted) =
            Endpoint::server("127.0.0.1:0".parse().unwrap(), node(1, Some(1)), |_: &_| Ok(())).unwrap();
        let (renewed, identity) = watch::channel(node(2, None));
        let endpoint = Endpoint::client(Access::Certificate(node(2, None))).unwrap();
        tokio::spawn(keep_certified(endpoint.clone(), identity));
        // Another node's, to be told from the first.
        renewed.send_replace(node(3, None));
        let shown = async {
            loop {
                let dialed =
                    endpoint.dial(server.local_address().unwrap(), Plane::Agent, Wanted::Control).await.unwrap();
                let peer = accepted.accept().await.unwrap().peer().clone();
                drop(dialed);
                if peer == (Peer::Node { node: NodeId(3), raft: None }) {
                    break;
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(10), shown).await.unwrap();
    }
}

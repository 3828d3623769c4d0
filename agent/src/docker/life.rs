//! Starting, stopping and removing a container that exists.

use std::net::SocketAddr;
use std::time::Duration;

use bollard::models::{ContainerInspectResponse, ContainerStateStatusEnum};
use bollard::query_parameters::{
    ContainerArchiveInfoOptionsBuilder, InspectContainerOptions, KillContainerOptionsBuilder,
    ListContainersOptionsBuilder, RemoveContainerOptionsBuilder, RemoveVolumeOptions, StartContainerOptions,
    StopContainerOptionsBuilder,
};
use orca_cluster::goal::ReplicaGoal;
use orca_cluster::id::{ReplicaId, ServiceName};
use orca_cluster::node::Finished;
use orca_cluster::replica::Cause;
use orca_cluster::spec::{SecretsAs, VolumeSource};

use super::create::{container, volume_name};
use super::listening::holder;
use super::secrets::{Environment, Open};
use super::{ANSWER_MAX, Docker, LABEL_CLUSTER, LABEL_REPLICA, address, error, is_on_host_network, is_running};

/// An address is there when the start returns; these tries are for an engine under load.
const ADDRESS_TRIES: u32 = 20;
const ADDRESS_PAUSE: Duration = Duration::from_millis(50);
/// A removal that someone else has begun ends within seconds.
const REMOVAL_TRIES: u32 = 100;
const REMOVAL_PAUSE: Duration = Duration::from_millis(100);
/// Where a command without a slash is looked for when neither image nor goal sets `PATH`: Docker's default.
const PATH_DEFAULT: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Bits of Go's `FileMode` (package io/fs), which is how the engine describes a file.
const GO_MODE_DIRECTORY: u32 = 1 << 31;
const GO_MODE_LINK: u32 = 1 << 27;

impl Docker {
    /// Starts what was created or has exited, and says where it can be reached. One that runs already is a success.
    pub async fn start(&self, replica: ReplicaId, goal: &ReplicaGoal, open: Open<'_>) -> Finished {
        self.try_start(replica, goal, open).await.unwrap_or_else(Finished::Failed)
    }

    async fn try_start(&self, replica: ReplicaId, goal: &ReplicaGoal, open: Open<'_>) -> Result<Finished, Cause> {
        let id = match self.find(replica).await? {
            Some(id) => id,
            None => return Err(Cause::Vanished),
        };
        if let Some(inspected) = self.inspect(&id).await? {
            if is_running(&inspected) {
                return Ok(Finished::Started { address: address(&inspected) });
            }
            if inspected.state.as_ref().and_then(|state| state.status) == Some(ContainerStateStatusEnum::CREATED) {
                self.check_command(&id, &inspected).await?;
            }
        }
        // A reboot empties what is in memory.
        let asked = container(goal)?;
        if asked.host.network {
            check_port(goal).await?;
        }
        self.check_mounts(asked)?;
        if asked.secrets_as == SecretsAs::Files {
            let environment = Environment::of(goal, asked, open)?;
            if !environment.files.is_empty() {
                self.write_secrets(replica, &environment)?;
            }
        }
        let mut started = self.client()?.start_container(&id, None::<StartContainerOptions>).await;
        if let Err(error) = &started
            && is_network_missing(&error::message(error))
        {
            self.join_again(&id, goal).await?;
            started = self.client()?.start_container(&id, None::<StartContainerOptions>).await;
        }
        match started {
            Ok(()) => {}
            Err(error) if error::status(&error) == Some(304) => {}
            Err(error) => return Err(start_cause(&error, goal).unwrap_or_else(|| self.cause(error))),
        }
        Ok(Finished::Started { address: self.running_address(&id, goal).await? })
    }

    async fn running_address(&self, id: &str, goal: &ReplicaGoal) -> Result<Option<SocketAddr>, Cause> {
        for _ in 0..ADDRESS_TRIES {
            let Some(inspected) = self.inspect(id).await? else { return Err(Cause::Vanished) };
            // It was started, and has ended since: that is an event of its own, with all there is to say of it.
            if !is_running(&inspected) {
                return Ok(None);
            }
            let address = address(&inspected);
            if address.is_some() || goal.port.is_none() {
                return Ok(address);
            }
            tokio::time::sleep(ADDRESS_PAUSE).await;
        }
        Err(Cause::Refused { reason: format!("the container got no address on the network {}", goal.network()) })
    }

    /// Looks for the command before the container is started. The init process, which starts whatever it is given,
    /// would turn a missing command into an exit like any other.
    async fn check_command(&self, id: &str, inspected: &ContainerInspectResponse) -> Result<(), Cause> {
        // What the engine will run, entry point first, however image and goal combined.
        let Some(command) = inspected.path.as_deref().filter(|path| !path.is_empty()) else { return Ok(()) };
        let config = inspected.config.clone().unwrap_or_default();
        let candidates: Vec<String> = if command.contains('/') {
            let base = config.working_dir.filter(|directory| !directory.is_empty()).unwrap_or_else(|| "/".to_owned());
            let absolute = if command.starts_with('/') { command.to_owned() } else { format!("{base}/{command}") };
            vec![absolute]
        } else {
            let variables = config.env.unwrap_or_default();
            let path = variables.iter().find_map(|variable| variable.strip_prefix("PATH=")).unwrap_or(PATH_DEFAULT);
            path.split(':').map(|directory| format!("{directory}/{command}")).collect()
        };
        let mut reason = "no such file in the image".to_owned();
        for candidate in &candidates {
            let options = ContainerArchiveInfoOptionsBuilder::default().path(candidate).build();
            match self.client()?.get_container_archive_info(id, Some(options)).await {
                Ok(file) if file.file_mode & GO_MODE_LINK != 0 => return Ok(()),
                Ok(file) if file.file_mode & GO_MODE_DIRECTORY != 0 => reason = format!("{candidate} is a directory"),
                Ok(file) if file.file_mode & 0o111 == 0 => reason = format!("{candidate} is not executable"),
                Ok(_) => return Ok(()),
                Err(error) if error::status(&error) == Some(404) => {}
                // The check is a courtesy: what it cannot see, the start will show.
                Err(_) => return Ok(()),
            }
        }
        if candidates.len() > 1 {
            reason.push_str(&format!("; looked in {}", candidates.join(", ")));
        }
        Err(Cause::NoSuchCommand { command: command.to_owned(), reason })
    }

    /// Asks the replica's process to end, ends it after `grace`, and returns when it has ended.
    pub async fn stop(&self, replica: ReplicaId, grace: Duration) -> Finished {
        self.try_stop(replica, grace).await.map_or_else(Finished::Failed, |()| Finished::Stopped)
    }

    async fn try_stop(&self, replica: ReplicaId, grace: Duration) -> Result<(), Cause> {
        let Some(id) = self.find(replica).await? else { return Ok(()) };
        // The engine counts whole seconds; it is given what it asked for, or a little more.
        let seconds = grace.as_secs() + u64::from(grace.subsec_nanos() > 0);
        let options = StopContainerOptionsBuilder::default().t(i32::try_from(seconds).unwrap_or(i32::MAX)).build();
        let client = self.client_within(ANSWER_MAX.saturating_add(grace))?;
        match client.stop_container(&id, Some(options)).await {
            Ok(()) => {}
            Err(error) if matches!(error::status(&error), Some(304 | 404)) => {}
            Err(error) => {
                tracing::warn!(%replica, error = error::message(&error), "the engine did not stop it; killing it");
                let options = KillContainerOptionsBuilder::default().signal("SIGKILL").build();
                match client.kill_container(&id, Some(options)).await {
                    Ok(()) => {}
                    // Gone, or not running any more.
                    Err(error) if matches!(error::status(&error), Some(404 | 409)) => {}
                    Err(error) => return Err(self.cause(error)),
                }
            }
        }
        Ok(())
    }

    /// Takes a replica's container away, running or not, with its secrets' files; with its volumes if `erase`.
    pub async fn remove(&self, replica: ReplicaId, goal: &ReplicaGoal, erase: bool) -> Finished {
        self.try_remove(replica, goal, erase).await.map_or_else(Finished::Failed, |()| Finished::Removed)
    }

    /// As [`remove`](Docker::remove), for one that was found here and belongs to no goal: its volumes stay.
    pub async fn remove_found(&self, replica: ReplicaId, service: &ServiceName) -> Finished {
        let network = format!("orca-{}", service.project);
        self.take_away(replica, &network).await.map_or_else(Finished::Failed, |()| Finished::Removed)
    }

    async fn try_remove(&self, replica: ReplicaId, goal: &ReplicaGoal, erase: bool) -> Result<(), Cause> {
        self.take_away(replica, &goal.network()).await?;
        if erase {
            for volume in &container(goal)?.volumes {
                if let VolumeSource::Named(name) = &volume.source {
                    self.erase_volume(&volume_name(goal, name)).await?;
                }
            }
        }
        Ok(())
    }

    async fn take_away(&self, replica: ReplicaId, network: &str) -> Result<(), Cause> {
        if let Some(id) = self.find(replica).await? {
            // `v` is for volumes without a name, which nobody could find again; named ones stay.
            let options = RemoveContainerOptionsBuilder::default().force(true).v(true).build();
            match self.client()?.remove_container(&id, Some(options)).await {
                Ok(()) => {}
                Err(error) if error::status(&error) == Some(404) => {}
                Err(error) if error::status(&error) == Some(409) => self.await_removal(&id, &error).await?,
                Err(error) => return Err(self.cause(error)),
            }
        }
        self.remove_secrets(replica)?;
        self.remove_unused_network(network).await
    }

    /// Someone else removes it already: waits until it is gone.
    async fn await_removal(&self, id: &str, error: &bollard::errors::Error) -> Result<(), Cause> {
        for _ in 0..REMOVAL_TRIES {
            if self.inspect(id).await?.is_none() {
                return Ok(());
            }
            tokio::time::sleep(REMOVAL_PAUSE).await;
        }
        Err(Cause::Refused { reason: error::message(error) })
    }

    async fn erase_volume(&self, name: &str) -> Result<(), Cause> {
        let client = self.client()?;
        match client.inspect_volume(name).await {
            Ok(volume) if volume.labels.get(LABEL_CLUSTER) == Some(&self.config().cluster) => {}
            // Not ours: then it is not ours to erase.
            Ok(_) => return Ok(()),
            Err(error) if error::status(&error) == Some(404) => return Ok(()),
            Err(error) => return Err(self.cause(error)),
        }
        match client.remove_volume(name, None::<RemoveVolumeOptions>).await {
            Ok(()) => Ok(()),
            Err(error) if error::status(&error) == Some(404) => Ok(()),
            Err(error) if error::status(&error) == Some(409) => match self.volume_user(name).await? {
                Some(by) => Err(Cause::VolumeBusy { volume: name.to_owned(), by }),
                None => Err(self.cause(error)),
            },
            Err(error) => Err(self.cause(error)),
        }
    }

    /// The replica whose container has this volume.
    async fn volume_user(&self, name: &str) -> Result<Option<ReplicaId>, Cause> {
        let filters = std::collections::HashMap::from([("volume", vec![name])]);
        let options = ListContainersOptionsBuilder::default().all(true).filters(&filters).build();
        let users = self.client()?.list_containers(Some(options)).await.map_err(|error| self.cause(error))?;
        Ok(users.into_iter().find_map(|user| user.labels?.get(LABEL_REPLICA)?.parse().ok()))
    }

    /// The process of a running replica, and whether it shares the host's network.
    pub(super) async fn process(&self, replica: ReplicaId) -> Option<(u32, bool)> {
        let id = self.find(replica).await.ok()??;
        let client = self.client().ok()?;
        let inspected = client.inspect_container(&id, None::<InspectContainerOptions>).await.ok()?;
        let pid = u32::try_from(inspected.state.as_ref()?.pid?).ok().filter(|pid| *pid > 0)?;
        Some((pid, is_on_host_network(&inspected)))
    }
}

/// On the host's network its port must be free: otherwise it would end without saying why, and probes would reach
/// whoever has the port.
async fn check_port(goal: &ReplicaGoal) -> Result<(), Cause> {
    let Some(port) = goal.port else { return Ok(()) };
    let looking = tokio::task::spawn_blocking(move || holder(port)).await;
    match looking.expect("looking neither panics nor is cancelled") {
        Some(by) => Err(Cause::PortTaken { port, by }),
        None => Ok(()),
    }
}

/// `network 225614cd… not found`: someone pruned it while nothing ran on it.
fn is_network_missing(message: &str) -> bool {
    message.contains("network ") && message.ends_with(" not found")
}

/// What the engine's words on a failed start mean, where they mean something known.
fn start_cause(error: &bollard::errors::Error, goal: &ReplicaGoal) -> Option<Cause> {
    let reason = error::message(error);
    // `container is marked for removal and cannot be started`
    if reason.contains("marked for removal") {
        return Some(Cause::Vanished);
    }
    let is_command = reason.contains("OCI runtime create failed") || reason.contains("failed to create shim");
    let no_command = ["executable file not found", "no such file or directory", "permission denied", "is a directory"]
        .iter()
        .any(|words| reason.contains(words));
    if is_command && no_command && reason.contains("exec") {
        // `… exec: "serve": executable file not found in $PATH: unknown`
        let command = reason.split("exec: \"").nth(1).and_then(|rest| rest.split('"').next()).unwrap_or_default();
        return Some(Cause::NoSuchCommand { command: command.to_owned(), reason });
    }
    if reason.contains("address already in use") || reason.contains("port is already allocated") {
        return Some(Cause::PortTaken { port: goal.port.unwrap_or_default(), by: reason });
    }
    None
}

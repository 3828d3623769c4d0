//! From a goal to a container: everything is said here once, and nothing of it changes in the container's life.

use std::collections::HashMap;
use std::net::IpAddr;

use bollard::models::{
    ContainerCreateBody, HostConfig, HostConfigLogConfig, Mount, MountType, MountVolumeOptions, NetworkingConfig,
    RestartPolicy, RestartPolicyNameEnum, VolumeCreateRequest,
};
use bollard::query_parameters::CreateContainerOptionsBuilder;
use orca_cluster::goal::{Container, ReplicaGoal, Workload};
use orca_cluster::id::{Label, ReplicaId};
use orca_cluster::node::Finished;
use orca_cluster::replica::Cause;
use orca_cluster::spec::VolumeSource;

use super::secrets::{Environment, Open, SECRETS_PATH};
use super::{
    Docker, Identity, LABEL_CLUSTER, LABEL_DIGEST, LABEL_PORT, LABEL_REPLICA, LABEL_REVISION, LABEL_SERVICE, error,
    network,
};

/// Processes and threads in one container; a fork bomb ends here, and no honest service comes near.
const PIDS_MAX: i64 = 4096;
/// Each container's log on disk: three files of ten megabytes.
const LOG_FILE_SIZE: &str = "10m";
const LOG_FILES: &str = "3";

impl Docker {
    /// Creates the replica's container from an image's id. `hosts` are names it can look up besides its project's.
    pub async fn create(
        &self,
        replica: ReplicaId,
        goal: &ReplicaGoal,
        image: &str,
        hosts: &[(String, IpAddr)],
        open: Open<'_>,
    ) -> Finished {
        self.try_create(replica, goal, image, hosts, open).await.unwrap_or_else(Finished::Failed)
    }

    async fn try_create(
        &self,
        replica: ReplicaId,
        goal: &ReplicaGoal,
        image: &str,
        hosts: &[(String, IpAddr)],
        open: Open<'_>,
    ) -> Result<Finished, Cause> {
        let container = container(goal)?;
        self.check_mounts(container)?;
        let mut mounts = Vec::new();
        for volume in &container.volumes {
            let (typ, source) = match &volume.source {
                VolumeSource::Named(name) => (MountType::VOLUME, self.ensure_volume(goal, name).await?),
                VolumeSource::Host(path) => (MountType::BIND, path.clone()),
            };
            // Docker would fill a new volume with what the image has there; that is what people expect of it.
            let volume_options =
                (typ == MountType::VOLUME).then(|| MountVolumeOptions { no_copy: Some(false), ..Default::default() });
            mounts.push(Mount {
                target: Some(volume.path.clone()),
                source: Some(source),
                typ: Some(typ),
                read_only: Some(volume.read_only),
                volume_options,
                ..Default::default()
            });
        }
        let environment = Environment::of(goal, container, open)?;
        if !environment.files.is_empty() {
            let directory = self.write_secrets(replica, &environment)?;
            mounts.push(Mount {
                target: Some(SECRETS_PATH.to_owned()),
                source: Some(directory.to_string_lossy().into_owned()),
                typ: Some(MountType::BIND),
                read_only: Some(true),
                ..Default::default()
            });
        }

        let networks = self.inner.networks.lock().await;
        let project = if container.host.network { None } else { Some(self.ensure_network(goal).await?) };
        let body = ContainerCreateBody {
            image: Some(image.to_owned()),
            cmd: Some(container.command.clone()).filter(|command| !command.is_empty()),
            env: Some(environment.variables.iter().map(|variable| variable.to_string()).collect()),
            labels: Some(self.labels(replica, goal, container, image)),
            host_config: Some(host_config(goal, container, project.clone(), mounts, hosts)),
            networking_config: project.map(|project| NetworkingConfig {
                endpoints_config: Some(HashMap::from([(project, network::endpoint(goal))])),
            }),
            ..Default::default()
        };
        let name = container_name(replica, goal);
        let options = CreateContainerOptionsBuilder::default().name(&name).build();
        let created = self.client()?.create_container(Some(options), body).await;
        drop(networks);
        match created {
            Ok(created) => {
                for warning in created.warnings {
                    tracing::debug!(%replica, warning, "the engine created the container with a warning");
                }
                Ok(Finished::Created)
            }
            Err(error) => match error::status(&error) {
                Some(409) => self.adopt(replica, &name).await,
                Some(404) => Err(Cause::ImageMissing { image: container.image.clone(), present: false }),
                _ => Err(self.cause(error)),
            },
        }
    }

    /// Takes the container that has the name already, if it is this replica's.
    async fn adopt(&self, replica: ReplicaId, name: &str) -> Result<Finished, Cause> {
        let found = self.inspect(name).await?;
        let labels = found.and_then(|found| found.config?.labels);
        match labels.as_ref().and_then(Identity::of) {
            Some(known) if known.cluster == self.config().cluster && known.replica == replica => Ok(Finished::Created),
            _ => Err(Cause::Refused {
                reason: format!(
                    "a container {name} that is not this cluster's is in the way; remove it: docker rm --force {name}"
                ),
            }),
        }
    }

    fn labels(
        &self,
        replica: ReplicaId,
        goal: &ReplicaGoal,
        container: &Container,
        image: &str,
    ) -> HashMap<String, String> {
        let digest = container.digest.clone().unwrap_or_else(|| image.to_owned());
        let mut labels = vec![
            (LABEL_CLUSTER, self.config().cluster.clone()),
            (LABEL_REPLICA, replica.to_string()),
            (LABEL_SERVICE, goal.service.to_string()),
            (LABEL_REVISION, goal.revision.to_string()),
            (LABEL_DIGEST, digest),
        ];
        labels.extend(goal.port.map(|port| (LABEL_PORT, port.to_string())));
        labels.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }

    /// Makes sure a named volume is there, and that it is ours.
    async fn ensure_volume(&self, goal: &ReplicaGoal, volume: &Label) -> Result<String, Cause> {
        let name = volume_name(goal, volume);
        let request = VolumeCreateRequest {
            name: Some(name.clone()),
            labels: Some(HashMap::from([
                (LABEL_CLUSTER.to_owned(), self.config().cluster.clone()),
                (LABEL_SERVICE.to_owned(), goal.service.to_string()),
            ])),
            ..Default::default()
        };
        // One that is there already is given back as it is.
        let volume = self.client()?.create_volume(request).await.map_err(|error| self.cause(error))?;
        match volume.labels.get(LABEL_CLUSTER) {
            Some(owner) if *owner == self.config().cluster => Ok(name),
            _ => Err(Cause::Refused {
                reason: format!(
                    "the Docker volume {name} is not this cluster's; rename or remove it: docker volume rm {name}"
                ),
            }),
        }
    }
}

/// What of the goal is a container's; a module is none.
pub(super) fn container(goal: &ReplicaGoal) -> Result<&Container, Cause> {
    match &goal.workload {
        Workload::Container(container) => Ok(container),
        Workload::Module(module) => {
            Err(Cause::Refused { reason: format!("{} is a module, not a container", module.path) })
        }
    }
}

pub(super) fn container_name(replica: ReplicaId, goal: &ReplicaGoal) -> String {
    format!("orca-{}-{}-{replica}", goal.service.project, goal.service.service)
}

/// A dot, which no label has, keeps volume `c` of project `a-b` apart from `b-c` of project `a`.
pub(super) fn volume_name(goal: &ReplicaGoal, volume: &Label) -> String {
    format!("orca-{}.{volume}", goal.service.project)
}

fn host_config(
    goal: &ReplicaGoal,
    container: &Container,
    network: Option<String>,
    mounts: Vec<Mount>,
    hosts: &[(String, IpAddr)],
) -> HostConfig {
    let limit = |amount: u64| i64::try_from(amount).unwrap_or(i64::MAX);
    let memory = goal.resources.memory.map(|memory| limit(memory.0));
    // A privileged container may do anything: taking two things from it would only confuse.
    let confined = !container.host.privileged;
    HostConfig {
        memory,
        // No swap: a service over its limit is killed and named, instead of slowing its host.
        memory_swap: memory,
        nano_cpus: goal.resources.cpu.map(|cpu| i64::from(cpu.0) * 1_000_000),
        pids_limit: Some(PIDS_MAX),
        init: Some(true),
        privileged: Some(container.host.privileged),
        cap_drop: confined.then(|| vec!["NET_RAW".to_owned()]),
        security_opt: confined.then(|| vec!["no-new-privileges:true".to_owned()]),
        restart_policy: Some(RestartPolicy { name: Some(RestartPolicyNameEnum::NO), ..Default::default() }),
        log_config: Some(HostConfigLogConfig {
            typ: Some("json-file".to_owned()),
            config: Some(HashMap::from([
                ("max-size".to_owned(), LOG_FILE_SIZE.to_owned()),
                ("max-file".to_owned(), LOG_FILES.to_owned()),
            ])),
        }),
        network_mode: Some(network.unwrap_or_else(|| "host".to_owned())),
        mounts: Some(mounts),
        extra_hosts: Some(hosts.iter().map(|(name, address)| format!("{name}:{address}")).collect()),
        ..Default::default()
    }
}

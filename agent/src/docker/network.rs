//! One bridge for each project: its containers see each other, by service name, and nobody else. Made when its first
//! container is, gone with its last: an engine has addresses for some thirty networks and no more.

use std::collections::HashMap;

use bollard::models::{EndpointSettings, NetworkConnectRequest, NetworkCreateRequest, NetworkDisconnectRequest};
use bollard::query_parameters::{InspectNetworkOptions, ListContainersOptionsBuilder};
use orca_cluster::goal::ReplicaGoal;
use orca_cluster::replica::Cause;

use super::{Docker, LABEL_CLUSTER, error};

impl Docker {
    /// Makes sure the project's network is there.
    pub(super) async fn ensure_network(&self, goal: &ReplicaGoal) -> Result<String, Cause> {
        let (client, name) = (self.client()?, goal.network());
        match client.inspect_network(&name, None::<InspectNetworkOptions>).await {
            Ok(network) => {
                let owner = network.labels.unwrap_or_default().remove(LABEL_CLUSTER);
                return match owner {
                    Some(owner) if owner == self.config().cluster => Ok(name),
                    _ => Err(Cause::Refused {
                        reason: format!(
                            "the Docker network {name} is not this cluster's; remove it if nothing uses it: docker network rm {name}"
                        ),
                    }),
                };
            }
            Err(error) if error::status(&error) == Some(404) => {}
            Err(error) => return Err(self.cause(error)),
        }
        let request = NetworkCreateRequest {
            name: name.clone(),
            driver: Some("bridge".to_owned()),
            labels: Some(HashMap::from([(LABEL_CLUSTER.to_owned(), self.config().cluster.clone())])),
            ..Default::default()
        };
        match client.create_network(request).await {
            Ok(_) => Ok(name),
            // Somebody else of this cluster was faster.
            Err(error) if error::status(&error) == Some(409) => Ok(name),
            Err(error) if error::message(&error).contains("non-overlapping IPv4 address pool") => Err(Cause::Refused {
                reason: format!(
                    "no addresses are left for the network {name}; remove unused ones (docker network prune) or widen \
                     default-address-pools in /etc/docker/daemon.json"
                ),
            }),
            Err(error) => Err(self.cause(error)),
        }
    }

    /// Puts a container that does not run on a network made anew: it knows its network by an id that is gone.
    pub(super) async fn join_again(&self, container: &str, goal: &ReplicaGoal) -> Result<(), Cause> {
        let _networks = self.inner.networks.lock().await;
        let name = self.ensure_network(goal).await?;
        let client = self.client()?;
        let leave = NetworkDisconnectRequest { container: container.to_owned(), force: Some(true) };
        let left = client.disconnect_network(&name, leave).await;
        let join = NetworkConnectRequest { container: container.to_owned(), endpoint_config: Some(endpoint(goal)) };
        let joined = client.connect_network(&name, join).await;
        left.and(joined).map_err(|error| self.cause(error))
    }

    /// Removes the project's network if no container, running or not, is on it. One that is not ours, or that
    /// someone joined in this moment, stays.
    pub(super) async fn remove_unused_network(&self, name: &str) -> Result<(), Cause> {
        let _networks = self.inner.networks.lock().await;
        let client = self.client()?;
        let filters = HashMap::from([("network", vec![name])]);
        let options = ListContainersOptionsBuilder::default().all(true).filters(&filters).build();
        let users = client.list_containers(Some(options)).await.map_err(|error| self.cause(error))?;
        let network = client.inspect_network(name, None::<InspectNetworkOptions>).await;
        let labels = network.ok().and_then(|network| network.labels).unwrap_or_default();
        if !users.is_empty() || labels.get(LABEL_CLUSTER) != Some(&self.config().cluster) {
            return Ok(());
        }
        match client.remove_network(name).await {
            Err(error) if !matches!(error::status(&error), Some(403 | 404 | 409)) => Err(self.cause(error)),
            _ => Ok(()),
        }
    }
}

/// How a container is known on its project's network: by its service's name.
pub(super) fn endpoint(goal: &ReplicaGoal) -> EndpointSettings {
    EndpointSettings { aliases: Some(vec![goal.service.service.to_string()]), ..Default::default() }
}

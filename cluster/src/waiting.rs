//! Why not yet. Waiting is data: the CLI, the API and the tests all read the same reasons.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::id::{Label, NodeId, ReplicaId, Revision, ServiceName};
use crate::replica::Trouble;
use crate::resource::{Cpu, Memory};
use crate::route::RouteKey;
use crate::time::Timestamp;

/// What a service that is not as it should be is waiting for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Waiting {
    ForReady {
        replica: ReplicaId,
        since: Timestamp,
        trouble: Option<Trouble>,
    },
    /// No node has room; each says what it lacks.
    ForRoom {
        refused: BTreeMap<NodeId, NoRoom>,
    },
    /// A replica's node is not heard and what it holds is not given to another.
    ForNode {
        node: NodeId,
        last_heard: Option<Timestamp>,
    },
    ForDependency {
        service: Label,
    },
    /// Connections of a replica that leaves.
    ForDrain {
        replica: ReplicaId,
        in_flight: u64,
        until: Timestamp,
    },
    ForStop {
        replica: ReplicaId,
    },
    /// The proxies take over new tables.
    ForProxies,
    /// It is to go, and answers this route until that service is ready to.
    ForTaker {
        route: RouteKey,
        service: ServiceName,
    },
    /// The canary runs; a person promotes it or rolls back.
    ForPromotion {
        revision: Revision,
        weight: u8,
    },
    /// The canary runs and is judged at `until`, or when it has answered `requests_min` requests.
    ForMeasurement {
        revision: Revision,
        weight: u8,
        until: Timestamp,
        requests: u64,
        requests_min: u64,
    },
}

/// Why a node cannot take a replica.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NoRoom {
    /// The service is pinned to another.
    Pinned {
        to: String,
    },
    /// What is in the service's volumes is on another, and nowhere else.
    VolumeElsewhere {
        on: String,
    },
    Label {
        key: String,
        wanted: String,
        has: Option<String>,
    },
    Memory {
        wanted: Memory,
        free: Memory,
        total: Memory,
    },
    Cpu {
        wanted: Cpu,
        free: Cpu,
        total: Cpu,
    },
    NotHeard,
}

impl std::fmt::Display for NoRoom {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            NoRoom::Pinned { to } => write!(f, "the service is pinned to node `{to}`"),
            NoRoom::VolumeElsewhere { on } => write!(f, "the service's volumes are on node `{on}`"),
            NoRoom::Label { key, wanted, has: Some(has) } => write!(f, "label {key} is `{has}`, not `{wanted}`"),
            NoRoom::Label { key, wanted, has: None } => write!(f, "it has no label {key} = `{wanted}`"),
            NoRoom::Memory { wanted, free, total } => {
                write!(f, "memory: {wanted} wanted, {free} of {total} not set aside")
            }
            NoRoom::Cpu { wanted, free, total } => write!(f, "cpu: {wanted} wanted, {free} of {total} not set aside"),
            NoRoom::NotHeard => f.write_str("it is not heard"),
        }
    }
}

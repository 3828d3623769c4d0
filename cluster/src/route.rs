//! The complete routing truth for a node: which request goes to which replicas. Computed whole, never patched;
//! the data plane is given a [`Tables`] and nothing else.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::id::{Generation, GoalNumber, NodeId, ReplicaId, Revision, ServiceName};
use crate::spec::{Host, Route};

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Tables {
    /// The goal this came with: what a node acknowledges.
    pub number: GoalNumber,
    pub generation: Generation,
    /// Each route belongs to one service; [`plan::route`](mod@crate::plan::route) says to which.
    pub routes: BTreeMap<RouteKey, ServiceName>,
    pub services: BTreeMap<ServiceName, Upstream>,
}

/// [`Route`] as a map key; JSON needs keys to be text. That text is for programs: people are shown the route in it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RouteKey(pub Route);

/// One service as the proxy sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upstream {
    /// Ready replicas only. One that drains is absent: what it is serving goes on, nothing new goes to it.
    pub backends: Vec<Backend>,
    /// Why there is none, when there is none; shown on the 503 page.
    pub absence: Absence,
    /// How long a request that was sent may wait for the first byte of a response's head; of a module a little more than
    /// it has itself.
    pub response_timeout: Duration,
    /// Whether the replicas are Wasm: they are called in this process, not over a socket.
    pub module: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backend {
    pub replica: ReplicaId,
    pub revision: Revision,
    pub node: NodeId,
    /// Absent for a module that runs in this process.
    pub address: Option<SocketAddr>,
    /// Share of the requests relative to the other backends, 1 to 1000; equal for all but a canary.
    pub weight: u16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Absence {
    /// The first replica is not ready yet.
    Starting,
    /// `orca stop` was called.
    Stopped,
    /// No replicas are wanted: it is scaled to 0.
    ScaledToZero,
    /// There are replicas and none is ready, or the first revision did not get ready and was given up.
    Failing,
}

impl Absence {
    /// Whether a replica may be there in a moment, so that a request had better wait for it.
    pub fn may_end_soon(self) -> bool {
        match self {
            Absence::Starting | Absence::Failing => true,
            Absence::Stopped | Absence::ScaledToZero => false,
        }
    }
}

impl From<RouteKey> for String {
    fn from(RouteKey(Route { host, path }): RouteKey) -> String {
        match host {
            Host::Exact(name) => format!("{name}{path}"),
            Host::Wildcard(name) => format!("*.{name}{path}"),
            Host::Any => format!("*{path}"),
        }
    }
}

impl TryFrom<String> for RouteKey {
    type Error = String;
    fn try_from(text: String) -> Result<RouteKey, String> {
        let slash = text.find('/').ok_or_else(|| format!("`{text}` is no route: it has no path"))?;
        let (host, path) = text.split_at(slash);
        let host = match (host, host.strip_prefix("*.")) {
            ("*", _) => Host::Any,
            (_, Some(rest)) => Host::Wildcard(rest.to_owned()),
            (exact, None) => Host::Exact(exact.to_owned()),
        };
        Ok(RouteKey(Route { host, path: path.to_owned() }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_stored_as_they_always_were() {
        for key in ["a.test/x", "*.a.test/", "*/x"] {
            assert_eq!(String::from(RouteKey::try_from(key.to_owned()).unwrap()), key);
        }
    }
}

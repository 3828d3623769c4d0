//! What nodes last said, and when. Volatile: it is rebuilt from reports after an election and never replicated.
//! A node not heard yet and a node gone silent are different things, and nobody is called dead before a whole
//! window has passed since this leader's term began.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use crate::id::{NodeId, ReplicaId};
use crate::replica::{Observed, ReplicaReport};
use crate::time::Timestamp;
use crate::traffic::Traffic;

/// Nodes report this often when nothing happens.
pub const REPORT_INTERVAL: Duration = Duration::from_secs(1);
/// Silent for so long, a node's backends leave the routes.
pub const SUSPECT_AFTER: Duration = Duration::from_secs(6);
/// Silent for so long, its replicas are placed elsewhere.
pub const DEAD_AFTER: Duration = Duration::from_secs(30);

/// Proxies of one node that have ended and whose counters are kept: a node where more than these end during one rollout
/// has other worries than its receipt.
const ENDED_KEPT: usize = 4;

#[derive(Debug, Clone)]
pub struct Inventory {
    began: Timestamp,
    nodes: BTreeMap<NodeId, Heard>,
    /// Since when no proxy that is heard has given each replica that drains anything new.
    unrouted: BTreeMap<ReplicaId, Timestamp>,
}

#[derive(Debug, Clone)]
struct Heard {
    at: Timestamp,
    observed: Arc<Observed>,
    /// What was last heard of proxies of this node that have ended, oldest first.
    ended: Vec<Arc<Observed>>,
}

impl Inventory {
    pub fn new(began: Timestamp) -> Inventory {
        Inventory { began, nodes: BTreeMap::new(), unrouted: BTreeMap::new() }
    }

    pub fn record(&mut self, node: NodeId, observed: Observed, now: Timestamp) {
        let observed = Arc::new(observed);
        let mut ended = Vec::new();
        if let Some(before) = self.nodes.remove(&node) {
            ended = before.ended;
            if before.observed.traffic.started != observed.traffic.started {
                ended.push(before.observed);
                ended.drain(..ended.len().saturating_sub(ENDED_KEPT));
            }
        }
        self.nodes.insert(node, Heard { at: now, observed, ended });
    }

    pub fn heard(&self, node: NodeId) -> Option<Timestamp> {
        self.nodes.get(&node).map(|heard| heard.at)
    }

    pub fn observed(&self, node: NodeId) -> Option<&Observed> {
        self.nodes.get(&node).map(|heard| &*heard.observed)
    }

    pub fn all(&self) -> impl Iterator<Item = (NodeId, &Observed)> {
        self.nodes.iter().map(|(node, heard)| (*node, &*heard.observed))
    }

    /// What proxies of this node that have ended last said of their traffic, oldest first.
    pub fn ended(&self, node: NodeId) -> impl Iterator<Item = &Traffic> {
        self.nodes.get(&node).into_iter().flat_map(|heard| &heard.ended).map(|observed| &observed.traffic)
    }

    /// What the node says about a replica placed on it.
    pub fn replica(&self, node: NodeId, replica: ReplicaId) -> Option<&ReplicaReport> {
        self.observed(node)?.replicas.get(&replica)
    }

    /// These are the replicas that drain and that every proxy which is heard has acknowledged to be without. One that was
    /// among them before has been so since then; after an election the time begins anew, which is the safe side.
    pub fn note_unrouted(&mut self, replicas: &BTreeSet<ReplicaId>, now: Timestamp) {
        self.unrouted.retain(|replica, _| replicas.contains(replica));
        for replica in replicas {
            self.unrouted.entry(*replica).or_insert(now);
        }
    }

    /// From when the drain time of this replica counts.
    pub fn unrouted_since(&self, replica: ReplicaId) -> Option<Timestamp> {
        self.unrouted.get(&replica).copied()
    }

    /// When this node was last known to be there: heard, or taken for granted when the term began.
    fn last(&self, node: NodeId) -> Timestamp {
        self.heard(node).unwrap_or(self.began).max(self.began)
    }

    pub fn is_suspect(&self, node: NodeId, now: Timestamp) -> bool {
        now.since(self.last(node)) >= SUSPECT_AFTER
    }

    /// Silent for the whole window.
    pub fn is_silent(&self, node: NodeId, now: Timestamp) -> bool {
        now.since(self.last(node)) >= DEAD_AFTER
    }

    /// When the next node becomes suspect or dead if it stays silent.
    pub fn deadline(&self, now: Timestamp) -> Option<Timestamp> {
        self.nodes
            .keys()
            .flat_map(|node| [self.last(*node) + SUSPECT_AFTER, self.last(*node) + DEAD_AFTER])
            .filter(|at| *at > now)
            .min()
    }

    /// Whether judgement is possible: every one of these nodes was heard, or had the time to be.
    pub fn is_complete(&self, mut nodes: impl Iterator<Item = NodeId>, now: Timestamp) -> bool {
        now.since(self.began) >= SUSPECT_AFTER || nodes.all(|node| self.nodes.contains_key(&node))
    }

    pub fn began(&self) -> Timestamp {
        self.began
    }
}

//! What sessions have for the brain. Holds the newest report of each node and no older one, so it cannot overflow.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};

use orca_cluster::id::NodeId;
use orca_cluster::replica::Observed;
use tokio::sync::Notify;

#[derive(Debug, Default)]
pub struct Inbox {
    held: Mutex<Held>,
    filled: Notify,
}

#[derive(Debug, Default)]
pub struct Held {
    pub reports: BTreeMap<NodeId, Observed>,
    pub connected: BTreeSet<NodeId>,
}

impl Inbox {
    pub fn report(&self, node: NodeId, observed: Observed) {
        self.with(|held| held.reports.insert(node, observed));
        self.filled.notify_one();
    }

    /// A node has a new session: what it was sent before may not have arrived.
    pub fn connected(&self, node: NodeId) {
        self.with(|held| held.connected.insert(node));
        self.filled.notify_one();
    }

    /// A node's last session is over: what it said last says nothing about later.
    pub fn gone(&self, node: NodeId) {
        self.with(|held| held.reports.remove(&node));
    }

    /// Waits until there is something.
    pub async fn filled(&self) {
        self.filled.notified().await;
    }

    pub fn take(&self) -> Held {
        self.with(std::mem::take)
    }

    fn with<T>(&self, act: impl FnOnce(&mut Held) -> T) -> T {
        // Whole values go in and out, so a panic elsewhere has left it whole.
        act(&mut self.held.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

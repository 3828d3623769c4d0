//! A node to test with, peers in one process, and waiting without sleeping.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use orca_cluster::command::{Announcement, Command, Entry};
use orca_cluster::event::{Actor, Kind};
use orca_cluster::state::State;
use orca_cluster::time::Timestamp;
use orca_control::raft::{CallError, Lane, Member, PeerTransport, Raft, RaftConfig, RaftId};

/// Generous: two cores that others use too.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub fn entry(text: impl Into<String>) -> Entry {
    let announcement = Announcement { kind: Kind::ScheduleRan, service: None, replica: None, text: text.into() };
    Entry { at: Timestamp(1), actor: Actor::Orca, source: None, command: Command::Announce(vec![announcement]) }
}

pub fn texts(state: &State) -> Vec<String> {
    state.events.iter().map(|event| event.text.clone()).collect()
}

pub fn member(id: u64) -> Member {
    Member { id: RaftId(id), name: format!("n{id}"), address: format!("address of {id}") }
}

/// For a node that has no peers. Nothing is ever sent.
#[derive(Clone)]
pub struct NoPeers;

impl PeerTransport for NoPeers {
    async fn call(&self, to: RaftId, _: &str, _: Lane, _: Bytes, _: Duration) -> Result<Bytes, CallError> {
        panic!("{to} was called, and there is nobody")
    }
}

/// Carries calls between nodes of this process, unless one of them is cut off.
#[derive(Clone, Default)]
pub struct Switch {
    shared: Arc<Mutex<Shared>>,
}

#[derive(Default)]
struct Shared {
    nodes: BTreeMap<RaftId, Raft>,
    cut: BTreeSet<RaftId>,
    snapshots: u64,
}

impl Switch {
    pub fn cut(&self, id: RaftId) {
        self.shared.lock().unwrap().cut.insert(id);
    }

    pub fn heal(&self, id: RaftId) {
        self.shared.lock().unwrap().cut.remove(&id);
    }

    pub fn unplug(&self, id: RaftId) -> Option<Raft> {
        self.shared.lock().unwrap().nodes.remove(&id)
    }

    pub fn plug(&self, node: Raft) {
        self.shared.lock().unwrap().nodes.insert(node.id(), node);
    }

    /// How many whole snapshots have been asked to be carried.
    pub fn snapshots(&self) -> u64 {
        self.shared.lock().unwrap().snapshots
    }
}

/// One node's plug in the switch.
#[derive(Clone)]
pub struct Cable {
    pub from: RaftId,
    pub switch: Switch,
}

impl PeerTransport for Cable {
    async fn call(
        &self,
        to: RaftId,
        address: &str,
        lane: Lane,
        request: Bytes,
        _: Duration,
    ) -> Result<Bytes, CallError> {
        assert_eq!(address, member(to.0).address);
        let away = || CallError::Unreachable(format!("{to} is away"));
        let peer = {
            let mut shared = self.switch.shared.lock().unwrap();
            shared.snapshots += u64::from(lane == Lane::Snapshot);
            if shared.cut.contains(&to) || shared.cut.contains(&self.from) {
                return Err(away());
            }
            shared.nodes.get(&to).cloned()
        };
        let answer = peer.ok_or_else(away)?.handle(self.from, request).await;
        match self.switch.shared.lock().unwrap().cut.contains(&self.from) {
            true => Err(CallError::TimedOut),
            false => Ok(answer),
        }
    }
}

pub async fn start_alone(dir: &Path) -> Raft {
    Raft::start(RaftConfig::new(RaftId(1), "test", dir), NoPeers).await.unwrap()
}

pub async fn found_alone(dir: &Path) -> Raft {
    let raft = start_alone(dir).await;
    raft.initialise(member(1)).await.unwrap();
    raft
}

/// Waits until `node` has applied a state for which this holds.
pub async fn until(node: &Raft, what: &str, holds: impl Fn(&State) -> bool) -> Arc<State> {
    let mut states = node.watch();
    let waited = tokio::time::timeout(PATIENCE, states.wait_for(|state| holds(state))).await;
    let found = waited.unwrap_or_else(|_| panic!("{node:?} never saw {what}: {:?}", node.metrics()));
    found.expect("the node runs").clone()
}

pub async fn leads(node: &Raft) {
    let mut leadership = node.leadership();
    let waited = tokio::time::timeout(PATIENCE, leadership.wait_for(Option::is_some)).await;
    waited.unwrap_or_else(|_| panic!("{node:?} never led: {:?}", node.metrics())).expect("the node runs");
}

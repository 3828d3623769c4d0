//! What the control nodes agree on, and how one asks them to.
//!
//! [`Raft`] is the handle everything else uses; openraft is an implementation detail of this directory, because
//! its types change with every release and nothing outside should have to. It runs on a small runtime of its own:
//! a heartbeat that waits for somebody's request handler is an election.
//!
//! Two rules for callers. Being leader is [`Raft::leadership`] and nothing else: it is given out only after a
//! majority confirmed it in this term. And a [`Fatal`] ends this handle: the store refuses all further writes,
//! and only opening it again tells what is on disk.

pub mod codec;
mod log;
mod machine;
pub mod network;
#[cfg(test)]
mod suite;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::future::Future;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use openraft::async_runtime::watch::WatchReceiver as _;
use openraft::errors::{ClientWriteError, ForwardReason, ForwardToLeader, LinearizableReadError, RaftError};
use openraft::vote::leader_id_std;
use openraft::{Config, Instant as _, ReadPolicy, ServerState, SnapshotPolicy};
use orca_cluster::command::{Applied, Entry};
use orca_cluster::limit::json_bytes;
use orca_cluster::state::State;
use serde::{Deserialize, Serialize};
use tokio::runtime::{Handle, Runtime};
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

use self::codec::{CodecError, Identity};
use self::log::Log;
use self::machine::Machine;
pub use self::network::{CallError, Lane, PeerTransport};
use crate::store::{OpenError, Slot, Store, StoreError};

/// Measured: with these and pre-vote, a killed leader is replaced within 1.2 s at the 99th percentile; shorter
/// ones trip over a store write that takes 200 ms, as one does now and then.
const HEARTBEAT: Duration = Duration::from_millis(100);
const ELECTION_MIN: Duration = Duration::from_millis(300);
const ELECTION_MAX: Duration = Duration::from_millis(600);

/// A leader that no majority has confirmed for this long is one no more. Longer than an election takes, so that a
/// hiccup of the network does not end a term.
const LEADERSHIP_DOUBT: Duration = Duration::from_secs(2);

/// Entries after which the log is cut and the state kept whole. Replay at start takes at most about twice this.
pub const SNAPSHOT_EVERY: u64 = 1_000;

/// How long a whole snapshot may take to reach a peer and be on its disk.
const SNAPSHOT_DEADLINE: Duration = Duration::from_secs(30);

/// How long a proposal or read may take. Two elections, and the write itself.
const DEADLINE: Duration = Duration::from_secs(5);

/// How long a stopping leader waits for its successor.
const TRANSFER_DEADLINE: Duration = Duration::from_secs(2);

/// The largest entry. Larger ones would make every peer's memory and every snapshot pay for one mistake.
pub const ENTRY_BYTES_MAX: usize = 4 << 20;

/// A learner this many entries behind may not become a voter: it would count for a majority and not help it.
const VOTER_LAG_MAX: u64 = 100;

/// How often everything on disk is read and checked.
const SCRUB_EVERY: Duration = Duration::from_secs(24 * 60 * 60);

/// How long a new member may take to catch up: a snapshot, twice.
const JOIN_DEADLINE: Duration = Duration::from_secs(60);

/// Threads of the runtime. One would let a long snapshot delay a heartbeat; more is waste.
const THREADS: usize = 2;

/// How long tasks may take to end at shutdown; they wait for nothing but the store.
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(5);

openraft::declare_raft_types!(
    /// Leaders are named by term alone (`leader_id_std`), so that there is at most one in each: goals are numbered
    /// by term, and two leaders must not number alike.
    pub Types:
        D = Change,
        R = Option<Applied>,
        NodeId = RaftId,
        Node = Peer,
        Term = u64,
        LeaderId = leader_id_std::LeaderId<u64, RaftId>,
);

type LeaderId = leader_id_std::CommittedLeaderId<u64>;
type RaftLogId = openraft::LogId<LeaderId>;
type RaftVote = openraft::Vote<leader_id_std::LeaderId<u64, RaftId>>;
type RaftPayload = openraft::EntryPayload<Change, RaftId, Peer>;
type RaftEntry = openraft::Entry<LeaderId, RaftPayload>;
type RaftMembership = openraft::Membership<RaftId, Peer>;
type RaftStoredMembership = openraft::StoredMembership<LeaderId, RaftId, Peer>;
type RaftSnapshotMeta = openraft::SnapshotMeta<LeaderId, RaftId, Peer>;
type RaftSnapshot = openraft::Snapshot<LeaderId, RaftId, Peer, Arc<State>>;
type RaftAppend = openraft::raft::AppendEntriesRequest<Types>;
type RaftAppended = openraft::raft::AppendEntriesResponse<Types>;
type RaftVoteRequest = openraft::raft::VoteRequest<Types>;
type RaftVoteAnswer = openraft::raft::VoteResponse<Types>;
type RaftSnapshotAnswer = openraft::raft::SnapshotResponse<Types>;
type RaftTransfer = openraft::raft::TransferLeaderRequest<Types>;
type RaftTransferAnswer = openraft::raft::TransferLeaderResponse<Types>;
type RaftMetrics = openraft::RaftMetrics<Types>;

/// A control node, for Raft. Never used twice: a node whose disk was wiped has forgotten its votes and must come
/// back as another. The log index of the entry that admitted the node is such a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RaftId(pub u64);

impl fmt::Display for RaftId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "control node {}", self.0)
    }
}

impl From<u64> for RaftId {
    fn from(id: u64) -> RaftId {
        RaftId(id)
    }
}

/// Counts leaders: a later one has a larger term, and no two share one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Term(pub u64);

/// How a control node is found. Part of what is agreed on.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Peer {
    pub name: String,
    pub address: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    pub id: RaftId,
    pub name: String,
    pub address: String,
}

/// A proposal, as openraft carries it.
#[derive(Debug, Clone, PartialEq)]
pub struct Change(pub Entry);

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("change")
    }
}

#[derive(Debug, Clone)]
pub struct RaftConfig {
    pub id: RaftId,
    /// The cluster's id. A store made for another one is refused.
    pub cluster: String,
    /// The store's directory.
    pub dir: PathBuf,
    /// Usually [`SNAPSHOT_EVERY`].
    pub snapshot_every: u64,
}

impl RaftConfig {
    pub fn new(id: RaftId, cluster: impl Into<String>, dir: impl Into<PathBuf>) -> RaftConfig {
        RaftConfig { id, cluster: cluster.into(), dir: dir.into(), snapshot_every: SNAPSHOT_EVERY }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Store(#[from] OpenError),
    #[error(
        "the store in {} belongs to {} of cluster {}, and this is {id} of cluster {cluster}; point orca at its own \
         data directory",
        dir.display(), found.id, found.cluster
    )]
    Foreign { dir: PathBuf, found: Identity, id: RaftId, cluster: String },
    #[error(transparent)]
    Damaged(#[from] CodecError),
    #[error(transparent)]
    Fatal(#[from] Fatal),
    #[error("cannot start raft's threads")]
    Threads(#[source] std::io::Error),
}

/// This handle is over. Opening the store again tells what is on disk, and what can be done.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Fatal {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("raft failed: {0}")]
    Failed(Arc<str>),
    #[error("raft was shut down")]
    Shutdown,
}

/// An entry that is in the log for ever, where it is, and what applying it gave.
#[derive(Debug, Clone, PartialEq)]
pub struct Committed {
    pub index: u64,
    pub applied: Applied,
}

#[derive(Debug, thiserror::Error)]
pub enum ProposeError {
    /// Nothing was proposed; ask there.
    #[error("{}", NotLeaderText(.leader))]
    NotLeader { leader: Option<Member> },
    /// Nothing was proposed; it may work later.
    #[error("no majority of the control nodes can be reached; nothing was changed")]
    NoQuorum,
    /// The entry may be in the log or may yet get there. Look before proposing again.
    #[error("{0}; the change may have been made all the same, look before trying again")]
    Unknown(Doubt),
    #[error("the change has {bytes} bytes, and {ENTRY_BYTES_MAX} is the most")]
    TooLarge { bytes: usize },
    #[error(transparent)]
    Fatal(#[from] Fatal),
}

/// Why nobody can say what became of a proposal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Doubt {
    #[error("no majority answered in time")]
    TimedOut,
    #[error("the leader changed meanwhile")]
    LeaderChanged,
}

#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("{}", NotLeaderText(.leader))]
    NotLeader { leader: Option<Member> },
    #[error("no majority of the control nodes can be reached")]
    NoQuorum,
    #[error(transparent)]
    Fatal(#[from] Fatal),
}

#[derive(Debug, thiserror::Error)]
pub enum MembershipError {
    #[error("{}", NotLeaderText(.leader))]
    NotLeader { leader: Option<Member> },
    #[error("{id} is {behind} entries behind and cannot vote yet; wait until it has caught up")]
    Lagging { id: RaftId, behind: u64 },
    #[error("the change of members was refused: {0}")]
    Refused(String),
    #[error("{0}; the members may have changed all the same, look before trying again")]
    Unknown(Doubt),
    #[error(transparent)]
    Fatal(#[from] Fatal),
}

#[derive(Debug, thiserror::Error)]
pub enum InitialiseError {
    #[error("this control node has a log already; a cluster is founded once, on an empty data directory")]
    NotEmpty,
    #[error("the first member is {asked}, and this is {id}")]
    NotMe { id: RaftId, asked: RaftId },
    #[error(transparent)]
    Fatal(#[from] Fatal),
}

struct NotLeaderText<'a>(&'a Option<Member>);

impl fmt::Display for NotLeaderText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(leader) => write!(f, "not the leader; ask {} at {}", leader.name, leader.address),
            None => f.write_str("not the leader, and no leader is known; try again in a moment"),
        }
    }
}

/// Where this node stands. For people and graphs; decisions hang on [`Raft::leadership`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Metrics {
    pub id: RaftId,
    pub term: Term,
    pub leader: Option<RaftId>,
    pub last_index: Option<u64>,
    pub committed_index: Option<u64>,
    pub applied_index: Option<u64>,
    pub snapshot_index: Option<u64>,
    pub purged_index: Option<u64>,
    pub voters: BTreeSet<RaftId>,
    pub learners: BTreeSet<RaftId>,
    /// The leader knows how far each member's log agrees with its own.
    pub matched: BTreeMap<RaftId, Option<u64>>,
}

/// A control node's part in the agreement. Clones are the same node.
#[derive(Clone)]
pub struct Raft {
    inner: Arc<Inner>,
}

impl fmt::Debug for Raft {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Raft").field("id", &self.inner.id).finish_non_exhaustive()
    }
}

struct Inner {
    id: RaftId,
    node: openraft::Raft<Types, Machine>,
    state: watch::Receiver<Arc<State>>,
    leadership: watch::Receiver<Option<Term>>,
    store_failure: watch::Receiver<Option<StoreError>>,
    runtime: Mutex<Option<Runtime>>,
    handle: Handle,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // A runtime may not be dropped where async code runs, which is where a handle usually is.
        if let Some(runtime) = take(&self.runtime) {
            runtime.shutdown_background();
        }
    }
}

fn take(runtime: &Mutex<Option<Runtime>>) -> Option<Runtime> {
    runtime.lock().unwrap_or_else(PoisonError::into_inner).take()
}

impl Raft {
    /// Opens the store and takes part in whatever it says this node is part of; on a new one, waits to be
    /// [initialised](Raft::initialise) or added by a leader.
    pub async fn start(config: RaftConfig, transport: impl PeerTransport) -> Result<Raft, StartError> {
        let dir = config.dir.clone();
        // All of it is read, which may take a moment.
        let opened = tokio::task::spawn_blocking(move || Store::open(&dir)).await;
        let store = opened.expect("opening a store does not panic")?;
        Raft::start_on(config, store, transport).await
    }

    /// The same on a store that is open already; `config.dir` only names it.
    pub async fn start_on(config: RaftConfig, store: Store, transport: impl PeerTransport) -> Result<Raft, StartError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(THREADS)
            .thread_name("orca-raft")
            .enable_all()
            .build()
            .map_err(StartError::Threads)?;
        let failures = store.failures();
        let started = runtime.spawn(start(config, store, transport)).await;
        // The task has no way to be cancelled, and its panics are ours.
        let (id, node, store_failure, state) = match started.expect("starting raft does not panic") {
            Ok(started) => started,
            Err(error) => {
                runtime.shutdown_background();
                // The next try must not find the file in use by this one. What does not end in time is for it to say.
                let _ = tokio::time::timeout(SHUTDOWN_DEADLINE, released(failures)).await;
                return Err(error);
            }
        };
        let (confirmed, leadership) = watch::channel(None);
        runtime.spawn(confirm_leadership(node.clone(), confirmed));
        let handle = runtime.handle().clone();
        let runtime = Mutex::new(Some(runtime));
        Ok(Raft { inner: Arc::new(Inner { id, node, state, leadership, store_failure, runtime, handle }) })
    }

    pub fn id(&self) -> RaftId {
        self.inner.id
    }

    /// Founds a cluster of this one node. Returns when it leads.
    pub async fn initialise(&self, first: Member) -> Result<(), InitialiseError> {
        if first.id != self.inner.id {
            return Err(InitialiseError::NotMe { id: self.inner.id, asked: first.id });
        }
        let peer = Peer { name: first.name, address: first.address };
        match self.inner.node.initialize(BTreeMap::from([(first.id, peer)])).await {
            Ok(()) => {}
            Err(RaftError::APIError(_)) => return Err(InitialiseError::NotEmpty),
            Err(RaftError::Fatal(fatal)) => return Err(self.reason(&fatal).into()),
        }
        let mut leadership = self.leadership();
        tokio::select! {
            // The sender lives as long as the runtime; if that ends, so says `fatal`.
            Ok(_) = leadership.wait_for(Option::is_some) => Ok(()),
            fatal = self.fatal() => Err(fatal.into()),
        }
    }

    /// Proposes an entry, and returns when it is committed, applied here, and found in [`Raft::state`].
    pub async fn propose(&self, entry: Entry) -> Result<Committed, ProposeError> {
        let change = Change(entry);
        let bytes = usize::try_from(json_bytes(&change.0)).unwrap_or(usize::MAX);
        if bytes > ENTRY_BYTES_MAX {
            return Err(ProposeError::TooLarge { bytes });
        }
        match within(DEADLINE, self.inner.node.client_write(change)).await {
            Some(Ok(written)) => Ok(Committed {
                index: written.log_id.index,
                applied: written.data.expect("applying a change gives an answer"),
            }),
            Some(Err(RaftError::APIError(error))) => Err(match error {
                ClientWriteError::ForwardToLeader(ForwardToLeader { reason: ForwardReason::LeaseExpired, .. }) => {
                    ProposeError::NoQuorum
                }
                ClientWriteError::ForwardToLeader(leader) => ProposeError::NotLeader { leader: member(leader) },
                ClientWriteError::LogEntryDiscarded(_) => ProposeError::Unknown(Doubt::LeaderChanged),
                // Neither a membership nor a precondition was asked for.
                ClientWriteError::ChangeMembershipError(_) | ClientWriteError::PreconditionFailed(_) => {
                    ProposeError::Unknown(Doubt::LeaderChanged)
                }
            }),
            Some(Err(RaftError::Fatal(fatal))) => Err(self.reason(&fatal).into()),
            None => Err(ProposeError::Unknown(Doubt::TimedOut)),
        }
    }

    /// The state with everything in it that was acknowledged, anywhere, before this was called. Only the leader
    /// can tell.
    pub async fn read(&self) -> Result<Arc<State>, ReadError> {
        let confirmed = within(DEADLINE, async {
            loop {
                match self.inner.node.ensure_linearizable(ReadPolicy::ReadIndex).await {
                    Ok(_) => return Ok(()),
                    Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(leader))) => {
                        return Err(match leader.reason {
                            ForwardReason::LeaseExpired => ReadError::NoQuorum,
                            ForwardReason::NotLeader | ForwardReason::LeadershipTransfer => {
                                ReadError::NotLeader { leader: member(leader) }
                            }
                        });
                    }
                    // One lost heartbeat is enough for this; ask again while there is time.
                    Err(RaftError::APIError(LinearizableReadError::QuorumNotEnough(_))) => {
                        tokio::time::sleep(HEARTBEAT).await;
                    }
                    Err(RaftError::Fatal(fatal)) => return Err(self.reason(&fatal).into()),
                }
            }
        });
        confirmed.await.unwrap_or(Err(ReadError::NoQuorum))?;
        Ok(self.state())
    }

    /// The latest state applied here, which may be behind, and right after a start behind what was shown before.
    pub fn state(&self) -> Arc<State> {
        self.inner.state.borrow().clone()
    }

    /// Every state applied here, or the latest of several.
    pub fn watch(&self) -> watch::Receiver<Arc<State>> {
        self.inner.state.clone()
    }

    /// The term in which this node leads: once a majority has confirmed it, until another leads or none is sure.
    pub fn leadership(&self) -> watch::Receiver<Option<Term>> {
        self.inner.leadership.clone()
    }

    /// Resolves when Raft can do no more. Then this handle is over; the process may open the store again.
    pub fn fatal(&self) -> impl Future<Output = Fatal> + Send + 'static {
        let mut store = self.inner.store_failure.clone();
        let mut metrics = self.inner.node.metrics();
        async move {
            loop {
                if let Some(error) = store.borrow_and_update().clone() {
                    return Fatal::Store(error);
                }
                if let Err(fatal) = &metrics.borrow_watched().running_state {
                    return reason(fatal, None);
                }
                tokio::select! {
                    // The store's writer ends after openraft has let go of it, which the metrics tell.
                    Ok(()) = store.changed() => {}
                    changed = metrics.changed() => {
                        if changed.is_err() {
                            return Fatal::Shutdown;
                        }
                    }
                }
            }
        }
    }

    /// Why Raft can do no more, if the store is why.
    pub fn failed(&self) -> Option<Fatal> {
        self.inner.store_failure.borrow().clone().map(Fatal::Store)
    }

    /// Answers the peer `from`, whose name the transport vouches for. To be called on whatever runtime carries
    /// the connection; the work is done on Raft's own.
    pub async fn handle(&self, from: RaftId, request: Bytes) -> Bytes {
        let (node, id) = (self.inner.node.clone(), self.inner.id);
        let answered = self.inner.handle.spawn(async move { network::serve(&node, id, from, &request).await });
        answered.await.unwrap_or_else(|_stopped| network::refuse("raft has stopped")).into()
    }

    pub fn members(&self) -> Vec<Member> {
        let metrics = self.inner.node.metrics();
        let metrics = metrics.borrow_watched();
        metrics
            .membership_config
            .nodes()
            .map(|(id, peer)| Member { id: *id, name: peer.name.clone(), address: peer.address.clone() })
            .collect()
    }

    pub fn metrics(&self) -> Metrics {
        let metrics = self.inner.node.metrics();
        let metrics = metrics.borrow_watched();
        let index = |id: &Option<RaftLogId>| id.as_ref().map(|id| id.index);
        let voters: BTreeSet<RaftId> = metrics.membership_config.voter_ids().collect();
        let nodes = metrics.membership_config.nodes().map(|(id, _)| *id);
        Metrics {
            id: metrics.id,
            term: Term(metrics.current_term),
            leader: metrics.current_leader,
            last_index: metrics.last_log_index,
            committed_index: index(&metrics.local_committed),
            applied_index: index(&metrics.last_applied),
            snapshot_index: index(&metrics.snapshot),
            purged_index: index(&metrics.purged),
            learners: nodes.filter(|id| !voters.contains(id)).collect(),
            voters,
            matched: matched(&metrics),
        }
    }

    /// Adds a node that receives the log and does not vote. Returns when it has caught up.
    pub async fn add_learner(&self, member: Member) -> Result<(), MembershipError> {
        let peer = Peer { name: member.name, address: member.address };
        self.changed(within(JOIN_DEADLINE, self.inner.node.add_learner(member.id, peer, true)).await)
    }

    /// Makes exactly these vote; they must be members already. Who does not vote any more is removed.
    pub async fn set_voters(&self, voters: BTreeSet<RaftId>) -> Result<(), MembershipError> {
        let metrics = self.metrics();
        for id in voters.difference(&metrics.voters) {
            let matched = metrics.matched.get(id).copied().flatten().map_or(0, |index| index + 1);
            let behind = metrics.last_index.map_or(0, |index| index + 1).saturating_sub(matched);
            // Only a leader knows how far behind anybody is; another is told so below.
            if metrics.leader == Some(self.inner.id) && behind > VOTER_LAG_MAX {
                return Err(MembershipError::Lagging { id: *id, behind });
            }
        }
        self.changed(within(DEADLINE, self.inner.node.change_membership(voters, false)).await)
    }

    fn changed<T>(
        &self,
        result: Option<Result<T, RaftError<Types, ClientWriteError<Types>>>>,
    ) -> Result<(), MembershipError> {
        match result {
            Some(Ok(_)) => Ok(()),
            Some(Err(RaftError::APIError(ClientWriteError::ForwardToLeader(leader)))) => {
                Err(MembershipError::NotLeader { leader: member(leader) })
            }
            Some(Err(RaftError::APIError(ClientWriteError::LogEntryDiscarded(_)))) => {
                Err(MembershipError::Unknown(Doubt::LeaderChanged))
            }
            Some(Err(RaftError::APIError(error))) => Err(MembershipError::Refused(error.to_string())),
            Some(Err(RaftError::Fatal(fatal))) => Err(self.reason(&fatal).into()),
            None => Err(MembershipError::Unknown(Doubt::TimedOut)),
        }
    }

    /// Makes another voter leader, if this node leads and there is one: the one whose log is the most complete.
    /// Returns whether another leads now.
    pub async fn transfer_leader(&self) -> Result<bool, Fatal> {
        let metrics = self.metrics();
        let id = self.inner.id;
        if metrics.leader != Some(id) {
            return Ok(metrics.leader.is_some());
        }
        let others = metrics.voters.iter().filter(|voter| **voter != id);
        let Some(next) = others.max_by_key(|voter| metrics.matched.get(voter).copied().flatten()) else {
            return Ok(false);
        };
        self.inner.node.trigger().transfer_leader(*next).await.map_err(|fatal| self.reason(&fatal))?;
        let mut watched = self.inner.node.metrics();
        let deadline = Instant::now() + TRANSFER_DEADLINE;
        loop {
            if watched.borrow_watched().current_leader.is_some_and(|leader| leader != id) {
                return Ok(true);
            }
            match timeout_at(deadline, watched.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return Err(Fatal::Shutdown),
                Err(_) => return Ok(false),
            }
        }
    }

    /// Hands leadership over, if there is anyone to take it, and stops. The store is closed when this returns.
    pub async fn shutdown(&self) {
        if let Err(fatal) = self.transfer_leader().await {
            tracing::warn!(%fatal, "raft had stopped before it was asked to");
        }
        // The only error is that its task has panicked, which `fatal` has told.
        let _ = self.inner.node.shutdown().await;
        if let Some(runtime) = take(&self.inner.runtime) {
            let ended = tokio::task::spawn_blocking(move || runtime.shutdown_timeout(SHUTDOWN_DEADLINE));
            ended.await.expect("shutting a runtime down does not panic");
        }
        released(self.inner.store_failure.clone()).await;
    }

    fn reason(&self, fatal: &openraft::errors::Fatal<Types>) -> Fatal {
        reason(fatal, self.inner.store_failure.borrow().clone())
    }
}

type Started =
    (RaftId, openraft::Raft<Types, Machine>, watch::Receiver<Option<StoreError>>, watch::Receiver<Arc<State>>);

async fn start(config: RaftConfig, store: Store, transport: impl PeerTransport) -> Result<Started, StartError> {
    let id = config.id;
    let failures = store.failures();
    if let Err(error) = identify(&store, &config).await {
        drop(store);
        released(failures).await;
        return Err(error);
    }
    let (published, state) = watch::channel(Arc::default());
    let machine = Machine::new(store.clone(), published);
    let network = network::Network::new(id, transport);
    tokio::spawn(scrub_daily(store.clone()));
    let node = openraft::Raft::new(id, options(&config), network, Log::new(store), machine)
        .await
        .map_err(|fatal| reason(&fatal, failures.borrow().clone()))?;
    // This also waits until openraft runs, and with it the metrics tell the truth.
    let alone = node.with_raft_state(move |state| state.membership_state.effective().voter_ids().eq([id])).await;
    if alone.map_err(|fatal| reason(&fatal, failures.borrow().clone()))? {
        // There is no leader to wait for.
        node.trigger().elect(false).await.map_err(|fatal| reason(&fatal, failures.borrow().clone()))?;
    }
    Ok((id, node, failures, state))
}

/// Pages that nothing reads can rot for years, and then they are needed on the day another node is lost.
async fn scrub_daily(store: Store) {
    let mut days = tokio::time::interval(SCRUB_EVERY);
    // The first tick is now, and opening the store has just read all of it.
    days.tick().await;
    loop {
        days.tick().await;
        let store = store.clone();
        // What it finds is told as the store's failure. It does not panic, and if the runtime ends, so do we.
        let _ = tokio::task::spawn_blocking(move || store.scrub()).await;
    }
}

fn options(config: &RaftConfig) -> Arc<Config> {
    let millis = |span: Duration| u64::try_from(span.as_millis()).expect("our constants are small");
    let options = Config {
        cluster_name: config.cluster.clone(),
        heartbeat_interval: millis(HEARTBEAT),
        election_timeout_min: millis(ELECTION_MIN),
        election_timeout_max: millis(ELECTION_MAX),
        install_snapshot_timeout: millis(SNAPSHOT_DEADLINE),
        snapshot_policy: SnapshotPolicy::LogsSinceLast(config.snapshot_every),
        // More than a snapshot's distance, or a snapshot would never cure a follower's lag.
        replication_lag_threshold: config.snapshot_every * 2,
        max_in_snapshot_log_to_keep: config.snapshot_every,
        enable_pre_vote: Some(true),
        // A leader that was away must be elected again: it cannot know what it missed.
        enable_leader_restore: Some(false),
        allow_log_reversion: Some(false),
        ..Config::default()
    };
    Arc::new(options.validate().expect("heartbeat < least < most election time"))
}

/// Waits until the store's writer has let go of the file, which is when nobody can tell of its failures any more.
async fn released(mut failures: watch::Receiver<Option<StoreError>>) {
    while failures.changed().await.is_ok() {}
}

/// Writes down whose store this is, or checks it.
async fn identify(store: &Store, config: &RaftConfig) -> Result<(), StartError> {
    let identity = Identity { cluster: config.cluster.clone(), id: config.id };
    match store.record(Slot::Identity).map_err(Fatal::from)? {
        None => Ok(store.save(Slot::Identity, codec::encode(&identity)).await.map_err(Fatal::from)?),
        Some(record) => {
            let found: Identity = codec::decode(&record)?;
            if found == identity {
                return Ok(());
            }
            Err(StartError::Foreign { dir: config.dir.clone(), found, id: identity.id, cluster: identity.cluster })
        }
    }
}

/// Openraft's metrics say "leader" before anybody has agreed, and still when nobody does any more. This says it
/// after a majority has answered in this term, and takes it back when none has for a while.
async fn confirm_leadership(node: openraft::Raft<Types, Machine>, confirmed: watch::Sender<Option<Term>>) {
    let mut metrics = node.metrics();
    loop {
        let claimed = claimed_term(&metrics.borrow_watched());
        let current = *confirmed.borrow();
        if current.is_some() && current != claimed {
            confirmed.send_replace(None);
        }
        if let Some(term) = claimed
            && current != Some(term)
            && node.ensure_linearizable(ReadPolicy::ReadIndex).await.is_ok()
            && claimed_term(&metrics.borrow_watched()) == Some(term)
        {
            confirmed.send_replace(Some(term));
        }
        // A majority that stops answering changes nothing in the metrics, so look now and then.
        match tokio::time::timeout(HEARTBEAT, metrics.changed()).await {
            Ok(Ok(())) | Err(_) => {}
            Ok(Err(_)) => break,
        }
    }
    confirmed.send_replace(None);
}

fn claimed_term(metrics: &RaftMetrics) -> Option<Term> {
    let leads = metrics.running_state.is_ok() && metrics.state == ServerState::Leader;
    let alone = metrics.membership_config.voter_ids().eq([metrics.id]);
    let heard = metrics.last_quorum_acked.as_ref().is_some_and(|at| at.elapsed() < LEADERSHIP_DOUBT);
    (leads && (alone || heard)).then_some(Term(metrics.current_term))
}

fn matched(metrics: &RaftMetrics) -> BTreeMap<RaftId, Option<u64>> {
    let replication = metrics.replication.iter().flatten();
    replication.map(|(id, matched)| (*id, matched.as_ref().map(|id| id.index))).collect()
}

fn member(leader: ForwardToLeader<Types>) -> Option<Member> {
    let (id, peer) = leader.leader_id.zip(leader.leader_node)?;
    Some(Member { id, name: peer.name, address: peer.address })
}

/// Openraft knows that its store failed; the store knows why.
fn reason(fatal: &openraft::errors::Fatal<Types>, store: Option<StoreError>) -> Fatal {
    match (store, fatal) {
        (Some(error), _) => Fatal::Store(error),
        (None, openraft::errors::Fatal::Stopped) => Fatal::Shutdown,
        (None, other) => Fatal::Failed(other.to_string().into()),
    }
}

async fn within<T>(deadline: Duration, work: impl Future<Output = T>) -> Option<T> {
    tokio::time::timeout(deadline, work).await.ok()
}

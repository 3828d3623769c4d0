//! Openraft's state machine: [`State`] in memory, its snapshots in the [`Store`].
//!
//! Nothing is written when an entry is applied: the log has it already, and [`store`](crate::store) says why that
//! is enough. Readers get the state by watching: an [`Arc`] that never changes, a new one for every batch.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use futures_util::{Stream, StreamExt};
use openraft::storage::{EntryResponder, RaftSnapshotBuilder, RaftStateMachine};
use openraft::{OptionalSend, entry::RaftEntry as _};
use orca_cluster::state::State;
use tokio::sync::watch;

use super::codec::{self, Snapshot};
use super::log::damaged;
use super::{Change, RaftLogId, RaftPayload, RaftSnapshot, RaftSnapshotMeta, RaftStoredMembership, Types};
use crate::store::{Kept, Store};

#[derive(Debug)]
pub struct Machine {
    store: Store,
    state: Arc<State>,
    last: Option<RaftLogId>,
    membership: RaftStoredMembership,
    published: watch::Sender<Arc<State>>,
}

impl Machine {
    /// The machine before anything was applied; openraft installs the kept snapshot and replays the log.
    pub fn new(store: Store, published: watch::Sender<Arc<State>>) -> Machine {
        let state = published.borrow().clone();
        Machine { store, state, last: None, membership: RaftStoredMembership::default(), published }
    }

    fn meta(&self) -> RaftSnapshotMeta {
        RaftSnapshotMeta { last_log_id: self.last, last_membership: self.membership.clone() }
    }
}

impl RaftStateMachine<Types> for Machine {
    type SnapshotData = Arc<State>;
    type SnapshotBuilder = Builder;

    async fn applied_state(&mut self) -> io::Result<(Option<RaftLogId>, RaftStoredMembership)> {
        Ok((self.last, self.membership.clone()))
    }

    async fn apply<S>(&mut self, mut entries: S) -> io::Result<()>
    where
        S: Stream<Item = io::Result<EntryResponder<Types>>> + Unpin + OptionalSend,
    {
        let mut answers = Vec::new();
        while let Some(next) = entries.next().await {
            let (entry, responder) = next?;
            let at = entry.log_id();
            let applied = match entry.payload {
                RaftPayload::Blank => None,
                RaftPayload::Normal(Change(change)) => {
                    let state = Arc::make_mut(&mut self.state);
                    // A panic would end openraft's worker quietly and leave every proposer waiting; as an error
                    // it ends the process, loudly.
                    let applied = catch_unwind(AssertUnwindSafe(|| state.apply(at.index, change)));
                    Some(applied.map_err(|_| {
                        io::Error::other(format!("applying entry {} panicked; this is a defect in orca", at.index))
                    })?)
                }
                RaftPayload::Membership(membership) => {
                    self.membership = RaftStoredMembership::new(Some(at), membership);
                    None
                }
            };
            self.last = Some(at);
            if let Some(responder) = responder {
                answers.push((responder, applied));
            }
        }
        // The state before the answers: who has an answer must find its effect.
        self.published.send_replace(self.state.clone());
        for (responder, applied) in answers {
            responder.send(applied);
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Builder {
        Builder { store: self.store.clone(), meta: self.meta(), state: self.state.clone() }
    }

    async fn install_snapshot(&mut self, meta: &RaftSnapshotMeta, state: Arc<State>) -> io::Result<()> {
        keep(&self.store, meta, &state).await?;
        self.last = meta.last_log_id;
        self.membership = meta.last_membership.clone();
        self.state = state;
        self.published.send_replace(self.state.clone());
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> io::Result<Option<RaftSnapshot>> {
        let Some(kept) = self.store.snapshot()? else { return Ok(None) };
        let snapshot: Snapshot = codec::decode(&kept.frame).map_err(damaged)?;
        if snapshot.last.map(|last| last.index) != kept.upto {
            let why = "it covers another index than it was kept for";
            return Err(damaged(codec::CodecError::Contradiction { what: "snapshot", why }));
        }
        let (meta, state) = snapshot.open().map_err(damaged)?;
        Ok(Some(RaftSnapshot { meta, snapshot: Arc::new(state) }))
    }
}

/// A view of the machine at one index, to be made a snapshot of while the machine goes on.
#[derive(Debug)]
pub struct Builder {
    store: Store,
    meta: RaftSnapshotMeta,
    state: Arc<State>,
}

impl RaftSnapshotBuilder<Types> for Builder {
    type SnapshotData = Arc<State>;

    async fn build_snapshot(&mut self) -> io::Result<RaftSnapshot> {
        keep(&self.store, &self.meta, &self.state).await?;
        Ok(RaftSnapshot { meta: self.meta.clone(), snapshot: self.state.clone() })
    }
}

async fn keep(store: &Store, meta: &RaftSnapshotMeta, state: &State) -> io::Result<()> {
    let frame = codec::encode(&Snapshot::new(meta, state));
    let upto = meta.last_log_id.map(|last| last.index);
    Ok(store.keep(Kept { upto, frame }).await?)
}

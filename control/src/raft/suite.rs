//! Openraft's own suite, on the real store in real files.

use std::fmt::Debug;
use std::io;
use std::ops::RangeBounds;
use std::sync::Arc;

use openraft::storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage};
use openraft::testing::log::{StoreBuilder, Suite};
use openraft::{OptionalSend, StorageError};
use orca_cluster::state::State;
use tempfile::TempDir;
use tokio::sync::watch;

use super::codec::{self, LogId, Snapshot};
use super::log::Log;
use super::machine::Machine;
use super::{RaftEntry, RaftLogId, RaftSnapshotMeta, RaftStoredMembership, RaftVote, Types};
use crate::store::{Kept, Store};

struct Files;

impl StoreBuilder<Types, Covered, Machine, TempDir> for Files {
    async fn build(&self) -> Result<(TempDir, Covered, Machine), StorageError<Types>> {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let (published, _) = watch::channel(Arc::default());
        let machine = Machine::new(store.clone(), published);
        Ok((dir, Covered { store: store.clone(), log: Log::new(store) }, machine))
    }
}

/// The suite purges without a snapshot, which openraft never does and our store refuses. Here a snapshot is kept
/// first, as openraft would have seen to; everything else is the real log.
struct Covered {
    store: Store,
    log: Log,
}

impl RaftLogStorage<Types> for Covered {
    type LogReader = Log;

    async fn get_log_reader(&mut self) -> Log {
        self.log.get_log_reader().await
    }

    async fn purge(&mut self, upto: RaftLogId) -> io::Result<()> {
        let meta = RaftSnapshotMeta { last_log_id: Some(upto), last_membership: RaftStoredMembership::default() };
        let frame = codec::encode(&Snapshot::new(&meta, State::default()));
        self.store.keep(Kept { upto: Some(upto.index), frame }).await?;
        self.log.purge(upto).await
    }

    async fn get_log_state(&mut self) -> io::Result<LogState<Types>> {
        self.log.get_log_state().await
    }

    async fn save_vote(&mut self, vote: &RaftVote) -> io::Result<()> {
        self.log.save_vote(vote).await
    }

    async fn save_committed(&mut self, committed: Option<RaftLogId>) -> io::Result<()> {
        self.log.save_committed(committed).await
    }

    async fn read_committed(&mut self) -> io::Result<Option<RaftLogId>> {
        self.log.read_committed().await
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<Types>) -> io::Result<()>
    where
        I: IntoIterator<Item = RaftEntry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        self.log.append(entries, callback).await
    }

    async fn truncate_after(&mut self, last: Option<RaftLogId>) -> io::Result<()> {
        self.log.truncate_after(last).await
    }
}

impl RaftLogReader<Types> for Covered {
    async fn try_get_log_entries<R: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: R,
    ) -> io::Result<Vec<RaftEntry>> {
        self.log.try_get_log_entries(range).await
    }

    async fn read_vote(&mut self) -> io::Result<Option<RaftVote>> {
        self.log.read_vote().await
    }
}

#[tokio::test]
async fn openraft_accepts_our_store() {
    Suite::<Types, Covered, Machine, Files, TempDir>::test_all(Files).await.unwrap();
}

#[tokio::test]
async fn entries_can_be_read_before_they_are_on_disk_and_at_least_one_always() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let mut log = Log::new(store);
    let entry = |index| RaftEntry { log_id: LogId { term: 1, index }.into(), payload: openraft::EntryPayload::Blank };
    for index in 0..64 {
        log.append([entry(index)], IOFlushed::noop()).await.unwrap();
        let read = log.try_get_log_entries(0..).await.unwrap();
        assert_eq!(read.len() as u64, index + 1);
        assert_eq!(log.limited_get_log_entries(index, index + 100).await.unwrap().len(), 1);
    }
}

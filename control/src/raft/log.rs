//! Openraft's log and vote, kept in the [`Store`].

use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};

use openraft::storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage};
use openraft::{OptionalSend, entry::RaftEntry as _};

use super::codec::{self, Committed, LogId, Purged, Vote};
use super::{RaftEntry, RaftLogId, RaftVote, Types};
use crate::store::{Slot, Store};

/// Entries sent to a peer at once come to about this many bytes; the first is sent however large it is.
pub const ENTRIES_BYTES_MAX: usize = 1 << 20;

/// The log as openraft sees it. Clones read the same log.
#[derive(Debug, Clone)]
pub struct Log {
    store: Store,
}

impl Log {
    pub fn new(store: Store) -> Log {
        Log { store }
    }

    fn purged(&self) -> io::Result<Option<LogId>> {
        let record = self.store.record(Slot::Purged)?;
        record.map(|record| codec::decode(&record).map(|Purged(id)| id)).transpose().map_err(damaged)
    }

    fn read(&self, start: u64, end: u64, bytes_max: usize) -> io::Result<Vec<RaftEntry>> {
        let entries = self.store.entries(start..end, bytes_max)?;
        entries.iter().map(|(index, frame)| decode_entry(*index, frame)).collect()
    }
}

fn decode_entry(index: u64, frame: &[u8]) -> io::Result<RaftEntry> {
    let entry: codec::Entry = codec::decode(frame).map_err(damaged)?;
    if entry.index != index {
        return Err(damaged(codec::CodecError::Contradiction {
            what: "log entry",
            why: "it lies where another belongs",
        }));
    }
    RaftEntry::try_from(entry).map_err(damaged)
}

pub fn damaged(error: codec::CodecError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

impl RaftLogReader<Types> for Log {
    async fn try_get_log_entries<R: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: R,
    ) -> io::Result<Vec<RaftEntry>> {
        let start = match range.start_bound() {
            Bound::Included(start) => *start,
            Bound::Excluded(before) => before.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(last) => last.saturating_add(1),
            Bound::Excluded(end) => *end,
            Bound::Unbounded => u64::MAX,
        };
        self.read(start, end, usize::MAX)
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> io::Result<Vec<RaftEntry>> {
        self.read(start, end, ENTRIES_BYTES_MAX)
    }

    async fn read_vote(&mut self) -> io::Result<Option<RaftVote>> {
        let record = self.store.record(Slot::Vote)?;
        let vote: Option<Vote> = record.map(|record| codec::decode(&record)).transpose().map_err(damaged)?;
        Ok(vote.map(RaftVote::from))
    }
}

impl RaftLogStorage<Types> for Log {
    type LogReader = Log;

    async fn get_log_reader(&mut self) -> Log {
        self.clone()
    }

    async fn get_log_state(&mut self) -> io::Result<LogState<Types>> {
        let purged = self.purged()?.map(RaftLogId::from);
        let last = match self.store.bounds()? {
            Some((_, last)) => self.read(last, last + 1, usize::MAX)?.first().map(|entry| entry.log_id()),
            None => purged,
        };
        Ok(LogState { last_purged_log_id: purged, last_log_id: last })
    }

    async fn save_vote(&mut self, vote: &RaftVote) -> io::Result<()> {
        Ok(self.store.save(Slot::Vote, codec::encode(&Vote::from(vote))).await?)
    }

    async fn save_committed(&mut self, committed: Option<RaftLogId>) -> io::Result<()> {
        let record = codec::encode(&Committed(committed.map(LogId::from)));
        Ok(self.store.save_committed(record)?)
    }

    async fn read_committed(&mut self) -> io::Result<Option<RaftLogId>> {
        let record = self.store.record(Slot::Committed)?;
        let committed = record.map(|record| codec::decode(&record)).transpose().map_err(damaged)?;
        // It is written lazily, and the log is not: after a power cut it may be behind, never ahead of the log.
        Ok(committed.and_then(|Committed(id)| id).map(RaftLogId::from))
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<Types>) -> io::Result<()>
    where
        I: IntoIterator<Item = RaftEntry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries =
            entries.into_iter().map(|entry| (entry.log_id.index, codec::encode(&codec::Entry::from(entry)))).collect();
        let done = move |result: Result<(), _>| callback.io_completed(result.map_err(io::Error::from));
        Ok(self.store.append(entries, done).await?)
    }

    async fn truncate_after(&mut self, last: Option<RaftLogId>) -> io::Result<()> {
        Ok(self.store.truncate(last.map_or(0, |last| last.index + 1)).await?)
    }

    async fn purge(&mut self, upto: RaftLogId) -> io::Result<()> {
        Ok(self.store.purge(upto.index, codec::encode(&Purged(upto.into()))).await?)
    }
}

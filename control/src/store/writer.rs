//! The one thread that writes.
//!
//! Votes and entries must reach the disk in the order they were decided; two threads, or an async task that can
//! be dropped half way, cannot promise that. And a commit blocks for as long as the disk likes, which must not
//! be a thread that also answers heartbeats. What has queued up meanwhile is written in one transaction, so a
//! slow disk gets larger commits rather than a longer queue.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::thread;

use redb::{Database, Durability, ReadableTable, WriteTransaction};
use tokio::sync::{mpsc, watch};

use super::{Kept, LOG, Pending, QUEUE_MAX, RECORDS, SNAPSHOT, Slot, StoreError, fail, lock, snapshot_key};

pub(super) enum Write {
    Append(Vec<(u64, Arc<[u8]>)>),
    Truncate { from: u64 },
    Purge { upto: u64, record: Vec<u8> },
    Record { slot: Slot, record: Vec<u8> },
    Snapshot(Kept),
}

pub(super) struct Job {
    pub write: Write,
    /// Called once, after the write is on disk or has failed.
    pub done: Box<dyn FnOnce(Result<(), StoreError>) + Send>,
}

/// The thread ends when the last [`Store`](super::Store) is gone and everything it was given is written.
pub(super) fn spawn(
    jobs: mpsc::Receiver<Job>,
    db: Arc<Database>,
    pending: Arc<Mutex<Pending>>,
    failure: watch::Sender<Option<StoreError>>,
) {
    thread::Builder::new()
        .name("orca-store".into())
        .spawn(move || {
            run(jobs, &db, &pending, &failure);
            drop(db);
            // Last: who waits for this to close waits for the file to be free.
            drop(failure);
        })
        .expect("a process that cannot start a thread cannot do anything");
}

fn run(
    mut jobs: mpsc::Receiver<Job>,
    db: &Database,
    pending: &Mutex<Pending>,
    failure: &watch::Sender<Option<StoreError>>,
) {
    let mut batch = Vec::new();
    while let Some(job) = jobs.blocking_recv() {
        batch.push(job);
        while batch.len() < QUEUE_MAX
            && let Ok(job) = jobs.try_recv()
        {
            batch.push(job);
        }
        let failed = failure.borrow().clone();
        let result = match failed {
            Some(error) => Err(error),
            None => commit(db, pending, &batch),
        };
        if let Err(error) = &result {
            fail(failure, error);
        }
        for job in batch.drain(..) {
            (job.done)(result.clone());
        }
    }
    // Nobody is left to be told; and what is lost if this fails is a hint.
    if failure.borrow().is_none() && lock(pending).committed.is_some() && commit(db, pending, &[]).is_err() {
        tracing::warn!("the store could not note what is committed as it closed");
    }
}

/// All of it or nothing, and on disk when this returns. Then it need not be held in memory.
fn commit(db: &Database, pending: &Mutex<Pending>, batch: &[Job]) -> Result<(), StoreError> {
    let committed = lock(pending).committed.clone();
    let commit = catch_unwind(AssertUnwindSafe(|| {
        let mut txn = db.begin_write().map_err(redb::Error::from)?;
        txn.set_durability(Durability::Immediate).map_err(redb::Error::from)?;
        // One phase would save a third of a millisecond, and after a crash take damage to the newest pages for a
        // commit that was torn: it would roll back, without a word, what has been acknowledged.
        txn.set_two_phase_commit(true);
        for job in batch {
            stage(&txn, &job.write)?;
        }
        if let Some(record) = &committed {
            save(&txn, Slot::Committed, record).map_err(StoreError::from)?;
        }
        txn.commit().map_err(redb::Error::from)?;
        Ok(())
    }));
    let result = commit.unwrap_or_else(|_panic| Err(StoreError::Corrupt("a page cannot be written".into())));
    if result.is_ok() {
        forget(pending, batch, committed.as_ref());
    }
    result
}

fn stage(txn: &WriteTransaction, write: &Write) -> Result<(), StoreError> {
    match write {
        Write::Append(entries) => append(txn, entries).map_err(StoreError::from)?,
        Write::Truncate { from } => truncate(txn, *from).map_err(StoreError::from),
        Write::Purge { upto, record } => purge(txn, *upto, record).map_err(StoreError::from)?,
        Write::Record { slot, record } => save(txn, *slot, record).map_err(StoreError::from),
        Write::Snapshot(snapshot) => keep(txn, snapshot).map_err(StoreError::from),
    }
}

type Staged = Result<(), StoreError>;

fn append(txn: &WriteTransaction, entries: &[(u64, Arc<[u8]>)]) -> Result<Staged, redb::Error> {
    let mut log = txn.open_table(LOG)?;
    let mut next = log.last()?.map(|(index, _)| index.value() + 1);
    for (index, frame) in entries {
        if next.is_some_and(|next| next != *index) {
            return Ok(Err(StoreError::Refused("an entry was appended that does not follow the last one")));
        }
        log.insert(*index, &**frame)?;
        next = Some(index + 1);
    }
    Ok(Ok(()))
}

fn truncate(txn: &WriteTransaction, from: u64) -> Result<(), redb::Error> {
    txn.open_table(LOG)?.retain_in(from.., |_, _| false)?;
    Ok(())
}

fn purge(txn: &WriteTransaction, upto: u64, record: &[u8]) -> Result<Staged, redb::Error> {
    let covered = txn.open_table(SNAPSHOT)?.last()?.map(|(key, _)| key.value());
    if covered.is_none_or(|covered| covered < snapshot_key(Some(upto))) {
        return Ok(Err(StoreError::Refused("the log was to be purged beyond its snapshot")));
    }
    txn.open_table(LOG)?.retain_in(..=upto, |_, _| false)?;
    save(txn, Slot::Purged, record)?;
    Ok(Ok(()))
}

fn save(txn: &WriteTransaction, slot: Slot, record: &[u8]) -> Result<(), redb::Error> {
    txn.open_table(RECORDS)?.insert(slot as u8, record)?;
    Ok(())
}

/// A snapshot being built here may finish after a newer one has come from the leader; it must not replace that.
/// Two of the same index are the same.
fn keep(txn: &WriteTransaction, snapshot: &Kept) -> Result<(), redb::Error> {
    let mut snapshots = txn.open_table(SNAPSHOT)?;
    let key = snapshot_key(snapshot.upto);
    if snapshots.last()?.is_some_and(|(newest, _)| newest.value() >= key) {
        return Ok(());
    }
    snapshots.insert(key, &*snapshot.frame)?;
    snapshots.retain_in(..key, |_, _| false)?;
    Ok(())
}

/// Entries on disk need not be held in memory. Identity matters: an index may have been truncated and
/// appended again since.
fn forget(pending: &Mutex<Pending>, batch: &[Job], committed: Option<&Arc<[u8]>>) {
    let mut pending = lock(pending);
    pending.committed.take_if(|held| committed.is_some_and(|written| Arc::ptr_eq(held, written)));
    for job in batch {
        if let Write::Append(entries) = &job.write {
            for (index, frame) in entries {
                if pending.entries.get(index).is_some_and(|held| Arc::ptr_eq(held, frame)) {
                    pending.entries.remove(index);
                }
            }
        }
    }
}

//! What a control node must not forget: one redb file with the log, the vote and the last snapshot.
//!
//! The applied state has no table of its own. It is the snapshot plus the log from there on, replayed in memory
//! at start: index and data cannot disagree, because there is only one of them on disk. That costs a snapshot
//! every so many entries and a replay of at most twice as many at start, which for a state of a few megabytes is
//! less than keeping a second copy true. The price of the trade is one rule, kept here: **the log is never purged
//! beyond the snapshot**.
//!
//! Every write goes through one thread, in order ([`writer`]). A failed write is the end: the thread takes no
//! more, and whoever watches [`Store::failure`] stops the process. Nothing is retried, because after a failed
//! fsync nobody knows what is on disk until the file is opened again.
//!
//! Absent: openraft (this file knows indexes and sealed [frames](frame), not terms and memberships), and every
//! redb type but `u64` or `u8` keys and byte values, so that no other crate's encoding becomes our disk format.

pub mod frame;
mod writer;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use redb::backends::FileBackend;
use redb::{Database, ReadOnlyTable, ReadableDatabase, ReadableTable, StorageBackend, TableDefinition};
use tokio::sync::{mpsc, oneshot, watch};

use self::frame::{FrameError, Kind};
use self::writer::{Job, Write};

/// The store's file inside the data directory.
pub const FILE_NAME: &str = "raft.redb";

/// Memory redb may use to cache pages; the whole store is rarely larger.
const CACHE_BYTES: usize = 32 << 20;

/// Smaller files are not worth compacting.
const COMPACT_BYTES_MIN: u64 = 64 << 20;

/// Jobs waiting for the writer. Openraft awaits all but appends, so few are ever queued; a full queue makes the
/// sender wait, which is the back-pressure a slow disk should cause.
const QUEUE_MAX: usize = 256;

const LOG: TableDefinition<'static, u64, &'static [u8]> = TableDefinition::new("log");
const RECORDS: TableDefinition<'static, u8, &'static [u8]> = TableDefinition::new("records");
const SNAPSHOT: TableDefinition<'static, u64, &'static [u8]> = TableDefinition::new("snapshot");

/// The key of [`SNAPSHOT`] when nothing had been applied yet; otherwise the key is 1 + the last index applied.
const SNAPSHOT_OF_NOTHING: u64 = 0;

/// The single values beside the log. The numbers are on disk: never reuse one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Slot {
    Identity = 1,
    Vote = 2,
    Committed = 3,
    Purged = 4,
}

impl Slot {
    const ALL: [Slot; 4] = [Slot::Identity, Slot::Vote, Slot::Committed, Slot::Purged];

    fn kind(self) -> Kind {
        match self {
            Slot::Identity => Kind::Identity,
            Slot::Vote => Kind::Vote,
            Slot::Committed => Kind::Committed,
            Slot::Purged => Kind::Purged,
        }
    }
}

/// Why the store cannot be opened. Each has another cure.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("{} is in use by another process; is orca running already?", path.display())]
    InUse { path: PathBuf },
    #[error(
        "{} is damaged ({why}); move it aside and join this node again, which gives it a new \
         id (if it is the only control node, restore the last cluster snapshot instead)",
        path.display()
    )]
    Corrupt { path: PathBuf, why: String },
    #[error("{} was written by a newer orca (format {found}); start that version again", path.display())]
    NewerFormat { path: PathBuf, found: u8 },
    #[error("no space left on the control node's disk, which {} is on; free some, and it goes on by itself", path.display())]
    Full { path: PathBuf },
    #[error("cannot open {}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl OpenError {
    fn of_file(path: &Path, source: io::Error) -> OpenError {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::StorageFull => OpenError::Full { path },
            _ => OpenError::Io { path, source },
        }
    }
}

/// Why a read or write failed. Every one of them is the end of this process's use of the store.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    #[error("no space left on the control node's disk; free some, and it goes on by itself")]
    Full,
    #[error("the store is damaged: {0}")]
    Corrupt(Arc<str>),
    #[error("a write would have broken the store: {0}; this is a defect in orca")]
    Refused(&'static str),
    #[error("the store failed: {0}")]
    Io(Arc<str>),
    #[error("the store is closed")]
    Closed,
}

impl From<StoreError> for io::Error {
    fn from(error: StoreError) -> io::Error {
        let kind = match error {
            StoreError::Full => io::ErrorKind::StorageFull,
            StoreError::Corrupt(_) => io::ErrorKind::InvalidData,
            StoreError::Refused(_) | StoreError::Io(_) | StoreError::Closed => io::ErrorKind::Other,
        };
        io::Error::new(kind, error)
    }
}

impl From<redb::Error> for StoreError {
    fn from(error: redb::Error) -> StoreError {
        match error {
            redb::Error::Corrupted(why) => StoreError::Corrupt(why.into()),
            redb::Error::Io(source) if source.kind() == io::ErrorKind::StorageFull => StoreError::Full,
            other => StoreError::Io(other.to_string().into()),
        }
    }
}

/// A handle to the open store; clones share it. The file is released when the last one is gone.
#[derive(Debug, Clone)]
pub struct Store {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    db: Arc<Database>,
    queue: mpsc::Sender<Job>,
    pending: Arc<Mutex<Pending>>,
    failure: watch::Sender<Option<StoreError>>,
}

/// What has been handed to the writer and may not be in the file yet. Readers look here too, so that an entry
/// can be read the moment [`Store::append`] returns.
#[derive(Debug, Default)]
struct Pending {
    entries: BTreeMap<u64, Arc<[u8]>>,
    /// The record of [`Slot::Committed`], if it has changed.
    committed: Option<Arc<[u8]>>,
}

/// Sealed log entries, each with its index.
pub type Entries = Vec<(u64, Arc<[u8]>)>;

/// A snapshot as kept: the index it covers up to (none if nothing had been applied) and its sealed bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    pub upto: Option<u64>,
    pub frame: Vec<u8>,
}

impl Store {
    /// Opens the store in `dir`, making directory and file if there are none.
    ///
    /// A new file is made under another name and renamed when complete: an existing file without our tables is
    /// therefore always damage (a truncated one, say), never an interrupted start, and is never begun afresh.
    pub fn open(dir: &Path) -> Result<Store, OpenError> {
        let path = dir.join(FILE_NAME);
        let failed = |source: io::Error| OpenError::of_file(&path, source);
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed)?;
        if !path.try_exists().map_err(failed)? {
            let fresh = dir.join(format!("{FILE_NAME}.new"));
            // What an interrupted start left may be half a file, and nobody has ever relied on it.
            fs::remove_file(&fresh).or_else(|error| match error.kind() {
                io::ErrorKind::NotFound => Ok(()),
                _ => Err(failed(error)),
            })?;
            drop(check(&fresh, file_backend(&fresh)?, Fresh::Yes)?);
            fs::rename(&fresh, &path).map_err(failed)?;
            File::open(dir).and_then(|dir| dir.sync_all()).map_err(failed)?;
        }
        let mut db = check(&path, file_backend(&path)?, Fresh::No)?;
        let length = path.metadata().map_err(failed)?.len();
        if bloated(&db, length).map_err(|fault| fault.at(&path))? {
            tracing::info!(path = %path.display(), bytes = length, "compacting the store, most of which is empty");
            db.compact().map_err(|error| Fault::from(redb::Error::from(error)).at(&path))?;
        }
        Ok(Store::run(db))
    }

    /// Opens a store on other storage than a file, or makes one if `fresh`. `name` stands for it in messages.
    pub fn open_on(backend: impl StorageBackend, name: &str, fresh: Fresh) -> Result<Store, OpenError> {
        check(Path::new(name), backend, fresh).map(Store::run)
    }

    fn run(db: Database) -> Store {
        let (queue, jobs) = mpsc::channel(QUEUE_MAX);
        let db = Arc::new(db);
        let pending = Arc::new(Mutex::default());
        let failure = watch::Sender::new(None);
        writer::spawn(jobs, db.clone(), pending.clone(), failure.clone());
        Store { shared: Arc::new(Shared { db, queue, pending, failure }) }
    }

    /// Resolves when the store has failed. This handle is over then; opening it again tells what is on disk.
    pub async fn failure(&self) -> StoreError {
        let mut failure = self.shared.failure.subscribe();
        let failed = failure.wait_for(Option::is_some).await;
        failed.ok().and_then(|error| error.clone()).unwrap_or(StoreError::Closed)
    }

    /// A receiver of [`Store::failure`] that does not keep the store open.
    pub fn failures(&self) -> watch::Receiver<Option<StoreError>> {
        self.shared.failure.subscribe()
    }

    /// Appends entries behind the last one. They can be read when this returns; `done` is called, on the
    /// writer's thread, when they are on disk.
    pub async fn append(
        &self,
        entries: Vec<(u64, Vec<u8>)>,
        done: impl FnOnce(Result<(), StoreError>) + Send + 'static,
    ) -> Result<(), StoreError> {
        let entries: Entries = entries.into_iter().map(|(index, frame)| (index, frame.into())).collect();
        // The slot in the queue first: once entries are visible they must be on their way.
        let slot = self.slot().await?;
        lock(&self.shared.pending).entries.extend(entries.iter().cloned());
        slot.send(Job { write: Write::Append(entries), done: Box::new(done) });
        Ok(())
    }

    /// Removes all entries from `from` on. On disk when this returns.
    pub async fn truncate(&self, from: u64) -> Result<(), StoreError> {
        self.write(Write::Truncate { from }).await
    }

    /// Removes all entries up to `upto`, which the snapshot must cover. On disk when this returns.
    pub async fn purge(&self, upto: u64, record: Vec<u8>) -> Result<(), StoreError> {
        self.write(Write::Purge { upto, record }).await
    }

    /// Replaces a record. On disk when this returns.
    pub async fn save(&self, slot: Slot, record: Vec<u8>) -> Result<(), StoreError> {
        self.write(Write::Record { slot, record }).await
    }

    /// Replaces the record of what is committed, which goes to disk with whatever is written next. It only says
    /// where to start from; the log says what must not be lost, and an fsync for every hint would double the
    /// cost of a proposal. Can be read when this returns.
    pub fn save_committed(&self, record: Vec<u8>) -> Result<(), StoreError> {
        if let Some(error) = &*self.shared.failure.borrow() {
            return Err(error.clone());
        }
        lock(&self.shared.pending).committed = Some(record.into());
        Ok(())
    }

    /// Replaces the snapshot, unless the one kept covers more already. On disk when this returns.
    pub async fn keep(&self, snapshot: Kept) -> Result<(), StoreError> {
        self.write(Write::Snapshot(snapshot)).await
    }

    async fn write(&self, write: Write) -> Result<(), StoreError> {
        let (done, finished) = oneshot::channel();
        // The receiver is gone only if our caller was dropped, who then does not ask.
        let done = Box::new(move |result| drop(done.send(result)));
        self.slot().await?.send(Job { write, done });
        finished.await.unwrap_or(Err(StoreError::Closed))
    }

    async fn slot(&self) -> Result<mpsc::Permit<'_, Job>, StoreError> {
        if let Some(error) = &*self.shared.failure.borrow() {
            return Err(error.clone());
        }
        self.shared.queue.reserve().await.map_err(|_| StoreError::Closed)
    }

    pub fn record(&self, slot: Slot) -> Result<Option<Vec<u8>>, StoreError> {
        if slot == Slot::Committed
            && let Some(record) = &lock(&self.shared.pending).committed
        {
            return Ok(Some(record.to_vec()));
        }
        self.read(|db| {
            let records = db.begin_read()?.open_table(RECORDS)?;
            Ok(records.get(slot as u8)?.map(|record| record.value().to_vec()))
        })
    }

    /// The first and last index in the log.
    pub fn bounds(&self) -> Result<Option<(u64, u64)>, StoreError> {
        // What is pending before what is kept, here and below: an entry on its way to disk is then seen twice
        // at worst, and never missed.
        let pending = {
            let pending = lock(&self.shared.pending);
            pending.entries.keys().next().copied().zip(pending.entries.keys().next_back().copied())
        };
        let kept = self.read(|db| {
            let log = db.begin_read()?.open_table(LOG)?;
            let first = log.first()?.map(|(index, _)| index.value());
            Ok(first.zip(log.last()?.map(|(index, _)| index.value())))
        })?;
        Ok(match (kept, pending) {
            (Some((first, _)), Some((_, last))) => Some((first, last)),
            (one, None) | (None, one) => one,
        })
    }

    /// The entries of a range that are in the log: from the start of the range until `bytes_max` is reached,
    /// but at least one.
    pub fn entries(&self, range: Range<u64>, bytes_max: usize) -> Result<Entries, StoreError> {
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let pending: Entries = lock(&self.shared.pending)
            .entries
            .range(range.clone())
            .map(|(index, frame)| (*index, frame.clone()))
            .collect();
        let kept_end = pending.first().map_or(range.end, |(index, _)| *index);
        let mut taken = Entries::new();
        let mut bytes = 0;
        let fits = |taken: &Entries, bytes: usize| taken.is_empty() || bytes <= bytes_max;
        self.read(|db| {
            let log = db.begin_read()?.open_table(LOG)?;
            for row in log.range(range.start..kept_end.max(range.start))? {
                let (index, frame) = row?;
                bytes += frame.value().len();
                if !fits(&taken, bytes) {
                    return Ok(());
                }
                taken.push((index.value(), Arc::from(frame.value())));
            }
            Ok(())
        })?;
        for (index, frame) in pending {
            bytes += frame.len();
            if !fits(&taken, bytes) {
                break;
            }
            taken.push((index, frame));
        }
        Ok(taken)
    }

    pub fn snapshot(&self) -> Result<Option<Kept>, StoreError> {
        self.read(|db| {
            let snapshots = db.begin_read()?.open_table(SNAPSHOT)?;
            Ok(snapshots.last()?.map(|(key, frame)| kept(key.value(), frame.value())))
        })
    }

    /// Reads everything and checks every checksum, as opening does; meant to be run now and then.
    pub fn scrub(&self) -> Result<(), StoreError> {
        self.read(|db| {
            scrub(db).map_err(|fault| match fault {
                Fault::Database(error) => error,
                Fault::Value { what, error } => redb::Error::Corrupted(format!("{what}: {error}")),
                Fault::Order(why) => redb::Error::Corrupted(why),
            })
        })
    }

    fn read<T>(&self, read: impl FnOnce(&Database) -> Result<T, redb::Error>) -> Result<T, StoreError> {
        let read = catch_unwind(AssertUnwindSafe(|| read(&self.shared.db)));
        let result = match read {
            Ok(result) => result.map_err(StoreError::from),
            Err(_panic) => Err(StoreError::Corrupt("a page cannot be read".into())),
        };
        if let Err(error) = &result {
            fail(&self.shared.failure, error);
        }
        result
    }
}

/// Whether a store is to be made or must be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fresh {
    Yes,
    No,
}

/// What is wrong with a store that is being opened or scrubbed.
enum Fault {
    Database(redb::Error),
    Value { what: String, error: FrameError },
    Order(String),
}

impl Fault {
    fn at(self, path: &Path) -> OpenError {
        let path = path.to_owned();
        match self {
            Fault::Value { error: FrameError::Newer { found }, .. } => OpenError::NewerFormat { path, found },
            Fault::Value { what, error } => OpenError::Corrupt { path, why: format!("{what}: {error}") },
            Fault::Order(why) => OpenError::Corrupt { path, why },
            Fault::Database(redb::Error::DatabaseAlreadyOpen | redb::Error::LockProtocolMismatch) => {
                OpenError::InUse { path }
            }
            Fault::Database(redb::Error::UpgradeRequired(found)) => OpenError::NewerFormat { path, found },
            Fault::Database(redb::Error::Io(source)) => match source.kind() {
                io::ErrorKind::StorageFull => OpenError::Full { path },
                // A short read or a wrong magic number: the file is there, and is not what we wrote.
                io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof => {
                    OpenError::Corrupt { path, why: source.to_string() }
                }
                _ => OpenError::Io { path, source },
            },
            Fault::Database(other) => OpenError::Corrupt { path, why: other.to_string() },
        }
    }
}

macro_rules! fault_from {
    ($($error:ty),*) => {$(
        impl From<$error> for Fault {
            fn from(error: $error) -> Fault {
                Fault::Database(error.into())
            }
        }
    )*};
}

fault_from!(
    redb::Error,
    redb::DatabaseError,
    redb::TransactionError,
    redb::TableError,
    redb::StorageError,
    redb::CommitError
);

fn file_backend(path: &Path) -> Result<FileBackend, OpenError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(|source| OpenError::of_file(path, source))?;
    FileBackend::new(file).map_err(|error| Fault::from(error).at(path))
}

/// Opens what is there, all of it read and found right.
fn check(path: &Path, backend: impl StorageBackend, fresh: Fresh) -> Result<Database, OpenError> {
    // redb says of itself that opening a file which others have damaged may panic.
    let checked = catch_unwind(AssertUnwindSafe(|| {
        let db = redb::Builder::new()
            .set_cache_size(CACHE_BYTES)
            .set_check_integrity_on_open(true)
            .create_with_backend(backend)?;
        if fresh == Fresh::Yes {
            make_tables(&db)?;
        }
        scrub(&db).map(|()| db)
    }));
    match checked {
        Ok(result) => result.map_err(|fault| fault.at(path)),
        Err(_panic) => Err(OpenError::Corrupt { path: path.into(), why: "it cannot be read at all".into() }),
    }
}

/// Whether most of the file is empty space, which redb does not give back by itself.
fn bloated(db: &Database, length: u64) -> Result<bool, Fault> {
    if length < COMPACT_BYTES_MIN {
        return Ok(false);
    }
    let txn = db.begin_write()?;
    let stats = txn.stats()?;
    txn.abort()?;
    let used = stats.allocated_pages() * stats.page_size() as u64;
    Ok(used < length / 2)
}

fn make_tables(db: &Database) -> Result<(), Fault> {
    let mut txn = db.begin_write()?;
    txn.set_two_phase_commit(true);
    txn.open_table(LOG)?;
    txn.open_table(RECORDS)?;
    txn.open_table(SNAPSHOT)?;
    txn.commit()?;
    Ok(())
}

/// Checks every value, that the log has no holes, and that log and snapshot together cover everything.
fn scrub(db: &Database) -> Result<(), Fault> {
    let txn = db.begin_read()?;
    let check = |what: &dyn Fn() -> String, kind, frame: &[u8]| match frame::open(kind, frame) {
        Ok(_) => Ok(()),
        Err(error) => Err(Fault::Value { what: what(), error }),
    };

    let records: ReadOnlyTable<u8, &[u8]> = txn.open_table(RECORDS)?;
    for slot in Slot::ALL {
        if let Some(record) = records.get(slot as u8)? {
            check(&|| format!("the record of {slot:?}"), slot.kind(), record.value())?;
        }
    }

    let mut covered = None;
    for row in txn.open_table(SNAPSHOT)?.range::<u64>(..)? {
        let (key, frame) = row?;
        check(&|| "the snapshot".into(), Kind::Snapshot, frame.value())?;
        covered = Some(key.value());
    }

    let purged = records.get(Slot::Purged as u8)?.is_some();
    if purged && covered.is_none() {
        return Err(Fault::Order("the log has been cut, and there is no snapshot".into()));
    }
    let mut next = None;
    for row in txn.open_table(LOG)?.range::<u64>(..)? {
        let (index, frame) = row?;
        let index = index.value();
        check(&|| format!("log entry {index}"), Kind::Entry, frame.value())?;
        if next.is_none() && purged && covered.is_some_and(|covered| index > covered) {
            return Err(Fault::Order(format!("the log starts at {index}, and no snapshot reaches there")));
        }
        if next.is_some_and(|next| next != index) {
            return Err(Fault::Order(format!("the log has a hole before entry {index}")));
        }
        next = Some(index + 1);
    }
    Ok(())
}

fn kept(key: u64, frame: &[u8]) -> Kept {
    let upto = (key != SNAPSHOT_OF_NOTHING).then(|| key - 1);
    Kept { upto, frame: frame.to_vec() }
}

fn snapshot_key(upto: Option<u64>) -> u64 {
    upto.map_or(SNAPSHOT_OF_NOTHING, |index| index + 1)
}

/// Remembers the first failure; later ones are its consequences.
fn fail(failure: &watch::Sender<Option<StoreError>>, error: &StoreError) {
    failure.send_if_modified(|current| {
        let first = current.is_none();
        if first {
            tracing::error!(%error, "the store failed");
            *current = Some(error.clone());
        }
        first
    });
}

/// Nothing that holds this lock can leave it half changed, so a panic elsewhere does not spoil it.
fn lock(pending: &Mutex<Pending>) -> MutexGuard<'_, Pending> {
    pending.lock().unwrap_or_else(PoisonError::into_inner)
}

//! Disks that lose power, lie, rot and fill up, in process.
//!
//! A recorder stands where the file would and keeps every write, sync and acknowledgement in order. A power cut
//! at any point of that record leaves what was synced, and of the rest a random selection of 512-byte sectors.
//! The store must open on every such image, and hold exactly what it held after some operation at or after the
//! last acknowledged one: nothing acknowledged lost, nothing half done, nothing reordered.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use orca_control::raft::{Fatal, ProposeError, Raft, RaftConfig, RaftId, ReadError};
use orca_control::store::frame::{self, Kind};
use orca_control::store::{FILE_NAME, Fresh, Kept, OpenError, Slot, Store, StoreError};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use redb::StorageBackend;

use crate::support::{NoPeers, PATIENCE, entry, leads, member, texts};

/// Enough that a missing fsync anywhere cannot pass; a nightly run takes more.
const CUTS: usize = 10_000;
const FLIPS: usize = 3_000;

/// What a disk loses or keeps whole.
const SECTOR: usize = 512;

#[derive(Debug, Clone)]
enum Event {
    Write {
        offset: u64,
        data: Vec<u8>,
    },
    Length(u64),
    Sync,
    /// The store said that operations up to this one are safe.
    Acknowledged(usize),
}

/// A disk in memory that remembers how it came to be.
#[derive(Debug, Clone, Default)]
struct Recorder {
    shared: Arc<Mutex<Recording>>,
}

#[derive(Debug, Default)]
struct Recording {
    bytes: Vec<u8>,
    events: Vec<Event>,
    /// After so many writes and syncs, all fail with this.
    fails: Option<(usize, io::ErrorKind)>,
}

impl Recorder {
    fn of(bytes: Vec<u8>) -> Recorder {
        Recorder { shared: Arc::new(Mutex::new(Recording { bytes, ..Recording::default() })) }
    }

    fn acknowledge(&self, operation: usize) {
        self.shared.lock().unwrap().events.push(Event::Acknowledged(operation));
    }

    fn bytes(&self) -> Vec<u8> {
        self.shared.lock().unwrap().bytes.clone()
    }

    fn events(&self) -> Vec<Event> {
        self.shared.lock().unwrap().events.clone()
    }

    fn record(&self, event: Event) -> io::Result<()> {
        let mut shared = self.shared.lock().unwrap();
        if let Some((left, kind)) = &mut shared.fails {
            if *left == 0 {
                return Err((*kind).into());
            }
            *left -= 1;
        }
        apply(&mut shared.bytes, &event);
        shared.events.push(event);
        Ok(())
    }
}

fn apply(bytes: &mut Vec<u8>, event: &Event) {
    match event {
        Event::Write { offset, data } => {
            let offset = usize::try_from(*offset).unwrap();
            if bytes.len() < offset + data.len() {
                bytes.resize(offset + data.len(), 0);
            }
            bytes[offset..offset + data.len()].copy_from_slice(data);
        }
        Event::Length(length) => bytes.resize(usize::try_from(*length).unwrap(), 0),
        Event::Sync | Event::Acknowledged(_) => {}
    }
}

impl StorageBackend for Recorder {
    fn len(&self) -> io::Result<u64> {
        Ok(self.shared.lock().unwrap().bytes.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let shared = self.shared.lock().unwrap();
        let start = usize::try_from(offset).unwrap();
        let found = start.checked_add(out.len()).and_then(|end| shared.bytes.get(start..end));
        out.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.record(Event::Length(length))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.record(Event::Sync)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.record(Event::Write { offset, data: data.to_vec() })
    }
}

/// What a disk holds after a power cut: `durable`, and of what came since some sectors.
fn image_after_cut(durable: &[u8], pending: &[Event], random: &mut StdRng) -> Vec<u8> {
    let mut image = durable.to_vec();
    // Sometimes nearly all of it got there, sometimes nearly nothing.
    let kept = random.random_range(0.0..=1.0);
    for event in pending {
        match event {
            Event::Write { offset, data } => {
                for (n, sector) in data.chunks(SECTOR).enumerate() {
                    if random.random_bool(kept) {
                        let offset = offset + (n * SECTOR) as u64;
                        apply(&mut image, &Event::Write { offset, data: sector.to_vec() });
                    }
                }
            }
            Event::Length(_) if random.random_bool(kept) => apply(&mut image, event),
            Event::Length(_) | Event::Sync | Event::Acknowledged(_) => {}
        }
    }
    image
}

/// Everything a store holds.
#[derive(Debug, Clone, Default, PartialEq)]
struct Contents {
    log: BTreeMap<u64, Vec<u8>>,
    /// Without what is committed, which is a hint and not in order with the rest.
    records: BTreeMap<u8, Vec<u8>>,
    snapshot: Option<Kept>,
}

impl Contents {
    fn of(store: &Store) -> Result<Contents, StoreError> {
        let entries = store.entries(0..u64::MAX, usize::MAX)?;
        let mut records = BTreeMap::new();
        for slot in [Slot::Vote, Slot::Purged] {
            if let Some(record) = store.record(slot)? {
                records.insert(slot as u8, record);
            }
        }
        let log = entries.into_iter().map(|(index, frame)| (index, frame.to_vec())).collect();
        Ok(Contents { log, records, snapshot: store.snapshot()? })
    }

    fn next(&self) -> u64 {
        let purged = self.snapshot.as_ref().and_then(|kept| kept.upto).map_or(0, |upto| upto + 1);
        self.log.keys().next_back().map_or(purged, |last| last + 1)
    }

    fn after(&self, operation: &Operation) -> Contents {
        let mut after = self.clone();
        match operation {
            Operation::Append(entries) => after.log.extend(entries.iter().cloned()),
            Operation::Truncate(from) => after.log.retain(|index, _| index < from),
            Operation::Purge(upto, record) => {
                after.log.retain(|index, _| index > upto);
                after.records.insert(Slot::Purged as u8, record.clone());
            }
            Operation::Vote(record) => drop(after.records.insert(Slot::Vote as u8, record.clone())),
            Operation::Committed(_) => {}
            Operation::Snapshot(kept) => {
                if after.snapshot.as_ref().is_none_or(|held| held.upto < kept.upto) {
                    after.snapshot = Some(kept.clone());
                }
            }
        }
        after
    }
}

#[derive(Debug, Clone)]
enum Operation {
    Append(Vec<(u64, Vec<u8>)>),
    Truncate(u64),
    Purge(u64, Vec<u8>),
    Vote(Vec<u8>),
    Committed(Vec<u8>),
    Snapshot(Kept),
}

impl Operation {
    /// Something openraft might ask of a store that holds this.
    fn random(held: &Contents, serial: usize, random: &mut StdRng) -> Operation {
        let seal = |kind| frame::seal(kind, format!("{serial}").as_bytes());
        let first = held.log.keys().next().copied();
        match (random.random_range(0..10), first) {
            (0..=4, _) | (7..=9, None) => {
                let next = held.next();
                let entries = (next..next + random.random_range(1..5)).map(|index| {
                    let size = *[10, 300, 3_000, 9_000].choose(random).unwrap();
                    (index, frame::seal(Kind::Entry, format!("{serial}.{index}{}", "x".repeat(size)).as_bytes()))
                });
                Operation::Append(entries.collect())
            }
            (5, _) => Operation::Vote(seal(Kind::Vote)),
            (6, _) => Operation::Committed(seal(Kind::Committed)),
            // What a snapshot covers is committed, and never truncated.
            (7, Some(first)) => {
                let covered = held.snapshot.as_ref().and_then(|kept| kept.upto).map_or(0, |upto| upto + 1);
                Operation::Truncate(random.random_range(first.max(covered)..=held.next()))
            }
            (8, Some(_)) => {
                let size = random.random_range(0..40_000);
                let payload = format!("{serial}{}", "s".repeat(size));
                let upto = Some(held.next() - 1);
                Operation::Snapshot(Kept { upto, frame: frame::seal(Kind::Snapshot, payload.as_bytes()) })
            }
            (_, Some(first)) => match held.snapshot.as_ref().and_then(|kept| kept.upto) {
                Some(upto) if upto >= first => Operation::Purge(random.random_range(first..=upto), seal(Kind::Purged)),
                Some(_) | None => Operation::Vote(seal(Kind::Vote)),
            },
            (_, None) => unreachable!("the first arm has these"),
        }
    }

    /// Hands it to the store; does not wait for appends, as openraft does not.
    async fn carry_out(self, store: &Store, serial: usize, disk: &Recorder) -> Result<(), StoreError> {
        match self {
            Operation::Append(entries) => {
                let disk = disk.clone();
                let done = move |result: Result<(), _>| {
                    if result.is_ok() {
                        disk.acknowledge(serial);
                    }
                };
                return store.append(entries, done).await;
            }
            Operation::Committed(record) => return store.save_committed(record),
            Operation::Truncate(from) => store.truncate(from).await?,
            Operation::Purge(upto, record) => store.purge(upto, record).await?,
            Operation::Vote(record) => store.save(Slot::Vote, record).await?,
            Operation::Snapshot(kept) => store.keep(kept).await?,
        }
        disk.acknowledge(serial);
        Ok(())
    }
}

/// A store at work, recorded: where it began, what happened, and what it should hold after each operation.
struct Run {
    base: Vec<u8>,
    events: Vec<Event>,
    /// The disk after an orderly end.
    closed: Vec<u8>,
    /// `held[n]` is what is held when the operations before `n` are done.
    held: Vec<Contents>,
}

fn run(operations: usize, random: &mut StdRng) -> Run {
    let disk = Recorder::default();
    let name = "a disk in memory";
    let store = Store::open_on(disk.clone(), name, Fresh::Yes).unwrap();
    let base = disk.bytes();
    disk.shared.lock().unwrap().events.clear();
    let mut held = vec![Contents::default()];
    block_on(async {
        for serial in 0..operations {
            let operation = Operation::random(held.last().unwrap(), serial, random);
            held.push(held.last().unwrap().after(&operation));
            operation.carry_out(&store, serial, &disk).await.unwrap();
        }
        // Whatever was appended last.
        store.save(Slot::Vote, frame::seal(Kind::Vote, b"the end")).await.unwrap();
    });
    let last = held.last().unwrap().after(&Operation::Vote(frame::seal(Kind::Vote, b"the end")));
    held.push(last);
    let events = disk.events();
    close(store);
    Run { base, events, closed: disk.bytes(), held }
}

/// Returns when the store has let go of its disk.
fn close(store: Store) {
    let mut failures = store.failures();
    drop(store);
    block_on(async { while failures.changed().await.is_ok() {} });
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(work)
}

/// Whether a disk does as it is told when it is told to sync.
#[derive(Clone, Copy, PartialEq)]
enum Disk {
    Honest,
    Lying,
}

struct Tally {
    cuts: usize,
    wrong: Vec<String>,
}

/// Cuts the power at random points of a run, and sometimes again while the store recovers.
fn cut(run: &Run, disk: Disk, cuts: usize, random: &mut StdRng, tally: &mut Tally) {
    let mut points: Vec<usize> = (0..cuts).map(|_| random.random_range(0..=run.events.len())).collect();
    points.sort_unstable();
    let mut durable = run.base.clone();
    let mut pending: Vec<Event> = Vec::new();
    let mut acknowledged = 0;
    let mut at = 0;
    for point in points {
        for event in &run.events[at..point] {
            match event {
                Event::Sync if disk == Disk::Honest => {
                    pending.drain(..).for_each(|event| apply(&mut durable, &event));
                }
                Event::Acknowledged(operation) => acknowledged = operation + 1,
                event => pending.push(event.clone()),
            }
        }
        at = point;
        let mut image = image_after_cut(&durable, &pending, random);
        if tally.cuts.is_multiple_of(8) {
            // The power comes back and goes again before the store is up.
            let recovering = Recorder::of(image.clone());
            let opened = Store::open_on(recovering.clone(), "recovering", Fresh::No);
            let recovery = recovering.events();
            drop(opened);
            let upto = random.random_range(0..=recovery.len());
            let synced = recovery[..upto].iter().rposition(|event| matches!(event, Event::Sync)).map_or(0, |at| at + 1);
            recovery[..synced].iter().for_each(|event| apply(&mut image, event));
            image = image_after_cut(&image, &recovery[synced..upto], random);
        }
        tally.cuts += 1;
        if let Err(why) = check(image, &run.held[acknowledged..]) {
            tally.wrong.push(format!("cut at {point} of {}, {acknowledged} acknowledged: {why}", run.events.len()));
        }
    }
}

/// Whether the store on this disk holds one of these.
fn check(image: Vec<u8>, allowed: &[Contents]) -> Result<(), String> {
    let store = Store::open_on(Recorder::of(image), "after a power cut", Fresh::No).map_err(|e| e.to_string())?;
    let found = Contents::of(&store).map_err(|error| error.to_string())?;
    match allowed.contains(&found) {
        true => Ok(()),
        false => Err(format!("holds entries {:?}, which it should not", found.log.keys())),
    }
}

fn cut_many(disk: Disk, cuts: usize, seed: u64) -> Tally {
    let mut random = StdRng::seed_from_u64(seed);
    let mut tally = Tally { cuts: 0, wrong: Vec::new() };
    while tally.cuts < cuts {
        let operations = random.random_range(1..60);
        let run = run(operations, &mut random);
        cut(&run, disk, 100.min(cuts - tally.cuts), &mut random, &mut tally);
    }
    tally
}

#[test]
fn nothing_acknowledged_is_lost_when_the_power_fails() {
    let began = Instant::now();
    let tally = cut_many(Disk::Honest, CUTS, 1);
    eprintln!("{} power cuts in {:?}", tally.cuts, began.elapsed());
    assert!(tally.cuts >= 2_000);
    assert!(tally.wrong.is_empty(), "{} wrong; the first: {}", tally.wrong.len(), tally.wrong[0]);
}

/// If this passes with an honest disk only because nothing is looked at, it would with a lying one too.
#[test]
fn a_disk_that_lies_about_syncing_is_caught() {
    let tally = cut_many(Disk::Lying, 200, 2);
    assert!(tally.wrong.len() > tally.cuts / 2, "only {} of {} noticed", tally.wrong.len(), tally.cuts);
}

/// Damages a disk in many ways; says how often the store noticed, and fails if it did not and should have.
fn rot(image: &[u8], held: &Contents, damages: usize, random: &mut StdRng) -> usize {
    let mut noticed = 0;
    for _ in 0..damages {
        let mut damaged = image.to_vec();
        let at = random.random_range(0..damaged.len());
        match random.random_range(0..10) {
            0 => damaged.truncate(at),
            1 => damaged[at..].iter_mut().take(SECTOR).for_each(|byte| *byte = 0),
            _ => damaged[at] ^= 1 << random.random_range(0..8),
        }
        match Store::open_on(Recorder::of(damaged), "rotten", Fresh::No) {
            Ok(store) => assert!(Contents::of(&store).unwrap() == *held, "damage at {at} was not noticed"),
            Err(OpenError::Corrupt { .. }) => noticed += 1,
            Err(other) => panic!("damage at {at}: {other:?}"),
        }
    }
    noticed
}

#[test]
fn a_flipped_bit_is_noticed_or_harmless_after_an_orderly_end() {
    let mut random = StdRng::seed_from_u64(3);
    let mut noticed = 0;
    for _ in 0..FLIPS / 100 {
        let run = run(20, &mut random);
        noticed += rot(&run.closed, run.held.last().unwrap(), 100, &mut random);
    }
    eprintln!("{noticed} of {FLIPS} noticed, the others hit nothing");
    assert!(noticed > FLIPS / 20);
}

#[test]
fn a_flipped_bit_is_noticed_or_harmless_after_a_power_cut() {
    let mut random = StdRng::seed_from_u64(4);
    let mut noticed = 0;
    for _ in 0..FLIPS / 100 {
        let Run { base, events, held, .. } = run(20, &mut random);
        let mut image = base;
        events.iter().for_each(|event| apply(&mut image, event));
        noticed += rot(&image, held.last().unwrap(), 100, &mut random);
    }
    eprintln!("{noticed} of {FLIPS} noticed, the others hit nothing");
    assert!(noticed > FLIPS / 20);
}

#[test]
fn an_empty_or_foreign_file_is_damage_and_not_a_new_store() {
    for (what, bytes) in [("empty", Vec::new()), ("foreign", b"not a database ".repeat(1_000))] {
        let refused = Store::open_on(Recorder::of(bytes), what, Fresh::No).unwrap_err();
        assert!(matches!(refused, OpenError::Corrupt { .. }), "{what}: {refused:?}");
    }
    // The same in a real directory, where there is a file, and it is empty.
    let dir = tempfile::tempdir().unwrap();
    close(Store::open(dir.path()).unwrap());
    std::fs::write(dir.path().join(FILE_NAME), b"").unwrap();
    let refused = Store::open(dir.path()).unwrap_err();
    assert!(matches!(refused, OpenError::Corrupt { .. }), "{refused:?}");
}

#[test]
fn a_store_of_a_newer_orca_is_not_touched() {
    let disk = Recorder::default();
    let store = Store::open_on(disk.clone(), "new", Fresh::Yes).unwrap();
    let mut vote = frame::seal(Kind::Vote, b"{}");
    vote[4] = frame::VERSION + 1;
    let checksum = crc32c::crc32c(&vote[4..]).to_le_bytes();
    vote[..4].copy_from_slice(&checksum);
    block_on(store.save(Slot::Vote, vote)).unwrap();
    let refused = Store::open_on(Recorder::of(disk.bytes()), "new", Fresh::No).unwrap_err();
    assert!(matches!(refused, OpenError::NewerFormat { found, .. } if found == frame::VERSION + 1), "{refused:?}");
}

#[test]
fn a_disk_that_fails_stops_the_store_for_good() {
    for kind in [io::ErrorKind::StorageFull, io::ErrorKind::Other] {
        let mut failed = 0;
        for after in 0..40 {
            let disk = Recorder::default();
            let store = Store::open_on(disk.clone(), "failing", Fresh::Yes).unwrap();
            disk.shared.lock().unwrap().fails = Some((after, kind));
            let sealed = |index: u64| vec![(index, frame::seal(Kind::Entry, &[b'e'; 5_000]))];
            block_on(async {
                let mut first = None;
                let mut safe = 0;
                for index in 0..10 {
                    let (done, written) = tokio::sync::oneshot::channel();
                    let sent = store.append(sealed(index), move |result| done.send(result).unwrap()).await;
                    let result = match sent {
                        Ok(()) => written.await.unwrap(),
                        Err(error) => Err(error),
                    };
                    match result {
                        Ok(()) => {
                            assert!(first.is_none(), "a store that has failed wrote again");
                            safe = index + 1;
                        }
                        Err(error) => first = first.or(Some(error)),
                    }
                }
                let Some(error) = first else { return };
                failed += 1;
                assert_eq!(matches!(error, StoreError::Full), kind == io::ErrorKind::StorageFull, "{error}");
                let told = tokio::time::timeout(Duration::from_secs(5), store.failure());
                assert_eq!(told.await.unwrap().to_string(), error.to_string());

                // There is space again, or another disk: what was acknowledged is there.
                let again = Store::open_on(Recorder::of(disk.bytes()), "again", Fresh::No).unwrap();
                assert!(again.entries(0..100, usize::MAX).unwrap().len() as u64 >= safe);
            });
        }
        assert!(failed > 10, "the disk failed {failed} times only");
    }
}

#[test]
fn a_log_with_a_hole_or_cut_beyond_its_snapshot_is_refused() {
    let store = Store::open_on(Recorder::default(), "strict", Fresh::Yes).unwrap();
    block_on(async {
        let sealed = |index: u64| vec![(index, frame::seal(Kind::Entry, b"e"))];
        store.append(sealed(0), |_| ()).await.unwrap();
        let refused = store.purge(0, frame::seal(Kind::Purged, b"0")).await.unwrap_err();
        assert!(matches!(refused, StoreError::Refused(_)), "{refused}");
    });
    let store = Store::open_on(Recorder::default(), "strict", Fresh::Yes).unwrap();
    block_on(async {
        let sealed = |index: u64| vec![(index, frame::seal(Kind::Entry, b"e"))];
        store.append(sealed(0), |_| ()).await.unwrap();
        let (done, written) = tokio::sync::oneshot::channel();
        store.append(sealed(2), move |result| done.send(result).unwrap()).await.unwrap();
        assert!(matches!(written.await.unwrap(), Err(StoreError::Refused(_))));
    });
}

#[tokio::test]
async fn a_failing_disk_ends_raft_and_says_why() {
    let disk = Recorder::default();
    let store = Store::open_on(disk.clone(), "failing", Fresh::Yes).unwrap();
    let config = RaftConfig::new(RaftId(1), "test", "failing");
    let raft = Raft::start_on(config, store, NoPeers).await.unwrap();
    raft.initialise(member(1)).await.unwrap();
    raft.propose(entry("safe")).await.unwrap();
    disk.shared.lock().unwrap().fails = Some((0, io::ErrorKind::StorageFull));
    let refused = raft.propose(entry("lost")).await.unwrap_err();
    assert!(matches!(refused, ProposeError::Fatal(Fatal::Store(StoreError::Full))), "{refused:?}");
    let told = tokio::time::timeout(PATIENCE, raft.fatal()).await.unwrap();
    assert!(matches!(told, Fatal::Store(StoreError::Full)), "{told:?}");
    assert!(matches!(raft.read().await, Err(ReadError::Fatal(_))));
    let mut leadership = raft.leadership();
    tokio::time::timeout(PATIENCE, leadership.wait_for(Option::is_none)).await.unwrap().unwrap();
    raft.shutdown().await;

    let again = Store::open_on(Recorder::of(disk.bytes()), "again", Fresh::No).unwrap();
    let raft = Raft::start_on(RaftConfig::new(RaftId(1), "test", "again"), again, NoPeers).await.unwrap();
    leads(&raft).await;
    assert_eq!(texts(&raft.read().await.unwrap())[0], "safe");
    raft.shutdown().await;
}

#[test]
fn a_file_that_is_mostly_empty_is_compacted_when_opened() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join(FILE_NAME);
    let store = Store::open(dir.path()).unwrap();
    block_on(async {
        let entries = (0..90).map(|index| (index, frame::seal(Kind::Entry, &vec![b'e'; 1 << 20]))).collect();
        store.append(entries, |result| result.unwrap()).await.unwrap();
        // The last entry stays, at the end of the file.
        let kept = Kept { upto: Some(88), frame: frame::seal(Kind::Snapshot, b"s") };
        store.keep(kept).await.unwrap();
        store.purge(88, frame::seal(Kind::Purged, b"p")).await.unwrap();
    });
    close(store);
    let before = file.metadata().unwrap().len();
    let store = Store::open(dir.path()).unwrap();
    let after = file.metadata().unwrap().len();
    assert!(after < before / 4, "{before} bytes became {after}");
    assert_eq!(store.entries(0..100, usize::MAX).unwrap().len(), 1);
    close(store);
}

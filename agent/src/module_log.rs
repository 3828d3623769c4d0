//! What modules print. A container's output is kept by its engine; a module runs in this process and has nobody
//! else to keep it.
//!
//! Each replica has one append-only text file, a line per line: `1771942113021 out text`. It is written at once
//! (a crash of ours loses nothing that was printed) and read back from the file, never from memory. When it is
//! full it becomes the *previous* file and a new one begins, so a replica holds at most two. A line that a crash
//! cut short is dropped when the file is opened again.
//!
//! Nothing here waits for a reader: one that is slower than two whole files misses lines and is told so.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write as _};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use futures_util::Stream;
use orca_cluster::id::ReplicaId;
use orca_cluster::time::Timestamp;
use tokio::sync::watch;

use crate::clock::now;

/// Bytes after which a file is full. A replica keeps at most two files.
pub const FILE_BYTES_MAX: u64 = 8 << 20;
/// Longest text of one line; what is over is cut off and counted in the line itself.
pub const LINE_BYTES_MAX: usize = 8 << 10;
/// Most bytes one replica may print in a second: enough for a stack trace per request at some hundred requests,
/// too little to wear out a disk. What is over is dropped and counted.
pub const BYTES_PER_SECOND_MAX: usize = 512 << 10;
/// Lines a follower takes from the file at once, so that it never holds a whole file.
const BATCH_LINES: usize = 256;

/// Where a line came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    Stdout,
    Stderr,
    /// Orca itself: a trap, a refused request, dropped lines.
    Orca,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    pub at: Timestamp,
    pub source: Source,
    pub text: String,
}

/// Which lines a reader wants. The default is all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Query {
    /// Only lines from then on.
    pub since: Option<Timestamp>,
    /// Only this many, the newest.
    pub tail: Option<usize>,
}

/// All logs of this node's modules. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Logs {
    directory: Arc<Path>,
    open: Arc<Mutex<BTreeMap<ReplicaId, Weak<Log>>>>,
}

/// Appends to the log of one replica. Cheap to clone; the log ends, for those who follow it, with the last clone.
#[derive(Debug, Clone)]
pub struct Writer(Arc<Log>);

impl Logs {
    pub fn open(directory: impl Into<PathBuf>) -> io::Result<Logs> {
        let directory = directory.into();
        DirBuilder::new().recursive(true).mode(0o700).create(&directory)?;
        Ok(Logs { directory: directory.into(), open: Arc::default() })
    }

    pub fn writer(&self, replica: ReplicaId) -> io::Result<Writer> {
        let mut open = lock(&self.open);
        if let Some(log) = open.get(&replica).and_then(Weak::upgrade) {
            return Ok(Writer(log));
        }
        open.retain(|_, log| log.strong_count() > 0);
        let log = Arc::new(Log::open(self.paths(replica))?);
        open.insert(replica, Arc::downgrade(&log));
        Ok(Writer(log))
    }

    /// The lines that are there now, oldest first.
    pub fn read(&self, replica: ReplicaId, query: Query) -> io::Result<Vec<Line>> {
        match self.writing(replica) {
            Some(log) => log.snapshot()?.lines(query),
            None => Snapshot::of(&self.paths(replica))?.lines(query),
        }
    }

    /// The lines that are there now and all that come, until nobody writes them any more.
    pub fn follow(
        &self,
        replica: ReplicaId,
        query: Query,
    ) -> io::Result<impl Stream<Item = io::Result<Line>> + Send + use<>> {
        let follower = match self.writing(replica) {
            Some(log) => {
                let ends = log.end.subscribe();
                let mut snapshot = log.snapshot()?;
                let lines = snapshot.lines(query)?.into();
                let current = match (snapshot.current.take(), snapshot.previous.take()) {
                    (Some((file, _)), _) => file,
                    // It already has its other name: see `rotate_when_full`.
                    (None, Some(file)) => file,
                    (None, None) => log.paths.open_written()?,
                };
                let tail =
                    Tail { log: Arc::downgrade(&log), paths: log.paths.clone(), current, read_to: snapshot.end, ends };
                Follower { lines, tail: Some(tail) }
            }
            // What nobody writes has no more lines than it has.
            None => Follower { lines: self.read(replica, query)?.into(), tail: None },
        };
        Ok(futures_util::stream::unfold(follower, |mut follower| async move {
            let line = follower.next().await.transpose()?;
            if line.is_err() {
                follower.tail = None;
            }
            Some((line, follower))
        }))
    }

    /// Forgets what a replica printed.
    pub fn remove(&self, replica: ReplicaId) -> io::Result<()> {
        let paths = self.paths(replica);
        for path in [&paths.previous, &paths.current] {
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    fn writing(&self, replica: ReplicaId) -> Option<Arc<Log>> {
        lock(&self.open).get(&replica).and_then(Weak::upgrade)
    }

    fn paths(&self, replica: ReplicaId) -> Paths {
        Paths {
            current: self.directory.join(format!("{replica}.log")),
            previous: self.directory.join(format!("{replica}.previous.log")),
        }
    }
}

impl Writer {
    /// Appends one line. Never fails its caller: a module must not stop serving because a disk is full. What
    /// cannot be written is counted like what is too much.
    pub fn line(&self, source: Source, text: &str) {
        self.0.line(source, text.as_bytes(), Instant::now(), now());
    }

    /// As [`line`](Writer::line), for what a module printed: any bytes.
    pub fn bytes(&self, source: Source, text: &[u8]) {
        self.0.line(source, text, Instant::now(), now());
    }
}

#[derive(Debug, Clone)]
struct Paths {
    current: PathBuf,
    previous: PathBuf,
}

impl Paths {
    /// The file that is written: under its other name, where a rotation came no further.
    fn open_written(&self) -> io::Result<File> {
        match File::open(&self.current) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => File::open(&self.previous),
            opened => opened,
        }
    }
}

/// How far a log has got: files begun so far, then bytes in the last.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct End {
    file: u64,
    bytes: u64,
}

#[derive(Debug)]
struct Log {
    paths: Paths,
    inner: Mutex<Inner>,
    end: watch::Sender<End>,
}

#[derive(Debug)]
struct Inner {
    file: File,
    end: End,
    allowance: Allowance,
    /// Whether the file is to make way for the next one: what would still fit waits as well, or lines were out of order.
    is_full: bool,
    /// Whether the last line could not be written: that is said once, and not of every line.
    is_failing: bool,
}

impl Log {
    fn open(paths: Paths) -> io::Result<Log> {
        let file = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(&paths.current)?;
        let bytes = whole_lines(&file)?;
        file.set_len(bytes)?;
        let end = End { file: 0, bytes };
        let inner = Inner { file, end, allowance: Allowance::default(), is_full: false, is_failing: false };
        Ok(Log { paths, inner: Mutex::new(inner), end: watch::Sender::new(end) })
    }

    fn line(&self, source: Source, text: &[u8], now: Instant, at: Timestamp) {
        let record = Record { at, source, text }.encode();
        let mut inner = lock(&self.inner);
        match inner.allowance.take(record.len(), now) {
            Verdict::Write { dropped: None } => {}
            Verdict::Write { dropped: Some(dropped) } => {
                let notice = dropped.to_string();
                let notice = Record { at, source: Source::Orca, text: notice.as_bytes() }.encode();
                if !self.append(&mut inner, &notice) {
                    inner.allowance.dropped = Some(dropped);
                }
            }
            Verdict::Drop => return,
        }
        if !self.append(&mut inner, &record) {
            inner.allowance.refuse(record.len());
        }
    }

    /// Whether it is written.
    fn append(&self, inner: &mut Inner, record: &[u8]) -> bool {
        let written = self.rotate_when_full(inner, record.len()).and_then(|()| inner.file.write_all(record));
        let log = self.paths.current.display();
        match &written {
            Ok(()) => {
                inner.end.bytes += record.len() as u64;
                if std::mem::take(&mut inner.is_failing) {
                    tracing::info!(%log, "lines can be logged again");
                }
            }
            Err(error) => {
                // A part of the line may be there. It must not become the beginning of the next one.
                let cut = inner.file.set_len(inner.end.bytes);
                if !std::mem::replace(&mut inner.is_failing, true) {
                    let cut = cut.is_ok();
                    tracing::warn!(%log, %error, cut, "lines cannot be logged; they are counted until they can");
                }
            }
        }
        self.end.send_replace(inner.end);
        written.is_ok()
    }

    fn rotate_when_full(&self, inner: &mut Inner, more: usize) -> io::Result<()> {
        inner.is_full |= inner.end.bytes + more as u64 > FILE_BYTES_MAX;
        if !inner.is_full {
            return Ok(());
        }
        match fs::rename(&self.paths.current, &self.paths.previous) {
            // Done before, when the next file could not be opened.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            renamed => renamed?,
        }
        inner.file = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(&self.paths.current)?;
        inner.end = End { file: inner.end.file + 1, bytes: 0 };
        inner.is_full = false;
        Ok(())
    }

    /// Both files and how far they reach, of one moment: no line is in neither or in both.
    fn snapshot(&self) -> io::Result<Snapshot> {
        let inner = lock(&self.inner);
        let mut snapshot = Snapshot::of(&self.paths)?;
        snapshot.end = inner.end;
        if let Some((_, bytes)) = &mut snapshot.current {
            *bytes = inner.end.bytes;
        }
        Ok(snapshot)
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        let inner = self.inner.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(dropped) = inner.allowance.dropped.take() {
            let notice = dropped.to_string();
            let notice = Record { at: now(), source: Source::Orca, text: notice.as_bytes() }.encode();
            // Last words: if they cannot be written either, nobody is left to be told.
            if inner.file.write_all(&notice).is_ok() {
                inner.end.bytes += notice.len() as u64;
                self.end.send_replace(inner.end);
            }
        }
    }
}

/// How much may be printed now.
#[derive(Debug, Default)]
struct Allowance {
    /// When the second that is being counted began.
    since: Option<Instant>,
    used: usize,
    dropped: Option<Dropped>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Dropped {
    lines: usize,
    bytes: usize,
}

enum Verdict {
    /// Write the line, and before it how many were dropped.
    Write {
        dropped: Option<Dropped>,
    },
    Drop,
}

impl Allowance {
    fn take(&mut self, bytes: usize, now: Instant) -> Verdict {
        if self.since.is_none_or(|since| now.saturating_duration_since(since) >= Duration::from_secs(1)) {
            self.since = Some(now);
            self.used = 0;
        }
        if self.used + bytes > BYTES_PER_SECOND_MAX {
            self.refuse(bytes);
            return Verdict::Drop;
        }
        self.used += bytes;
        Verdict::Write { dropped: self.dropped.take() }
    }

    fn refuse(&mut self, bytes: usize) {
        let dropped = self.dropped.get_or_insert_default();
        dropped.lines += 1;
        dropped.bytes += bytes;
    }
}

impl fmt::Display for Dropped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Dropped { lines, bytes } = self;
        let most = BYTES_PER_SECOND_MAX >> 10;
        write!(f, "{lines} lines ({bytes} bytes) were dropped: more than {most} KiB in a second, or a disk that failed")
    }
}

/// One line as it stands in the file.
struct Record<'a> {
    at: Timestamp,
    source: Source,
    text: &'a [u8],
}

impl Record<'_> {
    fn encode(&self) -> Vec<u8> {
        let Record { at, source, text } = self;
        let kept = &text[..text.len().min(LINE_BYTES_MAX)];
        // What is not UTF-8 becomes U+FFFD; what would end the line early becomes a space.
        let mut line =
            format!("{} {} {}", at.0, source.word(), String::from_utf8_lossy(kept).replace(['\n', '\r'], " "));
        if kept.len() < text.len() {
            line.push_str(&format!(" … ({} bytes more)", text.len() - kept.len()));
        }
        line.push('\n');
        line.into_bytes()
    }
}

impl Line {
    /// [`None`] for what no writer of ours has written: a file that somebody edited stays readable.
    fn decode(record: &[u8]) -> Option<Line> {
        let record = std::str::from_utf8(record).ok()?.strip_suffix('\n')?;
        let (at, rest) = record.split_once(' ')?;
        let (word, text) = rest.split_once(' ')?;
        let at = Timestamp(at.parse().ok()?);
        Some(Line { at, source: Source::of_word(word)?, text: text.to_owned() })
    }
}

impl Source {
    fn word(self) -> &'static str {
        match self {
            Source::Stdout => "out",
            Source::Stderr => "err",
            Source::Orca => "orca",
        }
    }

    fn of_word(word: &str) -> Option<Source> {
        [Source::Stdout, Source::Stderr, Source::Orca].into_iter().find(|source| source.word() == word)
    }
}

/// The files of a log, open. A rotation after this changes their names, not what is in them.
struct Snapshot {
    previous: Option<File>,
    /// With the bytes of it that count.
    current: Option<(File, u64)>,
    end: End,
}

impl Snapshot {
    fn of(paths: &Paths) -> io::Result<Snapshot> {
        let previous = existing(&paths.previous)?;
        let current = existing(&paths.current)?.map(|file| (file, u64::MAX));
        Ok(Snapshot { previous, current, end: End::default() })
    }

    fn lines(&self, query: Query) -> io::Result<Vec<Line>> {
        let wanted = query.tail.unwrap_or(usize::MAX);
        let files = self.previous.iter().map(|file| (file, u64::MAX));
        let files = files.chain(self.current.iter().map(|(file, bytes)| (file, *bytes)));
        let mut lines = VecDeque::new();
        for (mut file, bytes) in files {
            file.rewind()?;
            let mut file = BufReader::new(file.take(bytes));
            let mut record = Vec::new();
            while file.read_until(b'\n', &mut record)? > 0 {
                if let Some(line) = Line::decode(&record)
                    && query.since.is_none_or(|since| line.at >= since)
                {
                    lines.push_back(line);
                    if lines.len() > wanted {
                        lines.pop_front();
                    }
                }
                record.clear();
            }
        }
        Ok(lines.into())
    }
}

struct Follower {
    lines: VecDeque<Line>,
    tail: Option<Tail>,
}

struct Tail {
    log: Weak<Log>,
    paths: Paths,
    current: File,
    read_to: End,
    ends: watch::Receiver<End>,
}

impl Follower {
    async fn next(&mut self) -> io::Result<Option<Line>> {
        loop {
            if let Some(line) = self.lines.pop_front() {
                return Ok(Some(line));
            }
            let Some(tail) = &mut self.tail else { return Ok(None) };
            let end = *tail.ends.borrow_and_update();
            if end == tail.read_to {
                // An error says that the last writer is gone, and nothing came in between.
                if tail.ends.changed().await.is_err() {
                    self.tail = None;
                }
                continue;
            }
            tail.advance(end, &mut self.lines)?;
        }
    }
}

impl Tail {
    /// Takes the next batch of lines. Reads what was written moments ago, so from memory as a rule: not worth a
    /// thread of its own.
    fn advance(&mut self, end: End, lines: &mut VecDeque<Line>) -> io::Result<()> {
        let same_file = end.file == self.read_to.file;
        self.current.seek(SeekFrom::Start(self.read_to.bytes))?;
        let most = if same_file { end.bytes - self.read_to.bytes } else { u64::MAX };
        let mut reader = BufReader::new((&self.current).take(most));
        let mut record = Vec::new();
        while lines.len() < BATCH_LINES {
            record.clear();
            let bytes = reader.read_until(b'\n', &mut record)?;
            if bytes == 0 {
                break;
            }
            self.read_to.bytes += bytes as u64;
            lines.extend(Line::decode(&record));
        }
        if lines.is_empty() && same_file {
            // Only lines that are none of ours: they are passed over.
            self.read_to = end;
        } else if lines.is_empty() {
            self.next_file(lines)?;
        }
        Ok(())
    }

    fn next_file(&mut self, lines: &mut VecDeque<Line>) -> io::Result<()> {
        // Held, the name cannot change between asking for the number of the file and opening it. Where there is
        // nothing left to hold, it no longer changes.
        let log = self.log.upgrade();
        let _held = log.as_ref().map(|log| lock(&log.inner));
        let end = *self.ends.borrow_and_update();
        self.current = self.paths.open_written()?;
        if end.file > self.read_to.file + 1 {
            let text = "lines were written faster than they were read here; some are missing".to_owned();
            lines.push_back(Line { at: now(), source: Source::Orca, text });
        }
        self.read_to = End { file: end.file, bytes: 0 };
        Ok(())
    }
}

/// How many bytes of a file are whole lines.
fn whole_lines(mut file: &File) -> io::Result<u64> {
    const BLOCK: u64 = 4096;
    let mut end = file.metadata()?.len();
    while end > 0 {
        let start = end.saturating_sub(BLOCK);
        let mut block = Vec::new();
        file.seek(SeekFrom::Start(start))?;
        file.take(end - start).read_to_end(&mut block)?;
        if let Some(newline) = block.iter().rposition(|byte| *byte == b'\n') {
            return Ok(start + newline as u64 + 1);
        }
        end = start;
    }
    Ok(0)
}

fn existing(path: &Path) -> io::Result<Option<File>> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// A panic while a log was held leaves it as it was between two lines: it may go on.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures_util::StreamExt as _;

    use super::*;

    const REPLICA: ReplicaId = ReplicaId(7);

    fn texts(lines: &[Line]) -> Vec<&str> {
        lines.iter().map(|line| line.text.as_str()).collect()
    }

    fn logs() -> (tempfile::TempDir, Logs) {
        let directory = tempfile::tempdir().expect("a directory");
        let logs = Logs::open(directory.path().join("logs")).expect("logs");
        (directory, logs)
    }

    #[test]
    fn what_is_printed_is_read_back_with_its_source() {
        let (_directory, logs) = logs();
        let writer = logs.writer(REPLICA).unwrap();
        writer.line(Source::Stdout, "one");
        writer.bytes(Source::Stderr, b"two \xff three\r");
        let lines = logs.read(REPLICA, Query::default()).unwrap();
        assert_eq!(texts(&lines), ["one", "two \u{fffd} three "]);
        assert_eq!(lines[1].source, Source::Stderr);
    }

    #[test]
    fn a_line_that_a_crash_cut_short_is_dropped_and_the_rest_kept() {
        let (_directory, logs) = logs();
        logs.writer(REPLICA).unwrap().line(Source::Stdout, "whole");
        let path = logs.paths(REPLICA).current;
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"177194 out to").unwrap();
        assert_eq!(texts(&logs.read(REPLICA, Query::default()).unwrap()), ["whole"]);
        logs.writer(REPLICA).unwrap().line(Source::Stdout, "after");
        assert_eq!(texts(&logs.read(REPLICA, Query::default()).unwrap()), ["whole", "after"]);
    }

    #[test]
    fn a_reader_gets_the_newest_lines_or_those_since() {
        let (_directory, logs) = logs();
        let writer = logs.writer(REPLICA).unwrap();
        for second in 1..=5 {
            writer.0.line(Source::Stdout, format!("at {second}").as_bytes(), Instant::now(), Timestamp(second * 1000));
        }
        let tail = Query { tail: Some(2), ..Query::default() };
        assert_eq!(texts(&logs.read(REPLICA, tail).unwrap()), ["at 4", "at 5"]);
        let since = Query { since: Some(Timestamp(3000)), ..Query::default() };
        assert_eq!(texts(&logs.read(REPLICA, since).unwrap()), ["at 3", "at 4", "at 5"]);
    }

    #[test]
    fn a_flood_is_cut_and_counted_and_the_next_second_is_heard() {
        let (_directory, logs) = logs();
        let writer = logs.writer(REPLICA).unwrap();
        let start = Instant::now();
        let text = vec![b'x'; 1000];
        for _ in 0..2_000 {
            writer.0.line(Source::Stdout, &text, start, Timestamp(1_000));
        }
        writer.0.line(Source::Stdout, b"calm", start + Duration::from_secs(1), Timestamp(2_000));
        let lines = logs.read(REPLICA, Query::default()).unwrap();
        let kept = lines.iter().filter(|line| line.text.starts_with("xxx")).count();
        assert!((1..=BYTES_PER_SECOND_MAX / 1000).contains(&kept), "{kept} lines were kept");
        let [.., notice, calm] = lines.as_slice() else { panic!("two lines at least") };
        assert_eq!(calm.text, "calm");
        assert_eq!(notice.source, Source::Orca);
        assert!(notice.text.starts_with(&format!("{} lines", 2_000 - kept)), "{}", notice.text);
    }

    #[test]
    fn a_long_line_is_cut_and_says_so() {
        let (_directory, logs) = logs();
        logs.writer(REPLICA).unwrap().bytes(Source::Stdout, &vec![b'x'; LINE_BYTES_MAX + 5]);
        let lines = logs.read(REPLICA, Query::default()).unwrap();
        assert!(lines[0].text.ends_with("x … (5 bytes more)"));
    }

    /// Prints enough to fill `files` files, a second apart so that none of it is too much.
    fn fill(writer: &Writer, files: u64, clock: &mut Instant) {
        let text = vec![b'x'; LINE_BYTES_MAX];
        for _ in 0..files * FILE_BYTES_MAX / LINE_BYTES_MAX as u64 {
            *clock += Duration::from_secs(1);
            writer.0.line(Source::Stdout, &text, *clock, Timestamp(1));
        }
    }

    #[test]
    fn a_replica_keeps_two_files_and_no_more() {
        let (directory, logs) = logs();
        let writer = logs.writer(REPLICA).unwrap();
        fill(&writer, 4, &mut Instant::now());
        let sizes: Vec<u64> = fs::read_dir(directory.path().join("logs"))
            .unwrap()
            .map(|entry| entry.unwrap().metadata().unwrap().len())
            .collect();
        assert_eq!(sizes.len(), 2);
        assert!(sizes.iter().all(|size| *size <= FILE_BYTES_MAX), "{sizes:?}");
    }

    #[tokio::test]
    async fn a_follower_sees_every_line_over_a_rotation_and_then_the_end() {
        let (_directory, logs) = logs();
        let writer = logs.writer(REPLICA).unwrap();
        writer.line(Source::Stdout, "before");
        let mut follower = Box::pin(logs.follow(REPLICA, Query::default()).unwrap());
        assert_eq!(follower.next().await.unwrap().unwrap().text, "before");

        let mut clock = Instant::now();
        let mut count = 0;
        for _ in 0..3 {
            let text = vec![b'x'; LINE_BYTES_MAX];
            for _ in 0..FILE_BYTES_MAX / LINE_BYTES_MAX as u64 / 2 {
                clock += Duration::from_secs(1);
                writer.0.line(Source::Stdout, &text, clock, Timestamp(1));
                count += 1;
            }
            for _ in 0..FILE_BYTES_MAX / LINE_BYTES_MAX as u64 / 2 {
                assert!(follower.next().await.unwrap().unwrap().text.starts_with("xxx"));
                count -= 1;
            }
        }
        assert_eq!(count, 0);
        clock += Duration::from_secs(1);
        writer.0.line(Source::Stdout, b"last", clock, Timestamp(2));
        drop(writer);
        assert_eq!(follower.next().await.unwrap().unwrap().text, "last");
        assert!(follower.next().await.is_none());
    }

    #[tokio::test]
    async fn a_follower_that_is_far_behind_is_told_that_lines_are_missing() {
        let (_directory, logs) = logs();
        let writer = logs.writer(REPLICA).unwrap();
        let follower = logs.follow(REPLICA, Query::default()).unwrap();
        fill(&writer, 4, &mut Instant::now());
        drop(writer);
        let lines: Vec<Line> = follower.map(Result::unwrap).collect().await;
        assert!(lines.iter().any(|line| line.text.contains("some are missing")));
    }

    /// Counts what is worth waking someone for.
    struct Warnings(Arc<AtomicUsize>);

    impl tracing::Subscriber for Warnings {
        fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
            true
        }
        fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
            tracing::span::Id::from_u64(1)
        }
        fn event(&self, event: &tracing::Event<'_>) {
            if *event.metadata().level() == tracing::Level::WARN {
                self.0.fetch_add(1, Ordering::Relaxed);
            }
        }
        fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
        fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
        fn enter(&self, _: &tracing::span::Id) {}
        fn exit(&self, _: &tracing::span::Id) {}
    }

    #[tokio::test]
    async fn a_rotation_that_came_half_way_is_ended_by_the_next_line_that_can_be_written() {
        let (directory, logs) = logs();
        let writer = logs.writer(REPLICA).unwrap();
        let mut clock = Instant::now();
        let mut line = |text: &str| {
            clock += Duration::from_secs(1);
            writer.0.line(Source::Stdout, format!("{text:8000}").as_bytes(), clock, Timestamp(2));
        };
        let mut count = 0;
        while lock(&writer.0.inner).end.bytes + 8_020 <= FILE_BYTES_MAX {
            line("full");
            count += 1;
        }
        let Paths { current, previous } = logs.paths(REPLICA);
        let (there, away) = (directory.path().join("logs"), directory.path().join("away"));
        let warnings = Arc::default();
        tracing::subscriber::with_default(Warnings(Arc::clone(&warnings)), || {
            // The one moment that counts: it is renamed, and the next one cannot be opened.
            fs::rename(&current, &previous).unwrap();
            fs::rename(&there, &away).unwrap();
            (0..3).for_each(|_| line("lost"));
            fs::rename(&away, &there).unwrap();
        });
        assert_eq!(warnings.load(Ordering::Relaxed), 1);
        // Who begins to follow now has all of it, and goes on.
        let tail = Query { tail: Some(1), ..Query::default() };
        let mut follower = Box::pin(logs.follow(REPLICA, tail).unwrap());
        assert!(follower.next().await.unwrap().unwrap().text.starts_with("full"));
        line("kept");
        let next =
            tokio::time::timeout(Duration::from_secs(10), follower.next()).await.expect("nothing more is written");
        let told = next.unwrap().unwrap().text;
        assert!(told.starts_with("3 lines"), "{told}");
        assert!(follower.next().await.unwrap().unwrap().text.starts_with("kept"));
        let lines = logs.read(REPLICA, Query::default()).unwrap();
        assert_eq!(lines.len(), count + 2);
    }

    #[tokio::test]
    async fn a_log_that_nobody_writes_ends_when_it_is_read() {
        let (_directory, logs) = logs();
        logs.writer(REPLICA).unwrap().line(Source::Stdout, "bye");
        let lines: Vec<_> = logs.follow(REPLICA, Query::default()).unwrap().collect().await;
        assert_eq!(lines.len(), 1);
    }
}

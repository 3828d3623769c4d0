//! One line of JSON for each request, written by a thread of its own: a slow disk slows the log and never a
//! request. When the writer falls behind, or its disk fails, lines are dropped and the next one that is written says how
//! many.
//!
//! Whoever rotates the log renames it, or takes it away. Before each write it is looked whether the path still names the
//! file that is open, and if not, the path's is opened, and made: no signal is needed, and no line is lost.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

use orca_cluster::id::{ReplicaId, Revision, ServiceName};
use serde::Serialize;

/// Lines between the workers and the writer: a second of a fast service, a few MiB.
const LINES_WAITING_MAX: usize = 8192;
/// Bytes that are written at once. With a disk that fails, these lines wait and the next ones are dropped.
const PENDING_BYTES_MAX: usize = 64 << 10;
/// A line is on disk after this long at most.
const FLUSH_AFTER: Duration = Duration::from_millis(500);

/// One request, as it is written.
#[derive(Debug, Serialize)]
pub struct Line {
    /// Milliseconds since 1970 at which it began.
    pub at: u64,
    pub id: String,
    pub client: IpAddr,
    /// The trusted proxy that says so; absent if the client's connection is ours.
    pub via: Option<IpAddr>,
    pub method: String,
    pub host: Option<String>,
    pub path: String,
    /// Absent if the client left before there was one.
    pub status: Option<u16>,
    pub bytes: u64,
    pub micros: u64,
    /// How it ended: `done`, `cut` by us or the replica, or `left` by the client.
    pub end: &'static str,
    pub service: Option<ServiceName>,
    pub revision: Option<Revision>,
    pub replica: Option<ReplicaId>,
    /// Attempts beyond the first.
    pub retries: u32,
}

/// Where workers put lines.
#[derive(Debug, Clone)]
pub struct Log {
    lines: SyncSender<Box<Line>>,
    dropped: Arc<AtomicU64>,
}

impl Log {
    /// Starts the writer; it ends when the last [`Log`] is dropped and everything is written.
    pub fn start(path: PathBuf) -> io::Result<Log> {
        let (lines, waiting) = sync_channel(LINES_WAITING_MAX);
        let dropped = Arc::new(AtomicU64::new(0));
        let file = open(&path)?;
        let writer = Writer {
            path,
            file,
            pending: Vec::new(),
            since: None,
            is_cut: false,
            is_failing: false,
            told: 0,
            dropped: Arc::clone(&dropped),
        };
        std::thread::Builder::new().name("access-log".to_owned()).spawn(move || writer.run(&waiting))?;
        Ok(Log { lines, dropped })
    }

    pub fn write(&self, line: Box<Line>) {
        match self.lines.try_send(line) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                self.dropped.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

/// The file to append to. Addresses of people and what they asked for are nobody's business: a new one is for its owner,
/// whatever the umask says. The permissions of one that is there are whoever made it's choice.
fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}

struct Writer {
    path: PathBuf,
    file: File,
    /// Lines that are not written yet. The first may be the rest of one.
    pending: Vec<u8>,
    /// When the first of them came.
    since: Option<Instant>,
    /// Whether the file ends inside a line.
    is_cut: bool,
    /// Whether the last try failed: that is said once, and not of every line.
    is_failing: bool,
    /// How many dropped lines the log speaks of.
    told: u64,
    /// How many there are.
    dropped: Arc<AtomicU64>,
}

impl Writer {
    fn run(mut self, lines: &Receiver<Box<Line>>) {
        loop {
            let waited = self.since.map_or(Duration::ZERO, |since| since.elapsed());
            match lines.recv_timeout(FLUSH_AFTER.saturating_sub(waited)) {
                Ok(line) => self.take(&line),
                Err(RecvTimeoutError::Timeout) => self.flush(),
                Err(RecvTimeoutError::Disconnected) => return self.flush(),
            }
        }
    }

    fn take(&mut self, line: &Line) {
        let mut record = Vec::new();
        let dropped = self.dropped.load(Ordering::Relaxed);
        if dropped > self.told {
            record.extend_from_slice(format!("{{\"dropped\":{}}}\n", dropped - self.told).as_bytes());
        }
        serde_json::to_writer(&mut record, line).expect("a line has a form in JSON, and memory takes it");
        record.push(b'\n');
        if self.pending.len() + record.len() > PENDING_BYTES_MAX {
            self.flush();
        }
        // A line that is longer than all that waits together is written all the same.
        if !self.pending.is_empty() && self.pending.len() + record.len() > PENDING_BYTES_MAX {
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        self.told = dropped;
        self.pending.extend_from_slice(&record);
        self.since.get_or_insert_with(Instant::now);
    }

    /// Writes what waits. What cannot be written waits on.
    fn flush(&mut self) {
        let result = self.follow_path().and_then(|()| self.write_pending());
        self.since = (!self.pending.is_empty()).then(Instant::now);
        let log = self.path.display();
        match result {
            Ok(()) if self.is_failing => tracing::info!(%log, "the access log can be written again"),
            Ok(()) => {}
            Err(error) if !self.is_failing => {
                tracing::error!(%log, %error, "the access log cannot be written: its lines are counted until it can");
                self.is_failing = true;
                return;
            }
            Err(_) => return,
        }
        self.is_failing = false;
    }

    fn write_pending(&mut self) -> io::Result<()> {
        while !self.pending.is_empty() {
            let written = match self.file.write(&self.pending) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => written,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            self.is_cut = self.pending.get(written - 1) != Some(&b'\n');
            self.pending.drain(..written);
        }
        Ok(())
    }

    /// Goes over to the file that the path names now. Where none can be had, the old one is better than nothing.
    fn follow_path(&mut self) -> io::Result<()> {
        let ours = self.file.metadata()?;
        match fs::metadata(&self.path) {
            Ok(named) if (named.dev(), named.ino()) == (ours.dev(), ours.ino()) => return Ok(()),
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Ok(()),
            Ok(_) | Err(_) => {}
        }
        let Ok(file) = open(&self.path) else { return Ok(()) };
        if self.is_cut {
            // The rest of a line belongs to its beginning, or nowhere.
            let rest = self.pending.iter().position(|byte| *byte == b'\n').map_or(self.pending.len(), |end| end + 1);
            let rest: Vec<u8> = self.pending.drain(..rest).collect();
            if self.file.write_all(&rest).is_err() {
                self.dropped.fetch_add(1, Ordering::Relaxed);
            }
        }
        self.is_cut = false;
        self.file = file;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    fn line(number: u64) -> Box<Line> {
        Box::new(Line {
            at: number,
            id: "x".repeat(100),
            client: std::net::Ipv4Addr::LOCALHOST.into(),
            via: None,
            method: "GET".to_owned(),
            host: None,
            path: "/".to_owned(),
            status: Some(200),
            bytes: 0,
            micros: 0,
            end: "done",
            service: None,
            revision: None,
            replica: None,
            retries: 0,
        })
    }

    /// The lines of a file, whole ones only: numbers of requests, and how many are said to have been dropped.
    fn read(path: &Path) -> (Vec<u64>, u64) {
        let text = fs::read_to_string(path).unwrap_or_default();
        let values = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        let (mut numbers, mut dropped) = (Vec::new(), 0);
        for value in values {
            numbers.extend(value["at"].as_u64());
            dropped += value["dropped"].as_u64().unwrap_or(0);
        }
        (numbers, dropped)
    }

    fn until(what: &str, mut holds: impl FnMut() -> bool) {
        let start = Instant::now();
        while !holds() {
            assert!(start.elapsed() < PATIENCE, "never: {what}");
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_new_file_is_for_its_owner_only_and_one_that_is_there_stays_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        let new = directory.path().join("new");
        open(&new).unwrap().write_all(b"one").unwrap();
        assert_eq!(mode(&new), 0o600);
        fs::set_permissions(&new, Permissions::from_mode(0o640)).unwrap();
        open(&new).unwrap().write_all(b"two").unwrap();
        assert_eq!((mode(&new), fs::read(&new).unwrap()), (0o640, b"onetwo".to_vec()));
    }

    #[test]
    fn a_log_that_is_rotated_goes_on_in_the_new_file_and_loses_no_line() {
        let directory = tempfile::tempdir().unwrap();
        let (path, old) = (directory.path().join("log"), directory.path().join("log.1"));
        let log = Log::start(path.clone()).unwrap();
        (0..3).for_each(|number| log.write(line(number)));
        until("the first lines are written", || read(&path).0.len() == 3);
        fs::rename(&path, &old).unwrap();
        (3..6).for_each(|number| log.write(line(number)));
        until("the next ones are written", || read(&path).0.len() == 3);
        assert_eq!((read(&old), read(&path)), ((vec![0, 1, 2], 0), (vec![3, 4, 5], 0)));
    }

    #[test]
    fn a_disk_that_is_full_for_a_while_costs_lines_and_their_number_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let (path, disk) = (directory.path().join("log"), directory.path().join("disk"));
        symlink("/dev/full", &path).unwrap();
        let log = Log::start(path.clone()).unwrap();
        let mut count = 0;
        let mut write = || {
            log.write(line(count));
            count += 1;
            count
        };
        until("lines are dropped", || {
            write();
            std::thread::yield_now();
            log.dropped.load(Ordering::Relaxed) > 10
        });
        let other = directory.path().join("other");
        symlink(&disk, &other).unwrap();
        fs::rename(&other, &path).unwrap();
        until("it is written again", || {
            write();
            !read(&disk).0.is_empty()
        });
        let last = write();
        drop(log);
        until("all is told", || {
            let (numbers, dropped) = read(&disk);
            numbers.len() as u64 + dropped == last && numbers.is_sorted()
        });
    }
}

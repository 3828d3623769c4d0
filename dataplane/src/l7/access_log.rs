//! One line of JSON for each request, written by a thread of its own: a slow disk slows the log and never a
//! request. When the writer falls behind, lines are dropped and the next one that is written says how many.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::time::Duration;

use orca_cluster::id::{ReplicaId, Revision, ServiceName};
use serde::Serialize;

/// Lines between the workers and the writer: a second of a fast service, a few MiB.
const LINES_WAITING_MAX: usize = 8192;
/// A quiet log is on disk after this long at most.
const FLUSH_AFTER: Duration = Duration::from_millis(500);

/// One request, as it is written.
#[derive(Debug, Serialize)]
pub struct Line {
    /// Milliseconds since 1970 at which it began.
    pub at: u64,
    pub id: String,
    pub client: std::net::IpAddr,
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
    pub fn start(writer: Box<dyn Write + Send>) -> io::Result<Log> {
        let (lines, waiting) = sync_channel(LINES_WAITING_MAX);
        let dropped = Arc::new(AtomicU64::new(0));
        let log = Log { lines, dropped: Arc::clone(&dropped) };
        std::thread::Builder::new().name("access-log".to_owned()).spawn(move || {
            if let Err(error) = write_all(BufWriter::new(writer), &waiting, &dropped) {
                tracing::error!(%error, "the access log cannot be written any more; requests go on without it");
            }
        })?;
        Ok(log)
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
pub fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}

fn write_all(
    mut writer: BufWriter<Box<dyn Write + Send>>,
    lines: &Receiver<Box<Line>>,
    dropped: &AtomicU64,
) -> io::Result<()> {
    let mut told = 0;
    loop {
        match lines.recv_timeout(FLUSH_AFTER) {
            Ok(line) => {
                let now = dropped.load(Ordering::Relaxed);
                if now > told {
                    writeln!(writer, "{{\"dropped\":{}}}", now - told)?;
                    told = now;
                }
                serde_json::to_writer(&mut writer, &line)?;
                writer.write_all(b"\n")?;
            }
            Err(RecvTimeoutError::Timeout) => writer.flush()?,
            Err(RecvTimeoutError::Disconnected) => return writer.flush(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

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
}

//! The bytes of modules, by their SHA-256, on disk. What is here under a name has that hash: it is checked when it is
//! written, and again by the node that runs it. Absent: replication between control nodes; a node that lacks one asks
//! for it to be deployed again.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use aws_lc_rs::digest::{Context, SHA256};
use bytes::Bytes;
use orca_cluster::limit::MODULE_BYTES_MAX;
use tokio::fs::File;
use tokio::io::AsyncWriteExt as _;

/// Most bytes of modules that nothing refers to, those on their way in included: whoever may upload could fill the
/// disk otherwise.
const UNUSED_BYTES_MAX: u64 = 1 << 30;

/// A module that nothing refers to is kept this long: it was uploaded for a deploy that is about to come.
const UNUSED_KEPT: Duration = Duration::from_secs(60 * 60);

#[derive(Debug, thiserror::Error)]
pub enum BlobError {
    #[error("`{0}` is not a module's digest: 64 hexadecimal digits, lower case")]
    Digest(String),
    #[error("the module has {0} bytes; at most {MODULE_BYTES_MAX} are accepted")]
    TooLarge(u64),
    #[error(
        "{0} bytes of modules wait here for a deploy that names them, and at most {UNUSED_BYTES_MAX} may; deploy them, \
         or try again when they have been dropped, an hour after they came"
    )]
    Full(u64),
    #[error("the module ended after {got} of {size} bytes; send it again")]
    Short { got: u64, size: u64 },
    #[error("the module's bytes have the digest {found}, not {wanted}; send it again")]
    Other { wanted: String, found: String },
    #[error("{} cannot be written", path.display())]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} cannot be read", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Cheap to clone.
#[derive(Debug, Clone)]
pub struct Blobs {
    directory: PathBuf,
    uploads: Arc<AtomicU64>,
    /// Bytes that uploads under way will have.
    incoming: Arc<AtomicU64>,
}

impl Blobs {
    pub fn open(directory: PathBuf) -> Result<Blobs, BlobError> {
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&directory);
        made.map_err(|source| BlobError::Write { path: directory.clone(), source })?;
        let blobs = Blobs { directory, uploads: Arc::default(), incoming: Arc::default() };
        blobs.remove(|name| name.ends_with(PARTIAL))?;
        Ok(blobs)
    }

    /// Whether a module of this digest is here.
    pub fn has(&self, digest: &str) -> Result<bool, BlobError> {
        let path = self.path(digest)?;
        path.try_exists().map_err(|source| BlobError::Read { path, source })
    }

    /// The module, if it is here, with its size.
    pub async fn read(&self, digest: &str) -> Result<Option<(File, u64)>, BlobError> {
        let path = self.path(digest)?;
        let opened = async {
            let file = File::open(&path).await?;
            let size = file.metadata().await?.len();
            Ok::<_, io::Error>((file, size))
        };
        match opened.await {
            Ok(found) => Ok(Some(found)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(BlobError::Read { path, source }),
        }
    }

    /// Begins to take a module in, if there is room beside those that nothing refers to.
    pub async fn receive(&self, digest: &str, size: u64, referenced: &BTreeSet<&str>) -> Result<Upload, BlobError> {
        let place = self.path(digest)?;
        if size > MODULE_BYTES_MAX {
            return Err(BlobError::TooLarge(size));
        }
        let incoming = Incoming::new(self.incoming.clone(), size);
        let waiting = || Ok(self.unused(referenced)?.saturating_add(self.incoming.load(Ordering::Relaxed)));
        if waiting()? > UNUSED_BYTES_MAX {
            self.sweep(referenced)?;
            let waiting = waiting()?;
            if waiting > UNUSED_BYTES_MAX {
                return Err(BlobError::Full(waiting));
            }
        }
        // Two may send the same module at the same time.
        let serial = self.uploads.fetch_add(1, Ordering::Relaxed);
        let temporary = self.directory.join(format!("{digest}.{serial}{PARTIAL}"));
        let mut options = fs::OpenOptions::new();
        options.write(true).create_new(true).mode(0o600);
        let file = tokio::fs::OpenOptions::from(options).open(&temporary).await;
        let file = file.map_err(|source| BlobError::Write { path: temporary.clone(), source })?;
        let hash = Context::new(&SHA256);
        Ok(Upload {
            file,
            temporary,
            place,
            digest: digest.to_owned(),
            size,
            got: 0,
            hash,
            done: false,
            _incoming: incoming,
        })
    }

    /// Bytes of whole modules that nothing refers to.
    fn unused(&self, referenced: &BTreeSet<&str>) -> Result<u64, BlobError> {
        let failed = |source| BlobError::Read { path: self.directory.clone(), source };
        let mut bytes = 0u64;
        for entry in fs::read_dir(&self.directory).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name();
            let is_used = name.to_str().is_some_and(|name| referenced.contains(name) || name.ends_with(PARTIAL));
            // One that is gone by now takes no room.
            let length = if is_used { 0 } else { entry.metadata().map_or(0, |data| data.len()) };
            bytes = bytes.saturating_add(length);
        }
        Ok(bytes)
    }

    /// Removes what nothing refers to any more.
    pub fn sweep(&self, referenced: &BTreeSet<&str>) -> Result<(), BlobError> {
        self.remove(|name| {
            let old = || {
                let modified = fs::metadata(self.directory.join(name)).and_then(|data| data.modified());
                modified.is_ok_and(|at| SystemTime::now().duration_since(at).is_ok_and(|age| age >= UNUSED_KEPT))
            };
            !referenced.contains(name) && !name.ends_with(PARTIAL) && old()
        })
    }

    fn remove(&self, unwanted: impl Fn(&str) -> bool) -> Result<(), BlobError> {
        let failed = |source| BlobError::Read { path: self.directory.clone(), source };
        for entry in fs::read_dir(&self.directory).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name();
            if name.to_str().is_some_and(&unwanted) {
                fs::remove_file(entry.path()).map_err(|source| BlobError::Write { path: entry.path(), source })?;
            }
        }
        Ok(())
    }

    /// A digest becomes a file's name, so its form is checked first.
    fn path(&self, digest: &str) -> Result<PathBuf, BlobError> {
        let form = digest.len() == 64 && digest.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if form { Ok(self.directory.join(digest)) } else { Err(BlobError::Digest(digest.to_owned())) }
    }
}

const PARTIAL: &str = ".part";

/// A module on its way in. Dropped before [`finish`](Upload::finish), nothing of it stays.
pub struct Upload {
    file: File,
    temporary: PathBuf,
    place: PathBuf,
    digest: String,
    size: u64,
    got: u64,
    hash: Context,
    done: bool,
    _incoming: Incoming,
}

/// An upload's part of [`Blobs::incoming`], as long as it is under way.
struct Incoming {
    total: Arc<AtomicU64>,
    size: u64,
}

impl Incoming {
    fn new(total: Arc<AtomicU64>, size: u64) -> Incoming {
        total.fetch_add(size, Ordering::Relaxed);
        Incoming { total, size }
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.total.fetch_sub(self.size, Ordering::Relaxed);
    }
}

impl std::fmt::Debug for Upload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Upload").field("digest", &self.digest).field("got", &self.got).finish_non_exhaustive()
    }
}

impl Upload {
    pub fn is_complete(&self) -> bool {
        self.got >= self.size
    }

    pub async fn push(&mut self, bytes: &Bytes) -> Result<(), BlobError> {
        self.got += bytes.len() as u64;
        if self.got > self.size {
            return Err(BlobError::TooLarge(self.got));
        }
        self.hash.update(bytes);
        let written = self.file.write_all(bytes).await;
        written.map_err(|source| BlobError::Write { path: self.temporary.clone(), source })
    }

    pub async fn finish(mut self) -> Result<(), BlobError> {
        if self.got < self.size {
            return Err(BlobError::Short { got: self.got, size: self.size });
        }
        let found = hexadecimal(self.hash.clone().finish().as_ref());
        if found != self.digest {
            return Err(BlobError::Other { wanted: self.digest.clone(), found });
        }
        let published = async {
            self.file.sync_all().await?;
            tokio::fs::rename(&self.temporary, &self.place).await?;
            // The new name is durable only once its directory is.
            let directory = self.place.parent().unwrap_or(Path::new("."));
            File::open(directory).await?.sync_all().await
        };
        published.await.map_err(|source| BlobError::Write { path: self.place.clone(), source })?;
        self.done = true;
        Ok(())
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if !self.done {
            // What cannot be removed now is removed at the next start.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

fn hexadecimal(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn modules_that_nothing_refers_to_cannot_fill_the_disk() {
        let directory = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(directory.path().join("modules")).unwrap();
        let (none, wanted) = (BTreeSet::new(), "a".repeat(64));
        let mut under_way = Vec::new();
        for _ in 0..UNUSED_BYTES_MAX / MODULE_BYTES_MAX {
            under_way.push(blobs.receive(&wanted, MODULE_BYTES_MAX, &none).await.unwrap());
        }
        assert!(matches!(blobs.receive(&wanted, 1, &none).await, Err(BlobError::Full(_))));
        drop(under_way);

        let left = fs::File::create(directory.path().join("modules").join("b".repeat(64))).unwrap();
        left.set_len(UNUSED_BYTES_MAX).unwrap();
        assert!(matches!(blobs.receive(&wanted, 1, &none).await, Err(BlobError::Full(_))));
        let used = "b".repeat(64);
        blobs.receive(&wanted, 1, &BTreeSet::from([used.as_str()])).await.unwrap();
        left.set_modified(SystemTime::now() - UNUSED_KEPT).unwrap();
        blobs.receive(&wanted, 1, &none).await.unwrap();
        assert!(!blobs.has(&used).unwrap(), "what has waited for too long makes room");
    }
}

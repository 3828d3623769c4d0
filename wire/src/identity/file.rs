//! Files that hold keys: mode 0600, replaced as a whole or not at all, refused when others can read them.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

/// Largest key file read: a chain of certificates is a few KiB.
const FILE_LENGTH_MAX: u64 = 256 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum PrivateFileError {
    #[error("{} does not exist", path.display())]
    Missing { path: PathBuf },
    #[error("{} exists already and is not replaced", path.display())]
    Exists { path: PathBuf },
    #[error("{} holds a key and can be read by others (mode {mode:o}); run: chmod 600 {}", path.display(), path.display())]
    Open { path: PathBuf, mode: u32 },
    #[error("{} is larger than {max} bytes, which no file of its kind is", path.display())]
    TooLarge { path: PathBuf, max: u64 },
    #[error("cannot read {}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot write {}", path.display())]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// A file with a key.
pub fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>, PrivateFileError> {
    read_within(path, FILE_LENGTH_MAX)
}

/// A file of which there may be more than of a key.
pub fn read_within(path: &Path, max: u64) -> Result<Zeroizing<Vec<u8>>, PrivateFileError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => PrivateFileError::Missing { path: path.to_owned() },
        _ => PrivateFileError::Read { path: path.to_owned(), source },
    };
    let file = File::open(path).map_err(failed)?;
    // Of the opened file, not of the path: it may be replaced in between.
    let mode = file.metadata().map_err(failed)?.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(PrivateFileError::Open { path: path.to_owned(), mode });
    }
    let mut bytes = Zeroizing::new(Vec::new());
    file.take(max.saturating_add(1)).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > max {
        return Err(PrivateFileError::TooLarge { path: path.to_owned(), max });
    }
    Ok(bytes)
}

/// Writes the file, in place of the one that may be there. Whoever reads meanwhile, or after a crash, finds the old
/// one or the new one.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<(), PrivateFileError> {
    write(path, bytes, |temporary| fs::rename(temporary, path))
}

/// Writes a file that must not exist yet: a key made twice would lock out what the first one sealed.
pub fn create(path: &Path, bytes: &[u8]) -> Result<(), PrivateFileError> {
    // Unlike a rename, a link refuses to replace.
    write(path, bytes, |temporary| fs::hard_link(temporary, path).and_then(|()| fs::remove_file(temporary)))
}

fn write(path: &Path, bytes: &[u8], publish: impl FnOnce(&Path) -> io::Result<()>) -> Result<(), PrivateFileError> {
    let directory = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}.new", std::process::id()));
    let temporary = PathBuf::from(temporary);
    let publish = || {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        // Left by a process of the same id that was killed here; nobody else writes this name.
        match fs::remove_file(&temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        publish(&temporary)?;
        // The new name is durable only once its directory is.
        File::open(directory)?.sync_all()
    };
    publish().map_err(|source| {
        // Best effort: the error that matters is the first.
        let _ = fs::remove_file(&temporary);
        match source.kind() {
            io::ErrorKind::AlreadyExists => PrivateFileError::Exists { path: path.to_owned() },
            _ => PrivateFileError::Write { path: path.to_owned(), source },
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_file_is_for_its_owner_only_and_never_half_written() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys/one");
        assert!(matches!(read(&path), Err(PrivateFileError::Missing { .. })));
        create(&path, b"first").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(path.parent().unwrap()).unwrap().permissions().mode() & 0o777, 0o700);
        assert!(matches!(create(&path, b"second"), Err(PrivateFileError::Exists { .. })));
        assert_eq!(read(&path).unwrap().as_slice(), b"first");
        replace(&path, b"second").unwrap();
        assert_eq!(read(&path).unwrap().as_slice(), b"second");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "no temporary file stays");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("chmod 600"));
    }
}

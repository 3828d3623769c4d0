//! Where a server keeps what it has on this machine, unless it is told another place, and that it is there alone.

use std::fs::{DirBuilder, File, TryLockError};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use orca_control::UnsealSource;
use orca_control::vault::UNSEAL_KEY_VARIABLE;
use tracing::warn;
use zeroize::Zeroizing;

use crate::cli::ServerArgs;
use crate::exit::{Exit, Failure};

/// Held for as long as this process works in the directory: two agents would fight over the same containers. On the
/// directory itself, so that a full disk is no obstacle.
pub fn lock(data: &Path) -> Result<File, Failure> {
    let unusable = |error: &io::Error| {
        Failure::general(format!("the data directory {} cannot be used", data.display()))
            .why(error.to_string())
            .fix("make it this user's, or choose another with --data-dir DIR")
    };
    let made = DirBuilder::new().recursive(true).mode(0o700).create(data);
    let directory = made.and_then(|()| File::open(data)).map_err(|error| unusable(&error))?;
    match directory.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            return Err(Failure::general(format!("{} is in use by another server", data.display())).fix(
                "stop that one, take over from it with `orca server --take-over`, or give another --data-dir DIR",
            ));
        }
        // The store has a lock of its own where a file system has none for directories.
        Err(TryLockError::Error(error)) => warn!(%error, "the data directory cannot be locked"),
    }
    Ok(directory)
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn home() -> Result<PathBuf, Failure> {
    std::env::var_os("HOME")
        .map(PathBuf::from)
        .ok_or_else(|| Failure::input("there is no home directory to keep data in").fix("give --data-dir DIR"))
}

pub fn default_data_dir() -> Result<PathBuf, Failure> {
    if is_root() {
        return Ok(PathBuf::from("/var/lib/orca"));
    }
    let share = std::env::var_os("XDG_DATA_HOME").map(PathBuf::from);
    Ok(share.map_or_else(|| home().map(|home| home.join(".local/share")), Ok)?.join("orca"))
}

/// The variable, the flag, or a file beside the data directory: never in it, or each copy of the data would hold
/// its own key.
pub fn unseal_source(args: &ServerArgs, data: &Path) -> Result<UnsealSource, Failure> {
    if let Ok(value) = std::env::var(UNSEAL_KEY_VARIABLE) {
        return Ok(UnsealSource::Variable(Zeroizing::new(value)));
    }
    if let Some(path) = &args.unseal_key {
        return Ok(UnsealSource::File(path.clone()));
    }
    if is_root() && args.data_dir.is_none() {
        return Ok(UnsealSource::File(PathBuf::from("/etc/orca/unseal.key")));
    }
    let absolute = std::path::absolute(data).map_err(|error| Failure::from_error(Exit::General, &error))?;
    let mut name = absolute.file_name().unwrap_or_default().to_owned();
    name.push(".unseal-key");
    Ok(UnsealSource::File(absolute.with_file_name(name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_data_directory_is_one_servers() {
        let data = tempfile::tempdir().unwrap();
        let held = lock(data.path()).unwrap();
        let refused = lock(data.path()).unwrap_err();
        assert!(refused.message.contains(data.path().to_str().unwrap()), "{refused}");
        drop(held);
        lock(data.path()).unwrap();
    }
}

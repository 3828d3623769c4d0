//! The last goal, on disk: what lets a node bring everything back after a reboot without asking anyone. Secrets in
//! it are sealed to the node's own key.
//!
//! One file, replaced whole: a header line with format version and CRC-32C, then the goal as JSON. A file that does
//! not check is set aside and named in the log; the node then waits for a control node to tell it what it should
//! be doing, and touches nothing that runs until it does.

use std::io;
use std::path::{Path, PathBuf};

use orca_cluster::goal::Goal;
use orca_wire::codec::MESSAGE_LENGTH_MAX;
use orca_wire::identity::file;

const FILE: &str = "ledger";
const FORMAT: &str = "orca-ledger 1";

/// A goal that came in one message, and the header.
const LENGTH_MAX: u64 = MESSAGE_LENGTH_MAX as u64 + 1024;

#[derive(Debug, Clone)]
pub struct Ledger {
    path: PathBuf,
}

#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    #[error(transparent)]
    File(#[from] file::PrivateFileError),
    #[error("the ledger {} is damaged ({reason}); it is kept as {}", path.display(), aside.display())]
    Damaged { path: PathBuf, reason: &'static str, aside: PathBuf },
    #[error("the damaged ledger {} cannot be set aside", path.display())]
    Aside {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl Ledger {
    pub fn in_directory(directory: &Path) -> Ledger {
        Ledger { path: directory.join(FILE) }
    }

    /// The goal that was written last; nothing if none ever was.
    pub fn read(&self) -> Result<Option<Goal>, LedgerError> {
        let bytes = match file::read_within(&self.path, LENGTH_MAX) {
            Ok(bytes) => bytes,
            Err(file::PrivateFileError::Missing { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        match decode(&bytes) {
            Ok(goal) => Ok(Some(goal)),
            Err(reason) => {
                let aside = self.path.with_extension("damaged");
                std::fs::rename(&self.path, &aside)
                    .map_err(|source| LedgerError::Aside { path: self.path.clone(), source })?;
                Err(LedgerError::Damaged { path: self.path.clone(), reason, aside })
            }
        }
    }

    /// Returns when the goal is on disk.
    pub fn write(&self, goal: &Goal) -> Result<(), LedgerError> {
        Ok(file::replace(&self.path, &encode(goal))?)
    }
}

fn encode(goal: &Goal) -> Vec<u8> {
    let json = serde_json::to_vec(goal).expect("a goal has only text keys and finite numbers");
    let mut bytes = format!("{FORMAT} {:08x}\n", crc32c::crc32c(&json)).into_bytes();
    bytes.extend_from_slice(&json);
    bytes
}

fn decode(bytes: &[u8]) -> Result<Goal, &'static str> {
    let end = bytes.iter().position(|byte| *byte == b'\n').ok_or("it has no header")?;
    let (header, json) = (bytes.get(..end).unwrap_or_default(), bytes.get(end + 1..).unwrap_or_default());
    let header = std::str::from_utf8(header).map_err(|_| "its header is not text")?;
    let sum = header.strip_prefix(FORMAT).ok_or("it is of another format")?;
    let sum = u32::from_str_radix(sum.trim(), 16).map_err(|_| "its checksum is not a number")?;
    if crc32c::crc32c(json) != sum {
        return Err("its checksum is wrong");
    }
    serde_json::from_slice(json).map_err(|_| "it is not a goal")
}

#[cfg(test)]
mod tests {
    use super::*;
    use orca_cluster::id::GoalNumber;
    use orca_cluster::secret::{Opaque, Sealed};

    fn goal() -> Goal {
        Goal { number: GoalNumber { term: 3, count: 7 }, ..Goal::default() }
    }

    #[test]
    fn what_was_written_is_read_and_nothing_is_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let ledger = Ledger::in_directory(directory.path());
        assert_eq!(ledger.read().unwrap(), None);
        ledger.write(&goal()).unwrap();
        ledger.write(&goal()).unwrap();
        assert_eq!(ledger.read().unwrap(), Some(goal()));
    }

    #[test]
    fn the_goal_of_a_full_node_is_read_back() {
        let directory = tempfile::tempdir().unwrap();
        let ledger = Ledger::in_directory(directory.path());
        let sealed = |number: usize| (format!("A{number}").parse().unwrap(), Sealed(Opaque(vec![7; 64 << 10])));
        let full = Goal { secrets: (0..100).map(sealed).collect(), ..goal() };
        ledger.write(&full).unwrap();
        assert_eq!(ledger.read().unwrap(), Some(full));
    }

    #[test]
    fn a_damaged_ledger_is_set_aside_and_never_believed() {
        let directory = tempfile::tempdir().unwrap();
        let ledger = Ledger::in_directory(directory.path());
        let whole = encode(&goal());
        for bit in 0..whole.len() * 8 {
            let mut bytes = whole.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            if let Ok(read) = decode(&bytes) {
                // Only the case of a hex digit may change without a difference.
                assert_eq!(read, goal(), "bit {bit}");
            }
        }
        file::replace(&directory.path().join(FILE), &whole[..whole.len() - 1]).unwrap();
        assert!(matches!(ledger.read(), Err(LedgerError::Damaged { .. })));
        assert_eq!(ledger.read().unwrap(), None);
        assert!(directory.path().join("ledger.damaged").exists());
    }
}

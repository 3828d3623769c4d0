//! What `orca doctor` finds: from what was looked at to a verdict, with the step that mends it. The command line looks
//! at the machine it runs on, the server at its own and at what nodes report; how much is enough is said here, so that
//! the two cannot differ.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::id::NodeId;
use crate::inventory::Inventory;
use crate::replica::Engine;
use crate::resource::Memory;
use crate::secret::Scope;
use crate::state::State;
use crate::time::Timestamp;

/// With less, pulling an image or writing the log may fail soon.
const DISK_MIN: Memory = Memory(2 << 30);
/// A node whose clock differs by more than this has certificates and schedules at odds with ours.
const CLOCK_MAX: Duration = Duration::from_secs(5);
/// The store holds a log of a thousand entries and one snapshot; much more than this is worth a look.
const STORE_MAX: Memory = Memory(1 << 30);

/// One check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    pub subject: String,
    pub ok: bool,
    pub message: String,
    pub fix: Option<String>,
    pub details: BTreeMap<String, u64>,
}

impl Finding {
    pub fn good(subject: impl Into<String>, message: impl Into<String>) -> Finding {
        let details = BTreeMap::new();
        Finding { subject: subject.into(), ok: true, message: message.into(), fix: None, details }
    }

    pub fn bad(subject: impl Into<String>, message: impl Into<String>, fix: impl Into<String>) -> Finding {
        Finding { ok: false, fix: Some(fix.into()), ..Finding::good(subject, message) }
    }
}

/// `told` is how whoever asks says how much that is.
pub fn disk(subject: &str, free: Memory, told: &str) -> Finding {
    if free < DISK_MIN {
        let fix = "free some: `docker system df` shows what images and volumes take";
        return Finding::bad(subject, format!("only {told}"), fix);
    }
    Finding::good(subject, told)
}

/// By the mode of the file, or why it cannot be told; `told` is what is said if nothing is wrong.
pub fn unseal_key(path: &Path, mode: Result<u32, String>, told: &str) -> Finding {
    const SUBJECT: &str = "unseal key";
    let path = path.display();
    match mode {
        Ok(mode) if mode & 0o077 != 0 => {
            Finding::bad(SUBJECT, format!("{path} can be read by others"), format!("chmod 600 {path}"))
        }
        Ok(_) => Finding::good(SUBJECT, told),
        Err(error) => Finding::bad(
            SUBJECT,
            format!("{path} cannot be looked at: {error}; the next start will need it"),
            "without it the cluster's secrets are lost: put it back from where you keep a copy",
        ),
    }
}

/// By its size, or why it cannot be told.
pub fn store(path: &Path, size: Result<Memory, String>) -> Finding {
    const SUBJECT: &str = "store";
    let path = path.display();
    match size {
        Ok(size) if size > STORE_MAX => {
            Finding::bad(SUBJECT, format!("{path} has {size}"), "report this: it should stay small")
        }
        Ok(size) => Finding::good(SUBJECT, format!("{path} has {size}")),
        Err(error) => Finding::bad(SUBJECT, format!("{path} cannot be looked at: {error}"), "check its permissions"),
    }
}

pub fn engine(subject: &str, engine: &Engine) -> Finding {
    match engine {
        Engine::Ready { version } => Finding::good(subject, format!("engine {version} answers")),
        Engine::Unknown => Finding::good(subject, "not asked for yet"),
        Engine::Unreachable { reason } => Finding::bad(
            subject,
            format!("no engine answers, and containers need one: {reason}"),
            "install one (Debian: `apt-get install docker.io`), start it (`systemctl start docker`), or let the user that \
             the server runs as open it (group `docker`); modules do not need it",
        ),
    }
}

pub fn rotations(state: &State) -> Vec<Finding> {
    let found = state.open_rotations().into_iter().map(|(scope, left)| {
        let (scope, fix) = match scope {
            Scope::Project(project) => {
                (format!("project {project}"), format!("orca secrets rotate --project {project}"))
            }
            Scope::Global | Scope::Cluster => ("every project".to_owned(), "orca secrets rotate".to_owned()),
        };
        let message = format!("the rotation of the secrets of {scope} has not ended: {left} are under an older key");
        Finding::bad("secrets", message, fix)
    });
    found.collect()
}

pub fn nodes(state: &State, inventory: &Inventory, now: Timestamp) -> Vec<Finding> {
    state.nodes.iter().flat_map(|(id, record)| node(*id, &record.name, inventory, now)).collect()
}

fn node(id: NodeId, name: &str, inventory: &Inventory, now: Timestamp) -> Vec<Finding> {
    let subject = format!("node {name}");
    let Some(seen) = inventory.observed(id) else {
        return vec![Finding::bad(subject, "it is not heard", "check that orca runs there and reaches this server")];
    };
    let free = seen.facts.disk_available;
    vec![
        match inventory.is_suspect(id, now) {
            true => Finding::bad(&subject, "it has not been heard for a while", "check that orca runs there"),
            false => Finding::good(&subject, format!("it reports, orca {}", seen.facts.version)),
        },
        engine(&format!("{subject} docker"), &seen.facts.containers),
        disk(&format!("{subject} disk"), free, &format!("{free} are free")),
        clock(&format!("{subject} clock"), seen.at, inventory.heard(id).unwrap_or(now)),
    ]
}

fn clock(subject: &str, theirs: Timestamp, ours: Timestamp) -> Finding {
    let apart = theirs.since(ours).max(ours.since(theirs));
    if apart > CLOCK_MAX {
        let message = format!("it differs from ours by {} s", apart.as_secs());
        return Finding::bad(subject, message, "let NTP set both (`timedatectl set-ntp true`)");
    }
    Finding::good(subject, "it agrees with ours")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::{Command, Entry};
    use crate::event::Actor;
    use crate::secret::{Ciphertext, DataKeyId, Opaque, SealedDataKey};

    #[test]
    fn whoever_asks_finds_the_same() {
        let told = "x are free";
        assert!(disk("disk", DISK_MIN, told).ok);
        assert_eq!(disk("disk", Memory(DISK_MIN.0 - 1), told).message, "only x are free");

        let key = |mode| unseal_key(Path::new("/k"), mode, "it is well");
        assert_eq!(key(Ok(0o100_600)), Finding::good("unseal key", "it is well"));
        assert_eq!(key(Ok(0o100_640)), Finding::bad("unseal key", "/k can be read by others", "chmod 600 /k"));
        assert!(!key(Err("no such file".to_owned())).ok);

        let apart = |theirs, ours| clock("clock", Timestamp(theirs), Timestamp(ours)).ok;
        assert_eq!([apart(0, 5000), apart(5000, 0), apart(0, 5001), apart(5001, 0)], [true, true, false, false]);
    }

    #[test]
    fn a_rotation_that_was_broken_off_is_told_with_how_to_end_it() {
        let mut state = State::default();
        let id = DataKeyId { scope: Scope::Project("shop".parse().unwrap()), version: 1 };
        let key = Ciphertext { nonce: Opaque(vec![]), bytes: Opaque(vec![]) };
        let key = SealedDataKey { id: id.clone(), root: 1, created: Timestamp(1), key };
        let mut apply = |index, command| {
            state.apply(index, Entry { at: Timestamp(1), actor: Actor::Orca, source: None, command });
            rotations(&state).into_iter().find_map(|finding| finding.fix)
        };
        let begun = apply(1, Command::NewDataKey { key, rotates: true });
        assert_eq!(begun.as_deref(), Some("orca secrets rotate --project shop"));
        assert_eq!(apply(2, Command::FinishRotation { key: id }), None);
    }
}

//! What the server can tell of its own health, for `orca doctor`: one finding each, with the fix if it is bad.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use orca_cluster::replica::Engine;
use orca_cluster::resource::Memory;
use orca_cluster::secret::Scope;
use orca_cluster::state::State;
use orca_cluster::time::Timestamp;
use orca_wire::message::client::{Finding, Response};

use super::{Answer, Core};
use crate::auth::{Caller, Object, Verb};
use crate::clock::now;
use crate::driver::Overview;
use crate::store;
use crate::vault::Origin;

/// Less free space than this on a node, and pulling an image or writing the log may fail soon.
const DISK_MIN: Memory = Memory(2 << 30);

/// A node whose clock differs by more than this has certificates and schedules at odds with ours.
const CLOCK_MAX: Duration = Duration::from_secs(5);

/// The store holds a log of a thousand entries and one snapshot; much more than this is worth a look.
const STORE_MAX: u64 = 1 << 30;

pub async fn doctor(core: &Core, caller: &Caller) -> Answer {
    core.authorise(caller, Verb::Diagnose, Object::Cluster)?;
    let overview = core.overview().await?;
    let mut findings = vec![raft(core), store(core)];
    findings.push(disk("server", free(&core.data_dir)));
    findings.extend(unseal(core));
    findings.extend(rotations(&overview.state));
    let now = now();
    for (id, node) in &overview.state.nodes {
        findings.extend(node_findings(&overview, *id, &node.name, now));
    }
    Ok(Response::Doctor { findings })
}

fn good(subject: &str, message: String) -> Finding {
    Finding { subject: subject.to_owned(), ok: true, message, fix: None, details: BTreeMap::new() }
}

fn bad(subject: &str, message: String, fix: &str) -> Finding {
    Finding { subject: subject.to_owned(), ok: false, message, fix: Some(fix.to_owned()), details: BTreeMap::new() }
}

fn raft(core: &Core) -> Finding {
    let metrics = core.raft.metrics();
    let behind = metrics.committed_index.unwrap_or(0).saturating_sub(metrics.applied_index.unwrap_or(0));
    let details = [
        ("term", metrics.term.0),
        ("last_index", metrics.last_index.unwrap_or(0)),
        ("applied_index", metrics.applied_index.unwrap_or(0)),
        ("voters", metrics.voters.len() as u64),
    ];
    let details = details.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    let finding = match metrics.leader {
        Some(leader) if behind == 0 => {
            good("raft", format!("{leader} leads term {}, {} voters", metrics.term.0, metrics.voters.len()))
        }
        Some(_) => bad("raft", format!("this node is {behind} entries behind"), "look at the disk it writes to"),
        None => bad("raft", "no control node leads".to_owned(), "start the control nodes that are down"),
    };
    Finding { details, ..finding }
}

fn store(core: &Core) -> Finding {
    let path = core.data_dir.join("raft").join(store::FILE_NAME);
    match std::fs::metadata(&path) {
        Ok(data) if data.len() > STORE_MAX => {
            bad("store", format!("{} has {}", path.display(), Memory(data.len())), "report this: it should stay small")
        }
        Ok(data) => good("store", format!("{} has {}", path.display(), Memory(data.len()))),
        Err(error) => bad("store", format!("{} cannot be looked at: {error}", path.display()), "check its permissions"),
    }
}

fn free(path: &Path) -> Option<Memory> {
    let data = rustix::fs::statvfs(path).ok()?;
    Some(Memory(data.f_bavail.saturating_mul(data.f_frsize)))
}

fn disk(subject: &str, free: Option<Memory>) -> Finding {
    let subject = format!("{subject} disk");
    match free {
        Some(free) if free < DISK_MIN => {
            bad(&subject, format!("only {free} are free"), "free some; `docker system df` shows what images take")
        }
        Some(free) => good(&subject, format!("{free} are free")),
        None => bad(&subject, "its free space cannot be told".to_owned(), "check the data directory"),
    }
}

fn unseal(core: &Core) -> Vec<Finding> {
    let subject = "unseal key";
    let place = match &core.unseal {
        Origin::Variable => good(subject, "it comes from the environment".to_owned()),
        Origin::File(path) => match std::fs::metadata(path) {
            Ok(data) if data.permissions().mode() & 0o077 != 0 => bad(
                subject,
                format!("{} can be read by others", path.display()),
                &format!("chmod 600 {}", path.display()),
            ),
            Ok(_) => good(subject, format!("{}, readable by its owner only, outside the data", path.display())),
            Err(error) => bad(
                subject,
                format!("{} cannot be looked at: {error}; the next start will need it", path.display()),
                "put it back from where you keep a copy",
            ),
        },
    };
    let copy = "whether there is a copy of it elsewhere cannot be known from here; without one a backup of the data is \
                worthless";
    vec![place, good(subject, copy.to_owned())]
}

fn rotations(state: &State) -> Vec<Finding> {
    let found = state.open_rotations().into_iter().map(|(scope, left)| {
        let (scope, fix) = match scope {
            Scope::Project(project) => {
                (format!("project {project}"), format!("orca secrets rotate --project {project}"))
            }
            Scope::Global | Scope::Cluster => ("every project".to_owned(), "orca secrets rotate".to_owned()),
        };
        let message = format!("the rotation of the secrets of {scope} has not ended: {left} are under an older key");
        bad("secrets", message, &fix)
    });
    found.collect()
}

fn node_findings(overview: &Overview, id: orca_cluster::id::NodeId, name: &str, now: Timestamp) -> Vec<Finding> {
    let subject = format!("node {name}");
    let Some(seen) = overview.inventory.observed(id) else {
        return vec![bad(&subject, "it is not heard".to_owned(), "check that orca runs there and reaches this server")];
    };
    let mut findings = Vec::new();
    findings.push(match overview.inventory.is_suspect(id, now) {
        true => bad(&subject, "it has not been heard for a while".to_owned(), "check that orca runs there"),
        false => good(&subject, format!("it reports, orca {}", seen.facts.version)),
    });
    findings.push(match &seen.facts.containers {
        Engine::Ready { version } => good(&format!("{subject} docker"), format!("engine {version} answers")),
        Engine::Unknown => good(&format!("{subject} docker"), "not asked for yet".to_owned()),
        Engine::Unreachable { reason } => bad(
            &format!("{subject} docker"),
            format!("no engine answers, so containers cannot run there: {reason}"),
            "install one (Debian: `apt-get install docker.io`) or start it; modules do not need it",
        ),
    });
    findings.push(disk(&subject, Some(seen.facts.disk_available)));
    let heard = overview.inventory.heard(id).unwrap_or(now);
    let apart = seen.at.since(heard).max(heard.since(seen.at));
    findings.push(match apart > CLOCK_MAX {
        true => bad(
            &format!("{subject} clock"),
            format!("it differs from ours by {} s", apart.as_secs()),
            "let NTP set both (`timedatectl set-ntp true`)",
        ),
        false => good(&format!("{subject} clock"), "it agrees with ours".to_owned()),
    });
    findings
}

#[cfg(test)]
mod tests {
    use orca_cluster::command::{Command, Entry};
    use orca_cluster::event::Actor;
    use orca_cluster::secret::{Ciphertext, DataKeyId, Opaque, SealedDataKey};

    use super::*;

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

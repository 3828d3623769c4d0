//! What the server sees of its own health, for `orca doctor`. What is good and what is not, [`orca_cluster::doctor`]
//! says.

use std::os::unix::fs::PermissionsExt as _;

use orca_cluster::doctor::{self, Finding};
use orca_cluster::resource::Memory;
use orca_wire::message::client::Response;

use super::{Answer, Core};
use crate::auth::{Caller, Object, Verb};
use crate::clock::now;
use crate::store;
use crate::vault::Origin;

pub async fn doctor(core: &Core, caller: &Caller) -> Answer {
    core.authorise(caller, Verb::Diagnose, Object::Cluster)?;
    let overview = core.overview().await?;
    let mut findings = vec![raft(core), store(core), disk(core)];
    findings.extend(unseal(core));
    findings.extend(doctor::rotations(&overview.state));
    findings.extend(doctor::nodes(&overview.state, &overview.inventory, now()));
    Ok(Response::Doctor { findings })
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
            Finding::good("raft", format!("{leader} leads term {}, {} voters", metrics.term.0, metrics.voters.len()))
        }
        Some(_) => {
            Finding::bad("raft", format!("this node is {behind} entries behind"), "look at the disk it writes to")
        }
        None => Finding::bad("raft", "no control node leads", "start the control nodes that are down"),
    };
    Finding { details, ..finding }
}

fn store(core: &Core) -> Finding {
    let path = core.data_dir.join("raft").join(store::FILE_NAME);
    let size = std::fs::metadata(&path).map(|data| Memory(data.len())).map_err(|error| error.to_string());
    doctor::store(&path, size)
}

fn disk(core: &Core) -> Finding {
    const SUBJECT: &str = "server disk";
    match rustix::fs::statvfs(&core.data_dir) {
        Ok(data) => {
            let free = Memory(data.f_bavail.saturating_mul(data.f_frsize));
            doctor::disk(SUBJECT, free, &format!("{free} are free"))
        }
        Err(error) => {
            Finding::bad(SUBJECT, format!("its free space cannot be told: {error}"), "check the data directory")
        }
    }
}

fn unseal(core: &Core) -> [Finding; 2] {
    const SUBJECT: &str = "unseal key";
    let place = match &core.unseal {
        Origin::Variable => Finding::good(SUBJECT, "it comes from the environment"),
        Origin::File(path) => {
            let mode = std::fs::metadata(path).map(|data| data.permissions().mode());
            let told = format!("{}, readable by its owner only, outside the data", path.display());
            doctor::unseal_key(path, mode.map_err(|error| error.to_string()), &told)
        }
    };
    let copy = "whether there is a copy of it elsewhere cannot be known from here; without one a backup of the data is \
                worthless";
    [place, Finding::good(SUBJECT, copy)]
}

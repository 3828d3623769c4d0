//! What a node says about its replicas, and why one is not what it should be. Every reason is data: `orca why`,
//! the rollout and the tests branch on it, and a sentence is made from it in one place.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::id::{Generation, GoalNumber, ReplicaId, Revision, ServiceName};
use crate::resource::{Cpu, Memory};
use crate::time::Timestamp;
use crate::traffic::Traffic;

/// Everything a node has to say, whole each time: the leader keeps the newest and nothing older.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Observed {
    pub at: Timestamp,
    pub replicas: BTreeMap<ReplicaId, ReplicaReport>,
    /// The newest goal whose tables every part of the data plane uses, and its generation.
    pub acknowledged: (GoalNumber, Generation),
    pub traffic: Traffic,
    pub facts: Facts,
}

/// What the host is and has.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Facts {
    pub host_name: String,
    pub architecture: String,
    pub kernel: String,
    pub cpu: Cpu,
    pub memory: Memory,
    pub memory_available: Memory,
    pub disk_available: Memory,
    pub containers: Engine,
    pub proxy: Vec<SocketAddr>,
    pub version: String,
    /// What its operator says of it, for `placement.labels`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Why the node cannot write down what it is told, and so begins nothing new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault: Option<String>,
}

/// The state of the node's Docker engine.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Engine {
    #[default]
    Unknown,
    Ready {
        version: String,
    },
    /// With what was tried and what came back.
    Unreachable {
        reason: String,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaReport {
    pub service: ServiceName,
    pub revision: Revision,
    pub phase: Phase,
    /// When it came into this phase.
    pub since: Timestamp,
    /// Where it can be reached: a container's address, with the service's port. Absent for a module.
    pub address: Option<SocketAddr>,
    /// Of the image it was created from.
    pub digest: Option<String>,
    /// Times it was started again after an exit.
    pub restarts: u32,
    /// Exits in a row without having been ready in between.
    pub failures: u32,
    pub last_exit: Option<Exit>,
    /// What is wrong now, if something is.
    pub trouble: Option<Trouble>,
    pub usage: Usage,
    /// Progress people like to see: `12.4 MB in 1.1 s`.
    pub pulled: Option<Pulled>,
    /// How far a pull is that goes on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pulling: Option<Pulling>,
    /// How long the start that led to the present phase took until ready.
    pub ready_after_ms: Option<u64>,
    /// A probe was changed under it and has not passed yet: until it does, it takes nothing from a replica that was
    /// ready by the old one.
    #[serde(default)]
    pub on_trial: bool,
    /// The scheduled runs it was given, by the schedule's cron expression.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub runs: BTreeMap<String, RunReport>,
}

/// What became of a scheduled run on its node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunReport {
    pub due: Timestamp,
    pub state: RunState,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    /// Its replica is not ready yet.
    Waiting,
    Going,
    Done,
    Failed {
        reason: String,
    },
    /// Its replica was not ready in time, and it will not begin any more.
    TooLate,
    /// Its replica was ready, and could not begin it in time.
    NotBegun {
        reason: String,
    },
    /// The agent has restarted since it was given the run: whether it had begun is not known, so it is not begun again.
    Unknown,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Wanted, not begun.
    Pending,
    Pulling,
    Creating,
    /// Its process runs and is not ready yet.
    Starting,
    Ready,
    /// Was ready and its readiness probe fails now.
    Unready,
    /// Exited or failed; will be tried again, later each time.
    BackOff,
    Stopping,
    /// Nothing of it is left; the last thing ever said about it.
    Gone,
    /// Its node is not heard, so what it said last may not hold any more. Told to people; no node says it.
    Unknown,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    pub at: Timestamp,
    pub code: i64,
    /// The kernel killed it for its memory limit.
    pub out_of_memory: bool,
    /// How long it had been up.
    pub after_ms: u64,
    /// The last lines it wrote, oldest first.
    pub last_lines: Vec<String>,
    #[serde(default)]
    pub ending: Ending,
}

/// Whose doing an exit was.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// Its own, or a signal's.
    #[default]
    Own,
    /// Ours: its liveness probe had failed often enough.
    NotAlive { check: String, saw: Saw },
    /// Somebody removed its container.
    Removed,
    /// Its node's container engine stopped, and took it along.
    WithEngine,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Usage {
    pub memory: Memory,
    pub cpu: Cpu,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pulled {
    pub bytes: u64,
    pub millis: u64,
}

/// What of an image has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pulling {
    pub bytes: u64,
    /// Absent as long as it is not known of every layer how large it is.
    pub total: Option<u64>,
}

impl fmt::Display for Pulling {
    /// `pulling 12.4 of 80.1 MB`, and `unpacking 80.1 MB` when all of it is here.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, name, digits) = match self.total.unwrap_or(self.bytes) {
            0..=999_999 => (1e3, "kB", 0),
            1_000_000..=999_999_999 => (1e6, "MB", 1),
            _ => (1e9, "GB", 1),
        };
        let bytes = self.bytes as f64 / unit;
        match self.total {
            None => write!(f, "pulling, {bytes:.digits$} {name} so far"),
            Some(total) if self.bytes >= total => write!(f, "unpacking {bytes:.digits$} {name}"),
            Some(total) => write!(f, "pulling {bytes:.digits$} of {:.digits$} {name}", total as f64 / unit),
        }
    }
}

/// Why a replica does not get on. `at` tells how fresh it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trouble {
    pub at: Timestamp,
    pub cause: Cause,
    /// When it will be tried again.
    pub retry_at: Option<Timestamp>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// No Docker engine answers.
    NoEngine {
        reason: String,
    },
    /// Of no registry, or not of its own. `present` if the node has a copy, which was not to be used.
    ImageMissing {
        image: String,
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        present: bool,
    },
    ImageDenied {
        image: String,
    },
    /// `reason` is the engine's or the registry's own words; `present` as above.
    PullFailed {
        image: String,
        reason: String,
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        present: bool,
    },
    WrongArchitecture {
        image: String,
        has: String,
        needs: String,
    },
    /// The command, or the image's entry point, is not there or not executable.
    NoSuchCommand {
        command: String,
        reason: String,
    },
    SecretMissing {
        name: String,
    },
    PortTaken {
        port: u16,
        by: String,
    },
    VolumeBusy {
        volume: String,
        by: ReplicaId,
    },
    DiskFull {
        reason: String,
    },
    /// The engine refused to create or start it, for a reason not known by name.
    Refused {
        reason: String,
    },
    /// It has a container, and the engine cannot say in what condition that is.
    Unreadable {
        container: String,
        reason: String,
    },
    ModuleInvalid {
        reason: String,
    },
    ModuleMissing {
        digest: String,
    },
    /// Its process ended; [`ReplicaReport::last_exit`] has the rest.
    Exited,
    /// Its container was removed by somebody else; it is made again.
    Vanished,
    /// A probe does not pass. `listening` is what the process does listen on, when that could be seen.
    ProbeFailing {
        #[serde(default)]
        purpose: Purpose,
        check: String,
        saw: Saw,
        tries: u32,
        for_ms: u64,
        listening: Option<Vec<SocketAddr>>,
    },
    /// The liveness probe failed often enough to restart it.
    NotAlive {
        check: String,
        saw: Saw,
    },
}

/// What a probe is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    #[default]
    Readiness,
    Liveness,
}

/// What came back from a probe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Saw {
    Refused,
    TimedOut,
    Status(u16),
    /// A command's exit code and the end of its output.
    Exit {
        code: i64,
        output: String,
    },
    /// Any other error, in words.
    Error(String),
}

impl Cause {
    /// Whether trying again without a person changing something is pointless, so that a rollout need not wait.
    pub fn is_final(&self) -> bool {
        match self {
            Cause::ImageMissing { .. }
            | Cause::ImageDenied { .. }
            | Cause::WrongArchitecture { .. }
            | Cause::NoSuchCommand { .. }
            | Cause::SecretMissing { .. }
            | Cause::Refused { .. }
            | Cause::ModuleInvalid { .. }
            | Cause::PortTaken { .. } => true,
            Cause::NoEngine { .. }
            | Cause::PullFailed { .. }
            | Cause::VolumeBusy { .. }
            | Cause::DiskFull { .. }
            | Cause::Unreadable { .. }
            | Cause::ModuleMissing { .. }
            | Cause::Exited
            | Cause::Vanished
            | Cause::ProbeFailing { .. }
            | Cause::NotAlive { .. } => false,
        }
    }

    /// Whether it keeps a replica from being started at all.
    pub fn precedes_start(&self) -> bool {
        match self {
            Cause::NoEngine { .. }
            | Cause::ImageMissing { .. }
            | Cause::ImageDenied { .. }
            | Cause::PullFailed { .. }
            | Cause::WrongArchitecture { .. }
            | Cause::NoSuchCommand { .. }
            | Cause::SecretMissing { .. }
            | Cause::PortTaken { .. }
            | Cause::VolumeBusy { .. }
            | Cause::DiskFull { .. }
            | Cause::Refused { .. }
            | Cause::Unreadable { .. }
            | Cause::ModuleInvalid { .. }
            | Cause::ModuleMissing { .. } => true,
            Cause::Exited | Cause::Vanished | Cause::ProbeFailing { .. } | Cause::NotAlive { .. } => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pull_is_told_with_its_whole_size_only_when_that_is_known() {
        let told = |bytes, total| Pulling { bytes, total }.to_string();
        assert_eq!(told(12_400_000, Some(80_100_000)), "pulling 12.4 of 80.1 MB");
        assert_eq!(told(90_000_000, Some(2_300_000_000)), "pulling 0.1 of 2.3 GB");
        assert_eq!(told(12_400_000, None), "pulling, 12.4 MB so far");
        assert_eq!(told(900_000, Some(900_000)), "unpacking 900 kB");
    }
}

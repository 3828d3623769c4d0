//! The cause of any bad state in one sentence, with what was seen and what to do. Deterministic: a function of the
//! same values the rollout decides on, so it cannot say something else than what happened.
//!
//! Here it is decided which of several things that are wrong is the one to name; [`replica`](mod@replica) knows what
//! can be wrong with one replica, [`output`] what its last lines give away.

mod output;
mod probe;
mod replica;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::id::{NodeId, ReplicaId, ServiceName};
use crate::plan::View;
use crate::plan::report::{NoRoom, Waiting};
use crate::replica::{Phase, ReplicaReport, Saw};
use crate::spec::Service;
use crate::state::{Deployed, Direction, Failure, PlacementState};
pub use replica::replica;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diagnosis {
    /// A word for programs: `probe-status`, `out-of-memory`.
    pub code: String,
    /// One sentence, no full stop.
    pub cause: String,
    /// What was seen, most telling first.
    pub evidence: Vec<String>,
    pub fix: Option<String>,
    pub replica: Option<ReplicaId>,
}

/// Exits in a row that make a replica crash-looping rather than unlucky.
pub const CRASH_LOOP_AFTER: u32 = 3;
/// How long the exit of a replica that serves again is worth telling.
const RESTLESS_FOR: Duration = Duration::from_secs(10 * 60);
/// Fewer errors in the last minute may be anybody's mistake.
const ERRORS_MIN: u64 = 5;

impl Diagnosis {
    fn new(code: &str, cause: impl Into<String>, fix: impl Into<String>) -> Diagnosis {
        Diagnosis {
            code: code.to_owned(),
            cause: cause.into(),
            evidence: Vec::new(),
            fix: Some(fix.into()),
            replica: None,
        }
    }

    fn seen(mut self, evidence: impl IntoIterator<Item = String>) -> Diagnosis {
        self.evidence.extend(evidence);
        self
    }
}

/// What is wrong with this service; nothing if it is as asked.
pub fn why(view: View<'_>, name: &ServiceName, waiting: &[Waiting]) -> Option<Diagnosis> {
    let deployed = view.state.services.get(name)?;
    if deployed.removal.is_some() {
        return Some(Diagnosis::new("removing", "it is being removed", "wait until its replicas are gone"));
    }
    if deployed.stopped {
        return Some(Diagnosis::new("stopped", "it was stopped by `orca stop`", format!("orca start {name}")));
    }
    worst_replica(view, name, deployed)
        .or_else(|| going_back(deployed))
        .or_else(|| waiting.iter().find_map(|reason| waits(view, name, reason)))
        .or_else(|| erring(view, name))
        .or_else(|| unwatched(view, name))
        .or_else(|| restless(view, name, deployed))
        .or_else(|| given_up(deployed))
}

/// The worst replica speaks for the service: one that serves and fails before one that merely starts.
fn worst_replica(view: View<'_>, name: &ServiceName, deployed: &Deployed) -> Option<Diagnosis> {
    let mut found: Vec<(u8, Diagnosis)> = Vec::new();
    for (id, placement) in view.state.placements_of(name) {
        if placement.state != PlacementState::Serve {
            continue;
        }
        let spec = deployed.record_for(placement.revision).map_or(deployed.spec(), |record| &record.spec);
        // What a silent node said last may be wrong by now.
        if view.inventory.is_suspect(placement.node, view.now) {
            found.push((9, silent(view, placement.node, id)));
        } else if let Some(report) = view.inventory.replica(placement.node, id) {
            found.extend(replica(view, name, spec, id, report).map(|diagnosis| (severity(report), diagnosis)));
        }
    }
    found.sort_by_key(|(severity, _)| std::cmp::Reverse(*severity));
    found.into_iter().next().map(|(_, diagnosis)| diagnosis)
}

/// How much worse one replica's state is than another's.
fn severity(report: &ReplicaReport) -> u8 {
    match report.phase {
        Phase::Ready | Phase::Stopping | Phase::Gone => 0,
        Phase::Pending | Phase::Pulling | Phase::Creating | Phase::Starting if report.trouble.is_none() => 1,
        Phase::Pending | Phase::Pulling | Phase::Creating | Phase::Starting => 5,
        Phase::Unready => 6,
        Phase::BackOff => 7,
        Phase::Unknown => 9,
    }
}

/// An update that is being taken back, even though the old revision serves well.
fn going_back(deployed: &Deployed) -> Option<Diagnosis> {
    let rollout = deployed.rollout.as_ref()?;
    match &rollout.direction {
        Direction::Back { why } if !why.asked => {
            Some(rolled_back(format!("{} was given up: {}", rollout.to, why.cause), why))
        }
        Direction::Back { .. } | Direction::Forward => None,
    }
}

/// The last update did not go well.
fn given_up(deployed: &Deployed) -> Option<Diagnosis> {
    let last = deployed.receipts.back()?;
    let failure = last.failure.as_ref()?;
    if failure.asked || last.outcome.is_done() || deployed.rollout.is_some() {
        return None;
    }
    let cause = format!("it serves {}, because {} was given up: {}", deployed.target, last.revision, failure.cause);
    // A first deploy that failed and works after all has nothing to be said against it.
    (deployed.target != last.revision).then(|| rolled_back(cause, failure))
}

fn rolled_back(cause: String, failure: &Failure) -> Diagnosis {
    Diagnosis {
        code: "rolled-back".to_owned(),
        cause,
        evidence: failure.evidence.clone(),
        fix: failure.fix.clone(),
        replica: None,
    }
}

/// All replicas are ready, and what they answer is mostly errors.
fn erring(view: View<'_>, name: &ServiceName) -> Option<Diagnosis> {
    let window = view.recent.get(name)?;
    let (requests, errors) = (window.requests, window.errors);
    (errors >= ERRORS_MIN && errors * 2 >= requests).then(|| {
        Diagnosis::new(
            "errors",
            format!("it is ready, but {errors} of its {requests} requests in the last minute ended in an error (5xx)"),
            format!("its log says why: orca logs {name} --tail 50"),
        )
    })
}

/// All replicas were ready when their node's engine last answered, and as far as probes reach they still are.
fn unwatched(view: View<'_>, name: &ServiceName) -> Option<Diagnosis> {
    let serving = view.state.placements_of(name).filter(|(_, placement)| placement.state == PlacementState::Serve);
    serving.into_iter().find_map(|(id, placement)| {
        // Only a container has an address.
        view.inventory.replica(placement.node, id)?.address?;
        let away = replica::engine_away(view, id)?;
        let cause = format!("it serves, but {}: what ends there now is not started again", away.cause);
        Some(Diagnosis { cause, ..away })
    })
}

/// All replicas are ready, and one of them has not been for long because it ended not long ago.
fn restless(view: View<'_>, name: &ServiceName, deployed: &Deployed) -> Option<Diagnosis> {
    let serving = view.state.placements_of(name).filter(|(_, placement)| placement.state == PlacementState::Serve);
    let exits = serving.filter_map(|(id, placement)| {
        let report = view.inventory.replica(placement.node, id)?;
        let exit = report.last_exit.as_ref().filter(|exit| view.now.since(exit.at) < RESTLESS_FOR)?;
        Some((exit.at, id, placement, report, exit))
    });
    let (at, id, placement, report, exit) = exits.max_by_key(|(at, ..)| *at)?;
    let spec = deployed.record_for(placement.revision).map_or(deployed.spec(), |record| &record.spec);
    let mut diagnosis = replica::exited(name, spec, id, report, exit);
    let times = match report.restarts {
        0 | 1 => String::new(),
        many => format!(", for the {} time", ordinal(many)),
    };
    let ago = view.now.since(at).as_secs();
    diagnosis.cause = format!("it serves, but was restarted {ago} s ago{times}: {}", diagnosis.cause);
    Some(diagnosis)
}

fn ordinal(number: u32) -> String {
    let ending = match (number % 10, number % 100) {
        (_, 11..=13) => "th",
        (1, _) => "st",
        (2, _) => "nd",
        (3, _) => "rd",
        _ => "th",
    };
    format!("{number}{ending}")
}

/// The same, as the reason for giving a revision up.
pub fn failure(
    view: View<'_>,
    name: &ServiceName,
    spec: &Service,
    id: ReplicaId,
    report: Option<&ReplicaReport>,
) -> Failure {
    // Ready at this moment, it has ended too often before.
    let exits = |report: &ReplicaReport| Some(replica::exited(name, spec, id, report, report.last_exit.as_ref()?));
    let diagnosis = report.and_then(|report| replica(view, name, spec, id, report).or_else(|| exits(report)));
    let diagnosis = diagnosis.unwrap_or_else(|| {
        let timeout = spec.deploy.ready_timeout.as_secs();
        let cause = format!("it was not ready after {timeout} s");
        Diagnosis::new("late", cause, "look at its logs, or raise `ready_timeout_secs`")
    });
    let mut evidence = diagnosis.evidence;
    if let Some(report) = report
        && report.phase != Phase::Ready
        && let Some(since) = view.now.since(report.since).as_secs().checked_sub(1).filter(|secs| *secs > 0)
    {
        evidence.push(format!("{id} has been {} for {since} s", phase_word(report.phase)));
    }
    Failure { cause: diagnosis.cause, evidence, fix: diagnosis.fix, asked: false }
}

/// No node could take a replica in time.
pub fn no_room(view: View<'_>, name: &ServiceName, spec: &Service) -> Failure {
    let mut room = crate::plan::schedule::Room::new(view);
    let diagnosis = match room.place(name, spec) {
        Ok(_) => Diagnosis::new("late", "its replicas were not placed in time", "deploy again"),
        Err(refused) => no_room_for(view, &refused),
    };
    Failure { cause: diagnosis.cause, evidence: diagnosis.evidence, fix: diagnosis.fix, asked: false }
}

fn waits(view: View<'_>, name: &ServiceName, waiting: &Waiting) -> Option<Diagnosis> {
    match waiting {
        Waiting::ForRoom { refused } => Some(no_room_for(view, refused)),
        Waiting::ForDependency { service } => {
            let other = ServiceName::new(name.project.clone(), service.clone());
            let Some(its) = why(view, &other, &[]) else {
                let cause = format!("it waits for `{service}`, which it depends on, to be ready");
                return Some(Diagnosis::new("dependency", cause, format!("orca why {other}")));
            };
            Some(Diagnosis {
                code: "dependency".to_owned(),
                cause: format!("it depends on `{service}`, which is not ready: {}", its.cause),
                evidence: its.evidence,
                fix: its.fix.or_else(|| Some(format!("orca why {other}"))),
                replica: None,
            })
        }
        Waiting::ForNode { node, .. } => Some(Diagnosis::new(
            "node-silent",
            format!("its volume is on {}, which is not heard", view.state.node_name(*node)),
            "bring the node back",
        )),
        Waiting::ForReady { .. }
        | Waiting::ForDrain { .. }
        | Waiting::ForStop { .. }
        | Waiting::ForProxies
        | Waiting::ForPromotion { .. }
        | Waiting::ForMeasurement { .. } => None,
    }
}

/// In the words of what keeps all of them from it, where that is one thing.
fn no_room_for(view: View<'_>, refused: &BTreeMap<NodeId, NoRoom>) -> Diagnosis {
    let room = "lower [service.resources], stop something, or add a node";
    let each = refused.iter().map(|(node, reason)| format!("{}: {reason}", view.state.node_name(*node)));
    let home = refused.values().find_map(|reason| match reason {
        NoRoom::VolumeElsewhere { on } => Some(on),
        NoRoom::Pinned { .. }
        | NoRoom::Label { .. }
        | NoRoom::Memory { .. }
        | NoRoom::Cpu { .. }
        | NoRoom::NotHeard => None,
    });
    if let Some(home) = home {
        return no_room_at_home(view, home, refused).seen(each);
    }
    // A node that is not heard might be the one.
    let mut reasons = refused.values().filter(|reason| **reason != NoRoom::NotHeard);
    let Some(first) = reasons.next() else {
        let cause = match refused.len() {
            0 => "there is no node it could run on".to_owned(),
            _ => "no node is heard that it could run on".to_owned(),
        };
        return Diagnosis::new("no-node", cause, "bring a node back; `orca nodes` lists them").seen(each);
    };
    let alike = |reason: &NoRoom| std::mem::discriminant(reason) == std::mem::discriminant(first);
    if !reasons.all(alike) {
        let cause = format!("none of {} nodes can take it, each for a reason of its own", refused.len());
        return Diagnosis::new("no-room", cause, room).seen(each);
    }
    let diagnosis = match first {
        NoRoom::Pinned { to } if view.state.nodes.values().any(|node| node.name == *to) => Diagnosis::new(
            "node-silent",
            format!("it is pinned to node `{to}`, which is not heard"),
            "bring that node back, or correct `node` in [service.placement]",
        ),
        NoRoom::Pinned { to } => {
            let names = view.state.nodes.values().map(|node| format!("`{}`", node.name)).collect::<Vec<_>>().join(", ");
            Diagnosis::new(
                "no-such-node",
                format!("it is pinned to node `{to}`, and there is none of that name"),
                format!("correct `node` in [service.placement]; there is {names}"),
            )
        }
        NoRoom::Label { key, wanted, .. } => Diagnosis::new(
            "no-such-label",
            format!("no node has the label {key} = `{wanted}` that it wants"),
            "correct `labels` in [service.placement], or give a node that label",
        ),
        NoRoom::Memory { wanted, .. } => {
            Diagnosis::new("no-room", format!("no node has {wanted} of memory to set aside for it"), room)
        }
        NoRoom::Cpu { wanted, .. } => {
            Diagnosis::new("no-room", format!("no node has {wanted} CPUs to set aside for it"), room)
        }
        NoRoom::VolumeElsewhere { .. } | NoRoom::NotHeard => unreachable!("left out above"),
    };
    diagnosis.seen(each)
}

/// Only where its volumes are can it run: what keeps it from there is the cause.
fn no_room_at_home(view: View<'_>, home: &str, refused: &BTreeMap<NodeId, NoRoom>) -> Diagnosis {
    let there = refused.iter().find(|(node, _)| view.state.node_name(**node) == *home).map(|(_, reason)| reason);
    let cause = |reason: &NoRoom| format!("its volumes are on node `{home}`, which cannot take it: {reason}");
    match there {
        Some(NoRoom::NotHeard) | None => Diagnosis::new(
            "node-silent",
            format!("its volumes are on node `{home}`, which is not heard"),
            "bring that node back: no other has what is in them",
        ),
        Some(reason @ (NoRoom::Memory { .. } | NoRoom::Cpu { .. })) => Diagnosis::new(
            "no-room",
            cause(reason),
            format!("lower [service.resources], or stop something else on `{home}`"),
        ),
        Some(reason @ (NoRoom::Pinned { .. } | NoRoom::Label { .. } | NoRoom::VolumeElsewhere { .. })) => {
            let fix = format!("let [service.placement] allow `{home}`: no other node has what is in them");
            Diagnosis::new("volume-elsewhere", cause(reason), fix)
        }
    }
}

fn silent(view: View<'_>, node: NodeId, id: ReplicaId) -> Diagnosis {
    let cause = format!("{} is not heard, so nothing is known of {id}", view.state.node_name(node));
    let mut silent = Diagnosis::new("node-silent", cause, "look at that machine; `orca nodes` says since when");
    silent.replica = Some(id);
    silent
}

pub fn saw_words(saw: &Saw) -> String {
    match saw {
        Saw::Refused => "connection refused".to_owned(),
        Saw::TimedOut => "no answer in time".to_owned(),
        Saw::Status(status) => format!("status {status}"),
        Saw::Exit { code, .. } => format!("exit code {code}"),
        Saw::Error(error) => error.clone(),
    }
}

pub fn phase_word(phase: Phase) -> &'static str {
    match phase {
        Phase::Pending => "pending",
        Phase::Pulling => "pulling",
        Phase::Creating => "being created",
        Phase::Starting => "starting",
        Phase::Ready => "ready",
        Phase::Unready => "unready",
        Phase::BackOff => "backing off",
        Phase::Stopping => "stopping",
        Phase::Gone => "gone",
        Phase::Unknown => "unknown",
    }
}

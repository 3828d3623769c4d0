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

use crate::id::{Generation, NodeId, ReplicaId, ServiceName};
use crate::replica::{Cause, Phase, ReplicaReport, Saw};
use crate::route::RouteKey;
use crate::spec::Service;
use crate::state::{Deployed, Direction, Evidence, Failure, LastRun, Placement, PlacementState, RunEnding};
use crate::time::Timestamp;
use crate::view::View;
use crate::waiting::{NoRoom, Waiting};
pub use replica::replica;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diagnosis {
    pub code: Code,
    /// One sentence, no full stop.
    pub cause: String,
    /// What was seen, most telling first.
    pub evidence: Vec<Evidence>,
    pub fix: Option<String>,
    pub replica: Option<ReplicaId>,
}

/// What is wrong, as a word for programs: `probe-status`, `out-of-memory`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Code {
    // What was asked for, and what takes its time.
    Starting,
    Stopped,
    Removing,
    // What keeps a replica from a node.
    NoNode,
    NoRoom,
    NoSuchNode,
    NoSuchLabel,
    NodeSilent,
    VolumeElsewhere,
    Dependency,
    // What keeps it from starting.
    NoEngine,
    EngineAway,
    ImageMissing,
    ImageDenied,
    RegistryUnreachable,
    PullFailed,
    WrongArchitecture,
    NoSuchCommand,
    SecretMissing,
    PortTaken,
    VolumeBusy,
    DiskFull,
    Refused,
    ModuleInvalid,
    ModuleMissing,
    /// Its node does not do what it was told.
    GoalNotTaken,
    /// A route it has is answered by another service.
    RouteHeld,
    // How it ended.
    Exited,
    CrashLooping,
    OutOfMemory,
    NotAlive,
    RemovedOutside,
    EndedWithEngine,
    ExecFailed,
    MissingLibrary,
    ReadOnly,
    PermissionDenied,
    // Why it is not ready.
    Late,
    ListensOnLoopback,
    ListensElsewhere,
    NotListening,
    ProbeStatus,
    ProbeTimeout,
    ProbeFailing,
    ProbeExit,
    ProbeCommand,
    ProbeGrpc,
    // What is wrong although it serves.
    Errors,
    RolledBack,
    ScheduleFailed,
}

/// Exits in a row that make a replica crash-looping rather than unlucky.
pub const CRASH_LOOP_AFTER: u32 = 3;
/// How long the exit of a replica that serves again is worth telling.
const RESTLESS_FOR: Duration = Duration::from_secs(10 * 60);
/// A node that is heard takes over what it is told in a fraction of this.
const TAKEN_WITHIN: Duration = Duration::from_secs(5);
/// Fewer errors in the last minute may be anybody's mistake.
const ERRORS_MIN: u64 = 5;

impl Diagnosis {
    fn new(code: Code, cause: impl Into<String>, fix: impl Into<String>) -> Diagnosis {
        Diagnosis { code, cause: cause.into(), evidence: Vec::new(), fix: Some(fix.into()), replica: None }
    }

    fn seen(mut self, evidence: impl IntoIterator<Item = String>) -> Diagnosis {
        self.evidence.extend(evidence.into_iter().map(Evidence::Seen));
        self
    }
}

/// What is wrong with this service; nothing if it is as asked.
pub fn why(view: View<'_>, name: &ServiceName, waiting: &[Waiting]) -> Option<Diagnosis> {
    let deployed = view.state.services.get(name)?;
    unready(view, name, waiting)
        .or_else(|| erring(view, name))
        .or_else(|| unrouted(view, name, deployed))
        .or_else(|| unwatched(view, name))
        .or_else(|| last_mishap(view, name, deployed))
        .or_else(|| schedule_failed(name, deployed))
}

/// Why not all that is asked of it is so by now; nothing of what is wrong while it serves.
pub fn unready(view: View<'_>, name: &ServiceName, waiting: &[Waiting]) -> Option<Diagnosis> {
    let deployed = view.state.services.get(name)?;
    if deployed.removal.is_some() {
        if let Some(hands_over) = waiting.iter().find_map(|reason| hands_over(name, reason)) {
            return Some(hands_over);
        }
        let removing = || Diagnosis::new(Code::Removing, "it is being removed", "wait until its replicas are gone");
        return Some(stuck(view, name, deployed).unwrap_or_else(removing));
    }
    if deployed.stopped {
        let start = format!("orca start {name}");
        let stopped = || Diagnosis::new(Code::Stopped, "it was stopped by `orca stop`", start);
        return Some(stuck(view, name, deployed).unwrap_or_else(stopped));
    }
    worst_replica(view, name, deployed)
        .or_else(|| stuck(view, name, deployed))
        .or_else(|| going_back(deployed))
        .or_else(|| waiting.iter().find_map(|reason| waits(view, name, deployed, reason)))
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
        } else if view.inventory.heard(placement.node).is_some() {
            let late = not_taken(view, placement.node, placement.since);
            let severity = if late.is_some() { 8 } else { 1 };
            let mut diagnosis = late.unwrap_or_else(|| replica::under_way(name, id, Phase::Pending, None));
            diagnosis.replica = Some(id);
            found.push((severity, diagnosis));
        }
    }
    found.sort_by_key(|(severity, _)| std::cmp::Reverse(*severity));
    found.into_iter().next().map(|(_, diagnosis)| diagnosis)
}

/// A replica that is to go, and does not: nothing may begin in its place while it holds a volume, and nothing is removed.
fn stuck(view: View<'_>, name: &ServiceName, deployed: &Deployed) -> Option<Diagnosis> {
    view.state.placements_of(name).find_map(|(id, placement)| {
        let mut diagnosis = match placement.state {
            PlacementState::Serve => return None,
            PlacementState::Drain { since, at } => undrained(view, id, since, at)?,
            PlacementState::Stop { erase } => unstopped(view, name, deployed, id, placement, erase)?,
        };
        diagnosis.replica = Some(id);
        Some(diagnosis)
    })
}

/// It is to get no more requests, and some proxy that is heard has not taken that over.
fn undrained(view: View<'_>, id: ReplicaId, since: Generation, at: Timestamp) -> Option<Diagnosis> {
    let mut nodes = view.state.nodes.iter().filter(|(_, node)| !node.dead).map(|(node, _)| *node);
    let mut late = nodes.find_map(|node| {
        let seen = view.inventory.observed(node)?;
        if seen.acknowledged.1 >= since || view.inventory.is_suspect(node, view.now) {
            return None;
        }
        not_taken(view, node, at)
    })?;
    late.cause = format!("{id} is to go, and cannot before every proxy has let go of it: {}", late.cause);
    Some(late)
}

/// It is to stop, and its node cannot stop it, or does not know yet that it is to.
fn unstopped(
    view: View<'_>,
    name: &ServiceName,
    deployed: &Deployed,
    id: ReplicaId,
    placement: &Placement,
    erase: bool,
) -> Option<Diagnosis> {
    if view.inventory.is_suspect(placement.node, view.now) {
        return Some(silent(view, placement.node, id));
    }
    let report = view.inventory.replica(placement.node, id);
    if let Some(report) = report
        && let Some(trouble) = &report.trouble
        // What was wrong with it before it was told to stop does not keep it from that.
        && report.phase == Phase::Stopping
        && trouble.at >= report.since
    {
        let spec = deployed.record_for(placement.revision).map_or(deployed.spec(), |record| &record.spec);
        let mut diagnosis = match &trouble.cause {
            Cause::VolumeBusy { volume, by } if erase => replica::volume_in_use(view, volume, *by),
            // Its words are of a start elsewhere.
            Cause::Refused { reason } => {
                Diagnosis::new(Code::Refused, reason.clone(), "see what its engine's log says; it is tried again")
            }
            cause => replica::caused(view, name, spec, report, cause),
        };
        diagnosis.cause = match erase {
            true => format!("{id} and its volumes cannot be removed: {}", diagnosis.cause),
            false => format!("{id} is to stop, and cannot be stopped: {}", diagnosis.cause),
        };
        diagnosis.evidence.extend(replica::next_try(trouble));
        return Some(diagnosis);
    }
    if report.is_some_and(|report| matches!(report.phase, Phase::Stopping | Phase::Gone)) {
        return None;
    }
    // When it was told is not kept, so that only a fault its node knows of tells this from a moment's delay.
    let fault = view.inventory.observed(placement.node)?.facts.fault.as_ref()?;
    let fault = ledger_fault(view, placement.node, fault);
    Some(Diagnosis {
        cause: format!("{id} is to stop, and its node does not take that over: {}", fault.cause),
        ..fault
    })
}

/// A node that is heard, and has had the time, goes by what it was told before.
fn not_taken(view: View<'_>, node: NodeId, told: Timestamp) -> Option<Diagnosis> {
    let seen = view.inventory.observed(node)?;
    if let Some(fault) = &seen.facts.fault {
        return Some(ledger_fault(view, node, fault));
    }
    let late = view.now.since(told);
    if late < TAKEN_WITHIN {
        return None;
    }
    let name = view.state.node_name(node);
    let cause = format!("{name} has not taken over what it was told {} s ago", late.as_secs());
    Some(Diagnosis::new(Code::GoalNotTaken, cause, format!("the log of `orca server` on {name} says what keeps it")))
}

/// What cannot be written into the ledger is not begun.
fn ledger_fault(view: View<'_>, node: NodeId, fault: &str) -> Diagnosis {
    let name = view.state.node_name(node);
    let cause = format!("{name} begins nothing new, because it cannot write down what it is told");
    let fix = format!("free space on the disk of {name}'s data directory, or put right who may write there");
    Diagnosis::new(Code::GoalNotTaken, cause, fix).seen([fault.to_owned()])
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

/// It serves, and not long ago something went wrong: of an end and an update that was given up, the later one.
fn last_mishap(view: View<'_>, name: &ServiceName, deployed: &Deployed) -> Option<Diagnosis> {
    match (given_up(deployed), restless(view, name, deployed)) {
        (Some((ended, _)), Some((exited, restless))) if exited > ended => Some(restless),
        (Some((_, given_up)), _) => Some(given_up),
        (None, restless) => restless.map(|(_, restless)| restless),
    }
}

/// The last run of one of its schedules did not end well, as far as anybody knows.
fn schedule_failed(name: &ServiceName, deployed: &Deployed) -> Option<Diagnosis> {
    let ended = deployed.schedules.iter().filter_map(|(cron, record)| Some((cron, record.last.as_ref()?)));
    let failed = ended.filter_map(|(cron, last)| match &last.ending {
        RunEnding::Failed { reason } => Some((cron, last, "failed", reason)),
        RunEnding::Unknown { reason } => Some((cron, last, "ended in a way nobody knows", reason)),
        RunEnding::Done | RunEnding::Skipped { .. } => None,
    });
    let (cron, LastRun { due, replica, .. }, how, reason) = failed.max_by_key(|(_, last, ..)| last.due)?;
    let on = replica.map(|replica| format!(" on {replica}")).unwrap_or_default();
    let logs = replica.map_or_else(|| name.to_string(), |replica| format!("{name}/{replica}"));
    let mut diagnosis = Diagnosis::new(
        Code::ScheduleFailed,
        format!("it serves, but the last run of its schedule `{cron}` {how}: {reason}"),
        format!("what it wrote says why: orca logs {logs}"),
    );
    diagnosis.replica = *replica;
    Some(diagnosis.seen([format!("it was due {}{on}", due.to_minute())]))
}

/// The last update did not go well; with when that was over.
fn given_up(deployed: &Deployed) -> Option<(Timestamp, Diagnosis)> {
    let last = deployed.receipts.back()?;
    let failure = last.failure.as_ref()?;
    if failure.asked || last.outcome.is_done() || deployed.rollout.is_some() {
        return None;
    }
    let cause = format!("it serves {}, because {} was given up: {}", deployed.target, last.revision, failure.cause);
    // A first deploy that failed and works after all has nothing to be said against it.
    (deployed.target != last.revision).then(|| (last.ended, rolled_back(cause, failure)))
}

fn rolled_back(cause: String, failure: &Failure) -> Diagnosis {
    Diagnosis {
        code: Code::RolledBack,
        cause,
        evidence: failure.evidence.clone(),
        fix: failure.fix.clone(),
        replica: None,
    }
}

/// All replicas are ready, and what they answer is mostly errors.
fn erring(view: View<'_>, name: &ServiceName) -> Option<Diagnosis> {
    let window = view.recent.get(name)?;
    let spec = view.state.services.get(name)?.spec();
    let asked_of_replicas = |count: u64| count.saturating_sub(window.unserved);
    let (requests, errors) = (asked_of_replicas(window.requests), asked_of_replicas(window.errors));
    (errors >= ERRORS_MIN && errors * 2 >= requests).then(|| {
        let key = if spec.is_module() { "timeout_secs" } else { "response_timeout_secs" };
        Diagnosis::new(
            Code::Errors,
            format!("it is ready, but {errors} of its {requests} requests in the last minute ended in an error (5xx)"),
            format!("its log says why: orca logs {name} --tail 50; a 504 says that it takes longer than `{key}`"),
        )
    })
}

/// What it is removed for does not get ready.
fn hands_over(name: &ServiceName, waiting: &Waiting) -> Option<Diagnosis> {
    let Waiting::ForTaker { route, service } = waiting else { return None };
    let cause = format!("it is being removed, and answers {} until {service} is ready to", route.0);
    let fix = format!(
        "orca why {service}; a deploy with `{}` in the files again keeps it, `orca rm {name}` removes it at once",
        name.service
    );
    Some(Diagnosis::new(Code::Removing, cause, fix))
}

/// A route it has is another's, which had it before.
fn unrouted(view: View<'_>, name: &ServiceName, deployed: &Deployed) -> Option<Diagnosis> {
    if deployed.rollout.is_some() || deployed.wanted() == 0 {
        return None;
    }
    let held = deployed.spec().routes.iter().find_map(|route| {
        let holder = view.state.routes.get(&RouteKey(route.clone())).filter(|holder| *holder != name)?;
        Some((route, holder, view.state.services.get(holder)?))
    });
    let (route, holder, other) = held?;
    if !other.claims(route) {
        let cause = format!("{route} is answered by {holder}, which had it before, until this one is ready");
        return Some(Diagnosis::new(Code::RouteHeld, cause, format!("orca logs {name}")));
    }
    let cause = format!("{route} is answered by {holder}, which had it before and has it still");
    Some(Diagnosis::new(Code::RouteHeld, cause, format!("take it out of {holder} or of {name}, and deploy that")))
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

/// All replicas are ready, and one of them has not been for long because it ended not long ago; with when.
fn restless(view: View<'_>, name: &ServiceName, deployed: &Deployed) -> Option<(Timestamp, Diagnosis)> {
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
    Some((at, diagnosis))
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
    // That it is under way is no reason.
    let found = |report| replica(view, name, spec, id, report).filter(|found| found.code != Code::Starting);
    let diagnosis = report.and_then(|report| found(report).or_else(|| exits(report)));
    let diagnosis = diagnosis.unwrap_or_else(|| {
        let timeout = spec.deploy.ready_timeout.as_secs();
        let cause = format!("it was not ready after {timeout} s");
        // What its node has never taken up has no logs.
        let placement = view.state.placements.get(&id).filter(|_| report.is_none());
        match placement.and_then(|placement| not_taken(view, placement.node, placement.since)) {
            Some(late) => Diagnosis { cause: format!("{cause}: {}", late.cause), ..late },
            None => Diagnosis::new(Code::Late, cause, "look at its logs, or raise `ready_timeout_secs`"),
        }
    });
    let mut evidence = diagnosis.evidence;
    if let Some(report) = report
        && report.phase != Phase::Ready
        && let Some(since) = view.now.since(report.since).as_secs().checked_sub(1).filter(|secs| *secs > 0)
    {
        evidence.push(Evidence::Seen(format!("{id} has been {} for {since} s", phase_word(report.phase))));
    }
    Failure { cause: diagnosis.cause, evidence, fix: diagnosis.fix, asked: false }
}

/// No node could take a replica in time; `refused` says why each of them cannot now.
pub fn no_room(view: View<'_>, refused: Option<&BTreeMap<NodeId, NoRoom>>) -> Failure {
    let diagnosis = match refused {
        Some(refused) => no_room_for(view, refused),
        None => Diagnosis::new(Code::Late, "its replicas were not placed in time", "deploy again"),
    };
    Failure { cause: diagnosis.cause, evidence: diagnosis.evidence, fix: diagnosis.fix, asked: false }
}

fn waits(view: View<'_>, name: &ServiceName, deployed: &Deployed, waiting: &Waiting) -> Option<Diagnosis> {
    match waiting {
        Waiting::ForRoom { refused } => Some(no_room_for(view, refused)),
        Waiting::ForDependency { service } => {
            let other = ServiceName::new(name.project.clone(), service.clone());
            let Some(its) = unready(view, &other, &[]) else {
                let cause = format!("it waits for `{service}`, which it depends on, to be ready");
                return Some(Diagnosis::new(Code::Dependency, cause, format!("orca why {other}")));
            };
            Some(Diagnosis {
                code: Code::Dependency,
                cause: format!("it depends on `{service}`, which is not ready: {}", its.cause),
                evidence: its.evidence,
                fix: its.fix.or_else(|| Some(format!("orca why {other}"))),
                replica: None,
            })
        }
        Waiting::ForNode { node, .. } => Some(Diagnosis::new(
            Code::NodeSilent,
            format!("its volume is on {}, which is not heard", view.state.node_name(*node)),
            "bring the node back",
        )),
        Waiting::ForProxies => {
            // The newest of what changes its tables; what other services change is not looked at.
            let ready = view
                .state
                .placements_of(name)
                .filter_map(|(id, placement)| Some(view.inventory.replica(placement.node, id)?.since));
            let told = ready.chain(deployed.rollout.as_ref().map(|rollout| rollout.started)).max()?;
            let late = view.state.nodes.keys().find_map(|node| {
                let (sent, _) = view.sent.get(node)?;
                let behind = view.inventory.observed(*node)?.acknowledged.0 < *sent;
                (behind && !view.inventory.is_suspect(*node, view.now)).then(|| not_taken(view, *node, told))?
            })?;
            Some(Diagnosis { cause: format!("its proxies are to take over new routes: {}", late.cause), ..late })
        }
        // These are told of by their replicas: `worst_replica`, `stuck`.
        Waiting::ForReady { .. }
        | Waiting::ForDrain { .. }
        | Waiting::ForStop { .. }
        | Waiting::ForTaker { .. }
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
        return Diagnosis::new(Code::NoNode, cause, "bring a node back; `orca nodes` lists them").seen(each);
    };
    let alike = |reason: &NoRoom| std::mem::discriminant(reason) == std::mem::discriminant(first);
    if !reasons.all(alike) {
        let cause = format!("none of {} nodes can take it, each for a reason of its own", refused.len());
        return Diagnosis::new(Code::NoRoom, cause, room).seen(each);
    }
    let diagnosis = match first {
        NoRoom::Pinned { to } if view.state.nodes.values().any(|node| node.name == *to) => Diagnosis::new(
            Code::NodeSilent,
            format!("it is pinned to node `{to}`, which is not heard"),
            "bring that node back, or correct `node` in [service.placement]",
        ),
        NoRoom::Pinned { to } => {
            let names = view.state.nodes.values().map(|node| format!("`{}`", node.name)).collect::<Vec<_>>().join(", ");
            Diagnosis::new(
                Code::NoSuchNode,
                format!("it is pinned to node `{to}`, and there is none of that name"),
                format!("correct `node` in [service.placement]; there is {names}"),
            )
        }
        NoRoom::Label { key, wanted, .. } => Diagnosis::new(
            Code::NoSuchLabel,
            format!("no node has the label {key} = `{wanted}` that it wants"),
            format!(
                "correct `labels` in [service.placement], or start a node with `orca server --label {key}={wanted}`"
            ),
        ),
        NoRoom::Memory { wanted, .. } => {
            Diagnosis::new(Code::NoRoom, format!("no node has {wanted} of memory to set aside for it"), room)
        }
        NoRoom::Cpu { wanted, .. } => {
            Diagnosis::new(Code::NoRoom, format!("no node has {wanted} CPUs to set aside for it"), room)
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
            Code::NodeSilent,
            format!("its volumes are on node `{home}`, which is not heard"),
            "bring that node back: no other has what is in them",
        ),
        Some(reason @ (NoRoom::Memory { .. } | NoRoom::Cpu { .. })) => Diagnosis::new(
            Code::NoRoom,
            cause(reason),
            format!("lower [service.resources], or stop something else on `{home}`"),
        ),
        Some(reason @ (NoRoom::Pinned { .. } | NoRoom::Label { .. } | NoRoom::VolumeElsewhere { .. })) => {
            let fix = format!("let [service.placement] allow `{home}`: no other node has what is in them");
            Diagnosis::new(Code::VolumeElsewhere, cause(reason), fix)
        }
    }
}

fn silent(view: View<'_>, node: NodeId, id: ReplicaId) -> Diagnosis {
    let cause = format!("{} is not heard, so nothing is known of {id}", view.state.node_name(node));
    let mut silent = Diagnosis::new(Code::NodeSilent, cause, "look at that machine; `orca nodes` says since when");
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

//! The cause of any bad state in one sentence, with what was seen and what to do. Deterministic: a function of the
//! same values the rollout decides on, so it cannot say something else than what happened.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use crate::id::{NodeId, ReplicaId, ServiceName};
use crate::plan::View;
use crate::plan::report::{NoRoom, Waiting};
use crate::replica::{Cause, Exit, Phase, ReplicaReport, Saw, Trouble};
use crate::spec::Service;
use crate::state::{Direction, Failure, PlacementState};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diagnosis {
    /// A word for programs: `probe-failing`, `out-of-memory`.
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
/// Lines of a replica's output that are quoted.
const LINES_QUOTED: usize = 5;

/// What is wrong with this service; nothing if it is as asked.
pub fn why(view: View<'_>, name: &ServiceName, waiting: &[Waiting]) -> Option<Diagnosis> {
    let deployed = view.state.services.get(name)?;
    if deployed.removal.is_some() {
        return Some(plain("removing", "it is being removed", "wait until its replicas are gone"));
    }
    if deployed.stopped {
        return Some(plain("stopped", "it was stopped by `orca stop`", &format!("orca start {name}")));
    }
    // The worst replica speaks for the service: one that serves and fails before one that merely starts.
    let mut found: Vec<(u8, Diagnosis)> = Vec::new();
    for (id, placement) in view.state.placements_of(name) {
        if placement.state != PlacementState::Serve {
            continue;
        }
        let spec = deployed.revisions.get(&placement.revision).map_or(deployed.spec(), |record| &record.spec);
        match view.inventory.replica(placement.node, id) {
            Some(report) => {
                if let Some(diagnosis) = replica(name, spec, id, report) {
                    found.push((severity(report), diagnosis));
                }
            }
            None if view.inventory.is_suspect(placement.node, view.now) => {
                found.push((9, silent(view, placement.node, id)));
            }
            None => {}
        }
    }
    found.sort_by_key(|(severity, _)| std::cmp::Reverse(*severity));
    if let Some((severity, diagnosis)) = found.into_iter().next()
        && severity > 0
    {
        return Some(diagnosis);
    }
    // An update that was given up is worth saying even though the old revision serves well.
    let gives_up = match &deployed.rollout {
        Some(rollout) => match &rollout.direction {
            Direction::Back { why } if !why.asked => Some((rollout.to, why)),
            Direction::Back { .. } | Direction::Forward => None,
        },
        None => None,
    };
    if let Some((revision, failure)) = gives_up {
        return Some(Diagnosis {
            code: "rolled-back".to_owned(),
            cause: format!("{revision} was given up: {}", failure.cause),
            evidence: failure.evidence.clone(),
            fix: failure.fix.clone(),
            replica: None,
        });
    }
    for reason in waiting {
        if let Some(diagnosis) = waits(view, name, reason) {
            return Some(diagnosis);
        }
    }
    let last = deployed.receipts.back()?;
    let failure = last.failure.as_ref()?;
    (!failure.asked && !last.outcome.is_done() && deployed.rollout.is_none()).then(|| Diagnosis {
        code: "rolled-back".to_owned(),
        cause: format!("it serves {}, but {} was given up: {}", deployed.target, last.revision, failure.cause),
        evidence: failure.evidence.clone(),
        fix: failure.fix.clone(),
        replica: None,
    })
}

/// The same, as the reason for giving a revision up.
pub fn failure(
    view: View<'_>,
    name: &ServiceName,
    spec: &Service,
    id: ReplicaId,
    report: Option<&ReplicaReport>,
) -> Failure {
    let diagnosis = report.and_then(|report| replica(name, spec, id, report)).unwrap_or_else(|| {
        let timeout = spec.deploy.ready_timeout.as_secs();
        plain("late", &format!("it was not ready after {timeout} s"), "look at its logs, or raise `ready_timeout_secs`")
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
pub fn no_room(view: View<'_>, spec: &Service) -> Failure {
    let mut room = crate::plan::schedule::Room::new(view);
    let name = ServiceName::new(spec.name.clone(), spec.name.clone());
    let diagnosis = match room.place(&name, spec) {
        Ok(_) => plain("late", "its replicas were not placed in time", "deploy again"),
        Err(refused) => no_room_for(view, &refused),
    };
    Failure { cause: diagnosis.cause, evidence: diagnosis.evidence, fix: diagnosis.fix, asked: false }
}

fn plain(code: &str, cause: &str, fix: &str) -> Diagnosis {
    Diagnosis {
        code: code.to_owned(),
        cause: cause.to_owned(),
        evidence: Vec::new(),
        fix: Some(fix.to_owned()),
        replica: None,
    }
}

/// How much worse one replica's state is than another's.
fn severity(report: &ReplicaReport) -> u8 {
    match report.phase {
        Phase::Ready | Phase::Stopping | Phase::Gone => 0,
        Phase::Pending | Phase::Pulling | Phase::Creating | Phase::Starting if report.trouble.is_none() => 1,
        Phase::Pending | Phase::Pulling | Phase::Creating | Phase::Starting => 5,
        Phase::Unready => 6,
        Phase::BackOff => 7,
    }
}

/// What is wrong with one replica.
pub fn replica(name: &ServiceName, spec: &Service, id: ReplicaId, report: &ReplicaReport) -> Option<Diagnosis> {
    let label = format!("{name}/{id}");
    let Some(trouble) = &report.trouble else {
        return match report.phase {
            Phase::Ready | Phase::Stopping | Phase::Gone => None,
            phase => Some(Diagnosis {
                code: "starting".to_owned(),
                cause: format!("{label} is {}", phase_word(phase)),
                evidence: Vec::new(),
                fix: None,
                replica: Some(id),
            }),
        };
    };
    let mut diagnosis = match &trouble.cause {
        Cause::Exited => exited(name, spec, &label, report),
        cause => caused(name, spec, &label, trouble, cause),
    };
    if !matches!(trouble.cause, Cause::Exited)
        && let Some(exit) = &report.last_exit
    {
        quote(&mut diagnosis.evidence, exit);
    }
    diagnosis.replica = Some(id);
    Some(diagnosis)
}

fn caused(name: &ServiceName, spec: &Service, label: &str, trouble: &Trouble, cause: &Cause) -> Diagnosis {
    let (code, cause, evidence, fix): (&str, String, Vec<String>, String) = match cause {
        Cause::NoEngine { reason } => (
            "no-engine",
            "it is a container and no Docker engine answers on its node".to_owned(),
            vec![reason.clone()],
            "install one (Debian: `apt-get install docker.io`) or start it (`systemctl start docker`); `orca doctor` checks"
                .to_owned(),
        ),
        Cause::ImageMissing { image } => (
            "image-missing",
            format!("image {image} does not exist, neither on the node nor in its registry"),
            Vec::new(),
            "correct `image`, or push it; for a private one add [service.registry]".to_owned(),
        ),
        Cause::ImageDenied { image } => (
            "image-denied",
            format!("the registry refuses to give {image} to us"),
            Vec::new(),
            "set username and password in [service.registry], as secrets".to_owned(),
        ),
        Cause::PullFailed { image, reason } => (
            "pull-failed",
            format!("image {image} could not be pulled"),
            vec![reason.clone()],
            "check that the node reaches the registry; it is tried again".to_owned(),
        ),
        Cause::WrongArchitecture { image, has, needs } => (
            "wrong-architecture",
            format!("image {image} is built for {has}, the node is {needs}"),
            Vec::new(),
            format!("build it for {needs} (docker build --platform linux/{needs})"),
        ),
        Cause::NoSuchCommand { command, reason } => (
            "no-such-command",
            format!("`{command}` cannot be run in the image"),
            vec![reason.clone()],
            "correct `command`, or the image's entry point; it must exist and be executable".to_owned(),
        ),
        Cause::SecretMissing { name: secret } => (
            "secret-missing",
            format!("secret {secret} is not set"),
            Vec::new(),
            format!("orca secrets set {secret} --project {}", name.project),
        ),
        Cause::PortTaken { port, by } => (
            "port-taken",
            format!("port {port} of the host is taken"),
            vec![by.clone()],
            "stop what holds it, or use another port".to_owned(),
        ),
        Cause::VolumeBusy { volume, by } => (
            "volume-busy",
            format!("volume {volume} is held by {by}, which is not gone yet"),
            Vec::new(),
            "it starts as soon as the other one is gone".to_owned(),
        ),
        Cause::DiskFull { reason } => (
            "disk-full",
            "the node's disk is full".to_owned(),
            vec![reason.clone()],
            "free space there (`docker system df` shows what images and volumes take)".to_owned(),
        ),
        Cause::Refused { reason } => (
            "refused",
            "the Docker engine refuses to start it".to_owned(),
            vec![reason.clone()],
            "see what it says above; `orca doctor` checks the engine".to_owned(),
        ),
        Cause::ModuleInvalid { reason } => (
            "module-invalid",
            "its module cannot be run".to_owned(),
            vec![reason.clone()],
            "build a component that exports wasi:http/incoming-handler (or wasi:cli/run for schedules)".to_owned(),
        ),
        Cause::ModuleMissing { digest } => (
            "module-missing",
            "the bytes of its module are not on any control node".to_owned(),
            vec![format!("sha256:{digest}")],
            "deploy it again: that uploads them".to_owned(),
        ),
        Cause::NotAlive { check, saw } => (
            "not-alive",
            format!("it was restarted because its liveness probe failed: {check} -> {}", saw_words(saw)),
            Vec::new(),
            "see its logs; if it is merely slow, raise `timeout_secs` or `failure_threshold`".to_owned(),
        ),
        Cause::ProbeFailing { check, saw, tries, for_ms, listening } => {
            return probe_failing(spec, label, check, saw, (*tries, *for_ms), listening.as_deref());
        }
        Cause::Exited => unreachable!("told apart by the caller"),
    };
    let mut evidence = evidence;
    if let Some(at) = trouble.retry_at {
        let secs = at.since(trouble.at).as_secs();
        if secs > 0 {
            evidence.push(format!("tried again every {secs} s or so"));
        }
    }
    Diagnosis { code: code.to_owned(), cause, evidence, fix: Some(fix), replica: None }
}

fn probe_failing(
    spec: &Service,
    label: &str,
    check: &str,
    saw: &Saw,
    (tries, for_ms): (u32, u64),
    listening: Option<&[std::net::SocketAddr]>,
) -> Diagnosis {
    let seconds = for_ms as f64 / 1000.0;
    let mut evidence = vec![format!("{check} -> {}, {tries} tries in {seconds:.1} s", saw_words(saw))];
    let port = spec.port.unwrap_or(0);
    let unreachable = matches!(saw, Saw::Refused | Saw::TimedOut);
    let (code, cause, fix) = match listening {
        Some(sockets) if unreachable => {
            let on_port: Vec<_> = sockets.iter().filter(|socket| socket.port() == port).collect();
            if !on_port.is_empty() && on_port.iter().all(|socket| socket.ip().is_loopback()) {
                (
                    "listens-on-loopback",
                    format!("the process listens on {}; the proxy reaches it on the container's address", on_port[0]),
                    "bind to 0.0.0.0, or the port of all addresses".to_owned(),
                )
            } else if let ([], [first, ..]) = (on_port.as_slice(), sockets) {
                let others = sockets.iter().map(|s| s.port().to_string()).collect::<Vec<_>>().join(", ");
                (
                    "listens-elsewhere",
                    format!("the process listens on port {others}, not on {port}"),
                    format!("set `port = {}`, or make it listen on {port}", first.port()),
                )
            } else if sockets.is_empty() {
                (
                    "not-listening",
                    format!("{label} runs, but listens on no port yet; {port} is expected"),
                    "see its logs: it may be waiting for something; a slow start wants `ready_timeout_secs`".to_owned(),
                )
            } else {
                (
                    "probe-failing",
                    format!("{label} listens on {port} and does not answer"),
                    "see its logs".to_owned(),
                )
            }
        }
        Some(_) | None => match saw {
            Saw::Status(status) => (
                "probe-status",
                format!("its readiness probe gets status {status}: {check}"),
                "make that path answer 200 to 399 when it is ready, or give another in [service.readiness]".to_owned(),
            ),
            Saw::Exit { code, .. } => (
                "probe-exit",
                format!("its readiness probe's command exits with {code}: {check}"),
                "run it with `orca exec` to see; it must exit with 0 when ready".to_owned(),
            ),
            Saw::TimedOut => (
                "probe-timeout",
                format!("its readiness probe gets no answer in time: {check}"),
                "see its logs; if it is merely slow, raise `timeout_secs`".to_owned(),
            ),
            Saw::Refused | Saw::Error(_) => (
                "probe-failing",
                format!("its readiness probe fails: {check} -> {}", saw_words(saw)),
                "see its logs".to_owned(),
            ),
        },
    };
    if let Saw::Exit { output, .. } = saw
        && !output.is_empty()
    {
        evidence.push(format!("it printed: {output}"));
    }
    Diagnosis { code: code.to_owned(), cause, evidence, fix: Some(fix), replica: None }
}

fn exited(name: &ServiceName, spec: &Service, label: &str, report: &ReplicaReport) -> Diagnosis {
    let Some(exit) = &report.last_exit else {
        return plain("exited", &format!("{label} has exited"), &format!("orca logs {name}"));
    };
    let loops = report.failures >= CRASH_LOOP_AFTER;
    let seconds = exit.after_ms as f64 / 1000.0;
    let (code, mut cause, fix) = if exit.out_of_memory {
        let limit = spec.resources.memory.map_or_else(|| "the node's memory".to_owned(), |m| format!("its limit of {m}"));
        (
            "out-of-memory",
            format!("the kernel killed it for using more than {limit}"),
            "raise `memory` in [service.resources], or make it use less".to_owned(),
        )
    } else {
        let how = exit_words(exit.code);
        let fix = match exit.code {
            0 => "a service must go on running; if it is a job, give it a schedule".to_owned(),
            126 => "the command is not executable: check its mode and the image's architecture".to_owned(),
            127 => "the command was not found in the image".to_owned(),
            137 => "something killed it: look for who, or for memory".to_owned(),
            _ => format!("the reason is in its last lines; more with `orca logs {name}`"),
        };
        let code = if loops { "crash-looping" } else { "exited" };
        (code, format!("it exits {how} after {seconds:.1} s"), fix)
    };
    if loops {
        let _ = write!(cause, ", {} times in a row (crash-looping)", report.failures);
    }
    let mut evidence = Vec::new();
    quote(&mut evidence, exit);
    Diagnosis { code: code.to_owned(), cause, evidence, fix: Some(fix), replica: None }
}

fn quote(evidence: &mut Vec<String>, exit: &Exit) {
    let skipped = exit.last_lines.len().saturating_sub(LINES_QUOTED);
    evidence.extend(exit.last_lines.iter().skip(skipped).map(|line| format!("log: {line}")));
    if exit.last_lines.is_empty() {
        evidence.push("it wrote nothing".to_owned());
    }
}

fn waits(view: View<'_>, name: &ServiceName, waiting: &Waiting) -> Option<Diagnosis> {
    match waiting {
        Waiting::ForRoom { refused } => Some(no_room_for(view, refused)),
        Waiting::ForDependency { service } => {
            let other = ServiceName::new(name.project.clone(), service.clone());
            let its = why(view, &other, &[]);
            let mut evidence = Vec::new();
            if let Some(its) = &its {
                evidence.push(format!("{service}: {}", its.cause));
                evidence.extend(its.evidence.iter().cloned());
            }
            Some(Diagnosis {
                code: "dependency".to_owned(),
                cause: format!("it depends on `{service}`, which is not ready"),
                evidence,
                fix: its.and_then(|its| its.fix).or_else(|| Some(format!("orca why {other}"))),
                replica: None,
            })
        }
        Waiting::ForNode { node, .. } => Some(Diagnosis {
            code: "node-silent".to_owned(),
            cause: format!("its volume is on {}, which is not heard", node_name(view, *node)),
            evidence: Vec::new(),
            fix: Some("bring the node back".to_owned()),
            replica: None,
        }),
        Waiting::ForReady { .. }
        | Waiting::ForDrain { .. }
        | Waiting::ForStop { .. }
        | Waiting::ForProxies
        | Waiting::ForPromotion { .. } => None,
    }
}

fn no_room_for(view: View<'_>, refused: &BTreeMap<NodeId, NoRoom>) -> Diagnosis {
    let evidence: Vec<String> =
        refused.iter().map(|(node, reason)| format!("{}: {reason}", node_name(view, *node))).collect();
    let cause = match evidence.as_slice() {
        [] => "there is no node it could run on".to_owned(),
        [only] => format!("no node has room for it: {only}"),
        all => format!("none of {} nodes has room for it", all.len()),
    };
    let fix = match refused.values().next() {
        Some(NoRoom::Memory { .. } | NoRoom::Cpu { .. }) => "lower [service.resources], stop something, or add a node",
        Some(NoRoom::Pinned { .. } | NoRoom::Label { .. }) => "correct [service.placement], or the node's labels",
        Some(NoRoom::NotHeard) | None => "bring a node back; `orca nodes` lists them",
    };
    Diagnosis { code: "no-room".to_owned(), cause, evidence, fix: Some(fix.to_owned()), replica: None }
}

fn silent(view: View<'_>, node: NodeId, id: ReplicaId) -> Diagnosis {
    Diagnosis {
        code: "node-silent".to_owned(),
        cause: format!("{} is not heard, so nothing is known of {id}", node_name(view, node)),
        evidence: Vec::new(),
        fix: Some("look at that machine; `orca nodes` says since when".to_owned()),
        replica: Some(id),
    }
}

fn node_name(view: View<'_>, node: NodeId) -> String {
    view.state.nodes.get(&node).map_or_else(|| node.to_string(), |record| record.name.clone())
}

fn exit_words(code: i64) -> String {
    match code {
        129..=192 => format!("by signal {} (code {code})", signal_name(code - 128)),
        code => format!("with code {code}"),
    }
}

fn signal_name(signal: i64) -> String {
    match signal {
        1 => "SIGHUP".to_owned(),
        2 => "SIGINT".to_owned(),
        4 => "SIGILL".to_owned(),
        6 => "SIGABRT".to_owned(),
        7 => "SIGBUS".to_owned(),
        8 => "SIGFPE".to_owned(),
        9 => "SIGKILL".to_owned(),
        11 => "SIGSEGV".to_owned(),
        13 => "SIGPIPE".to_owned(),
        15 => "SIGTERM".to_owned(),
        other => other.to_string(),
    }
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
    }
}

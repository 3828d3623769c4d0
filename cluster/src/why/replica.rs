//! What is wrong with one replica: every [`Cause`] as a sentence, and how an exit is told.

use super::output::telling;
use super::{CRASH_LOOP_AFTER, Code, Diagnosis, Evidence, phase_word, probe, saw_words};
use crate::id::{ReplicaId, ServiceName};
use crate::replica::{Cause, Ending, Engine, Exit, Phase, Pulling, ReplicaReport, Saw, Trouble};
use crate::spec::Service;
use crate::view::View;

/// Lines of a replica's output that are quoted.
const LINES_QUOTED: usize = 5;
/// A start that has outlived the one before by so much does not end for the same reason.
const OUTLIVED_MS: u64 = 5_000;

/// What is wrong with it; nothing if it is ready, or on its way out.
pub fn replica(
    view: View<'_>,
    name: &ServiceName,
    spec: &Service,
    id: ReplicaId,
    report: &ReplicaReport,
) -> Option<Diagnosis> {
    if report.phase == Phase::Ready && report.on_trial {
        // By the probe it had before it is ready.
        let trouble = report.trouble.as_ref()?;
        let mut diagnosis = caused(view, name, spec, report, &trouble.cause);
        diagnosis.cause = format!("it serves, but does not pass a probe that was changed: {}", diagnosis.cause);
        diagnosis.replica = Some(id);
        return Some(diagnosis);
    }
    if matches!(report.phase, Phase::Ready | Phase::Stopping | Phase::Gone) {
        return None;
    }
    let Some(trouble) = &report.trouble else {
        return Some(under_way(name, id, report.phase, report.pulling));
    };
    let mut diagnosis = match (&trouble.cause, &report.last_exit) {
        // Of a container that answers, and of one that is asked by way of its engine, it says nothing.
        (Cause::ProbeFailing { saw: saw @ (Saw::Refused | Saw::TimedOut), .. }, _)
            if report.address.is_some()
                && let Some(away) = engine_away(view, id) =>
        {
            let cause = format!("{}, nor does its container: it has most likely ended with Docker", away.cause);
            Diagnosis { cause, ..away }.seen([format!("its probe: {}", saw_words(saw))])
        }
        (Cause::Exited | Cause::Vanished, Some(exit)) => exited(name, spec, id, report, exit),
        (Cause::ProbeFailing { for_ms, .. }, Some(exit)) if ends_again(report, exit, *for_ms) => {
            exited(name, spec, id, report, exit)
        }
        (cause, _) => caused(view, name, spec, report, cause),
    };
    diagnosis.evidence.extend(next_try(trouble));
    diagnosis.replica = Some(id);
    Some(diagnosis)
}

/// Nothing is wrong with it; it is not there yet.
pub fn under_way(name: &ServiceName, id: ReplicaId, phase: Phase, pulling: Option<Pulling>) -> Diagnosis {
    let doing = pulling.map_or_else(|| phase_word(phase).to_owned(), |pulling| pulling.to_string());
    Diagnosis {
        code: Code::Starting,
        cause: format!("{name}/{id} is {doing}"),
        evidence: Vec::new(),
        fix: None,
        replica: Some(id),
    }
}

/// The engine that a container is run by does not answer.
pub fn engine_away(view: View<'_>, id: ReplicaId) -> Option<Diagnosis> {
    let node = view.state.placements.get(&id)?.node;
    let Engine::Unreachable { reason } = &view.inventory.observed(node)?.facts.containers else { return None };
    let node = view.state.node_name(node);
    let cause = format!("Docker on {node} does not answer");
    let mut diagnosis = Diagnosis::new(Code::EngineAway, cause, format!("on {node}: systemctl start docker"));
    diagnosis.replica = Some(id);
    Some(diagnosis.seen([reason.clone()]))
}

/// A replica that exits and is started again is not ready in between; that is not what is wrong with it.
fn ends_again(report: &ReplicaReport, exit: &Exit, probed_ms: u64) -> bool {
    report.failures > 0 && report.phase == Phase::Starting && probed_ms < exit.after_ms + OUTLIVED_MS
}

pub fn next_try(trouble: &Trouble) -> Option<Evidence> {
    let delay = trouble.retry_at?.since(trouble.at).as_secs();
    (delay > 0).then(|| Evidence::Seen(format!("tried again after {delay} s")))
}

pub fn caused(view: View<'_>, name: &ServiceName, spec: &Service, report: &ReplicaReport, cause: &Cause) -> Diagnosis {
    match cause {
        Cause::NoEngine { reason } => Diagnosis::new(
            Code::NoEngine,
            "it is a container, and no Docker engine answers on its node",
            "install one (Debian: `apt-get install docker.io`) or start it (`systemctl start docker`); `orca doctor` checks",
        )
        .seen([reason.clone()]),
        Cause::ImageMissing { image, present: true } => Diagnosis::new(
            Code::ImageMissing,
            format!("its registry has no image {image} that could be pulled; the node's own copy is unchanged"),
            keeps_copy(name),
        ),
        Cause::ImageMissing { image, present: false } => Diagnosis::new(
            Code::ImageMissing,
            format!("image {image} does not exist, neither on the node nor in its registry"),
            "correct `image`, or push it; for a private one add [service.registry]",
        ),
        Cause::ImageDenied { image } => Diagnosis::new(
            Code::ImageDenied,
            match spec.registry {
                Some(_) => format!("the registry refuses to give {image} with the credentials in [service.registry]"),
                None => format!("the registry gives {image} only to those who log in"),
            },
            match spec.registry {
                Some(_) => "correct them, and see that the account may read that image",
                None => "set username and password in [service.registry], the password as a secret",
            },
        ),
        Cause::PullFailed { image, reason, present } => pull_failed(name, image, reason, *present),
        Cause::WrongArchitecture { image, has, needs } => Diagnosis::new(
            Code::WrongArchitecture,
            format!("image {image} is built for {has}, and the node is {needs}"),
            format!("build it for {needs} (docker build --platform linux/{needs})"),
        ),
        Cause::NoSuchCommand { command, reason } => Diagnosis::new(
            Code::NoSuchCommand,
            format!("`{command}` cannot be run: {}", reason.split(';').next().unwrap_or(reason)),
            "correct `command`, or the image's entry point; it must exist and be executable",
        )
        .seen(reason.split_once("; ").map(|(_, more)| more.to_owned())),
        Cause::SecretMissing { name: secret } => Diagnosis::new(
            Code::SecretMissing,
            format!("secret {secret}, which it needs, is not set"),
            format!("orca secrets set {secret} --project {}", name.project),
        ),
        Cause::PortTaken { port, by } => Diagnosis::new(
            Code::PortTaken,
            format!("port {port} of the host is taken by {by}"),
            "stop what holds it, or use another port",
        ),
        Cause::VolumeBusy { volume, by } => {
            Diagnosis::new(
                Code::VolumeBusy,
                format!("volume {volume} is held by {}, and only one replica may write to it", holder(view, *by)),
                "it starts as soon as the other one is gone; two services that shall run together need two volumes",
            )
        }
        Cause::DiskFull { reason } => Diagnosis::new(
            Code::DiskFull,
            "the node's disk is full",
            "free space there (`docker system df` shows what images and volumes take)",
        )
        .seen([reason.clone()]),
        Cause::Refused { reason } => Diagnosis::new(
            Code::Refused,
            format!("it cannot be started: {reason}"),
            "change what it asks for; if that is right, `orca doctor` checks the engine",
        ),
        Cause::Unreadable { container, reason } => Diagnosis::new(
            Code::Refused,
            "it is not known whether it runs: the engine cannot look into its container",
            format!("the engine is asked again and again; if it stays so, on the node: docker rm --force {container}"),
        )
        .seen([reason.clone()]),
        Cause::ModuleInvalid { reason } => {
            let (what, fix) = reason.split_once("; ").unwrap_or_else(|| (reason, module_fix(reason)));
            // What it consists of comes after; names of interfaces have a colon without a space.
            let (what, details) = what.split_once(": ").map_or((what, None), |(what, more)| (what, Some(more)));
            Diagnosis::new(Code::ModuleInvalid, format!("its module cannot be run: {what}"), fix)
                .seen(details.map(str::to_owned))
        }
        Cause::ModuleMissing { digest } => Diagnosis::new(
            Code::ModuleMissing,
            "the bytes of its module are neither on its node nor on a control node",
            "deploy it again from its files: that uploads them",
        )
        .seen([format!("sha256:{digest}")]),
        Cause::NotAlive { check, saw } => not_alive(check, &saw_words(saw), ""),
        Cause::Exited => Diagnosis::new(Code::Exited, "its process has ended", format!("orca logs {name}")),
        Cause::Vanished => removed(name),
        Cause::ProbeFailing { purpose, check, saw, tries, for_ms, listening } => {
            let seen = probe::Seen {
                purpose: *purpose,
                check,
                saw,
                tries: *tries,
                for_ms: *for_ms,
                listening: listening.as_deref(),
                unready: report.phase == Phase::Unready,
            };
            probe::failing(spec, seen)
        }
    }
}

/// A volume that is to be erased, and that a container still has.
pub fn volume_in_use(view: View<'_>, volume: &str, by: ReplicaId) -> Diagnosis {
    let holder = holder(view, by);
    let cause = format!("volume {volume} is in use by {holder}");
    let fix = match view.state.placements.get(&by) {
        Some(placement) => format!("orca stop {}, if what is in the volume may go", placement.service),
        None => "remove its container, if what is in the volume may go".to_owned(),
    };
    Diagnosis::new(Code::VolumeBusy, cause, fix)
}

fn holder(view: View<'_>, id: ReplicaId) -> String {
    match view.state.placements.get(&id) {
        Some(placement) => format!("{}/{id}", placement.service),
        None => id.to_string(),
    }
}

/// Of an image that was to be pulled anew and could not be, and is there.
fn keeps_copy(name: &ServiceName) -> String {
    format!("to start what the node has, or what was built there: orca restart {name}")
}

fn module_fix(reason: &str) -> &'static str {
    if reason.contains("imports") {
        "build it without that import: a module is offered WASI 0.2 and wasi:http"
    } else if reason.contains("compile") {
        "build it again: the file is damaged, or made for a newer version of the component model"
    } else {
        "build a component that exports wasi:http/incoming-handler (or wasi:cli/run for schedules)"
    }
}

/// A registry that cannot be reached is told from one that answers something else.
fn pull_failed(name: &ServiceName, image: &str, reason: &str, present: bool) -> Diagnosis {
    const UNREACHABLE: [&str; 8] = [
        "connection refused",
        "no such host",
        "i/o timeout",
        "no route to host",
        "network is unreachable",
        "connection reset",
        "name resolution",
        "Client.Timeout",
    ];
    let host = image.split_once('/').map(|(host, _)| host).filter(|host| host.contains(['.', ':']));
    let host = host.unwrap_or("docker.io");
    if present {
        let is_away = UNREACHABLE.iter().any(|words| reason.contains(words));
        let (code, how) = match is_away {
            true => {
                (Code::RegistryUnreachable, format!("the node cannot reach the registry {host} to pull {image} again"))
            }
            false => (Code::PullFailed, format!("image {image} could not be pulled again")),
        };
        let cause = format!("{how}; the node's own copy is unchanged");
        return Diagnosis::new(code, cause, keeps_copy(name)).seen([reason.to_owned()]);
    }
    if UNREACHABLE.iter().any(|words| reason.contains(words)) {
        return Diagnosis::new(
            Code::RegistryUnreachable,
            format!("the node cannot reach the registry {host}, and does not have image {image}"),
            "check the registry's name, and the node's network and DNS; it is tried again",
        )
        .seen([reason.to_owned()]);
    }
    Diagnosis::new(
        Code::PullFailed,
        format!("image {image} could not be pulled: {reason}"),
        format!("see what {host} says; it is tried again"),
    )
}

fn not_alive(check: &str, saw: &str, times: &str) -> Diagnosis {
    Diagnosis::new(
        Code::NotAlive,
        format!("its liveness probe failed, so it was killed and started again{times}: {check} -> {saw}"),
        "see its logs for what it hangs on; if it is merely slow, raise `timeout_secs` or `failure_threshold`",
    )
}

fn removed(name: &ServiceName) -> Diagnosis {
    Diagnosis::new(
        Code::RemovedOutside,
        "somebody other than Orca removed its container",
        format!("find who runs `docker rm` or a clean-up on the node; to stop it for good: orca stop {name}"),
    )
}

fn ended_with_engine() -> Diagnosis {
    Diagnosis::new(
        Code::EndedWithEngine,
        "it ended when Docker on its node was stopped or restarted",
        "nothing, if that was meant; with `\"live-restore\": true` in /etc/docker/daemon.json containers run on without Docker",
    )
}

/// How it ended, and why, as far as that is known.
pub fn exited(name: &ServiceName, spec: &Service, id: ReplicaId, report: &ReplicaReport, exit: &Exit) -> Diagnosis {
    let times = match report.failures {
        failures if failures >= CRASH_LOOP_AFTER => format!(", {failures} times in a row (crash-looping)"),
        _ => String::new(),
    };
    let mut diagnosis = match &exit.ending {
        Ending::Removed => removed(name),
        Ending::NotAlive { check, saw } => not_alive(check, &saw_words(saw), &times),
        Ending::WithEngine => ended_with_engine(),
        Ending::Own => ended(name, spec, exit, &times),
    };
    if !matches!(exit.ending, Ending::Removed | Ending::WithEngine) {
        quote(&mut diagnosis.evidence, exit);
    }
    diagnosis.replica = Some(id);
    diagnosis
}

/// By itself, by a signal or for its memory; `times` says how often in a row, if that is a loop.
fn ended(name: &ServiceName, spec: &Service, exit: &Exit, times: &str) -> Diagnosis {
    if exit.out_of_memory {
        let (limit, fix) = match spec.resources.memory {
            Some(limit) => (
                format!("its limit of {limit} of memory"),
                "raise `memory` in [service.resources], or make it use less",
            ),
            None => (
                "its node has left".to_owned(),
                "set `memory` in [service.resources], so that room is set aside for it, or make it use less",
            ),
        };
        return Diagnosis::new(
            Code::OutOfMemory,
            format!("the kernel killed it for using more than {limit}{times}"),
            fix,
        );
    }
    let loops = !times.is_empty();
    let code = if loops { Code::CrashLooping } else { Code::Exited };
    let how = match (signal_name(exit.code), loops) {
        (Some(signal), true) => format!("it is killed by {signal} (code {})", exit.code),
        (Some(signal), false) => format!("it was killed by {signal} (code {})", exit.code),
        (None, true) => format!("it exits with code {}", exit.code),
        (None, false) => format!("it exited with code {}", exit.code),
    };
    let how = format!("{how} after {:.1} s{times}", exit.after_ms as f64 / 1000.0);
    if exit.code == 0 {
        let fix = "let its command stay in the foreground; for a job that ends, use a module with a schedule";
        return Diagnosis::new(code, format!("{how}: it has ended well, but a service must go on running"), fix);
    }
    if let Some(telling) = telling(&exit.last_lines) {
        return Diagnosis::new(telling.code, format!("{how}: {}", telling.what), telling.fix);
    }
    let fix = match exit.code {
        126 => "the command is not executable: check its mode and the image's architecture".to_owned(),
        127 => "a command it ran was not found: see its last lines, and what the image has".to_owned(),
        137 => {
            "something on the node kills it, and not for its memory: look for who (`docker events`, `journalctl -k`)"
                .to_owned()
        }
        132 | 134..=136 | 139 => {
            format!("the program has crashed, which is a fault in it or in how it was built; `orca logs {name}`")
        }
        143 => "something on the node tells it to end: look for who (`docker events`)".to_owned(),
        _ if exit.last_lines.is_empty() => {
            format!("let it write why before it ends; what it wrote in earlier runs: orca logs {name}")
        }
        _ => format!("the reason is in its last lines; more with `orca logs {name}`"),
    };
    Diagnosis::new(code, how, fix)
}

fn quote(evidence: &mut Vec<Evidence>, exit: &Exit) {
    let skipped = exit.last_lines.len().saturating_sub(LINES_QUOTED);
    evidence.extend(exit.last_lines.iter().skip(skipped).cloned().map(Evidence::Printed));
    if exit.last_lines.is_empty() {
        evidence.push(Evidence::Seen("it wrote nothing".to_owned()));
    }
}

/// Of the signal that ended a process with this exit code, as shells and container engines write it.
fn signal_name(code: i64) -> Option<String> {
    let name = match code - 128 {
        1 => "SIGHUP",
        2 => "SIGINT",
        3 => "SIGQUIT",
        4 => "SIGILL",
        5 => "SIGTRAP",
        6 => "SIGABRT",
        7 => "SIGBUS",
        8 => "SIGFPE",
        9 => "SIGKILL",
        11 => "SIGSEGV",
        13 => "SIGPIPE",
        15 => "SIGTERM",
        other @ 10..=64 => return Some(format!("signal {other}")),
        _ => return None,
    };
    Some(name.to_owned())
}

//! A probe that does not pass: what was asked, what came back, and what the process listens on together give
//! the cause.

use std::net::SocketAddr;

use super::{Code, Diagnosis, Evidence, saw_words};
use crate::replica::{Purpose, Saw};
use crate::spec::{Check, Probe, Service};

/// What the node saw of a probe.
#[derive(Debug, Clone, Copy)]
pub struct Seen<'a> {
    pub purpose: Purpose,
    pub check: &'a str,
    pub saw: &'a Saw,
    pub tries: u32,
    pub for_ms: u64,
    pub listening: Option<&'a [SocketAddr]>,
    /// It had been ready before.
    pub unready: bool,
}

impl Seen<'_> {
    /// What people call the probe, and where they wrote it.
    fn probe(&self) -> &'static str {
        match self.purpose {
            Purpose::Readiness => "readiness probe",
            Purpose::Liveness => "liveness probe",
        }
    }

    fn table(&self) -> &'static str {
        match self.purpose {
            Purpose::Readiness => "[service.readiness]",
            Purpose::Liveness => "[service.liveness]",
        }
    }

    /// What it is that a passing probe says of the process.
    fn good(&self) -> &'static str {
        match self.purpose {
            Purpose::Readiness => "ready",
            Purpose::Liveness => "alive",
        }
    }
}

pub fn failing(spec: &Service, seen: Seen<'_>) -> Diagnosis {
    let Seen { check, saw, tries, for_ms, .. } = seen;
    let span = format!("{:.1} s", for_ms as f64 / 1000.0);
    let probe = match seen.purpose {
        Purpose::Readiness => spec.readiness.as_ref(),
        Purpose::Liveness => spec.liveness.as_ref(),
    };
    let mut diagnosis = match probe {
        Some(Probe { check: Check::Exec(_), timeout, .. }) => command(seen, timeout.as_secs()),
        Some(Probe { check: Check::Http(path), timeout, .. }) => {
            socket(spec, seen).unwrap_or_else(|| http(seen, path, timeout.as_secs()))
        }
        Some(Probe { check: Check::Grpc, .. }) => socket(spec, seen).unwrap_or_else(|| grpc(seen)),
        Some(Probe { check: Check::Tcp, .. }) | None => socket(spec, seen).unwrap_or_else(|| tcp(seen)),
    };
    if seen.unready {
        diagnosis.cause = format!("it was ready, and is not any more: {}", diagnosis.cause);
    }
    let times = if tries == 1 { "1 try".to_owned() } else { format!("{tries} tries") };
    let asked = format!("{check} -> {}, {times} in {span}", saw_words(saw));
    diagnosis.evidence.insert(0, Evidence::Seen(asked));
    if let Saw::Exit { output, .. } = saw
        && !output.is_empty()
    {
        diagnosis.evidence.push(Evidence::Seen(format!("it printed: {output}")));
    }
    diagnosis
}

/// No connection, because the process does not listen where it is looked for.
fn socket(spec: &Service, seen: Seen<'_>) -> Option<Diagnosis> {
    if !matches!(seen.saw, Saw::Refused | Saw::TimedOut) {
        return None;
    }
    let (port, sockets) = (spec.port?, seen.listening?);
    let on_port: Vec<&SocketAddr> = sockets.iter().filter(|socket| socket.port() == port).collect();
    if let Some(first) = on_port.first() {
        return on_port.iter().all(|socket| socket.ip().is_loopback()).then(|| {
            Diagnosis::new(
                Code::ListensOnLoopback,
                format!("the process listens on {first}; the proxy reaches it on the container's address"),
                format!("bind to 0.0.0.0:{port}, or to [::]:{port}, instead"),
            )
        });
    }
    let Some(other) = sockets.first() else {
        return Some(Diagnosis::new(
            Code::NotListening,
            format!("the process runs, but listens on no port; {port} is expected"),
            "see its logs: it may be waiting for something; a slow start wants a larger `ready_timeout_secs`",
        ));
    };
    let mut ports: Vec<u16> = sockets.iter().map(SocketAddr::port).collect();
    ports.dedup();
    let ports = ports.iter().map(u16::to_string).collect::<Vec<_>>().join(", ");
    Some(Diagnosis::new(
        Code::ListensElsewhere,
        format!("the process listens on port {ports}, not on {port}"),
        format!("set `port = {}`, or make it listen on {port}", other.port()),
    ))
}

fn http(seen: Seen<'_>, path: &str, timeout: u64) -> Diagnosis {
    let Seen { check, saw, .. } = seen;
    let (probe, table, good) = (seen.probe(), seen.table(), seen.good());
    match saw {
        Saw::Status(404) => Diagnosis::new(
            Code::ProbeStatus,
            format!("its {probe} asks for {path}, which it answers with 404: there is no such path"),
            format!("correct the path in {table} or `health`, or make it answer there with 200 when it is {good}"),
        ),
        Saw::Status(status @ (401 | 403)) => Diagnosis::new(
            Code::ProbeStatus,
            format!("its {probe} is refused with status {status}: {check} needs a login"),
            "give a path that answers without one",
        ),
        Saw::Status(status) => Diagnosis::new(
            Code::ProbeStatus,
            format!("its {probe} gets status {status}: {check}"),
            format!("see its logs for why it is not {good}; it must answer 200 to 399 when it is"),
        ),
        Saw::TimedOut => Diagnosis::new(
            Code::ProbeTimeout,
            format!("it takes connections, but gives no answer to {check} within {timeout} s"),
            format!("see its logs for what it hangs on; if it is merely slow, raise `timeout_secs` in {table}"),
        ),
        Saw::Refused | Saw::Exit { .. } | Saw::Error(_) => tcp(seen),
    }
}

fn grpc(seen: Seen<'_>) -> Diagnosis {
    let cause = format!("its gRPC health check fails: {}", saw_words(seen.saw));
    Diagnosis::new(
        Code::ProbeGrpc,
        cause,
        format!("serve grpc.health.v1.Health on that port, or use `path` or `tcp` in {}", seen.table()),
    )
}

fn tcp(seen: Seen<'_>) -> Diagnosis {
    let cause = format!("its {} fails: {} -> {}", seen.probe(), seen.check, saw_words(seen.saw));
    Diagnosis::new(Code::ProbeFailing, cause, "see its logs for why it does not answer")
}

fn command(seen: Seen<'_>, timeout: u64) -> Diagnosis {
    let Seen { check, saw, .. } = seen;
    let (probe, table, good) = (seen.probe(), seen.table(), seen.good());
    match saw {
        Saw::TimedOut => Diagnosis::new(
            Code::ProbeTimeout,
            format!("its {probe}'s command does not end within {timeout} s: {check}"),
            format!("raise `timeout_secs` in {table}, or let the command give up earlier"),
        ),
        Saw::Exit { code, .. } => Diagnosis::new(
            Code::ProbeExit,
            format!("its {probe}'s command exits with {code}: {check}"),
            format!("run it with `orca exec` to see; it must exit with 0 when {good}"),
        ),
        Saw::Refused | Saw::Status(_) | Saw::Error(_) => Diagnosis::new(
            Code::ProbeCommand,
            format!("its {probe}'s command cannot be run in the container: {}", saw_words(saw)),
            format!("correct `exec` in {table}: a program that is in the image, and its arguments"),
        ),
    }
}

//! When a probe's result changes anything, and when the next one is due.

use std::time::Duration;

use crate::replica::Saw;
use crate::spec::{Check, Probe};
use crate::time::Timestamp;

/// Until it first passes, a readiness probe is repeated after this long, then half as long again each time, but
/// never more rarely than its interval or this limit: a service that is ready should get traffic at once.
const FIRST_RETRY: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(1);

/// One probe of one running replica.
#[derive(Debug, Clone)]
pub struct Health {
    pub probe: Probe,
    started: Timestamp,
    pub passed_once: bool,
    /// It took the place of another probe while the replica was ready, and has not passed yet: a question that
    /// nobody has ever answered well costs nothing that serves.
    pub on_trial: bool,
    passing: u32,
    failing: u32,
    /// Failures in a row, and since when.
    pub tries: u32,
    pub failing_since: Option<Timestamp>,
    pub last: Option<Saw>,
    /// None while one is under way.
    pub due: Option<Timestamp>,
    retry: Duration,
}

/// What a result means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Passed,
    Failed,
    /// Not often enough yet.
    Open,
}

impl Health {
    pub fn new(probe: Probe, now: Timestamp) -> Health {
        let due = Some(now + probe.initial_delay);
        Health {
            probe,
            started: now,
            passed_once: false,
            on_trial: false,
            passing: 0,
            failing: 0,
            tries: 0,
            failing_since: None,
            last: None,
            due,
            retry: FIRST_RETRY,
        }
    }

    pub fn handle_result(&mut self, result: Result<(), Saw>, now: Timestamp) -> Verdict {
        match result {
            Ok(()) => {
                self.failing = 0;
                self.tries = 0;
                self.failing_since = None;
                self.last = None;
                self.passing += 1;
                self.due = Some(now + self.probe.interval);
                if self.passing < self.probe.success_threshold {
                    return Verdict::Open;
                }
                self.passed_once = true;
                self.on_trial = false;
                Verdict::Passed
            }
            Err(saw) => {
                self.passing = 0;
                self.failing += 1;
                self.tries += 1;
                self.failing_since.get_or_insert(if self.passed_once { now } else { self.started });
                self.last = Some(saw);
                let wait = if self.passed_once {
                    self.probe.interval
                } else {
                    let wait = self.retry;
                    self.retry = (self.retry * 3 / 2).min(RETRY_MAX);
                    wait.min(self.probe.interval)
                };
                self.due = Some(now + wait);
                if self.failing < self.probe.failure_threshold { Verdict::Open } else { Verdict::Failed }
            }
        }
    }

    /// Another question to a replica that is up: ready by the one before, or not.
    pub fn changed(probe: Probe, ready: bool, now: Timestamp) -> Health {
        Health { passed_once: ready, on_trial: ready, ..Health::new(probe, now) }
    }

    /// Failed often enough in a row for something to be done about it.
    pub fn has_failed(&self) -> bool {
        self.failing >= self.probe.failure_threshold && !self.on_trial
    }

    /// What is checked, for people: `GET /healthz`.
    pub fn check_text(&self, port: Option<u16>) -> String {
        match (&self.probe.check, port) {
            (Check::Http(path), _) => format!("GET {path}"),
            (Check::Tcp, Some(port)) => format!("connect to port {port}"),
            (Check::Tcp, None) => "connect".to_owned(),
            (Check::Exec(command), _) => format!("`{}`", command.join(" ")),
            (Check::Grpc, _) => "grpc health check".to_owned(),
        }
    }
}

/// What is asked of a container that has a port and no readiness probe: that the port accepts connections.
pub fn default_readiness() -> Probe {
    Probe {
        check: Check::Tcp,
        interval: Duration::from_secs(10),
        timeout: Duration::from_secs(1),
        failure_threshold: 3,
        success_threshold: 1,
        initial_delay: Duration::ZERO,
    }
}

//! One replica's life on its node: fetch, create, start, probe, serve, stop, remove. At most one of these is under
//! way at a time; what is wanted may change meanwhile and takes effect when it ends.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::health::{Health, Verdict, default_readiness};
use super::{ActionId, Condition, Exited, Finished, Purpose, Task, backoff};
use crate::goal::{Duty, ReplicaGoal, Workload};
use crate::id::{ReplicaId, Revision, ServiceName};
use crate::replica::{Cause, Ending, Exit, Phase, Pulled, Pulling, ReplicaReport, Saw, Trouble, Usage};
use crate::spec::{Probe, VolumeSource};
use crate::time::Timestamp;

/// How the exit of a process that was killed or told to end is written.
const SIGKILLED: i64 = 128 + 9;
const SIGTERMED: i64 = 128 + 15;
/// Failed tries of a readiness probe after which it is worth looking at what the process listens on.
const INSPECT_AFTER: u32 = 3;
/// An engine that is stopped gives its containers some ten seconds each, several at a time.
const ENGINE_STOP_MAX: Duration = Duration::from_secs(30);

#[derive(Debug, Clone)]
pub struct Replica {
    pub id: ReplicaId,
    pub service: ServiceName,
    pub revision: Revision,
    /// Absent for one that was found here and is in no goal: it is stopped.
    pub goal: Option<Arc<ReplicaGoal>>,
    pub stage: Stage,
    pub since: Timestamp,
    /// What to create it from, once fetched.
    pub image: Option<String>,
    digest: Option<String>,
    pulled: Option<Pulled>,
    pub pulling: Option<Pulling>,
    pub restarts: u32,
    /// Exits in a row without having been ready for [`backoff::STABLE_AFTER`] in between.
    pub failures: u32,
    /// Failures in a row of fetching, creating or starting.
    setup_failures: u32,
    last_exit: Option<Exit>,
    pub trouble: Option<Trouble>,
    pub usage: Usage,
    ready_after_ms: Option<u64>,
    /// When the current start began.
    begun: Timestamp,
    /// It ended before its start was reported.
    early_exit: Option<Exited>,
    /// Our own stop before another start has ended it, and its exit is yet to be reported: not of the next start.
    exit_due: bool,
}

#[derive(Debug, Clone)]
pub enum Stage {
    /// From the ledger: whether a runtime has it is not known yet.
    Unknown,
    /// A runtime has it and cannot say in what condition: it may be running. Nothing is begun anew before that is known.
    Unreadable(Trouble),
    Pending,
    Busy(ActionId, Doing),
    Running(Box<Running>),
    /// Waits for its next try.
    BackOff {
        until: Timestamp,
        again: Again,
    },
    /// It does not run; its remains are to be taken away.
    Stopped,
    Gone,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Doing {
    Fetching,
    Creating,
    Starting,
    /// To run again afterwards, because its liveness probe failed.
    Restarting,
    Stopping,
    Removing,
}

/// Where the next try begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Again {
    Fetch,
    Start,
    /// It may be running still.
    Stop,
    Remove,
}

#[derive(Debug, Clone)]
pub struct Running {
    pub address: Option<SocketAddr>,
    pub since: Timestamp,
    pub readiness: Option<Health>,
    pub liveness: Option<Health>,
    pub ready: bool,
    pub ready_since: Option<Timestamp>,
    /// What it listens on, as last seen; asked once for each failing spell.
    pub listening: Option<Option<Vec<SocketAddr>>>,
    pub probing: Option<(ActionId, Purpose)>,
    pub inspecting: Option<ActionId>,
}

/// What a replica wants done next; the reconciler gives it an id and the details.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    Fetch,
    Create,
    Start,
    Restart,
    Probe(Purpose),
    Inspect,
    Stop,
    Remove { erase: bool },
}

impl Replica {
    pub fn new(id: ReplicaId, service: ServiceName, revision: Revision, stage: Stage, now: Timestamp) -> Replica {
        Replica {
            id,
            service,
            revision,
            goal: None,
            stage,
            since: now,
            image: None,
            digest: None,
            pulled: None,
            pulling: None,
            restarts: 0,
            failures: 0,
            setup_failures: 0,
            last_exit: None,
            trouble: None,
            usage: Usage::default(),
            ready_after_ms: None,
            begun: now,
            early_exit: None,
            exit_due: false,
        }
    }

    pub fn duty(&self) -> Duty {
        self.goal.as_ref().map_or(Duty::Stop, |goal| goal.duty)
    }

    pub fn is_container(&self) -> bool {
        // What was found without a goal was found by the only runtime that outlives us.
        self.goal.as_ref().is_none_or(|goal| matches!(goal.workload, Workload::Container(_)))
    }

    /// Whether its process may be running, so that its volumes are not free.
    pub fn holds_volumes(&self) -> bool {
        match &self.stage {
            Stage::Unknown | Stage::Unreadable(_) | Stage::Running(_) => true,
            Stage::Busy(_, doing) => match doing {
                Doing::Starting | Doing::Restarting | Doing::Stopping => true,
                Doing::Fetching | Doing::Creating | Doing::Removing => false,
            },
            Stage::BackOff { again, .. } => *again == Again::Stop,
            Stage::Pending | Stage::Stopped | Stage::Gone => false,
        }
    }

    /// Whether tables can name it at all, so that one they do not name has been taken out of them.
    pub fn gets_requests(&self) -> bool {
        self.goal.as_ref().is_some_and(|goal| goal.port.is_some()) || !self.is_container()
    }

    /// Writable named volumes, as the runtime knows them.
    pub fn volumes(&self) -> Vec<String> {
        let Some(goal) = &self.goal else { return Vec::new() };
        let Workload::Container(container) = &goal.workload else { return Vec::new() };
        container
            .volumes
            .iter()
            .filter(|volume| !volume.read_only)
            .filter_map(|volume| match &volume.source {
                VolumeSource::Named(name) => Some(format!("{}/{name}", self.service.project)),
                VolumeSource::Host(_) => None,
            })
            .collect()
    }

    /// What it needs done now, if anything.
    pub fn want(&self, now: Timestamp) -> Option<Want> {
        let erase = self.duty() == Duty::StopAndErase;
        match (&self.stage, self.duty()) {
            // Nothing of it is there yet, and its image may take hours: what comes of that is nobody's any more. A module
            // comes soon.
            (Stage::Busy(_, Doing::Fetching), Duty::Stop | Duty::StopAndErase) if self.is_container() => {
                Some(Want::Remove { erase })
            }
            (Stage::Unknown | Stage::Gone | Stage::Busy(..), _) | (Stage::Unreadable(_), Duty::Run) => None,
            (Stage::Pending, Duty::Run) if self.image.is_none() => Some(Want::Fetch),
            (Stage::Pending, Duty::Run) => Some(Want::Create),
            (Stage::BackOff { until, again }, Duty::Run) => (now >= *until).then_some(match again {
                Again::Fetch => Want::Fetch,
                Again::Start => Want::Start,
                Again::Stop => Want::Stop,
                Again::Remove => Want::Remove { erase },
            }),
            (Stage::BackOff { until, again: Again::Stop }, _) => (now >= *until).then_some(Want::Stop),
            (Stage::BackOff { until, again: Again::Remove }, _) => (now >= *until).then_some(Want::Remove { erase }),
            (Stage::Stopped, Duty::Run) => Some(Want::Start),
            (Stage::Running(running), Duty::Run) => running.want(now),
            (Stage::Running(_) | Stage::Unreadable(_), Duty::Stop | Duty::StopAndErase) => Some(Want::Stop),
            (Stage::Pending | Stage::BackOff { .. } | Stage::Stopped, Duty::Stop | Duty::StopAndErase) => {
                Some(Want::Remove { erase })
            }
        }
    }

    /// When [`want`](Replica::want) may change by itself.
    pub fn deadline(&self) -> Option<(Timestamp, &'static str)> {
        match &self.stage {
            Stage::BackOff { until, .. } => Some((*until, "a replica is tried again")),
            // It waits for tables without it, and not for a time.
            Stage::Running(_) if self.duty() != Duty::Run => None,
            Stage::Running(running) if running.is_unprobed() => {
                Some((running.since + backoff::STEADY_AFTER, "a replica has been up for a while"))
            }
            Stage::Running(running) => running.deadline(),
            Stage::Unknown | Stage::Unreadable(_) | Stage::Pending | Stage::Busy(..) | Stage::Stopped | Stage::Gone => {
                None
            }
        }
    }

    pub fn enter(&mut self, stage: Stage, now: Timestamp) {
        let before = self.phase();
        self.stage = stage;
        if self.phase() != before {
            self.since = now;
        }
    }

    pub fn fetched(&mut self, image: String, digest: Option<String>, pulled: Option<Pulled>, now: Timestamp) {
        self.image = Some(image);
        self.digest = digest;
        self.pulled = pulled.or(self.pulled);
        // What failed was the fetching; what else keeps it from starting is told until it starts.
        self.trouble.take_if(|trouble| matches!(trouble.cause, Cause::PullFailed { .. } | Cause::ModuleMissing { .. }));
        self.enter(Stage::Pending, now);
    }

    /// Its process runs, since `since`: started by us, or found running.
    pub fn running(&mut self, address: Option<SocketAddr>, since: Timestamp, now: Timestamp) {
        self.setup_failures = 0;
        self.trouble.take_if(|trouble| trouble.cause.precedes_start());
        let goal = self.goal.clone();
        let port = goal.as_ref().and_then(|goal| goal.port);
        let is_container = self.is_container();
        let readiness = goal.as_ref().and_then(|goal| goal.readiness.clone());
        let readiness = match (readiness, port) {
            (Some(probe), _) => Some(probe),
            (None, Some(_)) if is_container => Some(default_readiness()),
            (None, _) => None,
        };
        let liveness = goal.as_ref().and_then(|goal| goal.liveness.clone());
        let steady = !is_container || now.since(since) >= backoff::STEADY_AFTER;
        let ready = readiness.is_none() && steady;
        let running = Running {
            address,
            since,
            readiness: readiness.map(|probe| Health::new(probe, now)),
            liveness: liveness.map(|probe| Health::new(probe, now)),
            ready,
            ready_since: ready.then_some(now),
            listening: None,
            probing: None,
            inspecting: None,
        };
        self.enter(Stage::Running(Box::new(running)), now);
        if ready {
            self.became_ready(now);
        }
    }

    /// Nothing probes it and it has been up for a while. True if that makes it ready.
    pub fn steady(&mut self, now: Timestamp) -> bool {
        let Stage::Running(running) = &mut self.stage else { return false };
        if !running.is_unprobed() || now.since(running.since) < backoff::STEADY_AFTER {
            return false;
        }
        running.ready = true;
        running.ready_since = Some(now);
        self.since = now;
        self.became_ready(now);
        true
    }

    /// The probes were changed without new replicas.
    pub fn set_probes(&mut self, readiness: Option<&Probe>, liveness: Option<&Probe>, now: Timestamp) {
        let default = self.is_container() && self.goal.as_ref().is_some_and(|goal| goal.port.is_some());
        let Stage::Running(running) = &mut self.stage else { return };
        let wanted = readiness.cloned().or_else(|| default.then(default_readiness));
        if running.readiness.as_ref().map(|health| &health.probe) != wanted.as_ref() {
            running.readiness = wanted.map(|probe| Health::changed(probe, running.ready, now));
            running.forget_probe(Purpose::Readiness);
        }
        if running.liveness.as_ref().map(|health| &health.probe) != liveness {
            running.liveness = liveness.map(|probe| Health::changed(probe.clone(), running.ready, now));
            running.forget_probe(Purpose::Liveness);
        }
        // What an earlier probe found wrong with a replica that is ready is nothing any more.
        if running.ready && !running.is_on_trial() {
            self.trouble = None;
        }
    }

    pub fn probed(&mut self, purpose: Purpose, result: Result<(), Saw>, now: Timestamp) -> bool {
        let port = self.goal.as_ref().and_then(|goal| goal.port);
        let Stage::Running(running) = &mut self.stage else { return false };
        running.probing = None;
        let was_ready = running.ready;
        let Some(health) = running.health_mut(purpose) else { return false };
        let on_trial = health.on_trial;
        let verdict = health.handle_result(result, now);
        let check = health.check_text(port);
        if on_trial {
            return self.tried(check, verdict, purpose, now);
        }
        match (purpose, verdict) {
            (Purpose::Readiness, Verdict::Passed) => {
                running.ready = true;
                running.listening = None;
                if !was_ready {
                    running.ready_since = Some(now);
                    self.since = now;
                    self.became_ready(now);
                }
                true
            }
            (Purpose::Readiness, Verdict::Failed | Verdict::Open) => {
                if verdict == Verdict::Failed && was_ready {
                    running.ready = false;
                    running.ready_since = None;
                    self.since = now;
                }
                if !running.ready
                    && let Some(Health { last: Some(saw), failing_since: Some(since), tries, .. }) = &running.readiness
                {
                    let (saw, tries) = (saw.clone(), *tries);
                    let listening = running.listening.clone().flatten();
                    let for_ms = u64::try_from(now.since(*since).as_millis()).unwrap_or(u64::MAX);
                    let cause = Cause::ProbeFailing { purpose, check, saw, tries, for_ms, listening };
                    self.trouble = Some(Trouble { at: now, cause, retry_at: None });
                }
                true
            }
            (Purpose::Liveness, Verdict::Failed) => {
                let saw = running.liveness.as_ref().and_then(|health| health.last.clone()).unwrap_or(Saw::TimedOut);
                self.trouble = Some(Trouble { at: now, cause: Cause::NotAlive { check, saw }, retry_at: None });
                true
            }
            (Purpose::Liveness, Verdict::Passed | Verdict::Open) => false,
        }
    }

    /// A probe that took the place of another was asked: only that it passes, or does not, is news.
    fn tried(&mut self, check: String, verdict: Verdict, purpose: Purpose, now: Timestamp) -> bool {
        let Stage::Running(running) = &self.stage else { return false };
        match (verdict, running.health(purpose)) {
            (Verdict::Passed, _) if !running.is_on_trial() => self.trouble = None,
            (Verdict::Failed, Some(Health { last: Some(saw), failing_since: Some(since), tries, .. })) => {
                let for_ms = u64::try_from(now.since(*since).as_millis()).unwrap_or(u64::MAX);
                let (saw, tries, listening) = (saw.clone(), *tries, None);
                let cause = Cause::ProbeFailing { purpose, check, saw, tries, for_ms, listening };
                self.trouble = Some(Trouble { at: now, cause, retry_at: None });
            }
            (Verdict::Passed | Verdict::Failed | Verdict::Open, _) => {}
        }
        true
    }

    fn became_ready(&mut self, now: Timestamp) {
        self.trouble = None;
        self.ready_after_ms = Some(u64::try_from(now.since(self.begun).as_millis()).unwrap_or(u64::MAX));
    }

    /// Its process has ended without being asked to.
    pub fn exited(&mut self, exited: Exited, now: Timestamp) {
        let (up, stable) = match &self.stage {
            Stage::Running(running) => {
                let ready_for = running.ready_since.map_or(Duration::ZERO, |since| now.since(since));
                (now.since(running.since), ready_for >= backoff::STABLE_AFTER)
            }
            _ => (now.since(self.begun), false),
        };
        self.failures = if stable { 1 } else { self.failures.saturating_add(1) };
        let after_ms = u64::try_from(up.as_millis()).unwrap_or(u64::MAX);
        let Exited { code, out_of_memory, last_lines } = exited;
        self.last_exit = Some(Exit { at: now, code, out_of_memory, after_ms, last_lines, ending: Ending::Own });
        let until = now + backoff::restart_delay(self.failures);
        self.trouble = Some(Trouble { at: now, cause: Cause::Exited, retry_at: Some(until) });
        self.enter(Stage::BackOff { until, again: Again::Start }, now);
    }

    /// Fetching, creating or starting failed.
    pub fn failed(&mut self, cause: Cause, again: Again, now: Timestamp) {
        self.setup_failures = self.setup_failures.saturating_add(1);
        let until = now + backoff::setup_delay(self.setup_failures);
        self.trouble = Some(Trouble { at: now, cause, retry_at: Some(until) });
        if again == Again::Fetch {
            self.image = None;
        }
        self.enter(Stage::BackOff { until, again }, now);
    }

    /// A runtime has it, in this condition.
    pub fn found(&mut self, digest: Option<String>, condition: Condition, now: Timestamp) {
        self.exit_due = false;
        if digest.is_some() {
            self.digest = digest;
        }
        match (&self.stage, condition) {
            // Whatever is under way ends with its own result.
            (Stage::Busy(..) | Stage::Gone, _) => {}
            (Stage::Unknown, Condition::Unreadable { container, reason }) => {
                let cause = Cause::Unreadable { container, reason };
                self.enter(Stage::Unreadable(Trouble { at: now, cause, retry_at: None }), now);
            }
            // What was last known of it stands.
            (_, Condition::Unreadable { .. }) => {}
            (Stage::Running(_), Condition::Running { address, since }) => {
                let Stage::Running(running) = &mut self.stage else { return };
                running.address = address;
                running.since = since;
            }
            (_, Condition::Running { address, since }) => self.running(address, since, now),
            (Stage::Running(_) | Stage::Unknown | Stage::Unreadable(_), Condition::Exited(exited)) => {
                // Lists are made when an engine answers again, else its end would have been told.
                let in_a_gap = matches!(self.stage, Stage::Running(_));
                match self.duty() {
                    Duty::Run => self.exited(exited, now),
                    Duty::Stop | Duty::StopAndErase => self.enter(Stage::Stopped, now),
                }
                if in_a_gap {
                    self.ended_with_its_engine();
                }
            }
            (Stage::Pending | Stage::BackOff { .. } | Stage::Stopped, Condition::Exited(_)) => {}
            (_, Condition::Created) => self.enter(Stage::Stopped, now),
        }
    }

    /// No runtime has anything of it.
    pub fn vanished(&mut self, now: Timestamp) {
        self.exit_due = false;
        if matches!(self.stage, Stage::Running(_)) && self.duty() == Duty::Run {
            // Its end was not seen: whoever removed it killed it.
            self.exited(Exited { code: SIGKILLED, ..Exited::default() }, now);
        }
        match (&self.stage, self.duty()) {
            (Stage::Busy(..) | Stage::Gone | Stage::Pending, _) => {}
            (Stage::BackOff { again: Again::Fetch, .. }, Duty::Run) => {}
            (&Stage::BackOff { until, again: Again::Start }, Duty::Run) => {
                self.image = None;
                self.was_removed();
                self.enter(Stage::BackOff { until, again: Again::Fetch }, now);
            }
            (_, Duty::Run) => {
                self.image = None;
                self.enter(Stage::Pending, now);
            }
            // A last removal takes along what is not the container: volumes, files of secrets.
            (Stage::Stopped | Stage::Unknown | Stage::Unreadable(_) | Stage::Running(_) | Stage::BackOff { .. }, _) => {
                self.enter(Stage::Stopped, now);
            }
        }
    }

    /// What ended it was its removal.
    fn was_removed(&mut self) {
        if let Some(exit) = &mut self.last_exit {
            exit.ending = Ending::Removed;
        }
    }

    /// Its engine was away when it ended, or just after: then it was most likely the engine that ended it, which is no
    /// failure of its own. What else it ended with than engines end things with, it ended with by itself.
    fn ended_with_its_engine(&mut self) {
        if let Some(exit) = &mut self.last_exit
            && exit.ending == Ending::Own
            && !exit.out_of_memory
            && matches!(exit.code, 0 | SIGKILLED | SIGTERMED)
        {
            exit.ending = Ending::WithEngine;
            self.failures = self.failures.saturating_sub(1);
        }
    }

    /// The engine answers: what failed because it did not is tried at once.
    pub fn engine_is_back(&mut self, now: Timestamp) {
        let lacked_engine =
            self.trouble.as_ref().is_some_and(|trouble| matches!(trouble.cause, Cause::NoEngine { .. }));
        if let Stage::BackOff { until, .. } = &mut self.stage
            && lacked_engine
        {
            *until = now;
        }
    }

    fn ended_within(&self, span: Duration, now: Timestamp) -> bool {
        self.last_exit.as_ref().is_some_and(|exit| now.since(exit.at) <= span)
    }

    /// It is in no goal any more.
    pub fn retire(&mut self) {
        let Some(goal) = &self.goal else { return };
        if goal.duty == Duty::Run {
            self.goal = Some(Arc::new(ReplicaGoal { duty: Duty::Stop, ..(**goal).clone() }));
        }
        if matches!((&self.stage, self.is_container()), (Stage::Pending, false)) {
            self.stage = Stage::Gone;
        }
    }

    pub fn is_gone(&self) -> bool {
        matches!(self.stage, Stage::Gone)
    }

    /// Whether a first report can say something true about it.
    pub fn is_judged(&self) -> bool {
        match &self.stage {
            Stage::Unknown | Stage::Pending | Stage::Busy(..) => self.trouble.is_some(),
            // It may be known in a moment, and serve.
            Stage::Unreadable(_) => false,
            Stage::Running(running) => running.ready || self.trouble.is_some(),
            // A module that is loaded is started at once; a container's end may be news.
            Stage::Stopped => self.is_container() || self.duty() != Duty::Run,
            Stage::BackOff { .. } | Stage::Gone => true,
        }
    }

    /// An action about it has begun.
    pub fn begin(&mut self, action: ActionId, want: Want, doing: Option<Doing>, now: Timestamp) {
        match want {
            Want::Start => {
                self.begun = now;
                self.early_exit = None;
            }
            Want::Probe(purpose) => {
                if let Stage::Running(running) = &mut self.stage {
                    running.probing = Some((action, purpose));
                    if let Some(health) = running.health_mut(purpose) {
                        health.due = None;
                    }
                }
            }
            Want::Inspect => {
                if let Stage::Running(running) = &mut self.stage {
                    running.inspecting = Some(action);
                }
            }
            Want::Restart => {
                if let Stage::Running(running) = &self.stage
                    && running.ready_since.is_some_and(|since| now.since(since) >= backoff::STABLE_AFTER)
                {
                    self.failures = 0;
                }
                self.early_exit = None;
            }
            Want::Fetch => self.pulling = None,
            Want::Create | Want::Stop | Want::Remove { .. } => {}
        }
        if let Some(doing) = doing {
            self.enter(Stage::Busy(action, doing), now);
        }
    }

    /// The probe that is due, with all it takes.
    pub fn probe(&self, purpose: Purpose) -> Option<Task> {
        let Stage::Running(running) = &self.stage else { return None };
        let health = running.health(purpose)?;
        Some(Task::Probe {
            replica: self.id,
            purpose,
            check: health.probe.check.clone(),
            address: running.address,
            timeout: health.probe.timeout,
        })
    }

    pub fn take_probe(&mut self, action: ActionId, result: Result<(), Saw>, now: Timestamp) -> bool {
        match &self.stage {
            Stage::Running(running) => match running.probing {
                Some((probing, purpose)) if probing == action => self.probed(purpose, result, now),
                // Of an earlier start of this replica.
                Some(_) | None => false,
            },
            _ => false,
        }
    }

    pub fn take_listening(&mut self, action: ActionId, sockets: Option<Vec<SocketAddr>>) -> bool {
        let Stage::Running(running) = &mut self.stage else { return false };
        if running.inspecting != Some(action) {
            return false;
        }
        running.inspecting = None;
        running.listening = Some(sockets.clone());
        if let Some(Trouble { cause: Cause::ProbeFailing { listening, .. }, .. }) = &mut self.trouble {
            *listening = sockets;
        }
        true
    }

    /// Needs a volume that another one still has. Always false: it has to wait.
    pub fn must_wait(&mut self, volume: String, by: ReplicaId, now: Timestamp) -> bool {
        let cause = Cause::VolumeBusy { volume, by };
        if self.trouble.as_ref().map(|trouble| &trouble.cause) != Some(&cause) {
            self.trouble = Some(Trouble { at: now, cause, retry_at: None });
        }
        // Its time has come: it waits for the volume now and for no clock.
        if matches!(self.stage, Stage::BackOff { .. }) {
            self.enter(Stage::Stopped, now);
        }
        false
    }

    /// Its process ended while its start was under way.
    pub fn exited_early(&mut self, exited: Exited) {
        self.early_exit = Some(exited);
    }

    /// Whether this is the exit that our own stop led to; then it only completes what is known of it.
    pub fn takes_due_exit(&mut self, exited: &Exited) -> bool {
        let due = std::mem::take(&mut self.exit_due);
        if due && let Some(exit) = &mut self.last_exit {
            exit.code = exited.code;
            exit.last_lines.clone_from(&exited.last_lines);
        }
        due
    }

    /// The end of fetching, creating, starting, stopping or removing.
    pub fn take_result(&mut self, action: ActionId, finished: Finished, now: Timestamp) {
        let Stage::Busy(busy, doing) = self.stage else { return };
        if busy != action {
            return;
        }
        match (doing, finished) {
            (Doing::Fetching, Finished::Fetched { image, digest, pulled }) => {
                self.fetched(image, digest, pulled, now);
            }
            (Doing::Creating, Finished::Created) => self.enter(Stage::Stopped, now),
            (Doing::Starting, Finished::Started { address }) => {
                if self.last_exit.is_some() {
                    self.restarts = self.restarts.saturating_add(1);
                }
                self.running(address, now, now);
                if let Some(exited) = self.early_exit.take() {
                    match self.duty() {
                        Duty::Run => self.exited(exited, now),
                        Duty::Stop | Duty::StopAndErase => self.enter(Stage::Stopped, now),
                    }
                }
            }
            (Doing::Restarting, Finished::Stopped) => {
                let why = self.trouble.take();
                self.exit_due = self.early_exit.is_none();
                let exited = self.early_exit.take().unwrap_or(Exited { code: SIGTERMED, ..Exited::default() });
                self.exited(Exited { out_of_memory: false, ..exited }, now);
                if let (Some(Trouble { cause: Cause::NotAlive { check, saw }, .. }), Some(exit)) =
                    (why, &mut self.last_exit)
                {
                    exit.ending = Ending::NotAlive { check, saw };
                }
            }
            (Doing::Stopping, Finished::Stopped) => self.enter(Stage::Stopped, now),
            (Doing::Removing, Finished::Removed) => self.enter(Stage::Gone, now),
            // From the beginning also when only the start failed: what is there already is taken as it is.
            (Doing::Fetching | Doing::Creating | Doing::Starting, Finished::Failed(cause)) => {
                match cause {
                    Cause::Vanished => self.was_removed(),
                    Cause::NoEngine { .. } if self.ended_within(ENGINE_STOP_MAX, now) => self.ended_with_its_engine(),
                    _ => {}
                }
                self.failed(cause, Again::Fetch, now);
            }
            (Doing::Removing, Finished::Failed(cause)) => self.failed(cause, Again::Remove, now),
            (Doing::Stopping, Finished::Failed(cause)) => self.failed(cause, Again::Stop, now),
            (Doing::Restarting, Finished::Failed(cause)) => {
                // It may be running still: that is asked again, and nothing else is done about it before.
                self.running(None, self.begun, now);
                self.trouble = Some(Trouble { at: now, cause, retry_at: None });
            }
            (_, finished) => unreachable!("{doing:?} cannot end in {finished:?}"),
        }
    }

    pub fn phase(&self) -> Phase {
        match &self.stage {
            Stage::Unknown | Stage::Unreadable(_) | Stage::Pending => Phase::Pending,
            Stage::Busy(_, Doing::Fetching) => Phase::Pulling,
            Stage::Busy(_, Doing::Creating) => Phase::Creating,
            Stage::Busy(_, Doing::Starting) => Phase::Starting,
            Stage::Busy(_, Doing::Restarting) => Phase::BackOff,
            Stage::Busy(_, Doing::Stopping | Doing::Removing) => Phase::Stopping,
            Stage::Running(running) if running.ready => Phase::Ready,
            Stage::Running(running) if running.readiness.as_ref().is_some_and(|health| health.passed_once) => {
                Phase::Unready
            }
            Stage::Running(_) => Phase::Starting,
            Stage::BackOff { again: Again::Stop | Again::Remove, .. } => Phase::Stopping,
            Stage::BackOff { .. } => Phase::BackOff,
            // To be started: it waits for a volume, or for nothing but its turn.
            Stage::Stopped if self.duty() == Duty::Run => Phase::Creating,
            Stage::Stopped => Phase::Stopping,
            Stage::Gone => Phase::Gone,
        }
    }

    pub fn report(&self) -> ReplicaReport {
        let address = match &self.stage {
            Stage::Running(running) => running.address,
            _ => None,
        };
        let trouble = match &self.stage {
            Stage::Unreadable(trouble) => Some(trouble),
            _ => self.trouble.as_ref(),
        };
        ReplicaReport {
            service: self.service.clone(),
            revision: self.revision,
            phase: self.phase(),
            since: self.since,
            address,
            digest: self.digest.clone(),
            restarts: self.restarts,
            failures: self.failures,
            last_exit: self.last_exit.clone(),
            trouble: trouble.cloned(),
            usage: self.usage,
            pulled: self.pulled,
            pulling: self.pulling.filter(|_| self.phase() == Phase::Pulling),
            ready_after_ms: self.ready_after_ms,
            on_trial: matches!(&self.stage, Stage::Running(running) if running.is_on_trial()),
            runs: BTreeMap::new(),
        }
    }
}

impl Running {
    fn health(&self, purpose: Purpose) -> Option<&Health> {
        match purpose {
            Purpose::Readiness => self.readiness.as_ref(),
            Purpose::Liveness => self.liveness.as_ref(),
        }
    }

    fn health_mut(&mut self, purpose: Purpose) -> Option<&mut Health> {
        match purpose {
            Purpose::Readiness => self.readiness.as_mut(),
            Purpose::Liveness => self.liveness.as_mut(),
        }
    }

    /// Not ready, and no probe will say that it is.
    fn is_unprobed(&self) -> bool {
        !self.ready && self.readiness.is_none()
    }

    /// A probe was changed and has not passed yet.
    fn is_on_trial(&self) -> bool {
        [&self.readiness, &self.liveness].into_iter().flatten().any(|health| health.on_trial)
    }

    /// The answer to a question that is not asked any more does not count.
    fn forget_probe(&mut self, purpose: Purpose) {
        self.probing = self.probing.take().filter(|(_, probing)| *probing != purpose);
    }

    fn want(&self, now: Timestamp) -> Option<Want> {
        let is_due = |health: &Option<Health>| health.as_ref().and_then(|h| h.due).is_some_and(|due| now >= due);
        if self.liveness.as_ref().is_some_and(Health::has_failed) {
            return Some(Want::Restart);
        }
        if self.probing.is_none() {
            if is_due(&self.readiness) {
                return Some(Want::Probe(Purpose::Readiness));
            }
            if self.has_started() && is_due(&self.liveness) {
                return Some(Want::Probe(Purpose::Liveness));
            }
        }
        let puzzling = self.readiness.as_ref().is_some_and(|health| health.tries >= INSPECT_AFTER);
        (puzzling && self.listening.is_none() && self.inspecting.is_none()).then_some(Want::Inspect)
    }

    fn deadline(&self) -> Option<(Timestamp, &'static str)> {
        if self.probing.is_some() {
            return None;
        }
        let liveness = self.liveness.as_ref().filter(|_| self.has_started());
        [self.readiness.as_ref(), liveness]
            .into_iter()
            .filter_map(|health| health?.due)
            .min()
            .map(|due| (due, "a probe is due"))
    }

    /// Until it is ready for the first time it may be starting: whether that takes too long is the rollout's to
    /// judge, not the liveness probe's.
    fn has_started(&self) -> bool {
        self.ready || self.readiness.as_ref().is_none_or(|health| health.passed_once)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::Label;

    const BEGIN: Timestamp = Timestamp(1_000_000);

    /// It is to run, has run for a minute, and has been ready nearly as long.
    fn serving() -> Replica {
        let label = Label::new("web").unwrap();
        let service = ServiceName::new(label.clone(), label);
        let mut replica = Replica::new(ReplicaId(1), service, Revision(1), Stage::Stopped, BEGIN);
        replica.goal = Some(Arc::new(crate::node::run::tests::job(&[])));
        replica.running(None, BEGIN, BEGIN);
        replica
    }

    fn exited(code: i64) -> Condition {
        Condition::Exited(Exited { code, out_of_memory: false, last_lines: vec!["bye".to_owned()] })
    }

    fn ending(replica: &Replica) -> (Option<Ending>, u32) {
        (replica.last_exit.as_ref().map(|exit| exit.ending.clone()), replica.failures)
    }

    #[test]
    fn what_ends_while_its_engine_is_away_is_no_failure_unless_it_has_failed() {
        let later = BEGIN + Duration::from_secs(60);
        for (code, expected) in [
            (SIGTERMED, (Some(Ending::WithEngine), 0)),
            (0, (Some(Ending::WithEngine), 0)),
            (1, (Some(Ending::Own), 1)),
        ] {
            let mut replica = serving();
            replica.found(None, exited(code), later);
            assert_eq!(ending(&replica), expected, "{code}");
        }
        // The first list of all is no news: it may have ended at any time, by anything.
        let mut replica = serving();
        replica.stage = Stage::Unknown;
        replica.found(None, exited(SIGTERMED), later);
        assert_eq!(ending(&replica), (Some(Ending::Own), 1));
    }

    #[test]
    fn what_kept_it_from_starting_is_not_what_is_wrong_with_it_when_it_starts() {
        let mut replica = serving();
        let busy = |replica: &mut Replica, doing| replica.stage = Stage::Busy(ActionId(9), doing);
        busy(&mut replica, Doing::Fetching);
        let cause = Cause::PullFailed { image: "web:1".to_owned(), reason: "EOF".to_owned(), present: false };
        replica.take_result(ActionId(9), Finished::Failed(cause), BEGIN);
        busy(&mut replica, Doing::Fetching);
        assert!(replica.trouble.is_some());
        let fetched = Finished::Fetched { image: "web:1".to_owned(), digest: None, pulled: None };
        replica.take_result(ActionId(9), fetched, BEGIN);
        assert_eq!(replica.trouble, None);

        replica.must_wait("web/data".to_owned(), ReplicaId(7), BEGIN);
        busy(&mut replica, Doing::Starting);
        assert!(replica.trouble.is_some());
        replica.take_result(ActionId(9), Finished::Started { address: None }, BEGIN);
        assert_eq!(replica.trouble, None);
        // How it ended before is told until it is ready.
        replica.exited(Exited { code: 1, ..Exited::default() }, BEGIN);
        replica.goal =
            Some(Arc::new(ReplicaGoal { readiness: Some(default_readiness()), ..crate::node::run::tests::job(&[]) }));
        busy(&mut replica, Doing::Starting);
        replica.take_result(ActionId(9), Finished::Started { address: None }, BEGIN);
        assert_eq!(replica.trouble.map(|trouble| trouble.cause), Some(Cause::Exited));
    }

    #[test]
    fn what_ends_just_before_its_engine_does_ends_with_it() {
        let no_engine = || Finished::Failed(Cause::NoEngine { reason: "connection refused".to_owned() });
        for (pause, expected) in
            [(Duration::from_secs(2), (Some(Ending::WithEngine), 0)), (ENGINE_STOP_MAX * 2, (Some(Ending::Own), 1))]
        {
            let mut replica = serving();
            replica.exited(Exited { code: SIGTERMED, ..Exited::default() }, BEGIN + Duration::from_secs(60));
            assert_eq!(ending(&replica), (Some(Ending::Own), 1));
            let now = BEGIN + Duration::from_secs(60) + pause;
            replica.stage = Stage::Busy(ActionId(9), Doing::Starting);
            replica.take_result(ActionId(9), no_engine(), now);
            assert_eq!(ending(&replica), expected);
        }
    }
}

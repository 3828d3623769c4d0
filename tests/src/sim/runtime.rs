//! A node's containers and its proxy's requests, as the world sees them: what is true, not what is believed. How a
//! container behaves is in its image's name: `ok`, `errs`, `slow`, `fades`, `crash`, `deaf`, `missing`. How its pull goes is
//! in the tag: `1-large` takes long, `1-stalls` never comes.

use std::collections::{BTreeMap, BTreeSet};

use orca_cluster::goal::{ReplicaGoal, Workload};
use orca_cluster::id::{ReplicaId, Revision, ServiceName};
use orca_cluster::node::{Condition, Exited, Finished, Found, Seen, Task};
use orca_cluster::replica::{Cause, Pulled, RunState, Saw};
use orca_cluster::spec::{Check, Volume, VolumeSource};
use orca_cluster::time::Timestamp;
use orca_cluster::traffic::{InFlight, ServiceTraffic};
use rand::Rng;
use rand::rngs::StdRng;
use std::net::SocketAddr;
use std::time::Duration;

/// How long a large image takes to come, and how long a node waits for one of which nothing comes. Both are longer than
/// replicas may take to get ready, and shorter than what counts as quiet.
const LARGE_MILLIS: u64 = 25_000;
const STALL_MILLIS: u64 = 30_000;

#[derive(Debug, Default)]
pub struct Runtime {
    pub containers: BTreeMap<ReplicaId, Container>,
    requests: BTreeMap<u64, Request>,
    requests_begun: u64,
    counted: BTreeMap<ServiceName, ServiceTraffic>,
    /// Named volumes: they stay when their container goes, unless it is told to take them along.
    pub volumes: BTreeSet<String>,
    /// Nothing that runs is harmed, and nothing can be asked of it.
    pub engine_down: bool,
    /// What was done to each replica, beside asking how it is.
    pub touched: BTreeMap<ReplicaId, u64>,
}

#[derive(Debug, Clone)]
pub struct Container {
    pub service: ServiceName,
    pub revision: Revision,
    pub image: String,
    pub volumes: Vec<String>,
    /// It runs in the agent's process and ends with it.
    pub module: bool,
    port: Option<u16>,
    pub running: Option<Timestamp>,
    /// Counts starts, so that what was to happen to an earlier one does not happen to this.
    start: u64,
    exit: i64,
}

#[derive(Debug, Clone)]
struct Request {
    service: ServiceName,
    replica: ReplicaId,
    revision: Revision,
    /// It ends in an error.
    errs: bool,
}

#[derive(Debug, Clone)]
pub enum Event {
    Exits { replica: ReplicaId, start: u64, code: i64 },
    RequestEnds { request: u64 },
}

/// An action's result, when it comes, and what else will happen because of it.
#[derive(Debug)]
pub struct Done {
    pub millis: u64,
    pub finished: Finished,
    pub events: Vec<(u64, Event)>,
}

impl Runtime {
    pub fn carry_out(&mut self, task: &Task, now: Timestamp, rng: &mut StdRng) -> Done {
        let mut events = Vec::new();
        if let Some((replica, goal)) = touches(task) {
            *self.touched.entry(replica).or_default() += 1;
            let module = goal.is_some_and(|goal| matches!(goal.workload, Workload::Module(_)));
            if self.engine_down && !module {
                let cause = Cause::NoEngine { reason: "connection refused".to_owned() };
                return Done { millis: 1, finished: Finished::Failed(cause), events };
            }
        }
        let (millis, finished) = match task {
            Task::Fetch { goal, .. } => {
                let image = match &goal.workload {
                    Workload::Container(container) => container.image.clone(),
                    Workload::Module(module) if module.path.contains("fails") => "fails:module".to_owned(),
                    Workload::Module(_) => "ok:module".to_owned(),
                };
                let tag = image.split(':').nth(1).unwrap_or_default();
                let millis = match tag.split('-').nth(1) {
                    Some("large") => LARGE_MILLIS,
                    Some("stalls") => STALL_MILLIS,
                    Some(_) | None => rng.random_range(5..400),
                };
                let finished = match millis {
                    _ if image.starts_with("missing") => {
                        Finished::Failed(Cause::ImageMissing { image, present: false })
                    }
                    STALL_MILLIS => {
                        let reason = "nothing came from the registry".to_owned();
                        Finished::Failed(Cause::PullFailed { image, reason, present: false })
                    }
                    _ => {
                        let pulled = (millis == LARGE_MILLIS).then_some(Pulled { bytes: 1 << 30, millis });
                        Finished::Fetched { digest: Some(format!("sha256:{image}")), image, pulled }
                    }
                };
                (millis, finished)
            }
            Task::Create { replica, goal, image, .. } => {
                let volumes = match &goal.workload {
                    Workload::Container(container) => {
                        container.volumes.iter().map(|volume| volume_name(goal, volume)).collect()
                    }
                    Workload::Module(_) => Vec::new(),
                };
                self.volumes.extend(volumes.iter().cloned());
                let container = Container {
                    service: goal.service.clone(),
                    revision: goal.revision,
                    image: image.clone(),
                    volumes,
                    module: matches!(goal.workload, Workload::Module(_)),
                    port: goal.port,
                    running: None,
                    start: 0,
                    exit: 0,
                };
                self.containers.insert(*replica, container);
                (rng.random_range(5..100), Finished::Created)
            }
            Task::Start { replica, .. } => match self.containers.get_mut(replica) {
                Some(container) => {
                    container.running = Some(now);
                    container.start += 1;
                    let start = container.start;
                    if container.image.starts_with("crash") {
                        events.push((150, Event::Exits { replica: *replica, start, code: 1 }));
                    }
                    let address = container.address(*replica);
                    (rng.random_range(5..200), Finished::Started { address })
                }
                None => (5, Finished::Failed(Cause::Refused { reason: "no such container".to_owned() })),
            },
            Task::Probe { replica, check, .. } => {
                // What `/broken` asks is answered by nobody.
                let asked = !matches!(check, Check::Http(path) if path == "/broken");
                let passes = asked && self.containers.get(replica).is_some_and(|container| container.is_ready(now));
                (rng.random_range(1..5), Finished::Probed(if passes { Ok(()) } else { Err(Saw::Refused) }))
            }
            Task::Inspect { .. } => (5, Finished::Listening(Some(Vec::new()))),
            Task::Stop { replica, .. } => {
                if let Some(container) = self.containers.get_mut(replica) {
                    container.running = None;
                    container.exit = 143;
                }
                self.requests.retain(|_, request| request.replica != *replica);
                (rng.random_range(5..500), Finished::Stopped)
            }
            Task::Remove { replica, goal, erase, .. } => {
                self.containers.remove(replica);
                if let (true, Some(goal)) = (erase, goal)
                    && let Workload::Container(container) = &goal.workload
                {
                    for volume in &container.volumes {
                        self.volumes.remove(&volume_name(goal, volume));
                    }
                }
                (rng.random_range(5..100), Finished::Removed)
            }
            Task::Apply { tables, generation } => {
                let finished = Finished::Applied { number: tables.number, generation: *generation };
                (rng.random_range(0..10), finished)
            }
            Task::Run { replica, .. } => {
                let fails = self.containers.get(replica).is_none_or(|module| module.image.starts_with("fails"));
                let state = if fails { RunState::Failed { reason: "exit code 1".to_owned() } } else { RunState::Done };
                (rng.random_range(5..5_000), Finished::Ran(state))
            }
        };
        Done { millis, finished, events }
    }

    /// What comes of an event, as the runtime would report it.
    pub fn happens(&mut self, event: Event, _now: Timestamp) -> Option<Seen> {
        match event {
            Event::Exits { replica, start, code } => {
                let container = self.containers.get_mut(&replica)?;
                if container.start != start || container.running.is_none() {
                    return None;
                }
                container.running = None;
                container.exit = code;
                self.requests.retain(|_, request| request.replica != replica);
                let exited = Exited { code, out_of_memory: false, last_lines: vec!["bye".to_owned()] };
                Some(Seen::Exited { replica, exited })
            }
            Event::RequestEnds { request } => {
                let request = self.requests.remove(&request)?;
                let counters = self.counted.entry(request.service).or_default();
                let counters = counters.revisions.entry(request.revision).or_default();
                counters.requests += 1;
                counters.statuses[if request.errs { 4 } else { 1 }] += 1;
                None
            }
        }
    }

    pub fn begin_request(&mut self, service: ServiceName, replica: ReplicaId, revision: Revision, errs: bool) -> Event {
        self.requests_begun += 1;
        self.requests.insert(self.requests_begun, Request { service, replica, revision, errs });
        Event::RequestEnds { request: self.requests_begun }
    }

    /// Whether it is here and answers with errors.
    pub fn errs(&self, replica: ReplicaId) -> bool {
        self.containers.get(&replica).is_some_and(|container| container.image.starts_with("errs"))
    }

    pub fn in_flight(&self) -> BTreeMap<ReplicaId, InFlight> {
        let mut in_flight: BTreeMap<ReplicaId, InFlight> = BTreeMap::new();
        for request in self.requests.values() {
            in_flight.entry(request.replica).or_default().requests += 1;
        }
        in_flight
    }

    pub fn counted(&self) -> BTreeMap<ServiceName, ServiceTraffic> {
        self.counted.clone()
    }

    pub fn list(&self, _now: Timestamp) -> Vec<Found> {
        self.containers
            .iter()
            .filter(|(_, container)| !container.module)
            .map(|(replica, container)| Found {
                replica: *replica,
                service: container.service.clone(),
                revision: container.revision,
                digest: Some(format!("sha256:{}", container.image)),
                condition: match (container.running, container.start) {
                    (Some(since), _) => Condition::Running { address: container.address(*replica), since },
                    (None, 0) => Condition::Created,
                    (None, _) => Condition::Exited(Exited { code: container.exit, ..Exited::default() }),
                },
            })
            .collect()
    }

    /// The power goes: containers stay as they were on disk, nothing runs.
    pub fn power_cut(&mut self, _now: Timestamp) {
        for container in self.containers.values_mut() {
            container.running = None;
            container.exit = 255;
        }
        self.proxy_lost();
    }

    /// The proxy's process is gone, and with it its connections and counters.
    pub fn proxy_lost(&mut self) {
        self.requests.clear();
        self.counted.clear();
        self.containers.retain(|_, container| !container.module);
    }

    pub fn victim(&self, pick: u64) -> Option<(ReplicaId, Event)> {
        let running: Vec<ReplicaId> =
            self.containers.iter().filter(|(_, c)| c.running.is_some() && !c.module).map(|(id, _)| *id).collect();
        let replica = *running.get(usize::try_from(pick % running.len().max(1) as u64).ok()?)?;
        Some((replica, self.kill(replica)?))
    }

    pub fn kill(&self, replica: ReplicaId) -> Option<Event> {
        let container = self.containers.get(&replica)?;
        Some(Event::Exits { replica, start: container.start, code: 137 })
    }
}

/// The replica that a task changes, if it changes one.
fn touches(task: &Task) -> Option<(ReplicaId, Option<&ReplicaGoal>)> {
    match task {
        Task::Fetch { replica, goal, .. } | Task::Create { replica, goal, .. } | Task::Start { replica, goal, .. } => {
            Some((*replica, Some(goal)))
        }
        Task::Remove { replica, goal, .. } => Some((*replica, goal.as_deref())),
        Task::Stop { replica, .. } => Some((*replica, None)),
        Task::Probe { .. } | Task::Inspect { .. } | Task::Apply { .. } | Task::Run { .. } => None,
    }
}

fn volume_name(goal: &ReplicaGoal, volume: &Volume) -> String {
    match &volume.source {
        VolumeSource::Named(name) => format!("{}/{name}", goal.service.project),
        VolumeSource::Host(path) => path.clone(),
    }
}

impl Container {
    fn address(&self, replica: ReplicaId) -> Option<SocketAddr> {
        let port = self.port.filter(|_| !self.module)?;
        Some(SocketAddr::from(([10, 1, (replica.0 >> 8) as u8, replica.0 as u8], port)))
    }

    pub fn is_ready(&self, now: Timestamp) -> bool {
        let Some(since) = self.running else { return false };
        let up = now.since(since);
        match self.image.split(':').next().unwrap_or_default() {
            "deaf" | "crash" => false,
            "fades" => up >= Duration::from_millis(100) && up < Duration::from_secs(30),
            "slow" => up >= Duration::from_secs(5),
            _ => up >= Duration::from_millis(100),
        }
    }
}

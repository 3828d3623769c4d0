//! The brain for one term of leadership: created when leadership is confirmed, with the state as it then is and an
//! empty inventory, and dropped when it is lost, so that nothing survives a term by accident.
//!
//! In: new states, reports, the end of proposals, the passing of time. Out: [`Order`]s. It sends no goal and
//! proposes nothing before every node was heard or had the time to be: until then a replica that runs well looks
//! the same as one that is gone.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use crate::command::{Announcement, Command};
use crate::event::{EVENTS_MAX, Kind};
use crate::goal::{Container, Duty, Goal, ModuleGoal, ReplicaGoal, Workload};
use crate::id::{Generation, GoalNumber, NodeId, ReplicaId, Revision, ServiceName};
use crate::inventory::{Inventory, SUSPECT_AFTER};
use crate::plan::report::Waiting;
use crate::plan::{View, cron, plan, rollout, route};
use crate::replica::{Observed, Phase, ReplicaReport};
use crate::secret::SecretName;
use crate::spec::{Service, Source};
use crate::state::{Deployed, Placement, PlacementState, RevisionRecord, State, Window};
use crate::time::Timestamp;
use crate::traffic::Tally;
use crate::why;

/// How far back `before` in a receipt looks.
const RECENT: Duration = Duration::from_secs(60);
/// One sample of the counters for each of these.
const SAMPLE_EVERY: Duration = Duration::from_secs(5);
/// Newest events among which a proposal's own are found once it is applied: more than people cause meanwhile.
const EVENTS_LOOKED_AT: usize = 200;
/// Restarts of one replica after which its exits are announced once a minute only.
const EXITS_ANNOUNCED: u32 = 10;

#[derive(Debug)]
pub struct Leader {
    term: u64,
    state: Arc<State>,
    inventory: Inventory,
    /// Counts the goals of this term.
    goals_sent: u64,
    goals: BTreeMap<NodeId, Goal>,
    sent: BTreeMap<NodeId, (GoalNumber, Generation)>,
    /// A proposal is under way; its outcome must be known before the next.
    proposing: bool,
    samples: VecDeque<Sample>,
    waiting: BTreeMap<ServiceName, Vec<Waiting>>,
    announced: BTreeMap<ReplicaId, Announced>,
    /// What the proposal under way announces, and what had been announced before it.
    announcing: Option<(Vec<Announcement>, BTreeMap<ReplicaId, Announced>)>,
    orders: VecDeque<Order>,
}

/// What the proxies had counted at one moment.
#[derive(Debug)]
struct Sample {
    at: Timestamp,
    services: BTreeMap<ServiceName, Tally>,
    /// The same proxies, of a service that was not there yet.
    nothing: Tally,
}

/// What was last said about a replica.
#[derive(Debug, Clone, Default)]
struct Announced {
    exit: Option<Timestamp>,
    troubled: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Order {
    Propose(Command),
    /// The secrets of the goal are left for whoever has the vault.
    SendGoal(NodeId, Box<Goal>),
}

impl Leader {
    pub fn new(term: u64, state: Arc<State>, now: Timestamp) -> Leader {
        Leader {
            term,
            state,
            inventory: Inventory::new(now),
            goals_sent: 0,
            goals: BTreeMap::new(),
            sent: BTreeMap::new(),
            proposing: false,
            samples: VecDeque::new(),
            waiting: BTreeMap::new(),
            announced: BTreeMap::new(),
            announcing: None,
            orders: VecDeque::new(),
        }
    }

    pub fn handle_state(&mut self, state: Arc<State>, now: Timestamp) {
        self.state = state;
        self.decide(now);
    }

    /// A report came in. The first one on a connection makes the node's goal be sent again.
    pub fn handle_report(&mut self, node: NodeId, observed: Observed, now: Timestamp) {
        if !self.state.nodes.contains_key(&node) {
            return;
        }
        self.inventory.record(node, observed, now);
        self.sample(now);
        self.decide(now);
    }

    /// A node has connected (again): what it was sent before may not have arrived.
    pub fn handle_connected(&mut self, node: NodeId) {
        self.goals.remove(&node);
    }

    /// The last proposal was applied, refused or lost. If it was applied, the state that has it was handed in
    /// before.
    pub fn handle_proposed(&mut self, now: Timestamp) {
        self.proposing = false;
        // What was refused or lost is still to be told.
        if let Some((announcements, before)) = self.announcing.take()
            && !announcements.iter().all(|announcement| self.is_told(announcement))
        {
            self.announced = before;
        }
        self.decide(now);
    }

    pub fn handle_timeout(&mut self, now: Timestamp) {
        self.sample(now);
        self.decide(now);
    }

    pub fn poll_order(&mut self) -> Option<Order> {
        self.orders.pop_front()
    }

    /// When [`handle_timeout`](Leader::handle_timeout) should be called next, and why.
    pub fn poll_timeout(&self, now: Timestamp) -> Option<(Timestamp, &'static str)> {
        let recent = BTreeMap::new();
        let view = self.view(&recent, now);
        let judging = self.inventory.began() + SUSPECT_AFTER;
        [
            (judging > now).then_some((judging, "the term's first judgement")),
            self.inventory.deadline(now).map(|at| (at, "a node falls silent")),
            rollout::deadline(view),
            cron::deadline(view),
        ]
        .into_iter()
        .flatten()
        .min_by_key(|(at, _)| *at)
    }

    pub fn state(&self) -> &Arc<State> {
        &self.state
    }

    pub fn inventory(&self) -> &Inventory {
        &self.inventory
    }

    /// What each service that is not as asked waits for, as of the last decision.
    pub fn waiting(&self) -> &BTreeMap<ServiceName, Vec<Waiting>> {
        &self.waiting
    }

    /// The goals last sent, for whoever checks invariants.
    pub fn goals(&self) -> &BTreeMap<NodeId, Goal> {
        &self.goals
    }

    pub fn sent(&self) -> &BTreeMap<NodeId, (GoalNumber, Generation)> {
        &self.sent
    }

    fn view<'a>(&'a self, recent: &'a BTreeMap<ServiceName, Window>, now: Timestamp) -> View<'a> {
        View { state: &self.state, inventory: &self.inventory, sent: &self.sent, recent, now }
    }

    fn decide(&mut self, now: Timestamp) {
        if !self.inventory.is_complete(self.state.nodes.keys().copied(), now) {
            return;
        }
        self.send_goals(now);
        let recent = self.recent();
        let made = plan(self.view(&recent, now));
        self.waiting = made.waiting;
        if self.proposing {
            return;
        }
        let before = self.announced.clone();
        let announcements = self.announcements(now);
        if !announcements.is_empty() {
            self.announcing = Some((announcements.clone(), before));
        }
        let command = match (made.steps.is_empty(), announcements.is_empty()) {
            (true, true) => return,
            (true, false) => Command::Announce(announcements),
            (false, _) => Command::Adopt { parent: made.parent, steps: made.steps, announcements },
        };
        self.proposing = true;
        self.orders.push_back(Order::Propose(command));
    }

    /// Every heard node whose goal is another than it was sent gets the new one.
    fn send_goals(&mut self, now: Timestamp) {
        let recent = BTreeMap::new();
        let view = self.view(&recent, now);
        let tables = route::tables(view);
        let mut changed = Vec::new();
        for node in self.state.nodes.keys() {
            if self.inventory.heard(*node).is_none() {
                continue;
            }
            let replicas = self.replica_goals(*node);
            let goal = Goal { replicas, tables: tables.clone(), ..Goal::default() };
            let same = self.goals.get(node).is_some_and(|last| {
                last.replicas == goal.replicas
                    && last.tables.routes == goal.tables.routes
                    && last.tables.services == goal.tables.services
                    && !self.owes_acknowledgement(*node)
            });
            if !same {
                changed.push((*node, goal));
            }
        }
        for (node, mut goal) in changed {
            self.goals_sent += 1;
            goal.number = GoalNumber { term: self.term, count: self.goals_sent };
            goal.generation = self.state.generation;
            goal.tables.number = goal.number;
            goal.tables.generation = goal.generation;
            self.sent.insert(node, (goal.number, goal.generation));
            self.goals.insert(node, goal.clone());
            self.orders.push_back(Order::SendGoal(node, Box::new(goal)));
        }
    }

    /// Whether a replica waits for this node to acknowledge a generation that its last goal was not made from: the
    /// tables may be the same, but only an acknowledgement of this generation says so.
    fn owes_acknowledgement(&self, node: NodeId) -> bool {
        let Some((_, sent)) = self.sent.get(&node) else { return true };
        self.state.placements.values().any(|placement| match placement.state {
            PlacementState::Drain { since, .. } => since > *sent,
            PlacementState::Serve | PlacementState::Stop { .. } => false,
        })
    }

    fn replica_goals(&self, node: NodeId) -> BTreeMap<ReplicaId, ReplicaGoal> {
        let here = self.state.placements.iter().filter(|(_, placement)| placement.node == node);
        here.filter_map(|(id, placement)| {
            let deployed = self.state.services.get(&placement.service)?;
            let template = deployed.revisions.get(&placement.revision)?;
            let newest = deployed.record_for(placement.revision).unwrap_or(template);
            Some((*id, self.replica_goal(*id, deployed, placement, template, newest)))
        })
        .collect()
    }

    fn replica_goal(
        &self,
        id: ReplicaId,
        deployed: &Deployed,
        placement: &Placement,
        template: &RevisionRecord,
        newest: &RevisionRecord,
    ) -> ReplicaGoal {
        let duty = match placement.state {
            PlacementState::Serve | PlacementState::Drain { .. } => Duty::Run,
            PlacementState::Stop { erase: false } => Duty::Stop,
            PlacementState::Stop { erase: true } => Duty::StopAndErase,
        };
        let means = |name: &str| self.state.secret(&placement.service.project, name).map(|(full, _)| full);
        let due = |cron: &str| deployed.schedules.get(cron)?.run.filter(|run| run.replica == id).map(|run| run.due);
        replica_goal(&placement.service, placement.revision, duty, template, newest, means, due)
    }

    /// Keeps the last minute of counters, from when every node was heard: of a proxy that is heard later nobody knows how
    /// much of what it has counted is new.
    fn sample(&mut self, now: Timestamp) {
        let early = self.samples.back().is_some_and(|sample| now.since(sample.at) < SAMPLE_EVERY);
        if early || !self.inventory.is_complete(self.state.nodes.keys().copied(), now) {
            return;
        }
        let recent = BTreeMap::new();
        let view = self.view(&recent, now);
        let services = self.state.services.keys().map(|name| (name.clone(), view.tally(name))).collect();
        let sample = Sample { at: view.counted_at(), services, nothing: view.proxies() };
        self.samples.push_back(sample);
        while self.samples.len() > 1 && self.samples.get(1).is_some_and(|sample| now.since(sample.at) >= RECENT) {
            self.samples.pop_front();
        }
    }

    /// Each service's traffic from the oldest sample kept until now.
    pub fn recent(&self) -> BTreeMap<ServiceName, Window> {
        let Some(Sample { at: from, services, nothing }) = self.samples.front() else { return BTreeMap::new() };
        let recent = BTreeMap::new();
        let view = self.view(&recent, *from);
        let to = view.counted_at();
        self.state
            .services
            .keys()
            .map(|name| {
                let counted = view.counted_since(name, services.get(name).unwrap_or(nothing), *from);
                (name.clone(), Window::between(*from, to, &counted))
            })
            .collect()
    }

    /// Whether this is among the newest events.
    fn is_told(&self, announcement: &Announcement) -> bool {
        let newest = self.state.events.iter().rev().take(EVENTS_LOOKED_AT);
        newest.into_iter().any(|event| {
            let Announcement { kind, service, text } = announcement;
            event.kind == *kind && event.service == *service && event.text == *text
        })
    }

    /// What an earlier leader has said about a replica.
    fn told_before(&self, replica: ReplicaId) -> Announced {
        let events = &self.state.events;
        let about = format!("{replica} ");
        let told = events.iter().rev().find(|e| e.kind == Kind::ReplicaExited && e.text.starts_with(&about));
        // What is older than the oldest event was told, and has been forgotten.
        let forgotten = events.front().filter(|_| events.len() == EVENTS_MAX);
        Announced { exit: told.or(forgotten).map(|event| event.at), troubled: false }
    }

    /// What happened to replicas since it was last told.
    fn announcements(&mut self, now: Timestamp) -> Vec<Announcement> {
        let mut announcements = Vec::new();
        let mut announced = std::mem::take(&mut self.announced);
        announced.retain(|replica, _| self.state.placements.contains_key(replica));
        for (id, placement) in &self.state.placements {
            let Some(report) = self.inventory.replica(placement.node, *id) else { continue };
            let last = announced.entry(*id).or_insert_with(|| self.told_before(*id));
            announce(*id, report, last, now, &mut announcements);
        }
        self.announced = announced;
        announcements
    }
}

fn announce(
    id: ReplicaId,
    report: &ReplicaReport,
    last: &mut Announced,
    now: Timestamp,
    announcements: &mut Vec<Announcement>,
) {
    let mut say = |kind, text| announcements.push(Announcement { kind, service: Some(report.service.clone()), text });
    if let Some(exit) = &report.last_exit
        && last.exit.is_none_or(|at| exit.at > at)
        && report.phase != Phase::Stopping
        && report.phase != Phase::Gone
    {
        let often = report.restarts > EXITS_ANNOUNCED;
        let lately = last.exit.is_some_and(|at| now.since(at) < Duration::from_secs(60));
        if !(often && lately) {
            last.exit = Some(exit.at);
            let how =
                if exit.out_of_memory { ", out of memory".to_owned() } else { format!(" with code {}", exit.code) };
            let times = match report.failures {
                failures if failures >= why::CRASH_LOOP_AFTER => format!(", crash-looping ({failures} times)"),
                _ => String::new(),
            };
            say(Kind::ReplicaExited, format!("{id} exited{how} after {:.1} s{times}", exit.after_ms as f64 / 1000.0));
        }
    }
    let troubled = report.phase != Phase::Ready && report.trouble.is_some() && report.failures >= why::CRASH_LOOP_AFTER;
    if last.troubled && report.phase == Phase::Ready {
        last.troubled = false;
        say(Kind::ReplicaRecovered, format!("{id} is ready again"));
    }
    last.troubled |= troubled;
}

/// What a node is told of one replica: of what never changes in its life, and of what newer revisions may change.
/// `means` says which secret a name in a template stands for, `due` which run of a schedule it was given.
pub(crate) fn replica_goal(
    service: &ServiceName,
    revision: Revision,
    duty: Duty,
    template: &RevisionRecord,
    newest: &RevisionRecord,
    means: impl Fn(&str) -> Option<SecretName>,
    due: impl Fn(&str) -> Option<Timestamp>,
) -> ReplicaGoal {
    let spec = &template.spec;
    let schedules = newest.spec.schedules.iter();
    let secrets = spec.secrets().into_iter().filter_map(|name| Some((name.to_owned(), means(name)?))).collect();
    ReplicaGoal {
        service: service.clone(),
        revision,
        duty,
        workload: workload(spec, template),
        port: spec.port,
        env: spec.env.clone(),
        secrets,
        resources: spec.resources,
        liveness: newest.spec.liveness.clone(),
        readiness: newest.spec.readiness.clone(),
        runs: schedules.filter_map(|schedule| Some((schedule.cron.clone(), due(&schedule.cron)?))).collect(),
        deploy: newest.spec.deploy.clone(),
    }
}

fn workload(spec: &Service, record: &RevisionRecord) -> Workload {
    match &spec.source {
        Source::Image(image) => Workload::Container(Container {
            image: image.clone(),
            digest: record.digest.clone(),
            pull: record.pull && record.digest.is_none(),
            registry: spec.registry.clone(),
            command: spec.command.clone(),
            secrets_as: spec.secrets_as,
            volumes: spec.volumes.clone(),
            host: spec.host,
        }),
        Source::Module(module) => Workload::Module(ModuleGoal {
            path: module.path.clone(),
            digest: module.digest.clone().unwrap_or_default(),
            limits: spec.limits.clone(),
        }),
    }
}

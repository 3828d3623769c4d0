//! A seeded world: brains, network, runtimes, proxies and faults under one clock and one random number generator.
//! It steps until told, checks every invariant after each step, and the same seed gives the same run.
//!
//! Raft is not simulated again (control/ tests the real one): the log here is a list that proposals reach late, or
//! never when leadership is lost meanwhile.

pub mod invariant;
pub mod runtime;
pub mod workload;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use orca_cluster::command::{Applied, Command, Entry, NewNode};
use orca_cluster::event::Actor;
use orca_cluster::goal::Goal;
use orca_cluster::id::{NodeId, ReplicaId, ServiceName};
use orca_cluster::leader::{Leader, Order};
use orca_cluster::node::{ActionId, Condition, Finished, Found, Reconciler, Seen, Task};
use orca_cluster::replica::{Engine, Facts, Observed};
use orca_cluster::resource::{Cpu, Memory};
use orca_cluster::route::Tables;
use orca_cluster::secret::{Opaque, SealingPublicKey};
use orca_cluster::state::{PlacementState, State};
use orca_cluster::time::Timestamp;
use orca_cluster::traffic::Traffic;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use runtime::Runtime;

/// Which faults may happen, and how long they may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Faults {
    /// The leader loses its term; another begins later.
    pub leaders: bool,
    /// Agents are killed and come back from their ledger.
    pub agents: bool,
    /// Whole hosts lose power.
    pub hosts: bool,
    /// Someone kills or removes containers.
    pub containers: bool,
    /// Nodes are cut off from the leader for a while, sometimes for so long that they are given up.
    pub network: bool,
    /// Docker does not answer for a while, and cannot look into some containers for longer.
    pub engines: bool,
    /// A node's ledger cannot be written for a while: it takes no goal, and all else goes on by the one before.
    pub disks: bool,
}

/// One world.
#[derive(Debug)]
pub struct World {
    pub seed: u64,
    pub now: Timestamp,
    pub rng: StdRng,
    pub faults: Faults,
    /// Boxed: what is moved about is as long as the longest kind otherwise.
    queue: BTreeMap<(Timestamp, u64), Box<Happening>>,
    queued: u64,
    pub state: Arc<State>,
    pub log: Vec<Entry>,
    term: u64,
    pub leader: Option<Leader>,
    /// When the leader is woken next. It has one timer, as in its driver: a newer time replaces an older.
    leader_wakes: Option<Timestamp>,
    pub nodes: BTreeMap<NodeId, Node>,
    pub invariants: invariant::Ledger,
    /// What happened, newest last; printed when something is wrong.
    pub story: Vec<String>,
}

/// A machine: what survives its agent, and its agent.
#[derive(Debug)]
pub struct Node {
    pub id: NodeId,
    pub name: String,
    pub runtime: Runtime,
    ledger: Option<Goal>,
    /// When its agent, and with it its proxy, was started last.
    started: Timestamp,
    /// Counts restarts: what was meant for an earlier life is dropped.
    life: u64,
    pub brain: Option<Reconciler>,
    /// When it is woken next.
    wakes: Option<Timestamp>,
    /// What the proxy uses; it lives and dies with the agent and starts from the ledger.
    pub tables: Arc<Tables>,
    /// What it is about to use.
    applying: Arc<Tables>,
    pub cut_off: bool,
    disk_full: bool,
    attached: u64,
    /// When the last report sent arrives: a stream keeps its order.
    report_arrives: Timestamp,
}

#[derive(Debug)]
enum Happening {
    Commit { term: u64, command: Command },
    Elect,
    LeaderWakes { term: u64 },
    Report { term: u64, node: NodeId, observed: Box<Observed> },
    Goal { node: NodeId, life: u64, goal: Box<Goal> },
    AgentStarts { node: NodeId },
    AgentWakes { node: NodeId, life: u64 },
    AgentReports { node: NodeId, life: u64 },
    Finished { node: NodeId, life: u64, id: ActionId, finished: Finished },
    Seen { node: NodeId, life: u64, seen: Seen },
    Looks { node: NodeId, life: u64, replica: ReplicaId },
    Runtime { node: NodeId, event: runtime::Event },
    Heal { node: NodeId },
    EngineBack { node: NodeId },
    DiskFree { node: NodeId },
    Requests,
    Workload,
    Fault,
}

/// From a seed to a world with so many nodes.
#[derive(Debug, Clone, Copy)]
pub struct Setup {
    pub seed: u64,
    pub nodes: u64,
    pub faults: Faults,
}

const START: Timestamp = Timestamp(1_700_000_000_000);
/// A goal that could not be written down is taken up again after so many milliseconds.
const GOAL_RETRY: u64 = 500;

impl World {
    pub fn new(setup: Setup) -> World {
        let Setup { seed, nodes, faults } = setup;
        let mut world = World {
            seed,
            now: START,
            rng: StdRng::seed_from_u64(seed),
            faults,
            queue: BTreeMap::new(),
            queued: 0,
            state: Arc::default(),
            log: Vec::new(),
            term: 0,
            leader: None,
            leader_wakes: None,
            nodes: BTreeMap::new(),
            invariants: invariant::Ledger::default(),
            story: Vec::new(),
        };
        for number in 1..=nodes {
            let name = format!("n{number}");
            let node = NewNode {
                name: name.clone(),
                address: format!("10.0.0.{number}:6880"),
                sealing_key: SealingPublicKey(Opaque(Vec::new())),
            };
            world.commit(Command::Admit(node), Actor::Orca);
            let id = NodeId(world.log.len() as u64);
            let node = Node {
                id,
                name,
                runtime: Runtime::default(),
                ledger: None,
                started: START,
                life: 0,
                brain: None,
                wakes: None,
                tables: Arc::default(),
                applying: Arc::default(),
                cut_off: false,
                disk_full: false,
                attached: 0,
                report_arrives: START,
            };
            world.nodes.insert(id, node);
            world.at(0, Happening::AgentStarts { node: id });
        }
        world.commit(workload::data_key(&world), Actor::Orca);
        world.commit(workload::set_secret(&world), Actor::Orca);
        world.at(0, Happening::Elect);
        world.at(50, Happening::Requests);
        world
    }

    /// Lets random people and random faults in.
    pub fn let_loose(&mut self) {
        self.at(100, Happening::Workload);
        self.at(1_000, Happening::Fault);
    }

    /// Lets time pass, doing what is due.
    pub fn advance(&mut self, span: Duration) {
        let until = self.now + span;
        while let Some(entry) = self.queue.first_entry() {
            let (at, _) = *entry.key();
            if at > until {
                break;
            }
            let happening = *entry.remove();
            self.now = self.now.max(at);
            self.happen(happening);
            self.check();
        }
        self.now = until;
    }

    /// Lets time pass until nobody has anything to do, at most so long. False if it does not end.
    pub fn settle(&mut self, longest: Duration) -> bool {
        let until = self.now + longest;
        let mut quiet_since = self.now;
        let mut last = (self.state.generation, self.goals_sent());
        while self.now < until {
            self.advance(Duration::from_millis(500));
            let now = (self.state.generation, self.goals_sent());
            let away = |node: &Node| node.cut_off || node.brain.is_none() || node.runtime.engine_down || node.disk_full;
            if now != last || self.nodes.values().any(away) {
                last = now;
                quiet_since = self.now;
            }
            // Longer than any back-off that leads somewhere, and than a receipt takes to be completed.
            if self.now.since(quiet_since) >= Duration::from_secs(40) && self.leader.is_some() {
                return true;
            }
        }
        false
    }

    fn goals_sent(&self) -> u64 {
        self.leader
            .as_ref()
            .map_or(0, |leader| leader.sent().values().map(|(number, _)| number.count).max().unwrap_or(0))
    }

    /// A person's command, at the leader; whoever asked is told at once.
    pub fn command(&mut self, command: Command) -> Applied {
        self.tell(format!("person: {command:?}").chars().take(300).collect());
        let actor = Actor::Token { id: "t".to_owned(), name: "ops".to_owned() };
        let applied = self.commit(command, actor);
        self.told_state();
        applied
    }

    fn commit(&mut self, command: Command, actor: Actor) -> Applied {
        let entry = Entry { at: self.now, actor, source: None, command };
        let mut state = State::clone(&self.state);
        self.log.push(entry.clone());
        if let Command::Adopt { steps, .. } = &entry.command {
            self.tell(format!("the leader: {steps:?}").chars().take(300).collect());
        }
        let applied = state.apply(self.log.len() as u64, entry);
        state.invariants();
        self.state = Arc::new(state);
        invariant::schedule::check_skipped(self);
        applied
    }

    fn told_state(&mut self) {
        if let Some(leader) = &mut self.leader {
            leader.handle_state(Arc::clone(&self.state), self.now);
        }
        self.run_leader();
    }

    fn at(&mut self, millis: u64, happening: Happening) {
        self.queued += 1;
        self.queue.insert((self.now + Duration::from_millis(millis), self.queued), Box::new(happening));
    }

    pub fn tell(&mut self, line: String) {
        let since = self.now.since(START);
        let mut text = String::new();
        let _ = write!(text, "{:>9.3} {line}", since.as_secs_f64());
        self.story.push(text);
        if self.story.len() > 2_000 {
            self.story.drain(..1_000);
        }
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Commit { term, command } => self.commit_arrives(term, command),
            Happening::Elect => self.elect(),
            Happening::LeaderWakes { term } => {
                if self.term == term
                    && self.leader_wakes == Some(self.now)
                    && let Some(leader) = &mut self.leader
                {
                    self.leader_wakes = None;
                    leader.handle_timeout(self.now);
                    self.run_leader();
                }
            }
            Happening::Report { term, node, observed } => {
                if self.term == term
                    && !self.nodes.get(&node).is_some_and(|node| node.cut_off)
                    && let Some(leader) = &mut self.leader
                {
                    leader.handle_report(node, *observed, self.now);
                    self.run_leader();
                }
            }
            Happening::Goal { node, life, goal } => {
                if self.nodes.get(&node).is_some_and(|node| node.disk_full) {
                    self.at(GOAL_RETRY, Happening::Goal { node, life, goal });
                    return;
                }
                self.with_brain(node, life, |brain, now| brain.handle_goal(*goal, now));
            }
            Happening::AgentStarts { node } => self.start_agent(node),
            Happening::AgentWakes { node, life } => {
                let now = self.now;
                let Some(due) = self.nodes.get_mut(&node).filter(|node| node.life == life && node.wakes == Some(now))
                else {
                    return;
                };
                due.wakes = None;
                let mut overdue = None;
                self.with_brain(node, life, |brain, now| {
                    brain.handle_timeout(now);
                    overdue = brain.poll_timeout().filter(|(at, _)| *at <= now);
                    false
                });
                if let Some((_, why)) = overdue {
                    self.broken(&format!("{node} wants to be woken again for what is past: {why}"));
                }
            }
            Happening::AgentReports { node, life } => self.report(node, life),
            Happening::Finished { node, life, id, finished } => {
                if let Finished::Applied { number, .. } = &finished
                    && let Some(node) = self.nodes.get_mut(&node)
                    && node.life == life
                    && node.applying.number == *number
                {
                    // A newer goal may have come meanwhile: these are in use all the same.
                    node.tables = Arc::clone(&node.applying);
                }
                self.with_brain(node, life, |brain, now| {
                    brain.handle_finished(id, finished, now);
                    false
                });
            }
            Happening::Seen { node, life, seen } => {
                self.with_brain(node, life, |brain, now| {
                    brain.handle_seen(seen, now);
                    false
                });
            }
            Happening::Looks { node, life, replica } => self.looks(node, life, replica),
            Happening::Runtime { node, event } => self.runtime_event(node, event),
            Happening::Heal { node } => self.heal(node),
            Happening::EngineBack { node } => self.engine_back(node),
            Happening::DiskFree { node } => self.disk_free(node),
            Happening::Requests => self.requests(),
            Happening::Workload => {
                if let Some(pause) = workload::act(self) {
                    self.at(pause, Happening::Workload);
                }
            }
            Happening::Fault => self.fault(),
        }
    }

    fn commit_arrives(&mut self, term: u64, command: Command) {
        // A proposal of a lost term was either replicated in time or not.
        if term != self.term && self.rng.random_bool(0.5) {
            return;
        }
        self.commit(command, Actor::Orca);
        if let Some(leader) = &mut self.leader {
            leader.handle_state(Arc::clone(&self.state), self.now);
            if term == self.term {
                leader.handle_proposed(self.now);
            }
        }
        self.run_leader();
    }

    fn elect(&mut self) {
        self.term += 1;
        self.tell(format!("leader of term {}", self.term));
        self.leader = Some(Leader::new(self.term, Arc::clone(&self.state), self.now));
        self.leader_wakes = None;
        self.run_leader();
    }

    fn run_leader(&mut self) {
        let Some(leader) = &mut self.leader else { return };
        let mut orders = Vec::new();
        while let Some(order) = leader.poll_order() {
            orders.push(order);
        }
        let wake = leader.poll_timeout(self.now);
        invariant::first_judgement::check(self, orders.len());
        for order in orders {
            match order {
                Order::Propose(command) => {
                    invariant::availability::check(self, &command);
                    invariant::served::check_drains(self, &command);
                    let (term, delay) = (self.term, self.rng.random_range(1..30));
                    self.at(delay, Happening::Commit { term, command });
                }
                Order::SendGoal(node, goal) => {
                    let cut_off = self.nodes.get(&node).is_none_or(|node| node.cut_off);
                    let life = self.nodes.get(&node).map_or(0, |node| node.life);
                    if !cut_off {
                        let delay = self.rng.random_range(1..20);
                        self.at(delay, Happening::Goal { node, life, goal });
                    }
                }
            }
        }
        let wake = wake.map(|(at, _)| at.max(self.now + Duration::from_millis(1)));
        if wake != self.leader_wakes {
            self.leader_wakes = wake;
            if let Some(at) = wake {
                let term = self.term;
                self.at(at.since(self.now).as_millis() as u64, Happening::LeaderWakes { term });
            }
        }
    }

    fn start_agent(&mut self, id: NodeId) {
        let now = self.now;
        // It may have lost power twice before it came back.
        let Some(node) = self.nodes.get_mut(&id).filter(|node| node.brain.is_none()) else { return };
        node.life += 1;
        node.started = now;
        let ledger = node.ledger.clone();
        node.tables = Arc::new(ledger.as_ref().map(|goal| goal.tables.clone()).unwrap_or_default());
        node.brain = Some(Reconciler::new(ledger, now));
        node.wakes = None;
        let life = node.life;
        let engine_down = node.runtime.engine_down;
        self.tell(format!("agent of {id} starts"));
        if !engine_down {
            self.list(id, 20);
        }
        self.at(5, Happening::AgentReports { node: id, life });
        self.run_brain(id);
    }

    fn with_brain(&mut self, id: NodeId, life: u64, drive: impl FnOnce(&mut Reconciler, Timestamp) -> bool) {
        let now = self.now;
        let Some(node) = self.nodes.get_mut(&id) else { return };
        if node.life != life {
            return;
        }
        let Some(brain) = &mut node.brain else { return };
        let before = brain.goal().number;
        if drive(brain, now) {
            node.ledger = Some(brain.goal().clone());
        }
        brain.invariants();
        let after = brain.goal().number;
        invariant::generation::check(self, id, before, after);
        self.run_brain(id);
    }

    fn run_brain(&mut self, id: NodeId) {
        let now = self.now;
        let Some(node) = self.nodes.get_mut(&id) else { return };
        let Some(brain) = &mut node.brain else { return };
        let life = node.life;
        let mut actions = Vec::new();
        while let Some(action) = brain.poll_action() {
            actions.push(action);
        }
        let wake = brain.poll_timeout().map(|(at, _)| at.max(now + Duration::from_millis(1)));
        let rearmed = wake != node.wakes;
        node.wakes = wake;
        let changed = brain.take_changed();
        invariant::busy::check(self, id, actions.len());
        for action in actions {
            invariant::drained::check(self, id, &action.task);
            invariant::schedule::check(self, id, &action.task);
            let Some(node) = self.nodes.get_mut(&id) else { return };
            if let Task::Apply { tables, .. } = &action.task {
                node.applying = Arc::clone(tables);
            }
            let done = node.runtime.carry_out(&action.task, now, &mut self.rng);
            for (millis, event) in done.events {
                self.at(millis, Happening::Runtime { node: id, event });
            }
            let finished = done.finished;
            self.at(done.millis, Happening::Finished { node: id, life, id: action.id, finished });
        }
        if rearmed && let Some(at) = wake {
            self.at(at.since(now).as_millis() as u64, Happening::AgentWakes { node: id, life });
        }
        if changed {
            self.send_report(id);
        }
    }

    fn report(&mut self, id: NodeId, life: u64) {
        let Some(node) = self.nodes.get(&id) else { return };
        if node.life != life {
            return;
        }
        let Some(brain) = &node.brain else { return };
        let interval = brain.report_interval().as_millis() as u64;
        self.send_report(id);
        self.at(interval, Happening::AgentReports { node: id, life });
    }

    fn send_report(&mut self, id: NodeId) {
        let (now, term) = (self.now, self.term);
        let Some(node) = self.nodes.get_mut(&id) else { return };
        let Some(brain) = &node.brain else { return };
        if node.cut_off || !brain.is_oriented(now) {
            return;
        }
        let (replicas, acknowledged) = brain.observed();
        let (services, in_flight) = (node.runtime.counted(), node.runtime.in_flight());
        let traffic = Traffic { at: now, started: node.started, gaps: 0, services, in_flight };
        let facts = Facts {
            memory: Memory(8 << 30),
            cpu: Cpu(8_000),
            containers: match node.runtime.engine_down {
                false => Engine::Ready { version: "sim".to_owned() },
                true => Engine::Unreachable { reason: "connection refused".to_owned() },
            },
            ..Facts::default()
        };
        // The first report of a session, to a leader it did not know before, makes it send its goal again.
        let fresh = node.attached != term * 1_000_000 + node.life;
        node.attached = term * 1_000_000 + node.life;
        if fresh && let Some(leader) = &mut self.leader {
            leader.handle_connected(id);
        }
        let observed = Box::new(Observed { at: now, replicas, acknowledged, traffic, facts });
        let arrives = (now + Duration::from_millis(self.rng.random_range(1..20))).max(node.report_arrives);
        node.report_arrives = arrives;
        let delay = arrives.since(now).as_millis() as u64;
        self.at(delay, Happening::Report { term, node: id, observed });
    }

    fn runtime_event(&mut self, id: NodeId, event: runtime::Event) {
        let now = self.now;
        let Some(node) = self.nodes.get_mut(&id) else { return };
        let life = node.life;
        if let Some(seen) = node.runtime.happens(event, now) {
            self.at(2, Happening::Seen { node: id, life, seen });
        }
    }

    /// Every proxy gets some requests.
    fn requests(&mut self) {
        let ids: Vec<NodeId> = self.nodes.keys().copied().collect();
        for id in ids {
            let Some(node) = self.nodes.get_mut(&id) else { continue };
            if node.brain.is_none() {
                continue;
            }
            let tables = Arc::clone(&node.tables);
            let mut begun = Vec::new();
            for (service, upstream) in &tables.services {
                if upstream.backends.is_empty() || !self.rng.random_bool(0.6) {
                    continue;
                }
                let backend = &upstream.backends[self.rng.random_range(0..upstream.backends.len())];
                let millis = match self.rng.random_range(0..40) {
                    0 => 8_000,
                    1..4 => 900,
                    _ => 30,
                };
                begun.push((service.clone(), backend.replica, backend.revision, millis));
            }
            for (service, replica, revision, millis) in begun {
                let errs = self.nodes.values().any(|node| node.runtime.errs(replica));
                if let Some(node) = self.nodes.get_mut(&id) {
                    let request = node.runtime.begin_request(service, replica, revision, errs);
                    self.at(millis, Happening::Runtime { node: id, event: request });
                }
            }
        }
        self.at(100, Happening::Requests);
    }

    fn fault(&mut self) {
        let ids: Vec<NodeId> = self.nodes.keys().copied().collect();
        let id = ids[self.rng.random_range(0..ids.len())];
        match self.rng.random_range(0..7) {
            0 if self.faults.leaders => {
                self.tell("the leader is lost".to_owned());
                self.leader = None;
                let delay = self.rng.random_range(300..3_000);
                self.at(delay, Happening::Elect);
            }
            1 if self.faults.agents => self.kill_agent(id),
            2 if self.faults.hosts => {
                self.tell(format!("{id} loses power"));
                let now = self.now;
                if let Some(node) = self.nodes.get_mut(&id) {
                    node.runtime.power_cut(now);
                    node.brain = None;
                    node.life += 1;
                }
                let longest = if self.rng.random_bool(0.2) { 60_000 } else { 8_000 };
                let delay = self.rng.random_range(1_000..longest);
                self.at(delay, Happening::AgentStarts { node: id });
            }
            3 if self.faults.containers => {
                let pick = self.rng.random::<u64>();
                if let Some((replica, event)) = self.nodes.get(&id).and_then(|node| node.runtime.victim(pick)) {
                    self.tell(format!("someone kills {replica} on {id}"));
                    self.at(0, Happening::Runtime { node: id, event });
                }
            }
            4 if self.faults.network => {
                self.cut_off(id);
                let longest = if self.rng.random_bool(0.2) { 60_000 } else { 12_000 };
                let delay = self.rng.random_range(500..longest);
                self.at(delay, Happening::Heal { node: id });
            }
            5 if self.faults.engines => {
                self.engine_fails(id);
                let delay = self.rng.random_range(500..8_000);
                self.at(delay, Happening::EngineBack { node: id });
            }
            6 if self.faults.disks => {
                self.disk_full(id);
                let delay = self.rng.random_range(500..20_000);
                self.at(delay, Happening::DiskFree { node: id });
            }
            _ => {}
        }
        if self.faults != Faults::default() {
            let pause = self.rng.random_range(500..10_000);
            self.at(pause, Happening::Fault);
        }
    }

    /// Nothing it says arrives, and nothing is said to it.
    pub fn cut_off(&mut self, id: NodeId) {
        self.tell(format!("{id} is cut off"));
        if let Some(node) = self.nodes.get_mut(&id) {
            node.cut_off = true;
        }
    }

    pub fn heal(&mut self, id: NodeId) {
        self.tell(format!("{id} is reached again"));
        if let Some(node) = self.nodes.get_mut(&id) {
            node.cut_off = false;
            // Its session broke, and what was sent meanwhile is lost: it attaches anew.
            node.attached = 0;
        }
    }

    pub fn engine_fails(&mut self, id: NodeId) {
        self.tell(format!("the engine of {id} fails"));
        if let Some(node) = self.nodes.get_mut(&id) {
            node.runtime.engine_down = true;
        }
    }

    pub fn engine_back(&mut self, id: NodeId) {
        self.tell(format!("the engine of {id} answers again"));
        let Some(node) = self.nodes.get_mut(&id) else { return };
        node.runtime.engine_down = false;
        self.list(id, 10);
    }

    /// All that the engine of a node has; where engines fail, it cannot look into some of it before a while later.
    fn list(&mut self, id: NodeId, millis: u64) {
        let Some(node) = self.nodes.get(&id) else { return };
        let (life, mut found) = (node.life, node.runtime.list(self.now));
        for Found { replica, condition, .. } in &mut found {
            if self.faults.engines && self.rng.random_bool(0.2) {
                self.tell(format!("the engine of {id} cannot look into {replica}"));
                let (container, reason) = (replica.to_string(), "unexpectedly nil".to_owned());
                *condition = Condition::Unreadable { container, reason };
                let delay = self.rng.random_range(100..8_000);
                self.at(delay, Happening::Looks { node: id, life, replica: *replica });
            }
        }
        self.at(millis, Happening::Seen { node: id, life, seen: Seen::All(found) });
    }

    /// The engine is asked again about one that it could not look into.
    fn looks(&mut self, id: NodeId, life: u64, replica: ReplicaId) {
        let Some(node) = self.nodes.get(&id).filter(|node| !node.runtime.engine_down) else { return };
        if let Some(found) = node.runtime.list(self.now).into_iter().find(|found| found.replica == replica) {
            // As long as an event takes, so that what happened before it is told before it.
            self.at(2, Happening::Seen { node: id, life, seen: Seen::Found(found) });
        }
    }

    pub fn disk_full(&mut self, id: NodeId) {
        self.tell(format!("{id} cannot write its ledger"));
        if let Some(node) = self.nodes.get_mut(&id) {
            node.disk_full = true;
        }
    }

    pub fn disk_free(&mut self, id: NodeId) {
        self.tell(format!("{id} can write its ledger again"));
        if let Some(node) = self.nodes.get_mut(&id) {
            node.disk_full = false;
        }
    }

    /// The leader is lost and another one begins at once.
    pub fn change_leader(&mut self) {
        self.elect();
    }

    pub fn kill_agent(&mut self, id: NodeId) {
        self.tell(format!("agent of {id} is killed"));
        if let Some(node) = self.nodes.get_mut(&id) {
            node.brain = None;
            node.life += 1;
            node.runtime.proxy_lost();
        }
        let delay = self.rng.random_range(100..2_000);
        self.at(delay, Happening::AgentStarts { node: id });
    }

    pub fn kill_container(&mut self, replica: ReplicaId) {
        let on = self.nodes.iter().find_map(|(id, node)| Some((*id, node.runtime.kill(replica)?)));
        if let Some((node, event)) = on {
            self.at(0, Happening::Runtime { node, event });
        }
    }

    fn check(&mut self) {
        invariant::exclusive_volume::check(self);
        invariant::tables::check(self);
        invariant::served::check(self);
        invariant::drained::note(self);
    }

    /// What holds when everything has come to rest.
    pub fn check_settled(&self) {
        invariant::same_log::check(self);
        invariant::settled::check(self);
    }

    /// A broken promise ends the run, with all that led to it.
    pub fn broken(&self, promise: &str) -> ! {
        let story = self.story.iter().rev().take(80).rev().cloned().collect::<Vec<_>>().join("\n");
        panic!("{promise}\n\nthe last that happened:\n{story}\n\nreplay: cargo xtask sim --seed {:#x}\n", self.seed);
    }

    /// Each service in one line: `app/web v2: r4 on n1 ready, r5 on n2 starting`.
    pub fn describe(&self) -> String {
        let mut text = String::new();
        for (name, deployed) in &self.state.services {
            let _ = write!(text, "{name} {}", deployed.target);
            if let Some(rollout) = &deployed.rollout {
                let back = if rollout.direction == orca_cluster::state::Direction::Forward { "" } else { " back" };
                let _ = write!(text, " (rolling out {}{back})", rollout.to);
            }
            let _ = write!(text, ":");
            for (at, (id, placement)) in self.state.placements_of(name).enumerate() {
                let node = self.state.nodes.get(&placement.node).map_or("?", |node| node.name.as_str());
                let phase = self
                    .nodes
                    .get(&placement.node)
                    .and_then(|node| node.brain.as_ref())
                    .and_then(|brain| Some(brain.observed().0.get(&id)?.phase))
                    .map_or("unheard of", orca_cluster::why::phase_word);
                let leaving = match placement.state {
                    PlacementState::Serve => "",
                    PlacementState::Drain { .. } => " drains",
                    PlacementState::Stop { .. } => " stops",
                };
                let comma = if at == 0 { "" } else { "," };
                let _ = write!(text, "{comma} {id} ({}) on {node} {phase}{leaving}", placement.revision);
            }
            text.push('\n');
        }
        text
    }

    pub fn service(&self, text: &str) -> ServiceName {
        text.parse().expect("stories name services as project/service")
    }
}

/// One seed from beginning to end: faults, then none, then everything as asked. Panics with the story if a promise
/// is broken. Each seed leaves some classes of faults out, so that others get room.
pub fn run_seed(seed: u64) -> World {
    let mut dice = StdRng::seed_from_u64(seed ^ 0x6f72_6361);
    let faults = Faults {
        leaders: dice.random_bool(0.5),
        agents: dice.random_bool(0.5),
        hosts: dice.random_bool(0.3),
        containers: dice.random_bool(0.5),
        network: dice.random_bool(0.4),
        engines: dice.random_bool(0.3),
        disks: dice.random_bool(0.3),
    };
    let nodes = dice.random_range(1..4);
    let mut world = World::new(Setup { seed, nodes, faults });
    // In some, so that the others come to rest sooner.
    if seed.is_multiple_of(4) {
        world.command(workload::deploy_job(&format!("replicas = {nodes}")));
    }
    world.let_loose();
    world.advance(Duration::from_secs(dice.random_range(20..90)));
    world.tell("the faults are over".to_owned());
    world.faults = Faults::default();
    world.end_canaries();
    if !world.settle(Duration::from_secs(900)) {
        world.broken(&format!("it does not settle:\n{}", world.describe()));
    }
    world.check_settled();
    invariant::unchanged::check(&mut world);
    world
}

impl World {
    /// A canary waits for a person for ever; here comes one.
    fn end_canaries(&mut self) {
        let names: Vec<ServiceName> = self.state.services.keys().cloned().collect();
        for service in names {
            self.command(Command::Promote { service });
        }
    }
}

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
use crate::event::{self, Kind};
use crate::goal::{Duty, Goal, ReplicaGoal, replica_goal};
use crate::id::{Generation, GoalNumber, NodeId, ReplicaId, ServiceName};
use crate::inventory::{Inventory, SUSPECT_AFTER};
use crate::plan::{cron, plan, rollout, route};
use crate::replica::{Observed, Phase, ReplicaReport};
use crate::route::Tables;
use crate::secret::SecretName;
use crate::state::{Deployed, Placement, PlacementState, RevisionRecord, State, Window};
use crate::time::Timestamp;
use crate::traffic::Tally;
use crate::view::View;
use crate::waiting::Waiting;
use crate::why;

/// How far back `before` in a receipt looks.
const RECENT: Duration = Duration::from_secs(60);
/// One sample of the counters for each of these.
const SAMPLE_EVERY: Duration = Duration::from_secs(5);
/// Newest events among which a proposal's own are found once it is applied: more than people cause meanwhile.
const EVENTS_LOOKED_AT: usize = 200;
/// Announced by one proposal at most, so that it finds its own again; the rest is for the next ones.
const ANNOUNCED_AT_ONCE: usize = EVENTS_LOOKED_AT / 2;
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
    /// The secrets that each node was last sent, by their versions: a goal may be the same but for what they say.
    secrets_sent: BTreeMap<NodeId, BTreeMap<SecretName, u32>>,
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
            secrets_sent: BTreeMap::new(),
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
        let tables = route::tables(self.view(&BTreeMap::new(), now));
        self.send_goals(&tables);
        self.note_drains(now);
        let recent = self.recent();
        let made = plan(self.view(&recent, now), &tables);
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
    fn send_goals(&mut self, tables: &Tables) {
        let mut changed = Vec::new();
        for node in self.state.nodes.keys() {
            if self.inventory.heard(*node).is_none() {
                continue;
            }
            let replicas = self.replica_goals(*node);
            let goal = Goal { replicas, tables: tables.clone(), ..Goal::default() };
            let secrets = self.secret_versions(&goal);
            let same = self.goals.get(node).is_some_and(|last| {
                last.replicas == goal.replicas
                    && last.tables.routes == goal.tables.routes
                    && last.tables.services == goal.tables.services
                    && self.secrets_sent.get(node) == Some(&secrets)
                    && !self.owes_acknowledgement(*node)
            });
            if !same {
                changed.push((*node, goal, secrets));
            }
        }
        for (node, mut goal, secrets) in changed {
            self.goals_sent += 1;
            goal.number = GoalNumber { term: self.term, count: self.goals_sent };
            goal.generation = self.state.generation;
            goal.tables.number = goal.number;
            goal.tables.generation = goal.generation;
            self.sent.insert(node, (goal.number, goal.generation));
            self.secrets_sent.insert(node, secrets);
            self.goals.insert(node, goal.clone());
            self.orders.push_back(Order::SendGoal(node, Box::new(goal)));
        }
    }

    /// The secrets that the replicas of a goal refer to. Sealing one anew leaves its version.
    fn secret_versions(&self, goal: &Goal) -> BTreeMap<SecretName, u32> {
        let names = goal.replicas.values().flat_map(|replica| replica.secrets.values());
        names.filter_map(|name| Some((name.clone(), self.state.secrets.get(name)?.version))).collect()
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

    /// The drain time of a replica counts from when the proxies have let go of it, not from when that was decided.
    fn note_drains(&mut self, now: Timestamp) {
        let recent = BTreeMap::new();
        let view = self.view(&recent, now);
        let drains = self.state.placements.iter().filter_map(|(id, placement)| match placement.state {
            PlacementState::Drain { since, .. } => Some((*id, since)),
            PlacementState::Serve | PlacementState::Stop { .. } => None,
        });
        let unrouted = drains.filter(|(_, since)| view.acknowledged_by_heard(*since)).map(|(id, _)| id).collect();
        self.inventory.note_unrouted(&unrouted, now);
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
        // Also of a schedule that is not wanted any more: what was begun is followed to its end, and not forgotten and
        // begun again should it be wanted once more.
        let given = deployed.schedules.iter().filter_map(|(cron, record)| Some((cron, record.run?)));
        let runs = given.filter(|(_, run)| run.replica == id).map(|(cron, run)| (cron.clone(), run.due)).collect();
        replica_goal(&placement.service, placement.revision, duty, template, newest, means, runs)
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
            let Announcement { kind, service, replica, text } = announcement;
            event.kind == *kind && event.service == *service && event.replica == *replica && event.text == *text
        })
    }

    /// What an earlier leader has said about a replica.
    fn told_before(&self, replica: ReplicaId) -> Announced {
        let events = &self.state.events;
        let told = events.iter().rev().find(|e| e.kind == Kind::ReplicaExited && e.replica == Some(replica));
        // What is older than that was told, and has been forgotten.
        let exit = told.map(|event| event.at).or_else(|| event::complete_since(events));
        Announced { exit, troubled: false }
    }

    /// What happened to replicas since it was last told, as much of it as one proposal tells.
    fn announcements(&mut self, now: Timestamp) -> Vec<Announcement> {
        let mut announcements = Vec::new();
        let mut announced = std::mem::take(&mut self.announced);
        announced.retain(|replica, _| self.state.placements.contains_key(replica));
        for (id, placement) in &self.state.placements {
            // A replica may have two things to tell.
            if announcements.len() + 2 > ANNOUNCED_AT_ONCE {
                break;
            }
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
    let mut say = |kind, text| {
        let service = Some(report.service.clone());
        announcements.push(Announcement { kind, service, replica: Some(id), text });
    };
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::put::tests::put;
    use crate::command::{Applied, Entry, NewNode};
    use crate::event::Actor;
    use crate::id::Revision;
    use crate::replica::{Ending, Exit, Usage};
    use crate::secret::{Ciphertext, DataKeyId, Opaque, Scope, SealedDataKey, SealedValue, SealingPublicKey};
    use crate::state::{Run, ScheduleRecord};

    const NODE: NodeId = NodeId(1);

    struct World {
        state: State,
        index: u64,
        now: Timestamp,
    }

    impl World {
        /// `shop` with these services, on one node.
        fn new(services: &str) -> World {
            let mut world = World { state: State::default(), index: 0, now: Timestamp(1_000_000) };
            let sealing_key = SealingPublicKey(Opaque(vec![]));
            let node = NewNode { name: "one".into(), address: "one:1".into(), sealing_key };
            world.apply(Command::Admit(node));
            let id = DataKeyId { scope: Scope::Global, version: 1 };
            let key = Ciphertext { nonce: Opaque(vec![]), bytes: Opaque(vec![]) };
            let key = SealedDataKey { id, root: 1, created: Timestamp(1), key };
            world.apply(Command::NewDataKey { key, rotates: false });
            world.set_secret(1);
            world.apply(Command::PutServices(put("shop", services)));
            world
        }

        fn apply(&mut self, command: Command) {
            self.index += 1;
            let entry = Entry { at: self.now, actor: Actor::Orca, source: None, command };
            let applied = self.state.apply(self.index, entry);
            assert!(matches!(applied, Applied::Done { .. }), "{applied:?}");
        }

        fn set_secret(&mut self, version: u32) {
            let value = Ciphertext { nonce: Opaque(vec![]), bytes: Opaque(vec![]) };
            let key = DataKeyId { scope: Scope::Global, version: 1 };
            let value = SealedValue { key, version, value };
            self.apply(Command::SetSecret { name: "KEY".parse().unwrap(), version, value });
        }

        /// A replica of `shop/web`, whatever a plan would say.
        fn place(&mut self) -> ReplicaId {
            self.state.replicas_made += 1;
            let id = ReplicaId(self.state.replicas_made);
            let (service, revision) = ("shop/web".parse().unwrap(), Revision(1));
            let state = PlacementState::Serve;
            self.state.placements.insert(id, Placement { service, revision, node: NODE, since: self.now, state });
            id
        }

        fn leader(&self) -> Leader {
            Leader::new(1, Arc::new(self.state.clone()), self.now)
        }
    }

    fn goals(leader: &mut Leader) -> Vec<Goal> {
        let orders = std::iter::from_fn(|| leader.poll_order());
        let goals = orders.filter_map(|order| match order {
            Order::SendGoal(_, goal) => Some(*goal),
            Order::Propose(_) => None,
        });
        goals.collect()
    }

    #[test]
    fn more_exits_than_one_proposal_tells_are_told_by_several_and_each_once() {
        const COUNT: usize = 3 * EVENTS_LOOKED_AT;
        let mut world = World::new("[[service]]\nname = \"web\"\nimage = \"web:1\"\nreplicas = 500\n");
        let replicas: Vec<ReplicaId> = (0..COUNT).map(|_| world.place()).collect();
        let exit = Exit {
            at: world.now,
            code: 1,
            out_of_memory: false,
            after_ms: 1_000,
            last_lines: vec![],
            ending: Ending::default(),
        };
        let report = ReplicaReport {
            service: "shop/web".parse().unwrap(),
            revision: Revision(1),
            phase: Phase::Starting,
            since: world.now,
            address: None,
            digest: None,
            restarts: 1,
            failures: 1,
            last_exit: Some(exit),
            trouble: None,
            usage: Usage::default(),
            pulled: None,
            pulling: None,
            ready_after_ms: None,
            on_trial: false,
            runs: BTreeMap::new(),
        };
        let replicas = replicas.into_iter().map(|id| (id, report.clone())).collect();
        let mut leader = world.leader();
        let now = world.now;
        leader.handle_report(NODE, Observed { at: now, replicas, ..Observed::default() }, now);
        let mut told = Vec::new();
        for _ in 0..COUNT {
            let Some(order) = leader.poll_order() else { break };
            let Order::Propose(command) = order else { continue };
            let (Command::Announce(announcements) | Command::Adopt { announcements, .. }) = &command else { panic!() };
            told.extend(announcements.iter().map(|announcement| announcement.text.clone()));
            world.apply(command);
            leader.handle_state(Arc::new(world.state.clone()), now);
            leader.handle_proposed(now);
        }
        let distinct: std::collections::BTreeSet<_> = told.iter().collect();
        assert_eq!((told.len(), distinct.len()), (COUNT, COUNT));
        let announces = std::iter::from_fn(|| leader.poll_order()).any(|order| match order {
            Order::Propose(Command::Announce(announcements) | Command::Adopt { announcements, .. }) => {
                !announcements.is_empty()
            }
            Order::Propose(_) | Order::SendGoal(..) => false,
        });
        assert!(!announces, "all of it is told");
    }

    #[test]
    fn a_new_value_of_a_secret_is_sent_and_changes_no_replica() {
        let text = "[[service]]\nname = \"web\"\nimage = \"web:1\"\n[service.env]\nKEY = \"${secrets.KEY}\"\n";
        let mut world = World::new(text);
        world.place();
        let mut leader = world.leader();
        let now = world.now;
        let heard = || Observed { at: now, ..Observed::default() };
        leader.handle_report(NODE, heard(), now);
        let first = goals(&mut leader).pop().unwrap();
        leader.handle_report(NODE, heard(), now);
        assert_eq!(goals(&mut leader), []);
        world.set_secret(2);
        leader.handle_state(Arc::new(world.state.clone()), now);
        let sent = goals(&mut leader);
        let [second] = sent.as_slice() else { panic!("{} goals", sent.len()) };
        assert!(second.number > first.number && second.replicas == first.replicas);
    }

    #[test]
    fn a_run_is_the_replicas_until_it_is_over_also_of_a_schedule_that_was_taken_out() {
        let mut world = World::new("[[service]]\nname = \"web\"\nimage = \"web:1\"\n");
        let (r1, due) = (world.place(), world.now);
        let record = ScheduleRecord { run: Some(Run { due, replica: r1 }), ..ScheduleRecord::default() };
        let web = world.state.services.get_mut(&"shop/web".parse().unwrap()).unwrap();
        web.schedules.insert("0 10 * * *".to_owned(), record);
        let mut leader = world.leader();
        leader.handle_report(NODE, Observed { at: due, ..Observed::default() }, due);
        let goal = goals(&mut leader).pop().unwrap();
        assert_eq!(goal.replicas[&r1].runs, BTreeMap::from([("0 10 * * *".to_owned(), due)]));
    }
}

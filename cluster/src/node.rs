//! The brain of a node: given its goal and what its runtimes report, what to do next. It keeps working with the
//! last goal when no control node can be reached, never acts on a smaller goal after a larger, stops before it
//! starts where a volume is shared, and says about every replica why it is not there yet.
//!
//! Driven like every brain here: `handle_*` puts facts in, [`Reconciler::poll_action`] takes instructions out,
//! [`Reconciler::poll_timeout`] says when to call [`Reconciler::handle_timeout`] and why.

pub mod backoff;
pub mod health;
mod replica;
mod run;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::ops::Bound;
use std::sync::Arc;
use std::time::Duration;

use crate::goal::{Duty, Goal, RUN_WITHIN, ReplicaGoal, Workload};
use crate::id::{Generation, GoalNumber, ReplicaId, Revision, ServiceName};
use crate::inventory::REPORT_INTERVAL;
pub use crate::replica::Purpose;
use crate::replica::{Cause, Phase, Pulled, Pulling, ReplicaReport, RunState, Saw, Usage};
use crate::route::Tables;
use crate::secret::{Sealed, SecretName};
use crate::spec::Check;
use crate::time::Timestamp;
use crate::traffic::Legacy;
use replica::{Doing, Replica, Stage, Want};
use run::Runs;

/// Names one [`Action`], so that its result finds its way back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ActionId(pub u64);

/// An instruction with all details filled in: carrying it out takes no decision.
#[derive(Debug, Clone)]
pub struct Action {
    pub id: ActionId,
    pub task: Task,
}

#[derive(Debug, Clone)]
pub enum Task {
    /// Have the image (or the module's bytes, compiled) on this node. Ends in [`Finished::Fetched`].
    Fetch { replica: ReplicaId, goal: Arc<ReplicaGoal>, secrets: Arc<Secrets> },
    /// Create the container, under the replica's labels, from the image with this id. Ends in [`Finished::Created`].
    Create { replica: ReplicaId, goal: Arc<ReplicaGoal>, image: String, secrets: Arc<Secrets> },
    /// Start what was created or has exited. Ends in [`Finished::Started`].
    Start { replica: ReplicaId, goal: Arc<ReplicaGoal>, secrets: Arc<Secrets> },
    /// Ends in [`Finished::Probed`].
    Probe { replica: ReplicaId, purpose: Purpose, check: Check, address: Option<SocketAddr>, timeout: Duration },
    /// Look at which sockets the replica's processes listen on. Ends in [`Finished::Listening`].
    Inspect { replica: ReplicaId },
    /// Ask it to end, and end it after `grace`. Ends in [`Finished::Stopped`] when it no longer runs.
    Stop { replica: ReplicaId, grace: Duration },
    /// Take its remains away, with its volumes if `erase`. No goal: it was found here and belongs to nothing; its
    /// labels say what it is. Ends in [`Finished::Removed`].
    Remove { replica: ReplicaId, service: ServiceName, goal: Option<Arc<ReplicaGoal>>, erase: bool },
    /// Give the data plane these tables. Ends in [`Finished::Applied`] when every worker uses them;
    /// anything else, and they are given once more.
    Apply { tables: Arc<Tables>, generation: Generation },
    /// Run the module's command once, because its schedule said so. It may have to wait for what the replica does
    /// besides, and begins before `until` or not at all. Ends in [`Finished::Ran`].
    Run { replica: ReplicaId, cron: String, due: Timestamp, until: Timestamp },
}

/// The sealed secrets of a goal; opened by the hands when a replica is created and forgotten at once.
pub type Secrets = BTreeMap<SecretName, Sealed>;

/// How an action ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finished {
    /// `image` is the id to create from; `digest` is what identifies the same bytes anywhere, if anything does.
    Fetched {
        image: String,
        digest: Option<String>,
        pulled: Option<Pulled>,
    },
    Created,
    Started {
        address: Option<SocketAddr>,
    },
    Probed(Result<(), Saw>),
    Listening(Option<Vec<SocketAddr>>),
    Stopped,
    Removed,
    Applied {
        number: GoalNumber,
        generation: Generation,
    },
    /// Done, failed or not begun.
    Ran(RunState),
    Failed(Cause),
}

/// What a runtime reports by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seen {
    /// Everything of ours that this runtime has: at start, and again after any gap in its events.
    All(Vec<Found>),
    /// One of these that could not be looked into until now.
    Found(Found),
    /// One replica's process has ended.
    Exited { replica: ReplicaId, exited: Exited },
    /// Someone else started one again, or it came back with another address.
    Running { replica: ReplicaId, address: Option<SocketAddr> },
    /// Someone else removed it.
    Vanished { replica: ReplicaId },
}

/// A replica that a runtime has, from its labels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    pub replica: ReplicaId,
    pub service: ServiceName,
    pub revision: Revision,
    pub digest: Option<String>,
    pub condition: Condition,
}

/// An unreadable one is there, and the runtime cannot say more of it now: it is asked again, and tells it when it can.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    Created,
    Running { address: Option<SocketAddr>, since: Timestamp },
    Exited(Exited),
    Unreadable { container: String, reason: String },
}

/// How a process ended, as its runtime tells it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Exited {
    pub code: i64,
    pub out_of_memory: bool,
    /// Oldest first.
    pub last_lines: Vec<String>,
}

/// How long a restarted node keeps silent about replicas it has not found again: a first report that calls running
/// replicas unready would take them out of the routes.
pub const ORIENTATION_MAX: Duration = Duration::from_secs(5);
/// How long the first tables of a node that restarts wait for the modules they name, where nobody loses by it: connections
/// wait meanwhile, or a predecessor serves them. After an update each may have to be compiled anew, which takes a second or so.
const MODULES_MAX: Duration = Duration::from_secs(45);
/// See [`Reconciler::report_interval`].
const DRAIN_REPORT_INTERVAL: Duration = Duration::from_millis(100);
/// Between two tries to put tables into use.
const APPLY_PAUSE: Duration = Duration::from_secs(1);
/// A replica that is in no goal any more is given this long between SIGTERM and SIGKILL.
const ORPHAN_GRACE: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub struct Reconciler {
    goal: Goal,
    /// Shared by every action made from this goal.
    secrets: Arc<Secrets>,
    replicas: BTreeMap<ReplicaId, Replica>,
    /// What each action under way is about.
    under_way: BTreeMap<ActionId, ReplicaId>,
    actions: VecDeque<Action>,
    last_action: u64,
    /// The tables being applied, and those that are to be next.
    applying: Option<ActionId>,
    /// The last ones could not be applied; not before this are tables tried again.
    apply_after: Option<Timestamp>,
    applied: (GoalNumber, Generation),
    /// Nothing is touched before a goal, from the ledger or a leader, says what belongs here.
    has_goal: bool,
    found: bool,
    begun: Timestamp,
    oriented_by: Timestamp,
    /// It has once been so; a replica that is being fetched later does not silence the node again.
    oriented: bool,
    runs: Runs,
    /// Of the proxy that ran here before ours and has handed over to it.
    legacy: Option<Legacy>,
    changed: bool,
}

impl Reconciler {
    /// A node that starts: with the goal of its ledger, if it has one.
    pub fn new(ledger: Option<Goal>, now: Timestamp) -> Reconciler {
        let mut reconciler = Reconciler {
            goal: Goal::default(),
            secrets: Arc::default(),
            replicas: BTreeMap::new(),
            under_way: BTreeMap::new(),
            actions: VecDeque::new(),
            last_action: 0,
            applying: None,
            apply_after: None,
            applied: Default::default(),
            has_goal: false,
            found: false,
            begun: now,
            oriented_by: now + ORIENTATION_MAX,
            oriented: false,
            runs: Runs::default(),
            legacy: None,
            changed: false,
        };
        if let Some(goal) = ledger {
            reconciler.adopt(goal, now);
            reconciler.runs.forget();
            // No word from outside is needed for it, and where no engine answers none may come.
            reconciler.work(now);
        }
        reconciler
    }

    /// What the node should be doing. True if it is news and belongs in the ledger; an old leader's goal and a
    /// repeat are not.
    pub fn handle_goal(&mut self, goal: Goal, now: Timestamp) -> bool {
        if self.has_goal && goal.number <= self.goal.number {
            return false;
        }
        self.adopt(goal, now);
        self.work(now);
        true
    }

    /// Something a runtime reported by itself.
    pub fn handle_seen(&mut self, seen: Seen, now: Timestamp) {
        match seen {
            Seen::All(found) => self.take_stock(found, now),
            Seen::Found(found) => self.take_found(found, now),
            Seen::Exited { replica, exited } => self.exited(replica, exited, now),
            Seen::Running { replica, address } => {
                if let Some(replica) = self.replicas.get_mut(&replica) {
                    match &mut replica.stage {
                        Stage::Running(running) => running.address = address,
                        Stage::BackOff { .. } | Stage::Stopped | Stage::Unknown | Stage::Unreadable(_) => {
                            replica.running(address, now, now);
                        }
                        Stage::Pending | Stage::Busy(..) | Stage::Gone => {}
                    }
                }
            }
            Seen::Vanished { replica } => {
                if let Some(replica) = self.replicas.get_mut(&replica) {
                    replica.vanished(now);
                }
            }
        }
        self.changed = true;
        self.work(now);
    }

    /// An action has ended.
    pub fn handle_finished(&mut self, id: ActionId, finished: Finished, now: Timestamp) {
        if self.applying == Some(id) {
            self.applying = None;
            if let Finished::Applied { number, generation } = finished {
                self.applied = (number, generation);
            } else {
                // What went wrong may go wrong again, and must not keep later tables from being used.
                self.apply_after = Some(now + APPLY_PAUSE);
            }
            self.changed = true;
        } else if let Some(replica) = self.under_way.remove(&id) {
            self.finish(replica, id, finished, now);
        }
        self.work(now);
    }

    /// How far pulls are. Asked for with each report, and no reason for one: layers come by the kilobyte.
    pub fn handle_pulls(&mut self, pulls: &BTreeMap<ActionId, Pulling>) {
        for (action, pulling) in pulls {
            let replica = self.under_way.get(action).and_then(|replica| self.replicas.get_mut(replica));
            if let Some(replica) = replica {
                replica.pulling = Some(*pulling);
            }
        }
    }

    /// How much each replica uses, as measured now and then.
    pub fn handle_usage(&mut self, usage: BTreeMap<ReplicaId, Usage>) {
        for (id, usage) in usage {
            if let Some(replica) = self.replicas.get_mut(&id) {
                replica.usage = usage;
            }
        }
    }

    /// What the proxy that has handed over to ours leaves.
    pub fn handle_legacy(&mut self, legacy: Legacy, now: Timestamp) {
        self.changed |= legacy.is_choosing != self.predecessor_chooses();
        self.legacy = Some(legacy);
        self.work(now);
    }

    pub fn handle_timeout(&mut self, now: Timestamp) {
        self.work(now);
    }

    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When [`handle_timeout`](Reconciler::handle_timeout) should be called next, and why.
    pub fn poll_timeout(&self) -> Option<(Timestamp, &'static str)> {
        let apply = self.apply_after.map(|at| (at, "tables that could not be applied are tried again"));
        let orientation = (!self.oriented).then_some((self.oriented_by, "the first report is due anyway"));
        let modules = self.waits_for_modules().then_some((self.route_by(), "tables wait no longer for modules"));
        self.replicas
            .values()
            .filter_map(Replica::deadline)
            .chain(self.runs.deadline())
            .chain(orientation)
            .chain(modules)
            .chain(apply)
            .min_by_key(|(at, _)| *at)
    }

    /// Whether something worth reporting has happened since this was last asked.
    pub fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// Whether there is something to report: the node knows what it runs, or has waited long enough to.
    pub fn is_oriented(&self, now: Timestamp) -> bool {
        self.oriented || now >= self.oriented_by || self.is_settled()
    }

    /// What it says about its replicas, and the tables that are in use: none before a predecessor chooses by its own no
    /// more, or a replica that has left the tables would be stopped under a request that it is just given.
    pub fn observed(&self) -> (BTreeMap<ReplicaId, ReplicaReport>, (GoalNumber, Generation)) {
        let report = |(id, replica): (&ReplicaId, &Replica)| {
            (*id, ReplicaReport { runs: self.runs.of(*id), ..replica.report() })
        };
        let replicas = self.replicas.iter().map(report).collect();
        let acknowledged = if self.predecessor_chooses() { Default::default() } else { self.applied };
        (replicas, acknowledged)
    }

    /// What belongs to this node besides what our own proxy has and counts.
    pub fn legacy(&self) -> Option<&Legacy> {
        self.legacy.as_ref()
    }

    /// Whether the proxy that ran here before ours may still give a request to replicas, by tables of its own.
    fn predecessor_chooses(&self) -> bool {
        self.legacy.as_ref().is_some_and(|legacy| legacy.is_choosing)
    }

    /// How often to report although nothing has changed: more often while a replica drains, since the leader waits
    /// for its last request to end.
    pub fn report_interval(&self) -> Duration {
        let serving: BTreeSet<ReplicaId> =
            self.goal.tables.services.values().flat_map(|upstream| &upstream.backends).map(|b| b.replica).collect();
        let drains = |r: &Replica| r.phase() == Phase::Ready && r.gets_requests() && !serving.contains(&r.id);
        let drains = self.replicas.values().any(drains);
        if drains { DRAIN_REPORT_INTERVAL } else { REPORT_INTERVAL }
    }

    pub fn goal(&self) -> &Goal {
        &self.goal
    }

    /// What holds after every call; checked in the simulator.
    pub fn invariants(&self) {
        for (id, replica) in &self.replicas {
            let busy = matches!(replica.stage, Stage::Busy(..));
            let known = self.under_way.values().filter(|about| *about == id).count();
            assert!(!busy || known > 0, "{id} is busy with nothing");
            for (other_id, other) in self.replicas.range((Bound::Excluded(id), Bound::Unbounded)) {
                let shared = replica.volumes().iter().any(|volume| other.volumes().contains(volume));
                assert!(
                    !(shared && replica.holds_volumes() && other.holds_volumes()),
                    "{id} and {other_id} hold one volume"
                );
            }
        }
    }

    /// Whether tables that are due are held back. The first ones of a node that restarts name modules, which run in this
    /// very process and are to be loaded first.
    fn waits_for_modules(&self) -> bool {
        let restarting = self.applied == Default::default() && self.applying.is_none() && self.apply_after.is_none();
        let mut modules = self.replicas.values().filter(|replica| !replica.is_container());
        restarting && self.goal.tables.number > self.applied.0 && !modules.all(Replica::is_judged)
    }

    /// How long that may last: containers that run are not kept waiting for modules, unless a predecessor leads to both.
    fn route_by(&self) -> Timestamp {
        let alone = !self.predecessor_chooses() && self.replicas.values().any(Replica::is_container);
        self.begun + if alone { ORIENTATION_MAX } else { MODULES_MAX }
    }

    /// Whether every replica of the ledger was found again and judged.
    fn is_settled(&self) -> bool {
        let containers = self.replicas.values().any(Replica::is_container);
        (self.found || !containers) && self.replicas.values().all(Replica::is_judged)
    }

    fn adopt(&mut self, goal: Goal, now: Timestamp) {
        let first = !self.has_goal;
        self.has_goal = true;
        self.secrets = Arc::new(goal.secrets.clone());
        for (id, wanted) in &goal.replicas {
            let stage = match (&wanted.workload, wanted.duty) {
                // What the ledger names may be running: find out before anything is done about it.
                (Workload::Container(_), _) if first && !self.found => Stage::Unknown,
                (_, Duty::Run) => Stage::Pending,
                // Never heard of here and to be stopped: there is nothing to stop. A container may still have been
                // left by a life before, so its remains are looked for.
                (Workload::Container(_), Duty::Stop | Duty::StopAndErase) => Stage::Stopped,
                (Workload::Module(_), Duty::Stop | Duty::StopAndErase) => Stage::Gone,
            };
            let replica = self
                .replicas
                .entry(*id)
                .or_insert_with(|| Replica::new(*id, wanted.service.clone(), wanted.revision, stage, now));
            if replica.goal.as_deref() != Some(wanted) {
                replica.goal = Some(Arc::new(wanted.clone()));
                replica.set_probes(wanted.readiness.as_ref(), wanted.liveness.as_ref(), now);
            }
        }
        for (id, replica) in &mut self.replicas {
            if !goal.replicas.contains_key(id) {
                replica.retire();
            }
        }
        self.replicas.retain(|id, replica| goal.replicas.contains_key(id) || !replica.is_gone());
        self.runs.set(&goal);
        self.goal = goal;
        self.changed = true;
    }

    /// A runtime's whole list: what it has, and by absence what it has not.
    fn take_stock(&mut self, found: Vec<Found>, now: Timestamp) {
        self.found = true;
        let mut missing: BTreeSet<ReplicaId> =
            self.replicas.iter().filter(|(_, r)| r.is_container()).map(|(id, _)| *id).collect();
        for found in found {
            missing.remove(&found.replica);
            self.take_found(found, now);
        }
        for id in missing {
            if let Some(replica) = self.replicas.get_mut(&id) {
                replica.vanished(now);
            }
        }
        // An engine that answers again is worth a try at once.
        for replica in self.replicas.values_mut() {
            replica.engine_is_back(now);
        }
    }

    fn take_found(&mut self, found: Found, now: Timestamp) {
        let Found { replica: id, service, revision, digest, condition } = found;
        let replica =
            self.replicas.entry(id).or_insert_with(|| Replica::new(id, service, revision, Stage::Unknown, now));
        replica.found(digest, condition, now);
    }

    fn exited(&mut self, id: ReplicaId, exited: Exited, now: Timestamp) {
        let Some(replica) = self.replicas.get_mut(&id) else { return };
        if replica.takes_due_exit(&exited) {
            return;
        }
        match &replica.stage {
            Stage::Running(_) | Stage::Unknown | Stage::Unreadable(_) if replica.duty() == Duty::Run => {
                replica.exited(exited, now);
            }
            Stage::Running(_) | Stage::Unknown | Stage::Unreadable(_) => replica.enter(Stage::Stopped, now),
            // Ended before its start, or the stop before another start, was reported: the result of that finds it.
            Stage::Busy(_, Doing::Starting | Doing::Restarting) => replica.exited_early(exited),
            Stage::Busy(..) | Stage::Pending | Stage::BackOff { .. } | Stage::Stopped | Stage::Gone => {}
        }
    }

    fn finish(&mut self, id: ReplicaId, action: ActionId, finished: Finished, now: Timestamp) {
        if let Finished::Ran(state) = finished {
            self.runs.ended(action, state);
            self.changed = true;
            return;
        }
        let Some(replica) = self.replicas.get_mut(&id) else { return };
        self.changed |= match finished {
            Finished::Probed(result) => replica.take_probe(action, result, now),
            Finished::Listening(sockets) => replica.take_listening(action, sockets),
            finished => {
                replica.take_result(action, finished, now);
                true
            }
        };
        if replica.is_gone() && !self.goal.replicas.contains_key(&id) {
            self.replicas.remove(&id);
        }
    }

    /// Whatever is wanted now and not under way.
    fn work(&mut self, now: Timestamp) {
        self.oriented = self.is_oriented(now);
        if !self.has_goal {
            return;
        }
        self.apply_after = self.apply_after.filter(|at| now < *at);
        let may_apply = self.applying.is_none() && self.apply_after.is_none();
        let may_route = now >= self.route_by() || !self.waits_for_modules();
        if may_apply && self.goal.tables.number > self.applied.0 && may_route {
            let tables = Arc::new(self.goal.tables.clone());
            let generation = self.goal.generation;
            self.applying = Some(self.act(None, |_| Task::Apply { tables, generation }));
        }
        let ids: Vec<ReplicaId> = self.replicas.keys().copied().collect();
        for id in ids {
            self.changed |= self.replicas.get_mut(&id).is_some_and(|replica| replica.steady(now));
            while let Some(want) = self.replicas.get(&id).and_then(|replica| replica.want(now)) {
                if !self.carry_out(id, want, now) {
                    break;
                }
            }
        }
        let ready = |id| self.replicas.get(&id).is_some_and(|replica| replica.phase() == Phase::Ready);
        let (begin, late) = self.runs.due(now, ready);
        self.changed |= late;
        for (id, cron, due) in begin {
            let until = due + RUN_WITHIN;
            let action = self.act(Some(id), |replica| Task::Run { replica, cron: cron.clone(), due, until });
            self.runs.begun(id, &cron, action);
            self.changed = true;
        }
    }

    /// Turns a wish into an action. False if it has to wait.
    fn carry_out(&mut self, id: ReplicaId, want: Want, now: Timestamp) -> bool {
        if want == Want::Start
            && let Some((volume, by)) = self.volume_holder(id)
        {
            return self.replicas.get_mut(&id).is_some_and(|replica| replica.must_wait(volume, by, now));
        }
        let Some(replica) = self.replicas.get(&id) else { return false };
        // Given up or drained while this node was away, and in use here until the tables are those of now.
        let may_serve = matches!(replica.stage, Stage::Running(_) | Stage::Unreadable(_));
        let leaves = want == Want::Stop && replica.duty() != Duty::Run && may_serve;
        let is_chosen = self.applied.0 < self.goal.tables.number || self.predecessor_chooses();
        if leaves && is_chosen {
            return false;
        }
        let goal = replica.goal.clone();
        let secrets = Arc::clone(&self.secrets);
        let (task, doing): (Task, Option<Doing>) = match (want, goal) {
            (Want::Fetch, Some(goal)) => (Task::Fetch { replica: id, goal, secrets }, Some(Doing::Fetching)),
            (Want::Create, Some(goal)) => {
                let image = replica.image.clone().unwrap_or_default();
                (Task::Create { replica: id, goal, image, secrets }, Some(Doing::Creating))
            }
            (Want::Start, Some(goal)) => (Task::Start { replica: id, goal, secrets }, Some(Doing::Starting)),
            (Want::Restart, Some(goal)) => {
                let grace = goal.deploy.stop_grace;
                (Task::Stop { replica: id, grace }, Some(Doing::Restarting))
            }
            (Want::Probe(purpose), Some(_)) => match replica.probe(purpose) {
                Some(task) => (task, None),
                None => return false,
            },
            (Want::Inspect, _) => (Task::Inspect { replica: id }, None),
            (Want::Stop, goal) => {
                let grace = goal.map_or(ORPHAN_GRACE, |goal| goal.deploy.stop_grace);
                (Task::Stop { replica: id, grace }, Some(Doing::Stopping))
            }
            (Want::Remove { erase }, goal) => {
                let service = replica.service.clone();
                (Task::Remove { replica: id, service, goal, erase }, Some(Doing::Removing))
            }
            (Want::Fetch | Want::Create | Want::Start | Want::Restart | Want::Probe(_), None) => return false,
        };
        let action = self.act(Some(id), |_| task);
        if let Some(replica) = self.replicas.get_mut(&id) {
            replica.begin(action, want, doing, now);
        }
        self.changed |= doing.is_some();
        true
    }

    /// Who holds a volume that this replica needs.
    fn volume_holder(&self, id: ReplicaId) -> Option<(String, ReplicaId)> {
        let volumes = self.replicas.get(&id)?.volumes();
        self.replicas.values().filter(|other| other.id != id && other.holds_volumes()).find_map(|other| {
            let held = other.volumes().into_iter().find(|volume| volumes.contains(volume))?;
            Some((held, other.id))
        })
    }

    fn act(&mut self, about: Option<ReplicaId>, task: impl FnOnce(ReplicaId) -> Task) -> ActionId {
        self.last_action += 1;
        let id = ActionId(self.last_action);
        if let Some(replica) = about {
            self.under_way.insert(id, replica);
        }
        self.actions.push_back(Action { id, task: task(about.unwrap_or_default()) });
        id
    }
}

#[cfg(test)]
mod tests {
    use super::run::tests::job;
    use super::*;
    use crate::goal::Container;
    use crate::id::Label;
    use crate::spec::{HostAccess, SecretsAs, Volume, VolumeSource};

    fn goal(count: u64) -> Goal {
        let number = GoalNumber { term: 1, count };
        let tables = Tables { number, ..Tables::default() };
        Goal { number, generation: Generation(count), tables, ..Goal::default() }
    }

    fn container() -> ReplicaGoal {
        let volume = Volume {
            path: "/data".to_owned(),
            source: VolumeSource::Named(Label::new("data").unwrap()),
            read_only: false,
        };
        let workload = Workload::Container(Container {
            image: "web:1".to_owned(),
            digest: None,
            pull: false,
            registry: None,
            command: vec![],
            secrets_as: SecretsAs::default(),
            volumes: vec![volume],
            host: HostAccess::default(),
        });
        ReplicaGoal { workload, ..job(&[]) }
    }

    fn found(id: u64, condition: Condition) -> Found {
        let ReplicaGoal { service, revision, .. } = container();
        Found { replica: ReplicaId(id), service, revision, digest: None, condition }
    }

    fn unreadable() -> Condition {
        Condition::Unreadable { container: "0123456789ab".to_owned(), reason: "no".to_owned() }
    }

    fn next_tables(node: &mut Reconciler) -> Option<(ActionId, GoalNumber)> {
        let Action { id, task } = node.poll_action()?;
        let Task::Apply { tables, .. } = task else { panic!("{task:?}") };
        Some((id, tables.number))
    }

    #[test]
    fn a_scheduled_run_may_wait_for_its_replica_as_long_as_it_may_be_late() {
        let start = Timestamp(1_000) + ORIENTATION_MAX;
        let mut node = Reconciler::new(None, Timestamp(1_000));
        node.handle_goal(Goal { replicas: BTreeMap::from([(ReplicaId(1), job(&[("a", start)]))]), ..goal(1) }, start);
        let run = loop {
            let Action { id, task } = node.poll_action().expect("it runs in the end");
            let finished = match task {
                Task::Fetch { .. } => Finished::Fetched { image: "m".to_owned(), digest: None, pulled: None },
                Task::Create { .. } => Finished::Created,
                Task::Start { .. } => Finished::Started { address: None },
                Task::Apply { tables, generation } => Finished::Applied { number: tables.number, generation },
                Task::Run { due, until, .. } => break (due, until),
                other => panic!("{other:?}"),
            };
            node.handle_finished(id, finished, start);
        };
        assert_eq!(run, (start, start + RUN_WITHIN));
    }

    #[test]
    fn tables_that_could_not_be_applied_are_tried_again_and_do_not_hold_up_later_ones() {
        let start = Timestamp(1_000) + ORIENTATION_MAX;
        let mut node = Reconciler::new(None, Timestamp(1_000));
        node.handle_goal(goal(1), start);
        let (id, first) = next_tables(&mut node).unwrap();
        let failed = || Finished::Failed(Cause::Refused { reason: "the agent failed at it".to_owned() });
        node.handle_finished(id, failed(), start);
        assert!(next_tables(&mut node).is_none(), "it would be tried without a pause");
        assert_eq!(node.observed().1.0, GoalNumber::default(), "they are not acknowledged");

        let (again, _why) = node.poll_timeout().unwrap();
        assert_eq!(again, start + APPLY_PAUSE);
        node.handle_timeout(again);
        let (id, second) = next_tables(&mut node).unwrap();
        assert_eq!(second, first);
        node.handle_finished(id, failed(), again);
        node.handle_goal(goal(2), again);
        node.handle_timeout(again + APPLY_PAUSE);
        let (id, third) = next_tables(&mut node).unwrap();
        assert_eq!(third.count, 2);
        node.handle_finished(id, Finished::Applied { number: third, generation: Generation(2) }, again + APPLY_PAUSE);
        assert_eq!((node.observed().1.0, node.poll_timeout()), (third, None));
    }

    #[test]
    fn tables_are_acknowledged_when_a_predecessor_chooses_by_its_own_no_more() {
        let now = Timestamp(1_000);
        let mut node = Reconciler::new(Some(goal(1)), now);
        node.handle_legacy(Legacy { is_choosing: true, ..Legacy::default() }, now);
        let (id, number) = next_tables(&mut node).unwrap();
        node.handle_finished(id, Finished::Applied { number, generation: Generation(1) }, now);
        assert_eq!(node.observed().1, Default::default());
        node.take_changed();
        node.handle_legacy(Legacy::default(), now);
        assert!(node.take_changed(), "it is worth a report");
        assert_eq!(node.observed().1, (number, Generation(1)));
    }

    #[test]
    fn a_node_that_restarts_loads_its_modules_at_once_and_routes_when_they_are_there() {
        let start = Timestamp(1_000);
        let mut ledger = goal(1);
        ledger.replicas.insert(ReplicaId(1), job(&[]));
        let mut node = Reconciler::new(Some(ledger), start);
        let action = node.poll_action().expect("nothing is waited for");
        assert!(matches!(action.task, Task::Fetch { .. }), "{:?}", action.task);
        assert!(node.poll_action().is_none(), "nobody would answer yet");

        // It takes longer to compile than a first report waits.
        let (reports, _why) = node.poll_timeout().unwrap();
        assert_eq!(reports, start + ORIENTATION_MAX);
        node.handle_timeout(reports);
        assert!(node.is_oriented(reports) && node.poll_action().is_none());
        let later = reports + Duration::from_secs(10);
        // How far that is, is told with the next report and makes none, and is over with it.
        node.take_changed();
        let pulling = Pulling { bytes: 1, total: Some(2) };
        node.handle_pulls(&BTreeMap::from([(action.id, pulling), (ActionId(99), pulling)]));
        assert!(!node.take_changed());
        assert_eq!(node.observed().0[&ReplicaId(1)].pulling, Some(pulling));
        node.handle_finished(action.id, Finished::Fetched { image: "m".to_owned(), digest: None, pulled: None }, later);
        assert_eq!(node.observed().0[&ReplicaId(1)].pulling, None);
        let created = node.poll_action().expect("it is made");
        node.handle_finished(created.id, Finished::Created, later);
        let started = node.poll_action().expect("it is started");
        node.handle_finished(started.id, Finished::Started { address: None }, later);
        assert!(next_tables(&mut node).is_some());
    }

    #[test]
    fn a_module_that_is_never_loaded_does_not_keep_the_others_from_being_served() {
        let start = Timestamp(1_000);
        let container = container();
        // Containers run already, and wait for a module no longer than for a first report. Others can as well wait.
        for (beside, predecessor, longest) in [
            (None, false, MODULES_MAX),
            (Some(container.clone()), false, ORIENTATION_MAX),
            (Some(container), true, MODULES_MAX),
        ] {
            let mut ledger = goal(1);
            ledger.replicas.insert(ReplicaId(1), job(&[]));
            ledger.replicas.extend(beside.map(|container| (ReplicaId(2), container)));
            let mut node = Reconciler::new(Some(ledger), start);
            node.handle_legacy(Legacy { is_choosing: predecessor, ..Legacy::default() }, start);
            let fetch = node.poll_action().expect("the module is fetched");
            assert!(matches!(fetch.task, Task::Fetch { .. }), "{:?}", fetch.task);
            node.handle_timeout(start + ORIENTATION_MAX - Duration::from_millis(1));
            assert!(next_tables(&mut node).is_none());
            node.handle_timeout(start + longest - Duration::from_millis(1));
            assert!(next_tables(&mut node).is_none());
            node.handle_timeout(start + longest);
            assert!(next_tables(&mut node).is_some());
        }
    }

    #[test]
    fn what_a_runtime_cannot_look_into_does_not_count_as_gone() {
        let start = Timestamp(1_000_000);
        let mut ledger = goal(1);
        ledger.replicas.extend([(ReplicaId(1), container()), (ReplicaId(2), container())]);
        let mut node = Reconciler::new(Some(ledger), start);
        assert!(next_tables(&mut node).is_some());
        let says = |node: &Reconciler, id| {
            let (reports, _) = node.observed();
            let report = &reports[&ReplicaId(id)];
            (report.phase, report.trouble.as_ref().map(|trouble| trouble.cause.clone()))
        };

        node.handle_seen(Seen::All(vec![found(1, unreadable()), found(2, Condition::Created)]), start);
        assert!(node.poll_action().is_none(), "it may run, and have the volume that the other one needs");
        assert!(!node.is_oriented(start), "it may be known in a moment, and serve");
        assert!(node.is_oriented(start + ORIENTATION_MAX));
        let cause = Cause::Unreadable { container: "0123456789ab".to_owned(), reason: "no".to_owned() };
        assert_eq!(says(&node, 1), (Phase::Pending, Some(cause)));
        let busy = Cause::VolumeBusy { volume: "job/data".to_owned(), by: ReplicaId(1) };
        assert_eq!(says(&node, 2).1, Some(busy));

        let running = Condition::Running { address: None, since: Timestamp(1_000) };
        node.handle_seen(Seen::Found(found(1, running)), start);
        assert_eq!(says(&node, 1), (Phase::Ready, None));
        // Nor is it known to be gone if that is all that is to be had after a gap.
        node.handle_seen(Seen::All(vec![found(1, unreadable()), found(2, Condition::Created)]), start);
        assert_eq!(says(&node, 1), (Phase::Ready, None));
        assert!(node.poll_action().is_none());
        node.invariants();
    }

    #[test]
    fn what_cannot_be_looked_into_and_is_to_go_leaves_the_tables_and_is_asked_to_end_first() {
        let start = Timestamp(1_000_000);
        let mut ledger = goal(1);
        ledger.replicas.insert(ReplicaId(1), ReplicaGoal { duty: Duty::Stop, ..container() });
        let mut node = Reconciler::new(Some(ledger), start);
        let (tables, number) = next_tables(&mut node).unwrap();
        node.handle_seen(Seen::All(vec![found(1, unreadable()), found(7, unreadable())]), start);
        assert!(node.poll_action().is_none(), "the proxy may still send it requests");
        node.handle_finished(tables, Finished::Applied { number, generation: Generation(1) }, start);
        // The other one belongs to nothing, and runs perhaps as well.
        for id in [1, 7] {
            let Action { id: stop, task } = node.poll_action().unwrap();
            assert!(matches!(task, Task::Stop { replica: ReplicaId(of), .. } if of == id), "{task:?}");
            node.handle_finished(stop, Finished::Stopped, start);
        }
        for id in [1, 7] {
            let Action { task, .. } = node.poll_action().unwrap();
            assert!(matches!(task, Task::Remove { replica: ReplicaId(of), .. } if of == id), "{task:?}");
        }
    }
}

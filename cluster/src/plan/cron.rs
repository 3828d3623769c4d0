//! Scheduled runs: each due time once in the whole cluster, by a replica that is ready. The due time is decided by a
//! step, and with that it is behind us for every leader to come; what a replica was given is never given to another,
//! since nobody can know that it had not begun.
//!
//! A due time for which there is no ready replica, or nobody who leads, or whose predecessor is still running, may begin
//! up to [`RUN_WITHIN`] late. Of several that wait, the newest is the one that counts. What is not begun is skipped,
//! with the reason.

use std::collections::BTreeSet;
use std::str::FromStr;

use super::Step;
use crate::goal::RUN_WITHIN;
use crate::id::{ReplicaId, ServiceName};
use crate::replica::{Phase, RunState};
use crate::state::{Deployed, PlacementState, Run, RunEnding, ScheduleRecord};
use crate::time::Timestamp;
use crate::view::View;
use crate::why;

/// What is to be done about the schedules of one service; replicas in `leaving` are about to be drained.
pub fn next(view: View<'_>, name: &ServiceName, deployed: &Deployed, leaving: &BTreeSet<ReplicaId>) -> Vec<Step> {
    let wanted: BTreeSet<&str> = match deployed.wanted() {
        0 => BTreeSet::new(),
        _ => deployed.spec().schedules.iter().map(|schedule| schedule.cron.as_str()).collect(),
    };
    // One that is not wanted any more, and whose run goes on, is kept until that is over: it may be wanted again.
    let lingers = |cron: &str, record: &ScheduleRecord| {
        record.run.is_some() && record.next.is_none() && next_after(cron, view.now).is_some()
    };
    let known = deployed.schedules.iter().filter(|(cron, record)| !lingers(cron, record));
    if !known.map(|(cron, _)| cron.as_str()).eq(wanted.iter().copied()) {
        let next = wanted.into_iter().map(|cron| (cron.to_owned(), next_after(cron, view.now))).collect();
        return vec![Step::Schedule { service: name.clone(), next }];
    }
    let pass = Pass { view, name, deployed, leaving };
    deployed.schedules.iter().flat_map(|(cron, record)| pass.decide(cron, record)).collect()
}

struct Pass<'a> {
    view: View<'a>,
    name: &'a ServiceName,
    deployed: &'a Deployed,
    leaving: &'a BTreeSet<ReplicaId>,
}

impl Pass<'_> {
    fn decide(&self, cron: &str, record: &ScheduleRecord) -> Vec<Step> {
        let service = self.name.clone();
        let now = self.view.now;
        if let Some(run) = record.run
            && let Some(ending) = self.ending(cron, run)
        {
            return vec![Step::Ran { service, cron: cron.to_owned(), due: run.due, ending }];
        }
        let Some(first) = record.next.filter(|at| *at <= now) else { return Vec::new() };
        // The newest that may still begin, and the first after it. Not many lie between: no schedule is due more than
        // once a minute.
        let (mut due, mut next) = (None, Some(first));
        if now.since(first) >= RUN_WITHIN {
            next = next_after(cron, now - RUN_WITHIN);
        }
        while let Some(at) = next.filter(|at| *at <= now) {
            (due, next) = (Some(at), next_after(cron, at));
        }
        let mut steps = Vec::new();
        if due != Some(first) {
            let reason = self.obstacle(first, record);
            let (service, cron) = (service.clone(), cron.to_owned());
            steps.push(Step::Skip { service, cron, due: first, reason, next: due.or(next) });
        }
        if let (Some(due), None) = (due, record.run)
            && let Some(replica) = self.ready(cron)
        {
            steps.push(Step::Run { service, cron: cron.to_owned(), due, replica, next });
        }
        steps
    }

    /// What became of a run; nothing while it may be going on.
    fn ending(&self, cron: &str, run: Run) -> Option<RunEnding> {
        let unknown = |reason: String| Some(RunEnding::Unknown { reason });
        let Some(placement) = self.view.state.placements.get(&run.replica) else {
            return unknown(format!("{} is gone", run.replica));
        };
        let node_name = self.view.state.node_name(placement.node);
        if self.view.state.nodes.get(&placement.node).is_none_or(|node| node.dead) {
            return unknown(format!("{node_name} is not heard any more"));
        }
        let report = self.view.inventory.replica(placement.node, run.replica)?.runs.get(cron)?;
        match &report.state {
            _ if report.due != run.due => None,
            RunState::Waiting | RunState::Going => None,
            RunState::Done => Some(RunEnding::Done),
            RunState::Failed { reason } => Some(RunEnding::Failed { reason: reason.clone() }),
            RunState::TooLate => Some(RunEnding::Skipped { reason: format!("{} was not ready in time", run.replica) }),
            RunState::NotBegun { reason } => Some(RunEnding::Skipped { reason: format!("{}: {reason}", run.replica) }),
            RunState::Unknown => unknown(format!("the agent of {node_name} restarted meanwhile")),
        }
    }

    /// Any replica that is ready and knows the schedule: of the settled revision if there is one, since what is being
    /// rolled out has yet to prove itself.
    fn ready(&self, cron: &str) -> Option<ReplicaId> {
        let settled = self.deployed.settled_record();
        let ready = self.view.state.placements_of(self.name).filter(|(id, placement)| {
            let record = self.deployed.record_for(placement.revision);
            let report = self.view.inventory.replica(placement.node, *id);
            placement.state == PlacementState::Serve
                && !self.leaving.contains(id)
                && record.is_some_and(|record| record.spec.schedules.iter().any(|schedule| schedule.cron == cron))
                && report.is_some_and(|report| report.phase == Phase::Ready)
                && !self.view.inventory.is_suspect(placement.node, self.view.now)
        });
        let is_new = |revision| settled.is_some_and(|record| record.template != revision);
        ready.min_by_key(|(id, placement)| (is_new(placement.revision), *id)).map(|(id, _)| id)
    }

    /// Why this due time was not given to anybody.
    fn obstacle(&self, due: Timestamp, record: &ScheduleRecord) -> String {
        if let Some(run) = record.run {
            return format!("the run before it still goes on, on {}", run.replica);
        }
        if self.view.inventory.began() >= due + RUN_WITHIN {
            return "nobody led the cluster in time".to_owned();
        }
        match why::unready(self.view, self.name, &[]) {
            Some(diagnosis) => format!("no replica was ready: {}", diagnosis.cause),
            None => "no replica was ready".to_owned(),
        }
    }
}

/// When the passing of time alone would change what [`next`] says, and why.
pub fn deadline(view: View<'_>) -> Option<(Timestamp, &'static str)> {
    let records = view.state.services.values().flat_map(|deployed| &deployed.schedules);
    let moments = records.filter_map(|(cron, record)| match record.next? {
        due if due > view.now => Some(due),
        // It waits for a replica, at most until the next is due.
        due => [Some(due + RUN_WITHIN), next_after(cron, due)].into_iter().flatten().filter(|at| *at > view.now).min(),
    });
    moments.min().map(|at| (at, "a schedule is due"))
}

/// The first time after `now` that a cron expression (five fields, UTC) names.
pub fn next_after(cron: &str, now: Timestamp) -> Option<Timestamp> {
    let cron = croner::Cron::from_str(cron).ok()?;
    let now = chrono::DateTime::from_timestamp_millis(i64::try_from(now.0).ok()?)?;
    let next = cron.find_next_occurrence(&now, false).ok()?;
    u64::try_from(next.timestamp_millis()).ok().map(Timestamp)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::command::put::PutServices;
    use crate::command::{Applied, Command, Entry, NewNode};
    use crate::event::{Actor, Kind};
    use crate::id::{Label, NodeId};
    use crate::inventory::{DEAD_AFTER, Inventory};
    use crate::plan::{plan, route};
    use crate::replica::{Facts, Observed, ReplicaReport, RunReport, Usage};
    use crate::secret::{Opaque, SealingPublicKey};
    use crate::spec::toml::{SourceFile, project};
    use crate::state::{LastRun, State};
    use std::time::Duration;

    const CRON: &str = "*/10 * * * *";
    const R1: ReplicaId = ReplicaId(1);
    const R2: ReplicaId = ReplicaId(2);

    fn minute(minute: u64) -> Timestamp {
        Timestamp(minute * 60_000)
    }

    fn job() -> ServiceName {
        ServiceName::new(Label::new("app").unwrap(), Label::new("job").unwrap())
    }

    /// `app/job` with r1 on node 1 and r2 on node 2, from minute 1 on, and whoever leads.
    struct World {
        state: State,
        inventory: Inventory,
        now: Timestamp,
        index: u64,
    }

    impl World {
        fn new() -> World {
            let mut world =
                World { state: State::default(), inventory: Inventory::new(minute(1)), now: minute(1), index: 0 };
            for name in ["n1", "n2"] {
                world.apply(Command::Admit(NewNode {
                    name: name.to_owned(),
                    address: String::new(),
                    sealing_key: SealingPublicKey(Opaque(Vec::new())),
                }));
            }
            world.put(CRON);
            world.say(Phase::Ready, &[]);
            while world.state.placements.len() < 2 {
                world.decide();
                world.say(Phase::Ready, &[]);
            }
            for _ in 0..5 {
                world.decide();
            }
            assert!(world.state.services[&job()].rollout.is_none(), "it has settled");
            world
        }

        fn put(&mut self, cron: &str) {
            let text = format!(
                "[[service]]\nname = \"job\"\nmodule = \"a.wasm\"\nreplicas = 2\ntriggers = [\"cron:{cron}\"]\n\
                 [service.deploy]\nmax_surge = 2"
            );
            let file = SourceFile { name: "service.toml".to_owned(), text };
            let mut project = project(&file, &Label::new("app").unwrap()).unwrap_or_else(|found| panic!("{found:?}"));
            for service in project.services.values_mut() {
                if let crate::spec::Source::Module(module) = &mut service.source {
                    module.digest = Some("0".repeat(64));
                }
            }
            let (prune, replace, if_generation) = (false, true, None);
            self.apply(Command::PutServices(PutServices {
                project: project.name,
                services: project.services,
                prune,
                replace,
                if_generation,
                settings: None,
                recalls: true,
            }));
        }

        fn apply(&mut self, command: Command) {
            self.index += 1;
            let entry = Entry { at: self.now, actor: Actor::Orca, source: None, command };
            let applied = self.state.apply(self.index, entry);
            assert!(matches!(applied, Applied::Done { .. }), "{applied:?}");
        }

        /// Every node reports: its replicas are all in this phase, and these runs are as they are.
        fn say(&mut self, phase: Phase, runs: &[(ReplicaId, Timestamp, RunState)]) {
            let nodes: Vec<NodeId> = self.state.nodes.keys().copied().collect();
            for node in nodes {
                self.say_of(node, phase, runs);
            }
        }

        fn say_of(&mut self, node: NodeId, phase: Phase, runs: &[(ReplicaId, Timestamp, RunState)]) {
            let report = |id: ReplicaId, placement: &crate::state::Placement| ReplicaReport {
                service: placement.service.clone(),
                revision: placement.revision,
                phase,
                since: self.now,
                address: None,
                digest: None,
                restarts: 0,
                failures: 0,
                last_exit: None,
                trouble: None,
                usage: Usage::default(),
                pulled: None,
                pulling: None,
                ready_after_ms: None,
                on_trial: false,
                runs: runs
                    .iter()
                    .filter(|(replica, ..)| *replica == id)
                    .map(|(_, due, state)| (CRON.to_owned(), RunReport { due: *due, state: state.clone() }))
                    .collect(),
            };
            let here = self.state.placements.iter().filter(|(_, placement)| placement.node == node);
            let replicas = here.map(|(id, placement)| (*id, report(*id, placement))).collect();
            let facts = Facts { memory: crate::resource::Memory(1 << 30), ..Facts::default() };
            self.inventory.record(node, Observed { at: self.now, replicas, facts, ..Observed::default() }, self.now);
        }

        fn look<T>(&self, look: impl FnOnce(View<'_>) -> T) -> T {
            let sent = self.state.nodes.keys().map(|node| (*node, Default::default())).collect();
            let (state, inventory, recent) = (&self.state, &self.inventory, &BTreeMap::new());
            look(View { state, inventory, sent: &sent, recent, now: self.now })
        }

        /// What the leader decides now, which is applied, of schedules alone.
        fn decide(&mut self) -> Vec<String> {
            let made = self.look(|view| plan(view, &route::tables(view)));
            let told = made.steps.iter().filter_map(|step| match step {
                Step::Schedule { next, .. } => Some(format!("schedules {next:?}")),
                Step::Run { due, replica, .. } => Some(format!("{replica} runs that of {}", due.0 / 60_000)),
                Step::Ran { due, ending, .. } => Some(format!("that of {} {ending:?}", due.0 / 60_000)),
                Step::Skip { due, reason, .. } => Some(format!("from {} skipped: {reason}", due.0 / 60_000)),
                _ => None,
            });
            let told = told.collect();
            let moves = made.steps.iter().any(|step| !matches!(step, Step::Complete { .. }));
            if moves {
                let command = Command::Adopt { parent: made.parent, steps: made.steps, announcements: Vec::new() };
                self.apply(command);
            }
            told
        }

        fn at(&mut self, now: Timestamp) -> &mut World {
            self.now = now;
            self
        }

        /// Another leader begins, and hears the nodes.
        fn change_leader(&mut self) {
            self.inventory = Inventory::new(self.now);
        }

        fn last(&self) -> Option<LastRun> {
            self.state.services[&job()].schedules[CRON].last.clone()
        }
    }

    #[test]
    fn a_due_time_is_one_replicas_and_the_next_begins_when_it_is_over() {
        let mut world = World::new();
        assert_eq!(world.at(minute(9)).decide(), [""; 0]);
        world.at(minute(10)).say(Phase::Ready, &[]);
        assert_eq!(world.decide(), ["r1 runs that of 10"]);
        assert_eq!(world.decide(), [""; 0]);
        world.at(minute(11)).say(Phase::Ready, &[(R1, minute(10), RunState::Going)]);
        assert_eq!(world.decide(), [""; 0]);
        // It takes longer than until the next.
        world.at(minute(20)).say(Phase::Ready, &[(R1, minute(10), RunState::Going)]);
        assert_eq!(world.decide(), [""; 0]);
        world.at(minute(22)).say(Phase::Ready, &[(R1, minute(10), RunState::Done)]);
        assert_eq!(world.decide(), ["that of 10 Done"]);
        assert_eq!(world.decide(), ["r1 runs that of 20"]);
        world.at(minute(35)).say(Phase::Ready, &[(R1, minute(20), RunState::Going)]);
        assert_eq!(world.decide(), ["from 30 skipped: the run before it still goes on, on r1"]);
    }

    #[test]
    fn another_leader_gives_nothing_out_again() {
        let mut world = World::new();
        world.at(minute(10)).say(Phase::Ready, &[]);
        assert_eq!(world.decide(), ["r1 runs that of 10"]);
        world.change_leader();
        world.say(Phase::Ready, &[]);
        assert_eq!(world.decide(), [""; 0]);
        // Of an older run, or of one that was not given: nothing that counts.
        world.say(Phase::Ready, &[(R1, minute(0), RunState::Done)]);
        assert_eq!(world.decide(), [""; 0]);
        world.say(Phase::Ready, &[(R1, minute(10), RunState::Unknown)]);
        assert_eq!(world.decide(), [r#"that of 10 Unknown { reason: "the agent of n1 restarted meanwhile" }"#]);
        assert_eq!(world.decide(), [""; 0]);
    }

    #[test]
    fn a_run_for_which_a_ready_replica_had_no_time_is_skipped_and_has_not_failed() {
        let mut world = World::new();
        world.at(minute(10)).say(Phase::Ready, &[]);
        assert_eq!(world.decide(), ["r1 runs that of 10"]);
        let busy = RunState::NotBegun { reason: "all 1 instances are busy".to_owned() };
        world.at(minute(15)).say(Phase::Ready, &[(R1, minute(10), busy)]);
        assert_eq!(world.decide(), [r#"that of 10 Skipped { reason: "r1: all 1 instances are busy" }"#]);
    }

    #[test]
    fn a_replica_that_is_not_ready_is_passed_by_and_when_none_is_the_run_waits() {
        let mut world = World::new();
        world.at(minute(10)).say(Phase::Ready, &[]);
        world.say_of(NodeId(1), Phase::Unready, &[]);
        assert_eq!(world.decide(), ["r2 runs that of 10"]);
        world.say(Phase::Unready, &[(R2, minute(10), RunState::Failed { reason: "trap".to_owned() })]);
        assert_eq!(world.decide(), [r#"that of 10 Failed { reason: "trap" }"#]);
        world.at(minute(20)).say(Phase::Unready, &[]);
        assert_eq!(world.decide(), [""; 0]);
        world.at(minute(24)).say(Phase::Ready, &[]);
        assert_eq!(world.decide(), ["r1 runs that of 20"]);
        world.say(Phase::Ready, &[(R1, minute(20), RunState::Done)]);
        world.decide();
        world.at(minute(30)).say(Phase::Unready, &[]);
        assert_eq!(world.decide(), [""; 0]);
        world.at(minute(35)).say(Phase::Unready, &[]);
        assert_eq!(world.decide(), ["from 30 skipped: no replica was ready: app/job/r1 is unready"]);
        world.say(Phase::Ready, &[]);
        assert_eq!(world.decide(), [""; 0]);
        assert_eq!(world.last().map(|last| last.due), Some(minute(30)));
    }

    #[test]
    fn what_was_due_while_nobody_led_runs_late_or_is_skipped_and_of_several_the_newest_runs() {
        let mut world = World::new();
        world.at(minute(13)).change_leader();
        world.say(Phase::Ready, &[]);
        assert_eq!(world.decide(), ["r1 runs that of 10"]);
        world.say(Phase::Ready, &[(R1, minute(10), RunState::Done)]);
        world.decide();
        world.at(minute(43)).change_leader();
        world.say(Phase::Ready, &[]);
        assert_eq!(world.decide(), ["from 20 skipped: nobody led the cluster in time", "r1 runs that of 40"]);
        world.say(Phase::Ready, &[(R1, minute(40), RunState::Done)]);
        world.decide();
        world.at(minute(59)).change_leader();
        world.say(Phase::Ready, &[]);
        assert_eq!(world.decide(), ["from 50 skipped: nobody led the cluster in time"]);
        let skipped = world.state.events.iter().filter(|e| e.kind == Kind::ScheduleSkipped).count();
        assert_eq!(skipped, 2);
    }

    #[test]
    fn a_run_whose_node_is_given_up_is_not_given_to_another() {
        let mut world = World::new();
        world.at(minute(10)).say(Phase::Ready, &[]);
        assert_eq!(world.decide(), ["r1 runs that of 10"]);
        world.at(minute(10) + DEAD_AFTER).say_of(NodeId(2), Phase::Ready, &[]);
        assert_eq!(world.decide(), [""; 0], "the node is given up first");
        assert_eq!(world.decide(), [r#"that of 10 Unknown { reason: "n1 is not heard any more" }"#]);
        world.say_of(NodeId(2), Phase::Ready, &[]);
        assert_eq!(world.decide(), [""; 0]);
    }

    #[test]
    fn a_run_that_the_removal_of_its_service_cuts_off_is_told_of() {
        let mut world = World::new();
        world.at(minute(10)).say(Phase::Ready, &[]);
        assert_eq!(world.decide(), ["r1 runs that of 10"]);
        world.apply(Command::Remove { service: job(), volumes: false });
        assert_eq!(world.decide(), ["schedules {}"]);
        // Its drain time is over.
        world.state.placements.clear();
        assert_eq!(world.decide(), [r#"that of 10 Unknown { reason: "r1 is gone" }"#]);
        let told: Vec<_> = world.state.events.iter().rev().take(2).map(|event| event.kind).collect();
        assert_eq!(told, [Kind::ServiceRemoved, Kind::ScheduleFailed]);
    }

    #[test]
    fn a_replica_that_runs_something_is_not_done_with_its_requests() {
        let mut world = World::new();
        world.at(minute(10)).say(Phase::Ready, &[]);
        world.decide();
        assert_eq!(world.look(|view| (view.in_flight(R1), view.in_flight(R2))), (1, 0));
    }

    #[test]
    fn a_schedule_counts_from_when_it_is_wanted() {
        let mut world = World::new();
        world.at(minute(15)).put("*/20 * * * *");
        assert_eq!(world.decide(), [r#"schedules {"*/20 * * * *": Some(1200.000s)}"#]);
        world.at(minute(17)).apply(Command::Stop { service: job() });
        assert_eq!(world.decide(), ["schedules {}"]);
        world.at(minute(61)).apply(Command::Start { service: job() });
        assert_eq!(world.decide(), [r#"schedules {"*/20 * * * *": Some(4800.000s)}"#]);
    }

    #[test]
    fn the_leader_is_woken_when_the_next_is_due_and_when_it_is_too_late() {
        let mut world = World::new();
        let wake = |world: &World| world.look(deadline).map(|(at, _)| at);
        assert_eq!(wake(&world), Some(minute(10)));
        world.at(minute(10)).say(Phase::Unready, &[]);
        assert_eq!(wake(&world), Some(minute(15)));
        world.at(minute(10) + Duration::from_secs(1)).say(Phase::Ready, &[]);
        world.decide();
        assert_eq!(wake(&world), Some(minute(20)));
    }

    #[test]
    fn the_next_time_is_after_now() {
        assert_eq!(next_after("* * * * *", Timestamp(0)), Some(minute(1)));
        assert_eq!(next_after("* * * * *", Timestamp(60_000 - 1)), Some(minute(1)));
        assert_eq!(next_after("0 9 * * *", Timestamp(0)), Some(minute(9 * 60)));
        assert_eq!(next_after("0 0 30 2 *", Timestamp(0)), None);
    }
}

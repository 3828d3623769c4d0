//! The scheduled runs that replicas of this node were given. Whether something is due is the leader's to say; here it is
//! begun once: what a goal says again is the same run, and what the ledger says may have begun before the agent
//! restarted. One that is withdrawn while it goes on is let go on.

use std::collections::BTreeMap;

use super::ActionId;
use crate::goal::{Goal, RUN_WITHIN};
use crate::id::ReplicaId;
use crate::replica::{RunReport, RunState};
use crate::time::Timestamp;

#[derive(Debug, Default)]
pub struct Runs {
    all: BTreeMap<(ReplicaId, String), Run>,
}

/// Whose run it is, of which schedule, and when it was due.
type Due = (ReplicaId, String, Timestamp);

#[derive(Debug)]
struct Run {
    due: Timestamp,
    state: RunState,
    action: Option<ActionId>,
}

impl Runs {
    /// The runs of this goal, and no others.
    pub fn set(&mut self, goal: &Goal) {
        let mut before = std::mem::take(&mut self.all);
        for (replica, wanted) in &goal.replicas {
            for (cron, due) in &wanted.runs {
                let key = (*replica, cron.clone());
                let known = before.remove(&key).filter(|run| run.due == *due);
                let run = known.unwrap_or(Run { due: *due, state: RunState::Waiting, action: None });
                self.all.insert(key, run);
            }
        }
    }

    /// They are from the ledger: an agent before this one may have begun any of them.
    pub fn forget(&mut self) {
        for run in self.all.values_mut() {
            run.state = RunState::Unknown;
        }
    }

    /// What is to begin now: each of these is to be [`begun`](Runs::begun). True with it if one never will.
    pub fn due(&mut self, now: Timestamp, is_ready: impl Fn(ReplicaId) -> bool) -> (Vec<Due>, bool) {
        let mut begin = Vec::new();
        let mut late = false;
        for (key, run) in self.all.iter_mut().filter(|(_, run)| run.state == RunState::Waiting) {
            if now >= run.due + RUN_WITHIN {
                run.state = RunState::TooLate;
                late = true;
            } else if is_ready(key.0) {
                begin.push((key.0, key.1.clone(), run.due));
            }
        }
        (begin, late)
    }

    pub fn begun(&mut self, replica: ReplicaId, cron: &str, action: ActionId) {
        if let Some(run) = self.all.get_mut(&(replica, cron.to_owned())) {
            run.state = RunState::Going;
            run.action = Some(action);
        }
    }

    pub fn ended(&mut self, action: ActionId, state: RunState) {
        if let Some(run) = self.all.values_mut().find(|run| run.action == Some(action)) {
            run.state = state;
        }
    }

    pub fn of(&self, replica: ReplicaId) -> BTreeMap<String, RunReport> {
        let runs = self.all.range((replica, String::new())..).take_while(|((of, _), _)| *of == replica);
        runs.map(|((_, cron), run)| (cron.clone(), RunReport { due: run.due, state: run.state.clone() })).collect()
    }

    pub fn deadline(&self) -> Option<(Timestamp, &'static str)> {
        let waiting = self.all.values().filter(|run| run.state == RunState::Waiting);
        waiting.map(|run| run.due + RUN_WITHIN).min().map(|at| (at, "it is too late for a scheduled run"))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::goal::{Duty, ModuleGoal, ReplicaGoal, Workload};
    use crate::id::{Label, Revision, ServiceName};
    use crate::resource::Resources;
    use crate::spec::{Deploy, ModuleLimits, Strategy};
    use std::time::Duration;

    const R1: ReplicaId = ReplicaId(1);
    const DUE: Timestamp = Timestamp(600_000);

    /// A replica that is to run, and these of its schedule.
    pub fn job(runs: &[(&str, Timestamp)]) -> ReplicaGoal {
        let label = Label::new("job").unwrap();
        let limits = ModuleLimits::default();
        ReplicaGoal {
            service: ServiceName::new(label.clone(), label),
            revision: Revision(1),
            duty: Duty::Run,
            workload: Workload::Module(ModuleGoal { path: String::new(), digest: String::new(), limits }),
            port: None,
            env: BTreeMap::new(),
            secrets: BTreeMap::new(),
            resources: Resources::default(),
            liveness: None,
            readiness: None,
            runs: runs.iter().map(|(cron, due)| ((*cron).to_owned(), *due)).collect(),
            deploy: Deploy {
                strategy: Strategy::Rolling,
                max_unavailable: 0,
                max_surge: 1,
                ready_timeout: Deploy::READY_TIMEOUT,
                drain_timeout: Deploy::DRAIN_TIMEOUT,
                stop_grace: Deploy::STOP_GRACE,
                auto_promote: None,
            },
        }
    }

    fn goal(runs: &[(&str, Timestamp)]) -> Goal {
        Goal { replicas: BTreeMap::from([(R1, job(runs))]), ..Goal::default() }
    }

    /// What begins now, with the replica ready or not.
    fn begins(runs: &mut Runs, now: Timestamp, ready: bool) -> Vec<Timestamp> {
        let (begin, _) = runs.due(now, |_| ready);
        for (at, (replica, cron, _)) in begin.iter().enumerate() {
            runs.begun(*replica, cron, ActionId(now.0 + at as u64));
        }
        begin.into_iter().map(|(_, _, due)| due).collect()
    }

    fn states(runs: &Runs) -> Vec<RunState> {
        runs.of(R1).into_values().map(|run| run.state).collect()
    }

    #[test]
    fn a_run_begins_once_when_its_replica_is_ready_however_often_it_is_said() {
        let mut runs = Runs::default();
        runs.set(&goal(&[("a", DUE)]));
        assert_eq!(begins(&mut runs, DUE, false), []);
        assert_eq!(begins(&mut runs, DUE, true), [DUE]);
        runs.set(&goal(&[("a", DUE)]));
        assert_eq!((begins(&mut runs, DUE, true), states(&runs)), (vec![], vec![RunState::Going]));
        let failed = RunState::Failed { reason: "trap".to_owned() };
        runs.ended(ActionId(DUE.0), failed.clone());
        runs.set(&goal(&[("a", DUE)]));
        assert_eq!((begins(&mut runs, DUE, true), states(&runs)), (vec![], vec![failed]));
        let next = DUE + Duration::from_secs(60);
        runs.set(&goal(&[("a", next)]));
        assert_eq!(begins(&mut runs, next, true), [next]);
        runs.ended(ActionId(next.0), RunState::Done);
        assert_eq!(states(&runs), [RunState::Done]);
    }

    #[test]
    fn what_an_agent_before_may_have_begun_is_not_begun_again() {
        let mut runs = Runs::default();
        runs.set(&goal(&[("a", DUE)]));
        runs.forget();
        // The leader says it again, with another that is new.
        runs.set(&goal(&[("a", DUE), ("b", DUE)]));
        assert_eq!(begins(&mut runs, DUE, true).len(), 1);
        assert_eq!(states(&runs), [RunState::Unknown, RunState::Going]);
    }

    #[test]
    fn a_run_whose_replica_is_not_ready_in_time_never_begins() {
        let mut runs = Runs::default();
        runs.set(&goal(&[("a", DUE)]));
        assert_eq!(runs.deadline().map(|(at, _)| at), Some(DUE + RUN_WITHIN));
        assert_eq!(runs.due(DUE + RUN_WITHIN, |_| false), (vec![], true));
        assert_eq!((begins(&mut runs, DUE + RUN_WITHIN, true), states(&runs)), (vec![], vec![RunState::TooLate]));
        assert_eq!(runs.deadline(), None);
    }
}

//! Adopting what the leader decided. Every step names what it changes; nothing is chosen here.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{Announcement, Change, Detail, Refusal};
use crate::event::Kind;
use crate::id::{Generation, NodeId, ReplicaId, Revision, ServiceName};
use crate::plan::Step;
use crate::route::RouteKey;
use crate::state::{
    Baseline, Deployed, Direction, Failure, LastRun, Outcome, Placement, PlacementState, Receipt, Rollout, Run,
    RunEnding, ScheduleRecord, Trial, Window,
};
use crate::time::Timestamp;
use crate::traffic::Tally;

/// Receipts kept for each service.
const RECEIPTS_KEPT: usize = 50;
/// How often a schedule is told of whose runs all end in the same way.
const ALIKE_TOLD_EVERY: Duration = Duration::from_secs(60 * 60);

impl Change<'_> {
    pub(super) fn adopt(
        &mut self,
        parent: Generation,
        steps: Vec<Step>,
        announcements: Vec<Announcement>,
    ) -> Result<Option<Detail>, Refusal> {
        if parent != self.state.generation {
            return Err(Refusal::Moved { planned: parent, now: self.state.generation });
        }
        for step in steps {
            let named = cfg!(debug_assertions).then(|| step.clone());
            let taken = self.take(step);
            debug_assert!(taken.is_some(), "this step names what its parent does not have: {named:?}");
        }
        self.announce(announcements)
    }

    /// Nothing if what the step names is not there, which is a bug of whoever made the plan: then nothing has changed.
    fn take(&mut self, step: Step) -> Option<()> {
        match step {
            Step::Place { service, node } => self.place(&service, node),
            Step::Erase { service, node } => self.erase(&service, node),
            Step::Drain { replica } => self.drain(replica),
            Step::Stop { replica, erase } => self.stop(replica, erase),
            Step::Forget { replica } => self.forget(replica),
            Step::Begin { service, baseline } => self.begin_from(&service, baseline),
            Step::Pin { service, revision, digest } => self.pin(&service, revision, &digest),
            Step::Try { service, trial } => self.try_out(&service, trial),
            Step::Promote { service, because } => self.promote_because(&service, &because),
            Step::GiveUp { service, failure, receipt } => self.give_up(&service, failure, receipt),
            Step::Settle { service, receipt } => self.settle(&service, *receipt),
            Step::Complete { service, revision, after } => self.complete(&service, revision, after),
            Step::Recover { service } => self.recover(&service),
            Step::Schedule { service, next } => self.schedule(&service, next),
            Step::Run { service, cron, due, replica, next } => self.run(&service, &cron, Run { due, replica }, next),
            Step::Ran { service, cron, due, ending } => self.ran(&service, &cron, due, ending),
            Step::Skip { service, cron, due, reason, next } => self.skip(&service, &cron, due, reason, next),
            Step::Route { route, service } => self.route(route, service),
            Step::Delete { service } => self.delete(&service),
            Step::Bury { node } => self.bury(node),
            Step::Revive { node } => self.revive(node),
        }
    }

    fn place(&mut self, service: &ServiceName, node: NodeId) -> Option<()> {
        let deployed = self.deployed(service)?;
        let revision = deployed.template();
        if deployed.spec().keeps_data() {
            deployed.home = Some(node);
        }
        let replica = self.new_replica(service, revision, node, PlacementState::Serve);
        let name = self.state.node_name(node);
        self.say(Kind::RolloutStep, Some(service), format!("{replica} ({revision}) placed on {name}"));
        Some(())
    }

    fn erase(&mut self, service: &ServiceName, node: NodeId) -> Option<()> {
        let deployed = self.deployed(service)?;
        deployed.home = None;
        let revision = deployed.template();
        let replica = self.new_replica(service, revision, node, PlacementState::Stop { erase: true });
        let name = self.state.node_name(node);
        self.say(Kind::RolloutStep, Some(service), format!("its volumes on {name} are erased, as {replica}"));
        Some(())
    }

    fn new_replica(
        &mut self,
        service: &ServiceName,
        revision: Revision,
        node: NodeId,
        state: PlacementState,
    ) -> ReplicaId {
        self.state.replicas_made += 1;
        let replica = ReplicaId(self.state.replicas_made);
        let placement = Placement { service: service.clone(), revision, node, since: self.at, state };
        self.state.placements.insert(replica, placement);
        replica
    }

    fn drain(&mut self, replica: ReplicaId) -> Option<()> {
        let placement = self.state.placements.get_mut(&replica)?;
        let deployed = self.state.services.get_mut(&placement.service)?;
        // The generation this command leads to: tables made from it no longer name the replica.
        let since = Generation(self.state.generation.0 + 1);
        placement.state = PlacementState::Drain { since, at: self.at };
        let (service, revision) = (placement.service.clone(), placement.revision);
        let template = deployed.template();
        if let Some(rollout) = &mut deployed.rollout
            && revision != template
            && rollout.direction == Direction::Forward
        {
            rollout.replaced += 1;
        }
        self.say(Kind::RolloutStep, Some(&service), format!("{replica} ({revision}) drains"));
        Some(())
    }

    fn stop(&mut self, replica: ReplicaId, erase: bool) -> Option<()> {
        let placement = self.state.placements.get_mut(&replica)?;
        let deployed = self.state.services.get_mut(&placement.service)?;
        placement.state = PlacementState::Stop { erase };
        if erase && deployed.home == Some(placement.node) {
            deployed.home = None;
        }
        Some(())
    }

    fn forget(&mut self, replica: ReplicaId) -> Option<()> {
        let placement = self.state.placements.remove(&replica)?;
        self.say(Kind::RolloutStep, Some(&placement.service), format!("{replica} is gone"));
        Some(())
    }

    fn begin_from(&mut self, service: &ServiceName, baseline: Baseline) -> Option<()> {
        let rollout = self.rollout(service)?;
        rollout.baseline = Some(baseline);
        let text = match rollout.from {
            Some(from) => format!("rollout of {} begins, from {from}", rollout.to),
            None => format!("rollout of {} begins", rollout.to),
        };
        self.say(Kind::RolloutStarted, Some(service), text);
        Some(())
    }

    fn pin(&mut self, service: &ServiceName, revision: Revision, digest: &str) -> Option<()> {
        let deployed = self.deployed(service)?;
        for record in deployed.revisions.values_mut().filter(|record| record.template == revision) {
            record.digest = Some(digest.to_owned());
        }
        Some(())
    }

    fn try_out(&mut self, service: &ServiceName, trial: Trial) -> Option<()> {
        self.rollout(service)?.trial = Some(trial);
        Some(())
    }

    fn promote_because(&mut self, service: &ServiceName, because: &str) -> Option<()> {
        let rollout = self.rollout(service)?;
        rollout.promoted = true;
        let text = format!("{} promoted: {because}", rollout.to);
        self.say(Kind::Promoted, Some(service), text);
        Some(())
    }

    fn give_up(&mut self, service: &ServiceName, failure: Failure, receipt: Option<Box<Receipt>>) -> Option<()> {
        let deployed = self.deployed(service)?;
        let target = deployed.target;
        let text = match receipt {
            Some(receipt) => {
                deployed.rollout = None;
                keep_receipt(deployed, *receipt);
                self.forget_old_revisions(service);
                format!("{target} does not get ready: {}", failure.cause)
            }
            None => {
                let text = format!("{target} is given up: {}", failure.cause);
                self.turn_back(service, failure);
                text
            }
        };
        self.say(Kind::RolloutFailed, Some(service), text);
        Some(())
    }

    fn settle(&mut self, service: &ServiceName, receipt: Receipt) -> Option<()> {
        let deployed = self.deployed(service)?;
        deployed.rollout = None;
        let (revision, target) = (receipt.revision, deployed.target);
        let (kind, text) = match receipt.outcome {
            // What no replica has shown to get ready is nothing to return to: it is judged when it starts.
            Outcome::Done if deployed.wanted() == 0 && !deployed.is_proven() => {
                (Kind::RolloutDone, format!("{revision} is what starts next"))
            }
            Outcome::Done => {
                deployed.settled = Some(revision);
                (Kind::RolloutDone, format!("{revision} serves"))
            }
            Outcome::RolledBack => (Kind::RolledBack, format!("{target} serves again instead of {revision}")),
            Outcome::Failed => {
                let text = format!("{target} is wanted again instead of {revision}, and does not get ready");
                (Kind::RolloutFailed, text)
            }
        };
        keep_receipt(deployed, receipt);
        self.forget_old_revisions(service);
        self.say(kind, Some(service), text);
        Some(())
    }

    fn complete(&mut self, service: &ServiceName, revision: Revision, after: Window) -> Option<()> {
        let receipt = self.deployed(service)?.receipts.iter_mut().rev().find(|receipt| receipt.revision == revision)?;
        receipt.after = Some(after);
        receipt.tally = Tally::default();
        Some(())
    }

    fn recover(&mut self, service: &ServiceName) -> Option<()> {
        let deployed = self.deployed(service)?;
        deployed.settled = Some(deployed.target);
        self.say(Kind::ReplicaRecovered, Some(service), "is ready after all".to_owned());
        Some(())
    }

    fn schedule(&mut self, service: &ServiceName, next: BTreeMap<String, Option<Timestamp>>) -> Option<()> {
        let deployed = self.deployed(service)?;
        deployed.schedules.retain(|cron, record| next.contains_key(cron) || record.run.is_some());
        for (cron, record) in &mut deployed.schedules {
            if !next.contains_key(cron) {
                record.next = None;
            }
        }
        for (cron, next) in next {
            let record = deployed.schedules.entry(cron).or_default();
            record.next = record.next.or(next);
        }
        Some(())
    }

    fn run(&mut self, service: &ServiceName, cron: &str, run: Run, next: Option<Timestamp>) -> Option<()> {
        let record = self.schedule_record(service, cron)?;
        record.next = next;
        record.run = Some(run);
        Some(())
    }

    fn ran(&mut self, service: &ServiceName, cron: &str, due: Timestamp, ending: RunEnding) -> Option<()> {
        let replica = self.schedule_record(service, cron)?.run.take().map(|run| run.replica);
        self.ended(service, cron, LastRun { due, replica, ending })
    }

    fn skip(
        &mut self,
        service: &ServiceName,
        cron: &str,
        due: Timestamp,
        reason: String,
        next: Option<Timestamp>,
    ) -> Option<()> {
        self.schedule_record(service, cron)?.next = next;
        self.ended(service, cron, LastRun { due, replica: None, ending: RunEnding::Skipped { reason } })
    }

    /// Remembers how a run ended and tells of it. What ends each time as it did the time before is told once in a while
    /// only, so that a job of every minute does not push all else out of the history.
    fn ended(&mut self, service: &ServiceName, cron: &str, last: LastRun) -> Option<()> {
        let at = self.at;
        let record = self.schedule_record(service, cron)?;
        let way = |ending: &RunEnding| std::mem::discriminant(ending);
        let alike = record.last.as_ref().is_some_and(|before| way(&before.ending) == way(&last.ending));
        let LastRun { due, replica, ending } = &last;
        let on = replica.map(|replica| format!(" on {replica}")).unwrap_or_default();
        let (kind, what) = match ending {
            RunEnding::Done => (Kind::ScheduleRan, format!("ran{on}")),
            RunEnding::Failed { reason } => (Kind::ScheduleFailed, format!("failed{on}: {reason}")),
            RunEnding::Skipped { reason } => (Kind::ScheduleSkipped, format!("skipped: {reason}")),
            RunEnding::Unknown { reason } => {
                (Kind::ScheduleFailed, format!("began{on} perhaps, and how it ended is not known: {reason}"))
            }
        };
        let mut text = format!("`{cron}` of {}: {what}", due.to_minute());
        record.last = Some(last);
        if alike && at.since(record.told) < ALIKE_TOLD_EVERY {
            record.untold += 1;
            return Some(());
        }
        record.told = at;
        match std::mem::take(&mut record.untold) {
            0 => {}
            untold if alike => text.push_str(&format!(" ({untold} more before it went the same way)")),
            untold => text.push_str(&format!(" ({untold} before it went another way)")),
        }
        self.say(kind, Some(service), text);
        Some(())
    }

    fn route(&mut self, route: RouteKey, service: Option<ServiceName>) -> Option<()> {
        let before = match &service {
            Some(to) => self.state.routes.insert(route.clone(), to.clone()),
            // Its holder may just have been deleted, and with it what it held.
            None => self.state.routes.remove(&route),
        };
        if let (Some(from), Some(to)) = (before, service) {
            self.say(Kind::RolloutStep, Some(&to), format!("{} is its own now, and no longer {from}'s", route.0));
        }
        Some(())
    }

    fn delete(&mut self, service: &ServiceName) -> Option<()> {
        self.state.services.remove(service)?;
        self.state.routes.retain(|_, holder| holder != service);
        self.say(Kind::ServiceRemoved, Some(service), "gone".to_owned());
        Some(())
    }

    fn bury(&mut self, node: NodeId) -> Option<()> {
        let record = self.state.nodes.get_mut(&node)?;
        record.dead = true;
        let text = format!("{} is silent; its replicas are placed elsewhere", record.name);
        self.say(Kind::NodeDead, None, text);
        Some(())
    }

    fn revive(&mut self, node: NodeId) -> Option<()> {
        let record = self.state.nodes.get_mut(&node)?;
        record.dead = false;
        let text = format!("{} is heard again", record.name);
        self.say(Kind::NodeAlive, None, text);
        Some(())
    }

    fn deployed(&mut self, service: &ServiceName) -> Option<&mut Deployed> {
        self.state.services.get_mut(service)
    }

    fn rollout(&mut self, service: &ServiceName) -> Option<&mut Rollout> {
        self.deployed(service)?.rollout.as_mut()
    }

    fn schedule_record(&mut self, service: &ServiceName, cron: &str) -> Option<&mut ScheduleRecord> {
        self.deployed(service)?.schedules.get_mut(cron)
    }
}

fn keep_receipt(deployed: &mut Deployed, receipt: Receipt) {
    if deployed.receipts.len() == RECEIPTS_KEPT {
        deployed.receipts.pop_front();
    }
    deployed.receipts.push_back(receipt);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::service::tests::apply;
    use crate::command::{Applied, Command};
    use crate::spec::{Host, Route};
    use crate::state::State;

    #[test]
    fn a_route_that_changes_hands_is_told_of_as_it_is_written() {
        let mut state = State::default();
        let route = RouteKey(Route { host: Host::Any, path: "/x".to_owned() });
        for service in ["shop/old", "shop/new"] {
            let steps = vec![Step::Route { route: route.clone(), service: Some(service.parse().unwrap()) }];
            let parent = state.generation;
            let applied = apply(&mut state, Command::Adopt { parent, steps, announcements: Vec::new() });
            assert!(matches!(applied, Applied::Done { .. }), "{applied:?}");
        }
        let told: Vec<&str> = state.events.iter().map(|event| event.text.as_str()).collect();
        assert_eq!(told, ["/x/* is its own now, and no longer shop/old's"]);
    }
}

//! Adopting what the leader decided. Every step names what it changes; nothing is chosen here.

use super::{Announcement, Change, Detail, Refusal};
use crate::event::Kind;
use crate::id::{Generation, ReplicaId, ServiceName};
use crate::plan::Step;
use crate::state::{
    Deployed, Direction, LastRun, Outcome, Placement, PlacementState, Receipt, Run, RunEnding, ScheduleRecord,
};
use crate::traffic::Tally;
use std::time::Duration;

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
            self.take(step);
        }
        self.announce(announcements)
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Place { service, node } => {
                self.state.replicas_made += 1;
                let replica = ReplicaId(self.state.replicas_made);
                let Some(deployed) = self.state.services.get(&service) else { return };
                let revision = deployed.template();
                let keeps_data = deployed.spec().keeps_data();
                let placement = Placement {
                    service: service.clone(),
                    revision,
                    node,
                    since: self.at,
                    state: PlacementState::Serve,
                };
                self.state.placements.insert(replica, placement);
                if let Some(deployed) = self.deployed(&service).filter(|_| keeps_data) {
                    deployed.home = Some(node);
                }
                let name = self.state.node_name(node);
                self.say(Kind::RolloutStep, Some(&service), format!("{replica} ({revision}) placed on {name}"));
            }
            Step::Erase { service, node } => {
                let Some(deployed) = self.deployed(&service) else { return };
                deployed.home = None;
                let revision = deployed.template();
                let state = PlacementState::Stop { erase: true };
                self.state.replicas_made += 1;
                let replica = ReplicaId(self.state.replicas_made);
                let placement = Placement { service: service.clone(), revision, node, since: self.at, state };
                self.state.placements.insert(replica, placement);
                let name = self.state.node_name(node);
                self.say(Kind::RolloutStep, Some(&service), format!("its volumes on {name} are erased, as {replica}"));
            }
            Step::Drain { replica } => self.drain(replica),
            Step::Stop { replica, erase } => {
                let Some(placement) = self.state.placements.get_mut(&replica) else { return };
                placement.state = PlacementState::Stop { erase };
                let (service, node) = (placement.service.clone(), placement.node);
                if let Some(deployed) = self.deployed(&service).filter(|deployed| erase && deployed.home == Some(node))
                {
                    deployed.home = None;
                }
            }
            Step::Forget { replica } => {
                if let Some(placement) = self.state.placements.remove(&replica) {
                    self.say(Kind::RolloutStep, Some(&placement.service), format!("{replica} is gone"));
                }
            }
            Step::Begin { service, baseline } => {
                let Some(rollout) = self.deployed(&service).and_then(|deployed| deployed.rollout.as_mut()) else {
                    return;
                };
                rollout.baseline = Some(baseline);
                let text = match rollout.from {
                    Some(from) => format!("rollout of {} begins, from {from}", rollout.to),
                    None => format!("rollout of {} begins", rollout.to),
                };
                self.say(Kind::RolloutStarted, Some(&service), text);
            }
            Step::Pin { service, revision, digest } => {
                let Some(deployed) = self.deployed(&service) else { return };
                for record in deployed.revisions.values_mut().filter(|record| record.template == revision) {
                    record.digest = Some(digest.clone());
                }
            }
            Step::Try { service, trial } => {
                if let Some(rollout) = self.deployed(&service).and_then(|deployed| deployed.rollout.as_mut()) {
                    rollout.trial = Some(trial);
                }
            }
            Step::Promote { service, because } => {
                let Some(rollout) = self.deployed(&service).and_then(|deployed| deployed.rollout.as_mut()) else {
                    return;
                };
                rollout.promoted = true;
                let text = format!("{} promoted: {because}", rollout.to);
                self.say(Kind::Promoted, Some(&service), text);
            }
            Step::GiveUp { service, failure, receipt } => {
                let Some(deployed) = self.deployed(&service) else { return };
                let target = deployed.target;
                let text = match receipt {
                    Some(receipt) => {
                        deployed.rollout = None;
                        keep_receipt(deployed, *receipt);
                        self.forget_old_revisions(&service);
                        format!("{target} does not get ready: {}", failure.cause)
                    }
                    None => {
                        let text = format!("{target} is given up: {}", failure.cause);
                        self.turn_back(&service, failure);
                        text
                    }
                };
                self.say(Kind::RolloutFailed, Some(&service), text);
            }
            Step::Settle { service, receipt } => {
                let Some(deployed) = self.deployed(&service) else { return };
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
                keep_receipt(deployed, *receipt);
                self.forget_old_revisions(&service);
                self.say(kind, Some(&service), text);
            }
            Step::Complete { service, revision, after } => {
                let Some(deployed) = self.deployed(&service) else { return };
                if let Some(receipt) = deployed.receipts.iter_mut().rev().find(|r| r.revision == revision) {
                    receipt.after = Some(after);
                    receipt.tally = Tally::default();
                }
            }
            Step::Recover { service } => {
                let Some(deployed) = self.deployed(&service) else { return };
                deployed.settled = Some(deployed.target);
                self.say(Kind::ReplicaRecovered, Some(&service), "is ready after all".to_owned());
            }
            Step::Schedule { service, next } => {
                let Some(deployed) = self.deployed(&service) else { return };
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
            }
            Step::Run { service, cron, due, replica, next } => {
                if let Some(record) = self.schedule(&service, &cron) {
                    record.next = next;
                    record.run = Some(Run { due, replica });
                }
            }
            Step::Ran { service, cron, due, ending } => {
                let Some(record) = self.schedule(&service, &cron) else { return };
                let replica = record.run.take().map(|run| run.replica);
                self.ran(&service, &cron, LastRun { due, replica, ending });
            }
            Step::Skip { service, cron, due, reason, next } => {
                let Some(record) = self.schedule(&service, &cron) else { return };
                record.next = next;
                self.ran(&service, &cron, LastRun { due, replica: None, ending: RunEnding::Skipped { reason } });
            }
            Step::Route { route, service } => {
                let before = match &service {
                    Some(to) => self.state.routes.insert(route.clone(), to.clone()),
                    None => self.state.routes.remove(&route),
                };
                if let (Some(from), Some(to)) = (before, service) {
                    self.say(Kind::RolloutStep, Some(&to), format!("{route} is its own now, and no longer {from}'s"));
                }
            }
            Step::Delete { service } => {
                self.state.services.remove(&service);
                self.state.routes.retain(|_, holder| *holder != service);
                self.say(Kind::ServiceRemoved, Some(&service), "gone".to_owned());
            }
            Step::Bury { node } => {
                if let Some(record) = self.state.nodes.get_mut(&node) {
                    record.dead = true;
                    let text = format!("{} is silent; its replicas are placed elsewhere", record.name);
                    self.say(Kind::NodeDead, None, text);
                }
            }
            Step::Revive { node } => {
                if let Some(record) = self.state.nodes.get_mut(&node) {
                    record.dead = false;
                    let text = format!("{} is heard again", record.name);
                    self.say(Kind::NodeAlive, None, text);
                }
            }
        }
    }

    fn schedule(&mut self, service: &ServiceName, cron: &str) -> Option<&mut ScheduleRecord> {
        self.deployed(service)?.schedules.get_mut(cron)
    }

    /// Remembers how a run ended and tells of it. What ends each time as it did the time before is told once in a while
    /// only, so that a job of every minute does not push all else out of the history.
    fn ran(&mut self, service: &ServiceName, cron: &str, last: LastRun) {
        let at = self.at;
        let Some(record) = self.schedule(service, cron) else { return };
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
            return;
        }
        record.told = at;
        match std::mem::take(&mut record.untold) {
            0 => {}
            untold if alike => text.push_str(&format!(" ({untold} more before it went the same way)")),
            untold => text.push_str(&format!(" ({untold} before it went another way)")),
        }
        self.say(kind, Some(service), text);
    }

    fn drain(&mut self, replica: ReplicaId) {
        // The generation this command leads to: tables made from it no longer name the replica.
        let since = Generation(self.state.generation.0 + 1);
        let at = self.at;
        let Some(placement) = self.state.placements.get_mut(&replica) else { return };
        placement.state = PlacementState::Drain { since, at };
        let (service, revision) = (placement.service.clone(), placement.revision);
        if let Some(deployed) = self.deployed(&service) {
            let template = deployed.template();
            if let Some(rollout) = &mut deployed.rollout
                && revision != template
                && rollout.direction == Direction::Forward
            {
                rollout.replaced += 1;
            }
        }
        self.say(Kind::RolloutStep, Some(&service), format!("{replica} ({revision}) drains"));
    }

    fn deployed(&mut self, service: &ServiceName) -> Option<&mut Deployed> {
        self.state.services.get_mut(service)
    }
}

fn keep_receipt(deployed: &mut Deployed, receipt: Receipt) {
    if deployed.receipts.len() == RECEIPTS_KEPT {
        deployed.receipts.pop_front();
    }
    deployed.receipts.push_back(receipt);
}

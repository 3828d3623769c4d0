//! The next safe steps of one service. There is no stored position: each pass looks at what is wanted and what is,
//! so a change of leader in the middle is harmless. Rolling, recreate, blue-green and canary differ in two
//! questions only: may a new replica start now, and may this old one go now.
//!
//! What always holds: ready replicas never fall below wanted minus `max_unavailable` because of us; a replica is
//! stopped only when every proxy has acknowledged that it gets no more requests and what it had has ended (or its
//! drain time since then is over); a revision that does not get ready never costs a replica of the one before.

use super::schedule::Room;
use super::{Step, route};
use crate::id::{Label, ReplicaId, Revision, ServiceName};
use crate::replica::{Phase, ReplicaReport};
use crate::route::Tables;
use crate::spec::{AutoPromote, Service, Strategy};
use crate::state::{
    Baseline, Deployed, Direction, Failure, Outcome, Placement, PlacementState, Receipt, Rollout, Trial, Window,
};
use crate::time::Timestamp;
use crate::traffic::Counters;
use crate::view::View;
use crate::waiting::Waiting;
use crate::why;
use std::time::Duration;

/// Exits before ever being ready after which a new revision counts as failed. Three: one may be a race with
/// something else that starts, two bad luck.
pub const FAILURES_MAX: u32 = 3;
/// How long after a rollout its receipt counts `after`.
pub const AFTER_WINDOW: Duration = Duration::from_secs(10);

/// Fewer requests to a canary say nothing about a rate.
const TRIAL_REQUESTS_MIN: u64 = 20;
/// So many failures are no accident: a canary that has them, and too many for its rate, is given up before its time.
const TRIAL_FAILURES_MIN: u64 = 20;

#[derive(Debug, Default)]
pub struct Next {
    pub steps: Vec<Step>,
    pub waiting: Vec<Waiting>,
}

/// One replica with what its node says of it.
#[derive(Debug, Clone, Copy)]
struct Standing<'a> {
    id: ReplicaId,
    placement: &'a Placement,
    report: Option<&'a ReplicaReport>,
    /// On a node that is given up.
    lost: bool,
    /// On a node that is not heard now: what it said last is no ground to stop another for.
    silent: bool,
}

impl Standing<'_> {
    fn is_ready(&self) -> bool {
        !self.lost && !self.silent && self.report.is_some_and(|report| report.phase == Phase::Ready)
    }

    /// The question it is asked now was changed under it, and it does not answer it.
    fn refuses_new_probe(&self) -> bool {
        self.report.is_some_and(|report| report.on_trial && report.trouble.is_some())
    }

    fn is_on_trial(&self) -> bool {
        self.report.is_some_and(|report| report.on_trial)
    }

    /// Ready by the questions that are asked now.
    fn is_settled(&self) -> bool {
        self.is_ready() && !self.is_on_trial()
    }

    /// See [`ready_from`].
    fn ready_from(&self, now: Timestamp) -> Timestamp {
        // A pull that nobody hears of any more may have ended long ago.
        ready_from(self.placement, self.report.filter(|_| !self.lost && !self.silent), now)
    }

    fn is_gone(&self) -> bool {
        self.lost || self.report.is_some_and(|report| report.phase == Phase::Gone)
    }
}

struct Pass<'a> {
    view: View<'a>,
    name: &'a ServiceName,
    deployed: &'a Deployed,
    spec: &'a Service,
    fresh: Vec<Standing<'a>>,
    stale: Vec<Standing<'a>>,
    leaving: Vec<Standing<'a>>,
    next: Next,
}

pub fn next<'a>(
    view: View<'a>,
    name: &'a ServiceName,
    deployed: &'a Deployed,
    tables: &Tables,
    room: &mut Room<'_>,
) -> Next {
    let mut pass = Pass {
        view,
        name,
        deployed,
        spec: deployed.spec(),
        fresh: Vec::new(),
        stale: Vec::new(),
        leaving: Vec::new(),
        next: Next::default(),
    };
    pass.sort();
    pass.pin();
    pass.see_off();
    pass.complete_receipts();
    if let Some(removal) = deployed.removal {
        match route::awaited(view, tables, name) {
            Some((route, service)) => pass.wait(Waiting::ForTaker { route, service }),
            None => pass.remove(removal.volumes),
        }
        return pass.next;
    }
    match &deployed.rollout {
        Some(rollout) if rollout.baseline.is_none() => pass.begin(),
        Some(rollout) => {
            if rollout.direction == Direction::Forward
                && let Some(failure) = pass.failure(rollout)
            {
                pass.give_up(rollout, failure);
                return pass.next;
            }
            pass.replace(rollout, room);
        }
        None => pass.keep(room),
    }
    pass.next
}

impl<'a> Pass<'a> {
    fn sort(&mut self) {
        let template = self.deployed.template();
        for (id, placement) in self.view.state.placements_of(self.name) {
            let report = self.view.inventory.replica(placement.node, id);
            let lost = self.view.state.nodes.get(&placement.node).is_none_or(|node| node.dead);
            let silent = self.view.inventory.is_suspect(placement.node, self.view.now);
            let standing = Standing { id, placement, report, lost, silent };
            match placement.state {
                PlacementState::Serve if lost && !self.spec.keeps_data() => {
                    self.step(Step::Forget { replica: id });
                }
                PlacementState::Serve if lost => {
                    // Its volume is there and nowhere else.
                    let last_heard = self.view.inventory.heard(placement.node);
                    self.wait(Waiting::ForNode { node: placement.node, last_heard });
                    self.fresh.push(standing);
                }
                PlacementState::Serve if placement.revision == template => self.fresh.push(standing),
                PlacementState::Serve => self.stale.push(standing),
                PlacementState::Drain { .. } | PlacementState::Stop { .. } => self.leaving.push(standing),
            }
        }
    }

    /// Remember which bytes the image's name meant to the first replica that was created.
    fn pin(&mut self) {
        let template = self.deployed.template();
        let Some(record) = self.deployed.revisions.get(&template) else { return };
        if record.digest.is_some() {
            return;
        }
        let digest = self.fresh.iter().find_map(|standing| standing.report?.digest.clone());
        if let Some(digest) = digest {
            self.step(Step::Pin { service: self.name.clone(), revision: template, digest });
        }
    }

    /// Take the replicas that leave one step further.
    fn see_off(&mut self) {
        for standing in self.leaving.clone() {
            let replica = standing.id;
            match standing.placement.state {
                PlacementState::Serve => {}
                PlacementState::Drain { since, .. } => {
                    // A proxy that takes over the tables late may have given it a request just before.
                    let unrouted = self.view.inventory.unrouted_since(replica);
                    let until = unrouted.unwrap_or(self.view.now) + self.spec.deploy.drain_timeout;
                    let in_flight = self.view.in_flight(replica);
                    let ended = in_flight == 0 && self.view.acknowledged(since);
                    // Of a node that is not heard, nobody knows what its own proxy does.
                    let over = unrouted.is_some() && self.view.now >= until && !standing.silent;
                    if standing.lost || ended || over {
                        let erase = self.deployed.removal.is_some_and(|removal| removal.volumes);
                        self.step(Step::Stop { replica, erase });
                    } else {
                        self.wait(Waiting::ForDrain { replica, in_flight, until });
                    }
                }
                PlacementState::Stop { .. } if standing.is_gone() => self.step(Step::Forget { replica }),
                PlacementState::Stop { .. } => self.wait(Waiting::ForStop { replica }),
            }
        }
    }

    fn complete_receipts(&mut self) {
        let Some(receipt) = self.deployed.receipts.back() else { return };
        let due = receipt.during.to + AFTER_WINDOW;
        let counted_at = self.view.counted_at();
        if receipt.after.is_none() && (counted_at >= due || self.deployed.rollout.is_some()) {
            let counted = self.view.counted_since(self.name, &receipt.tally, receipt.during.to);
            let after = Window::between(receipt.during.to, counted_at, &counted);
            self.step(Step::Complete { service: self.name.clone(), revision: receipt.revision, after });
        }
    }

    fn remove(&mut self, volumes: bool) {
        for standing in self.fresh.iter().chain(&self.stale).map(|s| s.id).collect::<Vec<_>>() {
            self.step(Step::Drain { replica: standing });
        }
        if !(self.fresh.is_empty() && self.stale.is_empty() && self.leaving.is_empty()) {
            return;
        }
        let home = self.deployed.home.filter(|home| self.view.state.nodes.get(home).is_some_and(|node| !node.dead));
        match home {
            Some(node) if volumes => self.step(Step::Erase { service: self.name.clone(), node }),
            Some(_) | None => self.step(Step::Delete { service: self.name.clone() }),
        }
    }

    fn begin(&mut self) {
        let at = self.view.counted_at();
        let tally = self.view.tally(self.name);
        let before = self.view.recent.get(self.name).cloned().unwrap_or_default();
        self.step(Step::Begin { service: self.name.clone(), baseline: Baseline { at, tally, before } });
    }

    /// Why the new revision has to be given up, if it has to.
    fn failure(&self, rollout: &Rollout) -> Option<Failure> {
        let failing = self.fresh.iter().find(|standing| {
            standing.refuses_new_probe() || !self.is_elder(standing, rollout) && self.has_failed(standing)
        })?;
        Some(why::failure(self.view, self.name, self.spec, failing.id, failing.report))
    }

    /// Whether this replica was there before and is of the settled revision: how it is, is not the new one's doing.
    fn is_elder(&self, standing: &Standing<'_>, rollout: &Rollout) -> bool {
        self.is_settled_template(rollout) && standing.placement.since < rollout.started
    }

    /// Whether what is returned to does not get ready either. What was there before and serves does not count, however
    /// often it has failed in its life.
    fn prevents_return(&self, standing: &Standing<'_>, rollout: &Rollout) -> bool {
        let has_stayed = standing.placement.since < rollout.started && standing.is_ready();
        !has_stayed && !self.is_elder(standing, rollout) && self.has_failed(standing)
    }

    /// Whether this replica, placed by the rollout, does not get ready.
    fn has_failed(&self, standing: &Standing<'_>) -> bool {
        // Of one whose node is silent nothing is known; of none that is stopped is anything asked.
        if standing.lost || standing.silent || self.deployed.wanted() == 0 {
            return false;
        }
        let fails = standing.report.is_some_and(|report| {
            report.failures >= FAILURES_MAX
                || report.phase != Phase::Ready
                    && report.trouble.as_ref().is_some_and(|trouble| trouble.cause.is_final())
        });
        fails || self.is_late(standing)
    }

    /// Whether it should have been ready by now. What ran, or was ready, and starts once more has as long again: how
    /// often it may is counted apart.
    fn is_late(&self, standing: &Standing<'_>) -> bool {
        let timeout = self.spec.deploy.ready_timeout;
        if standing.is_ready() || self.view.now.since(standing.ready_from(self.view.now)) < timeout {
            return false;
        }
        standing.report.is_none_or(|report| {
            let sets_up = report.trouble.as_ref().is_some_and(|trouble| trouble.cause.precedes_start());
            sets_up || self.view.now.since(report.since) >= timeout
        })
    }

    /// Why the rollout cannot go on, if it has not for too long: no node has room for what is missing, or what it
    /// depends on does not get ready.
    fn obstacle(&self, rollout: &Rollout) -> Option<Failure> {
        let deploy = &self.spec.deploy;
        let moves = self.next.steps.iter().any(Step::moves_replicas);
        let now = self.view.now;
        let since = self.fresh.iter().map(|s| s.ready_from(now)).fold(rollout.started, Timestamp::max);
        let stood = self.view.now.since(since);
        if moves || !self.leaving.is_empty() || stood < deploy.ready_timeout {
            return None;
        }
        self.next.waiting.iter().find_map(|waiting| match waiting {
            Waiting::ForRoom { .. } if stood >= deploy.ready_timeout + deploy.drain_timeout => {
                let refused = Room::new(self.view).place(self.name, self.spec).err();
                Some(why::no_room(self.view, refused.as_ref()))
            }
            Waiting::ForDependency { service } if !self.is_on_its_way(service) => Some(Failure {
                cause: format!("it depends on `{service}`, which is not ready"),
                evidence: Vec::new(),
                fix: Some(format!("orca why {}/{service}", self.name.project)),
                asked: false,
            }),
            _ => None,
        })
    }

    /// Whether another service of the project may get ready yet: it is being rolled out, or a replica of it was placed
    /// anew and has time left.
    fn is_on_its_way(&self, service: &Label) -> bool {
        let View { state, inventory, now, .. } = self.view;
        let name = ServiceName::new(self.name.project.clone(), service.clone());
        let Some(other) = state.services.get(&name) else { return false };
        let has_time = |(id, placement): (ReplicaId, &Placement)| {
            let report = inventory.replica(placement.node, id);
            // A pull that has failed once may be tried for ever.
            let tries_again = report.is_some_and(|report| report.trouble.is_some());
            let from = if tries_again { placement.since } else { ready_from(placement, report, now) };
            placement.state == PlacementState::Serve
                && !inventory.is_suspect(placement.node, now)
                && now.since(from) < other.spec().deploy.ready_timeout
        };
        other.wanted() > 0 && (other.rollout.is_some() || state.placements_of(&name).any(has_time))
    }

    fn is_settled_template(&self, rollout: &Rollout) -> bool {
        let template_of = |revision: Revision| self.deployed.revisions.get(&revision).map(|r| r.template);
        self.deployed.settled.and_then(template_of) == template_of(rollout.to)
    }

    fn give_up(&mut self, rollout: &Rollout, failure: Failure) {
        let receipt = match self.deployed.settled {
            Some(_) => None,
            None => Some(Box::new(self.receipt(rollout, Outcome::Failed, Some(failure.clone())))),
        };
        self.step(Step::GiveUp { service: self.name.clone(), failure, receipt });
    }

    /// Bring the rollout one step further.
    fn replace(&mut self, rollout: &Rollout, room: &mut Room<'_>) {
        let wanted = self.deployed.wanted() as usize;
        let strategy = self.strategy();
        if let Strategy::Canary { weight } = strategy
            && self.is_canary(rollout)
        {
            self.canary(rollout, weight, room);
            return;
        }
        let fresh_ready = self.fresh.iter().filter(|s| s.is_ready()).count();
        match strategy {
            Strategy::Recreate => {
                // Not before what comes next could start, if it is not there already, as after a rolling update that failed.
                let is_there = self.fresh.len() >= wanted;
                if is_there || self.missing_dependency().is_none() && self.has_room_without_stale(rollout, room) {
                    self.retire_all_stale();
                }
                self.place_up_to(wanted, wanted, room);
            }
            Strategy::BlueGreen => {
                if fresh_ready >= wanted && self.fresh.len() >= wanted {
                    self.retire_all_stale();
                } else {
                    self.place_up_to(wanted, usize::MAX, room);
                }
            }
            Strategy::Rolling | Strategy::Canary { .. } => {
                let surge = self.spec.deploy.max_surge as usize;
                // With fewer wanted than there are, room for a new one comes on top all the same: an old one goes
                // for a new one that is ready, not for the hope of one.
                let limit = wanted.max(self.stale.len()) + surge;
                self.retire_stale_safely(wanted, limit);
                self.place_up_to(wanted, limit, room);
            }
        }
        self.retire_excess(wanted);
        self.wait_for_fresh();
        if let Some(failure) = self.obstacle(rollout) {
            match rollout.direction {
                Direction::Forward => self.give_up(rollout, failure),
                Direction::Back { .. } => self.settle(rollout, Outcome::Failed),
            }
            return;
        }
        if rollout.direction != Direction::Forward
            && self.fresh.iter().any(|standing| self.prevents_return(standing, rollout))
        {
            // What served before does not get ready either. Nothing else is left to return to.
            self.settle(rollout, Outcome::Failed);
            return;
        }
        if !self.next.steps.iter().any(Step::moves_replicas)
            && self.fresh.len() == wanted
            && self
                .fresh
                .iter()
                .all(|standing| standing.is_settled() || self.is_elder(standing, rollout) && !standing.is_on_trial())
            && self.stale.is_empty()
            && self.leaving.is_empty()
        {
            if self.view.tables_in_use() {
                let outcome = match rollout.direction {
                    Direction::Forward => Outcome::Done,
                    Direction::Back { .. } => Outcome::RolledBack,
                };
                self.settle(rollout, outcome);
            } else {
                self.wait(Waiting::ForProxies);
            }
        }
    }

    fn canary(&mut self, rollout: &Rollout, weight: u8, room: &mut Room<'_>) {
        // What the old ones lack, because a node was lost or more are wanted by now, the new ones make up for.
        let wanted = self.deployed.wanted() as usize;
        self.place_up_to(wanted.saturating_sub(self.stale.len()).max(1), usize::MAX, room);
        self.wait_for_fresh();
        if let Some(failure) = self.obstacle(rollout) {
            self.give_up(rollout, failure);
        } else if self.fresh.iter().any(Standing::is_ready) {
            match self.spec.deploy.auto_promote {
                Some(auto) => self.judge(rollout, weight, auto),
                None => self.wait(Waiting::ForPromotion { revision: rollout.to, weight }),
            }
        }
    }

    /// Promote the canary, or give it up, by what its replicas answered.
    fn judge(&mut self, rollout: &Rollout, weight: u8, auto: AutoPromote) {
        let service = self.name.clone();
        let (tried, settled) = (self.deployed.template(), self.settled_template());
        let Some(trial) = &rollout.trial else {
            let trial = Trial {
                since: self.view.counted_at(),
                tried: self.view.tally_of_template(self.name, tried),
                settled: self.view.tally_of_template(self.name, settled),
            };
            self.step(Step::Try { service, trial });
            return;
        };
        let counted = |template, tally| self.view.counted_of_template(self.name, template, tally, trial.since).counters;
        let (canary, stable) = (counted(tried, &trial.tried), counted(settled, &trial.settled));
        let (requests, failures) = (canary.requests, canary.failures());
        let until = trial.since + auto.after;
        let good =
            (requests - failures).saturating_mul(10_000) >= requests.saturating_mul(auto.success_per_10_000.into());
        let seconds = self.view.now.since(trial.since).as_secs();
        match good {
            true if self.view.now >= until && requests >= TRIAL_REQUESTS_MIN => {
                let because = format!("{} in {seconds} s", succeeded(&canary));
                self.step(Step::Promote { service, because });
            }
            false if failures >= TRIAL_FAILURES_MIN || self.view.now >= until && requests >= TRIAL_REQUESTS_MIN => {
                let wanted = per_cent(auto.success_per_10_000.into(), 10_000);
                let failure = Failure {
                    cause: format!(
                        "as a canary it answered {failures} of {requests} requests with an error (5xx) or not at all; \
                         `auto_promote` wants {wanted} to succeed"
                    ),
                    evidence: vec![format!("{} beside it: {}", self.word_for_settled(), succeeded(&stable)).into()],
                    fix: Some(format!("its log says why: orca logs {} --since 10m", self.name)),
                    asked: false,
                };
                self.give_up(rollout, failure);
            }
            true | false => self.wait(Waiting::ForMeasurement {
                revision: rollout.to,
                weight,
                until,
                requests,
                requests_min: TRIAL_REQUESTS_MIN,
            }),
        }
    }

    fn settled_template(&self) -> Revision {
        self.deployed.settled_record().map_or_else(Revision::default, |record| record.template)
    }

    fn word_for_settled(&self) -> String {
        self.deployed.settled.map_or_else(|| "what served".to_owned(), |settled| settled.to_string())
    }

    /// No rollout runs: as many as wanted, of the target.
    fn keep(&mut self, room: &mut Room<'_>) {
        let wanted = self.deployed.wanted() as usize;
        // A first deploy that was given up may have left one that serves after all.
        match self.excludes() {
            true => self.retire_all_stale(),
            false => self.retire_stale_safely(wanted, usize::MAX),
        }
        self.place_up_to(wanted, usize::MAX, room);
        self.retire_excess(wanted);
        self.wait_for_fresh();
        let all_ready = self.fresh.len() == wanted && self.fresh.iter().all(Standing::is_ready);
        if self.deployed.settled.is_none() && wanted > 0 && all_ready {
            self.step(Step::Recover { service: self.name.clone() });
        }
    }

    /// More new replicas, up to `wanted` of them, while all that serve are fewer than `limit`.
    fn place_up_to(&mut self, wanted: usize, limit: usize, room: &mut Room<'_>) {
        if self.fresh.len() >= wanted {
            return;
        }
        if let Some(needs) = self.missing_dependency() {
            self.wait(Waiting::ForDependency { service: needs });
            return;
        }
        // A volume is held by one replica: what has it must be gone first, not only asked to go.
        if self.excludes() && !(self.stale.is_empty() && self.leaving.is_empty()) {
            return;
        }
        let draining = self.next.steps.iter().filter(|s| matches!(s, Step::Drain { .. })).count();
        let serving = self.fresh.len() + self.stale.len() - draining.min(self.stale.len());
        let missing = wanted - self.fresh.len();
        for _ in 0..missing.min(limit.saturating_sub(serving)) {
            match room.place(self.name, self.spec) {
                Ok(node) => self.step(Step::Place { service: self.name.clone(), node }),
                Err(refused) => {
                    self.wait(Waiting::ForRoom { refused });
                    return;
                }
            }
        }
    }

    /// Whether the new replicas find room where the old ones are: what is taken down for something that cannot be placed
    /// is taken down for nothing. On the way back there is nothing better to keep.
    fn has_room_without_stale(&mut self, rollout: &Rollout, room: &Room<'_>) -> bool {
        if rollout.direction != Direction::Forward || self.stale.is_empty() {
            return true;
        }
        let mut room = room.clone();
        for standing in self.stale.iter().chain(&self.leaving) {
            room.give_back(standing.placement);
        }
        let missing = (self.deployed.wanted() as usize).saturating_sub(self.fresh.len());
        let refused = (0..missing).find_map(|_| room.place(self.name, self.spec).err());
        let has_room = refused.is_none();
        if let Some(refused) = refused {
            self.wait(Waiting::ForRoom { refused });
        }
        has_room
    }

    fn retire_all_stale(&mut self) {
        for replica in self.stale.iter().map(|s| s.id).collect::<Vec<_>>() {
            self.step(Step::Drain { replica });
        }
    }

    /// As many old replicas as can go without leaving fewer ready ones than promised: those that are not ready
    /// first, they cost nothing.
    fn retire_stale_safely(&mut self, wanted: usize, limit: usize) {
        let least = wanted.saturating_sub(self.spec.deploy.max_unavailable as usize);
        let mut ready = self.fresh.iter().chain(&self.stale).filter(|s| s.is_ready()).count();
        let mut stale = self.stale.clone();
        stale.sort_by_key(|s| (s.is_ready(), s.id));
        // A stale replica that is not ready may be the only one there is, about to come back: it goes only when
        // something new is ready, or nothing is wanted of it.
        let fresh_ready = self.fresh.iter().filter(|s| s.is_ready()).count();
        let proven = fresh_ready > 0 || wanted == 0 || self.spec.deploy.max_surge == 0;
        // Or when its revision was given up.
        let forward = self.deployed.rollout.as_ref().is_some_and(|rollout| rollout.direction == Direction::Forward);
        let mut total = self.fresh.len() + stale.len();
        for standing in stale {
            // Without surge, and with nothing ready that could go, one that is not ready makes the room.
            let makes_room = self.fresh.len() < wanted && total >= limit && ready <= least;
            let may_go = match standing.is_ready() {
                true => ready > least && proven,
                // It may serve well and be heard again in a moment.
                false if standing.silent && !standing.lost => proven && (ready >= least.max(1) || wanted == 0),
                false => fresh_ready > 0 || ready >= least.max(1) || wanted == 0 || !forward || makes_room,
            };
            if !may_go {
                continue;
            }
            total -= 1;
            if standing.is_ready() {
                ready -= 1;
            }
            self.step(Step::Drain { replica: standing.id });
        }
    }

    /// Fewer are wanted than there are: the ones that are not ready go first, then the youngest.
    fn retire_excess(&mut self, wanted: usize) {
        let excess = self.fresh.len().saturating_sub(wanted);
        let mut fresh = self.fresh.clone();
        fresh.sort_by_key(|s| (s.is_ready(), std::cmp::Reverse(s.id)));
        for standing in fresh.into_iter().take(excess) {
            self.step(Step::Drain { replica: standing.id });
        }
    }

    fn wait_for_fresh(&mut self) {
        let waiting: Vec<Waiting> = self
            .fresh
            .iter()
            .filter(|standing| !standing.is_ready() && !standing.lost)
            .map(|standing| Waiting::ForReady {
                replica: standing.id,
                // One that has been ready waits anew; one that has not has waited since it was placed, whatever it tried.
                since: match standing.report {
                    Some(report) if report.ready_after_ms.is_some() => report.since,
                    Some(_) | None => standing.placement.since,
                },
                trouble: standing.report.and_then(|report| report.trouble.clone()),
            })
            .collect();
        self.next.waiting.extend(waiting);
    }

    fn missing_dependency(&self) -> Option<Label> {
        self.spec
            .depends_on
            .iter()
            .find(|needs| {
                let other = ServiceName::new(self.name.project.clone(), (*needs).clone());
                let ready = self.view.state.placements_of(&other).any(|(id, placement)| {
                    placement.state == PlacementState::Serve
                        && self
                            .view
                            .inventory
                            .replica(placement.node, id)
                            .is_some_and(|report| report.phase == Phase::Ready)
                });
                !ready
            })
            .cloned()
    }

    fn settle(&mut self, rollout: &Rollout, outcome: Outcome) {
        let failure = match &rollout.direction {
            Direction::Forward => None,
            Direction::Back { why } => Some(why.clone()),
        };
        let receipt = Box::new(self.receipt(rollout, outcome, failure));
        self.step(Step::Settle { service: self.name.clone(), receipt });
    }

    fn receipt(&self, rollout: &Rollout, outcome: Outcome, failure: Option<Failure>) -> Receipt {
        let counted_at = self.view.counted_at();
        let (before, during) = match &rollout.baseline {
            Some(baseline) => {
                let counted = self.view.counted_since(self.name, &baseline.tally, baseline.at);
                (baseline.before.clone(), Window::between(baseline.at, counted_at, &counted))
            }
            None => Default::default(),
        };
        Receipt {
            revision: rollout.to,
            from: rollout.from,
            outcome,
            started: rollout.started,
            ended: self.view.now,
            replaced: rollout.replaced,
            before,
            during,
            after: None,
            failure,
            tally: self.view.tally(self.name),
        }
    }

    fn is_canary(&self, rollout: &Rollout) -> bool {
        matches!(self.strategy(), Strategy::Canary { .. })
            && rollout.direction == Direction::Forward
            && !rollout.promoted
            && !self.is_settled_template(rollout)
            && self.deployed.settled.is_some()
            // With nothing beside it there is nothing to compare it with.
            && self.deployed.wanted() > 0
            && !self.stale.is_empty()
    }

    fn strategy(&self) -> Strategy {
        if self.spec.is_exclusive() { Strategy::Recreate } else { self.spec.deploy.strategy }
    }

    /// Whether an old and a new replica may not be there together.
    fn excludes(&self) -> bool {
        self.strategy() == Strategy::Recreate
    }

    fn step(&mut self, step: Step) {
        self.next.steps.push(step);
    }

    fn wait(&mut self, waiting: Waiting) {
        self.next.waiting.push(waiting);
    }
}

impl Step {
    /// Whether it changes which replicas there are or what they do.
    fn moves_replicas(&self) -> bool {
        match self {
            Step::Place { .. } | Step::Drain { .. } | Step::Stop { .. } | Step::Forget { .. } => true,
            Step::Begin { .. }
            | Step::Pin { .. }
            | Step::Try { .. }
            | Step::Promote { .. }
            | Step::GiveUp { .. }
            | Step::Settle { .. }
            | Step::Complete { .. }
            | Step::Recover { .. }
            | Step::Erase { .. }
            | Step::Schedule { .. }
            | Step::Run { .. }
            | Step::Ran { .. }
            | Step::Skip { .. }
            | Step::Route { .. }
            | Step::Delete { .. }
            | Step::Bury { .. }
            | Step::Revive { .. } => false,
        }
    }
}

/// From when on the time counts that a replica may take to get ready: since it was placed, without the time that its
/// image took, or takes, to come. How long that is, is no property of the revision. A pull in which nothing comes is ended
/// by the node; one that failed counts like everything else that keeps a replica from being started.
fn ready_from(placement: &Placement, report: Option<&ReplicaReport>, now: Timestamp) -> Timestamp {
    match report {
        Some(report) if report.phase == Phase::Pulling => now,
        Some(ReplicaReport { pulled: Some(pulled), .. }) => placement.since + Duration::from_millis(pulled.millis),
        Some(_) | None => placement.since,
    }
}

/// `99.93% of 1500 requests succeeded`.
fn succeeded(counters: &Counters) -> String {
    let (requests, failures) = (counters.requests, counters.failures());
    match requests {
        0 => "no requests".to_owned(),
        _ => format!("{} of {requests} requests succeeded", per_cent(requests - failures, requests)),
    }
}

/// To a hundredth, rounded down, so that nothing that is less than all reads as 100%.
fn per_cent(part: u64, whole: u64) -> String {
    let hundredths = part.saturating_mul(10_000) / whole.max(1);
    format!("{}%", hundredths as f64 / 100.0)
}

/// When the passing of time alone would change what [`next`] says, and why.
pub fn deadline(view: View<'_>) -> Option<(Timestamp, &'static str)> {
    let mut deadlines = Vec::new();
    for (id, placement) in &view.state.placements {
        let Some(deployed) = view.state.services.get(&placement.service) else { continue };
        let deploy = &deployed.spec().deploy;
        match placement.state {
            PlacementState::Serve => {
                let report = view.inventory.replica(placement.node, *id);
                let ready = report.is_some_and(|report| report.phase == Phase::Ready);
                if deployed.rollout.is_some() && !ready {
                    let from = ready_from(placement, report, view.now);
                    let begun = report.map_or(from, |report| report.since.max(from));
                    for since in [from, begun] {
                        deadlines.push((since + deploy.ready_timeout, "a new replica should be ready"));
                    }
                }
            }
            PlacementState::Drain { .. } => {
                let unrouted = view.inventory.unrouted_since(*id);
                deadlines.extend(unrouted.map(|since| (since + deploy.drain_timeout, "a drain ends")));
            }
            PlacementState::Stop { .. } => {}
        }
    }
    for deployed in view.state.services.values() {
        if let Some(rollout) = &deployed.rollout {
            let deploy = &deployed.spec().deploy;
            if let (Some(trial), Some(auto)) = (&rollout.trial, deploy.auto_promote) {
                deadlines.push((trial.since + auto.after, "a canary is judged"));
            }
            let limit = rollout.started + deploy.ready_timeout + deploy.drain_timeout;
            deadlines.push((limit, "a rollout should have found room"));
        }
    }
    deadlines.into_iter().filter(|(at, _)| *at > view.now).min_by_key(|(at, _)| *at)
}

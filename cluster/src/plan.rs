//! From what is agreed and what was last seen to what should change next. A [`Plan`] names its parent, the
//! generation it was made from, and is refused if that is no longer current; carrying it out takes no choice. The
//! same function answers "what next" after every report, so no step counter exists to be lost with a leader.

pub mod cron;
pub mod report;
pub mod rollout;
pub mod route;
pub mod schedule;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::id::{Generation, GoalNumber, NodeId, ReplicaId, Revision, ServiceName};
use crate::inventory::Inventory;
use crate::route::{RouteKey, Tables};
use crate::state::{Baseline, Failure, Receipt, RunEnding, State, Trial, Window};
use crate::time::Timestamp;
use crate::traffic::{Counted, Counters, ProxyCount, Tally, Traffic};
use report::Waiting;

/// One change to the state, decided by the leader.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// A new replica of the service's target on this node.
    Place {
        service: ServiceName,
        node: NodeId,
    },
    Drain {
        replica: ReplicaId,
    },
    Stop {
        replica: ReplicaId,
        erase: bool,
    },
    /// It is confirmed gone.
    Forget {
        replica: ReplicaId,
    },
    /// The rollout begins, with this to compare with.
    Begin {
        service: ServiceName,
        baseline: Baseline,
    },
    /// The first replica found out which image this revision means.
    Pin {
        service: ServiceName,
        revision: Revision,
        digest: String,
    },
    /// A canary is measured from here on.
    Try {
        service: ServiceName,
        trial: Trial,
    },
    /// A canary was measured and is good.
    Promote {
        service: ServiceName,
        because: String,
    },
    /// The revision does not get ready, or fails its trial: back to the settled one, if there is one.
    GiveUp {
        service: ServiceName,
        failure: Failure,
        receipt: Option<Box<Receipt>>,
    },
    /// The rollout is over.
    Settle {
        service: ServiceName,
        receipt: Box<Receipt>,
    },
    /// Ten seconds after it.
    Complete {
        service: ServiceName,
        revision: Revision,
        after: Window,
    },
    /// A first deploy that had failed works after all.
    Recover {
        service: ServiceName,
    },
    /// Its volumes are on this node, without a replica whose removal would take them along.
    Erase {
        service: ServiceName,
        node: NodeId,
    },
    /// These are its schedules from here on, and when those that are new are due next.
    Schedule {
        service: ServiceName,
        next: BTreeMap<String, Option<Timestamp>>,
    },
    /// This due time is a replica's; `next` is the one after it.
    Run {
        service: ServiceName,
        cron: String,
        due: Timestamp,
        replica: ReplicaId,
        next: Option<Timestamp>,
    },
    /// What a replica was given is over.
    Ran {
        service: ServiceName,
        cron: String,
        due: Timestamp,
        ending: RunEnding,
    },
    /// Nobody gets this due time, nor any other before `next`.
    Skip {
        service: ServiceName,
        cron: String,
        due: Timestamp,
        reason: String,
        next: Option<Timestamp>,
    },
    /// Whose this route is from here on: this service's, or nobody's.
    Route {
        route: RouteKey,
        service: Option<ServiceName>,
    },
    /// Its last replica is gone and `orca rm` was asked.
    Delete {
        service: ServiceName,
    },
    /// Silent for too long: its replicas are placed elsewhere.
    Bury {
        node: NodeId,
    },
    /// It is heard again.
    Revive {
        node: NodeId,
    },
}

/// What should change, and why what is not yet as it should be is not.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    pub parent: Generation,
    pub steps: Vec<Step>,
    pub waiting: BTreeMap<ServiceName, Vec<Waiting>>,
}

/// Everything a plan is made from.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    pub state: &'a State,
    pub inventory: &'a Inventory,
    /// The goal last sent to each node, and the generation it came from.
    pub sent: &'a BTreeMap<NodeId, (GoalNumber, Generation)>,
    /// Each service's traffic in the last minute.
    pub recent: &'a BTreeMap<ServiceName, Window>,
    pub now: Timestamp,
}

pub fn plan(view: View<'_>, tables: &Tables) -> Plan {
    let mut plan = Plan { parent: view.state.generation, ..Plan::default() };
    plan.nodes(view);
    if !plan.steps.is_empty() {
        // What a node's fate means for services is for the next plan, made from the state that has it.
        return plan;
    }
    let mut room = schedule::Room::new(view);
    for (name, deployed) in &view.state.services {
        let mut next = rollout::next(view, name, deployed, tables, &mut room);
        let drained = |step: &Step| if let Step::Drain { replica } = step { Some(*replica) } else { None };
        let leaving: BTreeSet<ReplicaId> = next.steps.iter().filter_map(drained).collect();
        plan.steps.append(&mut next.steps);
        plan.steps.append(&mut cron::next(view, name, deployed, &leaving));
        if !next.waiting.is_empty() {
            plan.waiting.insert(name.clone(), next.waiting);
        }
    }
    plan.steps.append(&mut route::next(view, tables));
    plan
}

impl Plan {
    fn nodes(&mut self, view: View<'_>) {
        let silent = |id: NodeId| view.inventory.is_silent(id, view.now);
        let all = &view.state.nodes;
        // When more than half of the nodes are silent, the fault is probably ours, and then nobody is called dead.
        let ours = all.keys().filter(|id| silent(**id)).count() * 2 > all.len();
        for (id, node) in all {
            let is_heard = view.inventory.heard(*id).is_some() && !view.inventory.is_suspect(*id, view.now);
            if node.dead && is_heard {
                self.steps.push(Step::Revive { node: *id });
            }
            if !node.dead && silent(*id) && !ours {
                self.steps.push(Step::Bury { node: *id });
            }
        }
    }
}

impl View<'_> {
    /// Whether every proxy uses tables made from this generation or a later one. A node that is merely silent may
    /// go on serving by older ones, so it counts until it is given up.
    pub fn acknowledged(&self, generation: Generation) -> bool {
        let nodes = self.state.nodes.iter().filter(|(_, node)| !node.dead);
        nodes.map(|(id, _)| *id).all(|node| self.uses(node, generation))
    }

    /// The same, of the nodes that are heard. Silence acknowledges nothing: where none is heard, it is not so.
    pub fn acknowledged_by_heard(&self, generation: Generation) -> bool {
        let mut nodes = self.serving_nodes().peekable();
        nodes.peek().is_some() && nodes.all(|node| self.uses(node, generation))
    }

    fn uses(&self, node: NodeId, generation: Generation) -> bool {
        self.inventory.observed(node).is_some_and(|seen| seen.acknowledged.1 >= generation)
    }

    /// Whether every node that counts uses the newest tables it was sent.
    pub fn tables_in_use(&self) -> bool {
        self.serving_nodes().all(|node| match (self.sent.get(&node), self.inventory.observed(node)) {
            (Some((number, _)), Some(seen)) => seen.acknowledged.0 >= *number,
            _ => false,
        })
    }

    /// Requests and upgraded connections that some proxy still has with this replica, and scheduled runs it has not
    /// ended.
    pub fn in_flight(&self, replica: ReplicaId) -> u64 {
        let busy = self.inventory.all().filter_map(|(_, seen)| seen.traffic.in_flight.get(&replica));
        let requests: u64 = busy.map(|busy| u64::from(busy.requests) + u64::from(busy.upgraded)).sum();
        let service = self.state.placements.get(&replica).and_then(|p| self.state.services.get(&p.service));
        let records = service.into_iter().flat_map(|deployed| deployed.schedules.values());
        let runs = records.filter(|record| record.run.is_some_and(|run| run.replica == replica)).count();
        requests + runs as u64
    }

    /// A service's counters, summed over all proxies.
    pub fn totals(&self, service: &ServiceName) -> Counters {
        let mut totals = Counters::default();
        for (_, seen) in self.inventory.all() {
            if let Some(traffic) = seen.traffic.services.get(service) {
                totals.add(&traffic.total());
            }
        }
        totals
    }

    /// What every proxy that was heard has counted of a service so far.
    pub fn tally(&self, service: &ServiceName) -> Tally {
        self.tally_of(|traffic| traffic.total(service))
    }

    /// Of the requests that replicas of one template have answered.
    pub fn tally_of_template(&self, service: &ServiceName, template: Revision) -> Tally {
        self.tally_of(|traffic| traffic.of_template(service, template))
    }

    /// Every proxy that was heard, with nothing counted.
    pub fn proxies(&self) -> Tally {
        self.tally_of(|_| Counters::default())
    }

    fn tally_of(&self, count: impl Fn(&Traffic) -> Counters) -> Tally {
        let proxies = self.inventory.all().map(|(node, seen)| (node, &seen.traffic));
        let counted = |t: &Traffic| ProxyCount { started: t.started, gaps: t.gaps, counted: count(t) };
        Tally(proxies.map(|(node, traffic)| (node, counted(traffic))).collect())
    }

    /// What was counted of a service since this tally of it, which was taken at that time. Each proxy that has lived since
    /// then counts for itself; it is exact as long as none of them has ended without handing over.
    pub fn counted_since(&self, service: &ServiceName, tally: &Tally, at: Timestamp) -> Counted {
        self.difference(tally, at, |traffic| traffic.total(service))
    }

    /// The same, of one template.
    pub fn counted_of_template(
        &self,
        service: &ServiceName,
        template: Revision,
        tally: &Tally,
        at: Timestamp,
    ) -> Counted {
        self.difference(tally, at, |traffic| traffic.of_template(service, template))
    }

    fn difference(&self, tally: &Tally, at: Timestamp, count: impl Fn(&Traffic) -> Counters) -> Counted {
        let mut counted = Counted::default();
        for (node, seen) in self.inventory.all() {
            let base = tally.0.get(&node);
            let lives = self.inventory.ended(node).chain([&seen.traffic]);
            for traffic in lives {
                match base {
                    Some(base) if traffic.started == base.started => {
                        counted.counters.add(&count(traffic).since(&base.counted));
                        counted.at_least |= traffic.started != seen.traffic.started || traffic.gaps != base.gaps;
                    }
                    // Over before the tally.
                    Some(base) if traffic.started < base.started => {}
                    Some(_) => {
                        counted.counters.add(&count(traffic));
                        counted.at_least = true;
                    }
                    None if traffic.started >= at => counted.counters.add(&count(traffic)),
                    // It was there and not heard: how much of what it has counted is new, nobody knows.
                    None => counted.at_least = true,
                }
            }
            counted.at_least |= self.inventory.is_suspect(node, self.now);
        }
        counted.at_least |= tally.0.keys().any(|node| self.inventory.heard(*node).is_none());
        counted
    }

    /// When the counters that [`totals`](View::totals) sums were read.
    pub fn counted_at(&self) -> Timestamp {
        self.inventory.all().map(|(_, seen)| seen.traffic.at).max().unwrap_or(self.now)
    }

    fn serving_nodes(&self) -> impl Iterator<Item = NodeId> {
        self.state
            .nodes
            .iter()
            .filter(|(id, node)| !node.dead && !self.inventory.is_suspect(**id, self.now))
            .map(|(id, _)| *id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::Label;
    use crate::replica::Observed;
    use crate::traffic::ServiceTraffic;
    use std::time::Duration;

    const N1: NodeId = NodeId(1);
    const N2: NodeId = NodeId(2);
    const T: Timestamp = Timestamp(1_000_000);

    fn web() -> ServiceName {
        ServiceName::new(Label::new("app").unwrap(), Label::new("web").unwrap())
    }

    /// A leader's inventory, told what proxies have counted.
    struct Counting {
        inventory: Inventory,
        now: Timestamp,
    }

    impl Counting {
        fn new() -> Counting {
            Counting { inventory: Inventory::new(T), now: T }
        }

        /// A node's proxy, started so many seconds after [`T`], has answered so many requests by now.
        fn hear(&mut self, node: NodeId, started: u64, requests: u64) -> &mut Counting {
            self.hear_with(node, started, requests, 0)
        }

        fn hear_with(&mut self, node: NodeId, started: u64, requests: u64, gaps: u64) -> &mut Counting {
            let counters = Counters { requests, ..Counters::default() };
            let service = ServiceTraffic { revisions: BTreeMap::from([(Revision(1), counters)]), ..Default::default() };
            let started = T + Duration::from_secs(started);
            let services = BTreeMap::from([(web(), service)]);
            let traffic = Traffic { at: self.now, started, gaps, services, in_flight: BTreeMap::new() };
            self.inventory.record(node, Observed { at: self.now, traffic, ..Observed::default() }, self.now);
            self
        }

        fn wait(&mut self, seconds: u64) -> &mut Counting {
            self.now = self.now + Duration::from_secs(seconds);
            self
        }

        fn with<R>(&self, look: impl FnOnce(View<'_>) -> R) -> R {
            let (state, sent, recent) = (State::default(), BTreeMap::new(), BTreeMap::new());
            look(View { state: &state, inventory: &self.inventory, sent: &sent, recent: &recent, now: self.now })
        }

        fn tally(&self) -> (Tally, Timestamp) {
            self.with(|view| (view.tally(&web()), view.counted_at()))
        }

        /// Requests since then, and whether these are all.
        fn since(&self, (tally, at): &(Tally, Timestamp)) -> (u64, &'static str) {
            let counted = self.with(|view| view.counted_since(&web(), tally, *at));
            (counted.counters.requests, if counted.at_least { "at least" } else { "exactly" })
        }
    }

    #[test]
    fn what_is_counted_between_two_moments_is_exact_while_no_proxy_restarts() {
        let mut counting = Counting::new();
        let before = counting.hear(N1, 0, 100).hear(N2, 0, 10).wait(5).tally();
        assert_eq!(counting.hear(N1, 0, 150).hear(N2, 0, 11).since(&before), (51, "exactly"));
    }

    #[test]
    fn a_proxy_that_restarts_takes_nothing_from_what_was_counted() {
        let mut counting = Counting::new();
        let before = counting.hear(N1, 0, 100).hear(N2, 0, 10).wait(5).tally();
        counting.hear(N1, 0, 150).wait(5);
        assert_eq!(counting.hear(N1, 8, 3).hear(N2, 0, 20).since(&before), (50 + 3 + 10, "at least"));
        // More than before the restart: no smaller number gives it away.
        assert_eq!(counting.hear(N1, 8, 700).since(&before), (50 + 700 + 10, "at least"));
        assert_eq!(counting.wait(1).hear(N1, 11, 1).hear(N2, 0, 20).since(&before), (50 + 700 + 1 + 10, "at least"));
        // Between two later moments nothing was restarted.
        let later = counting.tally();
        assert_eq!(counting.hear(N1, 11, 5).since(&later), (4, "exactly"));
    }

    #[test]
    fn another_leader_goes_on_counting_where_the_one_before_began() {
        let before = Counting::new().hear(N1, 0, 100).hear(N2, 0, 10).wait(5).tally();
        let mut counting = Counting::new();
        assert_eq!(counting.wait(6).hear(N1, 0, 130).hear(N2, 0, 12).since(&before), (32, "exactly"));
        // What the proxy of n1 had counted before its restart is told to nobody who leads now.
        let mut counting = Counting::new();
        assert_eq!(counting.wait(6).hear(N1, 6, 400).hear(N2, 0, 12).since(&before), (402, "at least"));
        // Of n2 nothing was heard yet.
        let mut counting = Counting::new();
        assert_eq!(counting.wait(6).hear(N1, 0, 130).since(&before), (30, "at least"));
    }

    #[test]
    fn a_proxy_that_is_killed_while_it_hands_over_leaves_the_least() {
        let mut counting = Counting::new();
        let before = counting.hear_with(N1, 0, 100, 1).wait(5).tally();
        assert_eq!(counting.hear_with(N1, 0, 150, 1).since(&before), (50, "exactly"));
        assert_eq!(counting.hear_with(N1, 0, 170, 2).since(&before), (70, "at least"));
        // A successor that had reported what it has counted, and has taken it along.
        assert_eq!(counting.hear_with(N1, 0, 90, 2).since(&before), (0, "at least"));
    }

    #[test]
    fn what_a_node_counted_before_it_was_first_heard_is_not_of_this_rollout() {
        let mut counting = Counting::new();
        let before = counting.wait(5).hear(N1, 0, 100).tally();
        assert_eq!(counting.hear(N1, 0, 101).hear(N2, 0, 9_000).since(&before), (1, "at least"));
        let mut counting = Counting::new();
        let before = counting.wait(5).hear(N1, 0, 100).tally();
        assert_eq!(counting.hear(N1, 0, 101).hear(N2, 7, 20).since(&before), (21, "exactly"));
    }
}

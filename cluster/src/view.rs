//! What is agreed and what was last seen, together: who has taken over which tables, what is still in flight, what was
//! counted between two moments. Plans, diagnoses and statuses are all made from this one view.

use std::collections::BTreeMap;

use crate::id::{Generation, GoalNumber, NodeId, ReplicaId, Revision, ServiceName};
use crate::inventory::Inventory;
use crate::state::{State, Window};
use crate::time::Timestamp;
use crate::traffic::{Counted, Counters, ProxyCount, Tally, Traffic};

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

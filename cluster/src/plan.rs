//! From what is agreed and what was last seen to what should change next. A [`Plan`] names its parent, the
//! generation it was made from, and is refused if that is no longer current; carrying it out takes no choice. The
//! same function answers "what next" after every report, so no step counter exists to be lost with a leader.

pub mod report;
pub mod rollout;
pub mod route;
pub mod schedule;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::id::{Generation, GoalNumber, NodeId, ReplicaId, Revision, ServiceName};
use crate::inventory::{DEAD_AFTER, Inventory};
use crate::state::{Baseline, Failure, Receipt, State, Window};
use crate::time::Timestamp;
use crate::traffic::Counters;
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
    /// The revision does not get ready: back to the settled one, if there is one.
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

pub fn plan(view: View<'_>) -> Plan {
    let mut plan = Plan { parent: view.state.generation, ..Plan::default() };
    plan.nodes(view);
    if !plan.steps.is_empty() {
        // What a node's fate means for services is for the next plan, made from the state that has it.
        return plan;
    }
    let mut room = schedule::Room::new(view);
    for (name, deployed) in &view.state.services {
        let mut next = rollout::next(view, name, deployed, &mut room);
        plan.steps.append(&mut next.steps);
        if !next.waiting.is_empty() {
            plan.waiting.insert(name.clone(), next.waiting);
        }
    }
    plan
}

impl Plan {
    fn nodes(&mut self, view: View<'_>) {
        let silent = |id: NodeId| {
            let last = view.inventory.heard(id).unwrap_or_default().max(view.inventory.began());
            view.now.since(last) >= DEAD_AFTER
        };
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

    /// The same, of the nodes that are heard.
    pub fn acknowledged_by_heard(&self, generation: Generation) -> bool {
        self.serving_nodes().all(|node| self.uses(node, generation))
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

    /// Requests and upgraded connections that some proxy still has with this replica.
    pub fn in_flight(&self, replica: ReplicaId) -> u64 {
        self.inventory
            .all()
            .filter_map(|(_, seen)| seen.traffic.in_flight.get(&replica))
            .map(|busy| u64::from(busy.requests) + u64::from(busy.upgraded))
            .sum()
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

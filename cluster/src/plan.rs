//! From what is agreed and what was last seen to what should change next. A [`Plan`] names its parent, the
//! generation it was made from, and is refused if that is no longer current; carrying it out takes no choice. The
//! same function answers "what next" after every report, so no step counter exists to be lost with a leader.

pub mod cron;
pub mod rollout;
pub mod route;
pub mod schedule;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::id::{Generation, NodeId, ReplicaId, Revision, ServiceName};
use crate::route::{RouteKey, Tables};
use crate::state::{Baseline, Failure, Receipt, RunEnding, Trial, Window};
use crate::time::Timestamp;
use crate::view::View;
use crate::waiting::Waiting;

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
        // How its runs ended is told of a service before it is deleted.
        plan.steps.append(&mut cron::next(view, name, deployed, &leaving));
        plan.steps.append(&mut next.steps);
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

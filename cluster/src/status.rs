//! What people and programs are shown: made from the agreed state and from what nodes last said, in one place, so
//! that the CLI, the API and the tests cannot differ.

pub mod verdict;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::id::{Generation, NodeId, ReplicaId, Revision, ServiceName};
use crate::replica::{Cause, Exit, Facts, Phase, Pulled, Pulling, Purpose, Trouble, Usage};
use crate::spec::{Source, Strategy};
use crate::state::{Deployed, Direction, PlacementState, Receipt, ScheduleRecord, Window};
use crate::time::Timestamp;
use crate::traffic::InFlight;
use crate::view::View;
use crate::waiting::Waiting;
use crate::why::{self, CRASH_LOOP_AFTER, Diagnosis};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    pub cluster: String,
    pub cluster_id: String,
    pub generation: Generation,
    pub at: Timestamp,
    pub nodes: Vec<NodeStatus>,
    pub services: Vec<ServiceStatus>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeStatus {
    pub id: NodeId,
    pub name: String,
    pub address: String,
    pub condition: NodeCondition,
    pub last_heard: Option<Timestamp>,
    pub replicas: u32,
    pub facts: Option<Facts>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NodeCondition {
    Alive,
    Suspect,
    Dead,
    /// This leader has not heard it yet.
    Unheard,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ServiceStatus {
    pub name: ServiceName,
    pub state: ServiceState,
    /// `redis:7`, `./api.wasm`.
    pub source: String,
    pub module: bool,
    pub revision: Revision,
    pub digest: Option<String>,
    pub strategy: Strategy,
    pub wanted: u32,
    pub ready: u32,
    pub replicas: Vec<ReplicaStatus>,
    /// As people write them: `shop.example.com/api/*`; `/*` is any host.
    pub routes: Vec<String>,
    /// By their cron expressions.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub schedules: BTreeMap<String, ScheduleRecord>,
    pub rollout: Option<RolloutStatus>,
    pub waiting: Vec<Waiting>,
    /// Absent if it is as asked.
    pub why: Option<Diagnosis>,
    /// The last minute.
    pub recent: Window,
    pub last_receipt: Option<Receipt>,
}

impl ServiceStatus {
    /// How the rollout of this revision ended, if it was the last.
    pub fn receipt_of(&self, revision: Revision) -> Option<&Receipt> {
        self.last_receipt.as_ref().filter(|receipt| receipt.revision == revision)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ServiceState {
    /// As asked.
    Running,
    /// Not all replicas are ready, for no bad reason known. A readiness probe that does not pass yet is none before
    /// `ready_timeout_secs`.
    Starting,
    Updating,
    RollingBack,
    /// The canary is ready and waits for a person.
    Canary,
    /// Serves with fewer replicas than asked.
    Degraded,
    /// Serves nothing.
    Failing,
    CrashLooping,
    Stopped,
    Removing,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RolloutStatus {
    pub to: Revision,
    pub from: Option<Revision>,
    pub started: Timestamp,
    pub back: bool,
    /// Why it goes back.
    pub because: Option<String>,
    /// How long a new replica may take to get ready before it is given up.
    #[serde(default)]
    pub ready_timeout_secs: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ReplicaStatus {
    pub id: ReplicaId,
    pub node: NodeId,
    pub node_name: String,
    pub revision: Revision,
    pub phase: Phase,
    /// It gets no new requests.
    pub leaving: bool,
    /// In this phase.
    pub since: Timestamp,
    /// When it was decided that there shall be it.
    #[serde(default)]
    pub placed: Timestamp,
    pub address: Option<SocketAddr>,
    pub restarts: u32,
    pub failures: u32,
    pub last_exit: Option<Exit>,
    pub trouble: Option<Trouble>,
    pub usage: Usage,
    pub in_flight: InFlight,
    pub pulled: Option<Pulled>,
    /// How far its pull is, if it is being pulled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pulling: Option<Pulling>,
    pub ready_after_ms: Option<u64>,
}

/// Everything, as of `view.now`. `waiting` is what the leader's last plan said.
pub fn status(view: View<'_>, waiting: &BTreeMap<ServiceName, Vec<Waiting>>) -> Status {
    let services = view
        .state
        .services
        .iter()
        .map(|(name, deployed)| service(view, name, deployed, waiting.get(name).map_or(&[], Vec::as_slice)))
        .collect();
    let cluster = view.state.cluster.as_ref();
    Status {
        cluster: cluster.map(|cluster| cluster.name.to_string()).unwrap_or_default(),
        cluster_id: cluster.map(|cluster| cluster.id.clone()).unwrap_or_default(),
        generation: view.state.generation,
        at: view.now,
        nodes: nodes(view),
        services,
    }
}

fn nodes(view: View<'_>) -> Vec<NodeStatus> {
    view.state
        .nodes
        .iter()
        .map(|(id, node)| {
            let last_heard = view.inventory.heard(*id);
            let condition = match (node.dead, last_heard) {
                (true, _) => NodeCondition::Dead,
                (false, None) => NodeCondition::Unheard,
                (false, Some(_)) if view.inventory.is_suspect(*id, view.now) => NodeCondition::Suspect,
                (false, Some(_)) => NodeCondition::Alive,
            };
            let replicas = view.state.placements.values().filter(|placement| placement.node == *id).count();
            NodeStatus {
                id: *id,
                name: node.name.clone(),
                address: node.address.clone(),
                condition,
                last_heard,
                replicas: u32::try_from(replicas).unwrap_or(u32::MAX),
                facts: view.inventory.observed(*id).map(|seen| seen.facts.clone()),
            }
        })
        .collect()
}

pub fn service(view: View<'_>, name: &ServiceName, deployed: &Deployed, waiting: &[Waiting]) -> ServiceStatus {
    let spec = deployed.spec();
    let replicas: Vec<ReplicaStatus> = view.state.placements_of(name).map(|(id, p)| replica(view, id, p)).collect();
    let silent = view.state.placements_of(name).any(|(_, placement)| {
        placement.state == PlacementState::Serve && view.inventory.is_suspect(placement.node, view.now)
    });
    let ready = replicas.iter().filter(|r| !r.leaving && r.phase == Phase::Ready).count();
    let ready = u32::try_from(ready).unwrap_or(u32::MAX);
    let rollout = deployed.rollout.as_ref().map(|rollout| RolloutStatus {
        to: rollout.to,
        from: rollout.from,
        started: rollout.started,
        back: rollout.direction != Direction::Forward,
        because: match &rollout.direction {
            Direction::Forward => None,
            Direction::Back { why } => Some(why.cause.clone()),
        },
        ready_timeout_secs: spec.deploy.ready_timeout.as_secs(),
    });
    ServiceStatus {
        name: name.clone(),
        state: state(deployed, &replicas, ready, waiting, silent),
        source: match &spec.source {
            Source::Image(image) => image.clone(),
            Source::Module(module) => module.path.clone(),
        },
        module: spec.is_module(),
        revision: deployed.target,
        digest: deployed.target_record().digest.clone(),
        strategy: spec.deploy.strategy,
        wanted: deployed.wanted(),
        ready,
        routes: spec.routes.iter().map(ToString::to_string).collect(),
        schedules: deployed.schedules.clone(),
        rollout,
        waiting: waiting.to_vec(),
        why: why::why(view, name, waiting),
        recent: view.recent.get(name).cloned().unwrap_or_default(),
        last_receipt: deployed.receipts.back().map(Receipt::told),
        replicas,
    }
}

fn replica(view: View<'_>, id: ReplicaId, placement: &crate::state::Placement) -> ReplicaStatus {
    let report = view.inventory.replica(placement.node, id);
    // Not heard any more, or not yet by this leader.
    let dead = view.state.nodes.get(&placement.node).is_none_or(|node| node.dead);
    let silent = view.inventory.is_suspect(placement.node, view.now);
    let is_unknown = dead || silent || view.inventory.heard(placement.node).is_none();
    let mut in_flight = InFlight::default();
    for (_, seen) in view.inventory.all() {
        if let Some(busy) = seen.traffic.in_flight.get(&id) {
            in_flight.requests += busy.requests;
            in_flight.upgraded += busy.upgraded;
        }
    }
    ReplicaStatus {
        id,
        node: placement.node,
        node_name: view.state.nodes.get(&placement.node).map(|node| node.name.clone()).unwrap_or_default(),
        revision: placement.revision,
        phase: if is_unknown { Phase::Unknown } else { report.map_or(Phase::Pending, |report| report.phase) },
        leaving: placement.state != PlacementState::Serve,
        since: report.map_or(placement.since, |report| report.since),
        placed: placement.since,
        address: report.and_then(|report| report.address),
        restarts: report.map_or(0, |report| report.restarts),
        failures: report.map_or(0, |report| report.failures),
        last_exit: report.and_then(|report| report.last_exit.clone()),
        trouble: report.and_then(|report| report.trouble.clone()),
        usage: report.map(|report| report.usage).unwrap_or_default(),
        in_flight,
        pulled: report.and_then(|report| report.pulled),
        pulling: report.filter(|_| !is_unknown).and_then(|report| report.pulling),
        ready_after_ms: report.and_then(|report| report.ready_after_ms),
    }
}

/// Whether all that is amiss with a replica is that its readiness probe does not pass yet, in a time that it may take.
fn is_starting(replica: &ReplicaStatus, ready_timeout: Duration) -> bool {
    let ReplicaStatus { phase: Phase::Starting, failures: 0, trouble: Some(trouble), .. } = replica else {
        return false;
    };
    match trouble.cause {
        Cause::ProbeFailing { purpose: Purpose::Readiness, for_ms, .. } => {
            Duration::from_millis(for_ms) < ready_timeout
        }
        _ => false,
    }
}

fn state(
    deployed: &Deployed,
    replicas: &[ReplicaStatus],
    ready: u32,
    waiting: &[Waiting],
    silent: bool,
) -> ServiceState {
    let wanted = deployed.wanted();
    if deployed.removal.is_some() {
        return ServiceState::Removing;
    }
    if deployed.stopped {
        return ServiceState::Stopped;
    }
    if let Some(rollout) = &deployed.rollout {
        if rollout.direction != Direction::Forward {
            return ServiceState::RollingBack;
        }
        let is_canary = |w: &Waiting| matches!(w, Waiting::ForPromotion { .. } | Waiting::ForMeasurement { .. });
        if waiting.iter().any(is_canary) {
            return ServiceState::Canary;
        }
        return if deployed.settled.is_some() { ServiceState::Updating } else { ServiceState::Starting };
    }
    if ready >= wanted {
        return ServiceState::Running;
    }
    let serving = replicas.iter().filter(|replica| !replica.leaving);
    let looping = serving.clone().any(|r| r.failures >= CRASH_LOOP_AFTER && r.phase != Phase::Ready);
    let ready_timeout = deployed.target_record().spec.deploy.ready_timeout;
    let troubled =
        serving.clone().any(|r| r.trouble.is_some() && r.phase != Phase::Ready && !is_starting(r, ready_timeout));
    let stuck = waiting.iter().any(|w| matches!(w, Waiting::ForRoom { .. } | Waiting::ForNode { .. }));
    match (looping, troubled || stuck || silent, ready) {
        (true, _, _) => ServiceState::CrashLooping,
        (false, true, 0) => ServiceState::Failing,
        (false, true, _) => ServiceState::Degraded,
        (false, false, _) => ServiceState::Starting,
    }
}

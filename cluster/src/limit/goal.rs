//! How long a goal may become: of every service the most that its replicas and its routes take, written out.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6};
use std::time::Duration;

use super::json_bytes;
use crate::goal::{Duty, Workload, replica_goal};
use crate::id::{NodeId, ReplicaId, Revision, ServiceName};
use crate::route::{Absence, Backend, RouteKey, Upstream};
use crate::secret::SecretName;
use crate::spec::Route;
use crate::state::{Deployed, PlacementState, RevisionRecord, State};
use crate::time::Timestamp;

/// The most that the replicas of all services, and the tables, take in one goal.
pub(super) fn goal_bytes(state: &State) -> u64 {
    let mut replicas: BTreeMap<&ServiceName, Replicas> = BTreeMap::new();
    for placement in state.placements.values() {
        let Replicas { serving, leaving } = replicas.entry(&placement.service).or_default();
        let counts = match placement.state {
            PlacementState::Serve => serving,
            PlacementState::Drain { .. } | PlacementState::Stop { .. } => leaving,
        };
        *counts.entry(placement.revision).or_default() += 1;
    }
    let mut held: BTreeMap<&ServiceName, BTreeSet<&Route>> = BTreeMap::new();
    for (route, holder) in &state.routes {
        held.entry(holder).or_default().insert(&route.0);
    }
    let services = state.services.iter().map(|(name, deployed)| {
        let replicas = replicas.remove(name).unwrap_or_default();
        service_bytes(name, deployed, replicas, held.remove(name).unwrap_or_default())
    });
    services.sum()
}

/// How many replicas a service has of each template.
#[derive(Debug, Default)]
struct Replicas {
    serving: BTreeMap<Revision, u64>,
    leaving: BTreeMap<Revision, u64>,
}

/// The most that one service takes in a goal: its rows in the tables, all replicas it has and may yet get. Those of
/// what is wanted and of what a failed rollout returns to are counted in full, whether they are there or not, so that
/// no step of a rollout, no restart of a stopped service and no rollback by ourselves goes past what was accepted.
fn service_bytes(name: &ServiceName, deployed: &Deployed, replicas: Replicas, held: BTreeSet<&Route>) -> u64 {
    let target = deployed.target_record();
    let kept: Vec<&RevisionRecord> = [Some(target), deployed.settled_record()].into_iter().flatten().collect();
    let Replicas { mut serving, leaving } = replicas;
    for record in &kept {
        let count = serving.entry(record.template).or_default();
        *count = (*count).max(u64::from(record.spec.replicas));
    }
    let mut bytes = 0;
    for (template, count) in serving.iter().chain(&leaving) {
        bytes += count * replica_bytes(name, deployed, *template, &kept);
    }
    // Also those that it only answers until another service is ready to.
    let routes: BTreeSet<_> = kept.iter().flat_map(|record| &record.spec.routes).chain(held).collect();
    let routes = routes.into_iter().map(|route| json_bytes(&(RouteKey(route.clone()), name)));
    let upstream =
        Upstream { backends: vec![], absence: Absence::ScaledToZero, response_timeout: Duration::MAX, module: false };
    bytes + routes.sum::<u64>() + json_bytes(&(name, upstream))
}

/// The most that one replica of a template takes, with its row in the tables.
fn replica_bytes(name: &ServiceName, deployed: &Deployed, template: Revision, kept: &[&RevisionRecord]) -> u64 {
    let Some(made_from) = deployed.revisions.get(&template) else { return 0 };
    // Secrets that are global today may be the project's own tomorrow: that is the longer name.
    let means = |secret: &str| SecretName::new(Some(name.project.clone()), secret).ok();
    let goal_bytes = |newest: &RevisionRecord| {
        let revision = Revision(u64::MAX);
        // It may be the one that has all the runs, those of schedules that were taken out included.
        let wanted = newest.spec.schedules.iter().map(|schedule| &schedule.cron);
        let crons = wanted.chain(deployed.schedules.keys());
        let runs = crons.map(|cron| (cron.clone(), Timestamp(u64::MAX))).collect();
        let mut goal = replica_goal(name, revision, Duty::StopAndErase, made_from, newest, means, runs);
        if let Workload::Container(container) = &mut goal.workload {
            // Found out by the first replica.
            container.digest = Some(format!("sha256:{}", "0".repeat(64)));
            container.pull = false;
        }
        json_bytes(&(ReplicaId(u64::MAX), goal))
    };
    // Which of these holds changes with the rollout; for a template of neither it is the newest that has it.
    let of_template = |record: &&RevisionRecord| record.template == template;
    let goal = kept.iter().copied().filter(of_template).map(goal_bytes).max();
    let goal = goal.or_else(|| deployed.revisions.values().rev().find(of_template).map(goal_bytes));
    let goal = goal.unwrap_or_else(|| goal_bytes(made_from));
    let address = SocketAddrV6::new(Ipv6Addr::from([0xff; 16]), u16::MAX, 0, u32::MAX);
    let backend = Backend {
        replica: ReplicaId(u64::MAX),
        revision: Revision(u64::MAX),
        node: NodeId(u64::MAX),
        address: Some(SocketAddr::V6(address)),
        weight: u16::MAX,
    };
    // In a map its number has quotes around it; in a list a comma follows.
    goal + json_bytes(&backend) + 4
}

use std::time::Duration;

use orca_cluster::id::{NodeId, ReplicaId};
use orca_cluster::node::Task;
use orca_cluster::state::PlacementState;

use crate::sim::{Node, World};

/// What the leader decided before it heard a node again may still be carried out so much later.
const UNDER_WAY_MAX: Duration = Duration::from_secs(1);

/// (11) When we stop a replica that served, no proxy has a request of it any more, or none could give it a new one for as
/// long as its drain time.
pub fn check(world: &World, on: NodeId, task: &Task) {
    let Task::Stop { replica, .. } = task else { return };
    // One that is restarted because it is not alive, or that the state has already forgotten, was not drained.
    let Some(placement) = world.state.placements.get(replica) else { return };
    if !matches!(placement.state, PlacementState::Stop { .. }) {
        return;
    }
    let Some(drained) = world.invariants.drains.get(replica) else {
        world.broken(&format!("{replica} on {on} is stopped and was never drained"));
    };
    let deployed = world.state.services.get(&placement.service);
    let timeout = deployed.map(|deployed| deployed.spec().deploy.drain_timeout).unwrap_or_default();
    let in_flight: u32 =
        world.nodes.values().filter_map(|node| node.runtime.in_flight().get(replica).map(|busy| busy.requests)).sum();
    let excused = world.invariants.lost.contains(replica) || world.now.since(world.invariants.away) < UNDER_WAY_MAX;
    if in_flight > 0 && world.now.since(*drained) < timeout && !excused {
        let since = world.now.since(*drained).as_secs_f64();
        world.broken(&format!(
            "{replica} on {on} is stopped with {in_flight} requests in flight, {since:.1} s after it could get a new one"
        ));
    }
}

/// Remembers until when the proxies that count give new requests to each replica that leaves.
pub fn note(world: &mut World) {
    let silent = |id: NodeId| world.leader.as_ref().is_some_and(|leader| leader.inventory().is_suspect(id, world.now));
    let counts = |node: &Node| !node.cut_off && node.brain.is_some() && !silent(node.id);
    if !world.nodes.values().all(counts) {
        world.invariants.away = world.now;
    }
    for (id, placement) in &world.state.placements {
        if placement.state == PlacementState::Serve {
            continue;
        }
        let named = world.nodes.values().filter(|node| counts(node)).any(|node| names(node, *id));
        let drained = world.invariants.drains.entry(*id).or_insert(world.now);
        if named {
            *drained = world.now;
        }
        if world.state.nodes.get(&placement.node).is_none_or(|node| node.dead) {
            world.invariants.lost.insert(*id);
        }
    }
}

fn names(node: &Node, replica: ReplicaId) -> bool {
    let mut backends = node.tables.services.values().flat_map(|upstream| &upstream.backends);
    backends.any(|backend| backend.replica == replica)
}

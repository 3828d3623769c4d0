use orca_cluster::id::NodeId;
use orca_cluster::node::Task;
use orca_cluster::state::PlacementState;

use crate::sim::World;

/// (11) When we stop a replica that served, no proxy has a request of it any more, or it has had its drain time.
pub fn check(world: &World, on: NodeId, task: &Task) {
    let Task::Stop { replica, .. } = task else { return };
    // One that is restarted because it is not alive, or that the state has already forgotten, was not drained.
    let stops = world
        .state
        .placements
        .get(replica)
        .is_some_and(|placement| matches!(placement.state, PlacementState::Stop { .. }));
    if !stops {
        return;
    }
    let Some(drained) = world.invariants.drains.get(replica) else {
        world.broken(&format!("{replica} on {on} is stopped and was never drained"));
    };
    let timeout = world
        .state
        .placements
        .get(replica)
        .and_then(|placement| world.state.services.get(&placement.service))
        .map(|deployed| deployed.spec().deploy.drain_timeout)
        .unwrap_or_default();
    let in_flight: u32 =
        world.nodes.values().filter_map(|node| node.runtime.in_flight().get(replica).map(|busy| busy.requests)).sum();
    let cut_off = world.nodes.values().any(|node| node.cut_off || node.brain.is_none());
    if in_flight > 0 && world.now.since(*drained) < timeout && !cut_off {
        world.broken(&format!("{replica} on {on} is stopped with {in_flight} requests in flight"));
    }
}

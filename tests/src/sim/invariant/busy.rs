use orca_cluster::id::NodeId;

use crate::sim::World;

/// Far more than a dozen replicas that are probed every 50 ms at first need.
const ACTIONS_MAX: usize = 500;

/// What fails is not tried again at once, for ever: a brain has only so much to do in a second.
pub fn check(world: &mut World, node: NodeId, actions: usize) {
    let second = world.now.0 / 1_000;
    let busy = world.invariants.actions.entry(node).or_default();
    if busy.0 != second {
        *busy = (second, 0);
    }
    busy.1 += actions;
    if busy.1 > ACTIONS_MAX {
        world.broken(&format!("{node} does the same again and again"));
    }
}

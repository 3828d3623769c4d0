use orca_cluster::id::{GoalNumber, NodeId};

use crate::sim::World;

/// (2) A node's goal only ever gets a larger number.
pub fn check(world: &World, node: NodeId, before: GoalNumber, after: GoalNumber) {
    if after < before {
        world.broken(&format!("{node} went back from goal {before} to {after}"));
    }
}

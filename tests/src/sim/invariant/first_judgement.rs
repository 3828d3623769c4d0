use orca_cluster::inventory::SUSPECT_AFTER;

use crate::sim::World;

/// (7) A term's first orders come when every node was heard, or had the time to be.
pub fn check(world: &World, orders: usize) {
    let Some(leader) = &world.leader else { return };
    let inventory = leader.inventory();
    let heard = leader.state().nodes.keys().all(|node| inventory.heard(*node).is_some());
    if orders > 0 && !heard && world.now.since(inventory.began()) < SUSPECT_AFTER {
        world.broken("a term begins with orders before all nodes were heard");
    }
}

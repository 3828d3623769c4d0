use std::collections::BTreeMap;

use crate::sim::World;

/// (4) Two running containers of one node never hold the same volume. (A volume is local to its node.)
pub fn check(world: &World) {
    for (id, node) in &world.nodes {
        let mut holders = BTreeMap::new();
        for (replica, container) in node.runtime.containers.iter().filter(|(_, c)| c.running.is_some()) {
            for volume in &container.volumes {
                if let Some(other) = holders.insert(volume, replica) {
                    world.broken(&format!("{replica} and {other} on {id} both hold {volume}"));
                }
            }
        }
    }
}

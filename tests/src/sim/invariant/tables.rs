use orca_cluster::replica::Phase;
use orca_cluster::state::PlacementState;

use crate::sim::World;

/// (5) The newest tables name only replicas that serve, were last reported ready, and are on nodes not suspect.
pub fn check(world: &World) {
    let Some(leader) = &world.leader else { return };
    // What was decided on an older state is put right when the newer one is handed in.
    if leader.state().generation != world.state.generation {
        return;
    }
    for (node, goal) in leader.goals() {
        for (name, upstream) in &goal.tables.services {
            for backend in &upstream.backends {
                let id = backend.replica;
                let Some(placement) = world.state.placements.get(&id) else {
                    world.broken(&format!("tables of {node} send {name} to {id}, which is no more"));
                };
                if placement.state != PlacementState::Serve {
                    world.broken(&format!("tables of {node} send {name} to {id}, which leaves"));
                }
                let ready =
                    leader.inventory().replica(placement.node, id).is_some_and(|report| report.phase == Phase::Ready);
                if !ready {
                    world.broken(&format!("tables of {node} send {name} to {id}, which was not reported ready"));
                }
            }
        }
    }
}

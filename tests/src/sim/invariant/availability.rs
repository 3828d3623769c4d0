use orca_cluster::command::Command;
use orca_cluster::id::ServiceName;
use orca_cluster::plan::Step;
use orca_cluster::replica::Phase;
use orca_cluster::spec::Strategy;
use orca_cluster::state::{PlacementState, State};

use crate::sim::World;

/// (3) Draining ready replicas never leaves fewer of them than wanted minus `max_unavailable`, where the strategy
/// promises that and the service is not to go or to shrink.
pub fn check(world: &World, before: &State, command: &Command) {
    let Command::Adopt { steps, .. } = command else { return };
    for step in steps {
        let Step::Drain { replica } = step else { continue };
        let Some(placement) = before.placements.get(replica) else { continue };
        let name = &placement.service;
        let Some(deployed) = world.state.services.get(name) else { continue };
        let spec = deployed.spec();
        let promised = !spec.is_exclusive()
            && deployed.removal.is_none()
            && !deployed.stopped
            && spec.deploy.strategy != Strategy::Recreate
            && deployed.rollout.is_some();
        let (was, is) = (ready(world, before, name), ready(world, &world.state, name));
        let least = deployed.wanted().saturating_sub(spec.deploy.max_unavailable);
        if promised && is < was && is < least {
            world.broken(&format!("draining {replica} leaves {name} with {is} ready of {least} promised"));
        }
    }
}

/// Replicas that serve and that the leader believes ready, on nodes it hears.
fn ready(world: &World, state: &State, name: &ServiceName) -> u32 {
    let Some(leader) = &world.leader else { return 0 };
    let count = state
        .placements_of(name)
        .filter(|(id, placement)| {
            placement.state == PlacementState::Serve
                && !leader.inventory().is_suspect(placement.node, world.now)
                && leader.inventory().replica(placement.node, *id).is_some_and(|report| report.phase == Phase::Ready)
        })
        .count();
    u32::try_from(count).unwrap_or(u32::MAX)
}

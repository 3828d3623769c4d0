use orca_cluster::command::{Command, Entry};
use orca_cluster::event::Actor;
use orca_cluster::id::ServiceName;
use orca_cluster::plan::Step;
use orca_cluster::replica::Phase;
use orca_cluster::spec::Strategy;
use orca_cluster::state::{PlacementState, State};

use crate::sim::World;

/// (3) Draining ready replicas never leaves fewer of them than wanted minus `max_unavailable`, where the strategy
/// promises that and the service is not to go or to shrink. Judged when the leader decides, by what it has heard: what
/// gets ready before that is committed it cannot know.
pub fn check(world: &World, command: &Command) {
    let Command::Adopt { steps, .. } = command else { return };
    let drains: Vec<_> = steps.iter().filter(|step| matches!(step, Step::Drain { .. })).collect();
    if drains.is_empty() {
        return;
    }
    let (before, after) = (&*world.state, adopted(world, command));
    for step in drains {
        let Step::Drain { replica } = step else { continue };
        let Some(placement) = before.placements.get(replica) else { continue };
        let name = &placement.service;
        let Some(deployed) = after.services.get(name) else { continue };
        let spec = deployed.spec();
        let promised = !spec.is_exclusive()
            && deployed.removal.is_none()
            && !deployed.stopped
            && spec.deploy.strategy != Strategy::Recreate
            && deployed.rollout.is_some();
        let (was, is) = (ready(world, before, name), ready(world, &after, name));
        let least = deployed.wanted().saturating_sub(spec.deploy.max_unavailable);
        if promised && is < was && is < least {
            world.broken(&format!("draining {replica} leaves {name} with {is} ready of {least} promised"));
        }
    }
}

fn adopted(world: &World, command: &Command) -> State {
    let entry = Entry { at: world.now, actor: Actor::Orca, source: None, command: command.clone() };
    let mut after = State::clone(&world.state);
    after.apply(world.log.len() as u64 + 1, entry);
    after
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

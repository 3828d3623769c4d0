use std::collections::BTreeMap;

use orca_cluster::command::Command;
use orca_cluster::id::ServiceName;
use orca_cluster::plan::Step;
use orca_cluster::replica::Phase;
use orca_cluster::route::{RouteKey, Tables};
use orca_cluster::state::PlacementState;

use crate::sim::World;

/// (13) A route that was served stays served as long as a ready replica of its service, old or new, is there: whatever is
/// deployed, whether it gets ready or not.
pub fn check(world: &mut World) {
    let Some(tables) = newest(world) else { return };
    let answers = |service: &&ServiceName| tables.services.get(*service).is_some_and(|up| !up.backends.is_empty());
    let served: BTreeMap<RouteKey, ServiceName> = tables
        .routes
        .iter()
        .filter(|(_, service)| answers(service))
        .map(|(route, service)| (route.clone(), service.clone()))
        .collect();
    for (route, before) in &world.invariants.served {
        // By a more general one, if not by itself.
        let is_answered = served.keys().any(|other| other.0.covers(&route.0));
        if !is_answered && can_serve(world, before) && is_wanted(world, route, before) {
            let now = tables.routes.get(route).map_or("nobody".to_owned(), ServiceName::to_string);
            world.broken(&format!("{} was answered by {before}, which could, and is left to {now}", route.0));
        }
    }
    world.invariants.served = served;
}

/// (13) What is to go because its routes are another's by now does not go before that one is ready.
pub fn check_drains(world: &World, command: &Command) {
    let (Command::Adopt { steps, .. }, Some(tables)) = (command, newest(world)) else { return };
    for step in steps {
        let Step::Drain { replica } = step else { continue };
        let Some(name) = world.state.placements.get(replica).map(|placement| &placement.service) else { continue };
        let hands_over = world.state.services[name].removal.is_some_and(|removal| removal.hands_over);
        let awaited = tables.routes.iter().find(|(route, answers)| *answers == name && is_wanted(world, route, name));
        if let (true, Some((route, _))) = (hands_over, awaited) {
            world.broken(&format!("{replica} drains, and nobody else answers {} yet", route.0));
        }
    }
}

/// The newest tables, if they are made from the newest state.
fn newest(world: &World) -> Option<&Tables> {
    let leader = world.leader.as_ref().filter(|leader| leader.state().generation == world.state.generation)?;
    leader.goals().values().map(|goal| &goal.tables).max_by_key(|tables| tables.number)
}

/// Whether it has a replica that may get requests, and nobody has said that it should have none.
fn can_serve(world: &World, service: &ServiceName) -> bool {
    let (Some(leader), Some(deployed)) = (&world.leader, world.state.services.get(service)) else { return false };
    let is_wanted = match deployed.removal {
        Some(removal) => removal.hands_over,
        None => deployed.wanted() > 0,
    };
    is_wanted
        && world.state.placements_of(service).any(|(id, placement)| {
            placement.state == PlacementState::Serve
                && !leader.inventory().is_suspect(placement.node, world.now)
                && leader
                    .inventory()
                    .replica(placement.node, id)
                    .is_some_and(|report| report.phase == Phase::Ready && report.address.is_some())
        })
}

/// Whether a service has the route, another was asked for it, or the one that had it may return to a revision that has it.
/// What is given up takes a route along that it alone was asked for.
fn is_wanted(world: &World, RouteKey(route): &RouteKey, before: &ServiceName) -> bool {
    world.state.services.iter().filter(|(_, deployed)| deployed.removal.is_none()).any(|(name, deployed)| {
        let other = match name == before {
            true => deployed.settled.filter(|_| deployed.rollout.is_some()),
            false => deployed.revisions.keys().next_back().copied(),
        };
        let revisions = [Some(deployed.target), other].into_iter().flatten();
        let mut records = revisions.filter_map(|revision| deployed.revisions.get(&revision));
        records.any(|record| record.spec.routes.contains(route))
    })
}

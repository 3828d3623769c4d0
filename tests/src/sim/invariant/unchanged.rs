use std::collections::BTreeMap;
use std::time::Duration;

use orca_cluster::command::{Applied, Refusal};
use orca_cluster::id::{NodeId, ReplicaId, ServiceName};
use orca_cluster::replica::Phase;

use crate::sim::{World, workload};

/// How long it may take to come to rest after what should cause nothing.
const SETTLE_MAX: Duration = Duration::from_secs(300);

/// (6) Services put again as they are, a rotated secret, another leader, an agent that restarts and a node that was
/// away for a moment: no replica that was ready is touched.
pub fn check(world: &mut World) {
    world.tell("nothing is to happen from here".to_owned());
    let before = ready(world);
    // What is to go would come back.
    let stays = |name: &&ServiceName| world.state.services[*name].removal.is_none();
    let services: Vec<ServiceName> = world.state.services.keys().filter(stays).cloned().collect();
    for name in services {
        let spec = world.state.services[&name].spec().clone();
        let command = workload::put_one(&name, spec);
        match world.command(command) {
            Applied::Unchanged { .. } => {}
            Applied::Refused(Refusal::Several(all)) if all.iter().all(is_overtaken) => {}
            Applied::Refused(refusal) if is_overtaken(&refusal) => {}
            other => world.broken(&format!("{name} put again as it is: {other:?}")),
        }
    }
    let placements = world.state.placements.clone();
    let disturb = |world: &mut World, what: &str, disturbance: &mut dyn FnMut(&mut World)| {
        disturbance(world);
        rest(world);
        if world.state.placements != placements {
            world.broken(&format!("{what} moves replicas:\n{}", world.describe()));
        }
        if let Some((replica, _)) = before.iter().find(|(replica, touched)| touches(world, **replica) != **touched) {
            world.broken(&format!("{what} touches {replica}"));
        }
    };
    disturb(world, "nothing", &mut |_| {});
    disturb(world, "a rotated secret", &mut |world| {
        world.command(workload::set_secret(world));
    });
    disturb(world, "another leader", &mut World::change_leader);
    let nodes: Vec<NodeId> = world.nodes.keys().copied().collect();
    for node in nodes {
        disturb(world, "a node away for a moment", &mut |world| {
            world.cut_off(node);
            world.advance(Duration::from_secs(8));
            world.heal(node);
        });
        let modules = world.nodes[&node].runtime.containers.values().any(|container| container.module);
        if !modules {
            disturb(world, "an agent that restarts", &mut |world| world.kill_agent(node));
        }
    }
}

/// What it needs was removed after it was deployed; or it is to go, or has a route in its file that another got back.
fn is_overtaken(refusal: &Refusal) -> bool {
    matches!(refusal, Refusal::NoDependency { .. } | Refusal::Removing(_) | Refusal::RouteTaken { .. })
}

fn rest(world: &mut World) {
    if !world.settle(SETTLE_MAX) {
        world.broken(&format!("it does not come to rest:\n{}", world.describe()));
    }
}

/// Every ready replica, with how often something was done to it.
fn ready(world: &World) -> BTreeMap<ReplicaId, u64> {
    let Some(leader) = &world.leader else { return BTreeMap::new() };
    let ready = world.state.placements.iter().filter(|(id, placement)| {
        leader.inventory().replica(placement.node, **id).is_some_and(|report| report.phase == Phase::Ready)
    });
    ready.map(|(id, _)| (*id, touches(world, *id))).collect()
}

fn touches(world: &World, replica: ReplicaId) -> u64 {
    world.nodes.values().filter_map(|node| node.runtime.touched.get(&replica)).sum()
}

use orca_cluster::id::{Label, ServiceName};
use orca_cluster::leader::Leader;
use orca_cluster::replica::Phase;
use orca_cluster::spec::{Check, Service};
use orca_cluster::state::PlacementState;
use orca_cluster::waiting::Waiting;

use crate::sim::World;

/// (8) At rest, every service is as asked: its rollout has ended, and it has as many ready replicas of its target as
/// it should have, unless its image cannot run, which a story must then expect.
pub fn check(world: &World) {
    let Some(leader) = &world.leader else {
        world.broken("nobody leads");
    };
    for (name, deployed) in &world.state.services {
        if deployed.removal.is_some_and(|removal| removal.hands_over) && hands_over(leader, name) {
            continue;
        }
        if deployed.removal.is_some() {
            world.broken(&format!("{name} was removed and is still there"));
        }
        let image = match &deployed.spec().source {
            orca_cluster::spec::Source::Image(image) => image.as_str(),
            orca_cluster::spec::Source::Module(_) => "ok",
        };
        let can_run = !["crash", "deaf", "missing", "fades"].iter().any(|bad| image.starts_with(bad))
            && !image.ends_with("-stalls")
            && !is_broken(deployed.spec())
            && deployed.spec().depends_on.iter().all(|needs| is_there(world, &name.project, needs));
        if deployed.rollout.is_some() && !deployed.stopped {
            world.broken(&format!("{name} is still being rolled out:\n{}", world.describe()));
        }
        if !can_run {
            continue;
        }
        let placements: Vec<_> = world.state.placements_of(name).collect();
        let good = placements
            .iter()
            .filter(|(id, placement)| {
                placement.state == PlacementState::Serve
                    && placement.revision == deployed.template()
                    && leader.inventory().replica(placement.node, *id).is_some_and(|r| r.phase == Phase::Ready)
            })
            .count();
        if good != deployed.wanted() as usize || placements.len() != good {
            world.broken(&format!("{name} is not as asked:\n{}", world.describe()));
        }
        if good > 0 {
            super::schedule::check_settled(world, name, deployed);
        }
    }
    for (id, node) in &world.nodes {
        for replica in node.runtime.containers.keys() {
            if !world.state.placements.contains_key(replica) {
                world.broken(&format!("{id} still has a container of {replica}"));
            }
        }
    }
}

/// Whether it stays because who is to have its routes does not get ready.
fn hands_over(leader: &Leader, name: &ServiceName) -> bool {
    let waiting = leader.waiting().get(name);
    waiting.is_some_and(|reasons| reasons.iter().any(|reason| matches!(reason, Waiting::ForTaker { .. })))
}

/// Whether it is asked what nothing answers.
fn is_broken(spec: &Service) -> bool {
    spec.readiness.as_ref().is_some_and(|probe| probe.check == Check::Http("/broken".to_owned()))
}

/// Whether a service that another depends on has a replica that serves.
fn is_there(world: &World, project: &Label, service: &Label) -> bool {
    let name = ServiceName::new(project.clone(), service.clone());
    let Some(leader) = &world.leader else { return false };
    world.state.placements_of(&name).any(|(id, placement)| {
        placement.state == PlacementState::Serve
            && leader.inventory().replica(placement.node, id).is_some_and(|r| r.phase == Phase::Ready)
    })
}

use std::time::Duration;

use orca_cluster::id::{NodeId, ServiceName};
use orca_cluster::node::Task;
use orca_cluster::state::{Deployed, RunEnding};

use crate::sim::World;

/// The world may come to rest at the very moment at which something is due.
const DECIDED_WITHIN: Duration = Duration::from_secs(1);

/// (12) A due time is begun at most once in the whole cluster.
pub fn check(world: &mut World, on: NodeId, task: &Task) {
    let Task::Run { replica, cron, due, until: _ } = task else { return };
    let goal = world.nodes.get(&on).and_then(|node| node.brain.as_ref()).map(|brain| brain.goal());
    let Some(service) = goal.and_then(|goal| goal.replicas.get(replica)).map(|goal| goal.service.clone()) else {
        world.broken(&format!("{replica} on {on} runs `{cron}` and is in no goal"));
    };
    let before = world.invariants.runs.insert((service.clone(), cron.clone(), *due), *replica);
    if let Some(before) = before {
        world.broken(&format!("{service} runs `{cron}` of {} on {before}, and again on {replica}", due.to_minute()));
    }
}

/// (12) What was skipped was begun by nobody.
pub fn check_skipped(world: &World) {
    for (name, deployed) in &world.state.services {
        for (cron, record) in &deployed.schedules {
            let Some(last) = &record.last else { continue };
            let key = (name.clone(), cron.clone(), last.due);
            if matches!(last.ending, RunEnding::Skipped { .. }) && world.invariants.runs.contains_key(&key) {
                world.broken(&format!("{name} ran `{cron}` of {}, which is told to be skipped", last.due.to_minute()));
            }
        }
    }
}

/// (12) At rest, with a ready replica, what was due last was begun, or it was told why not.
pub fn check_settled(world: &World, name: &ServiceName, deployed: &Deployed) {
    for (cron, record) in &deployed.schedules {
        if record.next.is_some_and(|next| next + DECIDED_WITHIN <= world.now) {
            world.broken(&format!("{name} is ready, and nobody decided what becomes of `{cron}`"));
        }
        let decided = [record.run.map(|run| run.due), record.last.as_ref().map(|last| last.due)];
        let Some(due) = decided.into_iter().flatten().max() else { continue };
        let begun = world.invariants.runs.contains_key(&(name.clone(), cron.clone(), due));
        let told = record.last.as_ref().is_some_and(|last| {
            last.due == due && matches!(last.ending, RunEnding::Skipped { .. } | RunEnding::Unknown { .. })
        });
        if !begun && !told {
            world.broken(&format!("{name} did not run `{cron}` of {}, and nothing says why", due.to_minute()));
        }
    }
}

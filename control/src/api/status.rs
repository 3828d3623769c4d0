//! Looking: status, reasons, history, nodes, and progress as it happens.

use std::sync::Arc;

use orca_cluster::event::Event;
use orca_cluster::id::ServiceName;
use orca_cluster::spec::Source;
use orca_cluster::state::Receipt;
use orca_cluster::status;
use orca_wire::message::client::{Progress, Refused, Response, RevisionInfo};
use tokio::sync::mpsc;

use super::{Answer, Core, Items, STREAM_QUEUE, actor_name, invalid, no_service};
use crate::auth::{Caller, Object, Verb};
use crate::clock::now;
use crate::driver::Overview;

/// Services one watch may name.
const WATCHED_MAX: usize = 500;

pub async fn status(core: &Core, caller: &Caller, service: Option<ServiceName>) -> Answer {
    let object = match &service {
        Some(service) => Object::Project(&service.project),
        None => caller.project.as_ref().into(),
    };
    core.authorise(caller, Verb::See, object)?;
    let overview = core.overview().await?;
    let mut status = status::status(overview.view(now()), &overview.waiting);
    status.services.retain(|one| match &service {
        Some(wanted) => one.name == *wanted,
        None => caller.sees(&one.name.project),
    });
    match service {
        Some(service) if status.services.is_empty() => Err(no_service(&service)),
        Some(_) | None => Ok(Response::Status(Box::new(status))),
    }
}

pub async fn why(core: &Core, caller: &Caller, service: ServiceName) -> Answer {
    core.authorise(caller, Verb::See, Object::Project(&service.project))?;
    let overview = core.overview().await?;
    let found = service_status(&overview, &service).ok_or_else(|| no_service(&service))?;
    let diagnosis = found.why.clone();
    Ok(Response::Why { service: Box::new(found), diagnosis })
}

pub async fn history(core: &Core, caller: &Caller, service: ServiceName) -> Answer {
    core.authorise(caller, Verb::See, Object::Project(&service.project))?;
    let state = core.read().await?;
    let deployed = state.services.get(&service).ok_or_else(|| no_service(&service))?;
    let revisions = deployed.revisions.iter().map(|(revision, record)| RevisionInfo {
        revision: *revision,
        at: record.at,
        by: actor_name(&record.by),
        note: record.note.clone(),
        source: match &record.spec.source {
            Source::Image(image) => image.clone(),
            Source::Module(module) => module.path.clone(),
        },
        digest: match &record.spec.source {
            Source::Image(_) => record.digest.clone(),
            Source::Module(module) => module.digest.as_ref().map(|digest| format!("sha256:{digest}")),
        },
        replicas: record.spec.replicas,
        is_target: deployed.target == *revision,
        is_settled: deployed.settled == Some(*revision),
    });
    let revisions = revisions.collect();
    Ok(Response::History { service, revisions, receipts: deployed.receipts.iter().map(Receipt::told).collect() })
}

/// Nodes are shared by all projects, so every token sees them.
pub async fn nodes(core: &Core, caller: &Caller) -> Answer {
    core.authorise(caller, Verb::See, caller.project.as_ref().into())?;
    let overview = core.overview().await?;
    let status = status::status(overview.view(now()), &overview.waiting);
    Ok(Response::Nodes { nodes: status.nodes })
}

/// Sends what is known of these services, and again whenever that changes.
pub async fn watch(core: &Arc<Core>, caller: &Caller, services: Vec<ServiceName>) -> Result<Items<Progress>, Refused> {
    if services.len() > WATCHED_MAX {
        return Err(invalid(
            format!("{} services at once; at most {WATCHED_MAX} can be watched", services.len()),
            None,
        ));
    }
    for service in &services {
        core.authorise(caller, Verb::See, Object::Project(&service.project))?;
    }
    core.overview().await?;
    let (send, progress) = mpsc::channel(STREAM_QUEUE);
    let core = core.clone();
    tokio::spawn(async move {
        tokio::select! {
            () = report(&core, &services, &send) => {}
            () = send.closed() => {}
        }
    });
    Ok(progress)
}

async fn report(core: &Core, services: &[ServiceName], send: &mpsc::Sender<Result<Progress, Refused>>) {
    let mut overviews = core.overview.clone();
    let mut last: Option<Progress> = None;
    let mut told = None;
    loop {
        let overview = Overview::clone(&overviews.borrow_and_update());
        // Right after an election there is nothing to tell; what was told stays true enough.
        if overview.term.is_some() {
            let found = services.iter().filter_map(|name| service_status(&overview, name)).collect();
            let events = news(&overview, services, told);
            told = overview.state.events.back().map(|event| event.index).or(told);
            let progress = Progress { generation: overview.state.generation, at: now(), services: found, events };
            let same = last.as_ref().is_some_and(|last| last.services == progress.services);
            if !same || !progress.events.is_empty() {
                if send.send(Ok(progress.clone())).await.is_err() {
                    return;
                }
                last = Some(progress);
            }
        }
        if overviews.changed().await.is_err() {
            return;
        }
    }
}

/// Events about the services after the last one told; at first, those of the rollouts they are in.
fn news(overview: &Overview, services: &[ServiceName], told: Option<(u64, u32)>) -> Vec<Event> {
    let is_new = |event: &&Event| {
        let Some(service) = event.service.as_ref().filter(|service| services.contains(service)) else { return false };
        match told {
            Some(told) => event.index > told,
            None => {
                let deployed = overview.state.services.get(service);
                let rollout = deployed.and_then(|deployed| deployed.rollout.as_ref());
                rollout.is_some_and(|rollout| event.at >= rollout.started)
            }
        }
    };
    overview.state.events.iter().filter(is_new).cloned().collect()
}

fn service_status(overview: &Overview, name: &ServiceName) -> Option<status::ServiceStatus> {
    let deployed = overview.state.services.get(name)?;
    let waiting = overview.waiting.get(name).map_or(&[][..], Vec::as_slice);
    Some(status::service(overview.view(now()), name, deployed, waiting))
}

//! What happened, and what happens.

use std::sync::Arc;

use orca_cluster::event::Event;
use orca_cluster::state::State;
use orca_wire::message::client::{EventsQuery, Refused};
use tokio::sync::mpsc;

use super::{Core, Items, STREAM_QUEUE};
use crate::auth::{Caller, Object, Verb};

/// Events as asked for, oldest first; following, also those to come. Whoever is limited to a project is shown events
/// of its services only.
pub async fn events(core: &Arc<Core>, caller: &Caller, query: EventsQuery) -> Result<Items<Event>, Refused> {
    let project = query.service.as_ref().map(|service| &service.project).or(query.project.as_ref());
    let object = Object::from(project.or(caller.project.as_ref()));
    core.authorise(caller, Verb::See, object)?;
    let state = core.read().await?;
    let (send, events) = mpsc::channel(STREAM_QUEUE);
    let (core, own) = (core.clone(), caller.project.clone());
    let wanted = move |event: &&Event| {
        let service = event.service.as_ref();
        let is_own = own.as_ref().is_none_or(|own| service.is_some_and(|service| service.project == *own));
        let in_project =
            query.project.as_ref().is_none_or(|project| service.is_some_and(|service| service.project == *project));
        let of_service = query.service.as_ref().is_none_or(|wanted| service == Some(wanted));
        is_own && in_project && of_service && query.since.is_none_or(|since| event.at >= since)
    };
    tokio::spawn(async move {
        let telling = async {
            let first: Vec<Event> = state.events.iter().filter(&wanted).cloned().collect();
            let last = query.last.map_or(first.len(), |last| usize::try_from(last).unwrap_or(usize::MAX));
            let skip = first.len().saturating_sub(last);
            let mut told = newest(&state);
            for event in first.into_iter().skip(skip) {
                if send.send(Ok(event)).await.is_err() {
                    return;
                }
            }
            if !query.follow {
                return;
            }
            let mut states = core.raft.watch();
            loop {
                let state = states.borrow_and_update().clone();
                let new: Vec<Event> =
                    state.events.iter().filter(|event| Some(event.index) > told).filter(&wanted).cloned().collect();
                told = newest(&state).max(told);
                for event in new {
                    if send.send(Ok(event)).await.is_err() {
                        return;
                    }
                }
                if states.changed().await.is_err() {
                    return;
                }
            }
        };
        tokio::select! {
            () = telling => {}
            () = send.closed() => {}
        }
    });
    Ok(events)
}

fn newest(state: &State) -> Option<(u64, u32)> {
    state.events.back().map(|event| event.index)
}

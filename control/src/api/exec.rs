//! A command in a running replica: what is typed goes to its node, what it prints comes back. Nothing is kept; that
//! it was run is an event, what was typed is not.

use std::sync::Arc;

use orca_cluster::command::{Announcement, Command};
use orca_cluster::event::Kind;
use orca_cluster::id::{NodeId, ReplicaId};
use orca_cluster::replica::Phase;
use orca_cluster::state::PlacementState;
use orca_wire::Stream;
use orca_wire::cause::chain;
use orca_wire::message::agent::{Errand, ExecErrand, ExecInput, ExecOutput};
use orca_wire::message::client::{Exec, Reason, Refused, Response};
use orca_wire::stream::StreamError;

use super::{Core, deploy, failed, invalid, no_service, not_found};
use crate::auth::{Caller, Object, Verb};

/// Characters of a program's name that an event quotes.
const QUOTED_MAX: usize = 200;

pub async fn exec(core: &Arc<Core>, caller: &Caller, exec: Exec, stream: Stream) -> Result<(), StreamError> {
    match open(core, caller, exec).await {
        Ok(errand) => bridge(stream, errand).await,
        Err(refused) => stream.answer(&Response::Refused(refused)).await,
    }
}

async fn open(core: &Arc<Core>, caller: &Caller, exec: Exec) -> Result<Stream, Refused> {
    core.authorise(caller, Verb::Exec, Object::Project(&exec.service.project))?;
    let Exec { service, replica, command, terminal, stdin } = exec;
    if command.is_empty() {
        return Err(invalid("there is no command to run".to_owned(), Some("orca exec SERVICE -- COMMAND")));
    }
    let overview = core.overview().await?;
    let deployed = overview.state.services.get(&service).ok_or_else(|| no_service(&service))?;
    // Inside what reaches into the host one is as good as on it. The replica may be of an earlier revision than the
    // service is now, so all that are kept are looked at.
    deploy::reaches_host(core, caller, deployed)?;
    if deployed.spec().is_module() {
        let message = format!("{service} is a module: there is no process to run a command beside");
        return Err(invalid(message, None));
    }
    // A ready replica that stays, else any that runs.
    let mut running: Vec<(bool, bool, ReplicaId, NodeId)> = overview
        .state
        .placements_of(&service)
        .filter(|(id, _)| replica.is_none_or(|wanted| wanted == *id))
        .filter_map(|(id, placement)| {
            let report = overview.inventory.replica(placement.node, id)?;
            let runs = matches!(report.phase, Phase::Starting | Phase::Ready | Phase::Unready);
            let stays = placement.state == PlacementState::Serve;
            runs.then_some((!stays, report.phase != Phase::Ready, id, placement.node))
        })
        .collect();
    running.sort_unstable();
    let Some(&(_, _, id, node)) = running.first() else {
        return Err(match replica {
            Some(id) => not_found(format!("{service} has no running replica {id}"), Some("`orca ps` lists them")),
            None => Refused {
                reason: Reason::Conflict,
                message: format!("{service} has no running replica"),
                hint: Some(format!("orca why {service}")),
                unfit: Vec::new(),
            },
        });
    };
    // The program only: arguments may hold secrets, and every viewer reads events.
    let program: String = command[0].chars().take(QUOTED_MAX).collect();
    let text = format!("in {id}: {program}");
    let announcement = Announcement { kind: Kind::Executed, service: Some(service), replica: Some(id), text };
    core.propose(caller, Command::Announce(vec![announcement])).await?;
    let errand = Errand::Exec(ExecErrand { replica: id, command, terminal, stdin });
    core.sessions.errand(node, &errand).await.map_err(|error| failed(chain(&error)))
}

/// Both directions, until the command's end has been told or one side is gone.
async fn bridge(mut person: Stream, agent: Stream) -> Result<(), StreamError> {
    person.may_rest();
    let gone = person.closed();
    let Stream { sender: mut screen, receiver: mut keyboard } = person;
    let Stream { sender: mut input, receiver: mut output } = agent;
    let typing = async {
        while let Some(typed) = keyboard.next::<ExecInput>().await? {
            input.send(&typed).await?;
        }
        input.finish().await?;
        // What ends an exec is the command's end.
        std::future::pending::<Result<(), StreamError>>().await
    };
    let printing = async {
        while let Some(printed) = output.next::<ExecOutput>().await? {
            screen.send(&printed).await?;
        }
        screen.finish().await
    };
    tokio::select! {
        ended = typing => ended,
        ended = printing => ended,
        () = gone => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;
    use crate::session::tests::{SOON, connections};

    #[tokio::test]
    async fn a_person_who_rests_gets_all_a_command_prints() {
        // Together more than is under way unread.
        const PIECES: usize = 80;
        let (agent, ours, _endpoints) = connections().await;
        let mut errand = ours.open(&()).await.unwrap();
        errand.may_rest();
        let mut printing = agent.accept().await.unwrap();
        printing.next_within::<()>(SOON).await.unwrap();
        printing.may_rest();
        let mut person = agent.open(&()).await.unwrap();
        let mut screen = ours.accept().await.unwrap();
        screen.next_within::<()>(SOON).await.unwrap();
        screen.sender.set_stall(Duration::from_millis(1));

        let printing = tokio::spawn(async move {
            for _ in 0..PIECES {
                let piece = ExecOutput::Stdout(orca_cluster::secret::Opaque(vec![b'x'; 64 << 10]));
                printing.send(&piece).await.unwrap();
            }
            printing.finish().await.unwrap();
            printing
        });
        let mut bridging = tokio::spawn(bridge(screen, errand));
        let early = timeout(Duration::from_millis(500), &mut bridging).await;
        assert!(early.is_err(), "it gave up on somebody who rests: {early:?}");
        let mut count = 0;
        while person.next::<ExecOutput>().await.unwrap().is_some() {
            count += 1;
        }
        assert_eq!(count, PIECES);
        printing.await.unwrap();
        bridging.await.unwrap().unwrap();
    }
}

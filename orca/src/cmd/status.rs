//! Commands that look: `status`, `ps`, `nodes`, `top`, `why`, `history`.

use std::process::ExitCode;
use std::time::Duration;

use orca_cluster::id::ServiceName;
use orca_cluster::state::Receipt;
use orca_cluster::status::{NodeStatus, ReplicaStatus, ServiceStatus, Status};
use orca_cluster::why::Diagnosis;
use orca_wire::message::client::{Request, Response, RevisionInfo};
use serde::Serialize;
use tokio::time::sleep;

use super::{done, session};
use crate::cli::{Global, PsArgs, ServiceArg, ServiceArgs, StatusArgs, TopArgs};
use crate::exit::{Exit, Failure};
use crate::output::board::{Board, Place};
use crate::output::text::{Ink, Text};
use crate::output::{Output, Screen, history as history_screen, status as screen, why as why_screen};
use crate::session::{Session, unexpected};

/// Between two looks.
const AGAIN: Duration = Duration::from_secs(1);

pub async fn status(args: StatusArgs, global: &Global, output: &Output) -> Result<ExitCode, Failure> {
    let session = session(global).await?;
    let service = named(&session, args.service.as_ref()).await?;
    if args.follow {
        return follow(&session, output, service.as_ref(), screen_of).await;
    }
    let look = Look::at(&session, service.as_ref()).await?;
    if output.json {
        output.object("status", &look.status);
    } else {
        output.lines(&screen_of(&output.screen(look.status.at), &look));
    }
    done()
}

async fn named(session: &Session, arg: Option<&ServiceArg>) -> Result<Option<ServiceName>, Failure> {
    match arg {
        Some(arg) => Ok(Some(session.resolve(arg).await?.0)),
        None => Ok(None),
    }
}

/// What one look at the cluster found.
struct Look {
    service: Option<ServiceName>,
    status: Status,
    revisions: Vec<RevisionInfo>,
}

impl Look {
    async fn at(session: &Session, service: Option<&ServiceName>) -> Result<Look, Failure> {
        let status = session.status(service.cloned()).await?;
        let revisions = match service {
            None => Vec::new(),
            Some(service) => {
                if !status.services.iter().any(|known| known.name == *service) {
                    return Err(Failure::new(Exit::NotFound, format!("there is no service {service}"))
                        .fix("`orca status` lists what there is"));
                }
                history_of(session, service).await?.0
            }
        };
        Ok(Look { service: service.cloned(), status, revisions })
    }
}

fn screen_of(screen: &Screen, look: &Look) -> Vec<Text> {
    let found = look.service.as_ref().and_then(|name| look.status.services.iter().find(|s| s.name == *name));
    match found {
        Some(service) => screen::service(screen, &look.status.nodes, service, &look.revisions),
        None => screen::cluster(screen, &look.status),
    }
}

/// Shows the whole cluster until interrupted.
pub async fn follow_cluster(session: &Session, output: &Output) -> Result<ExitCode, Failure> {
    follow(session, output, None, screen_of).await
}

/// Shows it again and again, in place on a terminal and else when it has changed, until interrupted.
async fn follow(
    session: &Session,
    output: &Output,
    service: Option<&ServiceName>,
    show: impl Fn(&Screen, &Look) -> Vec<Text>,
) -> Result<ExitCode, Failure> {
    let mut board = Board::new(Place::Out);
    let mut last = Vec::new();
    let interrupted = tokio::signal::ctrl_c();
    tokio::pin!(interrupted);
    loop {
        let look = tokio::select! {
            look = Look::at(session, service) => look,
            _ = &mut interrupted => return Ok(stopped(output)),
        };
        let look = match look {
            Ok(look) => look,
            // It may come back: whoever watches wants to see that too.
            Err(failure) if failure.exit == Exit::Unreachable => {
                output.notice(&Text::of(Ink::Yellow, format!("{failure}; looking again")));
                tokio::select! {
                    () = sleep(AGAIN) => continue,
                    _ = &mut interrupted => return Ok(stopped(output)),
                }
            }
            Err(failure) => return Err(failure),
        };
        let screen = output.screen(look.status.at);
        if output.json {
            output.object("status", &look.status);
        } else {
            let lines = show(&screen, &look);
            if output.out_is_terminal {
                board.draw(&lines, screen.width, screen.colour);
            } else if gist(&look.status) != last {
                output.lines(&lines);
                output.print("\n");
                last = gist(&look.status);
            }
        }
        tokio::select! {
            () = sleep(AGAIN) => {}
            _ = &mut interrupted => return Ok(stopped(output)),
        }
    }
}

/// What of a status is news: not that a second has passed, nor how much memory is free now.
fn gist(status: &Status) -> Vec<String> {
    let nodes = status.nodes.iter().map(|node| format!("{} {:?}", node.name, node.condition));
    let services = status.services.iter().map(|service| {
        let cause = service.why.as_ref().map_or("", |why| &why.cause);
        let ServiceStatus { name, state, ready, wanted, revision, .. } = service;
        format!("{name} {state:?} {ready}/{wanted} {revision} {cause}")
    });
    nodes.chain(services).collect()
}

/// What a command that never ends by itself says when it is ended.
pub fn stopped(output: &Output) -> ExitCode {
    #[derive(Serialize)]
    struct Stopped {
        outcome: &'static str,
        exit_code: u8,
    }
    let exit = Exit::Interrupted;
    if output.json {
        output.object("result", &Stopped { outcome: "interrupted", exit_code: exit.code() });
    }
    exit.into()
}

pub async fn ps(args: PsArgs, global: &Global, output: &Output) -> Result<ExitCode, Failure> {
    let session = session(global).await?;
    let service = named(&session, args.service.as_ref()).await?;
    let look = Look::at(&session, service.as_ref()).await?;
    let services: Vec<ServiceStatus> =
        look.status.services.into_iter().filter(|s| service.as_ref().is_none_or(|name| s.name == *name)).collect();
    if output.json {
        let rows = services
            .iter()
            .flat_map(|service| service.replicas.iter().map(|replica| ReplicaRow { service: &service.name, replica }));
        output.object("replicas", &Replicas { replicas: rows.collect() });
    } else {
        output.lines(&screen::replicas(&output.screen(look.status.at), &services, true));
    }
    done()
}

#[derive(Serialize)]
struct Replicas<'a> {
    replicas: Vec<ReplicaRow<'a>>,
}

#[derive(Serialize)]
struct ReplicaRow<'a> {
    service: &'a ServiceName,
    #[serde(flatten)]
    replica: &'a ReplicaStatus,
}

pub async fn nodes(global: &Global, output: &Output) -> Result<ExitCode, Failure> {
    #[derive(Serialize)]
    struct Nodes {
        nodes: Vec<NodeStatus>,
    }
    let session = session(global).await?;
    let nodes = match session.ask(&Request::Nodes).await? {
        Response::Nodes { nodes } => nodes,
        other => return Err(unexpected(&other)),
    };
    if output.json {
        output.object("nodes", &Nodes { nodes });
    } else {
        output.lines(&screen::nodes(&output.screen(crate::moment::now()), &nodes));
    }
    done()
}

pub async fn top(args: TopArgs, global: &Global, output: &Output) -> Result<ExitCode, Failure> {
    let session = session(global).await?;
    let service = named(&session, args.service.as_ref()).await?;
    let show = |screen: &Screen, look: &Look| screen::top(screen, &look.status);
    if !args.once {
        return follow(&session, output, service.as_ref(), show).await;
    }
    let look = Look::at(&session, service.as_ref()).await?;
    if output.json {
        output.object("status", &look.status);
    } else {
        output.lines(&show(&output.screen(look.status.at), &look));
    }
    done()
}

pub async fn why(args: ServiceArgs, global: &Global, output: &Output) -> Result<ExitCode, Failure> {
    #[derive(Serialize)]
    struct Why<'a> {
        service: &'a ServiceName,
        state: orca_cluster::status::ServiceState,
        diagnosis: Option<&'a Diagnosis>,
    }
    let session = session(global).await?;
    let (service, _) = session.resolve(&args.service).await?;
    let (status, diagnosis) = match session.ask(&Request::Why { service }).await? {
        Response::Why { service, diagnosis } => (service, diagnosis),
        other => return Err(unexpected(&other)),
    };
    if output.json {
        output.object("why", &Why { service: &status.name, state: status.state, diagnosis: diagnosis.as_ref() });
    } else {
        output.lines(&why_screen::why(&status, diagnosis.as_ref()));
    }
    done()
}

pub async fn history(args: ServiceArgs, global: &Global, output: &Output) -> Result<ExitCode, Failure> {
    #[derive(Serialize)]
    struct History<'a> {
        service: &'a ServiceName,
        revisions: &'a [RevisionInfo],
        receipts: &'a [Receipt],
    }
    let session = session(global).await?;
    let (service, _) = session.resolve(&args.service).await?;
    let (revisions, receipts) = history_of(&session, &service).await?;
    if output.json {
        output.object("history", &History { service: &service, revisions: &revisions, receipts: &receipts });
    } else {
        let screen = output.screen(crate::moment::now());
        output.lines(&history_screen::history(&screen, &service, &revisions, &receipts));
    }
    done()
}

async fn history_of(session: &Session, service: &ServiceName) -> Result<(Vec<RevisionInfo>, Vec<Receipt>), Failure> {
    match session.ask(&Request::History { service: service.clone() }).await? {
        Response::History { revisions, receipts, .. } => Ok((revisions, receipts)),
        other => Err(unexpected(&other)),
    }
}

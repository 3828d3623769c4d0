//! Commands that change one service and wait until it has settled.

use std::process::ExitCode;

use orca_cluster::id::{Generation, Revision, ServiceName};
use orca_cluster::status::verdict::Awaited;
use orca_wire::message::client::{Request, Response};
use serde::Serialize;

use super::settle::{self, Ended, Patience};
use super::{done, patient_session};
use crate::cli::{ChangeArgs, Global, RmArgs, RollbackArgs, ScaleArgs, ServiceArg, Wait};
use crate::exit::Failure;
use crate::output::progress::Needs;
use crate::output::text::Text;
use crate::output::{Output, count};
use crate::session::{Session, unexpected};

#[derive(Debug, Serialize)]
struct Changed<'a> {
    service: &'a ServiceName,
    index: Generation,
    #[serde(skip_serializing_if = "Option::is_none")]
    revision: Option<Revision>,
}

/// One change: what to send, and what it has led to when it is over.
struct Change<'a> {
    session: &'a Session,
    output: &'a Output,
    global: &'a Global,
    wait: Wait,
    name: ServiceName,
}

impl Change<'_> {
    /// `awaited` is for changes that make no revision.
    async fn carry_out(self, request: Request, awaited: Awaited) -> Result<ExitCode, Failure> {
        let Change { session, output, global, wait, name } = self;
        let (index, revision) = match session.ask(&request).await? {
            Response::Unchanged { generation } => {
                return Ended::unchanged(generation).tell(output);
            }
            Response::Done { generation } => (generation, None),
            Response::Revised { generation, revision } => (generation, Some(revision)),
            other => return Err(unexpected(&other)),
        };
        if output.json {
            output.object("change", &Changed { service: &name, index, revision });
        }
        if wait.detach {
            return Ended::detached().tell(output);
        }
        let awaited = revision.map_or(awaited, Awaited::Revision);
        let patience = Patience::at_most(global.timeout);
        let ended = settle::settle(session, output, vec![(name, awaited)], Needs::new(), index, patience).await;
        ended.tell(output)
    }
}

async fn change(
    service: &ServiceArg,
    wait: Wait,
    global: &Global,
    output: &Output,
    awaited: Awaited,
    request: impl FnOnce(ServiceName) -> Request,
) -> Result<ExitCode, Failure> {
    let session = patient_session(global).await?;
    let (name, _) = session.resolve(service).await?;
    let change = Change { session: &session, output, global, wait, name: name.clone() };
    change.carry_out(request(name), awaited).await
}

pub async fn redeploy(args: ChangeArgs, global: &Global, output: &Output) -> Result<ExitCode, Failure> {
    change(&args.service, args.wait, global, output, Awaited::Settled, |service| Request::Redeploy { service }).await
}

pub async fn restart(args: ChangeArgs, global: &Global, output: &Output) -> Result<ExitCode, Failure> {
    change(&args.service, args.wait, global, output, Awaited::Settled, |service| Request::Restart { service }).await
}

pub async fn start(args: ChangeArgs, global: &Global, output: &Output) -> Result<ExitCode, Failure> {
    change(&args.service, args.wait, global, output, Awaited::Settled, |service| Request::Start { service }).await
}

pub async fn stop(args: ChangeArgs, global: &Global, output: &Output) -> Result<ExitCode, Failure> {
    change(&args.service, args.wait, global, output, Awaited::Stopped, |service| Request::Stop { service }).await
}

pub async fn promote(args: ChangeArgs, global: &Global, output: &Output) -> Result<ExitCode, Failure> {
    let session = patient_session(global).await?;
    let (name, _) = session.resolve(&args.service).await?;
    // The revision that is being promoted is known before; afterwards its receipt says how it went.
    let status = session.status(Some(name.clone())).await?;
    let rollout = status.services.iter().find(|service| service.name == name).and_then(|s| s.rollout.clone());
    let awaited = rollout.map_or(Awaited::Settled, |rollout| Awaited::Promoted(rollout.to));
    let change = Change { session: &session, output, global, wait: args.wait, name: name.clone() };
    change.carry_out(Request::Promote { service: name }, awaited).await
}

pub async fn scale(args: ScaleArgs, global: &Global, output: &Output) -> Result<ExitCode, Failure> {
    let ScaleArgs { service, replicas, wait } = args;
    change(&service, wait, global, output, Awaited::Settled, |service| Request::Scale { service, replicas }).await
}

pub async fn rollback(args: RollbackArgs, global: &Global, output: &Output) -> Result<ExitCode, Failure> {
    let RollbackArgs { service, to, wait } = args;
    change(&service, wait, global, output, Awaited::Settled, |service| Request::Rollback { service, to }).await
}

pub async fn remove(args: RmArgs, global: &Global, output: &Output) -> Result<ExitCode, Failure> {
    let RmArgs { service, volumes, wait, dry_run } = args;
    let session = patient_session(global).await?;
    let (name, _) = session.resolve(&service).await?;
    let status = session.status(Some(name.clone())).await?;
    let replicas = status.services.iter().find(|service| service.name == name).map_or(0, |s| s.replicas.len());
    let also = if volumes { ", and its volumes with all that is in them" } else { " (its volumes are kept)" };
    let what = format!("{name} and its {}{also}", count(replicas as u64, "replica"));
    if dry_run {
        output.notice(&Text::plain(format!("Would remove {what}")));
        if output.json {
            output.object("plan", &Removal { service: &name, replicas, volumes });
        }
        return done();
    }
    output.confirm(&format!("Remove {what}?"))?;
    let change = Change { session: &session, output, global, wait, name: name.clone() };
    change.carry_out(Request::Remove { service: name, volumes }, Awaited::Removed).await
}

#[derive(Debug, Serialize)]
struct Removal<'a> {
    service: &'a ServiceName,
    replicas: usize,
    volumes: bool,
}

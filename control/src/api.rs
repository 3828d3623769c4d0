//! What people and programs may ask, carried out. One function for each verb; the QUIC plane and the HTTP API both
//! call it, so that both do the same (`exec` is on the QUIC plane only). Each function authorises first, decides nothing about the
//! cluster that [`State::apply`](orca_cluster::state::State::apply) decides, and returns a [`Response`] or says in
//! a [`Refused`] why not.

pub mod deploy;
pub mod doctor;
pub mod events;
pub mod exec;
pub mod logs;
pub mod secret;
pub mod service;
pub mod status;
pub mod token;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use orca_cluster::command::put::misfits;
use orca_cluster::command::{Applied, Command, Detail, Entry, Refusal};
use orca_cluster::event::Actor;
use orca_cluster::id::{ClusterId, Generation, ServiceName};
use orca_cluster::limit::Limits;
use orca_cluster::secret::TokenId;
use orca_cluster::state::State;
use orca_wire::cause::chain;
use orca_wire::identity::Fingerprint;
use orca_wire::message::client::{Reason, Refused, Request, Response};
use orca_wire::stream::StreamError;
use orca_wire::{Connection, Peer, Stream};
use serde::Serialize;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use crate::auth::{self, Caller, Object, Refusals, Verb};
use crate::blob::{BlobError, Blobs};
use crate::clock::now;
use crate::driver::Overview;
use crate::raft::{Fatal, ProposeError, Raft, ReadError};
use crate::session::Sessions;
use crate::vault::{Origin, Vault};

/// How long a request waits for this node to lead: the time right after a start, or an election.
const LEADER_DEADLINE: Duration = Duration::from_secs(3);

/// Tries of a change that another one got in the way of.
const TRIES_MAX: usize = 5;

/// Messages of a stream that wait for whoever reads it.
const STREAM_QUEUE: usize = 256;

/// A token's end is looked at this often at the latest, however far away it is.
const EXPIRY_CHECK: Duration = Duration::from_secs(60 * 60);

pub type Answer = Result<Response, Refused>;

/// What comes on a stream; or, as the last of it, why that is not all.
pub type Items<T> = mpsc::Receiver<Result<T, Refused>>;

/// Everything a request may need.
#[derive(Debug)]
pub struct Core {
    pub raft: Raft,
    pub vault: Arc<Vault>,
    pub cluster: ClusterId,
    pub authority: Fingerprint,
    pub blobs: Blobs,
    pub sessions: Sessions,
    pub overview: watch::Receiver<Arc<Overview>>,
    pub refusals: Arc<Refusals>,
    pub data_dir: PathBuf,
    pub unseal: Origin,
    /// Changes asked for so far.
    pub proposals: AtomicU64,
    /// Requests that are waited for when the control plane ends.
    pub under_way: TaskTracker,
}

/// A change that was made, or found made.
#[derive(Debug)]
pub struct Changed {
    pub generation: Generation,
    /// Absent if nothing had to change.
    pub detail: Option<Detail>,
}

impl Changed {
    /// The answer for changes of which there is nothing else to say.
    pub fn response(self) -> Response {
        let generation = self.generation;
        match self.detail {
            None => Response::Unchanged { generation },
            Some(Detail::Revision(revision)) => Response::Revised { generation, revision },
            Some(Detail::None | Detail::Node(_) | Detail::Put(_)) => Response::Done { generation },
        }
    }
}

impl Core {
    /// Whether the caller may; if not, that is told to others too.
    pub fn authorise(&self, caller: &Caller, verb: Verb, object: Object<'_>) -> Result<(), Refused> {
        auth::authorise(caller, verb, object).map_err(|denied| {
            self.refusals.denied(caller, &denied, now());
            Refused {
                reason: Reason::Unauthorised,
                message: denied.to_string(),
                hint: Some("`orca token create` makes a token with another role or project".to_owned()),
                unfit: Vec::new(),
            }
        })
    }

    /// What is known now; only the leader knows enough.
    pub async fn overview(&self) -> Result<Overview, Refused> {
        let mut overviews = self.overview.clone();
        let led = timeout(LEADER_DEADLINE, overviews.wait_for(|overview| overview.term.is_some())).await;
        let overview = match led {
            Ok(Ok(overview)) => Overview::clone(&overview),
            Ok(Err(_)) | Err(_) => return Err(self.nobody_leads()),
        };
        // The overview is of the last decision; a change just acknowledged may be newer.
        Ok(Overview { state: self.raft.state(), ..overview })
    }

    /// The state with everything in it that was acknowledged before now.
    pub async fn read(&self) -> Result<Arc<State>, Refused> {
        self.led().await?;
        self.raft.read().await.map_err(|error| match error {
            ReadError::NotLeader { .. } | ReadError::NoQuorum => no_quorum(error.to_string()),
            ReadError::Fatal(fatal) => ended(&fatal),
        })
    }

    pub async fn propose(&self, caller: &Caller, command: Command) -> Result<Changed, Refused> {
        let applied = self.apply(caller, command).await?;
        applied.map_err(refused)
    }

    /// As [`propose`](Core::propose), for callers that act on some refusals.
    pub async fn apply(&self, caller: &Caller, command: Command) -> Result<Result<Changed, Refusal>, Refused> {
        self.led().await?;
        self.proposals.fetch_add(1, Ordering::Relaxed);
        let source = Some(caller.source.to_string());
        // What else it is refused for, it is refused for in its place in the log.
        if let Some(refusal @ Refusal::TooMuch(_)) = Limits::OURS.refuses(&self.raft.state(), &command) {
            return Ok(Err(refusal));
        }
        let command = Limits::IN_ENTRIES.hold(command);
        let entry = Entry { at: now(), actor: caller.actor(), source, command };
        let committed = self.raft.propose(entry).await.map_err(|error| match &error {
            ProposeError::NotLeader { .. } | ProposeError::NoQuorum => no_quorum(error.to_string()),
            ProposeError::Unknown(_) => plain(Reason::TimedOut, error.to_string(), None),
            ProposeError::TooLarge { .. } => invalid(error.to_string(), Some("deploy fewer services at a time")),
            ProposeError::Fatal(fatal) => ended(fatal),
        })?;
        Ok(match committed.applied {
            Applied::Done { generation, detail } => Ok(Changed { generation, detail: Some(detail) }),
            Applied::Unchanged { generation } => Ok(Changed { generation, detail: None }),
            Applied::Refused(refusal) => Err(refusal),
        })
    }

    /// Waits a moment for this node to lead.
    pub async fn led(&self) -> Result<(), Refused> {
        let mut leadership = self.raft.leadership();
        match timeout(LEADER_DEADLINE, leadership.wait_for(Option::is_some)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(self.nobody_leads()),
        }
    }

    fn nobody_leads(&self) -> Refused {
        if let Some(fatal) = self.raft.failed() {
            return ended(&fatal);
        }
        let leader = self.raft.metrics().leader;
        let elsewhere = self.raft.members().into_iter().find(|member| Some(member.id) == leader);
        match elsewhere {
            Some(leader) if leader.id != self.raft.id() => {
                no_quorum(format!("{} at {} leads, not this node; ask there", leader.name, leader.address))
            }
            Some(_) | None => no_quorum("no control node leads at the moment; try again".to_owned()),
        }
    }

    /// Resolves when the caller's token means nobody any more.
    pub async fn revoked(&self, token: &TokenId) {
        let mut states = self.raft.watch();
        loop {
            let expires = match states.borrow_and_update().tokens.get(token) {
                Some(record) if auth::is_good(record, now()) => record.expires,
                Some(_) | None => return,
            };
            let check = expires.map_or(EXPIRY_CHECK, |at| at.since(now()).min(EXPIRY_CHECK));
            tokio::select! {
                changed = states.changed() => if changed.is_err() {
                    // Raft has ended, which says nothing about the token.
                    std::future::pending::<()>().await;
                },
                () = tokio::time::sleep(check) => {}
            }
        }
    }
}

/// Serves one connection of the client plane to its end, or to the end of its token.
pub async fn serve(core: Arc<Core>, connection: Connection) {
    let token = match (connection.peer(), connection.token()) {
        (Peer::User { token }, _) | (Peer::Anonymous, Some(token)) => token.clone(),
        (Peer::Anonymous, None) | (Peer::Node { .. }, _) => {
            // The endpoint lets neither open this plane.
            connection.close("a user's certificate or a token is needed");
            return;
        }
    };
    let source = connection.remote_address();
    let (asked, id) = (core.clone(), token.clone());
    let serving = connection.serve(move |request: Request, stream| {
        let (core, token) = (asked.clone(), id.clone());
        async move {
            let answered = match auth::identify(&core.raft.state(), &token, source, now()) {
                Ok(caller) => Box::pin(answer(&core, &caller, request, stream)).await,
                Err(nobody) => stream.answer(&Response::Refused(unauthenticated(nobody))).await,
            };
            if let Err(error) = answered {
                debug!(%source, error = chain(&error), "a request ended early");
            }
        }
    });
    tokio::select! {
        end = serving => debug!(%source, %end, "a client's connection ended"),
        () = core.revoked(&token) => connection.close("the token was revoked or has expired"),
    }
}

/// Carries one request out.
async fn answer(core: &Arc<Core>, caller: &Caller, request: Request, stream: Stream) -> Result<(), StreamError> {
    // What goes on for as long as somebody listens would be waited for in vain.
    let _under_way = (!request.is_lasting()).then(|| core.under_way.token());
    let answer = match request {
        Request::Plan(deploy) => deploy::plan(core, caller, deploy).await,
        Request::Deploy(deploy) => deploy::deploy(core, caller, deploy).await,
        Request::MissingModules { digests } => deploy::missing_modules(core, caller, digests),
        Request::PutModule { digest, size } => return receive_module(core, caller, &digest, size, stream).await,
        Request::PlanSettings(settings) => service::plan_settings(core, caller, settings).await,
        Request::SetSettings(settings) => service::set_settings(core, caller, settings).await,
        Request::Status { service } => status::status(core, caller, service).await,
        Request::Watch { services } => {
            return follow(stream, status::watch(core, caller, services).await).await;
        }
        Request::Why { service } => status::why(core, caller, service).await,
        Request::History { service } => status::history(core, caller, service).await,
        Request::Nodes => status::nodes(core, caller).await,
        Request::Events(query) => return follow(stream, events::events(core, caller, query).await).await,
        Request::Logs(query) => return follow(stream, logs::logs(core, caller, query).await).await,
        Request::Exec(exec) => return exec::exec(core, caller, exec, stream).await,
        Request::Scale { service, replicas } => service::scale(core, caller, service, replicas).await,
        Request::Stop { service } => service::stop(core, caller, service).await,
        Request::Start { service } => service::start(core, caller, service).await,
        Request::Restart { service } => service::restart(core, caller, service).await,
        Request::Redeploy { service } => service::redeploy(core, caller, service).await,
        Request::Remove { service, volumes } => service::remove(core, caller, service, volumes).await,
        Request::Promote { service } => service::promote(core, caller, service).await,
        Request::Rollback { service, to } => service::rollback(core, caller, service, to).await,
        Request::SetSecrets { secrets } => secret::set(core, caller, secrets).await,
        Request::ListSecrets { project } => secret::list(core, caller, project).await,
        Request::RemoveSecret { name } => secret::remove(core, caller, name).await,
        Request::RotateSecrets { project } => secret::rotate(core, caller, project).await,
        Request::CreateToken(create) => token::create(core, caller, create).await,
        Request::ListTokens => token::list(core, caller).await,
        Request::RevokeToken { id } => token::revoke(core, caller, id).await,
        Request::Whoami => token::whoami(core, caller),
        Request::Doctor => doctor::doctor(core, caller).await,
    };
    let received = stream.closed();
    stream.answer(&answer.unwrap_or_else(Response::Refused)).await?;
    // A connection that is closed before takes the answer with it.
    received.await;
    Ok(())
}

/// Sends what comes until it ends or the other side has enough.
async fn follow<T: Serialize>(mut stream: Stream, opened: Result<Items<T>, Refused>) -> Result<(), StreamError> {
    // As a person does with a pager.
    stream.may_rest();
    let mut items = match opened {
        Ok(items) => items,
        Err(refused) => return stream.answer(&Response::Refused(refused)).await,
    };
    let closed = stream.closed();
    let mut closed = std::pin::pin!(closed);
    loop {
        tokio::select! {
            () = &mut closed => return Ok(()),
            item = items.recv() => match item {
                Some(Ok(item)) => stream.send(&item).await?,
                Some(Err(refused)) => return stream.answer(&Response::Refused(refused)).await,
                None => return stream.finish().await,
            },
        }
    }
}

async fn receive_module(
    core: &Core,
    caller: &Caller,
    digest: &str,
    size: u64,
    mut stream: Stream,
) -> Result<(), StreamError> {
    let mut upload = match deploy::receive_module(core, caller, digest, size).await {
        Ok(upload) => upload,
        Err(refused) => return stream.answer(&Response::Refused(refused)).await,
    };
    while !upload.is_complete() {
        let Some(bytes) = stream.next_bytes().await? else { break };
        if let Err(error) = upload.push(&bytes).await {
            return stream.answer(&Response::Refused(blob(error))).await;
        }
    }
    let answer = deploy::keep_module(core, upload).await;
    stream.answer(&answer.unwrap_or_else(Response::Refused)).await
}

/// The state's actor, as people are shown it.
fn actor_name(actor: &Actor) -> String {
    actor.to_string()
}

pub fn invalid(message: String, hint: Option<&str>) -> Refused {
    plain(Reason::Invalid, message, hint)
}

pub fn not_found(message: String, hint: Option<&str>) -> Refused {
    plain(Reason::NotFound, message, hint)
}

pub fn failed(message: String) -> Refused {
    plain(Reason::Failed, message, None)
}

fn plain(reason: Reason, message: String, hint: Option<&str>) -> Refused {
    Refused { reason, message, hint: hint.map(str::to_owned), unfit: Vec::new() }
}

/// The control plane met its end on the way. What it says names the cause; a change may be in the log all the same.
fn ended(fatal: &Fatal) -> Refused {
    let hint = "this was not acknowledged: when it works again, look with `orca status` and ask anew";
    plain(Reason::Failed, format!("the control plane has stopped: {fatal}"), Some(hint))
}

fn no_quorum(message: String) -> Refused {
    plain(Reason::NoQuorum, message, Some("`orca doctor` says which control nodes answer"))
}

pub fn unauthenticated(nobody: auth::Unauthenticated) -> Refused {
    let hint = "ask an administrator for a token (`orca token create`)";
    plain(Reason::Unauthorised, nobody.to_string(), Some(hint))
}

fn no_service(name: &ServiceName) -> Refused {
    refused(Refusal::NoService(name.clone()))
}

pub fn blob(error: BlobError) -> Refused {
    match error {
        BlobError::Digest(_) | BlobError::TooLarge(_) | BlobError::Short { .. } | BlobError::Other { .. } => {
            invalid(error.to_string(), None)
        }
        BlobError::Full(_) => plain(Reason::Conflict, error.to_string(), None),
        BlobError::Write { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
            let message = "no space left on the control node's disk; the module was not kept".to_owned();
            plain(Reason::Failed, message, Some("free some there, and deploy again"))
        }
        BlobError::Write { .. } | BlobError::Read { .. } => {
            let error = chain(&error);
            warn!(error, "the module store fails");
            failed(error)
        }
    }
}

/// A refusal of the state, as the CLI needs it for its exit code. Most texts name the next step themselves.
pub fn refused(refusal: Refusal) -> Refused {
    let (reason, hint) = match &refusal {
        Refusal::NoService(_) => (Reason::NotFound, Some("`orca status` lists what there is")),
        Refusal::NoRevision { .. } => (Reason::NotFound, None),
        Refusal::NoSecret(_) => (Reason::NotFound, Some("`orca secrets list` lists what there is")),
        Refusal::NoToken(_) => (Reason::NotFound, Some("`orca token list` lists what there is")),
        Refusal::NothingBefore(_) => (Reason::Conflict, Some("`orca history` shows its revisions")),
        Refusal::Moved { .. } => (Reason::Conflict, Some("plan again")),
        Refusal::NothingToPromote(_) => (Reason::Conflict, Some("`orca status` shows what it is doing")),
        Refusal::Busy { .. }
        | Refusal::Removing(_)
        | Refusal::SecretMoved { .. }
        | Refusal::SecretInUse { .. }
        | Refusal::DataKeyTaken(_)
        | Refusal::Founded
        | Refusal::LastAdmin => (Reason::Conflict, None),
        Refusal::RouteTaken { .. }
        | Refusal::SecretsMissing { .. }
        | Refusal::CannotScale { .. }
        | Refusal::Several(_)
        | Refusal::TooMuch(_) => (Reason::Invalid, None),
        Refusal::HostTaken { .. } => (Reason::Invalid, Some("or ask somebody whose token is not limited to a project")),
        Refusal::NoDependency { .. } => (Reason::Invalid, Some("add it to the project, or correct `depends_on`")),
        Refusal::NoDataKey(_) => (Reason::Failed, Some("try again")),
    };
    Refused { unfit: misfits(&refusal).to_vec(), ..plain(reason, refusal.to_string(), hint) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::tests::{SOON, connections};

    #[tokio::test]
    async fn a_person_who_rests_gets_every_line_and_then_why_there_are_no_more() {
        // Together more than is under way unread.
        const LINES: usize = 80;
        let (person, ours, _endpoints) = connections().await;
        let mut reading = person.open(&()).await.unwrap();
        let mut stream = ours.accept().await.unwrap();
        stream.next_within::<()>(SOON).await.unwrap();
        stream.sender.set_stall(Duration::from_millis(1));
        let (send, lines) = mpsc::channel(LINES + 1);
        for _ in 0..LINES {
            send.send(Ok("x".repeat(64 << 10))).await.unwrap();
        }
        send.send(Err(failed("n2 is away".to_owned()))).await.unwrap();

        let mut following = tokio::spawn(follow(stream, Ok(lines)));
        let early = timeout(Duration::from_millis(500), &mut following).await;
        assert!(early.is_err(), "it gave up on somebody who rests: {early:?}");
        for _ in 0..LINES {
            reading.next_within::<String>(SOON).await.unwrap();
        }
        let last: Response = reading.next_within(SOON).await.unwrap();
        assert!(matches!(&last, Response::Refused(refused) if refused.message == "n2 is away"), "{last:?}");
        following.await.unwrap().unwrap();
    }
}

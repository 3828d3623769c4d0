//! A control node: agrees with its peers on the state of the cluster, leads when elected, and answers people,
//! programs and agents.
//!
//! ```text
//!   client plane, HTTP ──▶ api ──▶ Raft ──applied──▶ driver(Leader) ──goals──▶ session ──▶ agents
//!                           ▲                          ▲      │                   │
//!                           └──────── Overview ◀───────┼──────┘                   │
//!                                                      └────────── reports ◀──────┘
//! ```
//!
//! [`Control::start`] opens or founds; [`Control::run`] works until told to stop; a [`Handle`] is the way in. The ports
//! are a [`Front`]'s, which outlives a control plane that cannot go on.

pub mod config;

pub mod raft;
pub mod store;
pub mod vault;

pub mod blob;
pub mod found;

pub mod driver;
pub mod inbox;
pub mod peer;
pub mod session;

pub mod api;
pub mod auth;
pub mod front;
pub mod http;
pub mod metrics;

mod clock;

use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use futures_util::FutureExt as _;
use orca_cluster::command::{Command, Entry};
use orca_cluster::id::ClusterId;
use orca_cluster::state::{Cluster, State};
use orca_wire::cause::chain;
use orca_wire::endpoint::LocalError;
use orca_wire::identity::{Authority, AuthorityError, Identity, IdentityError, KeyRequest};
use orca_wire::{Connection, Endpoint, Listener, Peer, Plane};
use tokio::sync::{OwnedMutexGuard, mpsc, watch};
use tokio::task::{JoinError, JoinSet};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, error, info, warn};

use api::Core;
use auth::{Refusal, Refusals};
use blob::{BlobError, Blobs};
use clock::now;
pub use config::{Config, Layout, UnsealSource};
use driver::{Driver, Overview};
use found::FoundError;
pub use found::Founded;
pub use front::Front;
use inbox::Inbox;
use peer::Peers;
use raft::{Fatal, Raft, RaftConfig, RaftId};
use session::{AgentPlane, Sessions};
use vault::{Place, UnsealKey, Vault, VaultError};

/// How long a start waits for the state of a cluster whose store this node has: replaying takes milliseconds, and
/// with several control nodes, an election.
const STATE_DEADLINE: Duration = Duration::from_secs(30);

/// A certificate that could not be renewed is tried again after this; a third of its life is left then.
const RENEWAL_PAUSE: Duration = Duration::from_secs(60);

/// The longest sleep before a renewal: a clock that is set meanwhile is noticed within it.
const RENEWAL_CHECK: Duration = Duration::from_secs(60 * 60);

/// How long requests that are under way may take to be answered when the control plane ends. One whose write has
/// failed is answered at once.
const LAST_ANSWERS_MAX: Duration = Duration::from_secs(2);

/// How long connections may take to hear that it has ended.
const GOODBYES_MAX: Duration = Duration::from_secs(1);

/// Connections of people and programs that are served at the same time.
const CLIENTS_MAX: usize = 800;

/// And of nodes, so that no client can keep an agent or a peer out; 20 of them need a tenth of it.
const NODES_MAX: usize = 200;

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("the cluster could not be founded")]
    Found(#[from] FoundError),
    #[error("whether there is a store at {} cannot be told", path.display())]
    Store {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the store {} is not there; mount the disk it is on, or restore it from a backup", path.display())]
    NoStore { path: PathBuf },
    #[error("{} has a control node's store, but not the identity that goes with it", path.display())]
    Identity {
        path: PathBuf,
        #[source]
        source: IdentityError,
    },
    #[error("the identity in {} is {peer}, which is no control node", path.display())]
    NoVoter { path: PathBuf, peer: Peer },
    #[error("cannot listen on {address}/udp for nodes and the CLI")]
    Quic {
        address: SocketAddr,
        #[source]
        source: LocalError,
    },
    #[error("cannot listen on {address}/tcp for the HTTP API")]
    Http {
        address: SocketAddr,
        #[source]
        source: std::io::Error,
    },
    #[error(
        "the HTTP API has no TLS yet and would send tokens in the clear over the network; listen on a loopback \
         address instead of {address}, such as 127.0.0.1:{}", address.port()
    )]
    PlainHttp { address: SocketAddr },
    #[error(transparent)]
    Raft(#[from] raft::StartError),
    #[error(transparent)]
    Vault(#[from] VaultError),
    #[error("the certificate authority could not be opened")]
    Authority(#[from] AuthorityError),
    #[error("the certificate of the authority in the cluster's state is damaged")]
    AuthorityForm,
    #[error("the node's new certificate could not be kept")]
    Renewal(#[source] IdentityError),
    #[error("the node's new certificate cannot be used")]
    Local(#[source] LocalError),
    #[error(transparent)]
    Modules(#[from] BlobError),
    #[error("the store holds no cluster after {} s; are the other control nodes running?", .0.as_secs())]
    NoState(Duration),
    #[error(transparent)]
    Fatal(#[from] Fatal),
}

impl StartError {
    /// Whether the unseal key is another one than the cluster's, which only a person can have brought about.
    pub fn is_wrong_key(&self) -> bool {
        matches!(self, StartError::Vault(VaultError::WrongUnsealKey { .. } | VaultError::UnsealKeyForm { .. }))
    }
}

/// Why a control node cannot go on. Opening it again says what can be done.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error(transparent)]
    Raft(#[from] Fatal),
    #[error("the QUIC endpoint on {0} can no longer be used")]
    Endpoint(SocketAddr),
}

/// A control node that listens and is ready to [`run`](Control::run).
#[derive(Debug)]
pub struct Control {
    core: Arc<Core>,
    driver: Driver,
    plane: AgentPlane,
    front: Front,
    listener: OwnedMutexGuard<Listener>,
    refused: mpsc::Receiver<Refusal>,
    layout: Layout,
    founded: Option<Founded>,
    stop: CancellationToken,
}

/// The way in to a control node; cheap to clone.
#[derive(Debug, Clone)]
pub struct Handle {
    core: Arc<Core>,
    front: Front,
    stop: CancellationToken,
}

impl Control {
    /// Opens the data directory, or founds a cluster in it if it is empty, and listens.
    pub async fn start(config: Config) -> Result<(Control, Handle), StartError> {
        let http = front::bind_http(&config).await?;
        let layout = Layout::new(&config.data_dir);
        // One that cannot be looked at is not absent: founding anew would write over its node's identity.
        let exists = layout.raft().try_exists();
        let founded = match exists.map_err(|source| StartError::Store { path: layout.raft(), source })? {
            true => None,
            false => {
                // A port that is taken is better known before there is a cluster. Those who listen need its identity.
                let taken = |source| StartError::Quic { address: config.listen_quic, source: LocalError::Bind(source) };
                std::net::UdpSocket::bind(config.listen_quic).map_err(taken)?;
                let advertise = config.advertise.clone().unwrap_or_else(|| config.listen_quic.to_string());
                Some(found::found(&config, &layout, advertise, now()).await?)
            }
        };
        let front = Front::with(&config, http)?;
        let (mut control, handle) = Control::open(&config, &front).await?;
        control.founded = founded;
        Ok((control, handle))
    }

    /// Opens the control plane of a cluster that was founded, behind ports that are open.
    pub async fn open(config: &Config, front: &Front) -> Result<(Control, Handle), StartError> {
        let layout = Layout::new(&config.data_dir);
        // Opening would make an empty one where the disk with the right one is away.
        let exists = layout.raft().join(store::FILE_NAME).try_exists();
        if !exists.map_err(|source| StartError::Store { path: layout.raft(), source })? {
            return Err(StartError::NoStore { path: layout.raft() });
        }
        let identity = front.identity().borrow().clone();
        let &Peer::Node { raft: Some(raft_id), .. } = identity.peer() else {
            return Err(StartError::NoVoter { path: layout.node(), peer: identity.peer().clone() });
        };
        let cluster = identity.cluster();
        let mut listener = front.listener().await;
        let raft_config = RaftConfig::new(RaftId(raft_id), cluster.to_string(), layout.raft());
        let raft = Raft::start(raft_config, Peers::new(front.endpoint().clone())).await?;
        let (refusals, refused) = Refusals::new();
        let refusals = Arc::new(refusals);
        front.let_in(raft.watch(), refusals.clone());
        let opened = async {
            let record = cluster_record(&raft, &mut listener).await?;
            unsealed(config, &layout, &raft, &record, identity, front.endpoint())
        };
        let Opened { vault, unseal, authority, identity, blobs } = match opened.await {
            Ok(opened) => opened,
            Err(error) => {
                let why = chain(&error);
                listener.turn_away(&why);
                front.say(why);
                // So that the store is closed when the caller hears of it.
                raft.shutdown().await;
                return Err(error);
            }
        };
        front.renewed(identity);

        let published = Driver::overview(&raft);
        let (vault, sessions, inbox) = (Arc::new(vault), Sessions::default(), Arc::new(Inbox::default()));
        let core = Arc::new(Core {
            raft: raft.clone(),
            vault: vault.clone(),
            cluster,
            authority: authority.fingerprint(),
            blobs: blobs.clone(),
            sessions: sessions.clone(),
            overview: published.subscribe(),
            refusals,
            data_dir: config.data_dir.clone(),
            unseal: unseal.origin().clone(),
            proposals: AtomicU64::new(0),
            under_way: TaskTracker::new(),
        });
        let plane = AgentPlane { sessions: sessions.clone(), inbox: inbox.clone(), blobs };
        let driver = Driver { raft, vault, cluster, inbox, sessions, published };
        let stop = CancellationToken::new();
        let handle = Handle { core: core.clone(), front: front.clone(), stop: stop.clone() };
        info!(quic = %front.quic_address(), http = %front.http_address(), %cluster, "control node started");
        let front = front.clone();
        let control = Control { core, driver, plane, front, listener, refused, layout, founded: None, stop };
        Ok((control, handle))
    }

    /// What is to be told once, if this start founded the cluster.
    pub fn founded(&mut self) -> Option<Founded> {
        self.founded.take()
    }

    /// Works until [`Handle::shutdown`], then hands leadership over and closes; or until Raft can do no more. Then the
    /// ports stay open, and another can be [opened](Control::open) behind them.
    pub async fn run(self) -> Result<(), RunError> {
        let Control { core, driver, plane, front, mut listener, refused, layout, founded: _, stop } = self;
        let raft = core.raft.clone();
        let (end, ending) = watch::channel(None);
        let mut connections = std::pin::pin!(accept(core.clone(), plane, &mut listener, ending.clone()).fuse());
        let mut http = std::pin::pin!(http::serve(http::router(core.clone()), front.http(), ending).fuse());
        let ended = tokio::select! {
            () = stop.cancelled() => Ok(()),
            fatal = raft.fatal() => Err(fatal.into()),
            // It ends when Raft has; that knows why.
            () = driver.run() => Err(raft.fatal().await.into()),
            // Nothing was told to end, so that only their ports can have failed.
            () = &mut connections => Err(RunError::Endpoint(front.quic_address())),
            () = &mut http => Err(RunError::Endpoint(front.http_address())),
            never = announce(core.clone(), refused) => match never {},
            never = keep_certified(core.clone(), front.clone(), layout) => match never {},
        };
        let why = match &ended {
            Ok(()) => "the control node stops".to_owned(),
            Err(error) => {
                let error = chain(error);
                error!(error, "the control node cannot go on");
                error
            }
        };
        front.say(why.clone());
        if !matches!(ended, Err(RunError::Endpoint(_))) {
            // Whoever has asked is answered: that it was done, or why not.
            core.under_way.close();
            let answered = async {
                tokio::select! {
                    () = core.under_way.wait() => {}
                    ((), ()) = async { tokio::join!(&mut connections, &mut http) } => {}
                }
            };
            if timeout(LAST_ANSWERS_MAX, answered).await.is_err() {
                debug!("some requests are cut short");
            }
            end.send_replace(Some(why));
            if timeout(GOODBYES_MAX, async { tokio::join!(connections, http) }).await.is_err() {
                debug!("some connections are not closed in good order");
            }
        }
        if ended.is_ok() {
            front.close().await;
        }
        raft.shutdown().await;
        ended
    }
}

impl Handle {
    /// The state as applied here.
    pub fn state(&self) -> watch::Receiver<Arc<State>> {
        self.core.raft.watch()
    }

    /// What is known beside the state, renewed at every decision while this node leads.
    pub fn overview(&self) -> watch::Receiver<Arc<Overview>> {
        self.core.overview.clone()
    }

    pub fn cluster(&self) -> ClusterId {
        self.core.cluster
    }

    /// The ports, which stay open when the control plane cannot go on.
    pub fn front(&self) -> &Front {
        &self.front
    }

    pub fn quic_address(&self) -> SocketAddr {
        self.front.quic_address()
    }

    pub fn http_address(&self) -> SocketAddr {
        self.front.http_address()
    }

    /// Resolves when Raft can do no more.
    pub fn fatal(&self) -> impl Future<Output = Fatal> + Send + 'static {
        self.core.raft.fatal()
    }

    /// Makes [`Control::run`] end.
    pub fn shutdown(&self) {
        self.stop.cancel();
    }
}

/// What the state of the cluster and the unseal key give together.
struct Opened {
    vault: Vault,
    unseal: UnsealKey,
    authority: Authority,
    identity: Identity,
    blobs: Blobs,
}

fn unsealed(
    config: &Config,
    layout: &Layout,
    raft: &Raft,
    record: &Cluster,
    identity: Identity,
    endpoint: &Endpoint,
) -> Result<Opened, StartError> {
    let unseal = match &config.unseal {
        UnsealSource::File(path) => UnsealKey::load(path)?,
        UnsealSource::Variable(value) => UnsealKey::from_variable(value)?,
    };
    let vault = Vault::open(identity.cluster(), &unseal, &record.root)?;
    let authority = open_authority(&raft.state(), &vault)?;
    let identity = match now() >= identity.renew_at() {
        true => renewed(&authority, &identity, layout, endpoint)?,
        false => identity,
    };
    let blobs = Blobs::open(layout.modules())?;
    blobs.sweep(&api::deploy::modules(&raft.state()))?;
    Ok(Opened { vault, unseal, authority, identity, blobs })
}

/// Waits until the state has the cluster in it, and answers peers meanwhile: with several control nodes, they need
/// each other's votes first.
async fn cluster_record(raft: &Raft, listener: &mut Listener) -> Result<Cluster, StartError> {
    let mut states = raft.watch();
    let fatal = raft.fatal();
    let mut fatal = std::pin::pin!(fatal);
    let deadline = tokio::time::sleep(STATE_DEADLINE);
    let mut deadline = std::pin::pin!(deadline);
    loop {
        if let Some(cluster) = &states.borrow_and_update().cluster {
            return Ok(cluster.clone());
        }
        tokio::select! {
            _ = states.changed() => {}
            fatal = &mut fatal => return Err(fatal.into()),
            () = &mut deadline => return Err(StartError::NoState(STATE_DEADLINE)),
            Some(connection) = listener.accept() => match connection.plane() {
                Plane::Peer => {
                    tokio::spawn(peer::serve(raft.clone(), connection));
                }
                Plane::Agent | Plane::Client => connection.close("this control node is starting; try again"),
            },
        }
    }
}

/// Serves every connection, each in its own task, until the control plane ends; then the others are told why.
async fn accept(
    core: Arc<Core>,
    plane: AgentPlane,
    listener: &mut Listener,
    mut ending: watch::Receiver<Option<String>>,
) {
    let (mut clients, mut nodes) = (JoinSet::new(), JoinSet::new());
    let told = ending.clone();
    loop {
        tokio::select! {
            connection = listener.accept() => {
                let Some(connection) = connection else {
                    error!("the QUIC endpoint is closed");
                    return;
                };
                let full = match connection.plane() {
                    Plane::Client => clients.len() >= CLIENTS_MAX,
                    Plane::Peer | Plane::Agent => nodes.len() >= NODES_MAX,
                };
                if full {
                    warn!(source = %connection.remote_address(), "too many connections");
                    connection.close("too many connections; try again");
                    continue;
                }
                debug!(source = %connection.remote_address(), peer = %connection.peer(), plane = %connection.plane(), "connected");
                let told = told.clone();
                match connection.plane() {
                    Plane::Peer => nodes.spawn(until(told, connection.clone(), peer::serve(core.raft.clone(), connection))),
                    Plane::Agent => nodes.spawn(until(told, connection.clone(), plane.clone().serve(connection))),
                    Plane::Client => clients.spawn(until(told, connection.clone(), api::serve(core.clone(), connection))),
                };
            }
            Some(ended) = clients.join_next() => served(&ended),
            Some(ended) = nodes.join_next() => served(&ended),
            _ = ending.wait_for(Option::is_some) => break,
        }
    }
    listener.turn_away("the control plane has ended; try again");
    while let Some(ended) = clients.join_next().await {
        served(&ended);
    }
    while let Some(ended) = nodes.join_next().await {
        served(&ended);
    }
}

/// Serves a connection to its end, or to the end of the control plane.
async fn until(mut ending: watch::Receiver<Option<String>>, connection: Connection, serving: impl Future<Output = ()>) {
    tokio::select! {
        () = serving => {}
        why = ending.wait_for(Option::is_some) => {
            // Who ended it without a word has panicked.
            let why = why.ok().and_then(|why| why.clone()).unwrap_or_default();
            connection.close(&why);
        }
    }
}

fn served(ended: &Result<(), JoinError>) {
    if let Err(failed) = ended
        && failed.is_panic()
    {
        error!(%failed, "serving a connection panicked");
    }
}

/// Writes refusals into the audit trail.
async fn announce(core: Arc<Core>, mut refused: mpsc::Receiver<Refusal>) -> Infallible {
    while let Some(Refusal { actor, source, announcement }) = refused.recv().await {
        warn!(%source, actor = %actor, what = announcement.text, "refused");
        let command = Command::Announce(vec![announcement]);
        let entry = Entry { at: now(), actor, source: Some(source.to_string()), command };
        // Where nobody leads it is in our own log at least.
        if core.led().await.is_ok()
            && let Err(error) = core.raft.propose(entry).await
        {
            debug!(error = chain(&error), "a refusal could not be announced");
        }
    }
    // Its sender lives as long as the node.
    std::future::pending().await
}

/// Renews the node's certificate when two thirds of its life are over.
async fn keep_certified(core: Arc<Core>, front: Front, layout: Layout) -> Infallible {
    loop {
        let current = front.identity().borrow().clone();
        let now = now();
        if now < current.renew_at() {
            tokio::time::sleep(current.renew_at().since(now).min(RENEWAL_CHECK)).await;
            continue;
        }
        let renewal = open_authority(&core.raft.state(), &core.vault)
            .and_then(|authority| renewed(&authority, &current, &layout, front.endpoint()));
        match renewal {
            Ok(new) => {
                info!(not_after = ?new.not_after(), "the node's certificate was renewed");
                front.renewed(new);
            }
            Err(error) => {
                warn!(error = chain(&error), "the node's certificate could not be renewed; it is tried again");
                tokio::time::sleep(RENEWAL_PAUSE).await;
            }
        }
    }
}

fn open_authority(state: &State, vault: &Vault) -> Result<Authority, StartError> {
    let cluster = state.cluster.as_ref().ok_or(StartError::AuthorityForm)?;
    let key = state.data_keys.get(&cluster.ca_key.key).ok_or(StartError::AuthorityForm)?;
    let opened = vault.open_value(&key.key, &Place::authority(cluster.ca_key.version), &cluster.ca_key)?;
    let certificate = pem::parse(&cluster.ca_certificate).map_err(|_| StartError::AuthorityForm)?;
    Ok(Authority::open(certificate.contents(), opened.expose())?)
}

/// A new key and certificate for the same node, kept and in use.
fn renewed(
    authority: &Authority,
    identity: &Identity,
    layout: &Layout,
    endpoint: &Endpoint,
) -> Result<Identity, StartError> {
    let &Peer::Node { node, raft } = identity.peer() else {
        return Err(StartError::NoVoter { path: layout.node(), peer: identity.peer().clone() });
    };
    let request = KeyRequest::generate();
    let issued = authority.issue_node(&request.request(), node, raft, now())?;
    let identity = request.into_identity(&issued).map_err(StartError::Renewal)?;
    identity.save(&layout.node()).map_err(StartError::Renewal)?;
    endpoint.renew(identity.clone()).map_err(StartError::Local)?;
    Ok(identity)
}

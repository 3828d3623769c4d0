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
//! [`Control::start`] opens or founds; [`Control::run`] works until told to stop; a [`Handle`] is the way in.

pub mod config;

pub mod raft;
pub mod store;
pub mod vault;

pub mod blob;
pub mod found;

pub mod driver;
pub mod peer;
pub mod session;

pub mod api;
pub mod auth;
pub mod http;
pub mod metrics;

mod clock;

use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use orca_cluster::command::{Command, Entry};
use orca_cluster::id::ClusterId;
use orca_cluster::state::{Cluster, State};
use orca_cluster::time::Timestamp;
use orca_wire::endpoint::{Caller as Dialer, LocalError};
use orca_wire::identity::{Authority, AuthorityError, Identity, IdentityError, KeyRequest};
use orca_wire::{Endpoint, Listener, Peer, Plane};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinError, JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use api::Core;
use auth::{Refusal, Refusals};
use blob::{BlobError, Blobs};
use clock::now;
pub use config::{Config, Layout, UnsealSource};
use driver::{Driver, Inbox, Overview};
use found::FoundError;
pub use found::Founded;
use peer::Peers;
use raft::{Fatal, Raft, RaftConfig, RaftId};
use session::{AgentPlane, Sessions};
use vault::{Entry as VaultEntry, UnsealKey, Vault, VaultError};

/// How long a start waits for the state of a cluster whose store this node has: replaying takes milliseconds, and
/// with several control nodes, an election.
const STATE_DEADLINE: Duration = Duration::from_secs(30);

/// A certificate that could not be renewed is tried again after this; a third of its life is left then.
const RENEWAL_PAUSE: Duration = Duration::from_secs(60);

/// The longest sleep before a renewal: a clock that is set meanwhile is noticed within it.
const RENEWAL_CHECK: Duration = Duration::from_secs(60 * 60);

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

/// Why a control node cannot go on. The process should end; the next start says what can be done.
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
    endpoint: Endpoint,
    listener: Listener,
    http: TcpListener,
    refused: mpsc::Receiver<Refusal>,
    identity: watch::Sender<Identity>,
    layout: Layout,
    founded: Option<Founded>,
    stop: CancellationToken,
    quic: SocketAddr,
}

/// The way in to a control node; cheap to clone.
#[derive(Debug, Clone)]
pub struct Handle {
    core: Arc<Core>,
    identity: watch::Receiver<Identity>,
    quic: SocketAddr,
    http: SocketAddr,
    stop: CancellationToken,
}

impl Control {
    /// Opens the data directory, or founds a cluster in it if it is empty, and listens.
    pub async fn start(config: Config) -> Result<(Control, Handle), StartError> {
        // What is refused is refused before anything is made.
        if !config.listen_http.ip().is_loopback() {
            return Err(StartError::PlainHttp { address: config.listen_http });
        }
        let http = TcpListener::bind(config.listen_http).await.and_then(|http| Ok((http.local_addr()?, http)));
        let (http_address, http) = http.map_err(|source| StartError::Http { address: config.listen_http, source })?;

        let layout = Layout::new(&config.data_dir);
        // One that cannot be looked at is not absent: founding anew would write over its node's identity.
        let exists = layout.raft().try_exists();
        let founded = match exists.map_err(|source| StartError::Store { path: layout.raft(), source })? {
            true => None,
            false => {
                let advertise = config.advertise.clone().unwrap_or_else(|| config.listen_quic.to_string());
                Some(found::found(&config, &layout, advertise, now()).await?)
            }
        };

        // Even one that has expired says who we are; it is renewed below.
        let identity = Identity::load(&layout.node(), None, Timestamp(0))
            .map_err(|source| StartError::Identity { path: layout.node(), source })?;
        let &Peer::Node { raft: Some(raft_id), .. } = identity.peer() else {
            return Err(StartError::NoVoter { path: layout.node(), peer: identity.peer().clone() });
        };
        let cluster = identity.cluster();

        let states = Arc::new(OnceLock::new());
        let (refusals, refused) = Refusals::new();
        let refusals = Arc::new(refusals);
        let door = Door { states: states.clone(), refusals: refusals.clone() };
        let quic =
            Endpoint::server(config.listen_quic, identity.clone(), move |dialer: &Dialer<'_>| door.admit(dialer));
        let in_quic = |source| StartError::Quic { address: config.listen_quic, source };
        let (endpoint, mut listener) = quic.map_err(in_quic)?;
        let quic_address = endpoint.local_address().map_err(in_quic)?;

        let raft_config = RaftConfig::new(RaftId(raft_id), cluster.to_string(), layout.raft());
        let raft = Raft::start(raft_config, Peers::new(endpoint.clone())).await?;
        // Set once, here.
        let _ = states.set(raft.watch());
        let opened = async {
            let record = cluster_record(&raft, &mut listener).await?;
            open(&config, &layout, &raft, &record, identity, &endpoint)
        };
        let Opened { vault, unseal, authority, identity, blobs } = match opened.await {
            Ok(opened) => opened,
            Err(error) => {
                // So that the store is closed when the caller hears of it.
                raft.shutdown().await;
                return Err(error);
            }
        };

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
        });
        let plane = AgentPlane { sessions: sessions.clone(), inbox: inbox.clone(), blobs };
        let driver = Driver { raft, vault, cluster, inbox, sessions, published };
        let identity = watch::Sender::new(identity);
        let stop = CancellationToken::new();
        let handle = Handle {
            core: core.clone(),
            identity: identity.subscribe(),
            quic: quic_address,
            http: http_address,
            stop: stop.clone(),
        };
        info!(quic = %quic_address, http = %http_address, %cluster, "control node started");
        let control = Control {
            core,
            driver,
            plane,
            endpoint,
            listener,
            http,
            refused,
            identity,
            layout,
            founded,
            stop,
            quic: quic_address,
        };
        Ok((control, handle))
    }

    /// What is to be told once, if this start founded the cluster.
    pub fn founded(&mut self) -> Option<Founded> {
        self.founded.take()
    }

    /// Works until [`Handle::shutdown`], then hands leadership over and closes; or until Raft can do no more, when
    /// the process must end.
    pub async fn run(self) -> Result<(), RunError> {
        let Control {
            core,
            driver,
            plane,
            endpoint,
            listener,
            http,
            refused,
            identity,
            layout,
            founded: _,
            stop,
            quic,
        } = self;
        let raft = core.raft.clone();
        let ended = tokio::select! {
            () = stop.cancelled() => Ok(()),
            fatal = raft.fatal() => Err(fatal.into()),
            // It ends when Raft has; that knows why.
            () = driver.run() => Err(raft.fatal().await.into()),
            () = accept(core.clone(), plane, listener) => Err(RunError::Endpoint(quic)),
            never = http::serve(core.clone(), http) => match never {},
            never = announce(core.clone(), refused) => match never {},
            never = keep_certified(core.clone(), identity, layout, endpoint.clone()) => match never {},
        };
        if let Err(error) = &ended {
            error!(%error, "the control node cannot go on");
        }
        endpoint.close("the control node stops").await;
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

    /// The node's identity, for its agent; a new one whenever it was renewed.
    pub fn identity(&self) -> watch::Receiver<Identity> {
        self.identity.clone()
    }

    pub fn quic_address(&self) -> SocketAddr {
        self.quic
    }

    pub fn http_address(&self) -> SocketAddr {
        self.http
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

fn open(
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

/// Decides at the handshake who comes in. What they may do is decided with each request.
struct Door {
    states: Arc<OnceLock<watch::Receiver<Arc<State>>>>,
    refusals: Arc<Refusals>,
}

impl Door {
    fn admit(&self, dialer: &Dialer<'_>) -> Result<(), String> {
        let state = self.states.get().map(|states| states.borrow().clone());
        let now = now();
        match (dialer.plane, dialer.peer) {
            // A voter that comes first brings the state that would name it.
            (Plane::Peer, Peer::Node { node, .. }) => match state {
                Some(state) if state.cluster.is_some() && !state.nodes.contains_key(node) => not_a_member(),
                Some(_) | None => Ok(()),
            },
            (Plane::Agent, Peer::Node { node, .. }) => match state {
                Some(state) if state.nodes.contains_key(node) => Ok(()),
                Some(state) if state.cluster.is_some() => not_a_member(),
                Some(_) | None => Err("this control node is starting; try again".to_owned()),
            },
            (Plane::Client, peer) => {
                let Some(state) = state.filter(|state| state.cluster.is_some()) else {
                    return Err("this control node is starting; try again".to_owned());
                };
                self.admit_user(&state, peer, dialer, now)
            }
            // The endpoint has refused these already.
            (Plane::Peer | Plane::Agent, Peer::User { .. } | Peer::Anonymous) => not_a_member(),
        }
    }

    fn admit_user(&self, state: &State, peer: &Peer, dialer: &Dialer<'_>, now: Timestamp) -> Result<(), String> {
        let found = match (peer, dialer.token) {
            // The certificate is proof enough, and cannot be tried out.
            (Peer::User { token }, _) => auth::identify(state, token, dialer.address, now),
            (Peer::Anonymous, Some((token, secret))) => {
                let found = auth::identify_by_secret(state, token, secret, dialer.address, now);
                if found.is_err() && self.refusals.is_shut_out(dialer.address.ip(), now) {
                    return Err(http::SHUT_OUT.to_owned());
                }
                found
            }
            (Peer::Anonymous, None) | (Peer::Node { .. }, _) => Err(auth::Unauthenticated),
        };
        found.map(|_| ()).map_err(|nobody| {
            self.refusals.unauthenticated(dialer.address, now);
            nobody.to_string()
        })
    }
}

fn not_a_member() -> Result<(), String> {
    Err("this node is not a member of the cluster any more; join it again".to_owned())
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

/// Serves every connection, each in its own task.
async fn accept(core: Arc<Core>, plane: AgentPlane, mut listener: Listener) {
    let (mut clients, mut nodes) = (JoinSet::new(), JoinSet::new());
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
                match connection.plane() {
                    Plane::Peer => nodes.spawn(peer::serve(core.raft.clone(), connection)),
                    Plane::Agent => nodes.spawn(plane.clone().serve(connection)),
                    Plane::Client => clients.spawn(api::serve(core.clone(), connection)),
                };
            }
            Some(ended) = clients.join_next() => served(&ended),
            Some(ended) = nodes.join_next() => served(&ended),
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
            debug!(%error, "a refusal could not be announced");
        }
    }
    // Its sender lives as long as the node.
    std::future::pending().await
}

/// Renews the node's certificate when two thirds of its life are over.
async fn keep_certified(
    core: Arc<Core>,
    identity: watch::Sender<Identity>,
    layout: Layout,
    endpoint: Endpoint,
) -> Infallible {
    loop {
        let renew_at = identity.borrow().renew_at();
        let now = now();
        if now < renew_at {
            tokio::time::sleep(renew_at.since(now).min(RENEWAL_CHECK)).await;
            continue;
        }
        let current = identity.borrow().clone();
        let renewal = open_authority(&core.raft.state(), &core.vault)
            .and_then(|authority| renewed(&authority, &current, &layout, &endpoint));
        match renewal {
            Ok(new) => {
                info!(not_after = ?new.not_after(), "the node's certificate was renewed");
                identity.send_replace(new);
            }
            Err(error) => {
                warn!(%error, "the node's certificate could not be renewed; it is tried again");
                tokio::time::sleep(RENEWAL_PAUSE).await;
            }
        }
    }
}

fn open_authority(state: &State, vault: &Vault) -> Result<Authority, StartError> {
    let cluster = state.cluster.as_ref().ok_or(StartError::AuthorityForm)?;
    let key = state.data_keys.get(&cluster.ca_key.key).ok_or(StartError::AuthorityForm)?;
    let opened = vault.open_value(&key.key, &VaultEntry::authority(cluster.ca_key.version), &cluster.ca_key)?;
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

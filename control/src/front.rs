//! The ports of a control node. They are open from the start of the process to its end, whether or not a control plane
//! is up behind them: while none is, whoever asks is told so and why, and not left to wait for an answer.

use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, RwLock};

use orca_cluster::state::State;
use orca_cluster::time::Timestamp;
use orca_wire::endpoint::{Caller as Dialer, Rejection};
use orca_wire::identity::{Identity, Peer};
use orca_wire::{Endpoint, Listener, Plane};
use tokio::net::TcpListener;
use tokio::sync::{Mutex, OwnedMutexGuard, watch};

use crate::StartError;
use crate::auth::{self, Refusals};
use crate::clock::now;
use crate::config::{Config, Layout};

/// Cheap to clone; the ports are free when the last clone is gone.
#[derive(Debug, Clone)]
pub struct Front {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    endpoint: Endpoint,
    /// Held by the control plane that answers.
    listener: Arc<Mutex<Listener>>,
    http: TcpListener,
    door: Arc<Door>,
    identity: watch::Sender<Identity>,
    quic_address: SocketAddr,
    http_address: SocketAddr,
}

impl Front {
    /// Opens the ports of a node that has an identity. Nobody is let in before there is a control plane.
    pub async fn open(config: &Config) -> Result<Front, StartError> {
        let http = bind_http(config).await?;
        Front::with(config, http)
    }

    pub(crate) fn with(config: &Config, http: TcpListener) -> Result<Front, StartError> {
        let layout = Layout::new(&config.data_dir);
        // Even one that has expired says who we are; it is renewed when the control plane is opened.
        let identity = Identity::load(&layout.node(), None, Timestamp(0))
            .map_err(|source| StartError::Identity { path: layout.node(), source })?;
        if !matches!(identity.peer(), Peer::Node { raft: Some(_), .. }) {
            return Err(StartError::NoVoter { path: layout.node(), peer: identity.peer().clone() });
        }
        let door = Arc::new(Door(RwLock::new(Behind::Nothing { why: STARTING.to_owned() })));
        let admits = door.clone();
        let admit = move |dialer: &Dialer<'_>| admits.admit(dialer);
        let quic = Endpoint::server(config.listen_quic, identity.clone(), admit);
        let in_quic = |source| StartError::Quic { address: config.listen_quic, source };
        let (endpoint, listener) = quic.map_err(in_quic)?;
        let quic_address = endpoint.local_address().map_err(in_quic)?;
        let http_address =
            http.local_addr().map_err(|source| StartError::Http { address: config.listen_http, source })?;
        let listener = Arc::new(Mutex::new(listener));
        let identity = watch::Sender::new(identity);
        let shared = Shared { endpoint, listener, http, door, identity, quic_address, http_address };
        Ok(Front { shared: Arc::new(shared) })
    }

    /// No control plane is up, for this reason.
    pub fn say(&self, why: String) {
        self.shared.door.put(Behind::Nothing { why });
    }

    /// Why no control plane is up, if none is.
    pub(crate) fn said(&self) -> Option<String> {
        match &*self.shared.door.0.read().unwrap_or_else(PoisonError::into_inner) {
            Behind::Nothing { why } => Some(why.clone()),
            Behind::Control { .. } => None,
        }
    }

    /// From now on those are let in whom the state knows.
    pub(crate) fn let_in(&self, states: watch::Receiver<Arc<State>>, refusals: Arc<Refusals>) {
        self.shared.door.put(Behind::Control { states, refusals });
    }

    /// Waits for the control plane that had it before.
    pub(crate) async fn listener(&self) -> OwnedMutexGuard<Listener> {
        self.shared.listener.clone().lock_owned().await
    }

    pub(crate) fn endpoint(&self) -> &Endpoint {
        &self.shared.endpoint
    }

    pub(crate) fn http(&self) -> &TcpListener {
        &self.shared.http
    }

    pub(crate) fn renewed(&self, identity: Identity) {
        self.shared.identity.send_replace(identity);
    }

    /// The node's identity, for its agent; a new one whenever it was renewed.
    pub fn identity(&self) -> watch::Receiver<Identity> {
        self.shared.identity.subscribe()
    }

    pub fn quic_address(&self) -> SocketAddr {
        self.shared.quic_address
    }

    pub fn http_address(&self) -> SocketAddr {
        self.shared.http_address
    }

    /// Tells all who are connected that nobody answers here any more.
    pub async fn close(&self) {
        self.shared.endpoint.close("the control node stops").await;
    }
}

/// Refuses what must not be before anything is made.
pub(crate) async fn bind_http(config: &Config) -> Result<TcpListener, StartError> {
    if !config.listen_http.ip().is_loopback() {
        return Err(StartError::PlainHttp { address: config.listen_http });
    }
    let bound = TcpListener::bind(config.listen_http).await;
    bound.map_err(|source| StartError::Http { address: config.listen_http, source })
}

const STARTING: &str = "this control node is starting; try again";

/// Decides at the handshake who comes in. What they may do is decided with each request.
#[derive(Debug)]
struct Door(RwLock<Behind>);

#[derive(Debug)]
enum Behind {
    Nothing { why: String },
    Control { states: watch::Receiver<Arc<State>>, refusals: Arc<Refusals> },
}

impl Door {
    fn put(&self, behind: Behind) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = behind;
    }

    fn admit(&self, dialer: &Dialer<'_>) -> Result<(), Rejection> {
        let (state, refusals) = match &*self.0.read().unwrap_or_else(PoisonError::into_inner) {
            Behind::Nothing { why } => return Err(Rejection::Unavailable(told(dialer, why))),
            Behind::Control { states, refusals } => (states.borrow().clone(), refusals.clone()),
        };
        let starting = || Err(Rejection::Unavailable(STARTING.to_owned()));
        let known = state.cluster.is_some();
        match (dialer.plane, dialer.peer) {
            // A voter that comes first brings the state that would name it.
            (Plane::Peer, Peer::Node { node, .. }) if known && !state.nodes.contains_key(node) => not_a_member(),
            (Plane::Peer, Peer::Node { .. }) => Ok(()),
            (Plane::Agent, Peer::Node { node, .. }) if state.nodes.contains_key(node) => Ok(()),
            (Plane::Agent, Peer::Node { .. }) if known => not_a_member(),
            (Plane::Agent, Peer::Node { .. }) => starting(),
            (Plane::Client, peer) if known => admit_user(&state, &refusals, peer, dialer, now()),
            (Plane::Client, _) => starting(),
            // The endpoint has refused these already.
            (Plane::Peer | Plane::Agent, Peer::User { .. } | Peer::Anonymous) => not_a_member(),
        }
    }
}

/// Without its state a node knows no tokens: who shows one from elsewhere may be anybody, and is told no details.
fn told(dialer: &Dialer<'_>, why: &str) -> String {
    let is_known = !matches!(dialer.peer, Peer::Anonymous) || dialer.address.ip().to_canonical().is_loopback();
    if is_known { why.to_owned() } else { "no control plane is up there; that server's log says why".to_owned() }
}

fn admit_user(
    state: &State,
    refusals: &Refusals,
    peer: &Peer,
    dialer: &Dialer<'_>,
    now: Timestamp,
) -> Result<(), Rejection> {
    let found = match (peer, dialer.token) {
        // The certificate is proof enough, and cannot be tried out.
        (Peer::User { token }, _) => auth::identify(state, token, dialer.address, now),
        (Peer::Anonymous, Some((token, secret))) => {
            let found = auth::identify_by_secret(state, token, secret, dialer.address, now);
            if found.is_err() && refusals.is_shut_out(dialer.address.ip(), now) {
                return Err(Rejection::Denied(auth::SHUT_OUT.to_owned()));
            }
            found
        }
        (Peer::Anonymous, None) | (Peer::Node { .. }, _) => Err(auth::Unauthenticated),
    };
    found.map(|_| ()).map_err(|nobody| {
        refusals.unauthenticated(dialer.address, now);
        Rejection::Denied(nobody.to_string())
    })
}

fn not_a_member() -> Result<(), Rejection> {
    Err(Rejection::Denied("this node is not a member of the cluster any more; join it again".to_owned()))
}

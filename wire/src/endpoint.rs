//! A UDP port that dials and is dialed. The handshake decides who the other side is; the [`Plane`] it asked for, the
//! hello and the owner's [`Admit`] decide whether it may stay. Nothing it sends is looked at before that.
//!
//! The dialer sets the pace: it keeps the connection alive, and the shorter idle time of the two sides counts. So a
//! peer or an agent that dials is missed within seconds, and a person's `orca logs` may ride out a weak network.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use orca_cluster::id::NodeId;
use orca_cluster::secret::TokenId;
use quinn::crypto::rustls::HandshakeData;
use quinn::{ConnectionError, IdleTimeout, TransportConfig, VarInt};
use rustls_pki_types::CertificateDer;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::{debug, error, warn};

use crate::Plane;
use crate::cause;
use crate::connection::{Connection, code, reason};
use crate::identity::{Identity, Peer, Token, TokenSecret, named};
use crate::stream::{Account, CONNECTION_WINDOW, STREAM_WINDOW, Stream, StreamError};
use crate::version::{Agreed, Answer, Hello, Incompatible, Opening, Shown};

pub use gate::network;
use gate::{Entry, Gate};
use runtime::Watched;

mod gate;
mod runtime;
mod tls;

/// For handshake and hello together. Also the time in which a dead address is found dead.
pub const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(3);

/// A peer or agent that is silent this long is gone; with [`BRISK_KEEP_ALIVE`] four packets must be lost in a row.
const BRISK_IDLE: Duration = Duration::from_secs(5);
const BRISK_KEEP_ALIVE: Duration = Duration::from_secs(1);

/// For people, on networks that may pause. NAT boxes forget a flow after 20 to 30 s.
const CALM_IDLE: Duration = Duration::from_secs(30);
const CALM_KEEP_ALIVE: Duration = Duration::from_secs(10);

/// Requests one side of a connection may have open: a busy agent ships logs of some hundred replicas.
const STREAMS_MAX: u32 = 1_024;

/// Every path carries this much (RFC 9000, section 14); larger packets are found out by probing.
const MTU: u16 = 1_200;

/// Asked of the kernel for each direction, because the usual 208 KiB overflow in one burst. The kernel may give less.
const SOCKET_BUFFER: usize = 2 * 1024 * 1024;

/// Bytes kept for all handshakes that are not yet looked at.
const UNKNOWN_BYTES_MAX: u64 = 2 * 1024 * 1024;

/// Connections that are admitted and not yet taken by the owner; it only spawns a task for each.
const ACCEPTED_MAX: usize = 64;

/// How whoever dials proves who it is, and whom it trusts.
#[derive(Debug, Clone)]
pub enum Access {
    Certificate(Identity),
    /// On the client plane only. The server is known by the fingerprint in the token, and sees the secret only if it
    /// is the right one.
    Token(Token),
}

/// Which node shall answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// Any node of the cluster.
    Anyone,
    /// Any node that is certified as a voter: only those may be told a token, and only those may say what runs.
    Control,
    Node(NodeId),
    /// The voter with this Raft id.
    Raft(u64),
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Wanted::Anyone => f.write_str("a node"),
            Wanted::Control => f.write_str("a control node"),
            Wanted::Node(node) => write!(f, "node {node}"),
            Wanted::Raft(raft) => write!(f, "the voter with raft id {raft}"),
        }
    }
}

/// The server is not who it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Stranger {
    #[error("it belongs to another cluster, or something in between answers in its place")]
    OtherAuthority,
    #[error("it is {found}, not {wanted}")]
    Other { found: Peer, wanted: Wanted },
    #[error("its certificate names nobody")]
    Nobody,
    #[error("its certificate is not good: {0}")]
    Certificate(String),
}

#[derive(Debug, thiserror::Error)]
pub enum DialError {
    #[error("{address} does not answer")]
    Silent { address: SocketAddr },
    #[error("cannot connect to {address}")]
    Unreachable {
        address: SocketAddr,
        #[source]
        source: StreamError,
    },
    #[error("{address} is not to be trusted: {stranger}")]
    Stranger { address: SocketAddr, stranger: Stranger },
    #[error("{address} refused: {reason}")]
    Refused { address: SocketAddr, reason: String },
    #[error("{address} has too many connections")]
    Busy { address: SocketAddr },
    /// It is the right one, and cannot serve anybody now.
    #[error("{address} cannot serve now: {reason}")]
    Unavailable { address: SocketAddr, reason: String },
    #[error("{address} is of another release")]
    Incompatible {
        address: SocketAddr,
        #[source]
        source: Incompatible,
    },
    #[error("a token opens only the client plane, not the {0} plane")]
    Token(Plane),
    #[error("cannot dial {address}")]
    Local {
        address: SocketAddr,
        #[source]
        source: LocalError,
    },
}

/// Something is wrong on this side.
#[derive(Debug, thiserror::Error)]
pub enum LocalError {
    #[error("the address cannot be bound")]
    Bind(#[source] io::Error),
    #[error("the certificate or its key cannot be used")]
    Tls(#[from] rustls::Error),
    #[error("the address cannot be dialed from here")]
    Dial(#[from] quinn::ConnectError),
    #[error("the QUIC endpoint has failed; the program must be started anew")]
    Ended,
}

/// Who asks to be let in, as far as the handshake and the hello tell.
#[derive(Debug)]
pub struct Caller<'a> {
    pub plane: Plane,
    pub peer: &'a Peer,
    /// Shown instead of a certificate, on the client plane; always there when `peer` is anonymous.
    pub token: Option<(&'a TokenId, &'a TokenSecret)>,
    pub address: SocketAddr,
}

/// Why the owner of an endpoint does not let a caller in. The words go to the caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rejection {
    /// This caller may not come in.
    Denied(String),
    /// Nobody can be served now; the same caller may be later.
    Unavailable(String),
}

/// The owner's say: is this node still a member, is this the secret of a token that is good? Must not wait: it looks at
/// what the process knows.
pub trait Admit: Fn(&Caller<'_>) -> Result<(), Rejection> + Send + Sync + 'static {}
impl<F: Fn(&Caller<'_>) -> Result<(), Rejection> + Send + Sync + 'static> Admit for F {}

/// Cheap to clone.
#[derive(Debug, Clone)]
pub struct Endpoint {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    quinn: quinn::Endpoint,
    access: RwLock<Access>,
    brisk: Arc<TransportConfig>,
    calm: Arc<TransportConfig>,
    serves: bool,
    /// True once the task that drives `quinn` has ended: then `quinn` must not be touched, it may panic.
    ended: watch::Receiver<bool>,
}

impl Endpoint {
    /// Dials only.
    pub fn client(access: Access) -> Result<Endpoint, LocalError> {
        let any = |ip: IpAddr| SocketAddr::new(ip, 0);
        // A host may have no IPv6 at all.
        let socket = bind(any(Ipv6Addr::UNSPECIFIED.into())).or_else(|_| bind(any(Ipv4Addr::UNSPECIFIED.into())))?;
        Endpoint::new(socket, None, access)
    }

    /// Dials and is dialed. Must be called within a tokio runtime, whose tasks then do the work.
    pub fn server(
        address: SocketAddr,
        identity: Identity,
        admit: impl Admit,
    ) -> Result<(Endpoint, Listener), LocalError> {
        let config = server_config(&identity)?;
        let endpoint = Endpoint::new(bind(address)?, Some(config), Access::Certificate(identity))?;
        let (accepted, listener) = mpsc::channel(ACCEPTED_MAX);
        tokio::spawn(listen(endpoint.shared.clone(), accepted, Arc::new(admit)));
        Ok((endpoint, Listener { accepted: listener }))
    }

    fn new(socket: Socket, server: Option<quinn::ServerConfig>, access: Access) -> Result<Endpoint, LocalError> {
        let serves = server.is_some();
        let (runtime, ended) = Watched::new();
        let quinn = quinn::Endpoint::new(quinn::EndpointConfig::default(), server, socket.into(), runtime)
            .map_err(LocalError::Bind)?;
        let brisk = Arc::new(transport(BRISK_IDLE, Some(BRISK_KEEP_ALIVE)));
        let calm = Arc::new(transport(CALM_IDLE, Some(CALM_KEEP_ALIVE)));
        let access = RwLock::new(access);
        Ok(Endpoint { shared: Arc::new(Shared { quinn, access, brisk, calm, serves, ended }) })
    }

    pub fn local_address(&self) -> Result<SocketAddr, LocalError> {
        self.shared.quinn.local_addr().map_err(LocalError::Bind)
    }

    /// From now on, in both directions, this is who we are. Open connections stay as they are.
    pub fn renew(&self, identity: Identity) -> Result<(), LocalError> {
        if self.shared.serves {
            self.shared.quinn.set_server_config(Some(server_config(&identity)?));
        }
        *self.shared.access.write().unwrap_or_else(PoisonError::into_inner) = Access::Certificate(identity);
        Ok(())
    }

    /// Ends all connections, and waits until the other sides have been told.
    pub async fn close(&self, reason: &str) {
        self.shared.quinn.close(code::DONE, reason.as_bytes());
        // Those who do not answer are not waited for longer than a dead address.
        let _ = timeout(HANDSHAKE_DEADLINE, self.shared.quinn.wait_idle()).await;
    }

    pub async fn dial(&self, address: SocketAddr, plane: Plane, wanted: Wanted) -> Result<Connection, DialError> {
        if *self.shared.ended.borrow() {
            return Err(DialError::Local { address, source: LocalError::Ended });
        }
        let access = self.shared.access.read().unwrap_or_else(PoisonError::into_inner).clone();
        if plane != Plane::Client && matches!(access, Access::Token(_)) {
            return Err(DialError::Token(plane));
        }
        let address = self.reachable_form(address);
        let stranger = Arc::new(OnceLock::new());
        let opening = self.open(address, plane, wanted, &access, stranger.clone());
        match timeout(HANDSHAKE_DEADLINE, opening).await {
            Ok(opened) => opened.map_err(|error| match (error, stranger.get()) {
                (DialError::Unreachable { .. }, Some(stranger)) => {
                    DialError::Stranger { address, stranger: stranger.clone() }
                }
                (error, _) => error,
            }),
            Err(_) => Err(DialError::Silent { address }),
        }
    }

    /// A socket for IPv6 reaches IPv4 addresses in their mapped form only.
    fn reachable_form(&self, address: SocketAddr) -> SocketAddr {
        match (self.shared.quinn.local_addr(), address) {
            (Ok(SocketAddr::V6(_)), SocketAddr::V4(v4)) => SocketAddr::new(v4.ip().to_ipv6_mapped().into(), v4.port()),
            _ => address,
        }
    }

    async fn open(
        &self,
        address: SocketAddr,
        plane: Plane,
        wanted: Wanted,
        access: &Access,
        stranger: Arc<OnceLock<Stranger>>,
    ) -> Result<Connection, DialError> {
        let local = |source: LocalError| DialError::Local { address, source };
        let tls = tls::client(access, plane, wanted, stranger).map_err(|error| local(error.into()))?;
        let mut config = quinn::ClientConfig::new(Arc::new(tls));
        config.transport_config(match plane {
            Plane::Peer | Plane::Agent => self.shared.brisk.clone(),
            Plane::Client => self.shared.calm.clone(),
        });
        // The name is not looked at by either side, but must have the form of one.
        let connecting = self.shared.quinn.connect_with(config, address, "orca");
        let quinn = connecting.map_err(|error| local(error.into()))?.await.map_err(|e| refused(address, e))?;

        // Checked in the handshake; here it is only read again.
        let peer = certificate_of(&quinn).and_then(|der| named(&der)).map_or(Peer::Anonymous, |named| named.peer);
        let token = match access {
            Access::Certificate(_) => None,
            Access::Token(token) => Some(Shown { id: token.id.to_string(), secret: token.secret.reveal().to_string() }),
        };
        let own = Hello::own();
        let answer = async {
            let (send, receive) = quinn.open_bi().await?;
            let mut control = Stream::new(send, receive, Account::of(&quinn));
            control.send(&Opening { hello: own.clone(), token }).await?;
            control.finish().await?;
            control.next::<Answer>().await?.ok_or(StreamError::Ended)
        };
        let answer = answer.await.map_err(|error| match (error, quinn.close_reason()) {
            // The connection was ended under the stream: that is the cause.
            (_, Some(cause)) => refused(address, cause),
            (source, None) => DialError::Unreachable { address, source },
        })?;
        let agreed = own.agree(&answer.hello).map_err(|source| DialError::Incompatible { address, source })?;
        if let Some(reason) = answer.refused {
            return Err(DialError::Refused { address, reason });
        }
        Ok(Connection::new(quinn, plane, peer, None, agreed))
    }
}

fn refused(address: SocketAddr, error: ConnectionError) -> DialError {
    match reason(&error) {
        Some((code::BUSY, _)) => DialError::Busy { address },
        Some((code::UNAVAILABLE, reason)) => DialError::Unavailable { address, reason },
        Some((code::REFUSED | code::HELLO, reason)) => DialError::Refused { address, reason },
        _ if matches!(error, ConnectionError::TimedOut) => DialError::Silent { address },
        _ => DialError::Unreachable { address, source: error.into() },
    }
}

/// Connections as they come, each with a known and admitted other side. Dropping it refuses new ones.
#[derive(Debug)]
pub struct Listener {
    accepted: mpsc::Receiver<Connection>,
}

impl Listener {
    /// `None` when the endpoint is closed or has failed. If nobody closed it, the owner ends the process: what runs on
    /// the node goes on without it, and a new one starts with a sound endpoint.
    pub async fn accept(&mut self) -> Option<Connection> {
        self.accepted.recv().await
    }

    /// Sends those away who were admitted and have not been accepted.
    pub fn turn_away(&mut self, reason: &str) {
        while let Ok(connection) = self.accepted.try_recv() {
            connection.close_with(code::UNAVAILABLE, reason);
        }
    }
}

async fn listen<A: Admit>(shared: Arc<Shared>, accepted: mpsc::Sender<Connection>, admit: Arc<A>) {
    let mut gate = Gate::new(Instant::now());
    let mut handshakes = JoinSet::new();
    let mut ended = shared.ended.clone();
    loop {
        let incoming = tokio::select! {
            incoming = shared.quinn.accept() => match incoming {
                Some(incoming) => incoming,
                None => return,
            },
            Some(ended) = handshakes.join_next() => {
                if let Err(failed) = ended && failed.is_panic() {
                    error!(%failed, "a handshake panicked");
                }
                continue;
            }
            _ = ended.wait_for(|ended| *ended) => return,
            () = accepted.closed() => {
                shared.quinn.set_server_config(None);
                return;
            }
        };
        let source = incoming.remote_address();
        let proven = incoming.remote_address_validated();
        match gate.entry(source.ip(), proven, handshakes.len(), Instant::now()) {
            Entry::Open => {
                let (shared, accepted, admit) = (shared.clone(), accepted.clone(), admit.clone());
                handshakes.spawn(async move {
                    match timeout(HANDSHAKE_DEADLINE, welcome(&shared, incoming, &*admit)).await {
                        Ok(Ok(connection)) => {
                            if let Err(mpsc::error::TrySendError::Full(connection)) = accepted.try_send(connection) {
                                warn!(%source, "too many connections wait to be served");
                                connection.close_with(code::BUSY, "too many connections; try again");
                            }
                        }
                        Ok(Err(fault)) => debug!(%source, fault = cause::chain(&fault), "not admitted"),
                        Err(_) => debug!(%source, "handshake took too long"),
                    }
                });
            }
            Entry::Prove => match incoming.retry() {
                Ok(()) => {}
                Err(unproven) => unproven.into_incoming().ignore(),
            },
            Entry::Silence => incoming.ignore(),
        }
    }
}

/// Why somebody was not let in; for the log.
#[derive(Debug, thiserror::Error)]
enum NotAdmitted {
    #[error("the handshake failed")]
    Handshake(#[source] ConnectionError),
    #[error("the hello failed")]
    Hello(#[source] StreamError),
    #[error("{0}")]
    Refused(String),
}

async fn welcome(shared: &Shared, incoming: quinn::Incoming, admit: &impl Admit) -> Result<Connection, NotAdmitted> {
    let quinn = incoming.accept().map_err(NotAdmitted::Handshake)?.await.map_err(NotAdmitted::Handshake)?;
    let refuse = |code: VarInt, reason: String| {
        quinn.close(code, reason.as_bytes());
        Err(NotAdmitted::Refused(reason))
    };
    let Some(plane) = plane_of(&quinn) else {
        return refuse(code::REFUSED, "no plane of this name".to_owned());
    };
    let peer = match certificate_of(&quinn) {
        None => Peer::Anonymous,
        Some(certificate) => {
            let access = shared.access.read().unwrap_or_else(PoisonError::into_inner);
            match (named(&certificate), &*access) {
                (Some(named), Access::Certificate(own)) if named.cluster == own.cluster() => named.peer,
                _ => return refuse(code::REFUSED, "the certificate names nobody of this cluster".to_owned()),
            }
        }
    };
    if !plane.admits(&peer) {
        return refuse(code::REFUSED, format!("{peer} may not open the {plane} plane"));
    }

    let (send, receive) = quinn.accept_bi().await.map_err(NotAdmitted::Handshake)?;
    let mut control = Stream::new(send, receive, Account::of(&quinn));
    let opening: Opening = match control.next().await {
        Ok(Some(opening)) => opening,
        Ok(None) => return refuse(code::HELLO, "the connection began without a hello".to_owned()),
        Err(fault) => {
            quinn.close(code::HELLO, b"the connection began without a hello");
            return Err(NotAdmitted::Hello(fault));
        }
    };
    let hello = Hello::own();
    let (admitted, refused) = match judge(&hello, &opening, plane, &peer, quinn.remote_address(), admit) {
        Ok(admitted) => (Some(admitted), None),
        Err(Rejection::Denied(reason)) => (None, Some(reason)),
        // By the code of the close, which the dialer can tell from a denial.
        Err(Rejection::Unavailable(reason)) => return refuse(code::UNAVAILABLE, reason),
    };
    control.send(&Answer { hello, refused: refused.clone() }).await.map_err(NotAdmitted::Hello)?;
    control.finish().await.map_err(NotAdmitted::Hello)?;
    match (admitted, refused) {
        (Some((agreed, token)), _) => Ok(Connection::new(quinn, plane, peer, token, agreed)),
        (None, reason) => {
            // The answer must arrive before the connection ends; the deadline around this bounds the wait.
            control.closed().await;
            refuse(code::REFUSED, reason.unwrap_or_default())
        }
    }
}

fn judge(
    own: &Hello,
    opening: &Opening,
    plane: Plane,
    peer: &Peer,
    address: SocketAddr,
    admit: &impl Admit,
) -> Result<(Agreed, Option<TokenId>), Rejection> {
    let denied = |reason: &str| Rejection::Denied(reason.to_owned());
    let agreed = own.agree(&opening.hello).map_err(|incompatible| denied(&incompatible.to_string()))?;
    let token = match (peer, &opening.token) {
        (Peer::Node { .. } | Peer::User { .. }, _) => None,
        (Peer::Anonymous, None) => return Err(denied("a certificate or a token is needed")),
        (Peer::Anonymous, Some(shown)) => match (shown.id.parse(), TokenSecret::parse(&shown.secret)) {
            (Ok(id), Some(secret)) => Some((id, secret)),
            _ => return Err(denied("the token is damaged")),
        },
    };
    let caller = Caller { plane, peer, token: token.as_ref().map(|(id, secret)| (id, secret)), address };
    admit(&caller)?;
    Ok((agreed, token.map(|(id, _)| id)))
}

fn plane_of(quinn: &quinn::Connection) -> Option<Plane> {
    let data = quinn.handshake_data()?.downcast::<HandshakeData>().ok()?;
    Plane::from_alpn(&data.protocol?)
}

fn certificate_of(quinn: &quinn::Connection) -> Option<CertificateDer<'static>> {
    let chain = quinn.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    chain.into_iter().next()
}

fn server_config(identity: &Identity) -> Result<quinn::ServerConfig, LocalError> {
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(tls::server(identity)?));
    // The dialer's shorter idle time counts, see above.
    config.transport_config(Arc::new(transport(CALM_IDLE, None)));
    config.max_incoming(gate::HANDSHAKES_MAX);
    config.incoming_buffer_size_total(UNKNOWN_BYTES_MAX);
    Ok(config)
}

fn transport(idle: Duration, keep_alive: Option<Duration>) -> TransportConfig {
    let mut config = TransportConfig::default();
    let idle = IdleTimeout::try_from(idle).expect("an idle time of seconds can be written");
    config.max_idle_timeout(Some(idle));
    config.keep_alive_interval(keep_alive);
    config.max_concurrent_bidi_streams(VarInt::from_u32(STREAMS_MAX));
    config.max_concurrent_uni_streams(VarInt::from_u32(0));
    config.stream_receive_window(VarInt::from_u32(STREAM_WINDOW));
    config.receive_window(VarInt::from_u32(CONNECTION_WINDOW));
    config.send_window(u64::from(CONNECTION_WINDOW));
    config.datagram_receive_buffer_size(None);
    config.initial_mtu(MTU);
    config.min_mtu(MTU);
    config
}

fn bind(address: SocketAddr) -> Result<Socket, LocalError> {
    let open = || {
        let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
        if address.is_ipv6() {
            socket.set_only_v6(false)?;
        }
        for set in [Socket::set_recv_buffer_size, Socket::set_send_buffer_size] {
            if let Err(error) = set(&socket, SOCKET_BUFFER) {
                debug!(%error, "the kernel keeps its small UDP buffers");
            }
        }
        socket.bind(&address.into())?;
        Ok(socket)
    };
    open().map_err(LocalError::Bind)
}

#[cfg(test)]
mod tests {
    use orca_cluster::id::ClusterId;
    use orca_cluster::time::Timestamp;

    use super::*;
    use crate::identity::{Authority, KeyRequest};

    const ANY_PORT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

    fn node(authority: &Authority, number: u64, now: Timestamp) -> Identity {
        let request = KeyRequest::generate();
        let issued = authority.issue_node(&request.request(), NodeId(number), None, now).unwrap();
        request.into_identity(&issued).unwrap()
    }

    fn now() -> Timestamp {
        let since_1970 = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap();
        Timestamp(u64::try_from(since_1970.as_millis()).unwrap())
    }

    #[tokio::test]
    async fn messages_that_only_begin_fill_no_memory() {
        // Five beginnings of 13 MiB are more than one connection may have us hold; four are not.
        const BEGINNING: usize = 13 * 1024 * 1024;
        let authority = Authority::create(ClusterId(7), now());
        let (server, mut listener) =
            Endpoint::server(ANY_PORT, node(&authority, 1, now()), |_: &Caller<'_>| Ok(())).unwrap();
        let client = Endpoint::client(Access::Certificate(node(&authority, 2, now()))).unwrap();
        let dialed = client.dial(server.local_address().unwrap(), Plane::Agent, Wanted::Anyone).await.unwrap();
        let accepted = listener.accept().await.unwrap();

        let (mut sending, mut reading) = (JoinSet::new(), JoinSet::new());
        for _ in 0..5 {
            let (mut send, receive) = dialed.quinn().open_bi().await.unwrap();
            sending.spawn(async move {
                let mut head = u32::try_from(BEGINNING + 2).unwrap().to_be_bytes().to_vec();
                head.push(0);
                // What is stopped while it is being written, fails; both cases show in `stopped`.
                let _ = send.write_all(&head).await;
                let _ = send.write_all(&vec![b' '; BEGINNING]).await;
                let why = send.stopped().await;
                drop(receive);
                why
            });
            let mut stream = accepted.accept().await.unwrap();
            reading.spawn(async move { stream.next::<u64>().await });
        }
        let read = timeout(10 * BRISK_IDLE, reading.join_next()).await.unwrap().unwrap().unwrap();
        assert!(matches!(read, Err(StreamError::Crowded)), "{read:?}");
        let told = timeout(BRISK_IDLE, sending.join_next()).await.unwrap().unwrap().unwrap();
        assert_eq!(told, Ok(Some(VarInt::from_u32(4))));

        let mut sound = dialed.open(&1u64).await.unwrap();
        sound.finish().await.unwrap();
        let mut stream = accepted.accept().await.unwrap();
        assert_eq!(stream.next::<u64>().await.unwrap(), Some(1), "there is room for others again");
        assert!(reading.try_join_next().is_none() && sending.try_join_next().is_none());
    }

    #[tokio::test]
    async fn without_a_hello_in_time_there_is_no_connection() {
        let now = now();
        let authority = Authority::create(ClusterId(7), now);
        let (server, mut listener) =
            Endpoint::server(ANY_PORT, node(&authority, 1, now), |_: &Caller<'_>| Ok(())).unwrap();
        let address = server.local_address().unwrap();

        let access = Access::Certificate(node(&authority, 2, now));
        let client = Endpoint::client(access.clone()).unwrap();
        let handshake = async || {
            let tls = tls::client(&access, Plane::Agent, Wanted::Anyone, Arc::default()).unwrap();
            let config = quinn::ClientConfig::new(Arc::new(tls));
            let address = client.reachable_form(address);
            client.shared.quinn.connect_with(config, address, "orca").unwrap().await.unwrap()
        };
        let silent = handshake().await;
        let nonsense = handshake().await;
        let (mut send, _receive) = nonsense.open_bi().await.unwrap();
        send.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();

        let refused = reason(&nonsense.closed().await).unwrap();
        assert_eq!(refused.0, code::HELLO);
        let dropped = timeout(2 * HANDSHAKE_DEADLINE, silent.closed()).await.unwrap();
        assert!(matches!(dropped, ConnectionError::ApplicationClosed(_)), "{dropped:?}");
        assert!(listener.accepted.try_recv().is_err());

        let sound = client.dial(address, Plane::Agent, Wanted::Anyone).await.unwrap();
        assert_eq!(listener.accept().await.unwrap().peer(), &Peer::Node { node: NodeId(2), raft: None });
        drop(sound);
        server.close("the test is over").await;
        assert!(listener.accept().await.is_none());
    }
}

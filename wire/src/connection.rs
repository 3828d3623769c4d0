//! One connection with one known peer: requests go both ways over it, each on a stream of its own.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use orca_cluster::secret::TokenId;
use quinn::{ConnectionError, VarInt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::{debug, error};

use crate::Plane;
use crate::cause::chain;
use crate::identity::Peer;
use crate::stream::{Account, Stream, StreamError};
use crate::version::Agreed;

/// Why a connection was closed, beside the reason in words.
pub(crate) mod code {
    use quinn::VarInt;
    /// Its owner has no more use for it.
    pub const DONE: VarInt = VarInt::from_u32(0);
    /// The certificate, the token or the plane is not right.
    pub const REFUSED: VarInt = VarInt::from_u32(1);
    /// The hello was not a hello, or of releases too far apart.
    pub const HELLO: VarInt = VarInt::from_u32(2);
    /// Too many connections.
    pub const BUSY: VarInt = VarInt::from_u32(3);
    /// Nothing is heard over it any more.
    pub const DEAF: VarInt = VarInt::from_u32(4);
    /// Nobody can be served now.
    pub const UNAVAILABLE: VarInt = VarInt::from_u32(5);
}

/// How long a stream may take to be opened, and then to bring its request.
const REQUEST_DEADLINE: Duration = Duration::from_secs(10);

/// How often in a row a deadline passes without one packet from the other side before the connection is given up.
/// QUIC would probe it for longer and longer intervals, so that after an outage a new one is up sooner.
const DEAF_MAX: u32 = 2;

/// Cheap to clone; the connection is closed when the last clone and the last stream are dropped.
#[derive(Debug, Clone)]
pub struct Connection {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    quinn: quinn::Connection,
    plane: Plane,
    peer: Peer,
    token: Option<TokenId>,
    agreed: Agreed,
    account: Arc<Account>,
    deaf: AtomicU32,
}

impl Connection {
    pub(crate) fn new(
        quinn: quinn::Connection,
        plane: Plane,
        peer: Peer,
        token: Option<TokenId>,
        agreed: Agreed,
    ) -> Connection {
        let (account, deaf) = (Account::of(&quinn), AtomicU32::new(0));
        Connection { shared: Arc::new(Shared { quinn, plane, peer, token, agreed, account, deaf }) }
    }

    /// Whom it is with: from the certificate, so true.
    pub fn peer(&self) -> &Peer {
        &self.shared.peer
    }

    pub fn plane(&self) -> Plane {
        self.shared.plane
    }

    /// The token the other side showed instead of a certificate; admitted by whoever owns the endpoint.
    pub fn token(&self) -> Option<&TokenId> {
        self.shared.token.as_ref()
    }

    /// What both sides speak.
    pub fn agreed(&self) -> &Agreed {
        &self.shared.agreed
    }

    pub fn remote_address(&self) -> SocketAddr {
        self.shared.quinn.remote_address()
    }

    /// How many streams were broken off because the other side sent nonsense.
    pub fn fault_count(&self) -> u64 {
        self.shared.account.fault_count()
    }

    pub fn is_closed(&self) -> bool {
        self.shared.quinn.close_reason().is_some()
    }

    /// Waits for the end of the connection, and says why it ended.
    pub async fn closed(&self) -> StreamError {
        self.shared.quinn.closed().await.into()
    }

    /// Ends it now, with all its streams. The reason is for a person at the other side.
    pub fn close(&self, reason: &str) {
        self.shared.quinn.close(code::DONE, reason.as_bytes());
    }

    /// One request, one answer.
    pub async fn request<Request, Response>(
        &self,
        request: &Request,
        deadline: Duration,
    ) -> Result<Response, StreamError>
    where
        Request: Serialize,
        Response: DeserializeOwned,
    {
        let received = self.received();
        let answer = async {
            let mut stream = self.open(request).await?;
            stream.finish().await?;
            stream.next().await?.ok_or(StreamError::Ended)
        };
        match timeout(deadline, answer).await {
            Ok(answer) => {
                self.shared.deaf.store(0, Ordering::Relaxed);
                answer
            }
            Err(_) => {
                self.judge(received);
                Err(StreamError::Deadline(deadline))
            }
        }
    }

    /// One request, and then whatever the two agree on.
    pub async fn open<Request: Serialize>(&self, request: &Request) -> Result<Stream, StreamError> {
        // It waits while the other side has as many requests open as it allows.
        let opened = timeout(REQUEST_DEADLINE, self.shared.quinn.open_bi()).await;
        let (send, receive) = opened.map_err(|_| StreamError::Deadline(REQUEST_DEADLINE))??;
        let mut stream = Stream::new(send, receive, self.shared.account.clone());
        stream.send(request).await?;
        Ok(stream)
    }

    /// The next stream the other side opens; its first message is the request.
    pub async fn accept(&self) -> Result<Stream, StreamError> {
        let (send, receive) = self.shared.quinn.accept_bi().await?;
        Ok(Stream::new(send, receive, self.shared.account.clone()))
    }

    /// Answers every request of the other side until the connection ends, and says why it ended. Each runs in its own
    /// task: what one does to itself, even a panic, the others do not notice. When the connection ends, or this is
    /// dropped, those still running are dropped too. QUIC's limit on open streams limits their number.
    pub async fn serve<Request, Handler, Handling>(&self, handler: Handler) -> StreamError
    where
        Request: DeserializeOwned + Send + 'static,
        Handler: Fn(Request, Stream) -> Handling + Clone + Send + Sync + 'static,
        Handling: Future<Output = ()> + Send + 'static,
    {
        let mut running = JoinSet::new();
        loop {
            tokio::select! {
                stream = self.accept() => {
                    let mut stream = match stream {
                        Ok(stream) => stream,
                        Err(end) => return end,
                    };
                    let (handler, peer) = (handler.clone(), self.shared.peer.clone());
                    running.spawn(async move {
                        match stream.next_within(REQUEST_DEADLINE).await {
                            Ok(request) => handler(request, stream).await,
                            Err(fault) => debug!(%peer, fault = chain(&fault), "a request was not understood"),
                        }
                    });
                }
                Some(ended) = running.join_next() => {
                    if let Err(failed) = ended && failed.is_panic() {
                        error!(peer = %self.shared.peer, %failed, "answering a request panicked");
                    }
                }
            }
        }
    }

    /// Packets received, of any kind.
    fn received(&self) -> u64 {
        self.shared.quinn.stats().udp_rx.datagrams
    }

    /// A deadline has passed. The handler may only be slow: then at least our packets were acknowledged.
    fn judge(&self, received_before: u64) {
        if self.received() != received_before {
            self.shared.deaf.store(0, Ordering::Relaxed);
        } else if self.shared.deaf.fetch_add(1, Ordering::Relaxed) + 1 >= DEAF_MAX {
            self.close_with(code::DEAF, "nothing is heard over this connection");
        }
    }

    /// To send what no sound program would.
    #[cfg(test)]
    pub(crate) fn quinn(&self) -> &quinn::Connection {
        &self.shared.quinn
    }

    pub(crate) fn close_with(&self, code: VarInt, reason: &str) {
        self.shared.quinn.close(code, reason.as_bytes());
    }
}

/// The reason in words, if the other side gave one.
pub(crate) fn reason(error: &ConnectionError) -> Option<(VarInt, String)> {
    match error {
        ConnectionError::ApplicationClosed(close) => {
            Some((close.error_code, String::from_utf8_lossy(&close.reason).into_owned()))
        }
        _ => None,
    }
}

//! One client's connection: the HTTP library between a strict [`Framing`] below and [`forward`](super::forward)
//! above, and the clocks that keep a client from holding it for nothing. Time-outs need no timer of their own: a
//! connection notes when its bytes last moved, and the worker's tick asks each whether it is overdue.

use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::BytesMut;
use http::HeaderValue;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;

use super::count::Chooser;
use super::forward;
use super::framing::{Framing, Violation};
use super::page;
use super::splice::{self, Bypass};
use super::upstream::Rest;
use super::worker::{Permit, Worker};

/// After an answer that ends a connection, what the client still sends is read and dropped for this long and this
/// much: closing on unread bytes resets the connection, and the answer may be lost with it.
const LINGER_TIME_MAX: Duration = Duration::from_secs(1);
const LINGER_BYTES_MAX: usize = 1 << 20;

/// A client's connection as its requests see it.
#[derive(Debug)]
pub struct Client {
    pub worker: Rc<Worker>,
    pub peer: IpAddr,
    /// The client's address as `X-Forwarded-For` has it.
    pub forwarded_for: HeaderValue,
    /// It stands in front of clients, and is believed what it says of them.
    pub is_trusted: bool,
    pub pulse: Arc<Pulse>,
    pub bypass: Arc<Bypass>,
    /// What is still to be sent of the request whose response is on its way.
    pub rest: RefCell<Option<Rest>>,
    /// Requests begun and not ended; over 1 only for an instant between two.
    pub requests: Cell<u32>,
    /// Those of them that have no response yet.
    unanswered: Cell<u32>,
    /// We are ending it: what is in progress is cut by us and not given up by the client.
    pub is_ended_by_us: Cell<bool>,
    /// Held by an upgraded connection as well, for as long as it lasts.
    _permit: Permit,
}

/// When a connection last did something, for the worker's tick. All times are milliseconds of the worker's clock.
/// Written and read by one thread; atomic because the library wants what it reads from to be [`Send`].
#[derive(Debug)]
pub struct Pulse {
    clock: Arc<AtomicU64>,
    /// Bytes last went in or out.
    moved: AtomicU64,
    /// An unfinished head began; 0 is none.
    head: AtomicU64,
    /// Some of a request's body is still to come.
    uploading: AtomicBool,
    /// The client does not take what we have for it.
    blocked: AtomicBool,
    /// A request is in progress.
    busy: AtomicBool,
    /// The connection has been upgraded: its bytes are no longer HTTP.
    upgraded: AtomicBool,
    /// When a wait for a replica's response began, and how long it may take; 0 is no wait.
    waiting_since: AtomicU64,
    waiting_max: AtomicU64,
}

/// Why a connection is ended from our side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Overdue {
    /// It has a head begun for too long.
    Head,
    /// It has nothing to say.
    Idle,
    /// It takes or gives a body no further.
    Body,
}

/// Timings of [`Limits`](crate::Limits) that a pulse is judged by, in milliseconds.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    pub head: u64,
    pub idle: u64,
    pub body: u64,
}

impl Pulse {
    fn new(clock: Arc<AtomicU64>) -> Pulse {
        let now = clock.load(Ordering::Relaxed).max(1);
        Pulse {
            clock,
            moved: AtomicU64::new(now),
            // The first head is due from the start: a connection that says nothing is not worth the idle time.
            head: AtomicU64::new(now),
            uploading: AtomicBool::new(false),
            blocked: AtomicBool::new(false),
            busy: AtomicBool::new(false),
            upgraded: AtomicBool::new(false),
            waiting_since: AtomicU64::new(0),
            waiting_max: AtomicU64::new(0),
        }
    }

    fn now(&self) -> u64 {
        self.clock.load(Ordering::Relaxed).max(1)
    }

    /// A response is awaited from now on, for so long from the last movement of the request's body.
    pub fn wait(&self, time_max: Duration) {
        self.waiting_since.store(self.now(), Ordering::Relaxed);
        self.waiting_max.store(u64::try_from(time_max.as_millis()).unwrap_or(u64::MAX).max(1), Ordering::Relaxed);
    }

    pub fn wait_is_over(&self) {
        self.waiting_max.store(0, Ordering::Relaxed);
    }

    /// Whether the response that is awaited is late. While the client has not sent all, it is not.
    pub fn is_late(&self) -> bool {
        let time_max = self.waiting_max.load(Ordering::Relaxed);
        if time_max == 0 || self.is_uploading() {
            return false;
        }
        let since = self.waiting_since.load(Ordering::Relaxed).max(self.moved.load(Ordering::Relaxed));
        self.now().saturating_sub(since) >= time_max
    }

    /// Whether some of a request that was taken up is still to come.
    fn is_uploading(&self) -> bool {
        self.uploading.load(Ordering::Relaxed)
    }

    /// Whether something lies here that the client does not take.
    fn is_blocked(&self) -> bool {
        self.blocked.load(Ordering::Relaxed)
    }

    pub fn upgraded(&self) {
        self.upgraded.store(true, Ordering::Relaxed);
    }

    fn overdue(&self, patience: Patience) -> Option<Overdue> {
        let now = self.now();
        let quiet = now.saturating_sub(self.moved.load(Ordering::Relaxed));
        if self.busy.load(Ordering::Relaxed) {
            let stuck = self.is_uploading() || self.is_blocked();
            return (stuck && quiet >= patience.body).then_some(Overdue::Body);
        }
        match self.head.load(Ordering::Relaxed) {
            0 => (quiet >= patience.idle).then_some(Overdue::Idle),
            since => (now.saturating_sub(since) >= patience.head).then_some(Overdue::Head),
        }
    }

    /// Whether the connection's task has something to do about the time.
    pub fn is_due(&self, patience: Patience) -> bool {
        self.is_late() || self.overdue(patience).is_some()
    }
}

impl Client {
    pub fn begin(&self) {
        self.requests.set(self.requests.get() + 1);
        self.unanswered.set(self.unanswered.get() + 1);
        self.pulse.busy.store(true, Ordering::Relaxed);
    }

    /// There is a response for a request, or there will be none.
    pub fn answered(&self) {
        self.unanswered.set(self.unanswered.get() - 1);
    }

    pub fn end(&self) {
        self.requests.set(self.requests.get() - 1);
        self.pulse.busy.store(self.requests.get() > 0, Ordering::Relaxed);
    }

    /// Whether all responses to requests that were taken up have gone out whole.
    fn is_through(&self) -> bool {
        self.requests.get() == 0 && !self.pulse.is_blocked()
    }
}

/// The client's socket. Every byte that is read goes through [`Framing`] first.
#[derive(Debug)]
pub struct Gate {
    stream: TcpStream,
    framing: Framing,
    pulse: Arc<Pulse>,
    bypass: Arc<Bypass>,
    violation: Option<Violation>,
}

impl Gate {
    pub fn into_stream(self) -> TcpStream {
        self.stream
    }

    fn note_write<T>(&self, result: &Poll<io::Result<T>>) {
        let blocked = result.is_pending();
        self.pulse.blocked.store(blocked, Ordering::Relaxed);
        if !blocked {
            self.pulse.moved.store(self.pulse.now(), Ordering::Relaxed);
        }
    }
}

impl AsyncRead for Gate {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let gate = &mut *self;
        let before = buffer.filled().len();
        let result = Pin::new(&mut gate.stream).poll_read(context, buffer);
        let read = &buffer.filled()[before..];
        if read.is_empty() {
            return result;
        }
        let now = gate.pulse.now();
        gate.pulse.moved.store(now, Ordering::Relaxed);
        if gate.pulse.upgraded.load(Ordering::Relaxed) {
            return result;
        }
        if let Err(violation) = gate.framing.feed(read) {
            buffer.set_filled(before);
            gate.violation = Some(violation);
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, violation)));
        }
        gate.pulse.uploading.store(gate.framing.is_in_body(), Ordering::Relaxed);
        if !gate.framing.is_in_head() {
            gate.pulse.head.store(0, Ordering::Relaxed);
        } else if gate.pulse.head.load(Ordering::Relaxed) == 0 {
            gate.pulse.head.store(now, Ordering::Relaxed);
        }
        result
    }
}

impl AsyncWrite for Gate {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.note_write(&result);
        result
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let ahead = splice::ahead_of_stand_in(slices);
        let result = if ahead.len() == slices.len() {
            Pin::new(&mut self.stream).poll_write_vectored(context, slices)
        } else if ahead.is_empty() {
            self.bypass.poll_drain(&self.stream, &slices[0], context)
        } else {
            splice::poll_write_more(&self.stream, ahead, context)
        };
        self.note_write(&result);
        result
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.violation.is_some() {
            // The answer to it is still to be written.
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// How the loop over a connection ended.
enum End {
    /// The library is through with it, for better or worse.
    Finished,
    Overdue(Overdue),
    /// The grace of a shutdown is over.
    Cut,
}

/// Serves one connection to its end.
pub async fn serve(worker: Rc<Worker>, stream: TcpStream, peer: SocketAddr, permit: Permit, chooser: Chooser) {
    let pulse = Arc::new(Pulse::new(worker.clock()));
    let framing = Framing::new(worker.bounds());
    let bypass = Arc::new(worker.bypass());
    let gate = Gate { stream, framing, pulse: Arc::clone(&pulse), bypass: Arc::clone(&bypass), violation: None };
    let client = Rc::new(Client {
        forwarded_for: forward::address_value(peer.ip().to_canonical()),
        peer: peer.ip().to_canonical(),
        is_trusted: worker.trusts(peer.ip().to_canonical()),
        worker: Rc::clone(&worker),
        pulse: Arc::clone(&pulse),
        bypass,
        rest: RefCell::new(None),
        requests: Cell::new(0),
        unanswered: Cell::new(0),
        is_ended_by_us: Cell::new(false),
        _permit: permit,
    });
    let service = service_fn({
        let client = Rc::clone(&client);
        move |request| {
            let client = Rc::clone(&client);
            async move { Ok::<_, Infallible>(forward::serve(client, request).await) }
        }
    });
    let mut connection = worker.http().serve_connection(TokioIo::new(gate), service).with_upgrades();

    let mut watch = None;
    let mut chooser = Some(chooser);
    let mut is_closing = false;
    let end = poll_fn(|context| {
        if watch.is_none() {
            watch = Some(worker.watch(Arc::clone(&pulse), context.waker().clone()));
        }
        if worker.is_cut() {
            return Poll::Ready(End::Cut);
        }
        if !is_closing && worker.is_closing() && client.requests.get() > 0 {
            is_closing = true;
            Pin::new(&mut connection).graceful_shutdown();
        }
        let mut polled = Pin::new(&mut connection).poll(context);
        // Only now: a request that had just arrived has been taken up, and makes the connection no longer idle.
        if polled.is_pending() && !is_closing && worker.is_closing_idle() {
            is_closing = true;
            Pin::new(&mut connection).graceful_shutdown();
            polled = Pin::new(&mut connection).poll(context);
        }
        if let Some(rest) = &*client.rest.borrow() {
            rest.poll(context);
        }
        // No request comes any more, and those that came are given to no other replica.
        if is_closing && client.unanswered.get() == 0 {
            chooser = None;
        }
        match (polled, pulse.overdue(worker.patience())) {
            (Poll::Ready(_), _) => Poll::Ready(End::Finished),
            (Poll::Pending, Some(overdue)) => Poll::Ready(End::Overdue(overdue)),
            (Poll::Pending, None) => Poll::Pending,
        }
    })
    .await;
    drop((watch, chooser));
    client.is_ended_by_us.set(matches!(end, End::Cut | End::Overdue(_)));

    // Before the connection is taken apart, which ends what is under way.
    let is_through = client.is_through();
    let Some(parts) = connection.into_parts() else {
        // Upgraded: someone else has the socket.
        return;
    };
    let mut gate: Gate = parts.io.into_inner();
    let answer = match (end, gate.violation) {
        (End::Cut, _) | (End::Overdue(Overdue::Idle | Overdue::Body), _) => return,
        (End::Overdue(Overdue::Head), _) if gate.framing.is_in_head() => Some(page::timed_out()),
        (End::Overdue(Overdue::Head), _) => return,
        // A page would be taken for more of a response that is under way, or for the response to a request that was whole
        // before the violation came: the break has to speak for itself.
        (End::Finished, Some(_)) if !is_through => return,
        // The request whose body it is in has had its response.
        (End::Finished, Some(_)) if pulse.is_uploading() => None,
        (End::Finished, Some(violation)) => Some(page::violation(violation)),
        (End::Finished, None) if gate.framing.is_in_body() => None,
        (End::Finished, None) => return,
    };
    let _ = tokio::time::timeout(LINGER_TIME_MAX, linger(&mut gate.stream, answer)).await;
}

async fn linger(stream: &mut TcpStream, answer: Option<Vec<u8>>) -> io::Result<()> {
    if let Some(answer) = answer {
        stream.write_all(&answer).await?;
    }
    stream.shutdown().await?;
    let mut rest = BytesMut::with_capacity(16 << 10);
    let mut total = 0;
    while total < LINGER_BYTES_MAX {
        rest.clear();
        match stream.read_buf(&mut rest).await? {
            0 => break,
            read => total += read,
        }
    }
    Ok(())
}

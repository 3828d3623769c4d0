//! One core's worth of proxy: a thread with its own runtime, listeners, table, pools and counters. Nothing on the
//! way of a request is shared with another worker. Orders come in over a channel and are carried out between two
//! polls, so a worker uses either the old table or the new one and never both: when it has acknowledged a table,
//! every choice it makes is from that table.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Waker;
use std::time::{Duration, Instant};

use hyper::server::conn::http1;
use ipnet::IpNet;
use orca_cluster::id::ReplicaId;
use orca_cluster::route::Tables;
use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::spawn_local;

use super::access_log::Log;
use super::connection::{self, Patience, Pulse};
use super::count::{Book, Chooser};
use super::framing::Bounds;
use super::splice::{Bypass, Pipes};
use super::table::{Replicas, Table};
use crate::{Limits, Modules};

/// How often deadlines are looked at. They are seconds long, so a tenth is exact enough, and nobody has to pay for
/// a timer of their own.
const TICK: Duration = Duration::from_millis(100);
/// After an accept that failed, most likely for want of file descriptors: time for some to come free.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// When we close, an idle connection stays this long: a client that is about to send on it learns from the response
/// that it is the last, where closing at once could lose its request on the way.
const CLOSE_IDLE_AFTER: Duration = Duration::from_secs(1);
/// What hyper takes without an allocation for each request, and by default at most.
const LIBRARY_FIELDS: usize = 100;
/// The least hyper accepts.
const LIBRARY_BUFFER_MIN: usize = 8 << 10;
/// Bytes moved at once on an upgraded connection.
const SCRATCH_BYTES: usize = 64 << 10;
/// Between two lines in the log about connections that are refused.
const REFUSALS_SAID_MS: u64 = 60_000;

/// What a worker is told.
#[derive(Debug)]
pub enum Order {
    Apply(Arc<Tables>, oneshot::Sender<()>),
    /// Accept no more, finish what is there, and after the grace cut it. The sender is dropped when done.
    Shutdown {
        grace: Duration,
        done: oneshot::Sender<()>,
    },
}

/// What a worker is made from.
pub struct Parts {
    pub listeners: Vec<std::net::TcpListener>,
    pub limits: Limits,
    pub trusted_proxies: Vec<IpNet>,
    pub modules: Arc<dyn Modules>,
    pub book: Arc<Book>,
    /// For as long as it accepts.
    pub chooser: Chooser,
    pub sources: Arc<Sources>,
    pub log: Option<Log>,
}

pub struct Worker {
    pub limits: Limits,
    trusted_proxies: Vec<IpNet>,
    pub modules: Arc<dyn Modules>,
    pub log: Option<Log>,
    pub book: Arc<Book>,
    sources: Arc<Sources>,
    table: RefCell<Rc<Table>>,
    replicas: RefCell<Replicas>,
    /// Rings when a request that is held may have somewhere to go: a new table is used, or a replica takes
    /// connections again.
    pub reachable: Notify,
    began: Instant,
    /// Milliseconds since `began`, as of the last tick.
    clock: Arc<AtomicU64>,
    watched: RefCell<HashMap<u64, Watched>>,
    /// Connections ever watched: the next one's key.
    watched_count: Cell<u64>,
    random: Cell<u64>,
    phase: Cell<Phase>,
    closing_since: Cell<Option<u64>>,
    phase_changed: Notify,
    /// Connections and upgraded connections, so that the last one out ends a shutdown.
    open: Cell<usize>,
    closed_one: Notify,
    /// Connections refused for their number, and when that was last said.
    refused: Cell<u64>,
    refused_said: Cell<Option<u64>>,
    scratch: RefCell<Vec<u8>>,
    pipes: Arc<Pipes>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Serving,
    Closing,
    Cut,
}

struct Watched {
    pulse: Arc<Pulse>,
    waker: Waker,
}

/// Removes a connection from those the tick looks at.
pub struct Watch {
    worker: Rc<Worker>,
    key: u64,
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.worker.watched.borrow_mut().remove(&self.key);
    }
}

impl std::fmt::Debug for Worker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Worker").field("open", &self.open).field("phase", &self.phase).finish_non_exhaustive()
    }
}

impl Worker {
    pub fn trusts(&self, peer: IpAddr) -> bool {
        self.trusted_proxies.iter().any(|network| network.contains(&peer))
    }

    pub fn table(&self) -> Rc<Table> {
        Rc::clone(&self.table.borrow())
    }

    pub fn now(&self) -> u64 {
        self.clock.load(Ordering::Relaxed)
    }

    pub fn clock(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.clock)
    }

    pub fn bounds(&self) -> Bounds {
        Bounds { head_bytes_max: self.limits.head_bytes_max, fields_max: self.limits.fields_max }
    }

    /// How the library serves a connection.
    pub fn http(&self) -> http1::Builder {
        let mut http = http1::Builder::new();
        // Room for the body's first piece behind the largest head. Its time-out for heads stays off: the pulse of a
        // connection sees to that, and tells a slow head from an idle connection.
        http.max_buf_size((self.limits.head_bytes_max * 2).max(LIBRARY_BUFFER_MIN)).header_read_timeout(None);
        if self.limits.fields_max > LIBRARY_FIELDS {
            http.max_headers(self.limits.fields_max);
        }
        http
    }

    pub fn patience(&self) -> Patience {
        Patience {
            head: millis(self.limits.head_time_max),
            idle: millis(self.limits.idle_time_max),
            body: millis(self.limits.body_idle_time_max),
        }
    }

    pub fn watch(self: &Rc<Worker>, pulse: Arc<Pulse>, waker: Waker) -> Watch {
        let key = self.watched_count.get();
        self.watched_count.set(key + 1);
        self.watched.borrow_mut().insert(key, Watched { pulse, waker });
        Watch { worker: Rc::clone(self), key }
    }

    /// SplitMix64: good enough to choose replicas and to name requests, and a handful of instructions.
    pub fn random(&self) -> u64 {
        let state = self.random.get().wrapping_add(0x9E37_79B9_7F4A_7C15);
        self.random.set(state);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    pub fn random_pair(&self) -> [u32; 2] {
        let random = self.random();
        [random as u32, (random >> 32) as u32]
    }

    pub fn is_closing(&self) -> bool {
        self.phase.get() != Phase::Serving
    }

    /// Whether idle connections are closed now.
    pub fn is_closing_idle(&self) -> bool {
        self.closing_since.get().is_some_and(|since| self.now().saturating_sub(since) >= millis(CLOSE_IDLE_AFTER))
    }

    pub fn is_cut(&self) -> bool {
        self.phase.get() == Phase::Cut
    }

    /// Completes when what is still open has to end.
    pub async fn cut(&self) {
        while !self.is_cut() {
            self.phase_changed.notified().await;
        }
    }

    pub fn scratch(&self) -> std::cell::RefMut<'_, Vec<u8>> {
        let mut scratch = self.scratch.borrow_mut();
        scratch.resize(SCRATCH_BYTES, 0);
        scratch
    }

    pub fn bypass(&self) -> Bypass {
        Bypass::new(Arc::clone(&self.pipes))
    }

    pub fn open(self: &Rc<Worker>) -> Open {
        self.open.set(self.open.get() + 1);
        Open(Rc::clone(self))
    }

    fn apply(&self, tables: &Tables) {
        let table = Table::new(tables, &mut self.replicas.borrow_mut(), &self.book);
        drop(self.table.replace(Rc::new(table)));
        self.prune();
        self.reachable.notify_waiters();
    }

    fn tick(&self) {
        let now = millis(self.began.elapsed());
        self.clock.store(now, Ordering::Relaxed);
        let patience = self.patience();
        for watched in self.watched.borrow().values() {
            if self.is_closing() || watched.pulse.is_due(patience) {
                watched.waker.wake_by_ref();
            }
        }
        let idle_max = millis(self.limits.replica_idle_time_max);
        for replica in self.replicas.borrow().iter() {
            replica.pool.borrow_mut().sweep(now, idle_max);
        }
        self.prune();
    }

    /// Lets go of replicas that have left the tables and have nothing in progress, and of the connections kept for
    /// them: a server that is stopping waits for those.
    fn prune(&self) {
        if self.replicas.borrow_mut().prune() {
            self.book.prune();
        }
    }

    /// Whether a replica is in the tables.
    pub fn routes_to(&self, replica: ReplicaId) -> bool {
        let table = self.table.borrow();
        table.services.values().any(|service| service.backends.iter().any(|backend| backend.replica.id == replica))
    }

    fn enter(&self, phase: Phase) {
        self.phase.set(phase);
        self.closing_since.set(self.closing_since.get().or(Some(self.now())));
        self.phase_changed.notify_waiters();
        for watched in self.watched.borrow().values() {
            watched.waker.wake_by_ref();
        }
    }

    fn admit(self: &Rc<Worker>, stream: TcpStream, peer: SocketAddr) {
        let Some(permit) = Sources::admit(&self.sources, peer.ip().to_canonical(), &self.limits) else {
            self.say_refused(peer);
            // Reset instead of closed: it costs us no state, and the newest goes first.
            let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
            return;
        };
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%peer, %error, "a connection was gone before it was served");
            return;
        }
        let (open, chooser) = (self.open(), self.book.chooser());
        let worker = Rc::clone(self);
        spawn_local(async move {
            connection::serve(worker, stream, peer, permit, chooser).await;
            drop(open);
        });
    }

    /// Once a minute at most: an attack must not fill the log too.
    fn say_refused(&self, peer: SocketAddr) {
        let refused = self.refused.get() + 1;
        self.refused.set(refused);
        let now = self.now();
        if self.refused_said.get().is_none_or(|said| now.saturating_sub(said) >= REFUSALS_SAID_MS) {
            self.refused_said.set(Some(now));
            tracing::warn!(%peer, refused, "connections are refused: there are too many, in all or from one address");
        }
    }

    async fn accept(self: Rc<Worker>, listener: std::net::TcpListener) {
        let listener = match TcpListener::from_std(listener) {
            Ok(listener) => listener,
            Err(error) => {
                tracing::error!(%error, "a listener cannot be used");
                return;
            }
        };
        while !self.is_closing() {
            let accepted = tokio::select! {
                biased;
                () = self.phase_changed.notified() => break,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, peer)) => self.admit(stream, peer),
                Err(error) if is_of_one_connection(&error) => {}
                Err(error) => {
                    tracing::warn!(%error, "no connection could be accepted; more file descriptors may be needed");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        // Those who already shook hands are served; closing the listener would reset them.
        if let Ok(listener) = listener.into_std() {
            while let Ok((stream, peer)) = listener.accept() {
                let taken = stream.set_nonblocking(true).and_then(|()| TcpStream::from_std(stream));
                if let Ok(stream) = taken {
                    self.admit(stream, peer);
                }
            }
        }
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX).max(1)
}

/// Something that keeps a shutdown waiting for as long as it lives.
pub struct Open(Rc<Worker>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.set(self.0.open.get() - 1);
        self.0.closed_one.notify_waiters();
    }
}

fn is_of_one_connection(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted)
}

/// The life of a worker: what its thread runs.
pub async fn run(parts: Parts, mut orders: mpsc::UnboundedReceiver<Order>) {
    let worker = Rc::new(Worker {
        limits: parts.limits,
        trusted_proxies: parts.trusted_proxies,
        modules: parts.modules,
        log: parts.log,
        book: parts.book,
        sources: parts.sources,
        table: RefCell::default(),
        replicas: RefCell::default(),
        reachable: Notify::new(),
        began: Instant::now(),
        clock: Arc::new(AtomicU64::new(0)),
        watched: RefCell::default(),
        watched_count: Cell::new(0),
        random: Cell::new(rand::random()),
        phase: Cell::new(Phase::Serving),
        closing_since: Cell::new(None),
        refused: Cell::new(0),
        refused_said: Cell::new(None),
        phase_changed: Notify::new(),
        open: Cell::new(0),
        closed_one: Notify::new(),
        scratch: RefCell::default(),
        pipes: Arc::default(),
    });
    let mut listeners = parts.listeners;
    let mut accepting = Vec::with_capacity(listeners.len());
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let (grace, done) = loop {
        tokio::select! {
            biased;
            order = orders.recv() => match order {
                Some(Order::Apply(tables, applied)) => {
                    worker.apply(&tables);
                    // Only now: until there are tables, connections are better off waiting than with a 404.
                    let accept = |listener| spawn_local(Rc::clone(&worker).accept(listener));
                    accepting.extend(listeners.drain(..).map(accept));
                    // Whoever asked may have given up waiting.
                    let _ = applied.send(());
                }
                Some(Order::Shutdown { grace, done }) => break (grace, Some(done)),
                // Every handle is gone: nobody is left to be graceful for.
                None => break (Duration::ZERO, None),
            },
            _ = ticks.tick() => worker.tick(),
        }
    };
    worker.enter(Phase::Closing);
    for task in accepting {
        // It ends by itself, now that the phase has changed; a panic in it was reported by the runtime.
        let _ = task.await;
    }
    drop(parts.chooser);
    let deadline = tokio::time::sleep(grace);
    tokio::pin!(deadline);
    while worker.open.get() > 0 {
        tokio::select! {
            biased;
            () = &mut deadline, if !worker.is_cut() => worker.enter(Phase::Cut),
            () = worker.closed_one.notified() => {}
            _ = ticks.tick() => worker.tick(),
        }
    }
    for replica in worker.replicas.borrow().iter() {
        replica.pool.borrow_mut().clear();
    }
    // Before whoever waits for it hears of it: its counters are what they will be.
    orders.close();
    drop(done);
}

/// How many connections there are, in all and from each source, over all workers. Looked at once for each
/// connection, so a lock does.
#[derive(Debug, Default)]
pub struct Sources {
    total: AtomicUsize,
    by_address: Mutex<HashMap<IpAddr, u32>>,
}

/// A connection's place in [`Sources`].
#[derive(Debug)]
pub struct Permit {
    sources: Arc<Sources>,
    source: IpAddr,
}

impl Sources {
    fn admit(sources: &Arc<Sources>, source: IpAddr, limits: &Limits) -> Option<Permit> {
        if sources.total.fetch_add(1, Ordering::Relaxed) >= limits.connections_max {
            sources.total.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        let mut by_address = sources.by_address.lock().unwrap_or_else(PoisonError::into_inner);
        let count = by_address.entry(source).or_insert(0);
        if *count >= limits.connections_per_source_max {
            sources.total.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        *count += 1;
        drop(by_address);
        Some(Permit { sources: Arc::clone(sources), source })
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.sources.total.fetch_sub(1, Ordering::Relaxed);
        let mut by_address = self.sources.by_address.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = by_address.get_mut(&self.source) {
            *count -= 1;
            if *count == 0 {
                by_address.remove(&self.source);
            }
        }
    }
}

//! Moving bytes: the HTTP proxy in front of every service. It is given whole [`Tables`] and nothing else, and says
//! what it counted; it decides nothing about the cluster.

pub mod body;
mod l7;
mod services;

use std::fmt;
use std::future::Future;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use orca_cluster::id::ReplicaId;
use orca_cluster::route::Tables;
use orca_cluster::time::Timestamp;
use orca_cluster::traffic::{Legacy, Traffic};
use tokio::sync::{mpsc, oneshot};

pub use body::{Body, BodyError};
use l7::access_log::Log;
use l7::count::Book;
use l7::listen;
use l7::splice::PIPES_MAX;
use l7::worker::{self, Order, Sources};
pub use services::{Passage, Services};

/// Files that each worker may have open besides those of its connections: its pipes, of two ends each, its listeners,
/// and what its runtime waits with.
pub const FILES_PER_WORKER: u64 = 2 * PIPES_MAX as u64 + 8;

#[derive(Debug)]
pub struct Config {
    /// Where plain HTTP is served. Port 0 lets the system choose; [`DataPlane::addresses`] says what it chose.
    pub http: Vec<SocketAddr>,
    /// Threads, each with everything of its own; one for each core that may be used.
    pub workers: usize,
    pub access_log: AccessLog,
    pub limits: Limits,
    /// Who stands in front, and is believed what its requests say of the client: `X-Forwarded-For`, to which its own
    /// address is added, `X-Forwarded-Proto` and `X-Forwarded-Host`. Of anybody else's they are ours.
    pub trusted_proxies: Vec<IpNet>,
}

/// Where one line of JSON for each request goes.
#[derive(Debug, Clone, Default)]
pub enum AccessLog {
    #[default]
    Off,
    /// Appended to; made anew when it was renamed or removed.
    File(PathBuf),
}

/// Bounds on what clients and replicas may take.
#[derive(Debug, Clone)]
pub struct Limits {
    /// From the first byte of a request's head, or from the accept, to the head's end.
    pub head_time_max: Duration,
    pub head_bytes_max: usize,
    pub fields_max: usize,
    /// A connection between two requests.
    pub idle_time_max: Duration,
    /// A connection to a replica between two requests.
    pub replica_idle_time_max: Duration,
    /// A client that neither gives the rest of a request's body nor takes a response.
    pub body_idle_time_max: Duration,
    pub connections_max: usize,
    pub connections_per_source_max: u32,
    pub connect_time_max: Duration,
    /// Times a request is sent again after a replica broke off, where that is safe.
    pub retries_max: u32,
    /// How long a request waits for a service that momentarily has no replica to take it.
    pub hold_time_max: Duration,
    /// Requests that wait so at once, in one worker; more are refused at once.
    pub held_max: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            head_time_max: Duration::from_secs(10),
            head_bytes_max: 32 << 10,
            fields_max: 100,
            idle_time_max: Duration::from_secs(75),
            // Shorter than the 5 s after which common application servers close an idle connection.
            replica_idle_time_max: Duration::from_secs(4),
            body_idle_time_max: Duration::from_secs(60),
            connections_max: 16_384,
            // A network behind one address, or another proxy, is one source.
            connections_per_source_max: 4096,
            connect_time_max: Duration::from_secs(1),
            retries_max: 1,
            hold_time_max: Duration::from_secs(2),
            held_max: 1024,
        }
    }
}

/// Wasm replicas, which are called in this process.
pub trait Modules: Send + Sync + 'static {
    fn call(&self, replica: ReplicaId, request: http::Request<Body>, when_busy: WhenBusy) -> Offered;
}

/// What becomes of a request for a module that serves as many as it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhenBusy {
    /// It waits for a moment, then fails with [`ModuleError::Busy`].
    Wait,
    GiveBack,
}

/// What becomes of a request that is offered to a replica. It comes back as it was if that is not loaded, or is busy and
/// told not to let it wait: another can have it. Boxed, since it is large and this is rare.
pub type Offered = Result<ModuleResponse, Box<http::Request<Body>>>;

pub type ModuleResponse = Pin<Box<dyn Future<Output = Result<http::Response<Body>, ModuleError>> + Send>>;

/// Why a module gave no response. Details are the module runtime's to log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ModuleError {
    #[error("the module trapped")]
    Trapped,
    #[error("the module did not finish in time")]
    TimedOut,
    #[error("the module serves as many requests as it may")]
    Busy,
    #[error("the module needed more memory than it may use")]
    TooMuchMemory,
    #[error("the module is not loaded")]
    Unavailable,
}

/// For a node without modules.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoModules;

impl Modules for NoModules {
    fn call(&self, _: ReplicaId, request: http::Request<Body>, _: WhenBusy) -> Offered {
        Err(Box::new(request))
    }
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("{0} is used by another program; stop that program or give the proxy another port")]
    InUse(SocketAddr),
    #[error("listening on {0} is not permitted; ports below 1024 need CAP_NET_BIND_SERVICE")]
    Denied(SocketAddr),
    #[error("{0} is not an address of this machine")]
    NotLocal(SocketAddr),
    #[error("cannot listen on {address}")]
    Listen {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("there is no listener for the proxy to serve")]
    NoListener,
    #[error("the listeners that were handed over cannot be used")]
    Inherited(#[source] io::Error),
    #[error("the access log cannot be opened")]
    AccessLog(#[source] io::Error),
    #[error("a worker of the proxy cannot be started")]
    Worker(#[source] io::Error),
}

/// A running proxy. Cheap to clone; when the last handle is dropped without [`shutdown`](DataPlane::shutdown) it ends
/// at once.
#[derive(Clone)]
pub struct DataPlane(Arc<Shared>);

struct Shared {
    started: Timestamp,
    workers: Vec<Worker>,
    addresses: Vec<SocketAddr>,
    /// What is handed to the process that comes after us; empty once we are through with them.
    listeners: Mutex<Vec<TcpListener>>,
    /// For the requests of modules.
    services: Services,
    /// Orders reach all workers in the same order.
    ordering: tokio::sync::Mutex<()>,
    /// Whether the first tables are in use, and connections accepted.
    serving: tokio::sync::watch::Sender<bool>,
}

struct Worker {
    orders: mpsc::UnboundedSender<Order>,
    book: Arc<Book>,
}

impl DataPlane {
    /// Listens at once and accepts from the first [`apply`](DataPlane::apply) on.
    pub fn start(config: Config, modules: Arc<dyn Modules>) -> Result<DataPlane, StartError> {
        let workers = config.workers.max(1);
        let failed = |address: SocketAddr, source: io::Error| match source.kind() {
            io::ErrorKind::AddrInUse => StartError::InUse(address),
            io::ErrorKind::PermissionDenied => StartError::Denied(address),
            io::ErrorKind::AddrNotAvailable => StartError::NotLocal(address),
            _ => StartError::Listen { address, source },
        };
        // All of them before the first is bound: `[::]:80` may take `0.0.0.0:80` along, and that is ourselves.
        for &address in &config.http {
            if listen::is_taken(address).map_err(|error| failed(address, error))? {
                return Err(StartError::InUse(address));
            }
        }
        let mut listeners = Vec::new();
        for &address in &config.http {
            listeners.extend(listen::bind(address, workers).map_err(|error| failed(address, error))?);
        }
        DataPlane::start_with(config, listeners, modules)
    }

    /// Starts on listeners that are bound already, as [`listeners`](DataPlane::listeners) of another process gave
    /// them; `config.http` is not looked at. They are dealt out to the workers in turn.
    pub fn start_with(
        config: Config,
        listeners: Vec<TcpListener>,
        modules: Arc<dyn Modules>,
    ) -> Result<DataPlane, StartError> {
        let mut addresses = Vec::new();
        for listener in &listeners {
            listener.set_nonblocking(true).map_err(StartError::Inherited)?;
            let address = listener.local_addr().map_err(StartError::Inherited)?;
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        if listeners.is_empty() {
            return Err(StartError::NoListener);
        }
        let log = match config.access_log {
            AccessLog::Off => None,
            AccessLog::File(path) => Some(Log::start(path).map_err(StartError::AccessLog)?),
        };
        let count = config.workers.max(1);
        let sources = Arc::new(Sources::default());
        let mut workers = Vec::with_capacity(count);
        for index in 0..count {
            let of_worker = deal(&listeners, &addresses, index, count).map_err(StartError::Inherited)?;
            let book = Arc::new(Book::default());
            let parts = worker::Parts {
                listeners: of_worker,
                limits: config.limits.clone(),
                trusted_proxies: config.trusted_proxies.clone(),
                modules: Arc::clone(&modules),
                chooser: book.chooser(),
                book: Arc::clone(&book),
                sources: Arc::clone(&sources),
                log: log.clone(),
            };
            let orders = spawn(index, parts).map_err(StartError::Worker)?;
            workers.push(Worker { orders, book });
        }
        Ok(DataPlane(Arc::new(Shared {
            started: now(),
            workers,
            addresses,
            listeners: Mutex::new(listeners),
            services: Services::new(Arc::downgrade(&modules)),
            ordering: tokio::sync::Mutex::new(()),
            serving: tokio::sync::watch::Sender::new(false),
        })))
    }

    /// Routes by these tables from now on. When it returns, no request can be given to a replica that is not in them;
    /// requests that were given to one before go on.
    pub async fn apply(&self, tables: Arc<Tables>) {
        let _ordered = self.0.ordering.lock().await;
        let mut applied = Vec::with_capacity(self.0.workers.len());
        for worker in &self.0.workers {
            let (done, is_done) = oneshot::channel();
            // A worker that is gone serves nothing, by old tables or new ones.
            match worker.orders.send(Order::Apply(Arc::clone(&tables), done)) {
                Ok(()) => applied.push(is_done),
                Err(_) => tracing::warn!("tables were given to a worker of the proxy that has ended"),
            }
        }
        self.0.services.apply(&tables);
        for is_done in applied {
            let _ = is_done.await;
        }
        self.0.serving.send_replace(true);
    }

    /// Returns when it has tables and accepts connections.
    pub async fn serving(&self) {
        // The sender lives in `self`.
        let _ = self.0.serving.subscribe().wait_for(|serving| *serving).await;
    }

    /// Everything counted since the start.
    pub fn traffic(&self, now: Timestamp) -> Traffic {
        let mut traffic = Traffic { at: now, started: self.0.started, ..Traffic::default() };
        for worker in &self.0.workers {
            worker.book.add_to(&mut traffic);
        }
        self.0.services.add_to(&mut traffic);
        traffic
    }

    /// What it has counted and not finished, which whoever takes over from it has to know until it has
    /// [ended](DataPlane::shutdown).
    pub fn legacy(&self, now: Timestamp) -> Legacy {
        // The order matters: what is chosen in between is in flight when that is read, and a worker that has ended has
        // counted all it had.
        let is_choosing = self.0.workers.iter().any(|worker| worker.book.is_choosing());
        let is_final = self.0.workers.iter().all(|worker| worker.orders.is_closed());
        Legacy { is_choosing, is_final, traffic: self.traffic(now) }
    }

    /// Requests that wait for a replica now.
    pub fn held(&self) -> usize {
        self.0.workers.iter().map(|worker| worker.book.held()).sum()
    }

    /// The same tables, for requests that begin inside this process.
    pub fn services(&self) -> Services {
        self.0.services.clone()
    }

    /// Where it listens.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.0.addresses.clone()
    }

    /// Its listeners, for the process that takes over. Both may accept for a time; connections that wait belong to
    /// the listener and so to whoever is left.
    pub fn listeners(&self) -> io::Result<Vec<TcpListener>> {
        let listeners = self.0.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        listeners.iter().map(TcpListener::try_clone).collect()
    }

    /// Accepts no more, ends idle connections, lets requests and upgraded connections finish, and cuts what is left
    /// after the grace.
    pub async fn shutdown(self, grace: Duration) {
        self.0.listeners.lock().unwrap_or_else(PoisonError::into_inner).clear();
        let mut ending = Vec::with_capacity(self.0.workers.len());
        for worker in &self.0.workers {
            let (done, is_done) = oneshot::channel();
            if worker.orders.send(Order::Shutdown { grace, done }).is_ok() {
                ending.push(is_done);
            }
        }
        for is_done in ending {
            // The sender is dropped when the worker has ended, which is what there is to know.
            let _ = is_done.await;
        }
    }
}

/// A worker's listeners: its turn of each address, or a copy where an address has fewer listeners than workers.
fn deal(
    listeners: &[TcpListener],
    addresses: &[SocketAddr],
    worker: usize,
    workers: usize,
) -> io::Result<Vec<TcpListener>> {
    let mut dealt = Vec::new();
    for address in addresses {
        let mut of_address = Vec::new();
        for listener in listeners {
            if listener.local_addr()? == *address {
                of_address.push(listener);
            }
        }
        // Every listener needs someone who accepts from it, and every worker needs one.
        let turns = (worker..of_address.len().max(workers)).step_by(workers);
        let mut chosen: Vec<usize> = turns.map(|turn| turn % of_address.len()).collect();
        chosen.dedup();
        for index in chosen {
            dealt.push(of_address[index].try_clone()?);
        }
    }
    Ok(dealt)
}

/// The wall clock. One set before 1970 reads as 1970.
fn now() -> Timestamp {
    Timestamp::default() + SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

fn spawn(index: usize, parts: worker::Parts) -> io::Result<mpsc::UnboundedSender<Order>> {
    // Unbounded, and bounded by its senders: each waits for its order to be carried out before it sends another.
    let (orders, incoming) = mpsc::unbounded_channel();
    let runtime_is_made = std::sync::mpsc::sync_channel(1);
    let (made, is_made) = runtime_is_made;
    std::thread::Builder::new().name(format!("proxy-{index}")).spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build_local(Default::default());
        let runtime = match runtime {
            Ok(runtime) => runtime,
            Err(error) => {
                let _ = made.send(Err(error));
                return;
            }
        };
        let _ = made.send(Ok(()));
        runtime.block_on(worker::run(parts, incoming));
    })?;
    is_made.recv().map_err(io::Error::other)??;
    Ok(orders)
}

impl fmt::Debug for DataPlane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DataPlane").field("addresses", &self.0.addresses).finish_non_exhaustive()
    }
}

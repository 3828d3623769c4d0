//! The services as requests that begin inside this process reach them: those that modules send. Who gets one is
//! chosen by the same rule as for clients' requests, and it counts as in flight there, so that a drain waits for it.
//! Modules run on any thread, so this table is shared, where a worker has its own; the lock is held for a choice.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::time::Instant;

use orca_cluster::id::{ReplicaId, ServiceName};
use orca_cluster::route::Tables;
use orca_cluster::traffic::Traffic;

use crate::l7::balance::{Candidate, Health, choose};
use crate::l7::count::{Boarded, Book, Flight};
use crate::l7::forward::is_our_shortage;
use crate::l7::table::Target;
use crate::{Body, Modules, NoModules, Offered, WhenBusy};

/// A handle; cheap to clone. It keeps neither a proxy nor modules running: whoever is called by them may hold it.
#[derive(Debug, Clone)]
pub struct Services(Arc<Shared>);

/// A request's way to the replica that was chosen for it. The request is in flight there while this lives.
#[derive(Debug)]
pub struct Passage {
    replica: Arc<Replica>,
    target: Target,
    services: Arc<Shared>,
    _boarded: Boarded,
}

struct Shared {
    table: RwLock<Table>,
    book: Book,
    began: Instant,
    /// They hold us.
    modules: Weak<dyn Modules>,
}

#[derive(Debug, Default)]
struct Table {
    services: HashMap<ServiceName, Service>,
    replicas: HashMap<ReplicaId, Arc<Replica>>,
}

#[derive(Debug)]
struct Service {
    backends: Vec<Backend>,
}

#[derive(Debug)]
struct Backend {
    replica: Arc<Replica>,
    target: Target,
    weight: u16,
}

#[derive(Debug)]
struct Replica {
    id: ReplicaId,
    health: Mutex<Health>,
    flight: Arc<Flight>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Services").field("table", &self.table).finish_non_exhaustive()
    }
}

/// No services.
impl Default for Services {
    fn default() -> Services {
        Services::new(Weak::<NoModules>::new())
    }
}

impl Services {
    pub(crate) fn new(modules: Weak<dyn Modules>) -> Services {
        let (table, book) = Default::default();
        Services(Arc::new(Shared { table, book, began: Instant::now(), modules }))
    }

    /// Whether there is a service of this name, with or without replicas.
    pub fn has(&self, service: &ServiceName) -> bool {
        self.0.table.read().unwrap_or_else(PoisonError::into_inner).services.contains_key(service)
    }

    /// The way to the replica that should get the next request; to one that is to be avoided only if there is no other.
    /// Nothing if none is ready.
    pub fn choose(&self, service: &ServiceName, avoid: &[ReplicaId]) -> Option<Passage> {
        let now = millis_since(self.0.began);
        let table = self.0.table.read().unwrap_or_else(PoisonError::into_inner);
        let Service { backends } = table.services.get(service)?;
        let candidate = |index: usize| {
            let Backend { replica, weight, .. } = &backends[index];
            let available = replica.health().is_available(now) && !avoid.contains(&replica.id);
            Candidate { weight: *weight, load: replica.flight.load(), available }
        };
        let chosen = choose(backends.len(), candidate, rand::random())?;
        let Backend { replica, target, .. } = &backends[chosen];
        // Still under the lock: once other tables are applied, whoever was chosen by these is seen in flight.
        let boarded = replica.flight.board();
        let (replica, services) = (Arc::clone(replica), Arc::clone(&self.0));
        Some(Passage { replica, target: *target, services, _boarded: boarded })
    }

    /// Chooses by these tables from now on. When it returns, nobody is chosen by earlier ones any more.
    pub(crate) fn apply(&self, tables: &Tables) {
        let Shared { table, book, .. } = &*self.0;
        let new = Table::new(tables, &table.read().unwrap_or_else(PoisonError::into_inner), book);
        *table.write().unwrap_or_else(PoisonError::into_inner) = new;
        book.prune();
    }

    pub(crate) fn add_to(&self, traffic: &mut Traffic) {
        self.0.book.add_to(traffic);
    }
}

impl Table {
    /// What was learned of a replica stays with it from one table to the next.
    fn new(tables: &Tables, before: &Table, book: &Book) -> Table {
        let mut replicas: HashMap<ReplicaId, Arc<Replica>> = HashMap::new();
        let mut services = HashMap::with_capacity(tables.services.len());
        for (name, upstream) in &tables.services {
            let mut backends = Vec::with_capacity(upstream.backends.len());
            for backend in &upstream.backends {
                let Some(target) = Target::of(upstream, backend) else { continue };
                let id = backend.replica;
                let replica = replicas.entry(id).or_insert_with(|| match before.replicas.get(&id) {
                    Some(known) => Arc::clone(known),
                    None => Arc::new(Replica { id, health: Mutex::default(), flight: book.flight(id) }),
                });
                backends.push(Backend { replica: Arc::clone(replica), target, weight: backend.weight });
            }
            services.insert(name.clone(), Service { backends });
        }
        Table { services, replicas }
    }
}

impl Passage {
    pub fn replica(&self) -> ReplicaId {
        self.replica.id
    }

    /// Nothing if it is a module, which is [called](Passage::call) instead.
    pub fn address(&self) -> Option<SocketAddr> {
        match self.target {
            Target::Address(address) => Some(address),
            Target::Module => None,
        }
    }

    /// Gives a request to a module. As with [`Modules::call`] it may come back; it does if this is none.
    pub fn call(&self, request: http::Request<Body>, when_busy: WhenBusy) -> Offered {
        match (self.target, self.services.modules.upgrade()) {
            (Target::Module, Some(modules)) => modules.call(self.replica.id, request, when_busy),
            _ => Err(Box::new(request)),
        }
    }

    /// It answered.
    pub fn succeeded(&self) {
        *self.replica.health() = Health::default();
    }

    /// It took no connection.
    pub fn refused(&self, error: &io::Error) {
        if is_our_shortage(error) {
            return;
        }
        if self.replica.health().failed(millis_since(self.services.began)) {
            tracing::info!(replica = %self.replica.id, "ejected: it refused modules several times in a row");
        }
    }
}

impl Replica {
    fn health(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn millis_since(began: Instant) -> u64 {
    u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX)
}

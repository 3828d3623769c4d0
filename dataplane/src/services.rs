//! The services as requests that begin inside this process reach them: those that modules send. Who gets one is
//! chosen by the same rule as for clients' requests, and it counts as in flight there, so that a drain waits for it.
//! Modules run on any thread, so this table is shared, where a worker has its own; the lock is held for a choice.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Instant;

use orca_cluster::id::{ReplicaId, ServiceName};
use orca_cluster::route::Tables;
use orca_cluster::traffic::Traffic;

use crate::l7::balance::{Candidate, Health, choose};
use crate::l7::count::{Boarded, Book, Flight};
use crate::l7::forward::is_our_shortage;

/// A handle; cheap to clone. It keeps no proxy running: whoever is called by the proxy may hold it.
#[derive(Debug, Clone, Default)]
pub struct Services(Arc<Shared>);

/// A request's way to the replica that was chosen for it. The request is in flight there while this lives.
#[derive(Debug)]
pub struct Passage {
    replica: Arc<Replica>,
    address: SocketAddr,
    began: Instant,
    _boarded: Boarded,
}

/// Why a service can be connected to nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Nowhere {
    #[error("the service has no replica that is ready")]
    NoReplica,
    #[error("the service is a module, and a module cannot be asked by another yet")]
    Module,
}

#[derive(Debug)]
struct Shared {
    table: RwLock<Table>,
    book: Book,
    began: Instant,
}

#[derive(Debug, Default)]
struct Table {
    services: HashMap<ServiceName, Service>,
    replicas: HashMap<ReplicaId, Arc<Replica>>,
}

#[derive(Debug)]
struct Service {
    backends: Vec<Backend>,
    is_module: bool,
}

#[derive(Debug)]
struct Backend {
    replica: Arc<Replica>,
    address: SocketAddr,
    weight: u16,
}

#[derive(Debug)]
struct Replica {
    id: ReplicaId,
    health: Mutex<Health>,
    flight: Arc<Flight>,
}

impl Default for Shared {
    fn default() -> Shared {
        Shared { table: RwLock::default(), book: Book::default(), began: Instant::now() }
    }
}

impl Services {
    /// Whether there is a service of this name, with or without replicas.
    pub fn has(&self, service: &ServiceName) -> bool {
        self.0.table.read().unwrap_or_else(PoisonError::into_inner).services.contains_key(service)
    }

    /// The way to the replica that should get the next request; to one that is to be avoided only if there is no other.
    pub fn choose(&self, service: &ServiceName, avoid: &[ReplicaId]) -> Result<Passage, Nowhere> {
        let now = millis_since(self.0.began);
        let table = self.0.table.read().unwrap_or_else(PoisonError::into_inner);
        let Service { backends, is_module } = table.services.get(service).ok_or(Nowhere::NoReplica)?;
        let candidate = |index: usize| {
            let Backend { replica, weight, .. } = &backends[index];
            let available = replica.health().is_available(now) && !avoid.contains(&replica.id);
            Candidate { weight: *weight, load: replica.flight.load(), available }
        };
        let nowhere = if *is_module { Nowhere::Module } else { Nowhere::NoReplica };
        let chosen = choose(backends.len(), candidate, rand::random()).ok_or(nowhere)?;
        let Backend { replica, address, .. } = &backends[chosen];
        // Still under the lock: once other tables are applied, whoever was chosen by these is seen in flight.
        let boarded = replica.flight.board();
        Ok(Passage { replica: Arc::clone(replica), address: *address, began: self.0.began, _boarded: boarded })
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
                // A module has none: it is called, not connected to.
                let Some(address) = backend.address else { continue };
                let id = backend.replica;
                let replica = replicas.entry(id).or_insert_with(|| match before.replicas.get(&id) {
                    Some(known) => Arc::clone(known),
                    None => Arc::new(Replica { id, health: Mutex::default(), flight: book.flight(id) }),
                });
                backends.push(Backend { replica: Arc::clone(replica), address, weight: backend.weight });
            }
            services.insert(name.clone(), Service { backends, is_module: upstream.module });
        }
        Table { services, replicas }
    }
}

impl Passage {
    pub fn replica(&self) -> ReplicaId {
        self.replica.id
    }

    pub fn address(&self) -> SocketAddr {
        self.address
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
        if self.replica.health().failed(millis_since(self.began)) {
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

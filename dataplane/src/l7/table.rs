//! [`Tables`] as one worker uses them: indexed for look-up, and tied to the things that outlive a table, which are
//! the replicas with their pools and health, and the cells that count.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use orca_cluster::id::{ReplicaId, Revision, ServiceName};
use orca_cluster::route::{self, Absence, Tables, Upstream};

use super::balance::{Candidate, Health, choose};
use super::count::{self, Book, Flight};
use super::pool::Pool;
use super::route::Routes;

#[derive(Debug, Default)]
pub struct Table {
    pub routes: Routes<Rc<Service>>,
    pub services: HashMap<ServiceName, Rc<Service>>,
}

#[derive(Debug)]
pub struct Service {
    pub name: ServiceName,
    pub backends: Vec<Backend>,
    pub absence: Absence,
    pub response_timeout: Duration,
    pub unserved: Arc<count::Cell>,
}

/// One replica's part in one service.
#[derive(Debug, Clone)]
pub struct Backend {
    pub replica: Rc<Replica>,
    pub revision: Revision,
    pub target: Target,
    pub weight: u16,
    pub cell: Arc<count::Cell>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    Address(SocketAddr),
    /// It runs in this process.
    Module,
}

impl Target {
    /// Nothing for a container without an address.
    pub fn of(upstream: &Upstream, backend: &route::Backend) -> Option<Target> {
        match (upstream.module, backend.address) {
            // Also beside modules, while a service is on its way from one kind to the other.
            (_, Some(address)) => Some(Target::Address(address)),
            (true, None) => Some(Target::Module),
            (false, None) => None,
        }
    }
}

/// What a worker knows about a replica for as long as it is in the tables or serves a request.
#[derive(Debug)]
pub struct Replica {
    pub id: ReplicaId,
    pub pool: RefCell<Pool>,
    pub health: Cell<Health>,
    pub flight: Arc<Flight>,
}

/// The replicas of one worker.
#[derive(Debug, Default)]
pub struct Replicas(HashMap<ReplicaId, Rc<Replica>>);

impl<T> Default for Routes<T> {
    fn default() -> Routes<T> {
        Routes::new(std::iter::empty())
    }
}

impl Table {
    pub fn new(tables: &Tables, replicas: &mut Replicas, book: &Book) -> Table {
        let mut services = HashMap::with_capacity(tables.services.len());
        for (name, upstream) in &tables.services {
            let mut backends = Vec::with_capacity(upstream.backends.len());
            for backend in &upstream.backends {
                let Some(target) = Target::of(upstream, backend) else {
                    tracing::error!(service = %name, replica = %backend.replica, "a container without an address was routed to");
                    continue;
                };
                backends.push(Backend {
                    replica: replicas.replica(backend.replica, book),
                    revision: backend.revision,
                    target,
                    weight: backend.weight,
                    cell: book.revision(name, backend.revision),
                });
            }
            let service = Service {
                name: name.clone(),
                backends,
                absence: upstream.absence,
                response_timeout: upstream.response_timeout,
                unserved: book.unserved(name),
            };
            services.insert(name.clone(), Rc::new(service));
        }
        let routes = Routes::new(tables.routes.iter().filter_map(|(key, name)| {
            let Some(service) = services.get(name) else {
                tracing::error!(route = %key.0, service = %name, "a route leads to a service that is not in the tables");
                return None;
            };
            Some((key, Rc::clone(service)))
        }));
        Table { routes, services }
    }
}

impl Service {
    /// The replica that should get the next request; one to be avoided only if there is no other.
    pub fn choose(&self, now: u64, random: [u32; 2], avoid: &[ReplicaId]) -> Option<&Backend> {
        let candidate = |index: usize| {
            let backend: &Backend = &self.backends[index];
            Candidate {
                weight: backend.weight,
                load: backend.replica.flight.load(),
                available: backend.replica.health.get().is_available(now) && !avoid.contains(&backend.replica.id),
            }
        };
        choose(self.backends.len(), candidate, random).map(|index| &self.backends[index])
    }
}

impl Replica {
    /// It answered. Says whether it had failed before.
    pub fn succeeded(&self) -> bool {
        self.health.replace(Health::default()) != Health::default()
    }

    pub fn failed(&self, now: u64) {
        let mut health = self.health.get();
        if health.failed(now) {
            tracing::info!(replica = %self.id, "ejected: it failed several times in a row");
        }
        self.health.set(health);
    }
}

impl Replicas {
    fn replica(&mut self, id: ReplicaId, book: &Book) -> Rc<Replica> {
        let new = || {
            let flight = book.flight(id);
            Rc::new(Replica { id, pool: RefCell::default(), health: Cell::default(), flight })
        };
        Rc::clone(self.0.entry(id).or_insert_with(new))
    }

    /// Forgets those that are in no table and serve nothing. Says whether there were any.
    pub fn prune(&mut self) -> bool {
        let before = self.0.len();
        self.0.retain(|_, replica| Rc::strong_count(replica) > 1);
        self.0.len() < before
    }

    pub fn iter(&self) -> impl Iterator<Item = &Rc<Replica>> {
        self.0.values()
    }
}

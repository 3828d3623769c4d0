//! What is counted, where. Each worker counts in cells of its own, one for each service and revision, so no cache
//! line is fought over; reading adds the workers up. A cell is locked once when a request ends, by its own worker,
//! so the lock is free but for the moment someone reads, and what is read is of one moment.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use orca_cluster::id::{ReplicaId, Revision, ServiceName};
use orca_cluster::traffic::{Counters, HISTOGRAM_BUCKETS, Histogram, Traffic, bucket_of};

/// Revisions of a service that are counted apart although no replica of theirs is in the tables, the newest first: what is
/// on trial may be away for a moment.
const IDLE_REVISIONS_MAX: usize = 4;
/// Services that are gone and whose counters are told still; past it, those that went first are forgotten.
const GONE_SERVICES_MAX: usize = 200;

/// Counters of the requests that ended at one revision of a service, in one worker.
#[derive(Debug, Default)]
pub struct Cell(Mutex<Tally>);

#[derive(Debug)]
struct Tally {
    requests: u64,
    statuses: [u64; 5],
    cut: u64,
    latency: [u64; HISTOGRAM_BUCKETS],
    latency_total_us: u64,
}

impl Default for Tally {
    fn default() -> Tally {
        Tally { requests: 0, statuses: [0; 5], cut: 0, latency: [0; HISTOGRAM_BUCKETS], latency_total_us: 0 }
    }
}

/// One request that has ended.
#[derive(Debug, Clone, Copy)]
pub struct Ended {
    /// Nothing if the client left before there was one.
    pub status: Option<http::StatusCode>,
    pub cut: bool,
    pub latency: Duration,
}

impl Cell {
    pub fn count(&self, ended: Ended) {
        let mut tally = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tally.requests += 1;
        tally.cut += u64::from(ended.cut);
        tally.latency[bucket_of(ended.latency)] += 1;
        let micros = u64::try_from(ended.latency.as_micros()).unwrap_or(u64::MAX);
        tally.latency_total_us = tally.latency_total_us.saturating_add(micros);
        if let Some(status) = ended.status {
            let class = usize::from(status.as_u16() / 100).clamp(1, 5);
            tally.statuses[class - 1] += 1;
        }
    }

    fn read(&self) -> Counters {
        let tally = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Counters {
            requests: tally.requests,
            statuses: tally.statuses,
            cut: tally.cut,
            latency: Histogram::from_counts(tally.latency.to_vec()),
            latency_total_us: tally.latency_total_us,
            unserved: 0,
        }
    }
}

/// What goes on at one replica, from one worker.
#[derive(Debug, Default)]
pub struct Flight {
    requests: AtomicU32,
    upgraded: AtomicU32,
}

/// Holds a place in [`Flight`] for as long as it lives.
#[derive(Debug)]
pub struct Boarded {
    flight: Arc<Flight>,
    upgraded: bool,
}

impl Flight {
    pub fn board(self: &Arc<Flight>) -> Boarded {
        self.requests.fetch_add(1, Ordering::Relaxed);
        Boarded { flight: Arc::clone(self), upgraded: false }
    }

    pub fn load(&self) -> u32 {
        self.requests.load(Ordering::Relaxed).saturating_add(self.upgraded.load(Ordering::Relaxed))
    }
}

impl Boarded {
    /// The request has become an upgraded connection. Never counted as neither, so a drain cannot miss it.
    pub fn upgrade(&mut self) {
        if !std::mem::replace(&mut self.upgraded, true) {
            self.flight.upgraded.fetch_add(1, Ordering::Relaxed);
            self.flight.requests.fetch_sub(1, Ordering::Release);
        }
    }
}

impl Drop for Boarded {
    fn drop(&mut self) {
        let place = if self.upgraded { &self.flight.upgraded } else { &self.flight.requests };
        place.fetch_sub(1, Ordering::Relaxed);
    }
}

/// All cells of one worker. Locked when tables change and when someone reads. What was counted is kept, since counters
/// may only grow, but not apart for every revision and service there ever was: a cell takes about 2 KiB here, and up to
/// that in each report.
#[derive(Debug, Default)]
pub struct Book {
    pages: Mutex<Pages>,
    held: AtomicUsize,
    choosers: AtomicUsize,
}

/// A request's place among those that wait for a replica.
#[derive(Debug)]
pub struct Held(Arc<Book>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.held.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Something from which a request may yet come that is given to a replica: an open listener, a connection.
#[derive(Debug)]
pub struct Chooser(Arc<Book>);

impl Drop for Chooser {
    fn drop(&mut self) {
        // Whoever sees it gone sees all that it has put in flight.
        self.0.choosers.fetch_sub(1, Ordering::Release);
    }
}

#[derive(Debug, Default)]
struct Pages {
    services: BTreeMap<ServiceName, Cells>,
    flights: BTreeMap<ReplicaId, Arc<Flight>>,
    /// How often they were pruned.
    prunes: u64,
}

#[derive(Debug, Default)]
struct Cells {
    revisions: BTreeMap<Revision, Arc<Cell>>,
    /// All other revisions together.
    retired: Counters,
    unserved: Arc<Cell>,
    /// The prune since which nobody counts here.
    idle: Option<u64>,
}

impl Cells {
    /// Adds up revisions that nobody counts any more but the newest: of a service that is gone all of them. Says whether
    /// it is.
    fn retire(&mut self) -> bool {
        let is_gone = Arc::strong_count(&self.unserved) == 1 && self.revisions.values().all(is_idle);
        let kept = if is_gone { 0 } else { IDLE_REVISIONS_MAX };
        let idle = self.revisions.iter().rev().filter(|(_, cell)| is_idle(cell)).map(|(revision, _)| *revision);
        for revision in idle.skip(kept).collect::<Vec<_>>() {
            if let Some(cell) = self.revisions.remove(&revision) {
                self.retired.add(&cell.read());
            }
        }
        is_gone
    }
}

/// Whether it is in no table, and no request is under way that it will count. Only its book can give it out again.
fn is_idle(cell: &Arc<Cell>) -> bool {
    Arc::strong_count(cell) == 1
}

impl Book {
    /// A place to wait, unless so many wait already. One worker gives out the places of its book.
    pub fn hold(self: &Arc<Book>, held_max: usize) -> Option<Held> {
        if self.held() >= held_max {
            return None;
        }
        self.held.fetch_add(1, Ordering::Relaxed);
        Some(Held(Arc::clone(self)))
    }

    pub fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    pub fn chooser(self: &Arc<Book>) -> Chooser {
        self.choosers.fetch_add(1, Ordering::Relaxed);
        Chooser(Arc::clone(self))
    }

    /// Whether the worker may still give a request to a replica.
    pub fn is_choosing(&self) -> bool {
        self.choosers.load(Ordering::Acquire) > 0
    }

    pub fn revision(&self, service: &ServiceName, revision: Revision) -> Arc<Cell> {
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        let cells = pages.services.entry(service.clone()).or_default();
        Arc::clone(cells.revisions.entry(revision).or_default())
    }

    pub fn unserved(&self, service: &ServiceName) -> Arc<Cell> {
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&pages.services.entry(service.clone()).or_default().unserved)
    }

    pub fn flight(&self, replica: ReplicaId) -> Arc<Flight> {
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(pages.flights.entry(replica).or_default())
    }

    /// Forgets replicas that nobody but this book knows any more, and adds up or forgets what was counted of revisions
    /// and services that are gone.
    pub fn prune(&self) {
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        let Pages { services, flights, prunes } = &mut *pages;
        flights.retain(|_, flight| Arc::strong_count(flight) > 1);
        *prunes += 1;
        let mut gone = Vec::new();
        for (name, cells) in services.iter_mut() {
            cells.idle = cells.retire().then(|| cells.idle.unwrap_or(*prunes));
            gone.extend(cells.idle.map(|since| (since, name.clone())));
        }
        gone.sort();
        for (_, name) in gone.iter().rev().skip(GONE_SERVICES_MAX) {
            services.remove(name);
        }
    }

    pub fn add_to(&self, traffic: &mut Traffic) {
        let pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        for (name, cells) in &pages.services {
            let service = traffic.services.entry(name.clone()).or_default();
            service.unserved.add(&cells.unserved.read());
            service.retired.add(&cells.retired);
            for (revision, cell) in &cells.revisions {
                service.revisions.entry(*revision).or_default().add(&cell.read());
            }
        }
        for (replica, flight) in &pages.flights {
            // The order matters: a request moves from the first to the second, so reading the second last may count
            // it twice and never not at all.
            let requests = flight.requests.load(Ordering::Acquire);
            let upgraded = flight.upgraded.load(Ordering::Acquire);
            if requests > 0 || upgraded > 0 {
                let all = traffic.in_flight.entry(*replica).or_default();
                all.requests += requests;
                all.upgraded += upgraded;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use orca_cluster::traffic::ServiceTraffic;

    use super::*;

    #[test]
    fn the_times_of_all_requests_are_added_up() {
        let cell = Cell::default();
        for millis in [1, 20, 300] {
            cell.count(Ended { status: None, cut: false, latency: Duration::from_millis(millis) });
        }
        let counted = cell.read();
        assert_eq!((counted.latency_total_us, counted.latency.total()), (321_000, 3));
    }

    const OK: Ended = Ended { status: Some(http::StatusCode::OK), cut: false, latency: Duration::ZERO };

    fn told(book: &Book) -> BTreeMap<ServiceName, ServiceTraffic> {
        let mut traffic = Traffic::default();
        book.add_to(&mut traffic);
        traffic.services
    }

    #[test]
    fn revisions_that_are_gone_are_added_up_and_nothing_is_lost() {
        let book = Book::default();
        let name: ServiceName = "shop/web".parse().unwrap();
        let unserved = book.unserved(&name);
        let first = book.revision(&name, Revision(1));
        for revision in 1..=100 {
            book.revision(&name, Revision(revision)).count(OK);
            book.prune();
            let told = told(&book);
            assert_eq!(told[&name].total().requests, revision);
            assert!(told[&name].revisions.len() <= 1 + IDLE_REVISIONS_MAX);
        }
        first.count(OK);
        let apart: Vec<_> = told(&book)[&name].revisions.iter().map(|(r, counted)| (r.0, counted.requests)).collect();
        assert_eq!(apart, [(1, 2), (97, 1), (98, 1), (99, 1), (100, 1)]);
        drop(first);
        drop(unserved);
        book.prune();
        let told = told(&book);
        assert_eq!((told[&name].revisions.len(), told[&name].total().requests), (0, 101));
    }

    #[test]
    fn of_services_that_are_gone_the_latest_are_told() {
        let book = Book::default();
        let name = |number: usize| -> ServiceName { format!("shop/web-{number}").parse().unwrap() };
        let kept = book.unserved(&name(0));
        for number in (1..=GONE_SERVICES_MAX + 50).rev() {
            book.revision(&name(number), Revision(1)).count(OK);
            book.prune();
        }
        let told = told(&book);
        assert_eq!(told.len(), 1 + GONE_SERVICES_MAX);
        assert!((1..=GONE_SERVICES_MAX).all(|number| told[&name(number)].total().requests == 1));
        assert!(told.contains_key(&name(0)));
        drop(kept);
    }
}

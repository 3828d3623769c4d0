//! The product's second promise, counted: faults are injected for real, into real servers with a real engine, and
//! `orca why` must name the cause of each. The table is in [`faults`]; here it is gone through, several at a time, and
//! printed with what was said.

mod fault;
mod faults;
mod images;

use std::fmt::Write as _;
use std::sync::Mutex;
use std::thread;
use std::time::Instant;

use crate::support::{Node, PASSWORD_HASH, Registry, Setup, requires_docker};
use fault::{Fault, Found, Place};
use images::Images;

/// Faults injected at the same time: they wait for time-outs most of the time.
const AT_ONCE: usize = 8;
/// Of how many faults of those in the table the cause may be named wrongly: one in twenty.
const WRONG_ONE_IN: usize = 20;
const FAULTS_MIN: usize = 40;

/// Where faults are injected.
pub struct World {
    /// With a Docker engine.
    node: Node,
    /// Whose Docker engine is not there.
    lonely: Node,
    images: Images,
    /// Gives images to anybody.
    open: Registry,
    /// Gives them to whom it knows.
    closed: Registry,
}

impl World {
    fn start() -> World {
        let images = Images::build();
        let (open, closed) = (Registry::start(None), Registry::start(Some(PASSWORD_HASH)));
        let node = Node::start();
        let settings = node.directory().join("cluster.toml");
        let allowed = "[policy]\nallow_host = [\"network\", \"/no-such-directory\"]\n";
        std::fs::write(&settings, allowed).unwrap();
        node.orca(&["deploy", "-y", "-f", settings.to_str().unwrap()]).succeeded();
        node.set_secret("SET_ONCE", "a value");
        node.set_secret("WRONG_PASSWORD", "not the password");
        let elsewhere = [("DOCKER_HOST".to_owned(), "unix:///no-such-directory/docker.sock".to_owned())];
        let lonely = Node::with(Setup { env: elsewhere.to_vec(), ..Setup::default() });
        World { node, lonely, images, open, closed }
    }

    fn at(&self, place: Place) -> &Node {
        match place {
            Place::Node => &self.node,
            Place::Lonely => &self.lonely,
        }
    }
}

#[test]
fn the_cause_of_every_fault_is_named() {
    requires_docker!();
    let begun = Instant::now();
    let world = World::start();
    let only = std::env::var("ORCA_TEST_FAULT").unwrap_or_default();
    let faults: Vec<Fault> = faults::all(&world).into_iter().filter(|fault| fault.name.contains(&only)).collect();
    let waiting = Mutex::new(faults.iter().enumerate());
    let found: Mutex<Vec<Option<Found>>> = Mutex::new(faults.iter().map(|_| None).collect());
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                loop {
                    let Some((at, fault)) = waiting.lock().unwrap().next() else { return };
                    let outcome = fault.inject(&world);
                    found.lock().unwrap()[at] = Some(outcome);
                }
            });
        }
    });
    let found: Vec<Found> =
        found.into_inner().unwrap().into_iter().map(|found| found.expect("all were injected")).collect();
    let mut table = String::new();
    let rows = || faults.iter().zip(&found);
    for (fault, found) in rows() {
        let mark = if found.is_right() { "right" } else { "WRONG" };
        writeln!(table, "{mark}  {:<26} {found}", fault.name).unwrap();
    }
    let wrong: Vec<&str> = rows().filter(|(_, found)| !found.is_right()).map(|(fault, _)| fault.name).collect();
    let right = faults.len() - wrong.len();
    eprintln!("{table}{right} of {} causes named in {:.0?}", faults.len(), begun.elapsed());
    if only.is_empty() {
        assert!(faults.len() >= FAULTS_MIN, "the table has {} faults", faults.len());
    }
    assert!(wrong.len() <= faults.len() / WRONG_ONE_IN, "wrongly named: {}\n{table}", wrong.join(", "));
}

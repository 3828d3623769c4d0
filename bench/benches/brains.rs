//! What decisions cost in the largest cluster Orca is meant for: 20 nodes, 200 services with three replicas each.
//! None of it is on the way of a request; it bounds how fast a cluster can change.
//!
//! `cargo bench -p orca-bench --bench brains`. Prints; asserts nothing, as machines differ.

#![expect(clippy::print_stdout, reason = "printing figures is what it does")]

use std::collections::BTreeMap;
use std::hint::black_box;
use std::time::{Duration, Instant};

use orca_cluster::command::put::PutServices;
use orca_cluster::command::{Command, Entry, NewNode};
use orca_cluster::event::Actor;
use orca_cluster::id::{Label, NodeId};
use orca_cluster::inventory::Inventory;
use orca_cluster::plan::{plan, route};
use orca_cluster::replica::{Engine, Facts, Observed};
use orca_cluster::resource::{Cpu, Memory};
use orca_cluster::secret::{Opaque, SealingPublicKey};
use orca_cluster::spec::toml::{SourceFile, project};
use orca_cluster::state::State;
use orca_cluster::time::Timestamp;
use orca_cluster::view::View;

const NODES: u64 = 20;
const SERVICES: usize = 200;
const RUNS: usize = 101;
/// Rounds of adopting what was planned: past them the cluster has placed all it is going to.
const ROUNDS_MAX: usize = 1_000;
const NOW: Timestamp = Timestamp(1_700_000_000_000);

fn main() {
    let mut inventory = Inventory::new(NOW);
    let mut world = World { state: State::default(), index: 0 };
    for node in 1..=NODES {
        world.apply(Command::Admit(NewNode {
            name: format!("n{node}"),
            address: format!("10.0.0.{node}:6880"),
            sealing_key: SealingPublicKey(Opaque(Vec::new())),
        }));
        let facts = Facts {
            cpu: Cpu(64_000),
            memory: Memory(256 << 30),
            memory_available: Memory(256 << 30),
            containers: Engine::Ready { version: "28".to_owned() },
            ..Facts::default()
        };
        inventory.record(NodeId(node), Observed { at: NOW, facts, ..Observed::default() }, NOW);
    }
    let put = put();
    let begun = Instant::now();
    world.apply(put.clone());
    println!("| put {SERVICES} new services | {:.1?} |", begun.elapsed());

    // Replicas are placed as plans are adopted.
    let (sent, recent) = (BTreeMap::new(), BTreeMap::new());
    for _ in 0..ROUNDS_MAX {
        let view = View { state: &world.state, inventory: &inventory, sent: &sent, recent: &recent, now: NOW };
        let made = plan(view, &route::tables(view));
        if made.steps.is_empty() {
            break;
        }
        world.apply(Command::Adopt { parent: made.parent, steps: made.steps, announcements: Vec::new() });
    }
    let placed = world.state.placements.len();
    let state = &world.state;
    let view = View { state, inventory: &inventory, sent: &sent, recent: &recent, now: NOW };
    let tables = route::tables(view);
    row(&format!("plan, {placed} replicas placed"), || plan(view, &tables));
    row("the routing tables of all", || route::tables(view));
    row("a copy of the state", || state.clone());
    row("put the same services again, on a copy", || {
        let mut world = World { state: state.clone(), index: world.index };
        world.apply(put.clone());
        world
    });
}

/// What the Raft log does to a state.
struct World {
    state: State,
    index: u64,
}

impl World {
    fn apply(&mut self, command: Command) {
        self.index += 1;
        let applied = self.state.apply(self.index, Entry { at: NOW, actor: Actor::Orca, source: None, command });
        black_box(applied);
    }
}

fn put() -> Command {
    let service = |index: usize| {
        format!(
            "[[service]]\nname = \"s{index}\"\nimage = \"app:1\"\nport = 8080\nreplicas = 3\ndomain = \"s{index}.test\"\n\
             routes = [\"/*\"]\n"
        )
    };
    let name = Label::new("bench").expect("a label");
    let text = (0..SERVICES).map(service).collect();
    let read = project(&SourceFile { name: "service.toml".to_owned(), text }, &name).expect("it is valid");
    Command::PutServices(PutServices {
        project: read.name,
        services: read.services,
        prune: false,
        replace: false,
        if_generation: None,
        settings: None,
        recalls: true,
    })
}

/// Prints the median time of `work`.
fn row<T>(what: &str, work: impl Fn() -> T) {
    let mut times: Vec<Duration> = (0..RUNS)
        .map(|_| {
            let begin = Instant::now();
            let result = work();
            let took = begin.elapsed();
            drop(black_box(result));
            took
        })
        .collect();
    times.sort();
    println!("| {what} | {:.1?} |", times[RUNS / 2]);
}

//! Random people: they deploy, scale, restart, stop, roll back and remove, at random moments, two at a time.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use orca_cluster::command::Command;
use orca_cluster::command::put::PutServices;
use orca_cluster::id::{Label, ServiceName};
use orca_cluster::spec::Project;
use orca_cluster::spec::toml::{self, SourceFile};
use rand::Rng;

use super::World;

/// Does one thing; says after how many milliseconds the next is due. None once the faults are over.
pub fn act(world: &mut World) -> Option<u64> {
    if world.faults == super::Faults::default() {
        return None;
    }
    let services: Vec<ServiceName> = world.state.services.keys().cloned().collect();
    let any = match services.len() {
        0 => None,
        n => Some(services[world.rng.random_range(0..n)].clone()),
    };
    let command = match (world.rng.random_range(0..12), any) {
        (0..=4, _) | (_, None) => deploy(world),
        (5, Some(service)) => Command::Scale { service, replicas: world.rng.random_range(0..4) },
        (6, Some(service)) => Command::Restart { service, pull: world.rng.random_bool(0.3) },
        (7, Some(service)) => Command::Stop { service },
        (8, Some(service)) => Command::Start { service },
        (9, Some(service)) => Command::Rollback { service, to: None },
        (10, Some(service)) => Command::Promote { service },
        (_, Some(service)) => match world.rng.random_bool(0.3) {
            true => Command::Remove { service, volumes: world.rng.random_bool(0.5) },
            false => Command::Start { service },
        },
    };
    world.command(command);
    Some(world.rng.random_range(200..15_000))
}

fn deploy(world: &mut World) -> Command {
    let mut text = String::new();
    let always = ["web", "api", "db"][world.rng.random_range(0..3)];
    for name in ["web", "api", "db"] {
        if name != always && !world.rng.random_bool(0.5) {
            continue;
        }
        let behaviour = match world.rng.random_range(0..10) {
            0 => "crash",
            1 => "deaf",
            2 => "missing",
            3 | 4 => "slow",
            _ => "ok",
        };
        let version = world.rng.random_range(1..6);
        let exclusive = name == "db";
        let replicas = if exclusive { 1 } else { world.rng.random_range(0..4) };
        let strategy = ["rolling", "rolling", "recreate", "blue-green"][world.rng.random_range(0..4)];
        let _ = write!(
            text,
            "[[service]]\nname = \"{name}\"\nimage = \"{behaviour}:{version}\"\nport = 80\nreplicas = {replicas}\n"
        );
        if name == "api" {
            text.push_str("domain = \"api.example.com\"\n");
        }
        let _ = write!(text, "[service.deploy]\nready_timeout_secs = 20\ndrain_timeout_secs = 5\n");
        if exclusive {
            text.push_str("[[service.volume]]\nname = \"data\"\npath = \"/data\"\n");
        } else {
            let _ = write!(text, "strategy = \"{strategy}\"\n");
            if world.rng.random_bool(0.3) {
                text.push_str("max_unavailable = 1\nmax_surge = 0\n");
            }
        }
    }
    put(project(&text), world.rng.random_bool(0.1), world.rng.random_bool(0.3))
}

/// What a person would have written, parsed as they would have it parsed.
pub fn project(text: &str) -> Project {
    let file = SourceFile { name: "service.toml".to_owned(), text: text.to_owned() };
    let name = Label::new("app").expect("a label");
    toml::project(&file, &name).unwrap_or_else(|problems| panic!("{problems:#?}\n{text}"))
}

pub fn put(project: Project, prune: bool, replace: bool) -> Command {
    let services: BTreeMap<_, _> = project.services;
    Command::PutServices(PutServices { project: project.name, services, prune, replace, if_generation: None })
}

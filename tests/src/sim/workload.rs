//! Random people: they deploy, scale, restart, stop, roll back and remove, at random moments, two at a time.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use orca_cluster::command::Command;
use orca_cluster::command::put::PutServices;
use orca_cluster::id::{Label, ServiceName};
use orca_cluster::secret::{Ciphertext, DataKeyId, Opaque, Scope, SealedDataKey, SealedValue, SecretName};
use orca_cluster::spec::toml::{self, SourceFile};
use orca_cluster::spec::{Project, Service, Source};
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
        (9, Some(service)) => {
            let revisions: Vec<_> = world.state.services[&service].revisions.keys().copied().collect();
            let to = revisions[world.rng.random_range(0..revisions.len())];
            Command::Rollback { service, to: world.rng.random_bool(0.3).then_some(to) }
        }
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
    let mut taken = Vec::new();
    for name in ["web", "api", "db"] {
        if name != always && !world.rng.random_bool(0.5) {
            continue;
        }
        let behaviour = match world.rng.random_range(0..10) {
            0 => "crash",
            1 => "deaf",
            2 => "missing",
            3 | 4 => "slow",
            5 => "fades",
            _ => "ok",
        };
        let mut probes = "[service.env]\nKEY = \"${secrets.KEY}\"\n".to_owned();
        let version = world.rng.random_range(1..6);
        // Few, for a pull takes longer than people keep still.
        let pull = match world.rng.random_range(0..40) {
            0 | 1 => "-large",
            2 => "-stalls",
            _ => "",
        };
        let exclusive = name == "db";
        let replicas = if exclusive { 1 } else { world.rng.random_range(0..4) };
        // A canary needs requests to share.
        let routes = routes(world, name, &mut taken);
        let strategies = if routes.is_empty() { 4 } else { 5 };
        let strategy =
            ["rolling", "rolling", "recreate", "blue-green", "canary"][world.rng.random_range(0..strategies)];
        let _ = write!(
            text,
            "[[service]]\nname = \"{name}\"\nimage = \"{behaviour}:{version}{pull}\"\nport = 80\nreplicas = {replicas}\n"
        );
        text.push_str(&routes);
        if name == "api" && text.contains("name = \"web\"") && world.rng.random_bool(0.3) {
            text.push_str("depends_on = [\"web\"]\n");
        }
        let _ = write!(text, "[service.deploy]\nready_timeout_secs = 20\ndrain_timeout_secs = 5\n");
        if world.rng.random_bool(0.3) {
            let path = ["/ready", "/healthz", "/broken"][world.rng.random_range(0..3)];
            let _ = write!(probes, "[service.readiness]\npath = \"{path}\"\n");
        }
        if exclusive {
            text.push_str("[[service.volume]]\nname = \"data\"\npath = \"/data\"\n");
        } else {
            let _ = writeln!(text, "strategy = \"{strategy}\"");
            if strategy == "canary" && version > 3 {
                text.push_str("auto_promote = { after_secs = 10, success_rate = 90 }\n");
            }
            if world.rng.random_bool(0.3) {
                text.push_str("max_unavailable = 1\nmax_surge = 0\n");
            }
        }
        text.push_str(&probes);
    }
    put(project(&text), world.rng.random_bool(0.1), world.rng.random_bool(0.3))
}

/// Few hosts and paths for all services, so that they take them from each other, and cover each other's; of one file no
/// two the same.
fn routes(world: &mut World, name: &str, taken: &mut Vec<(&'static str, &'static str)>) -> String {
    let host = ["", "domain = \"a.example.com\"\n", "domain = \"b.example.com\"\n", "domain = \"*.example.com\"\n"]
        [world.rng.random_range(0..4)];
    let mut paths: Vec<&str> = ["/*", "/x/*", "/y/*"].into_iter().filter(|_| world.rng.random_bool(0.4)).collect();
    paths.retain(|path| !taken.contains(&(host, path)));
    // A database seldom has a route.
    if paths.is_empty() || name == "db" && world.rng.random_bool(0.7) {
        return String::new();
    }
    taken.extend(paths.iter().map(|path| (host, *path)));
    format!("{host}routes = {paths:?}\n")
}

/// A module that runs every minute.
pub fn deploy_job(more: &str) -> Command {
    let job = "[[service]]\nname = \"job\"\nmodule = \"./job.wasm\"\ntriggers = [\"cron:* * * * *\"]";
    put(project(&format!("{job}\n{more}\n")), false, false)
}

/// The only secret there is, set anew.
pub fn set_secret(world: &World) -> Command {
    let name = SecretName::new(None, "KEY").expect("a name");
    let version = world.state.secrets.get(&name).map_or(0, |record| record.version) + 1;
    let value = Ciphertext { nonce: Opaque(Vec::new()), bytes: Opaque(version.to_be_bytes().to_vec()) };
    let key = data_key_id();
    Command::SetSecret { name, version, value: SealedValue { key, version, value } }
}

/// What the secret is sealed with.
pub fn data_key(world: &World) -> Command {
    let key = Ciphertext { nonce: Opaque(Vec::new()), bytes: Opaque(Vec::new()) };
    Command::AddDataKey(SealedDataKey { id: data_key_id(), root: 1, created: world.now, key })
}

fn data_key_id() -> DataKeyId {
    DataKeyId { scope: Scope::Global, version: 1 }
}

/// One service of a project, and the others left as they are.
pub fn put_one(name: &ServiceName, spec: Service) -> Command {
    put(Project { name: name.project.clone(), services: BTreeMap::from([(name.service.clone(), spec)]) }, false, false)
}

/// What a person would have written, parsed as they would have it parsed.
pub fn project(text: &str) -> Project {
    let file = SourceFile { name: "service.toml".to_owned(), text: text.to_owned() };
    let name = Label::new("app").expect("a label");
    let mut project = toml::project(&file, &name).unwrap_or_else(|problems| panic!("{problems:#?}\n{text}"));
    for service in project.services.values_mut() {
        if let Source::Module(module) = &mut service.source {
            // Other bytes under another name.
            let content = module.path.bytes().fold(0_u64, |sum, byte| sum * 31 % 1_000_003 + u64::from(byte));
            module.digest = Some(format!("{content:064x}"));
        }
    }
    project
}

pub fn put(project: Project, prune: bool, replace: bool) -> Command {
    Command::PutServices(PutServices {
        project: project.name,
        services: project.services,
        prune,
        replace,
        if_generation: None,
        settings: None,
        recalls: true,
    })
}

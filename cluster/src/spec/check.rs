//! Everything that must be true of a service, whoever wrote it. People's TOML and other Orcas' JSON end in the same
//! values, so the rules are here once, on values; [`toml`](super::toml) only knows where in the file each of them stands.
//! A rule about one part of a service names its [`Place`] by the key people write; whoever reads a file finds the line.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{
    Allowance, AutoPromote, Check, Deploy, Host, HostAccess, Module, ModuleLimits, Placement, Probe, Project, Registry,
    SecretsAs, Service, Settings, Source, Strategy, Volume, VolumeSource, image, path_prefix,
};
use crate::id::Label;
use crate::resource::{Cpu, MEMORY_MIN, Memory, Resources};

/// Most services of one project: five times the largest we are built for.
pub const SERVICES_MAX: usize = 500;
/// Most replicas of one service: 25 on each of 20 servers.
pub const REPLICAS_MAX: u32 = 500;
/// Most routes of one service; each is a row in every proxy's table.
pub const ROUTES_MAX: usize = 256;
/// Most bytes of all names and values of a service's environment: Linux gives one argument 128 KiB.
pub const ENV_BYTES_MAX: usize = 128 << 10;
/// Most characters of a variable's name.
pub const ENV_NAME_LENGTH_MAX: usize = 255;
/// Most arguments of a command.
pub const ARGUMENTS_MAX: usize = 256;
/// Most bytes of all arguments of a command; as for the environment.
pub const ARGUMENT_BYTES_MAX: usize = 128 << 10;
/// Most services one service starts after.
pub const DEPENDENCIES_MAX: usize = 64;
/// Most volumes of one service.
pub const VOLUMES_MAX: usize = 32;
/// Most schedules of one service.
pub const SCHEDULES_MAX: usize = 32;
/// Most hosts on a module's list.
pub const OUTBOUND_MAX: usize = 64;
/// Most labels a placement asks for, and most paths of a policy.
pub const LABELS_MAX: usize = 32;
/// Most bytes of a path on disk (Linux, `PATH_MAX`).
pub const FILE_PATH_LENGTH_MAX: usize = 4095;
/// Most characters of a schedule.
pub const SCHEDULE_LENGTH_MAX: usize = 128;

/// The longest any time-out, delay or interval may be: beyond an hour it is a typing error in every case we know.
pub const SPAN_MAX: Duration = Duration::from_secs(3600);
/// The shortest interval between probes: more often is a load test.
pub const PROBE_INTERVAL_MIN: Duration = Duration::from_millis(100);
/// The shortest time a probe or a request may be given.
pub const TIMEOUT_MIN: Duration = Duration::from_millis(10);
/// Most failures or successes in a row that a probe may wait for.
pub const THRESHOLD_MAX: u32 = 100;
/// The least share of a CPU that Docker accepts as a limit.
pub const CPU_MIN: Cpu = Cpu(10);
/// More CPUs than any server we know has.
pub const CPU_MAX: Cpu = Cpu(1_024_000);
/// All that a 32-bit module can address.
pub const MODULE_MEMORY_MAX: Memory = Memory(4 << 30);
/// Most requests at once in one replica of a module.
pub const CONCURRENCY_MAX: u32 = 10_000;

/// Something about a service or a project that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{at}: {message}")]
pub struct Fault {
    pub at: Place,
    pub kind: Kind,
    pub message: String,
    pub hint: Option<String>,
    /// Whether the key at `at` is to be pointed at and not its value.
    pub is_key: bool,
    /// What it was concluded from besides `at`: if one of these is wrong itself, this may be no fault at all.
    pub given: Vec<Place>,
}

/// What sort of mistake it is, for programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Not TOML.
    Syntax,
    /// Too long or too deep to be looked at.
    Size,
    UnknownKey,
    /// A number where a text belongs, and the like.
    Type,
    /// The right type and not a possible value.
    Value,
    Missing,
    /// Possible by itself, and not together with something else.
    Conflict,
    /// Right, and Orca cannot do it yet.
    Unsupported,
}

/// Where something stands, by the keys people write: `deploy.strategy`, `volume[0].path`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Place(Vec<Step>);

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    Key(Cow<'static, str>),
    Index(usize),
}

impl Place {
    /// From keys with dots in between.
    pub fn of(keys: &'static str) -> Place {
        Place(keys.split('.').filter(|key| !key.is_empty()).map(|key| Step::Key(Cow::Borrowed(key))).collect())
    }

    #[must_use]
    pub fn key(&self, key: impl Into<Cow<'static, str>>) -> Place {
        self.and(Step::Key(key.into()))
    }

    #[must_use]
    pub fn index(&self, index: usize) -> Place {
        self.and(Step::Index(index))
    }

    /// `inner`, seen from where `self` is seen from.
    #[must_use]
    pub fn within(&self, inner: &Place) -> Place {
        Place(self.0.iter().chain(&inner.0).cloned().collect())
    }

    pub fn steps(&self) -> &[Step] {
        &self.0
    }

    /// Whether one of the two contains the other.
    pub fn touches(&self, other: &Place) -> bool {
        self.0.iter().zip(&other.0).all(|(mine, theirs)| mine == theirs)
    }

    fn and(&self, step: Step) -> Place {
        let mut steps = self.0.clone();
        steps.push(step);
        Place(steps)
    }
}

impl FromIterator<Step> for Place {
    fn from_iter<I: IntoIterator<Item = Step>>(steps: I) -> Place {
        Place(steps.into_iter().collect())
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, step) in self.0.iter().enumerate() {
            match step {
                Step::Key(key) if at == 0 => write!(f, "{key}")?,
                Step::Key(key) => write!(f, ".{key}")?,
                Step::Index(index) => write!(f, "[{index}]")?,
            }
        }
        Ok(())
    }
}

/// All that is wrong with one service by itself.
pub fn service(service: &Service) -> Vec<Fault> {
    // Without `..`: a field that is added is checked, or someone decides here that it need not be.
    let Service {
        name,
        source,
        command,
        port,
        replicas,
        routes: _,
        env,
        secrets_as,
        resources,
        liveness,
        readiness,
        depends_on,
        deploy,
        placement,
        volumes,
        schedules,
        limits,
        registry,
        host,
        response_timeout,
    } = service;
    let mut faults = Faults::default();
    match source {
        Source::Image(image) => {
            faults.image(image);
            faults.image_only(limits, schedules.len());
        }
        Source::Module(module) => {
            faults.module(module);
            faults.module_only(command, *port, *secrets_as, volumes, registry, host);
        }
    }
    faults.arguments("command", command);
    faults.port(service);
    faults.response_timeout(service, *response_timeout);
    if *replicas > REPLICAS_MAX {
        faults.add("replicas", format!("a service has at most {REPLICAS_MAX} replicas, not {replicas}"));
    }
    faults.routes(service);
    faults.env(env);
    faults.resources(resources, limits, service.is_module());
    for (key, probe) in [("liveness", liveness), ("readiness", readiness)] {
        if let Some(probe) = probe {
            faults.probe(key, probe, service.is_module());
        }
    }
    if depends_on.contains(name) {
        faults.add("depends_on", format!("`{name}` cannot start after itself"));
    }
    faults.at_most("depends_on", depends_on.len(), DEPENDENCIES_MAX, "services to start after");
    faults.deploy(service, deploy);
    faults.placement(placement);
    faults.volumes(volumes, *secrets_as);
    faults.schedules(service);
    faults.limits(limits);
    faults.0
}

/// All that is wrong with a project: with each service, and between them.
pub fn project(project: &Project) -> Vec<Fault> {
    let services: Vec<&Service> = project.services.values().collect();
    let within = |name: &Label, fault: Fault| Fault {
        at: Place::of("services").key(name.to_string()).within(&fault.at),
        ..fault
    };
    let mut faults = Vec::new();
    for (name, one) in &project.services {
        if *name != one.name {
            let at = Place::of("services").key(name.to_string());
            faults.push(Fault::new(at, format!("the service kept under `{name}` calls itself `{}`", one.name)));
        }
        faults.extend(service(one).into_iter().map(|fault| within(name, fault)));
    }
    faults.extend(together(&services).into_iter().map(|(at, fault)| within(&services[at].name, fault)));
    faults
}

/// All that is wrong between services of one project, each with the position of the one to blame.
pub fn together(services: &[&Service]) -> Vec<(usize, Fault)> {
    if services.len() > SERVICES_MAX {
        let message = format!("a project has at most {SERVICES_MAX} services, this one has {}", services.len());
        return vec![(SERVICES_MAX, Fault::conflict(Place::of("name"), message, "make two projects of it"))];
    }
    let mut faults = Vec::new();
    let mut names = BTreeMap::new();
    let mut volumes = BTreeMap::new();
    let mut routes = BTreeMap::new();
    for (at, service) in services.iter().enumerate() {
        if let Some(first) = names.insert(&service.name, at) {
            names.insert(&service.name, first);
            let message = format!("there is already a service named `{}`", service.name);
            let hint = "each service of a project has a name of its own";
            faults.push((at, Fault::conflict(Place::of("name"), message, hint)));
        }
        for (index, volume) in service.volumes.iter().enumerate() {
            let VolumeSource::Named(name) = &volume.source else {
                continue;
            };
            if let Some(owner) = volumes.get(name) {
                let place = Place::of("volume").index(index).key("name");
                let message = format!("the volume `{name}` is already used by `{owner}`");
                let hint = "a volume belongs to one service, at one path; give this one another name";
                faults.push((at, Fault::conflict(place, message, hint)));
            } else {
                volumes.insert(name, &service.name);
            }
        }
        for route in service.routes.iter().take(ROUTES_MAX) {
            if let Some(owner) = routes.get(route) {
                let message = format!("`{route}` is already routed to `{owner}`");
                let place = Place::of("routes").key(route.to_string());
                faults.push((at, Fault::conflict(place, message, "give one of the two another domain or path")));
            } else {
                routes.insert(route, &service.name);
            }
        }
        for wanted in service.depends_on.iter().take(DEPENDENCIES_MAX) {
            if services.iter().all(|other| other.name != *wanted) {
                let place = Place::of("depends_on").key(wanted.to_string());
                let mut fault = Fault::new(place, format!("there is no service `{wanted}` in this project"));
                fault.hint = super::toml::suggestion(wanted.as_str(), services.iter().map(|s| s.name.as_str()));
                faults.push((at, fault));
            }
        }
    }
    faults.extend(circles(services));
    faults
}

/// The circles in `depends_on`, found without recursion: whatever does not wait for anything is taken away, again and
/// again; in what is left every service waits for another one, so following them must lead round.
fn circles(services: &[&Service]) -> Vec<(usize, Fault)> {
    let mut waiting: BTreeMap<&Label, (usize, BTreeSet<&Label>)> = BTreeMap::new();
    for (at, service) in services.iter().enumerate() {
        // A service that waits for itself has been told so.
        let before = service.depends_on.iter().filter(|name| **name != service.name).collect();
        waiting.entry(&service.name).or_insert((at, before));
    }
    let mut faults = Vec::new();
    loop {
        loop {
            let free: Vec<&Label> = waiting
                .iter()
                .filter(|(_, (_, before))| before.iter().all(|name| !waiting.contains_key(name)))
                .map(|(name, _)| *name)
                .collect();
            if free.is_empty() {
                break;
            }
            for name in free {
                waiting.remove(name);
            }
        }
        let Some(start) = waiting.keys().next() else {
            return faults;
        };
        let mut path = vec![*start];
        let circle = loop {
            let last = path[path.len() - 1];
            let next = waiting[last].1.iter().find(|name| waiting.contains_key(*name));
            let next = next.expect("every service that is left waits for one that is left");
            if let Some(at) = path.iter().position(|name| name == next) {
                break path.split_off(at);
            }
            path.push(next);
        };
        let shown: Vec<&str> = circle.iter().chain(circle.first()).map(|name| name.as_str()).collect();
        let message = format!("these wait for each other, so none can start: {}", shown.join(" -> "));
        let second = circle.get(1).unwrap_or(&circle[0]);
        let place = Place::of("depends_on").key(second.to_string());
        faults.push((waiting[circle[0]].0, Fault::conflict(place, message, "take one of them out of `depends_on`")));
        for name in circle {
            waiting.remove(name);
        }
    }
}

/// All that is wrong with the settings of a cluster.
pub fn settings(settings: &Settings) -> Vec<Fault> {
    let Settings { name, domain, log_level, allow_host } = settings;
    let mut faults = Faults::default();
    let later = [
        (name.is_some(), "cluster.name", "a cluster's name in its settings", NAME_HINT),
        (domain.is_some(), "cluster.domain", "a domain for the whole cluster", DOMAIN_HINT),
        (log_level.is_some(), "cluster.log_level", "a log level for the whole cluster", LOG_LEVEL_HINT),
    ];
    for (_, at, what, hint) in later.into_iter().filter(|(is_set, ..)| *is_set) {
        faults.add(at, format!("not supported yet: {what}")).of_key().of_kind(Kind::Unsupported).advise(hint);
    }
    faults.at_most("policy.allow_host", allow_host.len(), LABELS_MAX, "entries");
    for entry in allow_host.iter().take(LABELS_MAX) {
        let problem = match entry {
            Allowance::Privileged | Allowance::Network => continue,
            Allowance::Below(path) => match file_path(path) {
                Err(problem) => problem,
                Ok(()) if path == "/" => "`/` would allow every path of the host".to_owned(),
                Ok(()) => continue,
            },
        };
        faults
            .add_at(Place::of("policy.allow_host").key(entry.to_string()), problem)
            .advise("write host paths such as \"/srv/media\", or \"privileged\", or \"network\"");
    }
    faults.0
}

const NAME_HINT: &str = "leave it out; `orca server --name` names a node";
const DOMAIN_HINT: &str = "leave it out, and give each service its `domain`";
const LOG_LEVEL_HINT: &str = "leave it out, and set ORCA_LOG where the server runs";

pub const LOG_LEVELS: [&str; 5] = ["error", "warn", "info", "debug", "trace"];

impl Fault {
    pub fn new(at: Place, message: impl Into<String>) -> Fault {
        Fault { at, kind: Kind::Value, message: message.into(), hint: None, is_key: false, given: Vec::new() }
    }

    fn conflict(at: Place, message: impl Into<String>, hint: &str) -> Fault {
        Fault { kind: Kind::Conflict, hint: Some(hint.to_owned()), ..Fault::new(at, message) }
    }

    fn given(&mut self, places: &[&'static str]) -> &mut Fault {
        if self.kind == Kind::Value {
            self.kind = Kind::Conflict;
        }
        self.given.extend(places.iter().map(|keys| Place::of(keys)));
        self
    }

    fn of_key(&mut self) -> &mut Fault {
        self.is_key = true;
        self
    }

    fn of_kind(&mut self, kind: Kind) -> &mut Fault {
        self.kind = kind;
        self
    }

    fn advise(&mut self, hint: impl Into<String>) -> &mut Fault {
        self.hint = Some(hint.into());
        self
    }
}

/// Where the routes of a service are written.
const ROUTE_KEYS: [&str; 5] = ["domain", "domains", "routes", "triggers", "module"];

#[derive(Default)]
struct Faults(Vec<Fault>);

impl Faults {
    fn add(&mut self, at: &'static str, message: impl Into<String>) -> &mut Fault {
        self.add_at(Place::of(at), message)
    }

    fn add_at(&mut self, at: Place, message: impl Into<String>) -> &mut Fault {
        self.0.push(Fault::new(at, message));
        self.0.last_mut().expect("one was pushed")
    }

    fn push(&mut self, at: &'static str, message: String) {
        self.0.push(Fault::new(Place::of(at), message));
    }

    /// Of more than there may be, only as many are looked at: the rest may be a million.
    fn at_most(&mut self, at: &'static str, count: usize, max: usize, what: &str) {
        if count > max {
            self.push(at, format!("there may be at most {max} {what}"));
        }
    }

    fn span(&mut self, at: Place, span: Duration, min: Duration, max: Duration) {
        if span < min || span > max {
            let [span, min, max] = [span, min, max].map(|span| span.as_secs_f64());
            self.add_at(at, format!("{span} seconds is out of range: {min} to {max}"));
        }
    }

    fn image(&mut self, image: &str) {
        if let Err(error) = image::check(image) {
            let hint = match &error {
                image::ImageError::Scheme(scheme) => format!("write `{}`", &image[scheme.len()..]),
                image::ImageError::UpperCase(_) => format!("write `{}`", image.to_lowercase()),
                _ => "such as `redis:7` or `ghcr.io/org/app:1.4.2`".to_owned(),
            };
            self.add("image", error.to_string()).advise(hint);
        }
    }

    /// What only a module can have.
    fn image_only(&mut self, limits: &ModuleLimits, schedules: usize) {
        if !limits.outbound.is_empty() {
            self.push("module.outbound", "only a module has a list of hosts it may reach".to_owned());
        }
        if schedules > 0 {
            self.add("triggers", "not supported yet: schedules for a container")
                .of_kind(Kind::Unsupported)
                .advise("run cron inside the image, or make the job a module")
                .given(&["image", "module"]);
        }
    }

    fn module(&mut self, module: &Module) {
        let Module { path, digest } = module;
        if path.is_empty() || path.contains('\0') || path.len() > FILE_PATH_LENGTH_MAX {
            self.add("module.path", "this is no path of a file").advise("name a component: `module = \"./api.wasm\"`");
        }
        if digest.as_deref().is_some_and(|digest| !image::is_sha256(digest)) {
            self.push("module.digest", "a digest is 64 characters 0-9 and a-f".to_owned());
        }
    }

    /// What only a container can have.
    fn module_only(
        &mut self,
        command: &[String],
        port: Option<u16>,
        secrets_as: SecretsAs,
        volumes: &[Volume],
        registry: &Option<Registry>,
        host: &HostAccess,
    ) {
        let HostAccess { privileged, network } = *host;
        let no_process = "a module is called inside Orca: it has no process, no port and no files";
        for (is_given, key) in [
            (!command.is_empty(), "command"),
            (port.is_some(), "port"),
            (secrets_as == SecretsAs::Files, "secrets_as"),
            (!volumes.is_empty(), "volume"),
            (registry.is_some(), "registry"),
            (privileged, "privileged"),
            (network, "network"),
        ] {
            if is_given {
                self.add(key, format!("a module cannot have `{key}`")).of_key().advise(no_process).given(&["module"]);
            }
        }
    }

    fn arguments(&mut self, at: &'static str, arguments: &[String]) {
        self.at_most(at, arguments.len(), ARGUMENTS_MAX, "arguments");
        let bytes: usize = arguments.iter().map(String::len).sum();
        if bytes > ARGUMENT_BYTES_MAX {
            self.push(
                at,
                format!("all arguments together have at most {ARGUMENT_BYTES_MAX} bytes, these have {bytes}"),
            );
        }
        if arguments.iter().any(|argument| argument.contains('\0')) {
            self.push(at, "an argument may not contain a NUL character".to_owned());
        }
        if arguments.first().is_some_and(String::is_empty) {
            self.push(at, "the first argument may not be empty".to_owned());
        }
    }

    fn response_timeout(&mut self, service: &Service, response_timeout: Option<Duration>) {
        const KEY: &str = "response_timeout_secs";
        let Some(span) = response_timeout else { return };
        self.span(Place::of(KEY), span, Duration::from_secs(1), SPAN_MAX);
        if service.is_module() {
            self.add(KEY, format!("a module cannot have `{KEY}`"))
                .of_key()
                .advise("its time is a limit of its own: `module = { path = \"…\", timeout_secs = … }`")
                .given(&["module"]);
        } else if service.port.is_none() {
            self.add(KEY, format!("`{KEY}` needs a `port`: without one nobody sends requests"))
                .of_key()
                .advise("add `port`, or leave it out")
                .given(&["port"]);
        }
    }

    fn port(&mut self, service: &Service) {
        let name = &service.name;
        if service.port == Some(0) {
            self.push("port", "a port is a number from 1 to 65535".to_owned());
        }
        if service.is_module() || service.port.is_some() {
            return;
        }
        let probed = [&service.liveness, &service.readiness].into_iter().flatten().any(|probe| match probe.check {
            Check::Http(_) | Check::Tcp | Check::Grpc => true,
            Check::Exec(_) => false,
        });
        let why = match (service.routes.is_empty(), probed) {
            (false, _) => "requests are routed to it",
            (true, true) => "it is probed over the network",
            (true, false) => return,
        };
        self.add("port", format!("`{name}` needs `port`: {why}"))
            .of_kind(Kind::Missing)
            .advise("the TCP port that the process listens on: `port = 8080`")
            .given(&ROUTE_KEYS)
            .given(&["image", "health", "liveness", "readiness"]);
    }

    fn routes(&mut self, service: &Service) {
        self.at_most("routes", service.routes.len(), ROUTES_MAX, "routes");
        for route in service.routes.iter().take(ROUTES_MAX) {
            let host_is_right = match &route.host {
                Host::Exact(name) => name.parse() == Ok(route.host.clone()),
                Host::Wildcard(name) => format!("*.{name}").parse() == Ok(route.host.clone()),
                Host::Any => true,
            };
            if !host_is_right || path_prefix(&route.path).as_ref() != Ok(&route.path) {
                self.push("routes", format!("`{route}` is no route"));
            }
        }
    }

    fn env(&mut self, env: &BTreeMap<String, super::Template>) {
        let mut bytes = 0;
        for (name, value) in env {
            let value = value.to_string();
            bytes += name.len() + value.len();
            if !is_env_name(name) {
                self.add_at(Place::of("env").key(name.clone()), format!("`{name}` is no name for a variable"))
                    .of_key()
                    .advise("letters, digits, `_`, `.` and `-`, not starting with a digit, `.` or `-`");
            }
            if value.contains('\0') {
                self.add_at(Place::of("env").key(name.clone()), "a value may not contain a NUL character");
            }
        }
        if bytes > ENV_BYTES_MAX {
            self.add("env", format!("the environment has at most {ENV_BYTES_MAX} bytes, this one has {bytes}"))
                .advise("keep large values in a file of the image or in a volume");
        }
    }

    fn resources(&mut self, resources: &Resources, limits: &ModuleLimits, is_module: bool) {
        let Resources { memory, cpu } = *resources;
        for amount in memory.into_iter().chain([limits.memory]) {
            if amount < MEMORY_MIN {
                self.add("resources.memory", format!("{amount} of memory is less than the least, {MEMORY_MIN}"));
                break;
            }
        }
        if is_module && limits.memory > MODULE_MEMORY_MAX {
            self.push("resources.memory", format!("a module can use at most {MODULE_MEMORY_MAX} of memory"));
        }
        if let Some(cpu) = cpu
            && (cpu < CPU_MIN || cpu > CPU_MAX)
        {
            self.push("resources.cpu", format!("{cpu} CPUs is out of range: {CPU_MIN} to {CPU_MAX}"));
        }
    }

    fn probe(&mut self, key: &'static str, probe: &Probe, is_module: bool) {
        let Probe { check, interval, timeout, failure_threshold, success_threshold, initial_delay } = probe;
        let place = Place::of(key);
        let only_http = |what: &str, faults: &mut Faults| {
            if is_module {
                let fault = faults.add_at(place.key(what.to_owned()), format!("a module cannot be probed by `{what}`"));
                fault.of_key().advise("give the probe a `path`").given(&["module"]);
            }
        };
        match check {
            Check::Http(path) => {
                if let Err(problem) = request_path(path) {
                    self.add_at(place.key("path"), problem).advise("such as \"/healthz\"").given(&["health"]);
                }
            }
            Check::Tcp => only_http("tcp", self),
            Check::Grpc => only_http("grpc", self),
            Check::Exec(command) => {
                only_http("exec", self);
                if command.is_empty() {
                    self.add_at(place.key("exec"), "`exec` needs a command")
                        .advise("such as `exec = [\"pg_isready\"]`");
                }
                let mut inner = Faults::default();
                inner.arguments("exec", command);
                self.0.extend(inner.0.into_iter().map(|fault| Fault { at: place.within(&fault.at), ..fault }));
            }
        }
        self.span(place.key("interval_secs"), *interval, PROBE_INTERVAL_MIN, SPAN_MAX);
        self.span(place.key("timeout_secs"), *timeout, TIMEOUT_MIN, SPAN_MAX);
        self.span(place.key("initial_delay_secs"), *initial_delay, Duration::ZERO, SPAN_MAX);
        for (key, count) in [("failure_threshold", *failure_threshold), ("success_threshold", *success_threshold)] {
            if !(1..=THRESHOLD_MAX).contains(&count) {
                self.add_at(place.key(key), format!("{count} is out of range: 1 to {THRESHOLD_MAX}"));
            }
        }
    }

    fn deploy(&mut self, service: &Service, deploy: &Deploy) {
        let Deploy { strategy, max_unavailable, max_surge, ready_timeout, drain_timeout, stop_grace, auto_promote } =
            deploy;
        for (at, count) in [("deploy.max_unavailable", *max_unavailable), ("deploy.max_surge", *max_surge)] {
            if count > REPLICAS_MAX {
                self.push(at, format!("{count} is out of range: 0 to {REPLICAS_MAX}"));
            }
        }
        self.span(Place::of("deploy.ready_timeout_secs"), *ready_timeout, Duration::from_secs(1), SPAN_MAX);
        self.span(Place::of("deploy.drain_timeout_secs"), *drain_timeout, Duration::ZERO, SPAN_MAX);
        self.span(Place::of("deploy.stop_grace_secs"), *stop_grace, Duration::ZERO, SPAN_MAX);
        if let Some(AutoPromote { after, success_per_10_000 }) = auto_promote {
            self.span(Place::of("deploy.auto_promote.after_secs"), *after, Duration::from_secs(1), SPAN_MAX);
            if !(1..=10_000).contains(success_per_10_000) {
                let at = "deploy.auto_promote.success_rate";
                self.push(at, "a success rate is more than 0 and at most 100 per cent".to_owned());
            }
            if !matches!(strategy, Strategy::Canary { .. }) {
                self.add("deploy.auto_promote", "`auto_promote` needs strategy \"canary\"")
                    .advise("add `strategy = \"canary\"`, or leave it out")
                    .given(&["deploy.strategy"]);
            }
        }

        let replaces_one_by_one = match strategy {
            Strategy::Rolling => true,
            Strategy::Canary { weight } => {
                if !(1..=99).contains(weight) {
                    self.push("deploy.canary_weight", "a canary gets 1 to 99 per cent of the requests".to_owned());
                }
                if service.routes.is_empty() {
                    self.add(
                        "deploy.strategy",
                        "a canary needs requests to share, and nothing is routed to this service",
                    )
                    .advise("give it a `domain` or `routes`, or use strategy \"rolling\"")
                    .given(&ROUTE_KEYS);
                }
                true
            }
            Strategy::Recreate | Strategy::BlueGreen => false,
        };
        if replaces_one_by_one && *max_unavailable == 0 && *max_surge == 0 {
            self.add(
                "deploy.max_surge",
                "with `max_surge` and `max_unavailable` both 0 no replica could ever be replaced",
            )
            .advise("leave one of them out: by default one new replica starts before an old one stops")
            .given(&["deploy.max_unavailable", "deploy.strategy"]);
        }
        let exclusive = service.volumes.iter().find_map(|volume| match &volume.source {
            VolumeSource::Named(name) if !volume.read_only => Some(name),
            VolumeSource::Named(_) | VolumeSource::Host(_) => None,
        });
        if let Some(volume) = exclusive {
            if *strategy != Strategy::Recreate {
                self.add(
                    "deploy.strategy",
                    format!("the old and the new replica cannot both hold the volume `{volume}`"),
                )
                .advise("use strategy \"recreate\" (the default with volumes), or keep the data in another service")
                .given(&["volume"]);
            }
            if service.replicas > 1 {
                self.add("replicas", format!("{} replicas cannot all hold the volume `{volume}`", service.replicas))
                    .advise("use 1 replica, or keep the data in a service of its own")
                    .given(&["volume"]);
            }
        } else if service.is_exclusive() && *strategy != Strategy::Recreate {
            self.add("deploy.strategy", "the old and the new replica cannot both have the port on the host's network")
                .advise("use strategy \"recreate\" (the default with `network = \"host\"` and a port)")
                .given(&["network", "port"]);
        }
    }

    fn placement(&mut self, placement: &Placement) {
        let Placement { node, labels, spread } = placement;
        if node.as_ref().is_some_and(|node| !is_label(node)) {
            self.push("placement.node", "this is no name of a node".to_owned());
        }
        self.at_most("placement.labels", labels.len(), LABELS_MAX, "labels");
        for (key, value) in labels.iter().take(LABELS_MAX) {
            if !is_label(key) || !is_label(value) {
                self.add_at(Place::of("placement.labels").key(key.clone()), format!("`{key}` = `{value}` is no label"))
                    .advise("1 to 253 letters, digits, `.`, `_`, `/` and `-`");
            }
        }
        if spread.as_ref().is_some_and(|label| !is_label(label)) {
            self.push("placement.spread", "this is no name of a label".to_owned());
        }
    }

    fn volumes(&mut self, volumes: &[Volume], secrets_as: SecretsAs) {
        self.at_most("volume", volumes.len(), VOLUMES_MAX, "volumes");
        for (index, volume) in volumes.iter().enumerate().take(VOLUMES_MAX) {
            let Volume { source, path, read_only: _ } = volume;
            let place = Place::of("volume").index(index);
            if let VolumeSource::Host(host) = source
                && let Err(problem) = file_path(host)
            {
                self.add_at(place.key("host"), problem).advise("an absolute path of the host: \"/srv/media\"");
            }
            let at = place.key("path");
            if let Err(problem) = file_path(path) {
                self.add_at(at, problem).advise("an absolute path inside the container: \"/data\"");
            } else if path == "/" || ["/proc", "/sys", "/dev"].iter().any(|dir| is_within(path, dir)) {
                self.add_at(at, format!("a volume cannot replace `{path}`")).advise("such as \"/data\"");
            } else if secrets_as == SecretsAs::Files && (is_within(path, SECRETS_PATH) || is_within(SECRETS_PATH, path))
            {
                self.add_at(at, format!("a volume at `{path}` would hide the secrets in `{SECRETS_PATH}`"))
                    .given(&["secrets_as"]);
            } else if volumes[..index].iter().any(|before| before.path == *path) {
                self.add_at(at, format!("there is already a volume at `{path}`"));
            }
        }
    }

    fn schedules(&mut self, service: &Service) {
        self.at_most("triggers", service.schedules.len(), SCHEDULES_MAX, "schedules");
        for schedule in service.schedules.iter().take(SCHEDULES_MAX) {
            if let Err(problem) = cron(&schedule.cron) {
                self.push("triggers", problem);
            }
        }
    }

    fn limits(&mut self, limits: &ModuleLimits) {
        let ModuleLimits { memory: _, timeout, concurrency, outbound } = limits;
        self.span(Place::of("module.timeout_secs"), *timeout, TIMEOUT_MIN, SPAN_MAX);
        if !(1..=CONCURRENCY_MAX).contains(concurrency) {
            self.push("module.max_concurrent", format!("{concurrency} is out of range: 1 to {CONCURRENCY_MAX}"));
        }
        self.at_most("module.outbound", outbound.len(), OUTBOUND_MAX, "hosts");
        for target in outbound.iter().take(OUTBOUND_MAX) {
            if let Err(problem) = outbound_host(target) {
                let place = Place::of("module.outbound").key(target.clone());
                self.add_at(place, problem).advise("such as \"api.example.com\" or \"*.example.com:8443\"");
            }
        }
    }
}

/// Where secrets appear as files.
const SECRETS_PATH: &str = "/run/secrets";

/// Whether this can be the name of a variable. More than a shell allows: `discovery.type` is one that people need.
pub fn is_env_name(text: &str) -> bool {
    text.len() <= ENV_NAME_LENGTH_MAX
        && text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'))
}

/// A label of a node, `KEY=VALUE`, in the form that `placement.labels` can ask for.
pub fn node_label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if is_label(key) && is_label(value) => Ok((key.to_owned(), value.to_owned())),
        _ => {
            Err(format!("`{text}` is no label; write KEY=VALUE, each of 1 to 253 letters, digits, `.`, `_`, `/`, `-`"))
        }
    }
}

fn is_label(text: &str) -> bool {
    (1..=super::HOST_LENGTH_MAX).contains(&text.len())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '/' | '-'))
}

/// Whether this is an absolute path in its only form: what `[policy] allow_host` is compared with must not have a
/// second spelling.
pub fn file_path(text: &str) -> Result<(), String> {
    if !text.starts_with('/') {
        return Err("the path must be absolute".to_owned());
    }
    if text.len() > FILE_PATH_LENGTH_MAX {
        return Err(format!("a path has at most {FILE_PATH_LENGTH_MAX} bytes, this one has {}", text.len()));
    }
    if text.chars().any(char::is_control) {
        return Err("a path may not contain control characters".to_owned());
    }
    // Docker takes `:` to end the path.
    if text.contains(':') {
        return Err("a path may not contain `:`".to_owned());
    }
    if text != "/" && text[1..].split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Err("the path may not have an empty part, `.`, `..` or a slash at its end".to_owned());
    }
    Ok(())
}

/// Whether `path` is `directory` or below it.
pub fn is_within(path: &str, directory: &str) -> bool {
    path.strip_prefix(directory).is_some_and(|rest| rest.is_empty() || rest.starts_with('/') || directory == "/")
}

/// Whether this can be asked for by GET: a path, perhaps with a query.
pub fn request_path(text: &str) -> Result<(), String> {
    if !text.starts_with('/') {
        return Err("a path starts with `/`".to_owned());
    }
    if text.len() > super::PATH_LENGTH_MAX {
        return Err(format!("a path has at most {} characters", super::PATH_LENGTH_MAX));
    }
    match text.chars().find(|c| !c.is_ascii_graphic() || *c == '#') {
        Some(bad) => Err(format!("a path may not contain `{bad}`")),
        None => Ok(()),
    }
}

/// Whether this is a schedule of five fields that can be understood.
pub fn cron(text: &str) -> Result<(), String> {
    let fields = text.split_ascii_whitespace().count();
    if fields != 5 || !text.is_ascii() || text.len() > SCHEDULE_LENGTH_MAX {
        return Err("a schedule has five fields, in UTC: minute, hour, day, month, weekday".to_owned());
    }
    let parser = croner::parser::CronParser::builder()
        .seconds(croner::parser::Seconds::Disallowed)
        .year(croner::parser::Year::Disallowed)
        .build();
    match parser.parse(text) {
        Ok(_) => Ok(()),
        Err(error) => {
            // Its messages begin with the kind of error and a capital.
            let error = error.to_string().to_lowercase();
            let cause = error.split_once(": ").map_or(error.as_str(), |(_, cause)| cause);
            Err(format!("`{text}` is no schedule: {}", cause.trim_end_matches('.')))
        }
    }
}

/// Whether this is a host, perhaps with a port, that a module can be allowed to reach.
fn outbound_host(text: &str) -> Result<(), String> {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !port.contains('/') && !host.contains(':') => (host, Some(port)),
        _ => (text, None),
    };
    if port.is_some_and(|port| !port.parse::<u16>().is_ok_and(|port| port != 0)) {
        return Err(format!("`{text}` does not end with a port"));
    }
    match host.parse::<Host>() {
        Ok(parsed) if parsed.to_string() == host => Ok(()),
        Ok(_) => Err(format!("`{host}` must be in lower case")),
        Err(error) => Err(error.to_string()),
    }
}

/// The words in quotes: `one of "a", "b"`.
pub fn one_of(words: &[&str]) -> String {
    if let [only] = words {
        return format!("\"{only}\"");
    }
    let words: Vec<String> = words.iter().map(|word| format!("\"{word}\"")).collect();
    format!("one of {}", words.join(", "))
}

//! What someone asked for. A [`Project`] is valid by construction: it is built by [`toml`] from what people write, or
//! decoded from what a program sent, through the same checks; it is the only way for a [`Service`] into the cluster.
//! What was accepted once is not asked again when it is read from the log or a snapshot: a rule made stricter since
//! must not keep a control node from starting. Two services are compared by [`change`] and nowhere else.

pub mod change;
pub mod check;
mod host;
pub mod image;
pub mod template;
pub mod toml;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::id::{Label, ServiceName};
use crate::resource::{Memory, Resources};
pub use host::{Allowance, HostAccess, HostDemand};
use template::Template;

/// A project as it was written: one namespace, any number of services.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(remote = "Self")]
pub struct Project {
    pub name: Label,
    pub services: BTreeMap<Label, Service>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    pub name: Label,
    pub source: Source,
    /// Arguments; empty means what the image says.
    pub command: Vec<String>,
    /// The TCP port the process listens on. Always present for a service with routes.
    pub port: Option<u16>,
    pub replicas: u32,
    /// Where its requests come from: every domain with every path prefix. Empty: not served by the proxy.
    pub routes: BTreeSet<Route>,
    pub env: BTreeMap<String, Template>,
    pub secrets_as: SecretsAs,
    pub resources: Resources,
    pub liveness: Option<Probe>,
    pub readiness: Option<Probe>,
    /// Services of the same project that must be ready before this one starts.
    pub depends_on: BTreeSet<Label>,
    pub deploy: Deploy,
    pub placement: Placement,
    pub volumes: Vec<Volume>,
    pub schedules: Vec<Schedule>,
    pub limits: ModuleLimits,
    pub registry: Option<Registry>,
    pub host: HostAccess,
    /// See [`Service::response_timeout`]; what was said of it. A module has its own limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub response_timeout: Option<Duration>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// A container image, by reference: `redis:7`, `ghcr.io/org/app@sha256:…`.
    Image(String),
    /// A Wasm component.
    Module(Module),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Module {
    /// As written, for people: a path relative to the file that names it.
    pub path: String,
    /// Hex SHA-256 of its bytes, filled in by whoever read the file; [`None`] only between parsing and that.
    pub digest: Option<String>,
}

/// Where a request must be addressed to reach a service. Ordered so that iteration is stable, not by precedence;
/// [`route`](crate::route) has the rule.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Route {
    pub host: Host,
    /// A path prefix that starts with `/`, without the `*` it was written with. Matches whole segments: `/api`
    /// matches `/api` and `/api/x`, not `/apix`. `/` matches everything.
    pub path: String,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Host {
    /// Lower case, no port, no trailing dot.
    Exact(String),
    /// `*.example.com`, kept as `example.com`: one or more labels in front of it.
    Wildcard(String),
    /// No domain was given: any host that nothing else claims.
    Any,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SecretsAs {
    /// Environment variables: Docker keeps them in its own configuration and shows them in `inspect`.
    #[default]
    Env,
    /// Files under `/run/secrets` on tmpfs, one for each variable that names a secret.
    Files,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    pub check: Check,
    pub interval: Duration,
    pub timeout: Duration,
    /// Failures in a row after which it counts as failed.
    pub failure_threshold: u32,
    /// Successes in a row after which it counts as passed.
    pub success_threshold: u32,
    pub initial_delay: Duration,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Check {
    /// GET this path on the service's port; 200 to 399 passes.
    Http(String),
    /// The service's port accepts a connection.
    Tcp,
    /// This command, inside the container, exits with 0.
    Exec(Vec<String>),
    /// `grpc.health.v1.Health/Check` for the whole server answers SERVING.
    Grpc,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deploy {
    pub strategy: Strategy,
    pub max_unavailable: u32,
    pub max_surge: u32,
    /// From placing a replica to its being ready, without the time its image takes to come; past it the deploy fails and
    /// rolls back.
    pub ready_timeout: Duration,
    /// How long connections of a replica that leaves may go on.
    pub drain_timeout: Duration,
    /// From SIGTERM to SIGKILL.
    pub stop_grace: Duration,
    /// A canary is promoted, or given up, by what was measured of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auto_promote: Option<AutoPromote>,
}

/// What a canary has to show to take over without a person.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct AutoPromote {
    /// How long it is watched.
    pub after: Duration,
    /// Of ten thousand requests so many must succeed: be answered, and not with a 5xx.
    pub success_per_10_000: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Strategy {
    /// New replicas replace old ones a few at a time.
    Rolling,
    /// All old ones stop before a new one starts.
    Recreate,
    /// All new ones get ready, then all traffic moves at once.
    BlueGreen,
    /// One new replica gets this many per cent of the requests (1 to 99) until someone promotes or rolls back,
    /// or [`AutoPromote`] does.
    Canary { weight: u8 },
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Placement {
    /// The name of the only node it may run on.
    pub node: Option<String>,
    /// Labels a node must have.
    pub labels: BTreeMap<String, String>,
    /// The node label over whose values replicas are spread.
    pub spread: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    pub source: VolumeSource,
    /// Absolute, inside the container.
    pub path: String,
    pub read_only: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VolumeSource {
    /// Kept by Orca, held by one replica at a time.
    Named(Label),
    /// A path of the host: needs `admin` and `[policy] allow_host`.
    Host(String),
}

/// When a module runs by itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Schedule {
    /// Five fields, UTC, as checked at parse time.
    pub cron: String,
}

/// Bounds on one module's requests. Ignored for containers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModuleLimits {
    /// Linear memory of one instance.
    pub memory: Memory,
    /// Wall-clock time of one request, until its response has begun and again until its body has ended.
    pub timeout: Duration,
    /// Requests at once in one replica; more wait a moment, then get 503.
    pub concurrency: u32,
    /// Hosts it may send requests to besides services of its project.
    pub outbound: BTreeSet<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registry {
    pub username: Template,
    pub password: Template,
}

/// Settings of the whole cluster, from `cluster.toml`. Whoever takes them from outside asks [`check::settings`].
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Settings {
    /// This and the next two are in what earlier versions stored. They have no effect, and are refused.
    pub name: Option<Label>,
    pub domain: Option<String>,
    pub log_level: Option<String>,
    /// What of the host an `admin` may let a service have.
    pub allow_host: BTreeSet<Allowance>,
}

/// What a service gets that says nothing else.
impl Deploy {
    pub const READY_TIMEOUT: Duration = Duration::from_secs(120);
    pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);
    pub const STOP_GRACE: Duration = Duration::from_secs(10);
    /// Per cent: enough to see errors in the receipt, few enough that they hurt little.
    pub const CANARY_WEIGHT: u8 = 10;
    pub const AUTO_PROMOTE: AutoPromote = AutoPromote { after: Duration::from_secs(300), success_per_10_000: 9_950 };
}

impl Probe {
    pub const LIVENESS_INTERVAL: Duration = Duration::from_secs(30);
    /// Every deploy waits half of this on average, and a sick replica keeps its traffic for three of them; one local
    /// request a second costs nothing.
    pub const READINESS_INTERVAL: Duration = Duration::from_secs(1);
    pub const TIMEOUT: Duration = Duration::from_secs(3);
    pub const FAILURE_THRESHOLD: u32 = 3;
    pub const SUCCESS_THRESHOLD: u32 = 1;
}

impl Default for ModuleLimits {
    fn default() -> ModuleLimits {
        ModuleLimits {
            memory: Memory(64 << 20),
            timeout: Duration::from_secs(30),
            concurrency: 100,
            outbound: BTreeSet::new(),
        }
    }
}

impl ModuleLimits {
    /// More than a request may wait for an instance, and than a busy node takes to end one.
    const OVERTIME: Duration = Duration::from_secs(10);
}

impl Service {
    /// What nginx and HAProxy allow by default.
    pub const RESPONSE_TIMEOUT: Duration = Duration::from_secs(60);

    /// Whether replicas may not run at the same time, because they would share a volume, or a port of the host.
    pub fn is_exclusive(&self) -> bool {
        self.keeps_data() || self.host.network && self.port.is_some()
    }

    /// Whether it writes to volumes of its own: what is in them is on one node and nowhere else.
    pub fn keeps_data(&self) -> bool {
        self.volumes.iter().any(|v| matches!(v.source, VolumeSource::Named(_)) && !v.read_only)
    }

    pub fn is_module(&self) -> bool {
        matches!(self.source, Source::Module(_))
    }

    /// How long the proxy waits for a response to begin, once a request's body has all been sent. A module ends its
    /// requests itself when their time is over, and has a page for that: the proxy only backs it up.
    pub fn response_timeout(&self) -> Duration {
        match &self.source {
            Source::Image(_) => self.response_timeout.unwrap_or(Service::RESPONSE_TIMEOUT),
            Source::Module(_) => self.limits.timeout + ModuleLimits::OVERTIME,
        }
    }

    /// Every secret it refers to.
    pub fn secrets(&self) -> BTreeSet<&str> {
        let registry = self.registry.iter().flat_map(|r| [&r.username, &r.password]);
        self.env.values().chain(registry).flat_map(Template::secrets).collect()
    }
}

// (`remote = "Self"` makes the derived code an inherent function, which these wrap.)
impl Serialize for Project {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Project::serialize(self, serializer)
    }
}

/// What is decoded is checked: nothing reaches a `State`, a goal or a node that the TOML would not have let through.
impl<'de> Deserialize<'de> for Project {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Project, D::Error> {
        let project = Project::deserialize(deserializer)?;
        match check::project(&project).first() {
            None => Ok(project),
            Some(fault) => Err(serde::de::Error::custom(fault)),
        }
    }
}

impl Project {
    pub fn service_name(&self, service: &Label) -> ServiceName {
        ServiceName::new(self.name.clone(), service.clone())
    }
}

/// Most characters of a host's name (RFC 1035, section 2.3.4, in its written form).
pub const HOST_LENGTH_MAX: usize = 253;
/// Most characters of a route's path: longer prefixes are a mistake, and every request is compared with them.
pub const PATH_LENGTH_MAX: usize = 512;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HostError {
    #[error("a domain may not be empty")]
    Empty,
    #[error("a domain is a name only, without `{0}`")]
    NotOnlyAName(&'static str),
    #[error("a domain has at most {HOST_LENGTH_MAX} characters, this one has {0}")]
    TooLong(usize),
    #[error("a domain may not end with a dot or have an empty part")]
    EmptyLabel,
    #[error("a part of a domain has at most 63 characters, `{0}` has more")]
    LabelTooLong(String),
    #[error("a part of a domain may not start or end with a hyphen, as `{0}` does")]
    Hyphen(String),
    #[error("a domain has only a-z, 0-9, hyphens and dots, not `{0}`")]
    Character(char),
    #[error("`*` stands for the first parts of a domain only: `*.example.com`")]
    Wildcard,
}

impl FromStr for Host {
    type Err = HostError;

    /// A domain as people write it: any case, perhaps with `*.` in front.
    fn from_str(text: &str) -> Result<Host, HostError> {
        match text.strip_prefix("*.") {
            Some(rest) => Ok(Host::Wildcard(host_name(rest)?)),
            None => Ok(Host::Exact(host_name(text)?)),
        }
    }
}

/// The name in lower case, if it is one that a `Host` header can have.
fn host_name(text: &str) -> Result<String, HostError> {
    if text.is_empty() {
        return Err(HostError::Empty);
    }
    for extra in ["://", "/", ":"] {
        if text.contains(extra) {
            return Err(HostError::NotOnlyAName(extra));
        }
    }
    if text.contains('*') {
        return Err(HostError::Wildcard);
    }
    if let Some(bad) = text.chars().find(|c| !matches!(c, 'a'..='z' | 'A'..='Z' | '0'..='9' | '-' | '.')) {
        return Err(HostError::Character(bad));
    }
    if text.len() > HOST_LENGTH_MAX {
        return Err(HostError::TooLong(text.len()));
    }
    for label in text.split('.') {
        if label.is_empty() {
            return Err(HostError::EmptyLabel);
        }
        if label.len() > crate::id::LABEL_LENGTH_MAX {
            return Err(HostError::LabelTooLong(label.to_owned()));
        }
        if label.starts_with('-') || label.ends_with('-') {
            return Err(HostError::Hyphen(label.to_owned()));
        }
    }
    Ok(text.to_ascii_lowercase())
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    #[error("a path starts with `/`")]
    Start,
    #[error("`*` may stand only at the end of a path, after a `/`: `/api/*`")]
    Wildcard,
    #[error("a path has at most {PATH_LENGTH_MAX} characters, this one has {0}")]
    TooLong(usize),
    #[error("a path may not contain `{0}`")]
    Character(char),
    #[error("a path may not contain an empty part, `.` or `..`")]
    Dots,
}

/// The prefix that a path as people write it stands for: `/api`, `/api/` and `/api/*` are all `/api`.
pub fn path_prefix(text: &str) -> Result<String, PathError> {
    if !text.starts_with('/') {
        return Err(PathError::Start);
    }
    if text.len() > PATH_LENGTH_MAX {
        return Err(PathError::TooLong(text.len()));
    }
    let prefix = text.strip_suffix("/*").or_else(|| text.strip_suffix('/')).unwrap_or(text);
    if prefix.contains('*') {
        return Err(PathError::Wildcard);
    }
    // What a request's path can contain (RFC 3986, section 3.3); anything else would never match.
    let allowed = |c: char| c.is_ascii_alphanumeric() || "/-._~%!$&'()+,;=:@".contains(c);
    if let Some(bad) = prefix.chars().find(|c| !allowed(*c)) {
        return Err(PathError::Character(bad));
    }
    if prefix.split('/').skip(1).any(|part| matches!(part, "" | "." | "..")) {
        return Err(PathError::Dots);
    }
    Ok(if prefix.is_empty() { "/".to_owned() } else { prefix.to_owned() })
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Host::Exact(name) => f.write_str(name),
            Host::Wildcard(name) => write!(f, "*.{name}"),
            Host::Any => f.write_str("*"),
        }
    }
}

impl Route {
    /// Whether it matches every request that the other one does.
    pub fn covers(&self, other: &Route) -> bool {
        let path = self.path.strip_suffix('/').unwrap_or(&self.path);
        let on_path = other.path.strip_prefix(path).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        on_path && self.host.covers(&other.host)
    }
}

impl Host {
    fn covers(&self, other: &Host) -> bool {
        match (self, other) {
            (Host::Any, _) => true,
            (Host::Wildcard(parent), Host::Exact(name)) => {
                name.strip_suffix(parent.as_str()).is_some_and(|rest| rest.ends_with('.'))
            }
            (Host::Wildcard(parent), Host::Wildcard(name)) => {
                name.strip_suffix(parent.as_str()).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
            }
            (Host::Exact(one), Host::Exact(name)) => one == name,
            (Host::Wildcard(_), Host::Any) | (Host::Exact(_), Host::Any | Host::Wildcard(_)) => false,
        }
    }
}

/// As people write it: `/*` where no domain is given, `shop.example.com/api/*` where one is.
impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host != Host::Any {
            write!(f, "{}", self.host)?;
        }
        write!(f, "{}/*", self.path.trim_end_matches('/'))
    }
}

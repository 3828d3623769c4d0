//! Who may do what. Three steps, each in one place: [`identify`] finds the token somebody stands for, [`authorise`]
//! says whether its role and project allow the verb on the object, and [`Refusals`] keeps those who fail from being
//! work. Nothing is remembered about a connection: a token that is revoked means nobody from the next request on.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use orca_cluster::command::Announcement;
use orca_cluster::event::{Actor, Kind};
use orca_cluster::id::Label;
use orca_cluster::secret::TokenId;
use orca_cluster::state::{Role, State, Token};
use orca_cluster::time::Timestamp;
use orca_wire::endpoint::network;
use orca_wire::identity::TokenSecret;
use tokio::sync::mpsc;

/// Somebody whose token was good when the request came in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    pub token: TokenId,
    pub name: String,
    pub role: Role,
    /// The only project it may touch.
    pub project: Option<Label>,
    pub source: SocketAddr,
}

impl Caller {
    pub fn actor(&self) -> Actor {
        Actor::Token { id: self.token.to_string(), name: self.name.clone() }
    }

    /// Whether this project is not hidden from it.
    pub fn sees(&self, project: &Label) -> bool {
        self.project.as_ref().is_none_or(|own| own == project)
    }
}

/// Everything there is to ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Verb {
    /// Status, reasons, history, events, nodes, metrics.
    See,
    Logs,
    Plan,
    Deploy,
    UploadModule,
    /// Scale, stop, start, restart, redeploy, promote, roll back.
    Operate,
    Remove,
    /// Run a command inside a replica: it sees what the workload sees, secrets included.
    Exec,
    /// Put a service that reaches into the host; see [`host_demands`](orca_cluster::spec::Service::host_demands).
    ReachHost,
    ListSecrets,
    ChangeSecrets,
    ListTokens,
    ChangeTokens,
    ChangeSettings,
    Diagnose,
    /// Ask who one is.
    Whoami,
}

impl Verb {
    pub const ALL: [Verb; 16] = [
        Verb::See,
        Verb::Logs,
        Verb::Plan,
        Verb::Deploy,
        Verb::UploadModule,
        Verb::Operate,
        Verb::Remove,
        Verb::Exec,
        Verb::ReachHost,
        Verb::ListSecrets,
        Verb::ChangeSecrets,
        Verb::ListTokens,
        Verb::ChangeTokens,
        Verb::ChangeSettings,
        Verb::Diagnose,
        Verb::Whoami,
    ];

    /// The least role that may.
    fn least(self) -> Role {
        match self {
            Verb::See | Verb::Logs | Verb::Plan | Verb::Diagnose | Verb::Whoami => Role::Viewer,
            Verb::Deploy
            | Verb::UploadModule
            | Verb::Operate
            | Verb::Remove
            | Verb::Exec
            | Verb::ListSecrets
            | Verb::ChangeSecrets => Role::Deployer,
            Verb::ReachHost | Verb::ListTokens | Verb::ChangeTokens | Verb::ChangeSettings => Role::Admin,
        }
    }

    /// How far a token reaches that is limited to a project.
    fn extent(self) -> Extent {
        match self {
            Verb::See
            | Verb::Logs
            | Verb::Plan
            | Verb::Deploy
            | Verb::Operate
            | Verb::Remove
            | Verb::Exec
            | Verb::ListSecrets
            | Verb::ChangeSecrets
            | Verb::ListTokens
            | Verb::ChangeTokens => Extent::OwnProject,
            // A module's bytes are nobody's until a service names them, and everybody may know who he is.
            Verb::UploadModule | Verb::Whoami => Extent::AlsoCluster,
            Verb::ReachHost | Verb::ChangeSettings | Verb::Diagnose => Extent::Nowhere,
        }
    }
}

/// What a token that is limited to a project may do a verb to.
#[derive(Debug, Clone, Copy)]
enum Extent {
    OwnProject,
    /// And to what belongs to no project.
    AlsoCluster,
    /// What a project's host or settings are, is the whole cluster's business.
    Nowhere,
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Verb::See => "see",
            Verb::Logs => "read logs of",
            Verb::Plan => "plan",
            Verb::Deploy => "deploy",
            Verb::UploadModule => "upload modules to",
            Verb::Operate => "operate",
            Verb::Remove => "remove services of",
            Verb::Exec => "run commands in",
            Verb::ReachHost => "let a service reach into the host of",
            Verb::ListSecrets => "list secrets of",
            Verb::ChangeSecrets => "change secrets of",
            Verb::ListTokens => "list tokens of",
            Verb::ChangeTokens => "make or revoke tokens of",
            Verb::ChangeSettings => "change settings of",
            Verb::Diagnose => "examine",
            Verb::Whoami => "be known to",
        })
    }
}

/// What it is asked about. A service is its project; what belongs to no project is the cluster's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Object<'a> {
    Cluster,
    Project(&'a Label),
}

impl<'a> From<Option<&'a Label>> for Object<'a> {
    fn from(project: Option<&'a Label>) -> Object<'a> {
        project.map_or(Object::Cluster, Object::Project)
    }
}

impl fmt::Display for Object<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Object::Cluster => f.write_str("the cluster"),
            Object::Project(project) => write!(f, "project {project}"),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    #[error("`{name}` is {} and may not {what}; that takes {}", a_role(.role), a_role(.least))]
    Role { name: String, role: Role, least: Role, what: String },
    #[error("`{name}` is limited to project {project} and may not {what}")]
    Project { name: String, project: Label, what: String },
}

fn role_name(role: &Role) -> &'static str {
    match role {
        Role::Viewer => "viewer",
        Role::Deployer => "deployer",
        Role::Admin => "admin",
    }
}

fn a_role(role: &Role) -> String {
    let name = role_name(role);
    let article = if *role == Role::Admin { "an" } else { "a" };
    format!("{article} {name}")
}

/// Whether the caller may do this. The only place that knows.
pub fn authorise(caller: &Caller, verb: Verb, object: Object<'_>) -> Result<(), Denied> {
    let what = || format!("{verb} {object}");
    let least = verb.least();
    if caller.role < least {
        return Err(Denied::Role { name: caller.name.clone(), role: caller.role, least, what: what() });
    }
    let Some(own) = &caller.project else { return Ok(()) };
    let within = match (verb.extent(), object) {
        (Extent::OwnProject | Extent::AlsoCluster, Object::Project(project)) => own == project,
        (Extent::AlsoCluster, Object::Cluster) => true,
        (Extent::OwnProject, Object::Cluster) | (Extent::Nowhere, Object::Cluster | Object::Project(_)) => false,
    };
    match within {
        true => Ok(()),
        false => Err(Denied::Project { name: caller.name.clone(), project: own.clone(), what: what() }),
    }
}

/// One answer for every way of not being somebody: which part was wrong is nobody's business.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the token is not valid here: unknown, revoked or expired")]
pub struct Unauthenticated;

/// The token that somebody stands for whose certificate, or whose connection, names it.
pub fn identify(state: &State, token: &TokenId, source: SocketAddr, now: Timestamp) -> Result<Caller, Unauthenticated> {
    let record = state.tokens.get(token).filter(|record| is_good(record, now)).ok_or(Unauthenticated)?;
    Ok(Caller {
        token: token.clone(),
        name: record.name.clone(),
        role: record.role,
        project: record.project.clone(),
        source,
    })
}

/// The same for somebody who shows the token itself.
pub fn identify_by_secret(
    state: &State,
    token: &TokenId,
    secret: &TokenSecret,
    source: SocketAddr,
    now: Timestamp,
) -> Result<Caller, Unauthenticated> {
    let record = state.tokens.get(token).ok_or(Unauthenticated)?;
    if !secret.matches(&record.hash) {
        return Err(Unauthenticated);
    }
    identify(state, token, source, now)
}

pub fn is_good(token: &Token, now: Timestamp) -> bool {
    token.expires.is_none_or(|expires| now < expires)
}

/// Failed authentications from one address in one [`WINDOW`] after which it is not listened to for the rest of it. A
/// secret of 256 bits is not guessed; this keeps a loop with a wrong token from being work.
const FAILURES_MAX: u32 = 20;

const WINDOW: Duration = Duration::from_secs(60);

/// Refusals announced in one window over all sources: an event each would let a stranger write our log full.
const ANNOUNCED_MAX: u32 = 10;

/// Sources counted in one window; more share one count.
const SOURCES_MAX: usize = 4_096;

/// Announcements on their way to the log.
const QUEUE_MAX: usize = 16;

/// An event about somebody who was refused.
#[derive(Debug)]
pub struct Refusal {
    pub actor: Actor,
    pub source: SocketAddr,
    pub announcement: Announcement,
}

/// What they are told who are shut out.
pub const SHUT_OUT: &str = "too many tries with tokens that are not valid; wait a minute";

/// Counts those who are refused, and announces some of them.
#[derive(Debug)]
pub struct Refusals {
    window: Mutex<Window>,
    announce: mpsc::Sender<Refusal>,
    total: AtomicU64,
}

#[derive(Debug, Default)]
struct Window {
    began: Timestamp,
    failures: HashMap<IpAddr, u32>,
    /// Of sources beyond [`SOURCES_MAX`].
    others: u32,
    announced: BTreeMap<(IpAddr, String), u32>,
    total: u32,
}

impl Refusals {
    pub fn new() -> (Refusals, mpsc::Receiver<Refusal>) {
        let (announce, announcements) = mpsc::channel(QUEUE_MAX);
        (Refusals { window: Mutex::default(), announce, total: AtomicU64::new(0) }, announcements)
    }

    /// Whether this source has failed so often that it is refused without a look.
    pub fn is_shut_out(&self, source: IpAddr, now: Timestamp) -> bool {
        self.with(now, |window| match window.failures.get(&network(source)) {
            Some(failures) => *failures >= FAILURES_MAX,
            None => window.failures.len() >= SOURCES_MAX && window.others >= FAILURES_MAX,
        })
    }

    pub fn unauthenticated(&self, source: SocketAddr, now: Timestamp) {
        self.with(now, |window| {
            let known = window.failures.len() < SOURCES_MAX || window.failures.contains_key(&network(source.ip()));
            let count = match known {
                true => window.failures.entry(network(source.ip())).or_default(),
                false => &mut window.others,
            };
            *count = count.saturating_add(1);
        });
        self.announce(Actor::Orca, source, "a token that is not valid was shown".to_owned(), now);
    }

    pub fn denied(&self, caller: &Caller, denied: &Denied, now: Timestamp) {
        self.announce(caller.actor(), caller.source, denied.to_string(), now);
    }

    /// How many were refused since the start.
    pub fn total(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }

    /// Once for each source and reason in a window, and a few in all.
    fn announce(&self, actor: Actor, source: SocketAddr, text: String, now: Timestamp) {
        self.total.fetch_add(1, Ordering::Relaxed);
        let tell = self.with(now, |window| {
            if window.total >= ANNOUNCED_MAX {
                return false;
            }
            let count = window.announced.entry((network(source.ip()), text.clone())).or_default();
            *count += 1;
            let first = *count == 1;
            window.total += u32::from(first);
            first
        });
        if tell {
            let announcement = Announcement { kind: Kind::Refused, service: None, replica: None, text };
            // A full queue means there are plenty of them already.
            let _ = self.announce.try_send(Refusal { actor, source, announcement });
        }
    }

    fn with<T>(&self, now: Timestamp, act: impl FnOnce(&mut Window) -> T) -> T {
        // Counts only: whatever a panic elsewhere has left is good enough.
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        // A clock that was set back would keep a window, and those it shuts out, for as long as it went back.
        if now.since(window.began) >= WINDOW || now < window.began {
            *window = Window { began: now, ..Window::default() };
        }
        act(&mut window)
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    const SOURCE: SocketAddr = SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 7);

    fn caller(role: Role, project: Option<&str>) -> Caller {
        Caller {
            token: "abcdefgh".parse().unwrap(),
            name: "somebody".to_owned(),
            role,
            project: project.map(|name| Label::new(name).unwrap()),
            source: SOURCE,
        }
    }

    /// This table is the specification: who may (`+`) do what, for a token of the whole cluster and for one that is
    /// limited to project `a`.
    #[test]
    fn who_may_do_what() {
        let (a, b) = (Label::new("a").unwrap(), Label::new("b").unwrap());
        let callers = [Role::Viewer, Role::Deployer, Role::Admin]
            .into_iter()
            .flat_map(|role| [caller(role, None), caller(role, Some("a"))]);
        let callers: Vec<Caller> = callers.collect();
        let mut table = format!("{:<15} {:<9}", "", "on");
        for who in &callers {
            let scope = if who.project.is_some() { " of a" } else { "" };
            table.push_str(&format!("{:>15}", format!("{}{scope}", role_name(&who.role))));
        }
        for verb in Verb::ALL {
            for (name, object) in [("cluster", Object::Cluster), ("a", Object::Project(&a)), ("b", Object::Project(&b))]
            {
                table.push_str(&format!("\n{:<15} {name:<9}", format!("{verb:?}")));
                for who in &callers {
                    let sign = if authorise(who, verb, object).is_ok() { "+" } else { "-" };
                    table.push_str(&format!("{sign:>15}"));
                }
            }
        }
        expect![[r#"
                            on                viewer    viewer of a       deployer  deployer of a          admin     admin of a
            See             cluster                +              -              +              -              +              -
            See             a                      +              +              +              +              +              +
            See             b                      +              -              +              -              +              -
            Logs            cluster                +              -              +              -              +              -
            Logs            a                      +              +              +              +              +              +
            Logs            b                      +              -              +              -              +              -
            Plan            cluster                +              -              +              -              +              -
            Plan            a                      +              +              +              +              +              +
            Plan            b                      +              -              +              -              +              -
            Deploy          cluster                -              -              +              -              +              -
            Deploy          a                      -              -              +              +              +              +
            Deploy          b                      -              -              +              -              +              -
            UploadModule    cluster                -              -              +              +              +              +
            UploadModule    a                      -              -              +              +              +              +
            UploadModule    b                      -              -              +              -              +              -
            Operate         cluster                -              -              +              -              +              -
            Operate         a                      -              -              +              +              +              +
            Operate         b                      -              -              +              -              +              -
            Remove          cluster                -              -              +              -              +              -
            Remove          a                      -              -              +              +              +              +
            Remove          b                      -              -              +              -              +              -
            Exec            cluster                -              -              +              -              +              -
            Exec            a                      -              -              +              +              +              +
            Exec            b                      -              -              +              -              +              -
            ReachHost       cluster                -              -              -              -              +              -
            ReachHost       a                      -              -              -              -              +              -
            ReachHost       b                      -              -              -              -              +              -
            ListSecrets     cluster                -              -              +              -              +              -
            ListSecrets     a                      -              -              +              +              +              +
            ListSecrets     b                      -              -              +              -              +              -
            ChangeSecrets   cluster                -              -              +              -              +              -
            ChangeSecrets   a                      -              -              +              +              +              +
            ChangeSecrets   b                      -              -              +              -              +              -
            ListTokens      cluster                -              -              -              -              +              -
            ListTokens      a                      -              -              -              -              +              +
            ListTokens      b                      -              -              -              -              +              -
            ChangeTokens    cluster                -              -              -              -              +              -
            ChangeTokens    a                      -              -              -              -              +              +
            ChangeTokens    b                      -              -              -              -              +              -
            ChangeSettings  cluster                -              -              -              -              +              -
            ChangeSettings  a                      -              -              -              -              +              -
            ChangeSettings  b                      -              -              -              -              +              -
            Diagnose        cluster                +              -              +              -              +              -
            Diagnose        a                      +              -              +              -              +              -
            Diagnose        b                      +              -              +              -              +              -
            Whoami          cluster                +              +              +              +              +              +
            Whoami          a                      +              +              +              +              +              +
            Whoami          b                      +              -              +              -              +              -"#]].assert_eq(&table);
    }

    #[test]
    fn a_refusal_says_what_it_would_take() {
        let denied = authorise(&caller(Role::Viewer, None), Verb::Deploy, Object::Project(&Label::new("a").unwrap()));
        expect!["`somebody` is a viewer and may not deploy project a; that takes a deployer"]
            .assert_eq(&denied.unwrap_err().to_string());
        let denied = authorise(&caller(Role::Admin, Some("a")), Verb::ChangeSettings, Object::Cluster);
        expect!["`somebody` is limited to project a and may not change settings of the cluster"]
            .assert_eq(&denied.unwrap_err().to_string());
    }

    #[test]
    fn who_fails_often_is_shut_out_for_a_while_and_announced_once() {
        let (refusals, mut announced) = Refusals::new();
        let now = Timestamp(1_000_000);
        for _ in 0..FAILURES_MAX {
            assert!(!refusals.is_shut_out(SOURCE.ip(), now));
            refusals.unauthenticated(SOURCE, now);
        }
        assert!(refusals.is_shut_out(SOURCE.ip(), now));
        assert!(!refusals.is_shut_out("192.0.2.1".parse().unwrap(), now), "others are not affected");
        assert!(!refusals.is_shut_out(SOURCE.ip(), now + WINDOW));
        assert!(announced.try_recv().is_ok());
        assert!(announced.try_recv().is_err());
    }

    #[test]
    fn many_sources_neither_fill_the_log_nor_the_memory() {
        let (refusals, mut announced) = Refusals::new();
        let now = Timestamp(1_000_000);
        for address in 0..10_000u32 {
            refusals.unauthenticated(SocketAddr::new(IpAddr::V4(address.into()), 1), now);
        }
        assert_eq!(std::iter::from_fn(|| announced.try_recv().ok()).count(), ANNOUNCED_MAX as usize);
        assert_eq!(refusals.with(now, |window| window.failures.len()), SOURCES_MAX);
    }
}

//! Everything the cluster agrees on. It is a value; [`Command`](crate::command::Command)s are the only way to
//! change it, and the same commands in the same order give the same state on every control node, for ever.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::event::{Actor, Event};
use crate::id::{Generation, Label, NodeId, ReplicaId, Revision, ServiceName};
use crate::route::RouteKey;
use crate::secret::{
    DataKeyId, SealedDataKey, SealedRoot, SealedValue, SealingPublicKey, SecretName, TokenHash, TokenId,
};
use crate::spec::{Route, Service, Settings};
use crate::time::Timestamp;
use crate::traffic::{Counted, Tally};

/// Revisions kept for each service, besides those still in use.
pub const REVISIONS_KEPT: usize = 20;

#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct State {
    /// Rises by one with every change.
    pub generation: Generation,
    pub cluster: Option<Cluster>,
    pub settings: Settings,
    pub nodes: BTreeMap<NodeId, Node>,
    pub services: BTreeMap<ServiceName, Deployed>,
    pub placements: BTreeMap<ReplicaId, Placement>,
    /// Who holds each route; [`plan::route`](mod@crate::plan::route) says what that means.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub routes: BTreeMap<RouteKey, ServiceName>,
    pub secrets: BTreeMap<SecretName, SecretRecord>,
    pub data_keys: BTreeMap<DataKeyId, DataKey>,
    pub tokens: BTreeMap<TokenId, Token>,
    pub events: VecDeque<Event>,
    /// The last replica number given out.
    pub replicas_made: u64,
}

/// What was decided once, when the cluster was founded.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cluster {
    pub id: String,
    pub name: Label,
    pub founded: Timestamp,
    /// PEM.
    pub ca_certificate: String,
    pub ca_key: SealedValue,
    pub root: SealedRoot,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Node {
    pub name: String,
    /// `host:port` of its QUIC plane.
    pub address: String,
    /// What secrets in its goals are sealed to.
    pub sealing_key: SealingPublicKey,
    pub admitted: Timestamp,
    /// Its replicas are given up; it comes back as soon as it is heard again.
    pub dead: bool,
}

/// A service with its history and the rollout it is in.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Deployed {
    pub revisions: BTreeMap<Revision, RevisionRecord>,
    /// What is wanted now.
    pub target: Revision,
    /// The newest revision whose rollout ended well: what a failed one returns to.
    pub settled: Option<Revision>,
    pub rollout: Option<Rollout>,
    /// `orca stop`: no replicas are wanted, the specification stays.
    pub stopped: bool,
    /// It goes as soon as its replicas are gone.
    pub removal: Option<Removal>,
    pub receipts: VecDeque<Receipt>,
    /// Where its named volumes are, once a replica that writes to them was placed: no other node has what is in them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub home: Option<NodeId>,
    /// Where each of its schedules stands, by its cron expression. Empty while no replicas are wanted: what would have
    /// been due then is not missed.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub schedules: BTreeMap<String, ScheduleRecord>,
}

/// Where a schedule stands. Each due time is decided once, by whoever leads then: a replica gets it or it is skipped, and
/// with that `next` is a later one, so that no other leader decides it again.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ScheduleRecord {
    /// The first due time that is not decided; none if there will be no more.
    pub next: Option<Timestamp>,
    /// What a replica was given and is not known to be over.
    pub run: Option<Run>,
    pub last: Option<LastRun>,
    /// When an event last told how a run ended, and how many have ended in the same way since.
    pub told: Timestamp,
    pub untold: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    pub due: Timestamp,
    pub replica: ReplicaId,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastRun {
    pub due: Timestamp,
    /// Absent if no replica was given it.
    pub replica: Option<ReplicaId>,
    pub ending: RunEnding,
}

/// What became of a due time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunEnding {
    Done,
    Failed {
        reason: String,
    },
    /// It was not begun, and will not be.
    Skipped {
        reason: String,
    },
    /// A replica had it, and nobody can say how far it came.
    Unknown {
        reason: String,
    },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RevisionRecord {
    pub spec: Service,
    /// The revision whose replicas do for this one too: an earlier one where only the number of replicas, the
    /// routes or the like changed, else itself. Placements name templates.
    pub template: Revision,
    /// Of the image, once the first replica has resolved it.
    pub digest: Option<String>,
    /// Ask the registry even if an image of that name is present.
    pub pull: bool,
    pub at: Timestamp,
    pub by: Actor,
    /// How it came about, in a few words: `deploy`, `rollback to v3`.
    pub note: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rollout {
    pub to: Revision,
    pub from: Option<Revision>,
    pub started: Timestamp,
    pub direction: Direction,
    /// A canary that was promoted goes on as a rolling update.
    pub promoted: bool,
    /// The service's traffic when the rollout began; [`None`] until it was read.
    pub baseline: Option<Baseline>,
    /// Replicas that a new one took the place of.
    pub replaced: u32,
    /// From when a canary is measured, if it is to be promoted by that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trial: Option<Trial>,
}

/// What had been counted when the first replica of a canary began to serve.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Trial {
    pub since: Timestamp,
    /// Of the canary.
    pub tried: Tally,
    /// Of the revision it is to take the place of.
    pub settled: Tally,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    Forward,
    /// Going back to the settled revision.
    Back {
        why: Failure,
    },
}

/// Why a revision was given up: the cause in one sentence and what its replica last said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    pub cause: String,
    pub evidence: Vec<Evidence>,
    pub fix: Option<String>,
    /// A person asked for it.
    pub asked: bool,
}

/// One thing that was seen. Stored and told to programs as one line, in which what a replica printed follows `log: `.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum Evidence {
    Seen(String),
    /// A line that the replica wrote.
    Printed(String),
}

/// Before a line that a replica wrote.
const PRINTED: &str = "log: ";

impl From<String> for Evidence {
    fn from(line: String) -> Evidence {
        match line.strip_prefix(PRINTED) {
            Some(printed) => Evidence::Printed(printed.to_owned()),
            None => Evidence::Seen(line),
        }
    }
}

impl From<Evidence> for String {
    fn from(evidence: Evidence) -> String {
        evidence.to_string()
    }
}

impl fmt::Display for Evidence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Evidence::Seen(line) => f.write_str(line),
            Evidence::Printed(line) => write!(f, "{PRINTED}{line}"),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Baseline {
    pub at: Timestamp,
    /// By then.
    #[serde(default)]
    pub tally: Tally,
    /// In the minute before.
    pub before: Window,
}

/// What the proxy counted between two moments.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Window {
    pub from: Timestamp,
    pub to: Timestamp,
    pub requests: u64,
    /// Responses with a status of 5xx.
    pub errors: u64,
    /// Those of them that no replica was there for.
    #[serde(default, skip_serializing_if = "crate::traffic::is_zero")]
    pub unserved: u64,
    /// Connections that ended before their response, or their WebSocket, did.
    pub cut: u64,
    pub p99_us: Option<u64>,
    /// There may have been more: a proxy was restarted or killed meanwhile, and what it had not reported is not counted.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub at_least: bool,
}

/// How a rollout went, kept for good.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Receipt {
    pub revision: Revision,
    pub from: Option<Revision>,
    pub outcome: Outcome,
    pub started: Timestamp,
    pub ended: Timestamp,
    pub replaced: u32,
    pub before: Window,
    pub during: Window,
    /// The ten seconds after; absent until they have passed.
    pub after: Option<Window>,
    pub failure: Option<Failure>,
    /// By the end of `during`, to count `after` from; kept until then.
    #[serde(default, skip_serializing_if = "Tally::is_empty")]
    pub tally: Tally,
}

/// How a rollout ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    Done,
    /// The old revision serves as before.
    RolledBack,
    /// There was nothing to go back to.
    Failed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Removal {
    pub volumes: bool,
    /// It was left out of its project's file, and goes when whoever has its routes now is ready. `orca rm` does not wait.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub hands_over: bool,
}

/// A replica that exists or should.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Placement {
    pub service: ServiceName,
    /// The template it is made from.
    pub revision: Revision,
    pub node: NodeId,
    pub since: Timestamp,
    pub state: PlacementState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PlacementState {
    /// Gets requests as soon as it is ready.
    Serve,
    /// Gets no new requests; `since` is the generation that said so, which every proxy must have acknowledged
    /// before it is stopped.
    Drain {
        since: Generation,
        at: Timestamp,
    },
    Stop {
        erase: bool,
    },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SecretRecord {
    pub version: u32,
    pub value: SealedValue,
    pub at: Timestamp,
    pub by: Actor,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DataKey {
    pub key: SealedDataKey,
    /// Values it has sealed.
    pub uses: u64,
    /// A rotation to it has begun and not ended: what older keys of its scope have sealed is being sealed anew by it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub rotating: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Token {
    pub name: String,
    pub hash: TokenHash,
    pub role: Role,
    /// Limits it to one project.
    pub project: Option<Label>,
    pub created: Timestamp,
    pub expires: Option<Timestamp>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Sees everything but secrets.
    Viewer,
    /// Changes services and secrets.
    Deployer,
    /// Everything.
    Admin,
}

impl State {
    /// The secret that `name` means in this project: its own, else the global one.
    pub fn secret(&self, project: &Label, name: &str) -> Option<(SecretName, &SecretRecord)> {
        let scopes = [Some(project.clone()), None];
        scopes.into_iter().find_map(|scope| {
            let name = SecretName::new(scope, name).ok()?;
            self.secrets.get(&name).map(|record| (name, record))
        })
    }

    /// Services that refer to this secret: in what is wanted of them, or in what a rollout that fails returns to.
    pub fn secret_users(&self, name: &SecretName) -> Vec<ServiceName> {
        let uses = |service: &ServiceName, deployed: &Deployed| {
            let means = self.secret(&service.project, name.name()).is_some_and(|(meant, _)| meant == *name);
            let mut records = deployed.records_at_stake();
            means && deployed.removal.is_none() && records.any(|record| record.spec.secrets().contains(name.name()))
        };
        let using = self.services.iter().filter(|(service, deployed)| uses(service, deployed));
        using.map(|(service, _)| service.clone()).collect()
    }

    /// The secrets of a data key's scope that an older one sealed.
    pub fn older_secrets<'a>(&'a self, key: &'a DataKeyId) -> impl Iterator<Item = (&'a SecretName, &'a SecretRecord)> {
        let scope = self.secrets.iter().filter(move |(name, _)| name.scope() == key.scope);
        scope.filter(move |(_, record)| record.value.key.version < key.version)
    }

    pub fn placements_of<'a>(&'a self, service: &'a ServiceName) -> impl Iterator<Item = (ReplicaId, &'a Placement)> {
        self.placements.iter().filter(move |(_, p)| p.service == *service).map(|(id, p)| (*id, p))
    }

    /// What people call a node; its id if it is not known.
    pub fn node_name(&self, id: NodeId) -> String {
        self.nodes.get(&id).map_or_else(|| id.to_string(), |node| node.name.clone())
    }

    /// The service that has claimed a route, other than `except`.
    pub fn route_owner(&self, route: &Route, except: &ServiceName) -> Option<&ServiceName> {
        self.services
            .iter()
            .find(|(name, deployed)| *name != except && deployed.removal.is_none() && deployed.claims(route))
            .map(|(name, _)| name)
    }

    /// What holds for every state; called after each command in tests and the simulator.
    pub fn invariants(&self) {
        for (replica, placement) in &self.placements {
            assert!(replica.0 <= self.replicas_made, "{replica} was never given out");
            let Some(deployed) = self.services.get(&placement.service) else {
                panic!("{replica} is of {}, which does not exist", placement.service);
            };
            assert!(
                deployed.revisions.contains_key(&placement.revision),
                "{replica} is of {} {}, which is forgotten",
                placement.service,
                placement.revision
            );
        }
        for (name, deployed) in &self.services {
            assert!(deployed.revisions.contains_key(&deployed.target), "{name} has no target");
            for record in deployed.revisions.values() {
                assert!(deployed.revisions.contains_key(&record.template), "{name} lost {}", record.template);
            }
            if let Some(rollout) = &deployed.rollout {
                assert!(deployed.revisions.contains_key(&rollout.to), "{name} rolls out nothing");
            }
        }
        assert!(self.events.len() <= crate::event::EVENTS_MAX);
    }
}

impl Deployed {
    /// The specification that is wanted now.
    pub fn spec(&self) -> &Service {
        &self.target_record().spec
    }

    pub fn target_record(&self) -> &RevisionRecord {
        self.revisions.get(&self.target).expect("the target is kept as long as it is the target")
    }

    /// Whether requests of this route are its own: now, or again if what gives it away does not get ready.
    pub(crate) fn claims(&self, route: &Route) -> bool {
        let may_return = self.rollout.is_some() || !self.is_proven();
        let before = self.settled_record().filter(|_| may_return);
        self.spec().routes.contains(route) || before.is_some_and(|record| record.spec.routes.contains(route))
    }

    /// What is wanted, and what the rollout that runs returns to if it fails.
    pub fn records_at_stake(&self) -> impl Iterator<Item = &RevisionRecord> {
        let before = self.settled_record().filter(|_| self.rollout.is_some());
        [Some(self.target_record()), before].into_iter().flatten()
    }

    /// Whether whoever gets inside it, or chooses anew what runs in it, may get into the host: any revision of it does.
    pub fn reaches_host(&self) -> bool {
        self.revisions.values().any(|record| !record.spec.host_demands().is_empty())
    }

    /// What going back would bring, to this revision or to any, and wants something else of the host than what is wanted
    /// now, which has been allowed.
    pub fn specs_to_allow(&self, to: Option<Revision>) -> impl Iterator<Item = &Service> {
        let candidates = self.revisions.iter().filter(move |(revision, _)| to.is_none_or(|to| to == **revision));
        candidates.map(|(_, record)| &record.spec).filter(|spec| spec.host_demands() != self.spec().host_demands())
    }

    pub fn settled_record(&self) -> Option<&RevisionRecord> {
        self.settled.and_then(|settled| self.revisions.get(&settled))
    }

    /// What a person asked for last, which may have been given up since.
    pub fn newest_record(&self) -> &RevisionRecord {
        self.revisions.values().next_back().expect("the target is kept as long as it is the target")
    }

    /// The template that replicas should be made from.
    pub fn template(&self) -> Revision {
        self.target_record().template
    }

    /// The revision whose probes, times and schedules hold for replicas of this template, since those may change without
    /// new replicas: what is wanted, else what was settled; only for a template of neither it is the newest revision
    /// that has it, which may have been given up.
    pub fn record_for(&self, template: Revision) -> Option<&RevisionRecord> {
        let mut records = [Some(self.target_record()), self.settled_record()]
            .into_iter()
            .flatten()
            .chain(self.revisions.values().rev());
        records.find(|record| record.template == template)
    }

    /// How many replicas are wanted now.
    pub fn wanted(&self) -> u32 {
        if self.stopped || self.removal.is_some() { 0 } else { self.spec().replicas }
    }

    /// Whether what is wanted now would run as replicas of the settled revision, which are known to get ready.
    pub fn is_proven(&self) -> bool {
        self.settled_record().is_some_and(|record| record.template == self.template())
    }
}

impl Outcome {
    pub fn is_done(self) -> bool {
        self == Outcome::Done
    }
}

impl Receipt {
    /// As it is shown: without what is only counted on from.
    #[must_use]
    pub fn told(&self) -> Receipt {
        Receipt { tally: Tally::default(), ..self.clone() }
    }
}

impl Window {
    pub fn between(from: Timestamp, to: Timestamp, counted: &Counted) -> Window {
        let Counted { counters, at_least } = counted;
        Window {
            from,
            to,
            requests: counters.requests,
            errors: counters.server_errors(),
            unserved: counters.unserved,
            cut: counters.cut,
            p99_us: counters.latency.quantile(0.99).map(|t| u64::try_from(t.as_micros()).unwrap_or(u64::MAX)),
            at_least: *at_least,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn evidence_is_stored_as_the_line_it_was() {
        let lines = r#"["status 500","log: ready","log: log: ready"]"#;
        let read: Vec<Evidence> = serde_json::from_str(lines).unwrap();
        let printed = |line: &str| Evidence::Printed(line.to_owned());
        assert_eq!(read, [Evidence::Seen("status 500".to_owned()), printed("ready"), printed("log: ready")]);
        assert_eq!(serde_json::to_string(&read).unwrap(), lines);
    }

    #[test]
    fn what_was_stored_before_proxies_were_told_apart_is_read() {
        let window = r#"{"from":1,"to":2,"requests":3,"errors":0,"cut":0,"p99_us":null}"#;
        let totals = r#"{"requests":3,"statuses":[0,3,0,0,0],"cut":0,"latency":[]}"#;
        let baseline = format!(r#"{{"at":2,"totals":{totals},"before":{window}}}"#);
        let rollout = format!(
            r#"{{"to":2,"from":1,"started":2,"direction":"forward","promoted":false,"baseline":{baseline},"replaced":0}}"#
        );
        let receipt = format!(
            r#"{{"revision":1,"from":null,"outcome":"done","started":1,"ended":2,"replaced":0,"before":{window},
            "during":{window},"after":null,"failure":null,"totals":{totals}}}"#
        );
        let rollout: Rollout = serde_json::from_str(&rollout).unwrap();
        assert!(rollout.baseline.is_some_and(|baseline| baseline.tally.is_empty()) && rollout.trial.is_none());
        let receipt: Receipt = serde_json::from_str(&receipt).unwrap();
        assert!(receipt.tally.is_empty() && !receipt.during.at_least);
    }
}

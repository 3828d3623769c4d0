//! Everything the cluster agrees on. It is a value; [`Command`](crate::command::Command)s are the only way to
//! change it, and the same commands in the same order give the same state on every control node, for ever.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use crate::event::{Actor, Event};
use crate::id::{Generation, Label, NodeId, ReplicaId, Revision, ServiceName};
use crate::plan::report::Outcome;
use crate::secret::{
    DataKeyId, SealedDataKey, SealedRoot, SealedValue, SealingPublicKey, SecretName, TokenHash, TokenId,
};
use crate::spec::{Route, Service, Settings, Volume, VolumeSource};
use crate::time::Timestamp;
use crate::traffic::Counters;

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
    pub labels: BTreeMap<String, String>,
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
    /// The service's traffic since the proxies started, when the rollout began; [`None`] until it was read.
    pub baseline: Option<Baseline>,
    /// Replicas that a new one took the place of.
    pub replaced: u32,
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
    pub evidence: Vec<String>,
    pub fix: Option<String>,
    /// A person asked for it.
    pub asked: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Baseline {
    pub at: Timestamp,
    pub totals: Counters,
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
    /// Connections that ended before their response, or their WebSocket, did.
    pub cut: u64,
    pub p99_us: Option<u64>,
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
    /// Counted up to the end of `during`, to compute `after` from.
    pub totals: Counters,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Removal {
    pub volumes: bool,
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

    pub fn placements_of<'a>(&'a self, service: &'a ServiceName) -> impl Iterator<Item = (ReplicaId, &'a Placement)> {
        self.placements.iter().filter(move |(_, p)| p.service == *service).map(|(id, p)| (*id, p))
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

    /// Whether requests of this route are its own: now, or again if the rollout that gives it away fails.
    fn claims(&self, route: &Route) -> bool {
        let before = self.settled.filter(|_| self.rollout.is_some()).and_then(|settled| self.revisions.get(&settled));
        self.spec().routes.contains(route) || before.is_some_and(|record| record.spec.routes.contains(route))
    }

    /// The template that replicas should be made from.
    pub fn template(&self) -> Revision {
        self.target_record().template
    }

    /// How many replicas are wanted now.
    pub fn wanted(&self) -> u32 {
        if self.stopped || self.removal.is_some() { 0 } else { self.spec().replicas }
    }

    /// Whether what is wanted now would run as replicas of the settled revision, which are known to get ready.
    pub fn is_proven(&self) -> bool {
        let settled = self.settled.and_then(|settled| self.revisions.get(&settled));
        settled.is_some_and(|record| record.template == self.template())
    }

    pub fn named_volumes(&self) -> impl Iterator<Item = &Volume> {
        self.spec().volumes.iter().filter(|v| matches!(v.source, VolumeSource::Named(_)))
    }
}

impl Window {
    pub fn between(from: Timestamp, to: Timestamp, counted: &Counters) -> Window {
        Window {
            from,
            to,
            requests: counted.requests,
            errors: counted.server_errors(),
            cut: counted.cut,
            p99_us: counted.latency.quantile(0.99).map(|t| u64::try_from(t.as_micros()).unwrap_or(u64::MAX)),
        }
    }
}

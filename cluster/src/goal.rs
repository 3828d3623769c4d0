//! What one node should be doing: the whole truth about it, numbered, so that sending it twice is sending it once
//! and an old one bounces. Secrets in it are sealed to the node's own key; the ledger holds nothing else.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::id::{Generation, GoalNumber, ReplicaId, Revision, ServiceName};
use crate::resource::Resources;
use crate::route::Tables;
use crate::secret::{Sealed, SecretName};
use crate::spec::template::Template;
use crate::spec::{Deploy, HostAccess, ModuleLimits, Probe, Registry, SecretsAs, Service, Source, Volume};
use crate::state::RevisionRecord;
use crate::time::Timestamp;

/// A scheduled run may begin this long after it was due: time enough to give a silent node up and to have another replica
/// ready elsewhere.
pub const RUN_WITHIN: Duration = Duration::from_secs(5 * 60);

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Goal {
    pub number: GoalNumber,
    /// Of the state it was derived from.
    pub generation: Generation,
    pub replicas: BTreeMap<ReplicaId, ReplicaGoal>,
    pub tables: Tables,
    /// Every secret its replicas refer to, newest version, for this node only.
    pub secrets: BTreeMap<SecretName, Sealed>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaGoal {
    pub service: ServiceName,
    /// The template it was made from; it never changes in a replica's life.
    pub revision: Revision,
    pub duty: Duty,
    pub workload: Workload,
    pub port: Option<u16>,
    pub env: BTreeMap<String, Template>,
    /// Which secret each name in a template means: the project's own, else the global one. A name that is absent
    /// has no secret behind it.
    pub secrets: BTreeMap<String, SecretName>,
    pub resources: Resources,
    pub liveness: Option<Probe>,
    pub readiness: Option<Probe>,
    /// The scheduled runs that are its to make, once: when each was due, by the schedule's cron expression.
    #[serde(default)]
    pub runs: BTreeMap<String, Timestamp>,
    pub deploy: Deploy,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Duty {
    /// Be up; whether requests come is for the tables to say.
    Run,
    /// Stop with the grace the service asks for, then be gone.
    Stop,
    /// As [`Stop`](Duty::Stop), and take the service's volumes along.
    StopAndErase,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Workload {
    Container(Container),
    Module(ModuleGoal),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    /// As written.
    pub image: String,
    /// `sha256:…` once the first replica of the revision has resolved it: every later one runs the same bytes.
    pub digest: Option<String>,
    /// Ask the registry even when an image of this name is here (`orca redeploy`).
    pub pull: bool,
    pub registry: Option<Registry>,
    pub command: Vec<String>,
    pub secrets_as: SecretsAs,
    pub volumes: Vec<Volume>,
    pub host: HostAccess,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModuleGoal {
    /// For people.
    pub path: String,
    /// Hex SHA-256: how the node asks a control node for its bytes.
    pub digest: String,
    pub limits: ModuleLimits,
}

impl ReplicaGoal {
    pub fn is_running(&self) -> bool {
        self.duty == Duty::Run
    }

    /// The project's network: containers of a project see each other, by service name, and nobody else.
    pub fn network(&self) -> String {
        format!("orca-{}", self.service.project)
    }
}

/// What a node is told of one replica: of what never changes in its life, and of what newer revisions may change.
/// `means` says which secret a name in a template stands for; `runs` are those it was given.
pub(crate) fn replica_goal(
    service: &ServiceName,
    revision: Revision,
    duty: Duty,
    template: &RevisionRecord,
    newest: &RevisionRecord,
    means: impl Fn(&str) -> Option<SecretName>,
    runs: BTreeMap<String, Timestamp>,
) -> ReplicaGoal {
    let spec = &template.spec;
    let secrets = spec.secrets().into_iter().filter_map(|name| Some((name.to_owned(), means(name)?))).collect();
    ReplicaGoal {
        service: service.clone(),
        revision,
        duty,
        workload: workload(spec, template),
        port: spec.port,
        env: spec.env.clone(),
        secrets,
        resources: spec.resources,
        liveness: newest.spec.liveness.clone(),
        readiness: newest.spec.readiness.clone(),
        runs,
        deploy: newest.spec.deploy.clone(),
    }
}

fn workload(spec: &Service, record: &RevisionRecord) -> Workload {
    match &spec.source {
        Source::Image(image) => Workload::Container(Container {
            image: image.clone(),
            digest: record.digest.clone(),
            pull: record.pull && record.digest.is_none(),
            registry: spec.registry.clone(),
            command: spec.command.clone(),
            secrets_as: spec.secrets_as,
            volumes: spec.volumes.clone(),
            host: spec.host,
        }),
        Source::Module(module) => Workload::Module(ModuleGoal {
            path: module.path.clone(),
            digest: module.digest.clone().unwrap_or_default(),
            limits: spec.limits.clone(),
        }),
    }
}

//! The client plane: what people and programs ask. The HTTP API offers the same requests; both are carried out by
//! the same code in `control/api`.
//!
//! One stream for each request. Most are answered by one [`Response`]; [`Request::Watch`], [`Request::Logs`],
//! [`Request::Events`] and [`Request::Exec`] by a stream of their own messages, or by [`Response::Refused`] instead.

use orca_cluster::command::Refusal;
use orca_cluster::command::put::PutOutcome;
use orca_cluster::doctor::Finding;
use orca_cluster::event::Event;
use orca_cluster::id::{Generation, Label, Revision, ServiceName};
use orca_cluster::secret::{SecretName, TokenId};
use orca_cluster::spec::{Project, Settings};
use orca_cluster::state::{Receipt, Role};
use orca_cluster::status::{NodeStatus, ServiceStatus, Status};
use orca_cluster::time::Timestamp;
use orca_cluster::why::Diagnosis;
use serde::{Deserialize, Serialize};

use super::agent::Size;

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// What a deploy would do.
    Plan(Deploy),
    Deploy(Deploy),
    /// Which of these modules the cluster lacks, by hex SHA-256.
    MissingModules {
        digests: Vec<String>,
    },
    /// Followed by `size` raw bytes.
    PutModule {
        digest: String,
        size: u64,
    },
    /// What setting these would change.
    PlanSettings(Settings),
    SetSettings(Settings),
    Status {
        service: Option<ServiceName>,
    },
    /// [`Progress`] whenever something about these services changes, until the stream is closed.
    Watch {
        services: Vec<ServiceName>,
    },
    Why {
        service: ServiceName,
    },
    History {
        service: ServiceName,
    },
    Nodes,
    Events(EventsQuery),
    Logs(LogsQuery),
    Exec(Exec),
    Scale {
        service: ServiceName,
        replicas: u32,
    },
    Stop {
        service: ServiceName,
    },
    Start {
        service: ServiceName,
    },
    Restart {
        service: ServiceName,
    },
    /// As restart, with the image asked for anew.
    Redeploy {
        service: ServiceName,
    },
    Remove {
        service: ServiceName,
        volumes: bool,
    },
    Promote {
        service: ServiceName,
    },
    Rollback {
        service: ServiceName,
        to: Option<Revision>,
    },
    SetSecrets {
        secrets: Vec<SetSecret>,
    },
    ListSecrets {
        project: Option<Label>,
    },
    RemoveSecret {
        name: SecretName,
    },
    /// Seal a scope's secrets anew under a new data key.
    RotateSecrets {
        project: Option<Label>,
    },
    CreateToken(CreateToken),
    ListTokens,
    RevokeToken {
        id: TokenId,
    },
    Whoami,
    /// What the server can tell of its own health, for `orca doctor`.
    Doctor,
}

impl Request {
    /// Whether it is answered by a stream that goes on for as long as somebody listens.
    pub fn is_lasting(&self) -> bool {
        match self {
            Request::Watch { .. } | Request::Events(_) | Request::Logs(_) | Request::Exec(_) => true,
            Request::Plan(_)
            | Request::Deploy(_)
            | Request::MissingModules { .. }
            | Request::PutModule { .. }
            | Request::PlanSettings(_)
            | Request::SetSettings(_)
            | Request::Status { .. }
            | Request::Why { .. }
            | Request::History { .. }
            | Request::Nodes
            | Request::Scale { .. }
            | Request::Stop { .. }
            | Request::Start { .. }
            | Request::Restart { .. }
            | Request::Redeploy { .. }
            | Request::Remove { .. }
            | Request::Promote { .. }
            | Request::Rollback { .. }
            | Request::SetSecrets { .. }
            | Request::ListSecrets { .. }
            | Request::RemoveSecret { .. }
            | Request::RotateSecrets { .. }
            | Request::CreateToken(_)
            | Request::ListTokens
            | Request::RevokeToken { .. }
            | Request::Whoami
            | Request::Doctor => false,
        }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Deploy {
    pub project: Project,
    /// Only these of its services; empty means all.
    pub only: Vec<Label>,
    pub prune: bool,
    /// Take the place of a rollout that runs.
    pub replace: bool,
    pub if_generation: Option<Generation>,
    /// What the cluster's settings are to be, for these services already.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settings: Option<Settings>,
}

#[derive(Clone, Serialize, Deserialize)]
pub struct SetSecret {
    pub name: SecretName,
    /// Plaintext, on its way from the CLI to the vault.
    pub value: String,
}

impl std::fmt::Debug for SetSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SetSecret").field("name", &self.name).finish_non_exhaustive()
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct EventsQuery {
    pub service: Option<ServiceName>,
    pub project: Option<Label>,
    pub since: Option<Timestamp>,
    /// The last so many.
    pub last: Option<u32>,
    pub follow: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LogsQuery {
    pub service: ServiceName,
    pub replica: Option<orca_cluster::id::ReplicaId>,
    pub since: Option<Timestamp>,
    pub tail: Option<u32>,
    pub follow: bool,
    /// Only lines that contain this.
    pub grep: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Exec {
    pub service: ServiceName,
    pub replica: Option<orca_cluster::id::ReplicaId>,
    pub command: Vec<String>,
    pub terminal: Option<Size>,
    pub stdin: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CreateToken {
    pub name: String,
    pub role: Role,
    pub project: Option<Label>,
    pub expires: Option<Timestamp>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Response {
    /// Nothing more to say than the generation it led to.
    Done {
        generation: Generation,
    },
    Unchanged {
        generation: Generation,
    },
    /// `generation` is what the plan was made at, or what the deploy led to.
    Planned {
        generation: Generation,
        outcome: PutOutcome,
    },
    Deployed {
        generation: Generation,
        outcome: PutOutcome,
    },
    Revised {
        generation: Generation,
        revision: Revision,
    },
    MissingModules {
        digests: Vec<String>,
    },
    Status(Box<Status>),
    Why {
        service: Box<ServiceStatus>,
        diagnosis: Option<Diagnosis>,
    },
    History {
        service: ServiceName,
        revisions: Vec<RevisionInfo>,
        receipts: Vec<Receipt>,
    },
    Nodes {
        nodes: Vec<NodeStatus>,
    },
    Secrets {
        secrets: Vec<SecretInfo>,
    },
    /// The text is shown this once.
    Token {
        id: TokenId,
        text: String,
    },
    Tokens {
        tokens: Vec<TokenInfo>,
    },
    Whoami {
        name: String,
        role: Role,
        project: Option<Label>,
        cluster: String,
        cluster_id: String,
        version: String,
    },
    Doctor {
        findings: Vec<Finding>,
    },
    Refused(Refused),
}

/// Why a request was not done, with what the CLI needs for its exit code.
#[derive(Debug, Clone, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Refused {
    pub reason: Reason,
    /// Names the thing and the cause.
    pub message: String,
    /// The next step.
    pub hint: Option<String>,
    /// Of what was put: each thing that does not fit what the cluster has, for whoever has the files to point into.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unfit: Vec<Refusal>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    Invalid,
    Unauthorised,
    NotFound,
    Conflict,
    /// Nobody leads, or no majority answers: nothing can be changed now.
    NoQuorum,
    /// It may still happen.
    TimedOut,
    Failed,
}

/// Sent on a watch: at once, and whenever it differs from what was sent last.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    pub generation: Generation,
    pub at: Timestamp,
    /// In the order asked; a service that is gone is absent.
    pub services: Vec<ServiceStatus>,
    /// Events about these services since the last progress.
    pub events: Vec<Event>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RevisionInfo {
    pub revision: Revision,
    pub at: Timestamp,
    pub by: String,
    pub note: String,
    pub source: String,
    pub digest: Option<String>,
    pub replicas: u32,
    pub is_target: bool,
    pub is_settled: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SecretInfo {
    pub name: SecretName,
    pub version: u32,
    pub at: Timestamp,
    pub by: String,
    /// Services whose present specification refers to it.
    pub used_by: Vec<ServiceName>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TokenInfo {
    pub id: TokenId,
    pub name: String,
    pub role: Role,
    pub project: Option<Label>,
    pub created: Timestamp,
    pub expires: Option<Timestamp>,
}

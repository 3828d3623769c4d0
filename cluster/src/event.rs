//! What happened, for people: the history that `orca events` shows and the audit trail. An event is written by
//! `apply`, so it exists exactly when the change does.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::id::{ReplicaId, ServiceName};
use crate::time::Timestamp;

/// How many events are kept; the oldest goes when one more comes.
pub const EVENTS_MAX: usize = 5_000;

/// Who did it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Actor {
    /// Somebody with this token; its name is kept too, since tokens are deleted.
    Token { id: String, name: String },
    /// The cluster itself, carrying out what was asked before.
    Orca,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Log index of the entry that it came with, then its place among that entry's events.
    pub index: (u64, u32),
    pub at: Timestamp,
    pub actor: Actor,
    /// The address the actor spoke from, if it was another machine or process.
    pub source: Option<String>,
    pub kind: Kind,
    pub service: Option<ServiceName>,
    /// Whom it happened to, where that is one replica.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replica: Option<ReplicaId>,
    pub text: String,
}

/// A closed list, so that what is notified and filtered is decided and not matched by words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    ClusterFounded,
    NodeAdmitted,
    NodeDead,
    NodeAlive,
    SettingsChanged,
    Deployed,
    Scaled,
    Stopped,
    Started,
    Restarted,
    Promoted,
    RolledBack,
    ServiceRemoved,
    RolloutStarted,
    RolloutStep,
    RolloutDone,
    RolloutFailed,
    ReplicaExited,
    ReplicaRecovered,
    ScheduleRan,
    /// It failed, or nobody knows how it ended.
    ScheduleFailed,
    ScheduleSkipped,
    /// Somebody ran a command in a replica.
    Executed,
    SecretSet,
    SecretRemoved,
    SecretsRotated,
    DataKeyMade,
    TokenCreated,
    TokenRevoked,
    Refused,
}

impl fmt::Display for Actor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Actor::Token { name, .. } => f.write_str(name),
            Actor::Orca => f.write_str("orca"),
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::ClusterFounded => "cluster-founded",
            Kind::NodeAdmitted => "node-admitted",
            Kind::NodeDead => "node-dead",
            Kind::NodeAlive => "node-alive",
            Kind::SettingsChanged => "settings-changed",
            Kind::Deployed => "deployed",
            Kind::Scaled => "scaled",
            Kind::Stopped => "stopped",
            Kind::Started => "started",
            Kind::Restarted => "restarted",
            Kind::Promoted => "promoted",
            Kind::RolledBack => "rolled-back",
            Kind::ServiceRemoved => "service-removed",
            Kind::RolloutStarted => "rollout-started",
            Kind::RolloutStep => "rollout-step",
            Kind::RolloutDone => "rollout-done",
            Kind::RolloutFailed => "rollout-failed",
            Kind::ReplicaExited => "replica-exited",
            Kind::ReplicaRecovered => "replica-recovered",
            Kind::ScheduleRan => "schedule-ran",
            Kind::ScheduleFailed => "schedule-failed",
            Kind::ScheduleSkipped => "schedule-skipped",
            Kind::Executed => "executed",
            Kind::SecretSet => "secret-set",
            Kind::SecretRemoved => "secret-removed",
            Kind::SecretsRotated => "secrets-rotated",
            Kind::DataKeyMade => "data-key-made",
            Kind::TokenCreated => "token-created",
            Kind::TokenRevoked => "token-revoked",
            Kind::Refused => "refused",
        })
    }
}

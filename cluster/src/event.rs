//! What happened, for people: the history that `orca events` shows and the audit trail. An event is written by
//! `apply`, so it exists exactly when the change does.

use std::collections::VecDeque;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::id::{ReplicaId, ServiceName};
use crate::time::Timestamp;

/// How many events are kept; the oldest goes when one more comes.
pub const EVENTS_MAX: usize = 5_000;
/// Of these, how many of what people did stay whatever else happens: a container that crashes all night pushes out no
/// answer to who changed a secret.
const CHANGES_KEPT: usize = EVENTS_MAX / 2;

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

impl Event {
    /// Whether somebody changed something by it: the audit trail.
    pub fn is_change(&self) -> bool {
        matches!(self.actor, Actor::Token { .. }) && self.kind != Kind::Refused
    }
}

/// Adds the newest event, for which an old one goes.
pub fn keep(events: &mut VecDeque<Event>, event: Event) {
    if events.len() >= EVENTS_MAX {
        let changes = events.iter().filter(|event| event.is_change()).count();
        let oldest = if changes > CHANGES_KEPT { None } else { events.iter().position(|event| !event.is_change()) };
        events.remove(oldest.unwrap_or(0));
    }
    events.push_back(event);
}

/// Since when all that happened by itself is there; all of it ever, if none of it had to go yet.
pub fn complete_since(events: &VecDeque<Event>) -> Option<Timestamp> {
    let oldest = events.iter().find(|event| !event.is_change()).or(events.front());
    oldest.filter(|_| events.len() >= EVENTS_MAX).map(|event| event.at)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happens_by_itself_pushes_out_nothing_that_people_did() {
        let at = |index: u64, actor: Actor, kind: Kind| Event {
            index: (index, 0),
            at: Timestamp(index),
            actor,
            source: None,
            kind,
            service: None,
            replica: None,
            text: String::new(),
        };
        let alice = || Actor::Token { id: "1".to_owned(), name: "alice".to_owned() };
        let mut events = VecDeque::new();
        keep(&mut events, at(0, alice(), Kind::SecretSet));
        assert_eq!(complete_since(&events), None);
        for index in 1..=20_000 {
            let noise = if index % 2 == 0 { (alice(), Kind::Refused) } else { (Actor::Orca, Kind::ReplicaExited) };
            keep(&mut events, at(index, noise.0, noise.1));
        }
        assert_eq!((events.len(), events[0].kind, events[1].index.0), (EVENTS_MAX, Kind::SecretSet, 15_002));
        assert_eq!(complete_since(&events), Some(Timestamp(15_002)));
        // People who do much push out what they did long ago, and leave room for what happens.
        for index in 20_001..=40_000 {
            let what = if index % 4 == 0 { (Actor::Orca, Kind::ReplicaExited) } else { (alice(), Kind::Deployed) };
            keep(&mut events, at(index, what.0, what.1));
        }
        let changes = events.iter().filter(|event| event.is_change()).count();
        assert!(changes > CHANGES_KEPT && changes < EVENTS_MAX && events[0].index.0 > 20_000, "{changes}");
    }
}

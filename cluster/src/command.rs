//! Commands: the entries of the Raft log, and the only way [`State`] changes. `apply` reads no clock, cannot fail
//! half way, and answers the same on every control node; a command that cannot be done is an
//! [`Applied::Refused`], itself replicated, and has changed nothing.

pub mod adopt;
pub mod host;
mod limited;
pub mod put;
mod secret;
pub mod service;
mod token;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::event::{self, Actor, Event, Kind};
use crate::id::{Generation, Label, NodeId, ReplicaId, Revision, ServiceName};
use crate::limit::{Excess, Limits};
use crate::plan::Step;
use crate::secret::{DataKeyId, SealedDataKey, SealedRoot, SealedValue, SealingPublicKey, SecretName, TokenId};
use crate::spec::{Host, Route, Settings, change};
use crate::state::{Cluster, DataKey, Node, Removal, State, Token};
use crate::time::Timestamp;
use put::{PutOutcome, PutServices};

/// A command with what everyone who applies it must agree on: the proposer's time and who asked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    pub at: Timestamp,
    pub actor: Actor,
    /// The address the request came from.
    pub source: Option<String>,
    pub command: Command,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Command {
    Found(Box<Founding>),
    Admit(NewNode),
    SetSettings(Settings),
    PutServices(PutServices),
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
    /// New replicas of the same specification; with `pull`, of whatever the image's name means now.
    Restart {
        service: ServiceName,
        pull: bool,
    },
    Remove {
        service: ServiceName,
        volumes: bool,
    },
    /// Let the canary (or blue-green's new replicas) take over now.
    Promote {
        service: ServiceName,
    },
    /// Out of the rollout that runs, or back to this revision. Which one is the default is for
    /// [`Deployed::previous`] to say before this is proposed.
    Rollback {
        service: ServiceName,
        to: Option<Revision>,
    },
    /// What the leader decided, if the state is still the one it decided on.
    Adopt {
        parent: Generation,
        steps: Vec<Step>,
        announcements: Vec<Announcement>,
    },
    /// As entries of earlier versions have it: without an event. Now it is `NewDataKey`.
    AddDataKey(SealedDataKey),
    /// The next data key of a scope; with `rotates`, what older ones have sealed is to be sealed anew by it.
    NewDataKey {
        key: SealedDataKey,
        rotates: bool,
    },
    SetSecret {
        name: SecretName,
        version: u32,
        value: SealedValue,
    },
    RemoveSecret {
        name: SecretName,
        /// Refuse while a service refers to it; entries of earlier versions do not ask for that.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        if_unused: bool,
    },
    /// A scope's secrets under a new data key, all at once, as entries of earlier versions have it. All of them, as of
    /// these versions, or it is refused.
    RotateDataKey {
        key: SealedDataKey,
        values: BTreeMap<SecretName, SealedValue>,
    },
    /// Some secrets under this data key, which is there. One that has another version by now stays as it is.
    ResealSecrets {
        key: DataKeyId,
        values: BTreeMap<SecretName, SealedValue>,
    },
    /// The older data keys of the scope go; refused while one of them is in use.
    FinishRotation {
        key: DataKeyId,
    },
    CreateToken {
        id: TokenId,
        token: Token,
    },
    RevokeToken {
        id: TokenId,
    },
    /// Only an event: somebody was refused, a replica exited.
    Announce(Vec<Announcement>),
    /// The command within, if what it makes stays within these limits.
    Limited {
        limits: Limits,
        command: Box<Command>,
    },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Founding {
    pub id: String,
    pub name: Label,
    pub ca_certificate: String,
    pub ca_key: SealedValue,
    pub root: SealedRoot,
    pub data_key: SealedDataKey,
    /// The first administrator's.
    pub token: (TokenId, Token),
    pub node: NewNode,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NewNode {
    pub name: String,
    pub address: String,
    pub sealing_key: SealingPublicKey,
}

/// An event without what `apply` fills in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Announcement {
    pub kind: Kind,
    pub service: Option<ServiceName>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replica: Option<ReplicaId>,
    pub text: String,
}

/// The answer to a command.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Applied {
    /// It changed the state to this generation.
    Done {
        generation: Generation,
        detail: Detail,
    },
    /// The state was as asked already; nothing changed.
    Unchanged {
        generation: Generation,
    },
    Refused(Refusal),
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Detail {
    None,
    Node(NodeId),
    Put(PutOutcome),
    Revision(Revision),
}

/// Why a command changed nothing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    #[error("there is no service {0}")]
    NoService(ServiceName),
    #[error("{service} has no revision {revision}; `orca history {service}` lists them")]
    NoRevision { service: ServiceName, revision: Revision },
    #[error("{0} has no earlier revision to go back to")]
    NothingBefore(ServiceName),
    #[error("there is no secret {0}")]
    NoSecret(SecretName),
    #[error("there is no token {0}")]
    NoToken(TokenId),
    #[error("the cluster's state has moved: it is at {now}, the plan was made at {planned}")]
    Moved { planned: Generation, now: Generation },
    #[error(
        "{service} is being rolled out to {to}; wait for it, or undo it with `orca rollback {service}`; `orca deploy --replace` takes its place"
    )]
    Busy { service: ServiceName, to: Revision, since: Timestamp },
    #[error("{service} cannot be scaled to {replicas}: {reason}")]
    CannotScale { service: ServiceName, replicas: u32, reason: String },
    #[error("{0} is being removed; deploy it again when it is gone")]
    Removing(ServiceName),
    #[error("{route} is already routed to {owner}; give {service} another domain or path")]
    RouteTaken { service: ServiceName, route: Route, owner: ServiceName },
    #[error("{}", MissingSecrets(.missing))]
    SecretsMissing { missing: Vec<(ServiceName, String)> },
    #[error("{service} depends on `{needs}`, which is not a service of its project")]
    NoDependency { service: ServiceName, needs: Label },
    #[error("{0} is not waiting for a promotion")]
    NothingToPromote(ServiceName),
    #[error("secret {name} is used by {}; deploy what uses it without it first", Joined(.by, ", "))]
    SecretInUse { name: SecretName, by: Vec<ServiceName> },
    #[error("{}", host::taken(.service, .host, .owner, .held))]
    HostTaken { service: ServiceName, host: Box<Host>, owner: ServiceName, held: Box<Host> },
    #[error("secret {name} was changed by someone else meanwhile; try again")]
    SecretMoved { name: SecretName },
    #[error("the data key of {0:?} is not known")]
    NoDataKey(DataKeyId),
    #[error("data key {0} was made by someone else meanwhile; try again")]
    DataKeyTaken(DataKeyId),
    #[error("the cluster has been founded already")]
    Founded,
    #[error("{0}")]
    TooMuch(Excess),
    #[error("the last administrator's token cannot be revoked; create another one first")]
    LastAdmin,
    /// Each for a reason of its own.
    #[error("{}", Joined(.0, "; "))]
    Several(Vec<Refusal>),
}

/// All of these, with this between them.
struct Joined<'a, T>(&'a [T], &'a str);

impl<T: std::fmt::Display> std::fmt::Display for Joined<'_, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (at, one) in self.0.iter().enumerate() {
            let between = if at > 0 { self.1 } else { "" };
            write!(f, "{between}{one}")?;
        }
        Ok(())
    }
}

struct MissingSecrets<'a>(&'a [(ServiceName, String)]);

impl std::fmt::Display for MissingSecrets<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (at, (service, name)) in self.0.iter().enumerate() {
            if at > 0 {
                f.write_str("; ")?;
            }
            let project = &service.project;
            write!(
                f,
                "{service} needs secret {name}, which is not set: `orca secrets set {name} --project {project}`"
            )?;
        }
        Ok(())
    }
}

/// One command's work on the state: collects the events it causes.
pub(crate) struct Change<'a> {
    pub state: &'a mut State,
    pub index: u64,
    pub at: Timestamp,
    pub actor: Actor,
    pub source: Option<String>,
    events: u32,
}

impl State {
    /// Applies the entry at this index of the log.
    pub fn apply(&mut self, index: u64, entry: Entry) -> Applied {
        let Entry { at, actor, source, command } = entry;
        let mut change = Change { state: self, index, at, actor, source, events: 0 };
        let result = change.carry_out(command);
        match result {
            Ok(Some(detail)) => {
                self.generation.0 += 1;
                Applied::Done { generation: self.generation, detail }
            }
            Ok(None) => Applied::Unchanged { generation: self.generation },
            Err(refusal) => Applied::Refused(refusal),
        }
    }
}

impl Change<'_> {
    /// What changed, or [`None`] if it was so before. An `Err` has changed nothing.
    fn carry_out(&mut self, command: Command) -> Result<Option<Detail>, Refusal> {
        match command {
            Command::Found(founding) => self.found(*founding),
            Command::Admit(node) => self.admit(node),
            Command::SetSettings(settings) => self.set_settings(settings),
            Command::PutServices(put) => self.put_services(put),
            Command::Scale { service, replicas } => self.scale(&service, replicas),
            Command::Stop { service } => self.set_stopped(&service, true),
            Command::Start { service } => self.set_stopped(&service, false),
            Command::Restart { service, pull } => self.restart(&service, pull),
            Command::Remove { service, volumes } => self.remove(&service, Removal { volumes, hands_over: false }),
            Command::Promote { service } => self.promote(&service),
            Command::Rollback { service, to } => self.rollback(&service, to),
            Command::Adopt { parent, steps, announcements } => self.adopt(parent, steps, announcements),
            Command::AddDataKey(key) => self.add_data_key(key),
            Command::NewDataKey { key, rotates } => self.new_data_key(key, rotates),
            Command::SetSecret { name, version, value } => self.set_secret(name, version, value),
            Command::RemoveSecret { name, if_unused } => self.remove_secret(name, if_unused),
            Command::RotateDataKey { key, values } => self.rotate(key, values),
            Command::ResealSecrets { key, values } => self.reseal(&key, values),
            Command::FinishRotation { key } => self.finish_rotation(&key),
            Command::CreateToken { id, token } => self.create_token(id, token),
            Command::RevokeToken { id } => self.revoke(&id),
            Command::Announce(announcements) => self.announce(announcements),
            Command::Limited { limits, command } => self.carry_out_within(&limits, *command),
        }
    }

    fn found(&mut self, founding: Founding) -> Result<Option<Detail>, Refusal> {
        if self.state.cluster.is_some() {
            return Err(Refusal::Founded);
        }
        let Founding { id, name, ca_certificate, ca_key, root, data_key, token, node } = founding;
        self.say(Kind::ClusterFounded, None, format!("cluster {name} founded"));
        self.state.cluster = Some(Cluster { id, name, founded: self.at, ca_certificate, ca_key, root });
        // One use: the CA's key.
        self.state.data_keys.insert(data_key.id.clone(), DataKey { key: data_key, uses: 1, rotating: false });
        self.state.tokens.insert(token.0, token.1);
        self.admit(node)
    }

    fn admit(&mut self, node: NewNode) -> Result<Option<Detail>, Refusal> {
        let id = NodeId(self.index);
        let NewNode { name, address, sealing_key } = node;
        self.say(Kind::NodeAdmitted, None, format!("node {name} admitted as {id}"));
        let node = Node { name, address, sealing_key, admitted: self.at, dead: false };
        self.state.nodes.insert(id, node);
        Ok(Some(Detail::Node(id)))
    }

    pub(super) fn set_settings(&mut self, settings: Settings) -> Result<Option<Detail>, Refusal> {
        if self.state.settings == settings {
            return Ok(None);
        }
        let differences = change::settings(&self.state.settings, &settings);
        self.state.settings = settings;
        self.say(Kind::SettingsChanged, None, format!("cluster settings changed: {}", differences.join(", ")));
        Ok(Some(Detail::None))
    }

    fn announce(&mut self, announcements: Vec<Announcement>) -> Result<Option<Detail>, Refusal> {
        for Announcement { kind, service, replica, text } in announcements {
            self.say_of(kind, service.as_ref(), replica, text);
        }
        Ok(Some(Detail::None))
    }

    pub(crate) fn say(&mut self, kind: Kind, service: Option<&ServiceName>, text: String) {
        self.say_of(kind, service, None, text);
    }

    fn say_of(&mut self, kind: Kind, service: Option<&ServiceName>, replica: Option<ReplicaId>, text: String) {
        let event = Event {
            index: (self.index, self.events),
            at: self.at,
            actor: self.actor.clone(),
            source: self.source.clone(),
            kind,
            service: service.cloned(),
            replica,
            text,
        };
        self.events += 1;
        event::keep(&mut self.state.events, event);
    }
}

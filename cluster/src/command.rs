//! Commands: the entries of the Raft log, and the only way [`State`] changes. `apply` reads no clock, cannot fail
//! half way, and answers the same on every control node; a command that cannot be done is an
//! [`Applied::Refused`], itself replicated, and has changed nothing.

pub mod adopt;
pub mod host;
mod limited;
pub mod put;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::event::{Actor, EVENTS_MAX, Event, Kind};
use crate::id::{Generation, Label, NodeId, ReplicaId, Revision, ServiceName};
use crate::limit::{Excess, Limits};
use crate::plan::Step;
use crate::secret::{DataKeyId, SealedDataKey, SealedRoot, SealedValue, SealingPublicKey, SecretName, TokenId};
use crate::spec::change::change;
use crate::spec::{Host, Route, Service, Settings, VolumeSource, check};
use crate::state::{
    Cluster, DataKey, Deployed, Direction, Failure, Node, PlacementState, Removal, RevisionRecord, Role, Rollout,
    SecretRecord, State, Token,
};
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
    pub labels: BTreeMap<String, String>,
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
    #[error(
        "{host} is a host of {owner}, which has {held}; a token limited to {} cannot take it: give {service} another domain",
        .service.project
    )]
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
            Command::Admit(node) => {
                let id = NodeId(self.index);
                self.admit(id, node);
                Ok(Some(Detail::Node(id)))
            }
            Command::SetSettings(settings) => {
                if self.state.settings == settings {
                    return Ok(None);
                }
                self.state.settings = settings;
                self.say(Kind::SettingsChanged, None, "cluster settings changed".to_owned());
                Ok(Some(Detail::None))
            }
            Command::PutServices(put) => self.put_services(put),
            Command::Scale { service, replicas } => self.scale(&service, replicas),
            Command::Stop { service } => self.set_stopped(&service, true),
            Command::Start { service } => self.set_stopped(&service, false),
            Command::Restart { service, pull } => self.restart(&service, pull),
            Command::Remove { service, volumes } => self.remove(&service, Removal { volumes, hands_over: false }),
            Command::Promote { service } => self.promote(&service),
            Command::Rollback { service, to } => self.rollback(&service, to),
            Command::Adopt { parent, steps, announcements } => self.adopt(parent, steps, announcements),
            Command::AddDataKey(key) => {
                let id = key.id.clone();
                if self.state.data_keys.contains_key(&id) {
                    return Ok(None);
                }
                self.state.data_keys.insert(id, DataKey { key, uses: 0, rotating: false });
                Ok(Some(Detail::None))
            }
            Command::NewDataKey { key, rotates } => self.add_data_key(key, rotates),
            Command::SetSecret { name, version, value } => self.set_secret(name, version, value),
            Command::RemoveSecret { name, if_unused } => {
                let by = self.state.secret_users(&name);
                if if_unused && !by.is_empty() {
                    return Err(Refusal::SecretInUse { name, by });
                }
                if self.state.secrets.remove(&name).is_none() {
                    return Err(Refusal::NoSecret(name));
                }
                self.say(Kind::SecretRemoved, None, format!("secret {name} removed"));
                Ok(Some(Detail::None))
            }
            Command::RotateDataKey { key, values } => self.rotate(key, values),
            Command::ResealSecrets { key, values } => self.reseal(&key, values),
            Command::FinishRotation { key } => self.finish_rotation(&key),
            Command::CreateToken { id, token } => {
                self.say(
                    Kind::TokenCreated,
                    None,
                    format!("token {id} created for {} ({:?})", token.name, token.role).to_lowercase(),
                );
                self.state.tokens.insert(id, token);
                Ok(Some(Detail::None))
            }
            Command::RevokeToken { id } => self.revoke(&id),
            Command::Announce(announcements) => {
                self.announce(announcements);
                Ok(Some(Detail::None))
            }
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
        let id = NodeId(self.index);
        self.admit(id, node);
        Ok(Some(Detail::Node(id)))
    }

    fn admit(&mut self, id: NodeId, node: NewNode) {
        let NewNode { name, address, sealing_key, labels } = node;
        self.say(Kind::NodeAdmitted, None, format!("node {name} admitted as {id}"));
        let node = Node { name, address, sealing_key, labels, admitted: self.at, dead: false };
        self.state.nodes.insert(id, node);
    }

    fn scale(&mut self, name: &ServiceName, replicas: u32) -> Result<Option<Detail>, Refusal> {
        let deployed = self.present(name)?;
        let record = deployed.target_record();
        let before = record.spec.replicas;
        if before == replicas {
            return Ok(None);
        }
        let mut spec = record.spec.clone();
        spec.replicas = replicas;
        if let Some(reason) = cannot_scale(&spec) {
            return Err(Refusal::CannotScale { service: name.clone(), replicas, reason });
        }
        let record = RevisionRecord { spec, note: format!("scale to {replicas}"), ..record.clone() };
        let revision = self.revise(name, record);
        self.say(Kind::Scaled, Some(name), format!("scaled from {before} to {replicas} replicas"));
        Ok(Some(Detail::Revision(revision)))
    }

    fn set_stopped(&mut self, name: &ServiceName, stopped: bool) -> Result<Option<Detail>, Refusal> {
        let at = self.at;
        let deployed = self.present(name)?;
        if deployed.stopped == stopped {
            return Ok(None);
        }
        deployed.stopped = stopped;
        let (target, proven) = (deployed.target, deployed.is_proven());
        match &mut deployed.rollout {
            Some(rollout) if !stopped && rollout.direction == Direction::Forward => rollout.started = at,
            // Deployed while it was stopped: now it can be seen whether it gets ready.
            None if !stopped && !proven => self.begin(name, target),
            Some(_) | None => {}
        }
        match stopped {
            true => self.say(Kind::Stopped, Some(name), "stopped".to_owned()),
            false => self.say(Kind::Started, Some(name), "started".to_owned()),
        }
        Ok(Some(Detail::None))
    }

    fn restart(&mut self, name: &ServiceName, pull: bool) -> Result<Option<Detail>, Refusal> {
        let deployed = self.present(name)?;
        if let Some(rollout) = &deployed.rollout {
            return Err(busy(name, rollout));
        }
        let record = deployed.target_record();
        let record = RevisionRecord {
            template: next_revision(deployed),
            digest: if pull { None } else { record.digest.clone() },
            pull,
            note: if pull { "redeploy" } else { "restart" }.to_owned(),
            ..record.clone()
        };
        let revision = self.revise(name, record);
        self.promote_at_once(name);
        let what = if pull { "redeployed" } else { "restarted" };
        self.say(Kind::Restarted, Some(name), format!("{what} as {revision}"));
        Ok(Some(Detail::Revision(revision)))
    }

    fn remove(&mut self, name: &ServiceName, removal: Removal) -> Result<Option<Detail>, Refusal> {
        let deployed = self.state.services.get_mut(name).ok_or_else(|| Refusal::NoService(name.clone()))?;
        if deployed.removal == Some(removal) {
            return Ok(None);
        }
        deployed.removal = Some(removal);
        deployed.rollout = None;
        let text = if removal.volumes { "removed, with its volumes" } else { "removed" };
        self.say(Kind::ServiceRemoved, Some(name), text.to_owned());
        Ok(Some(Detail::None))
    }

    fn promote(&mut self, name: &ServiceName) -> Result<Option<Detail>, Refusal> {
        let deployed = self.present(name)?;
        let canary = matches!(deployed.spec().deploy.strategy, crate::spec::Strategy::Canary { .. });
        match &mut deployed.rollout {
            Some(rollout) if canary && rollout.direction == Direction::Forward && !rollout.promoted => {
                rollout.promoted = true;
                let to = rollout.to;
                self.say(Kind::Promoted, Some(name), format!("{to} promoted"));
                Ok(Some(Detail::None))
            }
            _ => Err(Refusal::NothingToPromote(name.clone())),
        }
    }

    fn rollback(&mut self, name: &ServiceName, to: Option<Revision>) -> Result<Option<Detail>, Refusal> {
        let deployed = self.present(name)?;
        // While a rollout runs, going back means to where it came from, whose replicas are still there.
        if let (Some(rollout), None) = (&deployed.rollout, to) {
            let to = rollout.to;
            if deployed.settled.is_none() {
                return Err(Refusal::NothingBefore(name.clone()));
            }
            if rollout.direction != Direction::Forward {
                return Ok(None);
            }
            let why = Failure {
                cause: format!("{} asked to go back", self.actor),
                evidence: Vec::new(),
                fix: None,
                asked: true,
            };
            self.turn_back(name, why);
            self.say(Kind::RolledBack, Some(name), format!("rollout of {to} called back"));
            return Ok(Some(Detail::None));
        }
        let to = match to {
            Some(to) => to,
            // As entries of earlier versions have it: now the revision comes with it.
            None => previous_template(deployed).ok_or_else(|| Refusal::NothingBefore(name.clone()))?,
        };
        let Some(record) = deployed.revisions.get(&to) else {
            return Err(Refusal::NoRevision { service: name.clone(), revision: to });
        };
        if deployed.target == to {
            return Ok(None);
        }
        // Its replicas may be there still, and do: nothing is restarted then.
        let next = next_revision(deployed);
        let record = record.clone();
        let there = self
            .state
            .placements_of(name)
            .any(|(_, placement)| placement.revision == record.template && placement.state == PlacementState::Serve);
        let record = RevisionRecord {
            template: if there { record.template } else { next },
            pull: false,
            note: format!("rollback to {to}"),
            ..record.clone()
        };
        if let Some((route, owner)) = record
            .spec
            .routes
            .iter()
            .find_map(|route| Some((route.clone(), self.state.route_owner(route, name)?.clone())))
        {
            return Err(Refusal::RouteTaken { service: name.clone(), route, owner });
        }
        let revision = self.revise(name, record);
        self.promote_at_once(name);
        self.say(Kind::RolledBack, Some(name), format!("back to {to}, as {revision}"));
        Ok(Some(Detail::Revision(revision)))
    }

    fn set_secret(&mut self, name: SecretName, version: u32, value: SealedValue) -> Result<Option<Detail>, Refusal> {
        let current = self.state.secrets.get(&name).map_or(0, |record| record.version);
        // The version is part of what the ciphertext is bound to, so it was chosen before: two at once would
        // choose the same.
        if version != current + 1 {
            return Err(Refusal::SecretMoved { name });
        }
        let Some(key) = self.state.data_keys.get_mut(&value.key) else {
            return Err(Refusal::NoDataKey(value.key));
        };
        key.uses += 1;
        let record = SecretRecord { version, value, at: self.at, by: self.actor.clone() };
        self.say(Kind::SecretSet, None, format!("secret {name} set, version {version}"));
        self.state.secrets.insert(name, record);
        Ok(Some(Detail::None))
    }

    fn add_data_key(&mut self, key: SealedDataKey, rotates: bool) -> Result<Option<Detail>, Refusal> {
        let id = key.id.clone();
        // The newest seals what is set from now on, so one that comes late must not look like the newest.
        if self.state.data_keys.keys().any(|other| other.scope == id.scope && other.version >= id.version) {
            return Err(Refusal::DataKeyTaken(id));
        }
        let what = if rotates { "to seal its secrets anew" } else { "for new values" };
        let text = format!("data key {} of {} made, {what}", id.version, id.scope);
        self.say(Kind::DataKeyMade, None, text);
        self.state.data_keys.insert(id, DataKey { key, uses: 0, rotating: rotates });
        Ok(Some(Detail::None))
    }

    fn reseal(&mut self, id: &DataKeyId, values: BTreeMap<SecretName, SealedValue>) -> Result<Option<Detail>, Refusal> {
        let Some(key) = self.state.data_keys.get_mut(id) else {
            return Err(Refusal::NoDataKey(id.clone()));
        };
        let mut changed = false;
        for (name, value) in values {
            let Some(record) = self.state.secrets.get_mut(&name) else { continue };
            // Done before, or set anew meanwhile; what is left is found by whoever goes on.
            let is_due = record.version == value.version && record.value.key.version < id.version;
            if is_due && name.scope() == id.scope && value.key == *id {
                record.value = value;
                key.uses += 1;
                changed = true;
            }
        }
        Ok(changed.then_some(Detail::None))
    }

    fn finish_rotation(&mut self, id: &DataKeyId) -> Result<Option<Detail>, Refusal> {
        if let Some((name, _)) = self.state.older_secrets(id).next() {
            return Err(Refusal::SecretMoved { name: name.clone() });
        }
        let Some(key) = self.state.data_keys.get_mut(id) else {
            return Err(Refusal::NoDataKey(id.clone()));
        };
        if !std::mem::take(&mut key.rotating) {
            return Ok(None);
        }
        self.state.data_keys.retain(|other, _| other.scope != id.scope || other.version >= id.version);
        let count = self.state.secrets.keys().filter(|name| name.scope() == id.scope).count();
        let text = format!("{count} secrets of {} sealed anew by data key {}", id.scope, id.version);
        self.say(Kind::SecretsRotated, None, text);
        Ok(Some(Detail::None))
    }

    fn rotate(
        &mut self,
        key: SealedDataKey,
        values: BTreeMap<SecretName, SealedValue>,
    ) -> Result<Option<Detail>, Refusal> {
        // Two keys under one id, and what the first one sealed could not be opened any more.
        if self.state.data_keys.contains_key(&key.id) {
            return Err(Refusal::DataKeyTaken(key.id));
        }
        let scope = key.id.scope.clone();
        for (name, record) in self.state.secrets.iter().filter(|(name, _)| name.scope() == scope) {
            if values.get(name).is_none_or(|value| value.version != record.version) {
                return Err(Refusal::SecretMoved { name: name.clone() });
            }
        }
        let id = key.id.clone();
        let uses = values.len() as u64;
        for (name, value) in values {
            if let Some(record) = self.state.secrets.get_mut(&name) {
                record.value = value;
            }
        }
        self.state.data_keys.insert(id.clone(), DataKey { key, uses, rotating: false });
        self.say(
            Kind::SecretsRotated,
            None,
            format!("{uses} secrets of {scope} sealed anew by data key {}", id.version),
        );
        Ok(Some(Detail::None))
    }

    fn revoke(&mut self, id: &TokenId) -> Result<Option<Detail>, Refusal> {
        let Some(token) = self.state.tokens.get(id) else {
            return Err(Refusal::NoToken(id.clone()));
        };
        let is_lasting_admin = |t: &Token| t.role == Role::Admin && t.project.is_none() && t.expires.is_none();
        let admins = self.state.tokens.values().filter(|t| is_lasting_admin(t)).count();
        if is_lasting_admin(token) && admins == 1 {
            return Err(Refusal::LastAdmin);
        }
        let name = token.name.clone();
        self.state.tokens.remove(id);
        self.say(Kind::TokenRevoked, None, format!("token {id} of {name} revoked"));
        Ok(Some(Detail::None))
    }

    /// No canary: what comes is known, and a person wants all of it now.
    fn promote_at_once(&mut self, name: &ServiceName) {
        if let Some(rollout) = self.state.services.get_mut(name).and_then(|deployed| deployed.rollout.as_mut()) {
            rollout.promoted = true;
        }
    }

    /// A service that exists and is not going.
    fn present(&mut self, name: &ServiceName) -> Result<&mut Deployed, Refusal> {
        let deployed = self.state.services.get_mut(name).ok_or_else(|| Refusal::NoService(name.clone()))?;
        match deployed.removal {
            Some(_) => Err(Refusal::Removing(name.clone())),
            None => Ok(deployed),
        }
    }

    /// Makes this the service's newest revision and its target, and starts the rollout to it.
    fn revise(&mut self, name: &ServiceName, record: RevisionRecord) -> Revision {
        let record = RevisionRecord { at: self.at, by: self.actor.clone(), ..record };
        let deployed = self.state.services.get_mut(name).expect("the caller has looked it up");
        let revision = next_revision(deployed);
        let same = record.template == deployed.template();
        deployed.revisions.insert(revision, record);
        deployed.target = revision;
        match &mut deployed.rollout {
            // The same replicas, on their way already: now it is the way to this revision.
            Some(rollout) if same && rollout.direction == Direction::Forward => rollout.to = revision,
            Some(_) | None => self.begin(name, revision),
        }
        self.forget_old_revisions(name);
        revision
    }

    /// Starts the rollout of the target, in place of any that runs.
    fn begin(&mut self, name: &ServiceName, to: Revision) {
        let at = self.at;
        let deployed = self.state.services.get_mut(name).expect("the caller has looked it up");
        let from = deployed.settled;
        deployed.rollout = Some(Rollout {
            to,
            from,
            started: at,
            direction: Direction::Forward,
            promoted: false,
            baseline: None,
            replaced: 0,
            trial: None,
        });
    }

    /// Makes the settled revision the target again.
    fn turn_back(&mut self, name: &ServiceName, why: Failure) {
        let deployed = self.state.services.get_mut(name).expect("the caller has looked it up");
        if let (Some(settled), Some(rollout)) = (deployed.settled, &mut deployed.rollout) {
            rollout.direction = Direction::Back { why };
            deployed.target = settled;
        }
    }

    fn announce(&mut self, announcements: Vec<Announcement>) {
        for Announcement { kind, service, replica, text } in announcements {
            self.say_of(kind, service.as_ref(), replica, text);
        }
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
        if self.state.events.len() == EVENTS_MAX {
            self.state.events.pop_front();
        }
        self.state.events.push_back(event);
    }
}

fn busy(name: &ServiceName, rollout: &Rollout) -> Refusal {
    Refusal::Busy { service: name.clone(), to: rollout.to, since: rollout.started }
}

fn next_revision(deployed: &Deployed) -> Revision {
    let last = deployed.revisions.keys().next_back().copied().unwrap_or_default();
    Revision(last.0 + 1)
}

/// Whether this many replicas may be asked of a service, by the rules of this version. Asked before it is proposed.
pub fn check_scale(state: &State, service: &ServiceName, replicas: u32) -> Result<(), Refusal> {
    // Whether it is there is for the command to say.
    let Some(deployed) = state.services.get(service) else { return Ok(()) };
    let spec = Service { replicas, ..deployed.spec().clone() };
    match check::service(&spec).into_iter().next() {
        Some(fault) => Err(Refusal::CannotScale { service: service.clone(), replicas, reason: fault.message }),
        None => Ok(()),
    }
}

/// What entries have been refused for since the first version, and are for ever: these rules do not follow those of
/// [`check`], or a log would mean another thing after an update.
fn cannot_scale(spec: &Service) -> Option<String> {
    const REPLICAS_MAX: u32 = 500;
    let replicas = spec.replicas;
    if replicas > REPLICAS_MAX {
        return Some(format!("a service has at most {REPLICAS_MAX} replicas, not {replicas}"));
    }
    let written = spec.volumes.iter().find_map(|volume| match &volume.source {
        VolumeSource::Named(name) if !volume.read_only => Some(name),
        VolumeSource::Named(_) | VolumeSource::Host(_) => None,
    });
    let volume = written.filter(|_| replicas > 1)?;
    Some(format!("{replicas} replicas cannot all hold the volume `{volume}`"))
}

impl Deployed {
    /// What `orca rollback` goes back to if it is not told: the newest revision before the target that has served. One
    /// that was given up, or overtaken before it got ready, is nothing to go back to; one that only had another number
    /// of the same replicas is not what anybody means.
    pub fn previous(&self) -> Option<Revision> {
        let target = self.target_record();
        let is_rescale = |record: &RevisionRecord| {
            let same = Service { replicas: target.spec.replicas, ..record.spec.clone() };
            record.template == target.template && change(&same, &target.spec).is_nothing()
        };
        let before = self.revisions.range(..self.target).rev();
        before.filter(|(_, record)| !is_rescale(record)).map(|(revision, _)| *revision).find(|at| has_served(self, *at))
    }
}

/// The newest revision before the target that other replicas than the target's were made from, and that has served.
fn previous_template(deployed: &Deployed) -> Option<Revision> {
    let template = deployed.template();
    deployed
        .revisions
        .range(..deployed.target)
        .rev()
        .find(|(revision, record)| record.template != template && has_served(deployed, **revision))
        .map(|(revision, _)| *revision)
}

fn has_served(deployed: &Deployed, revision: Revision) -> bool {
    let last = deployed.receipts.iter().rev().find(|receipt| receipt.revision == revision);
    // Every rollout begins from what had settled by then.
    deployed.settled == Some(revision)
        || deployed.receipts.iter().any(|receipt| receipt.from == Some(revision))
        || last.is_some_and(|receipt| receipt.outcome.is_done())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::{Ciphertext, Opaque, Scope};

    #[test]
    fn a_data_key_is_never_replaced_by_another_of_its_id() {
        let mut state = State::default();
        let mut index = 0;
        let mut apply = |command| {
            index += 1;
            let applied = state.apply(index, Entry { at: Timestamp(1), actor: Actor::Orca, source: None, command });
            (applied, state.data_keys.values().next().map(|kept| kept.key.clone()))
        };
        let key = |byte| SealedDataKey {
            id: DataKeyId { scope: Scope::Global, version: 1 },
            root: 1,
            created: Timestamp(1),
            key: Ciphertext { nonce: Opaque(vec![byte]), bytes: Opaque(vec![byte]) },
        };
        apply(Command::AddDataKey(key(1)));
        let (second, kept) = apply(Command::AddDataKey(key(2)));
        assert!(matches!(second, Applied::Unchanged { .. }) && kept == Some(key(1)), "{second:?}");
        let (rotated, kept) = apply(Command::RotateDataKey { key: key(3), values: BTreeMap::new() });
        assert_eq!((rotated, kept), (Applied::Refused(Refusal::DataKeyTaken(key(3).id)), Some(key(1))));
    }

    fn deploy(state: &mut State, project: &str, text: &str) -> Applied {
        apply(state, Command::PutServices(put::tests::put(project, text)))
    }

    fn apply(state: &mut State, command: Command) -> Applied {
        let index = state.generation.0 + 1;
        state.apply(index, Entry { at: Timestamp(index), actor: Actor::Orca, source: None, command })
    }

    fn web() -> ServiceName {
        "shop/web".parse().unwrap()
    }

    fn deployed(state: &mut State) -> &mut Deployed {
        state.services.get_mut(&web()).unwrap()
    }

    /// The rollout of what is wanted ends well.
    fn settle(state: &mut State) {
        let deployed = deployed(state);
        (deployed.rollout, deployed.settled) = (None, Some(deployed.target));
    }

    #[test]
    fn rollback_goes_to_the_revision_before_whatever_changed_but_not_to_another_number_of_the_same() {
        let text = |image: u32, path: &str, replicas: u32| {
            format!(
                "[[service]]\nname = \"web\"\nimage = \"web:{image}\"\nport = 80\nreplicas = {replicas}\n\
                 domain = \"a.test\"\nroutes = [\"{path}\"]\n"
            )
        };
        let mut state = State::default();
        for (image, path, replicas) in [(1, "/*", 1), (2, "/*", 1), (2, "/x", 1), (2, "/x", 3)] {
            deploy(&mut state, "shop", &text(image, path, replicas));
            settle(&mut state);
            let revision = deployed(&mut state).target;
            deployed(&mut state).receipts.push_back(served(revision));
        }
        assert_eq!(deployed(&mut state).previous(), Some(Revision(2)), "only the route is another");
        apply(&mut state, Command::Rollback { service: web(), to: Some(Revision(2)) });
        let target = deployed(&mut state).target_record().clone();
        assert_eq!((target.spec.routes.first().unwrap().path.as_str(), target.spec.replicas), ("/", 1));
    }

    fn served(revision: Revision) -> crate::state::Receipt {
        crate::state::Receipt {
            revision,
            from: None,
            outcome: crate::state::Outcome::Done,
            started: Timestamp(1),
            ended: Timestamp(2),
            replaced: 0,
            before: Default::default(),
            during: Default::default(),
            after: None,
            failure: None,
            tally: Default::default(),
        }
    }

    #[test]
    fn a_secret_that_is_referred_to_stays_and_one_that_is_not_goes() {
        let mut state = State::default();
        let (scope, name) = (Scope::Global, SecretName::new(None, "KEY").unwrap());
        let bytes = || Ciphertext { nonce: Opaque(vec![]), bytes: Opaque(vec![]) };
        let id = DataKeyId { scope, version: 1 };
        let key = SealedDataKey { id: id.clone(), root: 1, created: Timestamp(1), key: bytes() };
        apply(&mut state, Command::NewDataKey { key, rotates: false });
        let value = SealedValue { key: id, version: 1, value: bytes() };
        apply(&mut state, Command::SetSecret { name: name.clone(), version: 1, value });
        let without = "[[service]]\nname = \"web\"\nimage = \"web:1\"\n";
        deploy(&mut state, "shop", &format!("{without}[service.env]\nA = \"${{secrets.KEY}}\"\n"));
        settle(&mut state);
        let remove = |if_unused| Command::RemoveSecret { name: name.clone(), if_unused };
        let in_use = Applied::Refused(Refusal::SecretInUse { name: name.clone(), by: vec![web()] });
        assert_eq!(apply(&mut state, remove(true)), in_use);
        deploy(&mut state, "shop", without);
        assert_eq!(apply(&mut state, remove(true)), in_use, "the rollout may have to go back");
        // What an entry of an earlier version says.
        assert!(matches!(apply(&mut state.clone(), remove(false)), Applied::Done { .. }));
        settle(&mut state);
        assert!(matches!(apply(&mut state, remove(true)), Applied::Done { .. }));
    }

    #[test]
    fn what_scale_is_refused_for_when_it_is_applied_is_what_it_always_was() {
        let mut state = State::default();
        deploy(&mut state, "shop", "[[service]]\nname = \"web\"\nimage = \"web:1\"\n");
        // A rule of a later version, which does not let this through any more.
        let target = deployed(&mut state).target;
        deployed(&mut state).revisions.get_mut(&target).unwrap().spec.source =
            crate::spec::Source::Image("NOT/an image".to_owned());
        let scale = |replicas| Command::Scale { service: web(), replicas };
        assert!(matches!(check_scale(&state, &web(), 2), Err(Refusal::CannotScale { .. })));
        assert!(matches!(apply(&mut state, scale(2)), Applied::Done { .. }));
        assert!(matches!(apply(&mut state, scale(501)), Applied::Refused(Refusal::CannotScale { .. })));
    }

    #[test]
    fn whoever_is_limited_to_a_project_takes_no_host_of_another() {
        let text = |domain: &str, route: &str| {
            format!(
                "[[service]]\nname = \"web\"\nimage = \"web:1\"\nport = 80\ndomain = \"{domain}\"\n\
                 routes = [\"{route}\"]\n"
            )
        };
        let mut state = State::default();
        deploy(&mut state, "shop", &text("*.a.test", "/*"));
        deploy(&mut state, "blog", &text("blog.test", "/*"));
        let asked = |project: &str, domain: &str, route: &str| put::tests::put(project, &text(domain, route));
        use put::{Reach, preview};
        for (domain, route, taken) in [
            ("www.a.test", "/x", true),
            ("*.a.test", "/x", true),
            ("*.b.a.test", "/*", true),
            ("a.test", "/*", false),
            ("blog.test", "/x", false),
            ("www.blog.test", "/*", false),
        ] {
            let put = asked("blog", domain, route);
            let refused = matches!(
                preview(&state, &put, Reach::Project),
                Err(Refusal::HostTaken { owner, .. }) if owner == web()
            );
            assert_eq!(refused, taken, "{domain}{route}");
            assert!(preview(&state, &put, Reach::Cluster).is_ok(), "{domain}{route}");
        }
        assert!(preview(&state, &asked("shop", "www.a.test", "/*"), Reach::Project).is_ok(), "its own");
        // What somebody who may has given the project stays its own, and no more than that.
        deploy(&mut state, "blog", &text("www.a.test", "/blog"));
        assert!(preview(&state, &asked("blog", "www.a.test", "/blog"), Reach::Project).is_ok());
    }
}

//! Secrets: sealed by the vault before anything is proposed. No function here returns a value.

use std::collections::BTreeMap;

use orca_cluster::command::{Command, Refusal};
use orca_cluster::id::{Label, ServiceName};
use orca_cluster::secret::{DataKeyId, Scope, SealedDataKey, SecretName};
use orca_cluster::state::State;
use orca_cluster::time::Timestamp;
use orca_wire::message::client::{Refused, Response, SecretInfo, SetSecret};
use zeroize::Zeroizing;

use super::{Answer, Changed, Core, TRIES_MAX, actor_name, failed, invalid, refused};
use crate::auth::{Caller, Object, Verb};
use crate::clock::now;
use crate::vault::{Entry, Secret, VaultError};

/// Secrets set in one request; `import` of a large file is several.
const SECRETS_MAX: usize = 500;

pub async fn set(core: &Core, caller: &Caller, secrets: Vec<SetSecret>) -> Answer {
    if secrets.is_empty() || secrets.len() > SECRETS_MAX {
        return Err(invalid(format!("1 to {SECRETS_MAX} secrets can be set at once, not {}", secrets.len()), None));
    }
    let secrets: Vec<(SecretName, Zeroizing<String>)> =
        secrets.into_iter().map(|SetSecret { name, value }| (name, Zeroizing::new(value))).collect();
    for (name, _) in &secrets {
        core.authorise(caller, Verb::ChangeSecrets, Object::from(name.project()))?;
    }
    let mut generation = core.read().await?.generation;
    for (name, value) in secrets {
        let secret = Secret::new(value.as_bytes().to_vec());
        generation = set_one(core, caller, name, &secret).await?.generation;
    }
    Ok(Response::Done { generation })
}

/// The version is part of what a value is sealed with, so it is chosen before; who comes second chooses again.
async fn set_one(core: &Core, caller: &Caller, name: SecretName, secret: &Secret) -> Result<Changed, Refused> {
    let mut last = None;
    for _ in 0..TRIES_MAX {
        let key = data_key(core, caller, name.scope()).await?;
        let version = core.raft.state().secrets.get(&name).map_or(0, |record| record.version) + 1;
        let value = core.vault.seal(&key, &Entry::secret(&name, version), secret).map_err(vault)?;
        let command = Command::SetSecret { name: name.clone(), version, value };
        match core.apply(caller, command).await? {
            Ok(changed) => return Ok(changed),
            Err(moved @ Refusal::SecretMoved { .. }) => last = Some(moved),
            Err(other) => return Err(refused(other)),
        }
    }
    Err(last.map_or_else(|| failed(format!("secret {name} could not be set")), refused))
}

/// The scope's data key for new values; a new one if there is none, or the last has served its time.
async fn data_key(core: &Core, caller: &Caller, scope: Scope) -> Result<SealedDataKey, Refused> {
    let (state, now) = (core.raft.state(), now());
    let newest = newest_key(&state, &scope);
    let version = match newest {
        Some(key) if !is_spent(&state, key, now) => return Ok(key.clone()),
        Some(key) => key.id.version + 1,
        None => 1,
    };
    let made = core.vault.new_data_key(scope.clone(), version, now);
    core.propose(caller, Command::AddDataKey(made)).await?;
    // Of two that were made at the same time the first has the place.
    let id = DataKeyId { scope, version };
    let state = core.raft.state();
    let key = state.data_keys.get(&id).ok_or_else(|| failed(format!("data key {id} was made and is not there")))?;
    Ok(key.key.clone())
}

fn newest_key<'a>(state: &'a State, scope: &Scope) -> Option<&'a SealedDataKey> {
    let keys = state.data_keys.values().map(|key| &key.key).filter(|key| key.id.scope == *scope);
    keys.max_by_key(|key| key.id.version)
}

fn is_spent(state: &State, key: &SealedDataKey, now: Timestamp) -> bool {
    let uses = state.data_keys.get(&key.id).map_or(0, |record| record.uses);
    key.is_spent(uses, now)
}

pub async fn list(core: &Core, caller: &Caller, project: Option<Label>) -> Answer {
    let project = project.or_else(|| caller.project.clone());
    core.authorise(caller, Verb::ListSecrets, Object::from(project.as_ref()))?;
    let state = core.read().await?;
    // Without a project: all of them. With one: its own, and the global ones it may use.
    let visible = state.secrets.iter().filter(|(name, _)| match (&project, name.project()) {
        (None, _) | (Some(_), None) => true,
        (Some(wanted), Some(own)) => wanted == own,
    });
    let secrets = visible.map(|(name, record)| SecretInfo {
        name: name.clone(),
        version: record.version,
        at: record.at,
        by: actor_name(&record.by),
        used_by: users(&state, name).into_iter().filter(|service| caller.sees(&service.project)).collect(),
    });
    Ok(Response::Secrets { secrets: secrets.collect() })
}

/// Services whose present specification means this secret.
fn users(state: &State, name: &SecretName) -> Vec<ServiceName> {
    let uses = |service: &ServiceName, names: &std::collections::BTreeSet<&str>| {
        names.contains(name.name())
            && state.secret(&service.project, name.name()).is_some_and(|(meant, _)| meant == *name)
    };
    let using = state.services.iter().filter(|(service, deployed)| uses(service, &deployed.spec().secrets()));
    using.map(|(service, _)| service.clone()).collect()
}

pub async fn remove(core: &Core, caller: &Caller, name: SecretName) -> Answer {
    core.authorise(caller, Verb::ChangeSecrets, Object::from(name.project()))?;
    Ok(core.propose(caller, Command::RemoveSecret { name }).await?.response())
}

/// All values of a scope, sealed anew under a new data key. Nothing is restarted: the values are the same.
pub async fn rotate(core: &Core, caller: &Caller, project: Option<Label>) -> Answer {
    core.authorise(caller, Verb::ChangeSecrets, Object::from(project.as_ref()))?;
    let scope = project.map_or(Scope::Global, Scope::Project);
    let mut last = None;
    for _ in 0..TRIES_MAX {
        let state = core.read().await?;
        let version = newest_key(&state, &scope).map_or(0, |key| key.id.version) + 1;
        let key = core.vault.new_data_key(scope.clone(), version, now());
        let mut values = BTreeMap::new();
        for (name, record) in state.secrets.iter().filter(|(name, _)| name.scope() == scope) {
            let old = state.data_keys.get(&record.value.key);
            let old = old.ok_or_else(|| failed(format!("data key {} of secret {name} is gone", record.value.key)))?;
            let entry = Entry::secret(name, record.version);
            let value = core.vault.reseal(&old.key, &key, &entry, &record.value).map_err(vault)?;
            values.insert(name.clone(), value);
        }
        match core.apply(caller, Command::RotateDataKey { key, values }).await? {
            Ok(changed) => return Ok(changed.response()),
            Err(moved @ (Refusal::SecretMoved { .. } | Refusal::DataKeyTaken(_))) => last = Some(moved),
            Err(other) => return Err(refused(other)),
        }
    }
    Err(last.map_or_else(|| failed("the secrets could not be rotated".to_owned()), refused))
}

fn vault(error: VaultError) -> Refused {
    match error {
        VaultError::TooLong(_) => invalid(error.to_string(), None),
        VaultError::WrongUnsealKey { .. }
        | VaultError::UnsealKeyMissing { .. }
        | VaultError::UnsealKeyForm { .. }
        | VaultError::UnsealKeyInData { .. }
        | VaultError::File(_)
        | VaultError::DataKey { .. }
        | VaultError::Value { .. }
        | VaultError::OtherKey { .. } => failed(error.to_string()),
    }
}

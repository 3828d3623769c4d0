//! Secrets: sealed by the vault before anything is proposed. No function here returns a value.

use orca_cluster::command::{Command, Refusal};
use orca_cluster::id::Label;
use orca_cluster::rotation::Next;
use orca_cluster::secret::{Scope, SealedDataKey, SecretName};
use orca_cluster::state::{SecretRecord, State};
use orca_wire::cause::chain;
use orca_wire::message::client::{Refused, Response, SecretInfo, SetSecret};
use zeroize::Zeroizing;

use super::{Answer, Changed, Core, TRIES_MAX, actor_name, failed, invalid, refused};
use crate::auth::{Caller, Object, Verb};
use crate::clock::now;
use crate::vault::{Place, Secret, Vault, VaultError};

/// Secrets set in one request; `import` of a large file is several.
const SECRETS_MAX: usize = 500;

/// Bytes of values that a rotation seals anew in one entry of the log: other changes need not wait long behind it.
const RESEALED_BYTES_MAX: usize = 256 << 10;

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
        let value = core.vault.seal(&key, &Place::secret(&name, version), secret).map_err(vault)?;
        let command = Command::SetSecret { name: name.clone(), version, value };
        match core.apply(caller, command).await? {
            Ok(changed) => return Ok(changed),
            // The key may be gone: a rotation that was under way has ended.
            Err(moved @ (Refusal::SecretMoved { .. } | Refusal::NoDataKey(_))) => last = Some(moved),
            Err(other) => return Err(refused(other)),
        }
    }
    Err(last.map_or_else(|| failed(format!("secret {name} could not be set")), refused))
}

/// The scope's data key for new values; a new one if there is none, or the last has served its time.
async fn data_key(core: &Core, caller: &Caller, scope: Scope) -> Result<SealedDataKey, Refused> {
    let (state, now) = (core.raft.state(), now());
    if let Some(key) = state.sealing_key(&scope, now) {
        return Ok(key.clone());
    }
    let made = core.vault.new_data_key(scope.clone(), state.next_data_key(&scope), now);
    match core.apply(caller, Command::NewDataKey { key: made, rotates: false }).await? {
        // Of two that were made at the same time the first has the place.
        Ok(_) | Err(Refusal::DataKeyTaken(_)) => {}
        Err(other) => return Err(refused(other)),
    }
    let state = core.raft.state();
    let key = state.sealing_key(&scope, now);
    Ok(key.ok_or_else(|| failed(format!("{scope} was given a data key and has none")))?.clone())
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
        used_by: state.secret_users(name).into_iter().filter(|service| caller.sees(&service.project)).collect(),
    });
    Ok(Response::Secrets { secrets: secrets.collect() })
}

pub async fn remove(core: &Core, caller: &Caller, name: SecretName) -> Answer {
    core.authorise(caller, Verb::ChangeSecrets, Object::from(name.project()))?;
    Ok(core.propose(caller, Command::RemoveSecret { name, if_unused: true }).await?.response())
}

/// All values of a scope, sealed anew under a new data key ([`rotation`](orca_cluster::rotation)). Nothing is
/// restarted: the values are the same.
pub async fn rotate(core: &Core, caller: &Caller, project: Option<Label>) -> Answer {
    core.authorise(caller, Verb::ChangeSecrets, Object::from(project.as_ref()))?;
    let scope = project.map_or(Scope::Global, Scope::Project);
    core.read().await?;
    let (mut last, mut tries) = (None, 0);
    while tries < TRIES_MAX {
        let command = next_of_rotation(&core.raft.state(), &core.vault, &scope).map_err(vault)?;
        let ends = matches!(command, Command::FinishRotation { .. });
        match core.apply(caller, command).await? {
            Ok(changed) if ends => return Ok(changed.response()),
            Ok(_) => {}
            Err(moved @ (Refusal::SecretMoved { .. } | Refusal::DataKeyTaken(_) | Refusal::NoDataKey(_))) => {
                (last, tries) = (Some(moved), tries + 1);
            }
            Err(other) => return Err(refused(other)),
        }
    }
    Err(last.map_or_else(|| failed("the secrets could not be rotated".to_owned()), refused))
}

fn next_of_rotation(state: &State, vault: &Vault, scope: &Scope) -> Result<Command, VaultError> {
    let now = now();
    Ok(match state.next_of_rotation(scope, now, RESEALED_BYTES_MAX) {
        Next::NewKey { version } => {
            Command::NewDataKey { key: vault.new_data_key(scope.clone(), version, now), rotates: true }
        }
        Next::Reseal { key, secrets } => {
            let anew = |(name, record): (&SecretName, &SecretRecord)| {
                let old = &record.value.key;
                let unknown = || VaultError::NoKey { key: old.clone(), name: name.clone() };
                let old = &state.data_keys.get(old).ok_or_else(unknown)?.key;
                let value = vault.reseal(old, key, &Place::secret(name, record.version), &record.value)?;
                Ok((name.clone(), value))
            };
            let values = secrets.into_iter().map(anew).collect::<Result<_, VaultError>>()?;
            Command::ResealSecrets { key: key.id.clone(), values }
        }
        Next::Finish { key } => Command::FinishRotation { key: key.clone() },
    })
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
        | VaultError::NoKey { .. }
        | VaultError::Value { .. }
        | VaultError::OtherKey { .. } => failed(chain(&error)),
    }
}

//! Secrets: sealed by the vault before anything is proposed. No function here returns a value.

use std::collections::BTreeMap;

use orca_cluster::command::{Command, Refusal};
use orca_cluster::id::Label;
use orca_cluster::secret::{Scope, SealedDataKey, SecretName};
use orca_cluster::state::State;
use orca_cluster::time::Timestamp;
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
    let newest = newest_key(&state, &scope);
    let version = match newest {
        Some(key) if !is_spent(&state, key, now) => return Ok(key.clone()),
        Some(key) => key.id.version + 1,
        None => 1,
    };
    let made = core.vault.new_data_key(scope.clone(), version, now);
    match core.apply(caller, Command::NewDataKey { key: made, rotates: false }).await? {
        // Of two that were made at the same time the first has the place.
        Ok(_) | Err(Refusal::DataKeyTaken(_)) => {}
        Err(other) => return Err(refused(other)),
    }
    let state = core.raft.state();
    let key = newest_key(&state, &scope).ok_or_else(|| failed(format!("{scope} was given a data key and has none")))?;
    Ok(key.clone())
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
        used_by: state.secret_users(name).into_iter().filter(|service| caller.sees(&service.project)).collect(),
    });
    Ok(Response::Secrets { secrets: secrets.collect() })
}

pub async fn remove(core: &Core, caller: &Caller, name: SecretName) -> Answer {
    core.authorise(caller, Verb::ChangeSecrets, Object::from(name.project()))?;
    Ok(core.propose(caller, Command::RemoveSecret { name, if_unused: true }).await?.response())
}

/// All values of a scope, sealed anew under a new data key, some at a time; one that was broken off is taken up again.
/// Both keys are kept until the last value is under the new one, so that every value can be read all the while, and
/// nothing is restarted: the values are the same.
pub async fn rotate(core: &Core, caller: &Caller, project: Option<Label>) -> Answer {
    core.authorise(caller, Verb::ChangeSecrets, Object::from(project.as_ref()))?;
    let scope = project.map_or(Scope::Global, Scope::Project);
    core.read().await?;
    let (mut last, mut tries) = (None, 0);
    while tries < TRIES_MAX {
        let command = next_of_rotation(&core.raft.state(), &core.vault, &scope, now()).map_err(vault)?;
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

/// What a rotation does next; all it goes by is the state, so it does not matter who began it. What is set meanwhile is
/// sealed by the new key, so every one of these leaves less to do.
fn next_of_rotation(state: &State, vault: &Vault, scope: &Scope, now: Timestamp) -> Result<Command, VaultError> {
    let newest = newest_key(state, scope);
    let under_way = newest.filter(|key| {
        let is_rotating = state.data_keys.get(&key.id).is_some_and(|record| record.rotating);
        is_rotating && !is_spent(state, key, now)
    });
    let Some(key) = under_way else {
        let version = newest.map_or(0, |key| key.id.version) + 1;
        return Ok(Command::NewDataKey { key: vault.new_data_key(scope.clone(), version, now), rotates: true });
    };
    let mut values = BTreeMap::new();
    let mut bytes = 0;
    for (name, record) in state.older_secrets(&key.id) {
        bytes += record.value.value.bytes.0.len();
        if bytes > RESEALED_BYTES_MAX && !values.is_empty() {
            break;
        }
        let old = &record.value.key;
        let old = state.data_keys.get(old).ok_or_else(|| VaultError::NoKey { key: old.clone(), name: name.clone() })?;
        let value = vault.reseal(&old.key, key, &Place::secret(name, record.version), &record.value)?;
        values.insert(name.clone(), value);
    }
    let key = key.id.clone();
    Ok(if values.is_empty() { Command::FinishRotation { key } } else { Command::ResealSecrets { key, values } })
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

#[cfg(test)]
mod tests {
    use orca_cluster::command::{Applied, Entry};
    use orca_cluster::event::{Actor, Kind};
    use orca_cluster::id::ClusterId;

    use super::*;
    use crate::vault::UnsealKey;

    /// A state, as its log makes it.
    struct World {
        vault: Vault,
        state: State,
        index: u64,
    }

    impl World {
        fn new() -> World {
            let unseal = UnsealKey::from_variable(&"ab".repeat(32)).unwrap();
            let (vault, _) = Vault::create(ClusterId(1), &unseal);
            World { vault, state: State::default(), index: 0 }
        }

        fn apply(&mut self, command: Command) -> Applied {
            self.index += 1;
            let entry = Entry { at: Timestamp(self.index), actor: Actor::Orca, source: None, command };
            self.state.apply(self.index, entry)
        }

        fn set(&mut self, name: &str, key: &SealedDataKey, length: usize) {
            let name: SecretName = name.parse().unwrap();
            let version = self.state.secrets.get(&name).map_or(0, |record| record.version) + 1;
            let secret = Secret::new(plain(&name, version, length));
            let value = self.vault.seal(key, &Place::secret(&name, version), &secret).unwrap();
            let applied = self.apply(Command::SetSecret { name, version, value });
            assert!(matches!(applied, Applied::Done { .. }), "{applied:?}");
        }

        fn add_key(&mut self, scope: Scope) -> SealedDataKey {
            let key = self.vault.new_data_key(scope, 1, Timestamp(1));
            self.apply(Command::NewDataKey { key: key.clone(), rotates: false });
            key
        }

        /// One step of a rotation of the global secrets; whether it was the last.
        fn step(&mut self) -> bool {
            let command = next_of_rotation(&self.state, &self.vault, &Scope::Global, Timestamp(2)).unwrap();
            let text = serde_json::to_string(&command).unwrap();
            assert!(text.len() < 512 << 10, "an entry of {} bytes", text.len());
            let ends = matches!(command, Command::FinishRotation { .. });
            let applied = self.apply(command);
            assert!(matches!(applied, Applied::Done { .. }), "{applied:?}");
            self.all_open();
            ends
        }

        fn all_open(&self) {
            for (name, record) in &self.state.secrets {
                let key = &self.state.data_keys[&record.value.key].key;
                let opened = self.vault.open_value(key, &Place::secret(name, record.version), &record.value).unwrap();
                assert_eq!(opened.expose(), plain(name, record.version, opened.expose().len()), "{name}");
            }
        }

        fn versions(&self, scope: &Scope) -> Vec<u32> {
            self.state.data_keys.keys().filter(|id| id.scope == *scope).map(|id| id.version).collect()
        }
    }

    fn plain(name: &SecretName, version: u32, length: usize) -> Vec<u8> {
        let mut text = format!("{name} {version} ").into_bytes();
        text.resize(length, b'.');
        text
    }

    /// Ten large ones, which is more than fits into two entries, and one of a project, which is not concerned.
    fn world() -> (World, SealedDataKey) {
        let mut world = World::new();
        let key = world.add_key(Scope::Global);
        for at in 0..10 {
            world.set(&format!("S{at}"), &key, 60 << 10);
        }
        let theirs = world.add_key(Scope::Project("shop".parse().unwrap()));
        world.set("shop/A", &theirs, 100);
        (world, key)
    }

    #[test]
    fn a_rotation_is_taken_up_again_wherever_it_was_broken_off() {
        for steps in 0..6 {
            let (mut world, _) = world();
            let ended = (0..steps).any(|_| world.step());
            // The node that did it is gone; another has the state and nothing else.
            world.state = serde_json::from_str(&serde_json::to_string(&world.state).unwrap()).unwrap();
            world.all_open();
            let mut more = 0;
            while !ended && !world.step() {
                more += 1;
                assert!(more < 10, "it does not end");
            }
            assert_eq!(world.versions(&Scope::Global), [2], "after {steps} steps");
            assert_eq!(world.versions(&Scope::Project("shop".parse().unwrap())), [1]);
            let kinds: Vec<Kind> = world.state.events.iter().map(|event| event.kind).collect();
            let count = |wanted| kinds.iter().filter(|kind| **kind == wanted).count();
            assert_eq!((count(Kind::SecretsRotated), count(Kind::DataKeyMade)), (1, 3), "{kinds:?}");
        }
    }

    #[test]
    fn what_is_set_during_a_rotation_keeps_its_value_and_the_old_key_stays_while_it_is_needed() {
        let (mut world, old) = world();
        world.step();
        let late = next_of_rotation(&world.state, &world.vault, &Scope::Global, Timestamp(2)).unwrap();
        // By the old key, since it was sealed before the rotation began; and what was to be sealed anew is older now.
        world.set("S0", &old, 50);
        world.set("NEW", &old, 50);
        assert!(matches!(world.apply(late), Applied::Done { .. }));
        world.all_open();
        let early = Command::FinishRotation { key: newest_key(&world.state, &Scope::Global).unwrap().id.clone() };
        assert!(matches!(world.apply(early.clone()), Applied::Refused(Refusal::SecretMoved { .. })));
        while !world.step() {}
        assert_eq!(world.versions(&Scope::Global), [2]);
        assert!(matches!(world.apply(early), Applied::Unchanged { .. }), "done twice is done once");
        // A value sealed by a key that is gone is refused, and not kept where nobody can read it.
        let name: SecretName = "S1".parse().unwrap();
        let value = world.vault.seal(&old, &Place::secret(&name, 2), &Secret::new(vec![1])).unwrap();
        let applied = world.apply(Command::SetSecret { name, version: 2, value });
        assert!(matches!(applied, Applied::Refused(Refusal::NoDataKey(_))), "{applied:?}");
        world.step();
        assert_eq!(world.versions(&Scope::Global), [2, 3], "the next rotation makes a key of its own");
    }
}

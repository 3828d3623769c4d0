//! Commands about secrets, and about the data keys that seal them.

use std::collections::BTreeMap;

use super::{Change, Detail, Refusal};
use crate::event::Kind;
use crate::secret::{DataKeyId, SealedDataKey, SealedValue, SecretName};
use crate::state::{DataKey, SecretRecord};

impl Change<'_> {
    pub(super) fn set_secret(
        &mut self,
        name: SecretName,
        version: u32,
        value: SealedValue,
    ) -> Result<Option<Detail>, Refusal> {
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

    pub(super) fn remove_secret(&mut self, name: SecretName, if_unused: bool) -> Result<Option<Detail>, Refusal> {
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

    pub(super) fn add_data_key(&mut self, key: SealedDataKey) -> Result<Option<Detail>, Refusal> {
        let id = key.id.clone();
        if self.state.data_keys.contains_key(&id) {
            return Ok(None);
        }
        self.state.data_keys.insert(id, DataKey { key, uses: 0, rotating: false });
        Ok(Some(Detail::None))
    }

    pub(super) fn new_data_key(&mut self, key: SealedDataKey, rotates: bool) -> Result<Option<Detail>, Refusal> {
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

    pub(super) fn reseal(
        &mut self,
        id: &DataKeyId,
        values: BTreeMap<SecretName, SealedValue>,
    ) -> Result<Option<Detail>, Refusal> {
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

    pub(super) fn finish_rotation(&mut self, id: &DataKeyId) -> Result<Option<Detail>, Refusal> {
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

    pub(super) fn rotate(
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::service::tests::{apply, deploy, settle, web};
    use crate::command::{Applied, Command, Entry};
    use crate::event::Actor;
    use crate::secret::{Ciphertext, Opaque, Scope};
    use crate::state::State;
    use crate::time::Timestamp;

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
}

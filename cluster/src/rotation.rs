//! Which data key seals what, and what a rotation does next: all values of a scope are sealed anew under a new key, some
//! at a time, and then the older keys go. It goes by the state and nothing else, so it does not matter who began a
//! rotation, and one that was broken off is taken up again by asking once more. Both keys are kept until the last value
//! is under the new one, so that every value can be read all the while. What is set meanwhile is sealed by the new key:
//! every step leaves less to do.

use std::collections::BTreeMap;

use crate::secret::{DataKeyId, Scope, SealedDataKey, SecretName};
use crate::state::{DataKey, SecretRecord, State};
use crate::time::Timestamp;

/// The next step of a scope's rotation, for whoever has the keys to carry out.
#[derive(Debug, Clone, PartialEq)]
pub enum Next<'a> {
    /// It begins, with a data key of this version.
    NewKey { version: u32 },
    /// These are to be sealed anew by this key.
    Reseal { key: &'a SealedDataKey, secrets: Vec<(&'a SecretName, &'a SecretRecord)> },
    /// All are under this key.
    Finish { key: &'a DataKeyId },
}

impl State {
    /// The scope's data key for new values; none if there is none, or the newest has served its time.
    pub fn sealing_key(&self, scope: &Scope, now: Timestamp) -> Option<&SealedDataKey> {
        self.newest_data_key(scope).filter(|newest| !newest.key.is_spent(newest.uses, now)).map(|newest| &newest.key)
    }

    /// The version of the scope's next data key.
    pub fn next_data_key(&self, scope: &Scope) -> u32 {
        self.newest_data_key(scope).map_or(0, |newest| newest.key.id.version) + 1
    }

    /// What a rotation of the scope's secrets does next. It seals at most so many bytes of values anew in one step, or
    /// one value: other changes need not wait long behind it.
    pub fn next_of_rotation(&self, scope: &Scope, now: Timestamp, bytes_max: usize) -> Next<'_> {
        let under_way = self.newest_data_key(scope).is_some_and(|newest| newest.rotating);
        let Some(key) = self.sealing_key(scope, now).filter(|_| under_way) else {
            return Next::NewKey { version: self.next_data_key(scope) };
        };
        let (mut secrets, mut bytes) = (Vec::new(), 0);
        for (name, record) in self.older_secrets(&key.id) {
            bytes += record.value.value.bytes.0.len();
            if bytes > bytes_max && !secrets.is_empty() {
                break;
            }
            secrets.push((name, record));
        }
        if secrets.is_empty() { Next::Finish { key: &key.id } } else { Next::Reseal { key, secrets } }
    }

    /// The scopes whose rotation has begun and not ended, each with the number of secrets that an older key sealed.
    /// Nothing is lost by that but the old key, which stays.
    pub fn open_rotations(&self) -> BTreeMap<&Scope, usize> {
        let open = self.data_keys.values().filter(|key| key.rotating).map(|key| &key.key.id);
        // In the order of their versions: of two in one scope the later one is what counts.
        open.map(|id| (&id.scope, self.older_secrets(id).count())).collect()
    }

    fn newest_data_key(&self, scope: &Scope) -> Option<&DataKey> {
        self.data_keys.values().filter(|key| key.key.id.scope == *scope).max_by_key(|key| key.key.id.version)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::{Applied, Command, Entry, Refusal};
    use crate::event::{Actor, Kind};
    use crate::secret::{Ciphertext, DATA_KEY_AGE_MAX, Opaque, SealedValue};

    const NOW: Timestamp = Timestamp(2);

    /// Four of the ten large values of [`world`].
    const BYTES_MAX: usize = 256 << 10;

    /// A state, as its log makes it. Whatever is sealed here is sealed by nothing.
    #[derive(Default)]
    struct World {
        state: State,
        index: u64,
    }

    impl World {
        fn apply(&mut self, command: Command) -> Applied {
            self.index += 1;
            let entry = Entry { at: Timestamp(self.index), actor: Actor::Orca, source: None, command };
            let applied = self.state.apply(self.index, entry);
            for (name, record) in &self.state.secrets {
                assert!(self.state.data_keys.contains_key(&record.value.key), "{name} cannot be opened any more");
            }
            applied
        }

        fn done(&mut self, command: Command) {
            let applied = self.apply(command);
            assert!(matches!(applied, Applied::Done { .. }), "{applied:?}");
        }

        fn set(&mut self, name: &str, key: &DataKeyId, length: usize) {
            let name: SecretName = name.parse().unwrap();
            let version = self.state.secrets.get(&name).map_or(0, |record| record.version) + 1;
            self.done(Command::SetSecret { name, version, value: sealed(key, version, length) });
        }

        fn add_key(&mut self, scope: Scope) -> DataKeyId {
            let id = DataKeyId { scope, version: 1 };
            self.done(Command::NewDataKey { key: data_key(id.clone()), rotates: false });
            id
        }

        /// The command that carries out the next step of the rotation of the global secrets.
        fn next(&self) -> Command {
            match self.state.next_of_rotation(&Scope::Global, NOW, BYTES_MAX) {
                Next::NewKey { version } => {
                    let id = DataKeyId { scope: Scope::Global, version };
                    Command::NewDataKey { key: data_key(id), rotates: true }
                }
                Next::Reseal { key, secrets } => {
                    let anew =
                        |record: &SecretRecord| sealed(&key.id, record.version, record.value.value.bytes.0.len());
                    let values = secrets.into_iter().map(|(name, record)| (name.clone(), anew(record)));
                    Command::ResealSecrets { key: key.id.clone(), values: values.collect() }
                }
                Next::Finish { key } => Command::FinishRotation { key: key.clone() },
            }
        }

        /// One step; whether it was the last.
        fn step(&mut self) -> bool {
            let command = self.next();
            let text = serde_json::to_string(&command).unwrap();
            assert!(text.len() < 2 * BYTES_MAX, "an entry of {} bytes", text.len());
            let ends = matches!(command, Command::FinishRotation { .. });
            self.done(command);
            ends
        }

        fn versions(&self, scope: &Scope) -> Vec<u32> {
            self.state.data_keys.keys().filter(|id| id.scope == *scope).map(|id| id.version).collect()
        }
    }

    fn shop() -> Scope {
        Scope::Project("shop".parse().unwrap())
    }

    fn data_key(id: DataKeyId) -> SealedDataKey {
        let key = Ciphertext { nonce: Opaque(vec![]), bytes: Opaque(vec![]) };
        SealedDataKey { id, root: 1, created: Timestamp(1), key }
    }

    fn sealed(key: &DataKeyId, version: u32, length: usize) -> SealedValue {
        let value = Ciphertext { nonce: Opaque(vec![]), bytes: Opaque(vec![b'.'; length]) };
        SealedValue { key: key.clone(), version, value }
    }

    /// Ten large ones, which is more than fits into two entries, and one of a project, which is not concerned.
    fn world() -> (World, DataKeyId) {
        let mut world = World::default();
        let key = world.add_key(Scope::Global);
        for at in 0..10 {
            world.set(&format!("S{at}"), &key, 60 << 10);
        }
        let theirs = world.add_key(shop());
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
            let mut more = 0;
            while !ended && !world.step() {
                more += 1;
                assert!(more < 10, "it does not end");
            }
            assert_eq!(world.versions(&Scope::Global), [2], "after {steps} steps");
            assert_eq!(world.versions(&shop()), [1]);
            let kinds: Vec<Kind> = world.state.events.iter().map(|event| event.kind).collect();
            let count = |wanted| kinds.iter().filter(|kind| **kind == wanted).count();
            assert_eq!((count(Kind::SecretsRotated), count(Kind::DataKeyMade)), (1, 3), "{kinds:?}");
        }
    }

    #[test]
    fn what_is_set_during_a_rotation_keeps_its_value_and_the_old_key_stays_while_it_is_needed() {
        let (mut world, old) = world();
        world.step();
        let late = world.next();
        // By the old key, since it was sealed before the rotation began; and what was to be sealed anew is older now.
        world.set("S0", &old, 50);
        world.set("NEW", &old, 50);
        world.done(late);
        let record = &world.state.secrets[&"S0".parse().unwrap()];
        assert_eq!((record.version, record.value.value.bytes.0.len()), (2, 50));
        let early = Command::FinishRotation { key: DataKeyId { scope: Scope::Global, version: 2 } };
        assert!(matches!(world.apply(early.clone()), Applied::Refused(Refusal::SecretMoved { .. })));
        while !world.step() {}
        assert_eq!(world.versions(&Scope::Global), [2]);
        assert!(matches!(world.apply(early), Applied::Unchanged { .. }), "done twice is done once");
        // A value sealed by a key that is gone is refused, and not kept where nobody can read it.
        let (name, value) = ("S1".parse().unwrap(), sealed(&old, 2, 1));
        let applied = world.apply(Command::SetSecret { name, version: 2, value });
        assert!(matches!(applied, Applied::Refused(Refusal::NoDataKey(_))), "{applied:?}");
        world.step();
        assert_eq!(world.versions(&Scope::Global), [2, 3], "the next rotation makes a key of its own");
    }

    #[test]
    fn a_key_that_has_served_its_time_seals_nothing_more_and_carries_no_rotation() {
        let (mut world, key) = world();
        world.step();
        let later = Timestamp(1) + DATA_KEY_AGE_MAX;
        let id = |now| world.state.sealing_key(&Scope::Global, now).map(|key| key.id.version);
        assert_eq!((id(NOW), id(later)), (Some(2), None));
        assert_eq!(world.state.next_of_rotation(&Scope::Global, later, BYTES_MAX), Next::NewKey { version: 3 });
        assert_eq!(world.state.sealing_key(&key.scope, NOW), Some(&data_key(DataKeyId { version: 2, ..key })));
        assert_eq!(
            (world.state.sealing_key(&Scope::Cluster, NOW), world.state.next_data_key(&Scope::Cluster)),
            (None, 1)
        );
    }

    #[test]
    fn a_rotation_is_open_from_its_key_to_its_end_and_told_once_for_each_scope() {
        let (mut world, _) = world();
        let global = &Scope::Global;
        assert_eq!(world.state.open_rotations(), BTreeMap::new());
        world.step();
        assert_eq!(world.state.open_rotations(), [(global, 10)].into());
        world.step();
        assert_eq!(world.state.open_rotations(), [(global, 6)].into());
        // Broken off, and begun anew when its key had served its time.
        let id = DataKeyId { scope: Scope::Global, version: 3 };
        world.done(Command::NewDataKey { key: data_key(id), rotates: true });
        assert_eq!(world.state.open_rotations(), [(global, 10)].into());
        while !world.step() {}
        assert_eq!(world.state.open_rotations(), BTreeMap::new());
    }
}

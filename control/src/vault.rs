//! The vault: the only place where a stored secret is opened.
//!
//! ```text
//!   unseal key ──seals──▶ root key ──seals──▶ data key of one project ──seals──▶ value
//!   a file beside the        SealedRoot          SealedDataKey                    SealedValue
//!   data, or a variable      └──────────────── in State: replicated, backed up ────────────┘
//! ```
//!
//! Each layer is AES-256-GCM with a random nonce, and is bound to its place: cluster, scope, name, version and data
//! key go into the authenticated data, so that a ciphertext moved anywhere else does not open. Sealing happens before
//! a command is proposed; applying one copies ciphertext. What is absent: any cache of opened values.

use std::fmt;
use std::path::{Path, PathBuf};

use aws_lc_rs::aead::{AES_256_GCM, Aad, MAX_TAG_LEN, NONCE_LEN, Nonce, RandomizedNonceKey};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use orca_cluster::id::ClusterId;
use orca_cluster::secret::{Ciphertext, DataKeyId, Opaque, Scope, SealedDataKey, SealedRoot, SealedValue, SecretName};
use orca_cluster::time::Timestamp;
use orca_wire::identity::file::{self, PrivateFileError};
use zeroize::Zeroizing;

/// Longest secret: a certificate chain with its key fits many times, a file that belongs into a volume does not.
pub const SECRET_LENGTH_MAX: usize = 64 * 1024;

/// The variable that may hold the unseal key instead of a file.
pub const UNSEAL_KEY_VARIABLE: &str = "ORCA_UNSEAL_KEY";

const KEY_LENGTH: usize = 32;

/// The name under which the key of the certificate authority is sealed.
const AUTHORITY: &str = "authority";

/// An opened secret. Overwritten when dropped; has no `Debug`, no `Display` and no `Serialize`, so that it can be in
/// no log line and in no message by mistake.
#[expect(missing_debug_implementations, reason = "an opened secret must not be printed")]
pub struct Secret(Zeroizing<Vec<u8>>);

impl Secret {
    pub fn new(bytes: Vec<u8>) -> Secret {
        Secret(Zeroizing::new(bytes))
    }

    /// The one way to the bytes: search for its callers to know where secrets go.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl From<Zeroizing<Vec<u8>>> for Secret {
    fn from(bytes: Zeroizing<Vec<u8>>) -> Secret {
        Secret(bytes)
    }
}

#[derive(Debug, thiserror::Error)]
pub enum VaultError {
    #[error(
        "the unseal key in {origin} is not the one that sealed this cluster's secrets; put back the key that was made \
         when the cluster was created"
    )]
    WrongUnsealKey { origin: Origin },
    #[error(
        "the unseal key {} is missing, and without it no secret can be opened; restore it from where you keep it, or \
         give it in {UNSEAL_KEY_VARIABLE}", path.display()
    )]
    UnsealKeyMissing { path: PathBuf },
    #[error("the unseal key in {origin} is not {KEY_LENGTH} bytes in base64 or in hexadecimal digits")]
    UnsealKeyForm { origin: Origin },
    #[error(
        "the unseal key {} would lie inside the data directory {}, and every copy of the data would hold its own key; \
         choose another place", path.display(), data.display()
    )]
    UnsealKeyInData { path: PathBuf, data: PathBuf },
    #[error(transparent)]
    File(PrivateFileError),
    #[error("data key {key} does not open: it is damaged, or of another cluster")]
    DataKey { key: DataKeyId },
    #[error("data key {key}, which sealed secret {name}, is gone")]
    NoKey { key: DataKeyId, name: SecretName },
    #[error("{place} does not open: it is damaged, or was moved there from another place")]
    Value { place: String },
    #[error("data key {key} is not for {place}")]
    OtherKey { key: DataKeyId, place: String },
    #[error("a secret has at most {SECRET_LENGTH_MAX} bytes, this one has {0}; keep large data in a volume")]
    TooLong(usize),
}

/// Where an unseal key came from; for messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    File(PathBuf),
    Variable,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::File(path) => write!(f, "{}", path.display()),
            Origin::Variable => f.write_str(UNSEAL_KEY_VARIABLE),
        }
    }
}

/// The key outside: whoever has it and a copy of the data has all secrets; whoever has one of the two has nothing.
pub struct UnsealKey {
    key: Key,
    origin: Origin,
}

impl UnsealKey {
    /// A new key in a new file: when the cluster is created. `data` is where it must not lie.
    pub fn create(path: &Path, data: &Path) -> Result<UnsealKey, VaultError> {
        let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        if absolute(path).starts_with(absolute(data)) {
            return Err(VaultError::UnsealKeyInData { path: path.to_owned(), data: data.to_owned() });
        }
        let key = Key::random();
        let text = Zeroizing::new(STANDARD.encode(*key.0) + "\n");
        file::create(path, text.as_bytes()).map_err(VaultError::File)?;
        Ok(UnsealKey { key, origin: Origin::File(path.to_owned()) })
    }

    pub fn load(path: &Path) -> Result<UnsealKey, VaultError> {
        let text = file::read(path).map_err(|error| match error {
            PrivateFileError::Missing { path } => VaultError::UnsealKeyMissing { path },
            other => VaultError::File(other),
        })?;
        UnsealKey::parse(&text, Origin::File(path.to_owned()))
    }

    /// From the value of [`UNSEAL_KEY_VARIABLE`].
    pub fn from_variable(value: &str) -> Result<UnsealKey, VaultError> {
        UnsealKey::parse(value.as_bytes(), Origin::Variable)
    }

    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    fn parse(text: &[u8], origin: Origin) -> Result<UnsealKey, VaultError> {
        let text = text.trim_ascii();
        let decoded = match text.len() {
            64 => hexadecimal(text),
            _ => STANDARD.decode(text).or_else(|_| URL_SAFE_NO_PAD.decode(text)).ok().map(Zeroizing::new),
        };
        match decoded.and_then(|bytes| Key::from_bytes(&bytes)) {
            Some(key) => Ok(UnsealKey { key, origin }),
            None => Err(VaultError::UnsealKeyForm { origin }),
        }
    }
}

impl fmt::Debug for UnsealKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UnsealKey").field("origin", &self.origin).finish_non_exhaustive()
    }
}

/// Where a sealed value belongs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place<'a> {
    pub scope: Scope,
    pub name: &'a str,
    /// Of the value: see [`SealedValue::version`].
    pub version: u32,
}

impl<'a> Place<'a> {
    pub fn secret(name: &'a SecretName, version: u32) -> Place<'a> {
        Place { scope: name.scope(), name: name.name(), version }
    }

    /// The key of the cluster's certificate authority.
    pub fn authority(version: u32) -> Place<'static> {
        Place { scope: Scope::Cluster, name: AUTHORITY, version }
    }
}

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "secret {}/{} version {}", self.scope, self.name, self.version)
    }
}

/// Holds the root key of one cluster, opened.
pub struct Vault {
    cluster: ClusterId,
    root: Key,
    root_version: u32,
}

impl Vault {
    /// A new root key: when the cluster is created.
    pub fn create(cluster: ClusterId, unseal: &UnsealKey) -> (Vault, SealedRoot) {
        let vault = Vault { cluster, root: Key::random(), root_version: 1 };
        let sealed = vault.sealed_root(unseal);
        (vault, sealed)
    }

    pub fn open(cluster: ClusterId, unseal: &UnsealKey, sealed: &SealedRoot) -> Result<Vault, VaultError> {
        let place = root_place(cluster, sealed.version);
        let root = unseal.key.open(&place, &sealed.key).and_then(|bytes| Key::from_bytes(&bytes));
        match root {
            Some(root) => Ok(Vault { cluster, root, root_version: sealed.version }),
            None => Err(VaultError::WrongUnsealKey { origin: unseal.origin.clone() }),
        }
    }

    /// The root key, sealed with this unseal key: another one for the same cluster.
    pub fn sealed_root(&self, unseal: &UnsealKey) -> SealedRoot {
        let key = unseal.key.seal(&root_place(self.cluster, self.root_version), &*self.root.0);
        SealedRoot { version: self.root_version, key }
    }

    /// `version` counts up from 1 for each scope; giving one out twice would let old values open under a new key's
    /// name, so [`State`](orca_cluster) refuses it.
    pub fn new_data_key(&self, scope: Scope, version: u32, now: Timestamp) -> SealedDataKey {
        let id = DataKeyId { scope, version };
        let key = self.root.seal(&self.data_key_place(&id, self.root_version), &*Key::random().0);
        SealedDataKey { id, root: self.root_version, created: now, key }
    }

    pub fn seal(&self, key: &SealedDataKey, place: &Place<'_>, secret: &Secret) -> Result<SealedValue, VaultError> {
        if secret.0.len() > SECRET_LENGTH_MAX {
            return Err(VaultError::TooLong(secret.0.len()));
        }
        if key.id.scope != place.scope {
            return Err(VaultError::OtherKey { key: key.id.clone(), place: place.to_string() });
        }
        let value = self.data_key(key)?.seal(&self.value_place(place, &key.id), secret.expose());
        Ok(SealedValue { key: key.id.clone(), version: place.version, value })
    }

    pub fn open_value(
        &self,
        key: &SealedDataKey,
        place: &Place<'_>,
        sealed: &SealedValue,
    ) -> Result<Secret, VaultError> {
        if key.id != sealed.key {
            return Err(VaultError::OtherKey { key: key.id.clone(), place: place.to_string() });
        }
        let opened = self.data_key(key)?.open(&self.value_place(place, &key.id), &sealed.value);
        opened.map(Secret).ok_or_else(|| VaultError::Value { place: place.to_string() })
    }

    /// The value of one secret, from its old data key under a new one.
    pub fn reseal(
        &self,
        old: &SealedDataKey,
        new: &SealedDataKey,
        place: &Place<'_>,
        sealed: &SealedValue,
    ) -> Result<SealedValue, VaultError> {
        self.seal(new, place, &self.open_value(old, place, sealed)?)
    }

    fn data_key(&self, sealed: &SealedDataKey) -> Result<Key, VaultError> {
        let place = self.data_key_place(&sealed.id, sealed.root);
        let key = self.root.open(&place, &sealed.key).and_then(|bytes| Key::from_bytes(&bytes));
        key.ok_or_else(|| VaultError::DataKey { key: sealed.id.clone() })
    }

    fn data_key_place(&self, id: &DataKeyId, root: u32) -> String {
        format!("orca.v1|{}|data-key|{id}|{root}", self.cluster)
    }

    /// No part can hold a `|`, so that no two places have the same text.
    fn value_place(&self, place: &Place<'_>, key: &DataKeyId) -> String {
        let Place { scope, name, version } = place;
        format!("orca.v1|{}|{scope}|{name}|{version}|{key}", self.cluster)
    }
}

impl fmt::Debug for Vault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vault")
            .field("cluster", &self.cluster)
            .field("root_version", &self.root_version)
            .finish_non_exhaustive()
    }
}

fn root_place(cluster: ClusterId, version: u32) -> String {
    format!("orca.v1|{cluster}|root-key|{version}")
}

/// An AES-256 key.
struct Key(Zeroizing<[u8; KEY_LENGTH]>);

impl Key {
    fn random() -> Key {
        let mut bytes = Zeroizing::new([0; KEY_LENGTH]);
        aws_lc_rs::rand::fill(&mut *bytes).expect("the operating system gives random bytes");
        Key(bytes)
    }

    fn from_bytes(bytes: &[u8]) -> Option<Key> {
        Some(Key(Zeroizing::new(bytes.try_into().ok()?)))
    }

    fn cipher(&self) -> RandomizedNonceKey {
        RandomizedNonceKey::new(&AES_256_GCM, &*self.0).expect("the length of an AES-256 key")
    }

    fn seal(&self, place: &str, plaintext: &[u8]) -> Ciphertext {
        // Room for the tag from the start: growing would leave a copy of the plaintext behind.
        let mut bytes = Zeroizing::new(Vec::with_capacity(plaintext.len() + MAX_TAG_LEN));
        bytes.extend_from_slice(plaintext);
        let nonce = self
            .cipher()
            .seal_in_place_append_tag(Aad::from(place.as_bytes()), &mut *bytes)
            .expect("a secret is shorter than AES-GCM's limit of 64 GiB");
        Ciphertext { nonce: Opaque(nonce.as_ref().to_vec()), bytes: Opaque(std::mem::take(&mut *bytes)) }
    }

    fn open(&self, place: &str, sealed: &Ciphertext) -> Option<Zeroizing<Vec<u8>>> {
        let nonce: &[u8; NONCE_LEN] = sealed.nonce.0.as_slice().try_into().ok()?;
        let mut bytes = Zeroizing::new(sealed.bytes.0.clone());
        let length =
            self.cipher().open_in_place(Nonce::from(nonce), Aad::from(place.as_bytes()), &mut bytes).ok()?.len();
        bytes.truncate(length);
        Some(bytes)
    }
}

fn hexadecimal(text: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let (pairs, []) = text.as_chunks::<2>() else {
        return None;
    };
    let bytes = pairs.iter().map(|&[high, low]| u8::try_from(digit(high)? << 4 | digit(low)?).ok());
    bytes.collect::<Option<Vec<u8>>>().map(Zeroizing::new)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use orca_cluster::id::Label;

    use super::*;

    const CLUSTER: ClusterId = ClusterId(7);
    const NOW: Timestamp = Timestamp(1_000);

    fn unseal(byte: u8) -> UnsealKey {
        UnsealKey { key: Key(Zeroizing::new([byte; KEY_LENGTH])), origin: Origin::Variable }
    }

    fn project(name: &str) -> Scope {
        Scope::Project(Label::new(name).unwrap())
    }

    #[test]
    fn a_secret_opens_after_a_restart_and_the_stored_form_does_not_hold_it() {
        let (vault, root) = Vault::create(CLUSTER, &unseal(1));
        let key = vault.new_data_key(project("web"), 1, NOW);
        let name: SecretName = "web/DB_URL".parse().unwrap();
        let place = Place::secret(&name, 1);
        let sealed = vault.seal(&key, &place, &Secret::new(b"ORCA-CANARY".to_vec())).unwrap();

        let stored = serde_json::to_string(&(&root, &key, &sealed)).unwrap();
        assert!(!stored.contains("CANARY") && !stored.contains(&STANDARD.encode("ORCA-CANARY")));
        let (root, key, sealed): (SealedRoot, SealedDataKey, SealedValue) = serde_json::from_str(&stored).unwrap();
        let vault = Vault::open(CLUSTER, &unseal(1), &root).unwrap();
        assert_eq!(vault.open_value(&key, &place, &sealed).unwrap().expose(), b"ORCA-CANARY");

        let again = vault.seal(&key, &place, &Secret::new(b"ORCA-CANARY".to_vec())).unwrap();
        assert_ne!(again.value.bytes, sealed.value.bytes, "the same value twice is two ciphertexts");
    }

    #[test]
    fn a_sealed_value_opens_in_its_own_place_only() {
        let (vault, _) = Vault::create(CLUSTER, &unseal(1));
        let (other_vault, _) = Vault::create(CLUSTER, &unseal(1));
        let same_keys_elsewhere = Vault { cluster: ClusterId(8), root: Key(vault.root.0.clone()), root_version: 1 };

        // Every pair that differs in one part, or in more.
        let mut places = Vec::new();
        for scope in [Scope::Cluster, Scope::Global, project("web"), project("api")] {
            for key_version in [1, 2] {
                let key = vault.new_data_key(scope.clone(), key_version, NOW);
                for name in ["A", "B", AUTHORITY] {
                    for version in [1, 2] {
                        let place = Place { scope: scope.clone(), name, version };
                        let secret = Secret::new(format!("{place} {key_version}").into_bytes());
                        let sealed = vault.seal(&key, &place, &secret).unwrap();
                        assert_eq!(vault.open_value(&key, &place, &sealed).unwrap().expose(), secret.expose());
                        assert!(other_vault.open_value(&key, &place, &sealed).is_err());
                        assert!(same_keys_elsewhere.open_value(&key, &place, &sealed).is_err());
                        places.push((key.clone(), place, sealed));
                    }
                }
            }
        }
        for (here, (key, place, _)) in places.iter().enumerate() {
            for (there, (_, _, sealed)) in places.iter().enumerate() {
                if here == there {
                    continue;
                }
                assert!(vault.open_value(key, place, sealed).is_err(), "{sealed:?} opened as {place}");
                // And with the id forged to fit.
                let forged = SealedValue { key: key.id.clone(), version: place.version, value: sealed.value.clone() };
                assert!(vault.open_value(key, place, &forged).is_err(), "{sealed:?} opened as {place}");
            }
        }
    }

    #[test]
    fn a_damaged_or_relabelled_key_or_value_does_not_open() {
        let (vault, root) = Vault::create(CLUSTER, &unseal(1));
        let key = vault.new_data_key(project("web"), 1, NOW);
        let name: SecretName = "web/A".parse().unwrap();
        let place = Place::secret(&name, 1);
        let sealed = vault.seal(&key, &place, &Secret::new(b"value".to_vec())).unwrap();
        for at in 0..sealed.value.bytes.0.len() {
            let mut damaged = sealed.clone();
            damaged.value.bytes.0[at] ^= 1;
            assert!(vault.open_value(&key, &place, &damaged).is_err());
            damaged.value.bytes.0.truncate(at);
            assert!(vault.open_value(&key, &place, &damaged).is_err());
        }
        let relabelled = SealedDataKey { id: DataKeyId { scope: project("api"), version: 1 }, ..key.clone() };
        let theirs: SecretName = "api/A".parse().unwrap();
        assert!(matches!(
            vault.seal(&relabelled, &Place::secret(&theirs, 1), &Secret::new(vec![])),
            Err(VaultError::DataKey { .. })
        ));
        assert!(matches!(
            vault.seal(&key, &Place::secret(&theirs, 1), &Secret::new(vec![])),
            Err(VaultError::OtherKey { .. })
        ));
        assert!(Vault::open(CLUSTER, &unseal(1), &SealedRoot { version: 2, ..root.clone() }).is_err());
        assert!(Vault::open(ClusterId(8), &unseal(1), &root).is_err());
        let long = Secret::new(vec![0; SECRET_LENGTH_MAX + 1]);
        assert!(matches!(vault.seal(&key, &place, &long), Err(VaultError::TooLong(_))));
    }

    #[test]
    fn a_value_that_is_sealed_anew_opens_under_the_new_key_and_no_longer_under_the_old() {
        let (vault, _) = Vault::create(CLUSTER, &unseal(1));
        let [old, new] = [1, 2].map(|version| vault.new_data_key(Scope::Global, version, NOW));
        let name: SecretName = "A".parse().unwrap();
        let place = Place::secret(&name, 3);
        let value = vault.seal(&old, &place, &Secret::new(b"value".into())).unwrap();
        let resealed = vault.reseal(&old, &new, &place, &value).unwrap();
        assert_eq!((&resealed.key, resealed.version), (&new.id, 3));
        assert_eq!(vault.open_value(&new, &place, &resealed).unwrap().expose(), b"value");
        assert!(vault.open_value(&old, &place, &resealed).is_err());
    }

    #[test]
    fn the_authoritys_key_is_sealed_like_a_secret() {
        let (vault, _) = Vault::create(CLUSTER, &unseal(1));
        let key = vault.new_data_key(Scope::Cluster, 1, NOW);
        let authority = orca_wire::identity::Authority::create(CLUSTER, NOW);
        let sealed = vault.seal(&key, &Place::authority(1), &authority.key().into()).unwrap();
        let opened = vault.open_value(&key, &Place::authority(1), &sealed).unwrap();
        let again = orca_wire::identity::Authority::open(authority.certificate(), opened.expose()).unwrap();
        assert_eq!(again.fingerprint(), authority.fingerprint());
    }

    #[test]
    fn a_wrong_unseal_key_is_told_with_the_place_it_came_from() {
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path().join("data");
        let path = directory.path().join("unseal.key");
        let made = UnsealKey::create(&path, &data).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let (_, root) = Vault::create(CLUSTER, &made);
        Vault::open(CLUSTER, &UnsealKey::load(&path).unwrap(), &root).unwrap();

        assert!(matches!(UnsealKey::create(&path, &data), Err(VaultError::File(PrivateFileError::Exists { .. }))));
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(UnsealKey::load(&path), Err(VaultError::UnsealKeyMissing { .. })));
        let other = UnsealKey::create(&path, &data).unwrap();
        let text = Vault::open(CLUSTER, &other, &root).unwrap_err().to_string();
        assert!(text.contains(path.to_str().unwrap()), "{text}");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(UnsealKey::load(&path), Err(VaultError::File(PrivateFileError::Open { .. }))));

        let inside = UnsealKey::create(&data.join("unseal.key"), &data);
        assert!(matches!(inside, Err(VaultError::UnsealKeyInData { .. })));
    }

    #[test]
    fn the_variable_may_hold_the_key_in_base64_or_hexadecimal() {
        let (_, root) = Vault::create(CLUSTER, &unseal(0xab));
        for text in ["ab".repeat(32), "AB".repeat(32), STANDARD.encode([0xab; 32]), URL_SAFE_NO_PAD.encode([0xab; 32])]
        {
            Vault::open(CLUSTER, &UnsealKey::from_variable(&format!("{text}\n")).unwrap(), &root).unwrap();
        }
        for text in ["", "ab", &"zz".repeat(32), &STANDARD.encode([0xab; 31]), &"ab".repeat(33)] {
            assert!(matches!(UnsealKey::from_variable(text), Err(VaultError::UnsealKeyForm { .. })), "{text}");
        }
    }

    #[test]
    fn another_unseal_key_can_be_given_to_the_same_root() {
        let (vault, _) = Vault::create(CLUSTER, &unseal(1));
        let key = vault.new_data_key(Scope::Global, 1, NOW);
        let name: SecretName = "A".parse().unwrap();
        let sealed = vault.seal(&key, &Place::secret(&name, 1), &Secret::new(b"x".to_vec())).unwrap();
        let root = vault.sealed_root(&unseal(2));
        assert!(Vault::open(CLUSTER, &unseal(1), &root).is_err());
        let vault = Vault::open(CLUSTER, &unseal(2), &root).unwrap();
        assert_eq!(vault.open_value(&key, &Place::secret(&name, 1), &sealed).unwrap().expose(), b"x");
    }
}

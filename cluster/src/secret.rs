//! Secrets as the cluster stores them: ciphertext, and what names it. Sealing and opening happen at the edge (the
//! vault of a control node, the sealing key of a node); no key and no plaintext has a type here, so none can be in
//! a command, a snapshot or a goal.
//!
//! ```text
//!   unseal key ──▶ SealedRoot ──▶ SealedDataKey ──▶ SealedValue        at rest, in State
//!                                     node's public key ──▶ Sealed     on the way to one node, in its Goal
//! ```

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

use crate::id::{Label, LabelError};
use crate::spec::template::is_secret_name;
use crate::time::Timestamp;

/// Bytes nobody here looks into; base64 in JSON.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Opaque(pub Vec<u8>);

impl TryFrom<String> for Opaque {
    type Error = base64::DecodeError;
    fn try_from(text: String) -> Result<Opaque, base64::DecodeError> {
        STANDARD.decode(text).map(Opaque)
    }
}

impl From<Opaque> for String {
    fn from(bytes: Opaque) -> String {
        STANDARD.encode(bytes.0)
    }
}

impl fmt::Debug for Opaque {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

/// A secret as a person names it: `project/NAME`, or `NAME` for one that every project may read.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SecretName {
    project: Option<Label>,
    name: Box<str>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SecretNameError {
    #[error("`{0}` is not a secret's name: letters, digits and underscores, not starting with a digit")]
    Name(String),
    #[error("`{secret}` does not start with a project's name")]
    Project { secret: String, source: LabelError },
}

impl SecretName {
    pub fn new(project: Option<Label>, name: &str) -> Result<SecretName, SecretNameError> {
        if !is_secret_name(name) {
            return Err(SecretNameError::Name(name.to_owned()));
        }
        Ok(SecretName { project, name: name.into() })
    }

    /// `None`: global, for every project.
    pub fn project(&self) -> Option<&Label> {
        self.project.as_ref()
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whose data key seals it.
    pub fn scope(&self) -> Scope {
        match &self.project {
            Some(project) => Scope::Project(project.clone()),
            None => Scope::Global,
        }
    }
}

impl FromStr for SecretName {
    type Err = SecretNameError;
    fn from_str(text: &str) -> Result<SecretName, SecretNameError> {
        match text.split_once('/') {
            None => SecretName::new(None, text),
            Some((project, name)) => {
                let project = Label::new(project)
                    .map_err(|source| SecretNameError::Project { secret: text.to_owned(), source })?;
                SecretName::new(Some(project), name)
            }
        }
    }
}

impl TryFrom<String> for SecretName {
    type Error = SecretNameError;
    fn try_from(text: String) -> Result<SecretName, SecretNameError> {
        text.parse()
    }
}

impl From<SecretName> for String {
    fn from(name: SecretName) -> String {
        name.to_string()
    }
}

impl fmt::Display for SecretName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.project {
            Some(project) => write!(f, "{project}/{}", self.name),
            None => f.write_str(&self.name),
        }
    }
}

impl fmt::Debug for SecretName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What one data key seals. A project's name has no `@`, so the three can never be taken for one another.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Scope {
    /// Orca's own: the key of the cluster's certificate authority. Written `@cluster`.
    Cluster,
    /// Secrets every project may read. Written `@global`.
    Global,
    Project(Label),
}

impl FromStr for Scope {
    type Err = LabelError;
    fn from_str(text: &str) -> Result<Scope, LabelError> {
        match text {
            "@cluster" => Ok(Scope::Cluster),
            "@global" => Ok(Scope::Global),
            project => Label::new(project).map(Scope::Project),
        }
    }
}

impl TryFrom<String> for Scope {
    type Error = LabelError;
    fn try_from(text: String) -> Result<Scope, LabelError> {
        text.parse()
    }
}

impl From<Scope> for String {
    fn from(scope: Scope) -> String {
        scope.to_string()
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Scope::Cluster => f.write_str("@cluster"),
            Scope::Global => f.write_str("@global"),
            Scope::Project(project) => fmt::Display::fmt(project, f),
        }
    }
}

impl fmt::Debug for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A data key: whose, and which in the row of them. Written `scope.version`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DataKeyId {
    pub scope: Scope,
    pub version: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a data key: a scope, a dot and a version")]
pub struct DataKeyIdError(String);

impl FromStr for DataKeyId {
    type Err = DataKeyIdError;
    fn from_str(text: &str) -> Result<DataKeyId, DataKeyIdError> {
        let parts =
            text.split_once('.').and_then(|(scope, version)| Some((scope.parse().ok()?, version.parse().ok()?)));
        match parts {
            Some((scope, version)) => Ok(DataKeyId { scope, version }),
            None => Err(DataKeyIdError(text.to_owned())),
        }
    }
}

/// As text, because it is a key of maps, and JSON has no others.
impl TryFrom<String> for DataKeyId {
    type Error = DataKeyIdError;
    fn try_from(text: String) -> Result<DataKeyId, DataKeyIdError> {
        text.parse()
    }
}

impl From<DataKeyId> for String {
    fn from(id: DataKeyId) -> String {
        id.to_string()
    }
}

impl fmt::Display for DataKeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.scope, self.version)
    }
}

impl fmt::Debug for DataKeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// AES-256-GCM output: the nonce it was made with, then ciphertext and tag.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ciphertext {
    pub nonce: Opaque,
    pub bytes: Opaque,
}

/// The root key, sealed by the unseal key that lies beside a control node's data and never in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealedRoot {
    pub version: u32,
    pub key: Ciphertext,
}

/// One data key, sealed by the root key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealedDataKey {
    pub id: DataKeyId,
    /// The version of the root key that opens it.
    pub root: u32,
    pub created: Timestamp,
    pub key: Ciphertext,
}

/// Most values sealed with one data key. Random 96-bit nonces are safe for 2^32 uses (NIST SP 800-38D, 8.3); this
/// stays far below, so that a lost count never matters.
pub const DATA_KEY_USES_MAX: u64 = 1 << 20;

/// Longest that one data key seals new values.
pub const DATA_KEY_AGE_MAX: Duration = Duration::from_secs(90 * 24 * 60 * 60);

impl SealedDataKey {
    /// Whether the next value needs a new data key.
    pub fn is_spent(&self, uses: u64, now: Timestamp) -> bool {
        uses >= DATA_KEY_USES_MAX || now.since(self.created) >= DATA_KEY_AGE_MAX
    }
}

/// One version of one secret's value, sealed by a data key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealedValue {
    pub key: DataKeyId,
    /// Counts up from 1 with every value the secret has had.
    pub version: u32,
    pub value: Ciphertext,
}

/// A value sealed to one node's [`SealingKey`](SealingPublicKey) (HPKE, RFC 9180): only that node can open it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Sealed(pub Opaque);

/// The public half of the X25519 key a node was admitted with; secrets in its goals are sealed to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SealingPublicKey(pub Opaque);

/// Characters of a [`TokenId`]: 40 bits, enough never to meet by chance among the few tokens a cluster has.
pub const TOKEN_ID_LENGTH: usize = 8;

/// Which token: the part that may be shown, logged and listed. The secret part has no type here.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TokenId(Box<str>);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a token's id is {TOKEN_ID_LENGTH} characters of a-z and 0-9")]
pub struct TokenIdError;

impl TokenId {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TokenId {
    type Err = TokenIdError;
    fn from_str(text: &str) -> Result<TokenId, TokenIdError> {
        let known = text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        if text.len() == TOKEN_ID_LENGTH && known { Ok(TokenId(text.into())) } else { Err(TokenIdError) }
    }
}

impl TryFrom<String> for TokenId {
    type Error = TokenIdError;
    fn try_from(text: String) -> Result<TokenId, TokenIdError> {
        text.parse()
    }
}

impl From<TokenId> for String {
    fn from(id: TokenId) -> String {
        id.0.into()
    }
}

impl fmt::Display for TokenId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for TokenId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// SHA-256 of a token's secret: all that is kept of it. No salt and no stretching: the secret is 256 random bits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TokenHash(pub Opaque);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_named_with_or_without_its_project() {
        for text in ["web/DB_URL", "DB_URL", "a-b/_x9"] {
            let name: SecretName = text.parse().unwrap();
            assert_eq!(name.to_string(), text);
            assert_eq!(serde_json::from_str::<SecretName>(&format!("\"{text}\"")).unwrap(), name);
        }
        for text in ["", "/A", "web/", "web/9", "Web/A", "web/a/b", "@global/A", "a|b"] {
            assert!(text.parse::<SecretName>().is_err(), "{text}");
        }
    }

    #[test]
    fn scopes_are_never_confused() {
        for scope in [Scope::Cluster, Scope::Global, Scope::Project(Label::new("global").unwrap())] {
            assert_eq!(scope.to_string().parse::<Scope>().unwrap(), scope);
        }
        assert!("@other".parse::<Scope>().is_err());
    }

    #[test]
    fn a_data_key_can_be_the_key_of_a_map() {
        for scope in [Scope::Cluster, Scope::Global, Scope::Project(Label::new("a-b").unwrap())] {
            let keys = std::collections::BTreeMap::from([(DataKeyId { scope, version: 12 }, ())]);
            let text = serde_json::to_string(&keys).unwrap();
            assert_eq!(serde_json::from_str::<std::collections::BTreeMap<DataKeyId, ()>>(&text).unwrap(), keys);
        }
        for text in ["", "a", "a.", ".1", "@other.1", "a.1.2", "a.-1"] {
            assert!(text.parse::<DataKeyId>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_data_key_is_spent_by_use_or_by_age() {
        let nothing = Ciphertext { nonce: Opaque(vec![]), bytes: Opaque(vec![]) };
        let id = DataKeyId { scope: Scope::Global, version: 1 };
        let key = SealedDataKey { id, root: 1, created: Timestamp(1000), key: nothing };
        let last = Timestamp(1000) + DATA_KEY_AGE_MAX - Duration::from_millis(1);
        assert!(!key.is_spent(DATA_KEY_USES_MAX - 1, last));
        assert!(key.is_spent(DATA_KEY_USES_MAX, last));
        assert!(key.is_spent(0, last + Duration::from_millis(1)));
        assert!(!key.is_spent(0, Timestamp(0)), "a clock set back does not spend a key");
    }
}

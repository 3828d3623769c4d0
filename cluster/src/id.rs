//! Names and numbers by which things are known. Every id is its own type, so that two of them cannot be
//! swapped; numbers are given out by [`State`](crate::state::State) and never reused.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Most characters in a [`Label`]: the limit of one DNS label (RFC 1035, section 2.3.4).
pub const LABEL_LENGTH_MAX: usize = 63;

/// A name people choose: `[a-z0-9-]`, 1 to 63 characters, not starting or ending with a hyphen, so that it is
/// also one DNS label.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Label(Box<str>);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LabelError {
    #[error("a name may not be empty")]
    Empty,
    #[error("a name has at most {LABEL_LENGTH_MAX} characters, this one has {0}")]
    TooLong(usize),
    #[error("a name has only a-z, 0-9 and hyphens, not `{0}`")]
    Character(char),
    #[error("a name may not start or end with a hyphen")]
    Hyphen,
}

impl Label {
    pub fn new(text: &str) -> Result<Label, LabelError> {
        if text.is_empty() {
            return Err(LabelError::Empty);
        }
        if let Some(bad) = text.chars().find(|c| !matches!(c, 'a'..='z' | '0'..='9' | '-')) {
            return Err(LabelError::Character(bad));
        }
        if text.len() > LABEL_LENGTH_MAX {
            return Err(LabelError::TooLong(text.len()));
        }
        if text.starts_with('-') || text.ends_with('-') {
            return Err(LabelError::Hyphen);
        }
        Ok(Label(text.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Label {
    type Error = LabelError;
    fn try_from(text: String) -> Result<Label, LabelError> {
        Label::new(&text)
    }
}

impl FromStr for Label {
    type Err = LabelError;
    fn from_str(text: &str) -> Result<Label, LabelError> {
        Label::new(text)
    }
}

impl From<Label> for String {
    fn from(label: Label) -> String {
        label.0.into()
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A service, with the project whose namespace it lives in. Written `project/service`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ServiceName {
    pub project: Label,
    pub service: Label,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ServiceNameError {
    #[error("`{0}` is not of the form project/service")]
    Form(String),
    #[error(transparent)]
    Label(#[from] LabelError),
}

impl ServiceName {
    pub fn new(project: Label, service: Label) -> ServiceName {
        ServiceName { project, service }
    }
}

impl FromStr for ServiceName {
    type Err = ServiceNameError;
    fn from_str(text: &str) -> Result<ServiceName, ServiceNameError> {
        let (project, service) = text.split_once('/').ok_or_else(|| ServiceNameError::Form(text.to_owned()))?;
        Ok(ServiceName { project: Label::new(project)?, service: Label::new(service)? })
    }
}

impl TryFrom<String> for ServiceName {
    type Error = ServiceNameError;
    fn try_from(text: String) -> Result<ServiceName, ServiceNameError> {
        text.parse()
    }
}

impl From<ServiceName> for String {
    fn from(name: ServiceName) -> String {
        name.to_string()
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.project, self.service)
    }
}

impl fmt::Debug for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.project, self.service)
    }
}

/// A cluster: 128 random bits from its first start, so that a certificate or a backup of another cluster is never
/// taken for one of this. Written as 32 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ClusterId(pub u128);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a cluster's id: 32 hexadecimal digits, lower case")]
pub struct ClusterIdError(String);

impl FromStr for ClusterId {
    type Err = ClusterIdError;
    fn from_str(text: &str) -> Result<ClusterId, ClusterIdError> {
        let form = text.len() == 32 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        match u128::from_str_radix(text, 16) {
            Ok(id) if form => Ok(ClusterId(id)),
            _ => Err(ClusterIdError(text.to_owned())),
        }
    }
}

impl TryFrom<String> for ClusterId {
    type Error = ClusterIdError;
    fn try_from(text: String) -> Result<ClusterId, ClusterIdError> {
        text.parse()
    }
}

impl From<ClusterId> for String {
    fn from(id: ClusterId) -> String {
        id.to_string()
    }
}

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

macro_rules! number {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }

        impl FromStr for $name {
            type Err = std::num::ParseIntError;
            fn from_str(text: &str) -> Result<$name, std::num::ParseIntError> {
                text.strip_prefix($prefix).unwrap_or(text).parse().map($name)
            }
        }
    };
}

number!(
    /// A node: the index of the log entry that admitted it. A wiped disk means a new one.
    NodeId, "n");
number!(
    /// One running (or wanted) copy of a service. Unique in the cluster's life.
    ReplicaId, "r");
number!(
    /// A service's specification at one deploy. Counts up from 1 for each service.
    Revision, "v");
number!(
    /// Counts the changes to [`State`](crate::state::State).
    Generation, "");

/// The number of a [`Goal`](crate::goal::Goal): the leader's term, then a counter within it. Only grows, over
/// changes of leader too; a node refuses a smaller one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct GoalNumber {
    pub term: u64,
    pub count: u64,
}

impl fmt::Display for GoalNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.term, self.count)
    }
}

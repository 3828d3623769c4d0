//! Hello: before anything else, both sides of a connection say which versions of the protocol they speak. Nodes of
//! two releases work together while the cluster is being updated; those too far apart say so and part.
//!
//! The form of these messages never changes: fields may be added, and unknown ones are ignored, because the side
//! that reads them may be years older.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

/// The newest version of the protocol this program speaks, and the oldest.
const NEWEST: u32 = 1;
const OLDEST: u32 = 1;

/// What this program can do that others of the same version may not know yet. None so far.
const FEATURES: &[&str] = &[];

/// What one side speaks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Of the program, for people.
    pub software: String,
    pub oldest: u32,
    pub newest: u32,
    #[serde(default)]
    pub features: BTreeSet<String>,
}

impl Hello {
    /// Of this program.
    pub fn own() -> Hello {
        Hello {
            software: format!("orca {}", env!("CARGO_PKG_VERSION")),
            oldest: OLDEST,
            newest: NEWEST,
            features: FEATURES.iter().map(|&name| name.to_owned()).collect(),
        }
    }

    /// What the two sides have in common. Both compute it, and get the same.
    pub fn agree(&self, other: &Hello) -> Result<Agreed, Incompatible> {
        let version = self.newest.min(other.newest);
        if version < self.oldest.max(other.oldest) {
            return Err(Incompatible { here: self.clone(), there: other.clone() });
        }
        Ok(Agreed { version, features: self.features.intersection(&other.features).cloned().collect() })
    }
}

impl fmt::Display for Hello {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (protocol {} to {})", self.software, self.oldest, self.newest)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agreed {
    pub version: u32,
    pub features: BTreeSet<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("this is {here} and the other side is {there}: they have no protocol version in common; update the older one")]
pub struct Incompatible {
    pub here: Hello,
    pub there: Hello,
}

/// The first message on every connection, from the side that dialed.
#[derive(Serialize, Deserialize)]
pub(crate) struct Opening {
    pub hello: Hello,
    /// Instead of a certificate, on the client plane.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<Shown>,
}

/// A token without its fingerprint. No `Debug`: the secret is in it.
#[derive(Serialize, Deserialize)]
pub(crate) struct Shown {
    pub id: String,
    pub secret: String,
}

/// The answer to it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Answer {
    pub hello: Hello,
    /// Why the connection will not be served.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn speaks(oldest: u32, newest: u32, features: &[&str]) -> Hello {
        let features = features.iter().map(|&name| name.to_owned()).collect();
        Hello { software: format!("orca 0.{newest}"), oldest, newest, features }
    }

    #[test]
    fn the_newest_version_both_know_is_spoken() {
        let (a, b) = (speaks(1, 3, &["x", "y"]), speaks(2, 5, &["y", "z"]));
        let agreed = a.agree(&b).unwrap();
        assert_eq!((agreed.version, agreed.features), (3, BTreeSet::from(["y".to_owned()])));
        assert_eq!(a.agree(&b), b.agree(&a));
    }

    #[test]
    fn releases_too_far_apart_part_and_the_message_names_both() {
        let text = speaks(1, 2, &[]).agree(&speaks(3, 4, &[])).unwrap_err().to_string();
        assert!(text.contains("orca 0.2 (protocol 1 to 2)") && text.contains("orca 0.4 (protocol 3 to 4)"), "{text}");
    }

    #[test]
    fn a_hello_from_the_future_is_read() {
        let text = r#"{"hello":{"software":"orca 9","oldest":1,"newest":9,"mood":"good"},"extra":[]}"#;
        let opening: Opening = serde_json::from_str(text).unwrap();
        assert_eq!(Hello::own().agree(&opening.hello).unwrap().version, NEWEST);
    }
}

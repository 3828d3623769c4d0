//! The one place in this crate that asks what time it is in the world; decisions are given the answer.

use std::time::{SystemTime, UNIX_EPOCH};

use orca_cluster::time::Timestamp;

pub fn now() -> Timestamp {
    // A clock before 1970 is a machine whose time is not set: certificates tell that more clearly than we could.
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

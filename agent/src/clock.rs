//! The one place in this crate that asks what time it is.

use std::time::{Duration, SystemTime};

use orca_cluster::time::Timestamp;

/// The wall clock. One set before 1970 reads as 1970.
pub fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    Timestamp::default() + since
}

//! Waiting for what must become true.

use std::thread;
use std::time::{Duration, Instant};

/// Longest that anything may take for which a test gives no bound of its own, on a machine under load.
pub const PATIENCE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(10);

/// Waits until the condition holds; `what` completes "not within 60s: …".
#[track_caller]
pub fn wait_until(what: &str, deadline: Duration, mut condition: impl FnMut() -> bool) -> Duration {
    wait_for(what, deadline, || condition().then_some(())).1
}

/// Waits until there is something, and gives it and how long it took.
#[track_caller]
pub fn wait_for<T>(what: &str, deadline: Duration, mut condition: impl FnMut() -> Option<T>) -> (T, Duration) {
    let begun = Instant::now();
    loop {
        if let Some(value) = condition() {
            return (value, begun.elapsed());
        }
        assert!(begun.elapsed() < deadline, "not within {deadline:?}: {what}");
        thread::sleep(PAUSE);
    }
}

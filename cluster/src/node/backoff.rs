//! When to try again: at once after the first exit, then 1 s, 2 s, 4 s … up to five minutes, and from the start
//! again once it has been up for a while.

use std::time::Duration;

/// The longest a replica waits for its next try.
pub const DELAY_MAX: Duration = Duration::from_secs(300);
/// Ready for so long, a replica's earlier failures are forgotten.
pub const STABLE_AFTER: Duration = Duration::from_secs(10);

/// A container that nothing probes is ready when it has been up for so long: most that cannot run end before, also where
/// a busy machine takes a second or two to get them going. Docker Swarm watches what it updates for as long.
pub const STEADY_AFTER: Duration = Duration::from_secs(5);

/// How long to wait after this many failures in a row, counting this one.
pub fn restart_delay(failures: u32) -> Duration {
    match failures {
        0 | 1 => Duration::ZERO,
        n => Duration::from_secs(1 << (n - 2).min(9)).min(DELAY_MAX),
    }
}

/// How long to wait before fetching or creating is tried again: nothing has run, so there is no hurry.
pub fn setup_delay(failures: u32) -> Duration {
    Duration::from_secs(1 << failures.saturating_sub(1).min(6)).min(Duration::from_secs(30))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_restart_is_immediate_and_the_delay_doubles_to_five_minutes() {
        let seconds: Vec<u64> = (1..=12).map(|n| restart_delay(n).as_secs()).collect();
        assert_eq!(seconds, [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]);
        assert_eq!(restart_delay(u32::MAX), DELAY_MAX);
    }

    #[test]
    fn setting_up_is_tried_again_every_half_minute_at_least() {
        let seconds: Vec<u64> = (1..=7).map(|n| setup_delay(n).as_secs()).collect();
        assert_eq!(seconds, [1, 2, 4, 8, 16, 30, 30]);
    }
}

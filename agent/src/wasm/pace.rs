//! Whether a module is quick: then the thread that calls it runs it at once. Waking a thread of the modules' runtime
//! and being woken by it costs more than most requests do.
//!
//! A module earns credit with turns that are quick and pays for those that are not, so what it takes of its callers'
//! time beyond that is bounded: [`EARNED`] for each quick turn.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// A turn that is longer is not quick: handing it over costs a fraction of it.
const QUICK_TURN_MAX: Duration = Duration::from_micros(200);
/// A quick turn's credit. All credit is in microseconds.
const EARNED: u32 = 25;
/// What makes a module quick: 64 quick turns, where none is not.
const QUICK: u32 = 64 * EARNED;
/// Past it nothing is earned. A quick module can afford what a busy machine adds to a turn, and not a whole tick.
const CREDIT_MAX: u32 = 2 * QUICK;
/// The least that a turn costs which was not the last: it was taken here for nothing.
const UNFINISHED: Duration = Duration::from_millis(1);

/// What the latest calls of one replica were like.
#[derive(Debug, Default)]
pub(super) struct Pace {
    credit: AtomicU32,
}

impl Pace {
    pub(super) fn is_quick(&self) -> bool {
        self.credit.load(Ordering::Relaxed) >= QUICK
    }

    /// The first turn of an instance took so long; `is_over` if it did all there was to do.
    pub(super) fn took_turn(&self, took: Duration, is_over: bool) {
        let before = self.credit.load(Ordering::Relaxed);
        let after = if is_over && took <= QUICK_TURN_MAX {
            (before + EARNED).min(CREDIT_MAX)
        } else {
            let cost = if is_over { took } else { took.max(UNFINISHED) };
            before.saturating_sub(u32::try_from(cost.as_micros()).unwrap_or(u32::MAX))
        };
        // Two turns at once may count as one: it is a judgement, not a sum.
        self.credit.store(after, Ordering::Relaxed);
    }

    /// It did what may take long whatever the module is like, as writing to a disk.
    pub(super) fn lingered(&self) {
        self.credit.store(0, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUICK_TURN: Duration = Duration::from_micros(20);

    fn take_quick_turns(pace: &Pace, count: u32) {
        (0..count).for_each(|_| pace.took_turn(QUICK_TURN, true));
    }

    #[test]
    fn a_module_is_quick_when_it_has_been_for_a_while() {
        let pace = Pace::default();
        take_quick_turns(&pace, 63);
        assert!(!pace.is_quick());
        take_quick_turns(&pace, 1);
        assert!(pace.is_quick());
        pace.lingered();
        assert!(!pace.is_quick());
    }

    #[test]
    fn now_and_then_a_turn_may_take_long_and_a_whole_tick_is_too_long() {
        let pace = Pace::default();
        take_quick_turns(&pace, 1_000);
        for _ in 0..100 {
            pace.took_turn(QUICK_TURN_MAX * 3, true);
            assert!(pace.is_quick());
            take_quick_turns(&pace, 50);
        }
        pace.took_turn(crate::wasm::engine::TICK, false);
        assert!(!pace.is_quick());
    }

    #[test]
    fn one_that_waits_for_others_is_not_quick() {
        let pace = Pace::default();
        for _ in 0..1_000 {
            take_quick_turns(&pace, 20);
            pace.took_turn(QUICK_TURN, false);
        }
        assert!(!pace.is_quick());
    }
}

//! Which replica gets a request, and which one is left alone for a while. Two are drawn by weight and the less
//! loaded of them is taken: nearly as good as knowing the least loaded of all, without herding everyone onto it.
//! A replica that fails several times in a row is ejected for a time that doubles; when all are ejected none is,
//! since then the fault is more likely ours, and trying beats refusing.

use std::time::Duration;

/// Failures in a row after which a replica is ejected: one is noise, and each costs a retried request.
const FAILURES_TO_EJECT: u32 = 3;
const EJECTION_MIN: Duration = Duration::from_secs(1);
const EJECTION_MAX: Duration = Duration::from_secs(30);

/// A replica as the choice sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    pub weight: u16,
    /// Requests it is serving for us now.
    pub load: u32,
    pub available: bool,
}

/// Chooses one of the candidates by two random numbers; nothing only if there are none.
pub fn choose<F>(count: usize, candidate: F, random: [u32; 2]) -> Option<usize>
where
    F: Fn(usize) -> Candidate,
{
    if count == 1 {
        return Some(0);
    }
    let draw = |available_only: bool, random: u32| {
        let counts = |c: &Candidate| !available_only || c.available;
        let total: u64 = (0..count).map(&candidate).filter(counts).map(|c| u64::from(c.weight.max(1))).sum();
        // The high half of the product is uniform below `total`.
        let mut point = (u64::from(random) * total) >> 32;
        (0..count).map(|index| (index, candidate(index))).filter(|(_, c)| counts(c)).find(|(_, c)| {
            let weight = u64::from(c.weight.max(1));
            let hit = point < weight;
            point = point.saturating_sub(weight);
            hit
        })
    };
    let some_available = (0..count).any(|index| candidate(index).available);
    let (first, a) = draw(some_available, random[0])?;
    let (second, b) = draw(some_available, random[1])?;
    // Load by weight, compared without dividing. A tie goes to the first drawn, so without load each one's share is
    // exactly its weight's. With load it is not: whoever has less for its weight gets more. Beside replicas with
    // WebSockets open, a canary with a weight of 20 % got 26 % of the requests.
    let a_share = u64::from(a.load) * u64::from(b.weight.max(1));
    let b_share = u64::from(b.load) * u64::from(a.weight.max(1));
    Some(if b_share < a_share { second } else { first })
}

/// What recent attempts say about one replica; the default is what a success leaves. Times are milliseconds of the worker's clock.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Health {
    failures: u32,
    ejections: u32,
    ejected_until: u64,
}

impl Health {
    pub fn is_available(&self, now: u64) -> bool {
        now >= self.ejected_until
    }

    /// It refused a connection, or broke one before a byte of response. Says whether this ejects it.
    pub fn failed(&mut self, now: u64) -> bool {
        if !self.is_available(now) {
            return false;
        }
        self.failures += 1;
        if self.failures < FAILURES_TO_EJECT {
            return false;
        }
        let factor = 1_u32 << self.ejections.min(5);
        let span = EJECTION_MIN.saturating_mul(factor).min(EJECTION_MAX);
        self.ejected_until = now + u64::try_from(span.as_millis()).unwrap_or(u64::MAX);
        self.ejections += 1;
        // One more failure after the ejection ends is enough for the next.
        self.failures = FAILURES_TO_EJECT - 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn candidates() -> impl Strategy<Value = Vec<Candidate>> {
        let one = (1_u16..1000, 0_u32..100, any::<bool>());
        proptest::collection::vec(one.prop_map(|(weight, load, available)| Candidate { weight, load, available }), 1..8)
    }

    proptest! {
        #[test]
        fn an_ejected_one_is_chosen_only_when_all_are(all in candidates(), random in any::<[u32; 2]>()) {
            let chosen = choose(all.len(), |index| all[index], random).expect("there are candidates");
            prop_assert!(all[chosen].available || all.iter().all(|c| !c.available));
        }

        #[test]
        fn without_load_the_first_draw_decides_by_weight(
            weights in proptest::collection::vec(1_u16..100, 2..6), random in any::<[u32; 2]>(),
        ) {
            let candidate = |index: usize| Candidate { weight: weights[index], load: 0, available: true };
            let total: u64 = weights.iter().map(|&w| u64::from(w)).sum();
            let point = (u64::from(random[0]) * total) >> 32;
            let chosen = choose(weights.len(), candidate, random).expect("there are candidates");
            let before: u64 = weights[..chosen].iter().map(|&w| u64::from(w)).sum();
            prop_assert!(before <= point && point < before + u64::from(weights[chosen]));
        }
    }

    #[test]
    fn of_two_the_less_loaded_is_taken() {
        let loads = [9, 3];
        let candidate = |index: usize| Candidate { weight: 1, load: loads[index], available: true };
        assert_eq!(choose(2, candidate, [0, u32::MAX]), Some(1));
        assert_eq!(choose(2, candidate, [u32::MAX, 0]), Some(1));
    }

    #[test]
    fn nobody_to_choose_from_is_none() {
        assert_eq!(choose(0, |_| unreachable!(), [0, 0]), None);
    }

    #[test]
    fn ejection_doubles() {
        let mut health = Health::default();
        assert!(!health.failed(0) && !health.failed(0) && health.failed(0));
        assert!(!health.is_available(999) && health.is_available(1000));
        assert!(health.failed(1000), "one more failure is enough");
        assert!(!health.is_available(2999) && health.is_available(3000));
    }
}

//! When a replica's schedules are due. A run that was missed while the node was down is not made up for; one that
//! is due while the last is still running is the runtime's to refuse.

use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;

use crate::goal::ReplicaGoal;
use crate::id::{ReplicaId, ServiceName};
use crate::time::Timestamp;

#[derive(Debug, Default)]
pub struct Schedules {
    next: BTreeMap<(ReplicaId, String), Timestamp>,
}

impl Schedules {
    /// The schedules of these replicas, one replica for each service: the oldest.
    pub fn set<'a>(&mut self, replicas: impl Iterator<Item = (ReplicaId, &'a ReplicaGoal)>, now: Timestamp) {
        let mut kept = BTreeMap::new();
        let mut seen: BTreeSet<&ServiceName> = BTreeSet::new();
        for (id, goal) in replicas {
            if !goal.is_running() || !seen.insert(&goal.service) {
                continue;
            }
            for schedule in &goal.schedules {
                let key = (id, schedule.cron.clone());
                if let Some(at) = self.next.get(&key).copied().or_else(|| next_after(&schedule.cron, now)) {
                    kept.insert(key, at);
                }
            }
        }
        self.next = kept;
    }

    pub fn due(&mut self, now: Timestamp) -> Vec<(ReplicaId, String)> {
        let due: Vec<(ReplicaId, String)> =
            self.next.iter().filter(|(_, at)| now >= **at).map(|(key, _)| key.clone()).collect();
        for key in &due {
            match next_after(&key.1, now) {
                Some(at) => self.next.insert(key.clone(), at),
                None => self.next.remove(key),
            };
        }
        due
    }

    pub fn deadline(&self) -> Option<(Timestamp, &'static str)> {
        self.next.values().min().map(|at| (*at, "a schedule is due"))
    }
}

/// The first time after `now` that a cron expression (five fields, UTC) names.
pub fn next_after(cron: &str, now: Timestamp) -> Option<Timestamp> {
    let cron = croner::Cron::from_str(cron).ok()?;
    let now = chrono::DateTime::from_timestamp_millis(i64::try_from(now.0).ok()?)?;
    let next = cron.find_next_occurrence(&now, false).ok()?;
    u64::try_from(next.timestamp_millis()).ok().map(Timestamp)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_time_is_after_now() {
        let minute = 60_000;
        assert_eq!(next_after("* * * * *", Timestamp(0)), Some(Timestamp(minute)));
        assert_eq!(next_after("* * * * *", Timestamp(minute - 1)), Some(Timestamp(minute)));
        assert_eq!(next_after("0 9 * * *", Timestamp(0)), Some(Timestamp(9 * 60 * minute)));
        assert_eq!(next_after("0 0 30 2 *", Timestamp(0)), None);
    }
}

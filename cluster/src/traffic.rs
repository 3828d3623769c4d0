//! What the proxy counted. Counters only grow while a process lives, and go on in the one it hands over to, so a window is
//! the difference of two snapshots, and a receipt made from two snapshots is exact. Where a process ended in between
//! without handing over, what it had reported last counts, and the window says that it is the least.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::id::{NodeId, ReplicaId, Revision, ServiceName};
use crate::time::Timestamp;

/// One proxy's counters at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Traffic {
    pub at: Timestamp,
    /// When the process that counts was started, by its own clock, or the first of those that have handed over to it in
    /// turn: another one counts from zero.
    #[serde(default)]
    pub started: Timestamp,
    /// How often something that belongs to these counters was lost, since a process of theirs was killed.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub gaps: u64,
    pub services: BTreeMap<ServiceName, ServiceTraffic>,
    /// What is going on now at each replica that serves or drains; absent means nothing.
    pub in_flight: BTreeMap<ReplicaId, InFlight>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ServiceTraffic {
    /// Requests whose last attempt went to a replica of this revision.
    pub revisions: BTreeMap<Revision, Counters>,
    /// And of revisions that are not told apart any more, since they have been out of use for long.
    #[serde(default, skip_serializing_if = "is_nothing")]
    pub retired: Counters,
    /// Requests for which there was no replica to go to.
    pub unserved: Counters,
}

/// Counted when a request has ended: its response went out whole, or it was cut.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Counters {
    pub requests: u64,
    /// By the first digit of the status: 1xx (upgrades) to 5xx.
    pub statuses: [u64; 5],
    /// Responses and upgraded connections that we or the replica ended before their end; the client going away
    /// by itself is not one.
    pub cut: u64,
    pub latency: Histogram,
    /// Microseconds of all of them together.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub latency_total_us: u64,
    /// Those that ended in a 5xx because there was no replica to ask; counted where a service's requests are added up.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub unserved: u64,
}

fn is_nothing(counters: &Counters) -> bool {
    *counters == Counters::default()
}

pub(crate) fn is_zero(count: &u64) -> bool {
    *count == 0
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct InFlight {
    pub requests: u32,
    /// WebSockets and other upgraded connections.
    pub upgraded: u32,
}

/// What a proxy that hands over to another on its node has counted and not finished. The other one reports it with its
/// own: nobody else hears of it any more.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Legacy {
    /// It may still give a request to any replica of the last tables it had.
    pub is_choosing: bool,
    /// It has drained, and counts no more.
    pub is_final: bool,
    pub traffic: Traffic,
}

/// What every proxy had counted of one service at one moment, to take the difference from later.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Tally(pub BTreeMap<NodeId, ProxyCount>);

/// What one proxy had counted since it was started.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ProxyCount {
    pub started: Timestamp,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub gaps: u64,
    pub counted: Counters,
}

/// What was counted since a tally.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Counted {
    pub counters: Counters,
    /// A proxy has ended without handing over, or is not heard: what it counted after its last report is missing.
    pub at_least: bool,
}

/// Times from a request's head to the end of its response, in buckets of 1/8 of a power of two of microseconds:
/// a quantile read from it is at most 12.5 % too high and never too low.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Histogram {
    /// Trailing zeros are left out.
    counts: Vec<u64>,
}

/// Buckets of a [`Histogram`]: the last one begins at about 73 minutes.
pub const HISTOGRAM_BUCKETS: usize = 240;

/// The bucket that a time falls into.
pub fn bucket_of(time: Duration) -> usize {
    let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    if micros < 8 {
        return usize::try_from(micros).unwrap_or(0);
    }
    let power = 63 - micros.leading_zeros();
    let eighth = (micros >> (power - 3)) & 7;
    let bucket = 8 * (power - 2) + u32::try_from(eighth).unwrap_or(7);
    (bucket as usize).min(HISTOGRAM_BUCKETS - 1)
}

/// The least time above those of a bucket.
fn bucket_end(bucket: usize) -> Duration {
    let next = bucket as u64 + 1;
    if next < 8 {
        return Duration::from_micros(next);
    }
    let (power, eighth) = (next / 8 + 2, next % 8);
    Duration::from_micros((8 + eighth) << (power - 3))
}

impl Histogram {
    /// From counts by [`bucket_of`].
    pub fn from_counts(mut counts: Vec<u64>) -> Histogram {
        while counts.last() == Some(&0) {
            counts.pop();
        }
        Histogram { counts }
    }

    pub fn counts(&self) -> &[u64] {
        &self.counts
    }

    pub fn total(&self) -> u64 {
        self.counts.iter().fold(0u64, |total, count| total.saturating_add(*count))
    }

    /// The time below which this share (0 to 1) of them lies; nothing if there are none.
    pub fn quantile(&self, share: f64) -> Option<Duration> {
        let total = self.total();
        if total == 0 {
            return None;
        }
        // Rank by ceiling, so that the 99th of 100 is the 99th and not the last.
        let rank = ((share * total as f64).ceil() as u64).clamp(1, total);
        let mut seen = 0;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen = count.saturating_add(seen);
            if seen >= rank {
                return Some(bucket_end(bucket.min(HISTOGRAM_BUCKETS - 1)));
            }
        }
        None
    }

    pub fn add(&mut self, other: &Histogram) {
        if self.counts.len() < other.counts.len() {
            self.counts.resize(other.counts.len(), 0);
        }
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine = mine.saturating_add(*theirs);
        }
    }

    fn minus(&self, earlier: &Histogram) -> Histogram {
        let before = earlier.counts.iter().copied().chain(std::iter::repeat(0));
        Histogram::from_counts(self.counts.iter().zip(before).map(|(now, then)| now.saturating_sub(then)).collect())
    }
}

impl Counters {
    pub fn add(&mut self, other: &Counters) {
        // What a node says is only what it says: no number of its makes a leader fail.
        self.requests = self.requests.saturating_add(other.requests);
        for (mine, theirs) in self.statuses.iter_mut().zip(other.statuses) {
            *mine = mine.saturating_add(theirs);
        }
        self.cut = self.cut.saturating_add(other.cut);
        self.latency.add(&other.latency);
        self.latency_total_us = self.latency_total_us.saturating_add(other.latency_total_us);
        self.unserved = self.unserved.saturating_add(other.unserved);
    }

    /// What was counted since an earlier snapshot of the same counters. Where something was lost in between they may have
    /// become smaller, and this is the least.
    pub fn since(&self, earlier: &Counters) -> Counters {
        let mut statuses = self.statuses;
        for (mine, theirs) in statuses.iter_mut().zip(earlier.statuses) {
            *mine = mine.saturating_sub(theirs);
        }
        Counters {
            requests: self.requests.saturating_sub(earlier.requests),
            statuses,
            cut: self.cut.saturating_sub(earlier.cut),
            latency: self.latency.minus(&earlier.latency),
            latency_total_us: self.latency_total_us.saturating_sub(earlier.latency_total_us),
            unserved: self.unserved.saturating_sub(earlier.unserved),
        }
    }

    pub fn server_errors(&self) -> u64 {
        self.statuses[4]
    }
}

impl Tally {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Traffic {
    /// Goes on where the proxy that has handed over to this one was, or is while it drains.
    pub fn inherit(&mut self, before: &Traffic) {
        self.started = before.started;
        self.gaps = self.gaps.saturating_add(before.gaps);
        for (name, before) in &before.services {
            let service = self.services.entry(name.clone()).or_default();
            service.unserved.add(&before.unserved);
            service.retired.add(&before.retired);
            for (revision, before) in &before.revisions {
                service.revisions.entry(*revision).or_default().add(before);
            }
        }
        for (replica, before) in &before.in_flight {
            let flight = self.in_flight.entry(*replica).or_default();
            flight.requests = flight.requests.saturating_add(before.requests);
            flight.upgraded = flight.upgraded.saturating_add(before.upgraded);
        }
    }

    /// What was counted of this service, all of it together.
    pub fn total(&self, service: &ServiceName) -> Counters {
        self.services.get(service).map(ServiceTraffic::total).unwrap_or_default()
    }

    /// What replicas of one template answered.
    pub fn of_template(&self, service: &ServiceName, template: Revision) -> Counters {
        let counted = self.services.get(service).and_then(|traffic| traffic.revisions.get(&template));
        counted.cloned().unwrap_or_default()
    }
}

impl Legacy {
    /// And what was left to the proxy that leaves this.
    pub fn inherit(&mut self, before: &Legacy) {
        self.is_choosing |= before.is_choosing;
        self.is_final &= before.is_final;
        self.traffic.inherit(&before.traffic);
    }

    /// Whoever leaves it has ended: nothing of it goes on, and what was counted and not said is lost.
    pub fn end(&mut self) {
        self.is_choosing = false;
        self.traffic.in_flight.clear();
        if !std::mem::replace(&mut self.is_final, true) {
            self.traffic.gaps = self.traffic.gaps.saturating_add(1);
        }
    }
}

impl Counters {
    /// Requests that did not succeed: answered with a 5xx, or cut. One that is both counts twice.
    pub fn failures(&self) -> u64 {
        self.server_errors().saturating_add(self.cut).min(self.requests)
    }
}

impl ServiceTraffic {
    pub fn total(&self) -> Counters {
        let mut total = Counters { unserved: self.unserved.server_errors(), ..self.unserved.clone() };
        for counters in self.revisions.values().chain([&self.retired]) {
            total.add(counters);
        }
        total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_time_lies_below_the_end_of_its_bucket_and_not_below_the_end_of_the_one_before() {
        for micros in (0..100_000).chain([1 << 20, (1 << 20) - 1, 59_000_000, 3_600_000_000]) {
            let time = Duration::from_micros(micros);
            let bucket = bucket_of(time);
            assert!(time < bucket_end(bucket), "{micros}");
            assert!(bucket == 0 || time >= bucket_end(bucket - 1), "{micros}");
        }
    }

    #[test]
    fn a_quantile_is_at_most_an_eighth_too_high() {
        let mut counts = vec![0; HISTOGRAM_BUCKETS];
        for millis in 1..=1000 {
            counts[bucket_of(Duration::from_millis(millis))] += 1;
        }
        let p99 = Histogram::from_counts(counts).quantile(0.99).unwrap_or_default();
        assert!(p99 >= Duration::from_millis(990) && p99 <= Duration::from_millis(990 * 9 / 8), "{p99:?}");
    }

    #[test]
    fn impossible_counts_are_only_wrong() {
        let most = Histogram::from_counts(vec![u64::MAX; HISTOGRAM_BUCKETS + 1000]);
        let mut counters = Counters {
            requests: u64::MAX,
            statuses: [u64::MAX; 5],
            cut: 1,
            latency: most,
            latency_total_us: 1,
            unserved: 0,
        };
        counters.add(&counters.clone());
        assert_eq!((counters.requests, counters.cut, counters.latency.total()), (u64::MAX, 2, u64::MAX));
        assert!(counters.latency.quantile(0.5).is_some());
        let late = Histogram::from_counts([vec![0; HISTOGRAM_BUCKETS + 1000], vec![1]].concat());
        assert!(late.quantile(0.5).is_some());
    }

    #[test]
    fn what_a_predecessor_leaves_goes_on_in_its_successor() {
        let web = ServiceName::new("app".parse().unwrap(), "web".parse().unwrap());
        // When it was started; requests by revision; what is in flight by replica.
        let traffic = |started, counted: &[(u64, u64)], flights: &[(u64, u32, u32)]| {
            let counters = |requests| Counters { requests, ..Counters::default() };
            let revisions = counted.iter().map(|&(revision, requests)| (Revision(revision), counters(requests)));
            let service =
                ServiceTraffic { revisions: revisions.collect(), retired: counters(2), unserved: counters(1) };
            let flight = |&(replica, requests, upgraded)| (ReplicaId(replica), InFlight { requests, upgraded });
            Traffic {
                started: Timestamp(started),
                services: BTreeMap::from([(web.clone(), service)]),
                in_flight: flights.iter().map(flight).collect(),
                ..Traffic::default()
            }
        };
        let first =
            Legacy { is_choosing: true, is_final: false, traffic: traffic(1, &[(1, 10)], &[(1, 0, 2), (2, 3, 0)]) };
        let mut second = Legacy { is_choosing: false, is_final: true, traffic: traffic(2, &[(2, 5)], &[(1, 1, 0)]) };
        second.inherit(&first);
        assert!(second.is_choosing && !second.is_final);
        let mut third = traffic(3, &[(2, 7)], &[(2, 4, 1)]);
        third.inherit(&second.traffic);
        let mut all = traffic(1, &[(1, 10), (2, 12)], &[(1, 1, 2), (2, 7, 1)]);
        let ServiceTraffic { retired, unserved, .. } = all.services.get_mut(&web).unwrap();
        (retired.requests, unserved.requests) = (6, 3);
        assert_eq!(third, all);
        // It is said from process to process.
        let said = serde_json::to_string(&second).unwrap();
        assert_eq!(serde_json::from_str::<Legacy>(&said).unwrap(), second);
    }

    #[test]
    fn a_predecessor_that_ends_without_a_last_word_leaves_a_gap() {
        let busy = BTreeMap::from([(ReplicaId(1), InFlight { requests: 1, upgraded: 0 })]);
        for (is_final, gaps) in [(true, 0), (false, 1)] {
            let traffic = Traffic { in_flight: busy.clone(), ..Traffic::default() };
            let mut left = Legacy { is_choosing: true, is_final, traffic };
            // The second time nothing ends.
            for _ in 0..2 {
                left.end();
                let traffic = Traffic { gaps, ..Traffic::default() };
                assert_eq!(left, Legacy { is_choosing: false, is_final: true, traffic });
            }
        }
    }

    #[test]
    fn counters_from_before_times_were_added_up_are_read() {
        let text = r#"{"requests":1,"statuses":[0,1,0,0,0],"cut":0,"latency":[0,1]}"#;
        let counters: Counters = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_string(&counters).unwrap(), text);
    }

    #[test]
    fn a_window_is_the_difference_and_never_less_than_nothing() {
        let counters = |requests| Counters {
            requests,
            statuses: [0, requests, 0, 0, 0],
            latency_total_us: 7 * requests,
            ..Counters::default()
        };
        assert_eq!(counters(10).since(&counters(4)), counters(6));
        assert_eq!(counters(3).since(&counters(10)), Counters::default());
    }
}

//! What to say of a rollout once it is over: the receipt, the failure, or what goes on without whoever waited for it.

use orca_cluster::id::{Revision, ServiceName};
use orca_cluster::state::{Outcome, Receipt};
use orca_cluster::status::ServiceState;
use orca_cluster::status::verdict::{Awaited, Verdict};
use orca_cluster::why::Code;

use super::super::text::{Ink, Text};
use super::super::{Screen, grouped, history, latency, short_source};
use super::{Track, Tracker};
use crate::exit::{Exit, Failure};
use crate::moment;

impl Tracker {
    pub fn verdicts(&self) -> impl Iterator<Item = (&ServiceName, Verdict, Option<&Receipt>)> {
        self.tracks.iter().map(|(name, track)| (name, track.verdict, track.receipt()))
    }

    /// Of all together, when it is over: the failure that the command ends with, if there is one.
    pub fn verdict(&self) -> Verdict {
        let failed = self.tracks.values().map(|track| track.verdict).filter(|verdict| verdict.is_failure());
        failed.max_by_key(|verdict| exit(*verdict)).unwrap_or(Verdict::Done)
    }

    /// Says of a command that stops waiting what it has waited for, and what keeps that.
    pub fn explain(&self, mut failure: Failure, screen: &Screen) -> Failure {
        for (name, track) in self.tracks.iter().filter(|(_, track)| track.verdict == Verdict::Going) {
            failure = failure.why(format!("{name} waits {}", track.reasons(screen)));
            let why = track.latest.as_ref().and_then(|service| service.why.as_ref());
            if let Some(why) = why.filter(|why| why.code != Code::Starting) {
                failure = failure.why(format!("{name}: {}", why.cause)).evidence(&why.evidence);
                failure.fix.extend(why.fix.clone());
            }
        }
        failure.others = self.failures();
        failure
    }

    /// What to say when all of it went well.
    pub fn summary(&self, screen: &Screen) -> Vec<Text> {
        let several = self.tracks.len() > 1;
        let mut lines = Vec::new();
        for (name, track) in &self.tracks {
            let front = if several { format!("{name}: ") } else { String::new() };
            match (&track.verdict, track.receipt()) {
                (Verdict::Done, Some(receipt)) => lines.extend(receipt_lines(name, &front, receipt)),
                (Verdict::Done, None) => {
                    let word = match track.awaited {
                        Awaited::Removed => "Removed",
                        Awaited::Stopped => "Stopped",
                        Awaited::Revision(_) | Awaited::Promoted(_) | Awaited::Settled => "Done",
                    };
                    let spent = moment::took(screen.now.since(self.started));
                    lines.push(
                        Text::plain(front.clone()).and(Ink::Green, word).and(Ink::Plain, format!(" in {spent}.")),
                    );
                }
                (Verdict::Canary, _) => lines.extend(canary_lines(name, &front, track)),
                (Verdict::Going | Verdict::RolledBack | Verdict::Degraded | Verdict::Overtaken, _) => {}
            }
            if track.verdict == Verdict::Done && track.stays_stopped() {
                let text = format!("{front}It is stopped: nothing runs until `orca start {name}`.");
                lines.push(Text::of(Ink::Yellow, text));
            }
        }
        lines
    }

    /// All that failed, if not all went well.
    pub fn failure(&self) -> Option<Failure> {
        Failure::of_all(self.failures())
    }

    pub fn failure_of(&self, name: &ServiceName) -> Option<Failure> {
        self.tracks.get(name)?.failure(name)
    }

    /// Those that others wait for come before these: what is said first is what the rest follows from.
    fn failures(&self) -> Vec<Failure> {
        let mut left: Vec<(&ServiceName, &Track)> =
            self.tracks.iter().filter(|(_, track)| track.verdict.is_failure()).collect();
        let mut failures = Vec::new();
        while !left.is_empty() {
            let waits = |name: &ServiceName| {
                let needs = self.needs.get(name);
                needs.is_some_and(|needs| left.iter().any(|(other, _)| needs.contains(*other)))
            };
            // There is one: files with a circle are refused.
            let at = left.iter().position(|(name, _)| !waits(name)).unwrap_or(0);
            let (name, track) = left.remove(at);
            failures.extend(track.failure(name));
        }
        failures
    }
}

impl Track {
    fn receipt(&self) -> Option<&Receipt> {
        self.latest.as_ref()?.receipt_of(self.awaited.revision()?)
    }

    /// Whether it was changed and runs no more than before.
    fn stays_stopped(&self) -> bool {
        let is_meant = matches!(self.awaited, Awaited::Stopped | Awaited::Removed);
        !is_meant && self.latest.as_ref().is_some_and(|service| service.state == ServiceState::Stopped)
    }

    /// Its failure in one line: what it came to, and why.
    pub fn failure_line(&self, name: &ServiceName) -> Text {
        let cause = self.failure(name).and_then(|failure| failure.why.first().cloned()).unwrap_or_default();
        let word = match self.verdict {
            Verdict::RolledBack => "rolled back",
            Verdict::Overtaken => "overtaken",
            Verdict::Going | Verdict::Done | Verdict::Canary | Verdict::Degraded => "failed",
        };
        Text::of(Ink::Red, word).and(Ink::Plain, format!(": {cause}"))
    }

    fn failure(&self, name: &ServiceName) -> Option<Failure> {
        let exit = exit(self.verdict)?;
        let service = self.latest.as_ref();
        if self.verdict == Verdict::Overtaken {
            let failure = Failure::new(exit, format!("{name}: another change took the place of this one"));
            let why = match service.map(|service| service.state) {
                Some(ServiceState::Removing) | None => "the service was removed".to_owned(),
                Some(_) => format!("{} is wanted now", service.map_or(Revision(0), |s| s.revision)),
            };
            return Some(failure.why(why).more(format!("orca events {name}")));
        }
        let receipt = self.receipt();
        let cause = receipt.and_then(|receipt| receipt.failure.as_ref());
        let asked = cause.is_some_and(|cause| cause.asked);
        // The replicas of what was rolled back are gone, and their logs with them; what they wrote last is kept.
        let more = if exit == Exit::RolledBack { "history" } else { "logs" };
        let mut failure =
            Failure::new(exit, self.failure_message(name, exit, asked)).more(format!("orca {more} {name}"));
        match (cause, service.and_then(|service| service.why.as_ref())) {
            (Some(cause), _) => {
                failure = failure.why(&cause.cause).evidence(&cause.evidence);
                failure.fix.extend(cause.fix.clone());
            }
            (None, Some(why)) => {
                failure = failure.why(&why.cause).evidence(&why.evidence);
                failure.fix.extend(why.fix.clone());
            }
            (None, None) => {}
        }
        Some(failure)
    }

    fn failure_message(&self, name: &ServiceName, exit: Exit, asked: bool) -> String {
        let what = match (self.awaited.revision(), asked) {
            (Some(revision), false) => format!("{name} {revision} did not become ready"),
            (Some(revision), true) => format!("{name} {revision} was called back"),
            (None, _) => format!("{name} did not become ready"),
        };
        let (Some(service), Exit::RolledBack) = (&self.latest, exit) else {
            let first = self.receipt().is_some_and(|receipt| receipt.outcome == Outcome::Failed);
            let end = if first { "there is no earlier version to go back to" } else { "the service is degraded" };
            return format!("{what}; {end}");
        };
        let serves = format!("{} ({})", short_source(&service.source), service.revision);
        let switched = self.receipt().is_none_or(|receipt| receipt.replaced > 0);
        if switched {
            format!("{what} and was rolled back; {serves} serves again")
        } else {
            format!("{what}; nothing was switched, {serves} still serves all traffic")
        }
    }
}

/// What a command ends with, if this is a failure.
fn exit(verdict: Verdict) -> Option<Exit> {
    match verdict {
        Verdict::Going | Verdict::Done | Verdict::Canary => None,
        Verdict::RolledBack => Some(Exit::RolledBack),
        Verdict::Degraded => Some(Exit::Degraded),
        Verdict::Overtaken => Some(Exit::Conflict),
    }
}

fn receipt_lines(name: &ServiceName, front: &str, receipt: &Receipt) -> Vec<Text> {
    let span = moment::took(receipt.ended.since(receipt.started));
    let (during, before) = (&receipt.during, &receipt.before);
    let p99 = match (during.p99_us, before.p99_us) {
        (Some(now), Some(before)) => format!("  p99 {} (before: {}).", latency(now), latency(before)),
        (Some(now), None) => format!("  p99 {}.", latency(now)),
        (None, _) => String::new(),
    };
    let errors = if during.errors > 0 { Ink::Red } else { Ink::Plain };
    let cut = if during.cut > 0 { Ink::Red } else { Ink::Plain };
    let mut last = format!("Receipt: orca history {name}.");
    if receipt.from.is_some() {
        last.push_str(&format!("  Undo: orca rollback {name}"));
    }
    vec![
        Text::plain(front)
            .and(Ink::Green, "Done")
            .and(
                Ink::Plain,
                format!(
                    " in {span}.  Requests during deploy: {}{}.",
                    history::at_least(during),
                    grouped(during.requests)
                ),
            )
            .and(errors, format!("  5xx: {} (before: {}).", grouped(during.errors), grouped(before.errors)))
            .and(Ink::Plain, p99)
            .and(cut, format!("  Cut connections: {}.", grouped(during.cut))),
        Text::of(Ink::Dim, last),
    ]
}

fn canary_lines(name: &ServiceName, front: &str, track: &Track) -> Vec<Text> {
    let revision = track.latest.as_ref().and_then(|service| service.rollout.as_ref()).map(|rollout| rollout.to);
    let revision = revision.map(|revision| format!("{revision} ")).unwrap_or_default();
    vec![
        Text::plain(front)
            .and(Ink::Magenta, "Canary")
            .and(Ink::Plain, format!(" {revision}is ready and gets its share of the requests.")),
        Text::of(
            Ink::Dim,
            format!("Take it: orca promote {name}.  Undo: orca rollback {name}.  Look: orca status {name}"),
        ),
    ]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::super::failed;
    use super::super::super::sample::{self, at, name, screen, show};
    use super::super::Needs;
    use super::super::tests::tracker;
    use super::*;
    use expect_test::expect;
    use orca_cluster::id::Generation;
    use orca_wire::message::client::Progress;

    #[test]
    fn a_failed_deploy_says_that_the_old_version_serves_and_why() {
        let mut tracker = tracker(Awaited::Revision(Revision(5)));
        let mut service = sample::service("shop/api", "myorg/api:1.4.2", 4);
        service.last_receipt = Some(sample::receipt(5, Outcome::RolledBack, Some(sample::loopback())));
        let over = Progress { generation: Generation(4200), at: at(0), services: vec![service], events: Vec::new() };
        tracker.take(&over);
        let failure = tracker.failure().unwrap();
        assert_eq!(failure.exit, Exit::RolledBack);
        expect![[r#"
            error: shop/api v5 did not become ready; nothing was switched, myorg/api:1.4.2 (v4) still serves all traffic
              why   the process listens on 127.0.0.1:8080; the proxy reaches it on the container's address
              seen  GET /healthz -> connection refused, 14 tries in 10.0 s
              logs  listening on http://127.0.0.1:8080
              fix   bind to 0.0.0.0, or the port of all addresses
              more  orca history shop/api     exit code 7
        "#]]
        .assert_eq(&show(&failed(&failure)));
    }

    /// A shop whose database fails, and the services that wait for it.
    fn failed_shop() -> (Tracker, Progress) {
        let [api, db, worker] = ["shop/api", "shop/db", "shop/worker"].map(name);
        let needs =
            Needs::from([(api.clone(), BTreeSet::from([db.clone()])), (worker.clone(), BTreeSet::from([api.clone()]))]);
        let tracker = Tracker::new([api, db, worker].map(|name| (name, Awaited::Revision(Revision(1)))), needs, at(4));
        let failed = |text: &str, cause: &str| {
            let mut service = sample::service(text, "myorg/a:1", 1);
            service.state = ServiceState::Failing;
            let failure =
                orca_cluster::state::Failure { cause: cause.to_owned(), evidence: vec![], fix: None, asked: false };
            service.last_receipt = Some(Receipt { from: None, ..sample::receipt(1, Outcome::Failed, Some(failure)) });
            service
        };
        let services = vec![
            failed("shop/api", "it depends on `db`, which is not ready"),
            failed("shop/db", "no Docker engine answers on its node"),
            failed("shop/worker", "it depends on `api`, which is not ready"),
        ];
        (tracker, Progress { generation: Generation(1), at: at(0), services, events: Vec::new() })
    }

    #[test]
    fn of_several_failures_each_is_told_and_first_the_one_the_others_follow_from() {
        let (mut tracker, over) = failed_shop();
        expect![[r#"
            shop/api: failed: it depends on `db`, which is not ready
            shop/db: failed: no Docker engine answers on its node
            shop/worker: failed: it depends on `api`, which is not ready
        "#]]
        .assert_eq(&show(&tracker.take(&over)));
        assert!(tracker.take(&over).is_empty(), "once");
        expect![[r#"
            error: shop/db v1 did not become ready; there is no earlier version to go back to
              why   no Docker engine answers on its node
              more  orca logs shop/db
            error: shop/api v1 did not become ready; there is no earlier version to go back to
              why   it depends on `db`, which is not ready
              more  orca logs shop/api
            error: shop/worker v1 did not become ready; there is no earlier version to go back to
              why   it depends on `api`, which is not ready
              more  orca logs shop/worker     exit code 8
        "#]]
        .assert_eq(&show(&failed(&tracker.failure().unwrap())));
    }

    #[test]
    fn a_change_of_a_stopped_service_says_that_nothing_runs() {
        let mut tracker = tracker(Awaited::Settled);
        let mut service = sample::service("shop/api", "myorg/api:1.4.2", 4);
        service.state = ServiceState::Stopped;
        tracker.take(&Progress { generation: Generation(1), at: at(0), services: vec![service], events: Vec::new() });
        expect![[r#"
            Done in 4.0s.
            It is stopped: nothing runs until `orca start shop/api`.
        "#]]
        .assert_eq(&show(&tracker.summary(&screen())));
    }
}

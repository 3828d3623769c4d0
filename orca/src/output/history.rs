//! What `history` shows: revisions, and what each rollout cost those who used the service meanwhile.

use orca_cluster::id::ServiceName;
use orca_cluster::state::{Evidence, Failure, Outcome, Receipt, Window};
use orca_wire::message::client::RevisionInfo;

use super::text::{Ink, Side, Text, table};
use super::{Screen, grouped, latency, short_source};
use crate::moment;

pub fn history(screen: &Screen, service: &ServiceName, revisions: &[RevisionInfo], receipts: &[Receipt]) -> Vec<Text> {
    let mut lines = vec![Text::of(Ink::Bold, service.to_string())];
    lines.extend(self::revisions(screen, revisions, receipts));
    lines
}

/// Newest first.
pub fn revisions(screen: &Screen, revisions: &[RevisionInfo], receipts: &[Receipt]) -> Vec<Text> {
    let mut lines = Vec::new();
    let rows = revisions.iter().rev().map(|info| {
        let (ink, mark) = match (info.is_target, info.is_settled) {
            (true, true) => (Ink::Green, "●"),
            (true, false) => (Ink::Cyan, "◐"),
            (false, _) => (Ink::Dim, " "),
        };
        vec![
            Text::of(ink, mark).and(Ink::Plain, format!(" {}", info.revision)),
            Text::of(Ink::Dim, moment::date(info.at, &screen.zone)),
            Text::plain(info.by.clone()),
            Text::plain(info.note.clone()),
            Text::plain(short_source(&info.source)),
            Text::of(Ink::Dim, format!("x{}", info.replicas)),
        ]
    });
    let sides = [Side::Left, Side::Left, Side::Left, Side::Left, Side::Left, Side::Left];
    let shown = table(2, &sides, rows.collect());
    for (line, info) in shown.into_iter().zip(revisions.iter().rev()) {
        lines.push(line);
        for receipt in receipts.iter().filter(|receipt| receipt.revision == info.revision) {
            lines.push(Text::plain("      ").then(receipt_line(screen, receipt)));
            lines.extend(receipt.failure.iter().flat_map(failed));
        }
    }
    lines
}

/// Why a revision was given up, and what its replica wrote last: that is gone from everywhere else.
fn failed(failure: &Failure) -> Vec<Text> {
    let mut lines = vec![Text::of(Ink::Red, "      why  ").and(Ink::Plain, &failure.cause)];
    let evidence = failure.evidence.iter().map(|evidence| match evidence {
        Evidence::Printed(line) => Text::of(Ink::Dim, "      logs ").and(Ink::Plain, line),
        Evidence::Seen(line) => Text::of(Ink::Dim, "      seen ").and(Ink::Plain, line),
    });
    lines.extend(evidence);
    lines
}

/// `rolled back after 12.1s; requests 4,210, 5xx 0 (before 0), p99 41 ms (before 40 ms), cut 0`.
pub fn receipt_line(screen: &Screen, receipt: &Receipt) -> Text {
    let (ink, word) = match receipt.outcome {
        Outcome::Done => (Ink::Green, "done in"),
        Outcome::RolledBack => (Ink::Yellow, "rolled back after"),
        Outcome::Failed => (Ink::Red, "failed after"),
    };
    let span = moment::took(receipt.ended.since(receipt.started));
    let (during, before) = (&receipt.during, &receipt.before);
    let errors = if during.errors > before.errors { Ink::Red } else { Ink::Plain };
    let cut = if during.cut > 0 { Ink::Red } else { Ink::Plain };
    Text::of(ink, format!("{word} {span}"))
        .and(Ink::Plain, format!("; {}{} requests, ", at_least(during), grouped(during.requests)))
        .and(errors, format!("{} 5xx", grouped(during.errors)))
        .and(Ink::Dim, format!(" (before: {})", grouped(before.errors)))
        .and(Ink::Plain, p99(during, before))
        .and(Ink::Plain, ", ")
        .and(cut, format!("{} cut", grouped(during.cut)))
        .and(
            Ink::Yellow,
            if during.at_least {
                " (a proxy was restarted or silent: what it had not reported is missing)"
            } else {
                ""
            },
        )
        .and(Ink::Dim, format!(", {} ago", screen.ago(receipt.ended)))
}

/// Said in front of what was counted, where more may have been.
pub fn at_least(window: &Window) -> &'static str {
    if window.at_least { "at least " } else { "" }
}

fn p99(during: &Window, before: &Window) -> String {
    match (during.p99_us, before.p99_us) {
        (Some(now), Some(before)) => format!(", p99 {} (before: {})", latency(now), latency(before)),
        (Some(now), None) => format!(", p99 {}", latency(now)),
        (None, _) => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::sample::{self, at, name, receipt, screen, show};
    use super::*;
    use expect_test::expect;
    use orca_cluster::id::Revision;

    #[test]
    fn a_receipt_that_may_miss_something_says_so() {
        let mut receipt = receipt(4, Outcome::Done, None);
        receipt.during.at_least = true;
        expect![[r#"
            done in 11.6s; at least 48,211 requests, 0 5xx (before: 0), p99 41 ms (before: 40 ms), 0 cut (a proxy was restarted or silent: what it had not reported is missing), 2h ago
        "#]].assert_eq(&show(&[receipt_line(&screen(), &receipt)]));
    }

    #[test]
    fn revisions_come_newest_first_with_what_they_cost() {
        let info = |revision: u64, source: &str, note: &str, is_target: bool| RevisionInfo {
            revision: Revision(revision),
            at: at(7_200),
            by: "alice".to_owned(),
            note: note.to_owned(),
            source: source.to_owned(),
            digest: None,
            replicas: 3,
            is_target,
            is_settled: is_target,
        };
        let revisions = [info(4, "myorg/api:1.4.2", "deploy", true), info(5, "myorg/api:1.4.3", "deploy", false)];
        let receipts = [receipt(4, Outcome::Done, None), receipt(5, Outcome::RolledBack, Some(sample::loopback()))];
        expect![[r#"
            shop/api
                v5  2026-01-31 12:02:11  alice  deploy  myorg/api:1.4.3  x3
                  rolled back after 11.6s; 48,211 requests, 0 5xx (before: 0), p99 41 ms (before: 40 ms), 0 cut, 2h ago
                  why  the process listens on 127.0.0.1:8080; the proxy reaches it on the container's address
                  seen GET /healthz -> connection refused, 14 tries in 10.0 s
                  logs listening on http://127.0.0.1:8080
              ● v4  2026-01-31 12:02:11  alice  deploy  myorg/api:1.4.2  x3
                  done in 11.6s; 48,211 requests, 0 5xx (before: 0), p99 41 ms (before: 40 ms), 0 cut, 2h ago
        "#]]
        .assert_eq(&show(&history(&screen(), &name("shop/api"), &revisions, &receipts)));
    }
}

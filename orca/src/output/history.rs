//! What `history` shows: revisions, and what each rollout cost those who used the service meanwhile.

use orca_cluster::id::ServiceName;
use orca_cluster::state::{Evidence, Failure, Outcome, Receipt, Window};
use orca_wire::message::client::RevisionInfo;

use super::text::{Ink, Side, Text, table};
use super::{Screen, count, grouped, latency, short_source};
use crate::moment;

/// Below a revision.
const INDENT: usize = 6;
const NOT_COUNTED: &str = "not counted";
/// Why there may have been more than was counted.
const MISSING: &str = "a proxy was restarted or silent, and what it had not reported is missing";

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
        for (at, receipt) in receipts.iter().enumerate().filter(|(_, receipt)| receipt.revision == info.revision) {
            lines.push(Text::plain(" ".repeat(INDENT)).then(ending(screen, receipt)));
            lines.extend(windows(receipt, at + 1 == receipts.len()));
            lines.extend(receipt.failure.iter().flat_map(failed));
        }
    }
    lines
}

/// `done in 11.6s, 3 replicas replaced, 2h ago`.
fn ending(screen: &Screen, receipt: &Receipt) -> Text {
    outcome(receipt)
        .and(Ink::Plain, format!(", {} replaced", count(receipt.replaced, "replica")))
        .and(Ink::Dim, format!(", {} ago", screen.ago(receipt.ended)))
}

fn outcome(receipt: &Receipt) -> Text {
    let (ink, word) = match receipt.outcome {
        Outcome::Done => (Ink::Green, "done in"),
        Outcome::RolledBack => (Ink::Yellow, "rolled back after"),
        Outcome::Failed => (Ink::Red, "failed after"),
    };
    Text::of(ink, format!("{word} {}", moment::took(receipt.ended.since(receipt.started))))
}

/// What was counted before, during and after, one below the other.
fn windows(receipt: &Receipt, is_newest: bool) -> Vec<Text> {
    let Receipt { before, during, after, .. } = receipt;
    // Only of the newest is there still something to come.
    let absent = if is_newest { "not counted yet" } else { NOT_COUNTED };
    let mut rows = vec![row("before", before, before), row("during", during, before)];
    rows.push(match after {
        Some(after) => row("after", after, before),
        None => vec![Text::of(Ink::Dim, "after"), Text::new(), Text::of(Ink::Dim, absent)],
    });
    let all = || [Some(before), Some(during), after.as_ref()].into_iter().flatten();
    if all().any(has_counted) {
        rows.insert(0, ["", "", "requests", "5xx", "cut", "p99"].map(|head| Text::of(Ink::Dim, head)).to_vec());
    }
    let sides = [Side::Left, Side::Left, Side::Right, Side::Right, Side::Right, Side::Right, Side::Left];
    let mut lines = table(INDENT + 2, &sides, rows);
    if all().any(|window| window.at_least) {
        lines.push(Text::plain(" ".repeat(INDENT + 2)).and(Ink::Yellow, format!("at least: {MISSING}")));
    }
    lines
}

fn row(label: &str, window: &Window, before: &Window) -> Vec<Text> {
    let mut row = vec![Text::of(Ink::Dim, label)];
    if window.to == window.from {
        row.extend([Text::new(), Text::of(Ink::Dim, NOT_COUNTED)]);
        return row;
    }
    row.push(Text::of(Ink::Dim, moment::took(window.to.since(window.from))));
    if has_counted(window) {
        let red_if = |bad: bool| if bad { Ink::Red } else { Ink::Plain };
        row.push(Text::plain(grouped(window.requests)));
        row.push(Text::of(red_if(window.errors > before.errors), grouped(window.errors)));
        row.push(Text::of(red_if(window.cut > before.cut), grouped(window.cut)));
        row.push(Text::plain(window.p99_us.map_or_else(|| "-".to_owned(), latency)));
    } else {
        row.extend([Text::of(Ink::Dim, "no requests"), Text::new(), Text::new(), Text::new()]);
    }
    if window.at_least {
        row.push(Text::of(Ink::Yellow, "at least"));
    }
    row
}

fn has_counted(window: &Window) -> bool {
    window.requests > 0 || window.errors > 0 || window.cut > 0
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

/// A receipt in one line, where there is room for no more: what was counted meanwhile, and beside it what was before.
pub fn receipt_line(screen: &Screen, receipt: &Receipt) -> Text {
    let (during, before) = (&receipt.during, &receipt.before);
    let errors = if during.errors > before.errors { Ink::Red } else { Ink::Plain };
    let cut = if during.cut > 0 { Ink::Red } else { Ink::Plain };
    let missing = if during.at_least { format!(" ({MISSING})") } else { String::new() };
    outcome(receipt)
        .and(Ink::Plain, format!("; {}{} requests, ", at_least(during), grouped(during.requests)))
        .and(errors, format!("{} 5xx", grouped(during.errors)))
        .and(Ink::Dim, format!(" (before: {})", grouped(before.errors)))
        .and(Ink::Plain, p99(during, before))
        .and(Ink::Plain, ", ")
        .and(cut, format!("{} cut", grouped(during.cut)))
        .and(Ink::Yellow, missing)
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
            done in 11.6s; at least 48,211 requests, 0 5xx (before: 0), p99 41 ms (before: 40 ms), 0 cut (a proxy was restarted or silent, and what it had not reported is missing), 2h ago
        "#]].assert_eq(&show(&[receipt_line(&screen(), &receipt)]));
    }

    fn info(revision: u64, source: &str, is_target: bool) -> RevisionInfo {
        RevisionInfo {
            revision: Revision(revision),
            at: at(7_200),
            by: "alice".to_owned(),
            note: "deploy".to_owned(),
            source: source.to_owned(),
            digest: None,
            replicas: 3,
            is_target,
            is_settled: is_target,
        }
    }

    #[test]
    fn revisions_come_newest_first_with_what_they_cost() {
        let revisions = [info(4, "myorg/api:1.4.2", true), info(5, "myorg/api:1.4.3", false)];
        let mut done = receipt(4, Outcome::Done, None);
        done.after = Some(Window { from: at(7_200), to: at(7_190), cut: 2, ..sample::window(84, 1, 39_000) });
        let receipts = [done, receipt(5, Outcome::RolledBack, Some(sample::loopback()))];
        expect![[r#"
            shop/api
                v5  2026-01-31 12:02:11  alice  deploy  myorg/api:1.4.3  x3
                  rolled back after 11.6s, 0 replicas replaced, 2h ago
                                       requests  5xx  cut    p99
                    before  1m              700    0    0  40 ms
                    during  1m           48,211    0    0  41 ms
                    after       not counted yet
                  why  the process listens on 127.0.0.1:8080; the proxy reaches it on the container's address
                  seen GET /healthz -> connection refused, 14 tries in 10.0 s
                  logs listening on http://127.0.0.1:8080
              ● v4  2026-01-31 12:02:11  alice  deploy  myorg/api:1.4.2  x3
                  done in 11.6s, 3 replicas replaced, 2h ago
                                   requests  5xx  cut    p99
                    before  1m          700    0    0  40 ms
                    during  1m       48,211    0    0  41 ms
                    after   10.0s        84    1    2  39 ms
        "#]]
        .assert_eq(&show(&history(&screen(), &name("shop/api"), &revisions, &receipts)));
    }

    #[test]
    fn what_was_not_counted_is_no_zero() {
        let quiet = |from: u64, to: u64| Window { from: at(from), to: at(to), ..Window::default() };
        let mut first = receipt(3, Outcome::Done, None);
        (first.replaced, first.before, first.during) = (0, Window::default(), quiet(7_211, 7_200));
        let mut missing = receipt(4, Outcome::Done, None);
        (missing.replaced, missing.before, missing.after) = (1, quiet(60, 0), Some(quiet(10, 0)));
        missing.during.at_least = true;
        let revisions = [info(3, "myorg/api:1.4.1", false), info(4, "myorg/api:1.4.2", true)];
        expect![[r#"
            shop/api
              ● v4  2026-01-31 12:02:11  alice  deploy  myorg/api:1.4.2  x3
                  done in 11.6s, 1 replica replaced, 2h ago
                                      requests  5xx  cut    p99
                    before  1m     no requests
                    during  1m          48,211    0    0  41 ms  at least
                    after   10.0s  no requests
                    at least: a proxy was restarted or silent, and what it had not reported is missing
                v3  2026-01-31 12:02:11  alice  deploy  myorg/api:1.4.1  x3
                  done in 11.6s, 0 replicas replaced, 2h ago
                    before         not counted
                    during  11.0s  no requests
                    after          not counted
        "#]]
        .assert_eq(&show(&history(&screen(), &name("shop/api"), &revisions, &[first, missing])));
    }
}

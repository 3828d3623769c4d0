//! A rollout as it is watched: what is new in it, and what to draw while it goes on. Made from what the cluster reports
//! and from nothing else, so killing the command line changes nothing.

mod ending;

use std::collections::{BTreeMap, BTreeSet};

use orca_cluster::id::{ReplicaId, ServiceName};
use orca_cluster::replica::{Cause, Phase};
use orca_cluster::status::verdict::{Awaited, Verdict, verdicts};
use orca_cluster::status::{ReplicaStatus, ServiceStatus};
use orca_cluster::time::Timestamp;
use orca_cluster::why::phase_word;
use orca_wire::message::client::Progress;

use super::text::{Ink, Side, Text, table};
use super::{Screen, count, megabytes, status};
use crate::moment;

/// Which services start only when which others are ready.
pub type Needs = BTreeMap<ServiceName, BTreeSet<ServiceName>>;

/// One service's rollout, as far as it was seen.
#[derive(Debug)]
struct Track {
    awaited: Awaited,
    /// The replicas there were before.
    old: BTreeSet<ReplicaId>,
    seen: BTreeMap<ReplicaId, Seen>,
    latest: Option<ServiceStatus>,
    verdict: Verdict,
    /// Its failure was told, as it happened.
    told: bool,
}

#[derive(Debug)]
struct Seen {
    first: Timestamp,
    status: ReplicaStatus,
    /// Connections it had when it began to leave.
    moved: Option<u64>,
    gone: Option<Timestamp>,
}

/// All that one command waits for.
#[derive(Debug)]
pub struct Tracker {
    started: Timestamp,
    tracks: BTreeMap<ServiceName, Track>,
    needs: Needs,
}

impl Tracker {
    pub fn new(awaited: impl IntoIterator<Item = (ServiceName, Awaited)>, needs: Needs, started: Timestamp) -> Tracker {
        let track = |awaited| Track {
            awaited,
            old: BTreeSet::new(),
            seen: BTreeMap::new(),
            latest: None,
            verdict: Verdict::Going,
            told: false,
        };
        let tracks = awaited.into_iter().map(|(name, awaited)| (name, track(awaited))).collect();
        Tracker { started, tracks, needs }
    }

    /// Takes in what the cluster says, and tells what is new in it, one line each.
    pub fn take(&mut self, progress: &Progress) -> Vec<Text> {
        let mut news = Vec::new();
        let verdicts = verdicts(self.tracks.iter().map(|(name, track)| (name, track.awaited)), &progress.services);
        for (name, track) in &mut self.tracks {
            let service = progress.services.iter().find(|service| service.name == *name);
            news.extend(track.take(name, service, progress.at));
            track.verdict = verdicts[name];
        }
        // One alone is told in full at once.
        if self.tracks.len() > 1 {
            for (name, track) in &mut self.tracks {
                let fails = track.verdict.is_failure();
                if fails && !track.told {
                    let text = Text::of(Ink::Bold, name.to_string()).and(Ink::Plain, ": ");
                    news.push(text.then(track.failure_line(name)));
                }
                track.told = fails;
            }
        }
        news
    }

    pub fn is_over(&self) -> bool {
        self.tracks.values().all(|track| track.verdict != Verdict::Going)
    }

    /// The block that is redrawn while it goes on.
    pub fn draw(&self, screen: &Screen) -> Vec<Text> {
        let several = self.tracks.len() > 1;
        self.tracks.iter().flat_map(|(name, track)| track.draw(screen, name, several)).collect()
    }

    /// What is waited for, for those who see no redrawn block.
    pub fn heartbeat(&self, screen: &Screen) -> Vec<Text> {
        let spent = moment::age(screen.now.since(self.started));
        let going = self.tracks.iter().filter(|(_, track)| track.verdict == Verdict::Going);
        let line = |(name, track): (&ServiceName, &Track)| {
            Text::plain(format!("{name}: still waiting after {spent}: {}", track.reasons(screen)))
        };
        going.map(line).collect()
    }
}

impl Track {
    /// Why it is not done yet.
    fn reasons(&self, screen: &Screen) -> String {
        let Some(service) = &self.latest else { return "for the first report".to_owned() };
        let reasons = status::waits(screen, &[], service);
        if reasons.is_empty() { "for the next report".to_owned() } else { reasons.join("; ") }
    }

    fn take(&mut self, name: &ServiceName, service: Option<&ServiceStatus>, at: Timestamp) -> Vec<Text> {
        let mut news = Vec::new();
        let mut say = |replica: Option<&ReplicaStatus>, ink: Ink, text: String| {
            let mut line = Text::of(Ink::Bold, name.to_string());
            if let Some(replica) = replica {
                line = line.and(Ink::Plain, format!(" {} on {}", replica.id, replica.node_name));
            }
            news.push(line.and(Ink::Plain, ": ").and(ink, text));
        };
        let first = self.latest.is_none();
        let replicas = service.map_or(&[][..], |service| &service.replicas);
        for replica in replicas {
            let is_new = self.awaited.revision() == Some(replica.revision);
            if first && !is_new {
                self.old.insert(replica.id);
            }
            let before = self.seen.get(&replica.id).map(|seen| &seen.status);
            if !self.old.contains(&replica.id) {
                new_replica_news(before, replica, |ink, text| say(Some(replica), ink, text));
            }
            if replica.last_exit != before.and_then(|before| before.last_exit.clone())
                && !replica.leaving
                && (before.is_some() || !self.old.contains(&replica.id))
                && let Some(exit) = &replica.last_exit
            {
                let how = if exit.out_of_memory {
                    "was killed for its memory".to_owned()
                } else {
                    format!("exited with code {}", exit.code)
                };
                let span = moment::took(std::time::Duration::from_millis(exit.after_ms));
                let last = exit.last_lines.last().map(|line| format!("; its last line: {line}")).unwrap_or_default();
                say(Some(replica), Ink::Red, format!("{how} after {span}{last}"));
            }
            if let (Some(service), Some(trouble)) = (service, &replica.trouble)
                && before.is_none_or(|before| !same_trouble(before, replica))
                && !replica.leaving
            {
                match trouble.cause {
                    // Said with its exit; and every start begins with a probe that is too early.
                    Cause::Exited | Cause::ProbeFailing { .. } => {}
                    _ => say(Some(replica), Ink::Red, trouble_words(service, replica, &trouble.cause)),
                }
            }
            let leaves = replica.leaving && before.is_none_or(|before| !before.leaving);
            let busy = u64::from(replica.in_flight.requests) + u64::from(replica.in_flight.upgraded);
            if leaves && !(first && before.is_none()) {
                say(Some(replica), Ink::Plain, draining(busy));
            }
            let seen = self.seen.entry(replica.id).or_insert_with(|| Seen {
                first: at,
                status: replica.clone(),
                moved: None,
                gone: None,
            });
            if leaves {
                seen.moved = Some(busy);
            }
            seen.status = replica.clone();
        }
        for seen in self.seen.values_mut() {
            let there = replicas.iter().any(|replica| replica.id == seen.status.id && replica.phase != Phase::Gone);
            if !there && seen.gone.is_none() {
                seen.gone = Some(at);
                say(Some(&seen.status), Ink::Dim, "stopped".to_owned());
            }
        }
        let back = |service: &ServiceStatus| service.rollout.as_ref().is_some_and(|rollout| rollout.back);
        if let Some(service) = service
            && back(service)
            && !self.latest.as_ref().is_some_and(back)
        {
            let because = service.rollout.as_ref().and_then(|rollout| rollout.because.clone()).unwrap_or_default();
            say(None, Ink::Red, format!("going back to {}: {because}", service.revision));
        }
        // Of one that is removed, the last that was seen stays.
        if let Some(service) = service {
            self.latest = Some(service.clone());
        }
        news
    }

    fn draw(&self, screen: &Screen, name: &ServiceName, several: bool) -> Vec<Text> {
        let mut lines = Vec::new();
        let Some(service) = &self.latest else {
            return vec![Text::of(Ink::Dim, format!("  {name}: waiting for the first report"))];
        };
        let indent = if several { 4 } else { 2 };
        if several {
            let (ink, symbol, word) = status::state(service.state);
            lines.push(
                Text::of(ink, format!("  {symbol} ")).and(Ink::Bold, name.to_string()).and(ink, format!("  {word}")),
            );
        }
        let mut new: Vec<&Seen> = self.seen.values().filter(|seen| !self.old.contains(&seen.status.id)).collect();
        let mut old: Vec<&Seen> = self
            .seen
            .values()
            .filter(|seen| self.old.contains(&seen.status.id) && (seen.status.leaving || seen.gone.is_some()))
            .collect();
        new.sort_by_key(|seen| (seen.first, seen.status.id));
        old.sort_by_key(|seen| (seen.gone.is_none(), seen.status.id));
        let rows =
            (0..new.len().max(old.len())).map(|at| row(screen, service, new.get(at).copied(), old.get(at).copied()));
        let sides = [Side::Left, Side::Left, Side::Right];
        lines.extend(table(indent, &sides, rows.collect()));
        if let Some(rollout) = service.rollout.as_ref().filter(|rollout| rollout.back) {
            let because = rollout.because.clone().unwrap_or_default();
            lines.push(
                Text::of(Ink::Yellow, format!("{}going back to {}: ", " ".repeat(indent), service.revision))
                    .and(Ink::Plain, because),
            );
        }
        let front = " ".repeat(indent);
        if self.verdict == Verdict::Going {
            let waiting = status::waits(screen, &[], service).into_iter();
            lines.extend(waiting.map(|text| Text::of(Ink::Dim, format!("{front}waiting {text}"))));
        }
        if several && self.verdict.is_failure() {
            lines.push(Text::plain(front).then(self.failure_line(name)));
        }
        lines.into_iter().map(|line| line.fit(screen.width)).collect()
    }
}

fn new_replica_news(before: Option<&ReplicaStatus>, now: &ReplicaStatus, mut say: impl FnMut(Ink, String)) {
    if let Some(pulled) = now.pulled
        && before.is_none_or(|before| before.pulled.is_none())
    {
        say(Ink::Plain, pulled_words(pulled));
    }
    let phase = before.map(|before| before.phase);
    if phase == Some(now.phase) {
        return;
    }
    match now.phase {
        Phase::Ready => say(Ink::Green, ready_words(now)),
        Phase::Unknown => say(Ink::Yellow, "its node is not heard".to_owned()),
        Phase::Unready => say(Ink::Red, "not ready any more".to_owned()),
        Phase::Pulling | Phase::Starting => {
            let word = phase_word(now.phase);
            let failed = before.filter(|before| before.phase == Phase::BackOff);
            match failed.and_then(|before| before.trouble.as_ref()) {
                Some(trouble) => say(Ink::Plain, format!("{word} once more: {}", status::cause(&trouble.cause))),
                None => say(Ink::Plain, word.to_owned()),
            }
        }
        Phase::Pending | Phase::Creating | Phase::BackOff | Phase::Stopping | Phase::Gone => {}
    }
}

fn same_trouble(before: &ReplicaStatus, now: &ReplicaStatus) -> bool {
    let kind = |replica: &ReplicaStatus| replica.trouble.as_ref().map(|trouble| std::mem::discriminant(&trouble.cause));
    kind(before) == kind(now)
}

fn pulled_words(pulled: orca_cluster::replica::Pulled) -> String {
    format!("pulled {} in {}", megabytes(pulled.bytes), moment::took(std::time::Duration::from_millis(pulled.millis)))
}

fn draining(busy: u64) -> String {
    if busy == 0 { "draining".to_owned() } else { format!("draining, {} left", count(busy, "connection")) }
}

fn ready_words(replica: &ReplicaStatus) -> String {
    match replica.ready_after_ms {
        Some(millis) => format!("ready after {}", moment::took(std::time::Duration::from_millis(millis))),
        None => "ready".to_owned(),
    }
}

/// One replica that comes, and the one it takes the place of.
fn row(screen: &Screen, service: &ServiceStatus, new: Option<&Seen>, old: Option<&Seen>) -> Vec<Text> {
    let node = new.or(old).map(|seen| seen.status.node_name.clone()).unwrap_or_default();
    let mut parts: Vec<(Ink, String)> = Vec::new();
    if let Some(seen) = new {
        let replica = &seen.status;
        parts.extend(replica.pulled.map(|pulled| (Ink::Plain, pulled_words(pulled))));
        let trouble = replica.trouble.as_ref().map(|trouble| trouble_words(service, replica, &trouble.cause));
        parts.push(match (replica.phase, seen.gone, trouble) {
            (_, Some(_), _) => (Ink::Dim, "stopped".to_owned()),
            (Phase::Ready, None, _) => (Ink::Green, ready_words(replica)),
            (phase, None, Some(trouble)) => (Ink::Red, format!("{}: {trouble}", phase_word(phase))),
            (Phase::Pulling, None, None) => (Ink::Cyan, status::pulling(screen, replica)),
            (phase, None, None) => {
                (Ink::Cyan, format!("{} {}", phase_word(phase), moment::took(screen.now.since(replica.since))))
            }
        });
    }
    if let Some(seen) = old {
        let moved = seen.moved.unwrap_or(0);
        let busy = u64::from(seen.status.in_flight.requests) + u64::from(seen.status.in_flight.upgraded);
        match seen.gone {
            Some(_) if moved > 0 => parts.push((Ink::Plain, format!("{} drained", count(moved, "connection")))),
            Some(_) => {}
            None => parts.push((Ink::Plain, draining(busy) + " ...")),
        }
        if seen.gone.is_some() {
            parts.push((Ink::Dim, if new.is_some() { "old stopped" } else { "stopped" }.to_owned()));
        }
    }
    let mut text = Text::new();
    for (at, (ink, part)) in parts.into_iter().enumerate() {
        if at > 0 {
            text = text.and(Ink::Dim, " | ");
        }
        text = text.and(ink, part);
    }
    let first = new.or(old).map(|seen| seen.first);
    let ended = old.and_then(|seen| seen.gone);
    let spent = match (first, ended) {
        (Some(first), Some(ended)) => moment::took(ended.since(first)),
        _ => String::new(),
    };
    vec![Text::plain(node), text, Text::of(Ink::Dim, spent)]
}

/// The service's diagnosis where it is about this replica, else the bare cause.
fn trouble_words(service: &ServiceStatus, replica: &ReplicaStatus, cause: &Cause) -> String {
    if let Some(why) = service.why.as_ref().filter(|why| why.replica == Some(replica.id)) {
        return why.cause.clone();
    }
    match (cause, &replica.last_exit) {
        (Cause::Exited, Some(exit)) => format!("it exited with code {}", exit.code),
        (cause, _) => status::cause(cause),
    }
}

#[cfg(test)]
mod tests {
    use super::super::failed;
    use super::super::sample::{self, at, name, rollout, screen, show};
    use super::*;
    use crate::exit::{Exit, Failure};
    use expect_test::expect;
    use orca_cluster::id::{Generation, Revision};
    use orca_cluster::replica::{Pulled, Pulling};
    use orca_cluster::status::RolloutStatus;
    use orca_cluster::waiting::Waiting;

    pub fn tracker(awaited: Awaited) -> Tracker {
        Tracker::new([(name("shop/api"), awaited)], Needs::new(), at(4))
    }

    #[test]
    fn an_update_is_told_line_by_line_and_drawn_as_a_block() {
        let mut tracker = tracker(Awaited::Revision(Revision(5)));
        let mut story = String::new();
        for progress in sample::update() {
            story.push_str(&show(&tracker.take(&progress)));
            story.push_str("----\n");
            story.push_str(&show(&tracker.draw(&Screen { now: progress.at, ..screen() })));
            story.push_str("====\n");
        }
        story.push_str(&show(&tracker.summary(&screen())));
        expect![[r#"
            ----
            ====
            shop/api r1 on n1: draining, 214 connections left
            shop/api r3 on n1: pulled 12.4 MB in 1.1s
            shop/api r3 on n1: ready after 0.8s
            ----
              n1  pulled 12.4 MB in 1.1s | ready after 0.8s | draining, 214 connections left ...
            ====
            shop/api r2 on n1: draining, 31 connections left
            shop/api r4 on n1: ready after 0.7s
            shop/api r1 on n1: stopped
            ----
              n1  pulled 12.4 MB in 1.1s | ready after 0.8s | 214 connections drained | old stopped  2.0s
              n1  ready after 0.7s | draining, 31 connections left ...
            ====
            shop/api r2 on n1: stopped
            ----
              n1  pulled 12.4 MB in 1.1s | ready after 0.8s | 214 connections drained | old stopped  2.0s
              n1  ready after 0.7s | 31 connections drained | old stopped                            1.0s
            ====
            Done in 11.6s.  Requests during deploy: 48,211.  5xx: 0 (before: 0).  p99 41 ms (before: 40 ms).  Cut connections: 0.
            Receipt: orca history shop/api.  Undo: orca rollback shop/api
        "#]].assert_eq(&story);
        assert!(tracker.is_over() && tracker.failure().is_none());
    }

    #[test]
    fn a_pull_shows_how_far_it_is_and_takes_no_time_from_the_start() {
        let mut tracker = Tracker::new([(name("shop/worker"), Awaited::Revision(Revision(2)))], Needs::new(), at(200));
        let mut service = sample::worker();
        service.why = None;
        service.rollout = Some(RolloutStatus { started: at(200), ..rollout(2, 1) });
        service.waiting = vec![Waiting::ForReady { replica: ReplicaId(9), since: at(190), trouble: None }];
        let mut story = String::new();
        let pulling = Pulling { bytes: 12_400_000, total: Some(80_100_000) };
        let pulled = Pulled { bytes: 80_100_000, millis: 180_000 };
        for (phase, pulling, pulled) in [
            (Phase::Pulling, None, None),
            (Phase::Pulling, Some(pulling), None),
            (Phase::Pulling, Some(Pulling { total: None, ..pulling }), None),
            (Phase::Starting, None, Some(pulled)),
        ] {
            let replica = sample::replica(9, 2, phase);
            service.replicas = vec![ReplicaStatus { since: at(9), placed: at(190), pulling, pulled, ..replica }];
            let services = vec![service.clone()];
            let news = tracker.take(&Progress { generation: Generation(1), at: at(0), services, events: Vec::new() });
            story.push_str(&show(&news));
            story.push_str(&show(&tracker.draw(&screen())));
            story.push_str(&show(&tracker.heartbeat(&screen())));
        }
        expect![[r#"
            shop/worker r9 on n1: pulling
              n1  pulling, 9s
              waiting for the image of r9: pulling, 9s
            shop/worker: still waiting after 3m 20s: for the image of r9: pulling, 9s
              n1  pulling 12.4 of 80.1 MB, 9s
              waiting for the image of r9: pulling 12.4 of 80.1 MB, 9s
            shop/worker: still waiting after 3m 20s: for the image of r9: pulling 12.4 of 80.1 MB, 9s
              n1  pulling, 12.4 MB so far, 9s
              waiting for the image of r9: pulling, 12.4 MB so far, 9s
            shop/worker: still waiting after 3m 20s: for the image of r9: pulling, 12.4 MB so far, 9s
            shop/worker r9 on n1: pulled 80.1 MB in 3m
            shop/worker r9 on n1: starting
              n1  pulled 80.1 MB in 3m | starting 9.0s
              waiting for r9 to get ready, 10s so far; given up after 2m
            shop/worker: still waiting after 3m 20s: for r9 to get ready, 10s so far; given up after 2m
        "#]]
        .assert_eq(&story);
    }

    #[test]
    fn a_crash_is_reported_the_moment_it_happens() {
        let mut tracker = Tracker::new([(name("shop/worker"), Awaited::Revision(Revision(2)))], Needs::new(), at(41));
        let mut service = sample::worker();
        service.rollout = Some(RolloutStatus { started: at(41), ..rollout(2, 1) });
        service.waiting = vec![Waiting::ForReady { replica: ReplicaId(9), since: at(12), trouble: None }];
        let crash = Progress { generation: Generation(1), at: at(0), services: vec![service], events: Vec::new() };
        let mut story = show(&tracker.take(&crash));
        story.push_str(&show(&tracker.draw(&screen())));
        story.push_str(&show(&tracker.heartbeat(&screen())));
        expect![[r#"
            shop/worker r9 on n1: exited with code 1 after 0.3s; its last line: no DATABASE_URL
              n1  backing off: it exits with code 1 after 0.3 s, 4 times in a row (crash-looping)
              waiting for r9 to get ready, 41s so far; given up after 2m
            shop/worker: still waiting after 41s: for r9 to get ready, 41s so far; given up after 2m
        "#]]
        .assert_eq(&story);
        assert!(!tracker.is_over());

        let stopped = tracker.explain(Failure::new(Exit::TimedOut, "not settled after 41s"), &screen());
        expect![[r#"
            error: not settled after 41s
              why   shop/worker waits for r9 to get ready, 41s so far; given up after 2m
                    shop/worker: it exits with code 1 after 0.3 s, 4 times in a row (crash-looping)
              logs  no DATABASE_URL
              fix   the reason is in its last lines; more with `orca logs shop/worker`
        "#]]
        .assert_eq(&show(&failed(&stopped)));
    }
}

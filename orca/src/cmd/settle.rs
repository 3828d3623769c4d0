//! Waiting for the cluster to have done what was asked. The cluster owns the rollout: this only watches, survives lost
//! connections, and can be left at any time.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Duration;

use orca_cluster::id::{Generation, ServiceName};
use orca_cluster::status::verdict::{Awaited, Verdict};
use orca_wire::message::client::{Progress, Request};
use serde::Serialize;
use tokio::sync::mpsc;
use tokio::time::{Instant, interval_at, sleep, sleep_until};

use crate::exit::{Exit, Failure};
use crate::moment;
use crate::output::Output;
use crate::output::board::{Board, Place};
use crate::output::progress::{Needs, Tracker};
use crate::output::text::{Ink, Text};
use crate::session::{Broken, Following, Session};

/// Where services are to be found.
pub type Urls = BTreeMap<ServiceName, Vec<String>>;

/// Unless `--timeout` says otherwise. Rollouts end by themselves, with their own time-outs; this is for what waits
/// for a person, such as a dependency that never gets ready.
const PATIENCE: Duration = Duration::from_secs(10 * 60);
/// So that whoever reads a log knows that it goes on.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// Of a drawn block: the seconds in it move.
const FRAME: Duration = Duration::from_millis(200);
/// Between attempts to get back a connection that was lost.
const PAUSE: Duration = Duration::from_millis(500);
/// Reports that wait to be drawn; the next one says all that the one before did.
const WAITING_MAX: usize = 16;

/// How long somebody waits.
#[derive(Debug, Clone, Copy, Default)]
pub struct Patience {
    max: Option<Duration>,
    /// Ctrl-C ends more than the waiting, and somebody else sees to it.
    uninterrupted: bool,
}

impl Patience {
    pub fn at_most(max: Option<Duration>) -> Patience {
        Patience { max, uninterrupted: false }
    }

    #[must_use]
    pub fn uninterrupted(self) -> Patience {
        Patience { uninterrupted: true, ..self }
    }
}

/// How a long command ended.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// There was nothing to wait for.
    Unchanged,
    /// Nobody waits.
    Started,
    /// Nobody can be asked any more.
    Failed,
    #[serde(untagged)]
    Settled(Verdict),
}

/// The `result` that every long command ends with.
#[derive(Debug, Serialize)]
pub struct Ended {
    outcome: Outcome,
    exit_code: u8,
    services: Vec<EndedService>,
    #[serde(skip_serializing_if = "Option::is_none")]
    urls: Option<Urls>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<Failure>,
    /// The same for people.
    #[serde(skip)]
    summary: Vec<Text>,
}

#[derive(Debug, Serialize)]
struct EndedService {
    service: ServiceName,
    outcome: Verdict,
    #[serde(skip_serializing_if = "Option::is_none")]
    receipt: Option<orca_cluster::state::Receipt>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<Failure>,
}

impl Ended {
    pub fn unchanged(index: Generation) -> Ended {
        Ended::at_once(Outcome::Unchanged, Text::plain(format!("Nothing to change (index {index})")))
    }

    pub fn settings(index: Generation) -> Ended {
        let line = Text::plain(format!("Settings of the cluster changed (index {index})"));
        Ended::at_once(Outcome::Settled(Verdict::Done), line)
    }

    pub fn detached() -> Ended {
        Ended::at_once(Outcome::Started, Text::plain("Started. ").and(Ink::Dim, "Follow it: orca status -f"))
    }

    /// There was nothing to wait for.
    fn at_once(outcome: Outcome, line: Text) -> Ended {
        let exit_code = Exit::Done.code();
        Ended { outcome, exit_code, services: Vec::new(), urls: None, error: None, summary: vec![line] }
    }

    pub fn has_failed(&self) -> bool {
        self.error.is_some()
    }

    #[must_use]
    pub fn with_urls(self, urls: Urls) -> Ended {
        Ended { urls: Some(urls), ..self }
    }

    pub fn tell(self, output: &Output) -> Result<ExitCode, Failure> {
        if output.json {
            output.object("result", &self);
        } else if let Outcome::Started = self.outcome {
            self.summary.iter().for_each(|line| output.notice(line));
        } else {
            output.lines(&self.summary);
        }
        if !output.json {
            let all = self.urls.iter().flatten();
            let lines = all.flat_map(|(name, urls)| urls.iter().map(move |url| (name.service.as_str(), url)));
            output.lines(&lines.map(|(name, url)| Text::plain(format!("  {name:<20} {url}"))).collect::<Vec<_>>());
        }
        self.error.map_or(Ok(Exit::Done.into()), Err)
    }
}

/// Watches until all that is awaited has come about or has failed. Reports older than `since` are from before it was
/// asked.
pub async fn settle(
    session: &Session,
    output: &Output,
    awaited: Vec<(ServiceName, Awaited)>,
    needs: Needs,
    since: Generation,
    patience: Patience,
) -> Ended {
    let services: Vec<ServiceName> = awaited.iter().map(|(name, _)| name.clone()).collect();
    let mut tracker = Tracker::new(awaited, needs, moment::now());
    let mut watch = Watching { output, board: Board::new(Place::Err), since };
    let (outcome, error) = match watch.run(session, &services, &mut tracker, patience).await {
        Ok(()) => (Outcome::Settled(tracker.verdict()), tracker.failure()),
        Err(failure) if failure.exit == Exit::TimedOut => {
            let failure = tracker.explain(failure, &output.side_screen(moment::now()));
            (Outcome::Settled(Verdict::Going), Some(failure))
        }
        Err(failure) => (Outcome::Failed, Some(failure)),
    };
    let services = tracker.verdicts().map(|(service, verdict, receipt)| EndedService {
        service: service.clone(),
        outcome: verdict,
        receipt: receipt.cloned(),
        error: tracker.failure_of(service),
    });
    Ended {
        outcome,
        exit_code: error.as_ref().map_or(Exit::Done, |failure| failure.exit).code(),
        services: services.collect(),
        urls: None,
        error,
        summary: tracker.summary(&output.screen(moment::now())),
    }
}

struct Watching<'a> {
    output: &'a Output,
    board: Board,
    since: Generation,
}

impl Watching<'_> {
    async fn run(
        &mut self,
        session: &Session,
        services: &[ServiceName],
        tracker: &mut Tracker,
        patience: Patience,
    ) -> Result<(), Failure> {
        let Patience { max, uninterrupted } = patience;
        let max = max.unwrap_or(PATIENCE);
        let (reports, mut coming) = mpsc::channel(WAITING_MAX);
        let feeding = feed(session, services, reports);
        tokio::pin!(feeding);
        let now = Instant::now();
        let mut heartbeat = interval_at(now + HEARTBEAT, HEARTBEAT);
        let mut frame = interval_at(now + FRAME, FRAME);
        let interrupted = tokio::signal::ctrl_c();
        tokio::pin!(interrupted);
        let ended = loop {
            tokio::select! {
                Some(progress) = coming.recv() => {
                    if self.take(&progress, tracker) {
                        heartbeat.reset();
                    }
                    if tracker.is_over() {
                        break Ok(());
                    }
                }
                failure = &mut feeding => break Err(failure),
                _ = heartbeat.tick() => self.beat(tracker),
                _ = frame.tick(), if self.output.live => self.draw(tracker),
                _ = &mut interrupted, if !uninterrupted => break Err(left(services)),
                () = sleep_until(now + max) => break Err(out_of_patience(services, max)),
            }
        };
        if self.output.live {
            // The last picture stays.
            self.draw(tracker);
        }
        ended
    }

    /// Whether something was said.
    fn take(&mut self, progress: &Progress, tracker: &mut Tracker) -> bool {
        if progress.generation < self.since {
            return false;
        }
        let news = tracker.take(progress);
        if self.output.json {
            self.output.object("progress", progress);
        } else if self.output.live {
            self.draw(tracker);
        } else {
            news.iter().for_each(|line| self.output.notice(line));
        }
        !news.is_empty()
    }

    fn beat(&self, tracker: &Tracker) {
        if !self.output.live {
            tracker.heartbeat(&self.output.side_screen(moment::now())).iter().for_each(|line| self.output.notice(line));
        }
    }

    fn draw(&mut self, tracker: &Tracker) {
        let screen = self.output.side_screen(moment::now());
        self.board.draw(&tracker.draw(&screen), screen.width, screen.colour);
    }
}

/// Passes on what the cluster reports, over as many connections as it takes. Ends only with what no new connection
/// would change.
async fn feed(session: &Session, services: &[ServiceName], reports: mpsc::Sender<Progress>) -> Failure {
    let request = Request::Watch { services: services.to_vec() };
    loop {
        let lost = match session.follow(&request).await {
            Ok(following) => match pass_on(following, &reports).await {
                Broken::Refused(failure) => return failure,
                Broken::Lost(error) => error.to_string(),
            },
            Err(failure) if failure.exit == Exit::Unreachable => failure.message.clone(),
            Err(failure) => return failure,
        };
        tracing::info!(%lost, "looking for another connection");
        sleep(PAUSE).await;
    }
}

async fn pass_on(mut following: Following, reports: &mpsc::Sender<Progress>) -> Broken {
    loop {
        match following.next::<Progress>().await {
            // Nobody listens any more: whoever owns the other end has all it wanted, and drops this too.
            Ok(Some(progress)) => drop(reports.send(progress).await),
            Ok(None) => return Broken::Lost(orca_wire::stream::StreamError::Ended),
            Err(broken) => return broken,
        }
    }
}

/// Exit code 9 and not 130: nothing was interrupted, the cluster goes on.
fn left(services: &[ServiceName]) -> Failure {
    Failure::new(Exit::TimedOut, "detached; the cluster goes on with it")
        .fix("follow it: orca status -f, or the same command again")
        .fix(format!("undo it: {}", undo(services)))
}

fn out_of_patience(services: &[ServiceName], patience: Duration) -> Failure {
    Failure::new(Exit::TimedOut, format!("not settled after {}; the cluster goes on with it", moment::age(patience)))
        .fix("follow it: orca status -f, or wait longer with --timeout")
        .fix(format!("undo it: {}", undo(services)))
}

fn undo(services: &[ServiceName]) -> String {
    services.iter().map(|name| format!("orca rollback {name}")).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_read_one_word_whether_it_was_waited_for_or_not() {
        let all = [
            Outcome::Unchanged,
            Outcome::Started,
            Outcome::Failed,
            Outcome::Settled(Verdict::Going),
            Outcome::Settled(Verdict::RolledBack),
        ];
        let words = serde_json::to_value(all).unwrap();
        assert_eq!(words, serde_json::json!(["unchanged", "started", "failed", "still_going", "rolled_back"]));
    }
}

//! `logs` and `events`: lines as they come, until there are no more or somebody has seen enough.

use std::process::ExitCode;
use std::time::Duration;

use orca_cluster::event::Event;
use orca_cluster::time::Timestamp;
use orca_wire::message::agent::LogLine;
use orca_wire::message::client::{EventsQuery, LogsQuery, Request};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::sleep;

use super::session;
use super::status::stopped;
use crate::cli::{EventsArgs, Global, LogsArgs};
use crate::exit::{Exit, Failure};
use crate::moment;
use crate::output::text::{Ink, Text};
use crate::output::{Output, event as screen};
use crate::session::{Broken, Session};

/// Lines from before that are shown when following.
const TAIL_FOLLOWING: u32 = 100;
/// Between attempts to get back a connection that was lost.
const PAUSE: Duration = Duration::from_millis(500);

pub async fn logs(args: LogsArgs, global: &Global, output: &Output) -> Result<ExitCode, Failure> {
    let LogsArgs { service, follow, since, tail, replica, grep, timestamps } = args;
    let since = moment_of(since)?;
    let session = session(global).await?;
    let (service, named) = session.resolve(&service).await?;
    let tail = tail.or_else(|| (follow && since.is_none()).then_some(TAIL_FOLLOWING));
    let replica = replica.or(named);
    let first = LogsQuery { service, replica, since, tail, follow, grep };
    let request = |after: Option<Timestamp>| match after {
        None => Request::Logs(first.clone()),
        Some(_) => Request::Logs(LogsQuery { since: after, tail: None, ..first.clone() }),
    };
    let screen = output.screen(moment::now());
    let show = |line: &LogLine| {
        if output.json {
            output.object("log", line);
        } else {
            output.print(&screen::log(&screen, line, replica.is_none(), timestamps));
        }
        line.at
    };
    lines(&session, output, follow, request, show).await
}

pub async fn events(args: EventsArgs, global: &Global, output: &Output) -> Result<ExitCode, Failure> {
    let EventsArgs { service, project, since, last, follow } = args;
    let since = moment_of(since)?;
    let session = session(global).await?;
    let service = match service {
        Some(service) => Some(session.resolve(&service).await?.0),
        None => None,
    };
    let first = EventsQuery { service, project, since, last: since.is_none().then_some(last), follow };
    let request = |after: Option<Timestamp>| match after {
        None => Request::Events(first.clone()),
        Some(_) => Request::Events(EventsQuery { since: after, last: None, ..first.clone() }),
    };
    let screen = output.screen(moment::now());
    let show = |event: &Event| {
        if output.json {
            output.object("event", event);
        } else {
            output.lines(&[screen::event(&screen, event)]);
        }
        event.at
    };
    lines(&session, output, follow, request, show).await
}

fn moment_of(text: Option<String>) -> Result<Option<Timestamp>, Failure> {
    text.map(|text| moment::parse_moment(&text, moment::now())).transpose().map_err(Failure::input)
}

/// Shows what comes. Following, a lost connection is taken up again after the time of the last line that was shown.
async fn lines<T: DeserializeOwned>(
    session: &Session,
    output: &Output,
    follow: bool,
    request: impl Fn(Option<Timestamp>) -> Request,
    show: impl Fn(&T) -> Timestamp,
) -> Result<ExitCode, Failure> {
    #[derive(Serialize)]
    struct Ended {
        outcome: &'static str,
        exit_code: u8,
        count: u64,
    }
    let mut shown = Shown::default();
    let reading = async {
        loop {
            let broken = match read(session, &request, &show, &mut shown).await {
                Ok(()) => return Ok(()),
                Err(broken) => broken,
            };
            match broken {
                Broken::Lost(error) if follow => {
                    let text = format!("connection lost ({error}); looking for another");
                    output.notice(&Text::of(Ink::Yellow, text));
                    sleep(PAUSE).await;
                }
                broken => return Err(broken.into_failure(session)),
            }
        }
    };
    let ended = tokio::select! {
        ended = reading => ended,
        _ = tokio::signal::ctrl_c() => return Ok(stopped(output)),
    };
    ended?;
    let exit = Exit::Done;
    if output.json {
        output.object("result", &Ended { outcome: "done", exit_code: exit.code(), count: shown.count });
    }
    Ok(exit.into())
}

#[derive(Debug, Default)]
struct Shown {
    count: u64,
    last: Option<Timestamp>,
}

async fn read<T: DeserializeOwned>(
    session: &Session,
    request: &impl Fn(Option<Timestamp>) -> Request,
    show: &impl Fn(&T) -> Timestamp,
    shown: &mut Shown,
) -> Result<(), Broken> {
    let after = shown.last.map(|last| last + Duration::from_millis(1));
    let mut following = match session.follow(&request(after)).await {
        Ok(following) => following,
        Err(failure) if failure.exit == Exit::Unreachable && shown.last.is_some() => {
            return Err(Broken::Lost(orca_wire::stream::StreamError::Ended));
        }
        Err(failure) => return Err(Broken::Refused(failure)),
    };
    while let Some(item) = following.next::<T>().await? {
        shown.last = Some(show(&item));
        shown.count += 1;
    }
    Ok(())
}

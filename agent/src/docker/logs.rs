//! What containers wrote: from Docker's own files, which rotate, as lines with the time and the stream each was
//! written to.

use std::time::Duration;

use bollard::container::LogOutput;
use bollard::models::ContainerInspectResponse;
use bollard::query_parameters::LogsOptionsBuilder;
use futures_util::{Stream, StreamExt as _, stream};
use orca_cluster::id::ReplicaId;
use orca_cluster::time::Timestamp;
use tokio::time::{Instant, timeout_at};

use super::error::status;
use super::{Docker, Error, timestamp};

/// Lines kept of what a replica wrote before it ended: a stack trace, and what led to it.
pub const LAST_LINES: u32 = 20;
/// The engine notes the time of a start after the fact: by then the process may have written for so long.
const START_LATENCY: Duration = Duration::from_millis(500);
/// The resolution of [`Timestamp`].
const MILLISECOND: Duration = Duration::from_millis(1);
/// For the engine to give them. Whoever asks for them has other replicas to see to.
const LAST_LINES_TIME_MAX: Duration = Duration::from_secs(5);
/// Characters kept of each; a report goes to a control node with every change.
const LAST_LINE_LENGTH_MAX: usize = 500;
/// Docker hands a line on in pieces of 16 KiB; a line longer than this is cut into several.
const LINE_LENGTH_MAX: usize = 256 << 10;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogLine {
    pub at: Timestamp,
    pub source: Source,
    pub text: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    Stdout,
    Stderr,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LogRequest {
    /// Nothing older than this.
    pub since: Option<Timestamp>,
    /// At most so many of the newest lines.
    pub tail: Option<u32>,
    /// Go on as lines are written, until the container ends.
    pub follow: bool,
}

impl Docker {
    /// The lines of a replica, oldest first.
    pub async fn logs(
        &self,
        replica: ReplicaId,
        request: LogRequest,
    ) -> Result<impl Stream<Item = Result<LogLine, Error>> + Send + use<>, Error> {
        let id = self.find(replica).await?.ok_or(Error::NoReplica(replica))?;
        let client = self.client()?;
        let docker = self.clone();
        let lines = client.logs(&id, Some(options(request)));
        let lines = lines.map(move |piece| {
            piece.map_err(|error| match status(&error) {
                // It was removed just now.
                Some(404) => Error::NoReplica(replica),
                _ => docker.cause(error).into(),
            })
        });
        Ok(joined(lines, request.since))
    }

    /// The end of what a container wrote since it was last started, which was after `ended` if that is known.
    pub(super) async fn last_lines(
        &self,
        inspected: &ContainerInspectResponse,
        ended: Option<Timestamp>,
    ) -> Vec<String> {
        let (Some(id), Ok(client)) = (inspected.id.as_deref(), self.client()) else { return Vec::new() };
        let started = inspected.state.as_ref().and_then(|state| timestamp(state.started_at.as_deref()?));
        let since = started.map(|started| started - START_LATENCY).max(ended.map(|ended| ended + MILLISECOND));
        let request = LogRequest { since, tail: Some(LAST_LINES), follow: false };
        let pieces = client.logs(id, Some(options(request))).map(|piece| piece.map_err(drop));
        let mut lines = std::pin::pin!(joined(pieces, since));
        let mut last = Vec::new();
        let deadline = Instant::now() + LAST_LINES_TIME_MAX;
        // What came by then is more than nothing.
        while let Ok(Some(line)) = timeout_at(deadline, lines.next()).await {
            last.extend(line.ok().map(|line| shortened(line.text)));
        }
        last
    }
}

fn shortened(mut text: String) -> String {
    if let Some((end, _)) = text.char_indices().nth(LAST_LINE_LENGTH_MAX) {
        text.truncate(end);
        text.push('…');
    }
    text
}

fn options(request: LogRequest) -> bollard::query_parameters::LogsOptions {
    let mut options = LogsOptionsBuilder::default().stdout(true).stderr(true).timestamps(true).follow(request.follow);
    if let Some(since) = request.since {
        // Whole seconds; the rest is left out here.
        options = options.since(i32::try_from(since.0 / 1000).unwrap_or(i32::MAX));
    }
    if let Some(tail) = request.tail {
        options = options.tail(&tail.to_string());
    }
    options.build()
}

/// Whole lines from pieces: each piece begins with a time, and ends with a line's end unless more of it follows. What
/// the writer left unfinished when it ended is a line too.
fn joined<E: Send>(
    pieces: impl Stream<Item = Result<LogOutput, E>> + Send,
    since: Option<Timestamp>,
) -> impl Stream<Item = Result<LogLine, E>> + Send {
    let pieces = pieces.map(Some).chain(stream::once(std::future::ready(None)));
    let lines = pieces.scan(Unfinished::default(), |unfinished, piece| {
        let lines = match piece {
            Some(Ok(piece)) => [unfinished.add(piece).map(Ok), None],
            Some(Err(error)) => [Some(Err(error)), None],
            None => [unfinished.stdout.take().map(Ok), unfinished.stderr.take().map(Ok)],
        };
        std::future::ready(Some(stream::iter(lines.into_iter().flatten())))
    });
    lines.flatten().filter(move |line| {
        let wanted = line.as_ref().map_or(true, |line| since.is_none_or(|since| line.at >= since));
        std::future::ready(wanted)
    })
}

/// The beginning of a line on each stream.
#[derive(Debug, Default)]
struct Unfinished {
    stdout: Option<LogLine>,
    stderr: Option<LogLine>,
}

impl Unfinished {
    fn add(&mut self, piece: LogOutput) -> Option<LogLine> {
        let (source, begun) = match &piece {
            LogOutput::StdErr { .. } => (Source::Stderr, &mut self.stderr),
            LogOutput::StdOut { .. } | LogOutput::StdIn { .. } | LogOutput::Console { .. } => {
                (Source::Stdout, &mut self.stdout)
            }
        };
        let bytes = piece.into_bytes();
        let text = String::from_utf8_lossy(&bytes);
        let (at, text) = match text.split_once(' ').and_then(|(time, rest)| Some((timestamp(time)?, rest))) {
            Some((at, rest)) => (Some(at), rest),
            // An empty line may come as its time alone.
            None => match timestamp(text.trim_end()) {
                Some(at) => (Some(at), "\n"),
                None => (None, &*text),
            },
        };
        let ended = text.ends_with('\n');
        let text = text.trim_end_matches(['\r', '\n']);
        let line = match begun.take() {
            Some(mut line) => {
                line.text.push_str(text);
                line
            }
            None => LogLine { at: at.unwrap_or_default(), source, text: text.to_owned() },
        };
        if ended || line.text.len() >= LINE_LENGTH_MAX {
            return Some(line);
        }
        *begun = Some(line);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(pieces: &[&str], since: Option<Timestamp>, expect: &[(u64, &str)]) {
        let pieces = pieces.iter().map(|piece| Ok::<_, ()>(LogOutput::StdOut { message: (*piece).to_owned().into() }));
        let lines: Vec<_> =
            futures_util::FutureExt::now_or_never(joined(stream::iter(pieces), since).collect()).unwrap();
        let lines: Vec<LogLine> = lines.into_iter().map(Result::unwrap).collect();
        let got: Vec<(u64, &str)> = lines.iter().map(|line| (line.at.0, line.text.as_str())).collect();
        assert_eq!(got, expect);
    }

    #[test]
    fn lines_are_put_together_from_pieces() {
        check(&["1970-01-01T00:00:01Z a b\n", "1970-01-01T00:00:02Z c\r\n"], None, &[(1000, "a b"), (2000, "c")]);
        check(&["1970-01-01T00:00:01Z be", "1970-01-01T00:00:02Z gin\n"], None, &[(1000, "begin")]);
        check(&["1970-01-01T00:00:01Z \n", "1970-01-01T00:00:02Z\n"], None, &[(1000, ""), (2000, "")]);
        check(&["1970-01-01T00:00:01Z the end"], None, &[(1000, "the end")]);
    }

    #[test]
    fn older_lines_of_the_same_second_are_left_out() {
        let pieces = ["1970-01-01T00:00:01.1Z a\n", "1970-01-01T00:00:01.2Z b\n"];
        check(&pieces, Some(Timestamp(1200)), &[(1200, "b")]);
    }
}

//! What a control node asks on behalf of a person: a replica's log lines, a command in it. One stream each; the
//! person's going away ends the stream, and with it the work.

use bytes::Bytes;
use futures_util::StreamExt;
use orca_cluster::id::NodeId;
use orca_cluster::secret::Opaque;
use orca_wire::Stream;
use orca_wire::cause::chain;
use orca_wire::message::agent::{Errand, ExecErrand, ExecInput, ExecOutput, LogLine, LogRead, LogStream, LogsErrand};
use orca_wire::stream::StreamError;
use tokio::io::AsyncWriteExt;
use tracing::debug;

use crate::docker::{self, Docker};
use crate::module_log::{self, Logs};

/// Whoever runs errands; cheap to clone.
#[derive(Debug, Clone)]
pub struct Errands {
    pub docker: Docker,
    pub logs: Logs,
    pub node: NodeId,
}

impl Errands {
    pub async fn run(self, errand: Errand, mut stream: Stream) {
        // Who has enough ends the stream; until then a pager, or the slower log of another replica, is worth waiting for.
        stream.may_rest();
        let result = match errand {
            Errand::Logs(errand) if errand.module => self.module_logs(errand, stream).await,
            Errand::Logs(errand) => self.container_logs(errand, stream).await,
            Errand::Exec(errand) => self.exec(errand, stream).await,
        };
        if let Err(error) = result {
            debug!(error = chain(&error), "an errand ended early");
        }
    }

    async fn module_logs(&self, errand: LogsErrand, mut stream: Stream) -> Result<(), StreamError> {
        let query = module_log::Query {
            since: errand.since,
            tail: errand.tail.map(|tail| usize::try_from(tail).unwrap_or(usize::MAX)),
        };
        let line = |line: module_log::Line| {
            LogRead::Line(LogLine {
                at: line.at,
                replica: errand.replica,
                node: self.node,
                stream: match line.source {
                    module_log::Source::Stdout => LogStream::Stdout,
                    module_log::Source::Stderr | module_log::Source::Orca => LogStream::Stderr,
                },
                text: line.text,
            })
        };
        // A replica that never printed has no log, and that is not an error. What there is and cannot be read, is.
        if !errand.follow {
            let lines = match self.logs.read(errand.replica, query) {
                Ok(lines) => lines,
                Err(error) => return stream.answer(&failed(&error)).await,
            };
            for read in lines {
                stream.send(&line(read)).await?;
            }
            return stream.finish().await;
        }
        let lines = match self.logs.follow(errand.replica, query) {
            Ok(lines) => lines,
            Err(error) => return stream.answer(&failed(&error)).await,
        };
        let mut lines = std::pin::pin!(lines);
        let closed = stream.closed();
        let mut closed = std::pin::pin!(closed);
        loop {
            tokio::select! {
                () = &mut closed => return Ok(()),
                read = lines.next() => match read {
                    Some(Ok(read)) => stream.send(&line(read)).await?,
                    Some(Err(error)) => return stream.answer(&failed(&error)).await,
                    None => return stream.finish().await,
                },
            }
        }
    }

    async fn container_logs(&self, errand: LogsErrand, mut stream: Stream) -> Result<(), StreamError> {
        let request = docker::LogRequest { since: errand.since, tail: errand.tail, follow: errand.follow };
        let lines = match self.docker.logs(errand.replica, request).await {
            Ok(lines) => lines,
            Err(error) => return end(stream, &error).await,
        };
        let mut lines = std::pin::pin!(lines);
        let closed = stream.closed();
        let mut closed = std::pin::pin!(closed);
        loop {
            let read = tokio::select! {
                () = &mut closed => return Ok(()),
                read = lines.next() => read,
            };
            let read = match read {
                Some(Ok(read)) => read,
                Some(Err(error)) => return end(stream, &error).await,
                None => return stream.finish().await,
            };
            let line = LogLine {
                at: read.at,
                replica: errand.replica,
                node: self.node,
                stream: match read.source {
                    docker::Source::Stdout => LogStream::Stdout,
                    docker::Source::Stderr => LogStream::Stderr,
                },
                text: read.text,
            };
            stream.send(&LogRead::Line(line)).await?;
        }
    }

    async fn exec(&self, errand: ExecErrand, mut stream: Stream) -> Result<(), StreamError> {
        let mut screen = docker::Screen::new(errand.terminal.is_some());
        let request = docker::ExecRequest {
            argv: errand.command,
            terminal: errand.terminal.map(|size| docker::Size { columns: size.columns, rows: size.rows }),
            stdin: errand.stdin,
            env: Vec::new(),
        };
        let docker::Exec { control, mut input, mut output } = match self.docker.exec(errand.replica, request).await {
            Ok(exec) => exec,
            Err(error) => {
                stream.send(&ExecOutput::Failed { reason: chain(&error) }).await?;
                return stream.finish().await;
            }
        };
        let gone = stream.closed();
        let Stream { mut sender, mut receiver } = stream;
        let typing = async {
            while let Ok(Some(typed)) = receiver.next::<ExecInput>().await {
                let written = match typed {
                    ExecInput::Bytes(Opaque(bytes)) => input.write_all(&bytes).await,
                    ExecInput::End => input.shutdown().await,
                    ExecInput::Resize(size) => {
                        // A command that has just ended has no terminal any more.
                        let _ = control.resize(docker::Size { columns: size.columns, rows: size.rows }).await;
                        Ok(())
                    }
                };
                if written.is_err() {
                    break;
                }
            }
            // What is typed after the command's end goes nowhere; its output is what ends the errand.
            std::future::pending::<()>().await;
        };
        let printing = async {
            while let Some(Ok(piece)) = output.next().await {
                if let Some(piece) = screen.show(piece) {
                    sender.send(&printed(piece)).await?;
                }
            }
            let code = control.code().await;
            let (last, meant) = screen.end(*code.as_ref().unwrap_or(&0));
            if let Some(last) = last {
                sender.send(&printed(last)).await?;
            }
            let end = match code {
                Ok(_) => ExecOutput::Exit { code: meant },
                Err(error) => ExecOutput::Failed { reason: chain(&error) },
            };
            sender.send(&end).await?;
            sender.finish().await
        };
        tokio::select! {
            () = typing => Ok(()),
            result = printing => result,
            // A command that neither reads nor prints would never find out.
            () = gone => {
                control.hang_up().await;
                Ok(())
            }
        }
    }
}

/// The end of a container's log: one that has no container has said all there is.
async fn end(mut stream: Stream, error: &docker::Error) -> Result<(), StreamError> {
    match error {
        docker::Error::NoReplica(_) => stream.finish().await,
        docker::Error::NotRunning(_) | docker::Error::NoEngine(_) | docker::Error::Refused(_) => {
            stream.answer(&failed(error)).await
        }
    }
}

fn failed(error: &dyn std::error::Error) -> LogRead {
    LogRead::Failed { failed: chain(error) }
}

fn printed(output: docker::Output) -> ExecOutput {
    let bytes = Opaque(Bytes::into(output.bytes));
    match output.source {
        docker::Source::Stdout => ExecOutput::Stdout(bytes),
        docker::Source::Stderr => ExecOutput::Stderr(bytes),
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::time::Duration;

    use orca_cluster::id::ReplicaId;
    use orca_wire::{Connection, Endpoint, Plane, Wanted};
    use tempfile::TempDir;
    use tokio::time::timeout;

    use super::*;
    use crate::testing::control_and_agent;

    const SOON: Duration = Duration::from_secs(10);
    const REPLICA: ReplicaId = ReplicaId(7);

    /// An agent's errands without a Docker engine, and a stream to them from a control node.
    struct World {
        directory: TempDir,
        errands: Errands,
        asks: Stream,
        asked: Stream,
        _kept: (Connection, Endpoint, Endpoint),
    }

    async fn world() -> World {
        let directory = tempfile::tempdir().unwrap();
        let docker = Docker::new(docker::Config {
            socket: directory.path().join("docker.sock"),
            cluster: "c".to_owned(),
            runtime_directory: PathBuf::new(),
            state_directories: Vec::new(),
        });
        let logs = Logs::open(directory.path().join("logs")).unwrap();
        let (server, mut accepted, agent) = control_and_agent();
        let dialed = agent.dial(server.local_address().unwrap(), Plane::Agent, Wanted::Control).await.unwrap();
        let mut asks = accepted.accept().await.unwrap().open(&()).await.unwrap();
        asks.may_rest();
        let mut asked = dialed.accept().await.unwrap();
        asked.next_within::<()>(SOON).await.unwrap();
        let errands = Errands { docker, logs, node: NodeId(2) };
        World { directory, errands, asks, asked, _kept: (dialed, server, agent) }
    }

    fn logs(module: bool, follow: bool) -> Errand {
        let service = "shop/web".parse().unwrap();
        Errand::Logs(LogsErrand { replica: REPLICA, service, module, since: None, tail: None, follow })
    }

    #[tokio::test]
    async fn a_reader_that_rests_gets_every_line_afterwards() {
        // More than is under way unread.
        const LINES: usize = 4_000;
        let World { directory: _directory, errands, mut asks, mut asked, _kept } = world().await;
        for _ in 0..LINES / 400 {
            // As much as a writer may print in a second. The next one may too.
            let writer = errands.logs.writer(REPLICA).unwrap();
            (0..400).for_each(|_| writer.line(module_log::Source::Stdout, &"x".repeat(1_000)));
        }
        asked.sender.set_stall(Duration::from_millis(1));
        let mut running = tokio::spawn(errands.run(logs(true, false), asked));
        let early = timeout(Duration::from_millis(500), &mut running).await;
        assert!(early.is_err(), "it gave up on a reader that rests");
        let mut count = 0;
        while asks.next::<LogRead>().await.unwrap().is_some() {
            count += 1;
        }
        assert_eq!(count, LINES);
        running.await.unwrap();
    }

    async fn all(mut asks: Stream) -> Vec<LogRead> {
        let mut all = Vec::new();
        while let Some(read) = timeout(SOON, asks.next()).await.unwrap().unwrap() {
            all.push(read);
        }
        all
    }

    #[tokio::test]
    async fn a_log_that_cannot_be_read_is_not_an_empty_one() {
        for (module, follow) in [(true, false), (true, true), (false, false), (false, true)] {
            let World { directory, errands, asks, asked, _kept } = world().await;
            // It can be opened and not read. Docker's socket is not there.
            std::fs::create_dir(directory.path().join(format!("logs/{REPLICA}.log"))).unwrap();
            errands.run(logs(module, follow), asked).await;
            let read = all(asks).await;
            let [LogRead::Failed { failed }] = read.as_slice() else { panic!("{read:?}") };
            assert!(failed.contains(if module { "directory" } else { "docker.sock does not exist" }), "{failed}");
        }
    }

    #[tokio::test]
    async fn a_module_that_never_printed_has_an_empty_log() {
        let World { directory: _directory, errands, asks, asked, _kept } = world().await;
        errands.run(logs(true, false), asked).await;
        assert_eq!(all(asks).await, []);
    }
}

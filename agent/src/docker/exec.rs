//! A command in a running container, with its streams, its terminal and its exit code.
//!
//! The connection is taken over from HTTP here and not by bollard, which guesses from each piece of output whether it
//! is framed and so garbles what a terminal program may write.

use std::fmt;
use std::io;
use std::path::Path;
use std::time::Duration;

use bollard::exec::ResizeExecOptions;
use bollard::models::ExecConfig;
use bytes::{Buf as _, Bytes, BytesMut};
use futures_util::{Stream, StreamExt as _};
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use orca_cluster::id::ReplicaId;
use orca_cluster::replica::Saw;
use rustix::process::Signal;
use serde::Deserialize;
use tokio::io::WriteHalf;
use tokio::net::UnixStream;
use tokio_util::codec::{BytesCodec, Decoder, FramedRead};

use super::logs::Source;
use super::{ANSWER_MAX, Docker, Error, error};

/// Longest piece of output taken at once; the engine's pieces are 32 KiB.
const FRAME_LENGTH_MAX: usize = 16 << 20;
const HEADER_LENGTH: usize = 8;
/// Bytes kept of the end of a probe's output.
const PROBE_OUTPUT_MAX: usize = 400;
/// How the engine begins to say that it could not start a command.
const NOT_STARTED: &str = "OCI runtime exec failed: ";
/// The engine quotes the command, whose name is a path.
const NOT_STARTED_LENGTH_MAX: usize = 16 << 10;
/// The exit code is there when the output has ended, or a moment later.
const CODE_TRIES: u32 = 100;
const CODE_PAUSE: Duration = Duration::from_millis(20);

/// A terminal's columns and rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    pub columns: u16,
    pub rows: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ExecRequest {
    pub argv: Vec<String>,
    /// A terminal of this size, or none.
    pub terminal: Option<Size>,
    /// Whether there will be input.
    pub stdin: bool,
    /// `NAME=value`, besides the container's own.
    pub env: Vec<String>,
}

/// A piece of output; a terminal has only one stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    pub source: Source,
    pub bytes: Bytes,
}

/// A command that runs. Its parts are used apart: whoever reads is seldom who writes.
pub struct Exec {
    pub control: ExecControl,
    /// Shutting it down is the end of the command's input.
    pub input: ExecInput,
    pub output: ExecOutput,
}

pub type ExecInput = WriteHalf<TokioIo<Upgraded>>;
pub type ExecOutput = std::pin::Pin<Box<dyn Stream<Item = io::Result<Output>> + Send>>;

/// Asks about a command and changes its terminal.
#[derive(Debug, Clone)]
pub struct ExecControl {
    docker: Docker,
    id: String,
}

/// How a command ended that nobody talked to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    pub code: i64,
    /// The end of what it wrote.
    pub output: String,
}

impl fmt::Debug for Exec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Exec").field("control", &self.control).finish_non_exhaustive()
    }
}

impl Docker {
    /// Starts a command in the replica's container.
    pub async fn exec(&self, replica: ReplicaId, request: ExecRequest) -> Result<Exec, Error> {
        let container = self.find(replica).await?.ok_or(Error::NoReplica(replica))?;
        let is_terminal = request.terminal.is_some();
        let config = ExecConfig {
            attach_stdin: Some(request.stdin),
            attach_stdout: Some(true),
            attach_stderr: Some(true),
            tty: Some(is_terminal),
            env: Some(request.env),
            cmd: Some(request.argv),
            ..Default::default()
        };
        let created = match self.client()?.create_exec(&container, config).await {
            Ok(created) => created,
            Err(error) if error::status(&error) == Some(404) => return Err(Error::NoReplica(replica)),
            Err(error) if error::status(&error) == Some(409) => return Err(Error::NotRunning(replica)),
            Err(error) => return Err(self.cause(error).into()),
        };
        let connection = connect(&self.config().socket, &created.id, is_terminal).await?;
        let (reader, input) = tokio::io::split(TokioIo::new(connection));
        let output: ExecOutput = if is_terminal {
            let pieces = FramedRead::new(reader, BytesCodec::new());
            Box::pin(pieces.map(|piece| piece.map(|bytes| Output { source: Source::Stdout, bytes: bytes.freeze() })))
        } else {
            Box::pin(FramedRead::new(reader, Frames))
        };
        let control = ExecControl { docker: self.clone(), id: created.id };
        if let Some(size) = request.terminal {
            control.resize(size).await?;
        }
        Ok(Exec { control, input, output })
    }

    /// Runs a command to its end, at most so long. One that takes longer is killed, where this process may do that.
    pub async fn run(&self, replica: ReplicaId, argv: &[String], longest: Duration) -> Result<Ended, Saw> {
        let request = ExecRequest { argv: argv.to_vec(), ..Default::default() };
        let begun = tokio::time::timeout(longest, self.exec(replica, request));
        let mut exec = match begun.await {
            Ok(Ok(exec)) => exec,
            Ok(Err(error)) => return Err(Saw::Error(error.to_string())),
            Err(_late) => return Err(Saw::TimedOut),
        };
        let finish = async {
            let mut end = Vec::new();
            while let Some(piece) = exec.output.next().await {
                end.extend_from_slice(&piece.map_err(|error| Saw::Error(error.to_string()))?.bytes);
                end.drain(..end.len().saturating_sub(PROBE_OUTPUT_MAX));
            }
            let code = exec.control.code().await.map_err(|error| Saw::Error(error.to_string()))?;
            let output = String::from_utf8_lossy(&end).trim().to_owned();
            match not_started(&output) {
                Some(reason) if code != 0 => Err(Saw::Error(reason.to_owned())),
                _ => Ok(Ended { code, output }),
            }
        };
        match tokio::time::timeout(longest, finish).await {
            Ok(ended) => ended,
            Err(_late) => {
                exec.control.kill().await;
                Err(Saw::TimedOut)
            }
        }
    }
}

/// Why a command could not even be started, which the engine prints in its place: `OCI runtime exec failed: exec
/// failed: unable to start container process: exec: "/x": stat /x: no such file or directory: unknown`.
fn not_started(output: &str) -> Option<&str> {
    let words = output.strip_prefix(NOT_STARTED)?;
    let words = words.rsplit_once("exec: ").map_or(words, |(_, words)| words);
    Some(words.strip_suffix(": unknown").unwrap_or(words))
}

/// Tells what a command printed from what the engine prints in the place of one that it could not start: that is on
/// standard output too, and would be taken for the command's by whoever reads it.
#[derive(Debug, Default)]
pub struct Screen {
    is_terminal: bool,
    begun: bool,
    /// All there is so far, if it may be the engine's.
    held: Vec<u8>,
}

impl Screen {
    pub fn new(is_terminal: bool) -> Screen {
        Screen { is_terminal, ..Screen::default() }
    }

    /// What may be shown now.
    pub fn show(&mut self, piece: Output) -> Option<Output> {
        let engines = !self.begun && piece.bytes.starts_with(NOT_STARTED.as_bytes());
        self.begun = true;
        if piece.source == Source::Stdout && (engines || !self.held.is_empty()) {
            self.held.extend_from_slice(&piece.bytes);
            if self.held.len() <= NOT_STARTED_LENGTH_MAX {
                return None;
            }
            return Some(Output { source: Source::Stdout, bytes: std::mem::take(&mut self.held).into() });
        }
        Some(piece)
    }

    /// What is still to be shown when the command has ended with this code, and the code that says so: as a shell does,
    /// 127 for a command that is not there and 126 for one that cannot be run.
    pub fn end(self, code: i64) -> (Option<Output>, i64) {
        if self.held.is_empty() {
            return (None, code);
        }
        let text = String::from_utf8_lossy(&self.held);
        let Some(reason) = not_started(text.trim_end()).filter(|_| code != 0) else {
            return (Some(Output { source: Source::Stdout, bytes: self.held.into() }), code);
        };
        // By its words: engines give 126, 127 or 1 for the same.
        let is_absent = reason.contains("not found") || reason.contains("no such file");
        let code = if is_absent { 127 } else { 126 };
        // A terminal is in raw mode, where a new line alone does not go back to the left.
        let end = if self.is_terminal { "\r\n" } else { "\n" };
        let text = format!("orca: the command cannot be started: {reason}{end}");
        (Some(Output { source: Source::Stderr, bytes: text.into() }), code)
    }
}

impl ExecControl {
    pub async fn resize(&self, size: Size) -> Result<(), Error> {
        let options = ResizeExecOptions { height: size.rows, width: size.columns };
        match self.docker.client()?.resize_exec(&self.id, options).await {
            Ok(()) => Ok(()),
            // It has ended: there is no terminal any more.
            Err(error) if matches!(error::status(&error), Some(404 | 409 | 500)) => Ok(()),
            Err(error) => Err(self.docker.cause(error).into()),
        }
    }

    /// The exit code of a command whose output has ended.
    pub async fn code(&self) -> Result<i64, Error> {
        for _ in 0..CODE_TRIES {
            let found = self.docker.client()?.inspect_exec(&self.id).await;
            let found = found.map_err(|error| self.docker.cause(error))?;
            if let (Some(false), Some(code)) = (found.running, found.exit_code) {
                return Ok(code);
            }
            tokio::time::sleep(CODE_PAUSE).await;
        }
        Err(Error::Refused("the command closed its output and does not end".to_owned()))
    }

    /// Tells the command that nobody is there any more, as a terminal does whose line is cut. One that minds neither
    /// this nor the end of its input goes on.
    pub async fn hang_up(&self) {
        self.signal(Signal::HUP).await;
    }

    /// Ends the command.
    async fn kill(&self) {
        self.signal(Signal::KILL).await;
    }

    /// The engine has no call for it, so it is done by the process, which an agent that is not root may not do: then the
    /// command goes on until it ends by itself.
    async fn signal(&self, signal: Signal) {
        let Ok(client) = self.docker.client() else { return };
        let Ok(found) = client.inspect_exec(&self.id).await else { return };
        let pid = found.pid.and_then(|pid| i32::try_from(pid).ok()).and_then(rustix::process::Pid::from_raw);
        if let (Some(true), Some(pid)) = (found.running, pid)
            && let Err(error) = rustix::process::kill_process(pid, signal)
        {
            tracing::debug!(exec = self.id, %error, ?signal, "cannot signal a command");
        }
    }
}

/// Starts the command and takes its connection over.
async fn connect(socket: &Path, id: &str, is_terminal: bool) -> Result<Upgraded, Error> {
    let broken = |error: &dyn std::error::Error| Error::NoEngine(format!("{}: {error}", socket.display()));
    let stream = UnixStream::connect(socket).await.map_err(|error| broken(&error))?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|error| broken(&error))?;
    // It ends with the command's streams.
    tokio::spawn(connection.with_upgrades());
    let body = serde_json::json!({ "Detach": false, "Tty": is_terminal }).to_string();
    let request = Request::builder()
        .method(Method::POST)
        .uri(format!("/exec/{id}/start"))
        .header(header::HOST, "docker")
        .header(header::CONTENT_TYPE, "application/json")
        .header(header::CONNECTION, "Upgrade")
        .header(header::UPGRADE, "tcp")
        .body(Full::new(Bytes::from(body)))
        .expect("the parts of the request are valid");
    let answer = tokio::time::timeout(ANSWER_MAX, sender.send_request(request)).await;
    let response = answer.map_err(|error| broken(&error))?.map_err(|error| broken(&error))?;
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        return hyper::upgrade::on(response).await.map_err(|error| broken(&error));
    }
    #[derive(Deserialize)]
    struct Refusal {
        message: String,
    }
    let status = response.status();
    let body = response.into_body().collect().await.map_err(|error| broken(&error))?.to_bytes();
    let refusal = serde_json::from_slice(&body).map(|refusal: Refusal| refusal.message);
    Err(Error::Refused(refusal.unwrap_or_else(|_| format!("the engine answered {status}"))))
}

/// How the engine puts standard output and standard error on one connection: which of them in the first byte, the
/// length in the fifth to the eighth, then so many bytes.
struct Frames;

impl Decoder for Frames {
    type Item = Output;
    type Error = io::Error;

    fn decode(&mut self, buffer: &mut BytesMut) -> io::Result<Option<Output>> {
        let Some(&[stream, _, _, _, a, b, c, d]) = buffer.first_chunk() else { return Ok(None) };
        let source = match stream {
            0 | 1 => Source::Stdout,
            2 => Source::Stderr,
            other => return Err(io::Error::other(format!("the engine sent a frame of stream {other}"))),
        };
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        if length > FRAME_LENGTH_MAX {
            return Err(io::Error::other(format!("the engine sent a frame of {length} bytes")));
        }
        if buffer.len() < HEADER_LENGTH + length {
            buffer.reserve(HEADER_LENGTH + length - buffer.len());
            return Ok(None);
        }
        buffer.advance(HEADER_LENGTH);
        Ok(Some(Output { source, bytes: buffer.split_to(length).freeze() }))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn frames_are_the_same_however_they_are_cut(
            pieces in prop::collection::vec((any::<bool>(), prop::collection::vec(any::<u8>(), 0..50)), 0..10),
            cut in 1usize..40,
        ) {
            let mut stream = Vec::new();
            for (is_error, bytes) in &pieces {
                stream.extend([if *is_error { 2 } else { 1 }, 0, 0, 0]);
                stream.extend((bytes.len() as u32).to_be_bytes());
                stream.extend(bytes);
            }
            let (mut buffer, mut got) = (BytesMut::new(), Vec::new());
            for part in stream.chunks(cut) {
                buffer.extend_from_slice(part);
                while let Some(output) = Frames.decode(&mut buffer).unwrap() {
                    got.push((output.source == Source::Stderr, output.bytes.to_vec()));
                }
            }
            prop_assert_eq!(got, pieces);
            prop_assert!(buffer.is_empty());
        }

        #[test]
        fn what_a_command_prints_is_shown_whole_and_in_order(
            pieces in prop::collection::vec((any::<bool>(), "(OCI runtime exec failed: )?[a-z]{0,9}"), 0..6),
            code in prop_oneof![Just(0_i64), Just(1)],
        ) {
            let mut screen = Screen::default();
            let piece = |(is_error, text): &(bool, String)| Output {
                source: if *is_error { Source::Stderr } else { Source::Stdout },
                bytes: text.clone().into(),
            };
            let mut shown: Vec<Output> = pieces.iter().filter_map(|one| screen.show(piece(one))).collect();
            let (last, _) = screen.end(code);
            shown.extend(last);
            let text = |wanted: Source, of: &[Output]| {
                let of_source = of.iter().filter(|output| output.source == wanted);
                String::from_utf8(of_source.flat_map(|output| output.bytes.to_vec()).collect()).unwrap()
            };
            let all: Vec<Output> = pieces.iter().map(piece).collect();
            prop_assert!(code != 0 || text(Source::Stdout, &shown) == text(Source::Stdout, &all));
            prop_assert!(text(Source::Stderr, &shown).starts_with(&text(Source::Stderr, &all)));
        }

        #[test]
        fn nothing_the_engine_sends_panics(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let mut buffer = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = Frames.decode(&mut buffer) {}
        }
    }

    #[test]
    fn why_a_command_cannot_be_started_is_no_output_of_it_and_has_the_code_that_a_shell_gives() {
        let engine = "OCI runtime exec failed: exec failed: unable to start container process: exec: ";
        let ended = |text: &str, code| {
            let mut screen = Screen::default();
            let printed = text.as_bytes().chunks(100);
            let piece = |bytes: &[u8]| Output { source: Source::Stdout, bytes: Bytes::copy_from_slice(bytes) };
            let shown = printed.filter_map(|bytes| screen.show(piece(bytes))).count();
            let (last, code) = screen.end(code);
            let last = last.map(|last| (last.source, String::from_utf8(last.bytes.to_vec()).unwrap()));
            (shown, last, code)
        };
        let said = |reason: &str| Some((Source::Stderr, format!("orca: the command cannot be started: {reason}\n")));
        for (reason, code, wanted) in [
            ("\"nope\": executable file not found in $PATH", 127, 127),
            ("\"nope\": executable file not found in $PATH", 1, 127),
            ("\"/x\": stat /x: no such file or directory", 126, 127),
            ("\"/etc\": permission denied", 126, 126),
            ("\"/etc\": permission denied", 1, 126),
        ] {
            assert_eq!(ended(&format!("{engine}{reason}: unknown\r\n"), code), (0, said(reason), wanted));
        }
        // It may be what the command printed, and then nothing of it is lost.
        let whole = format!("{engine}as a book says");
        assert_eq!(ended(&whole, 0), (0, Some((Source::Stdout, whole.clone())), 0));
        assert_eq!(ended("something else", 127), (1, None, 127));
    }
}

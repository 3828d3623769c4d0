//! `exec`: a command in a replica, as if it ran here. Its exit code is ours.

use std::io;
use std::process::ExitCode;

use orca_cluster::secret::Opaque;
use orca_wire::Stream;
use orca_wire::message::agent::{ExecInput, ExecOutput};
use orca_wire::message::client::{Exec, Request};
use orca_wire::stream::Sender;
use tokio::io::AsyncReadExt as _;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::{session, terminal};
use crate::cli::{ExecArgs, Global};
use crate::exit::{Exit, Failure};
use crate::session::{Following, Session};

/// Read from the terminal at a time: a pasted page.
const CHUNK: usize = 16 * 1024;

pub async fn run(args: ExecArgs, global: &Global) -> Result<ExitCode, Failure> {
    let ExecArgs { service, replica, no_tty, command } = args;
    let session = session(global).await?;
    let (service, named) = session.resolve(&service).await?;
    let wants_terminal = !no_tty && terminal::is_interactive();
    let size = wants_terminal.then(terminal::size);
    let request = Exec { service, replica: replica.or(named), command, terminal: size, stdin: true };
    let mut stream = session.stream(&Request::Exec(request)).await?;
    // A program may rest for as long as the person in front of it.
    stream.may_rest();
    let raw = match size {
        Some(_) => Some(
            terminal::Mode::raw()
                .map_err(|error| Failure::general("the terminal cannot be used").why(error.to_string()))?,
        ),
        None => None,
    };
    let ended = talk(&session, stream, size.is_some()).await;
    drop(raw);
    ended
}

async fn talk(session: &Session, stream: Stream, resizes: bool) -> Result<ExitCode, Failure> {
    let Stream { mut sender, receiver } = stream;
    let mut following = Following::new(receiver);
    // Ways of being ended that would leave the terminal as it is.
    let mut terminated = listen(SignalKind::terminate())?;
    let mut hung_up = listen(SignalKind::hangup())?;
    let typing = pass_on(&mut sender, resizes);
    tokio::pin!(typing);
    let mut typed = false;
    loop {
        tokio::select! {
            next = following.next::<ExecOutput>() => match next {
                Ok(Some(ExecOutput::Stdout(bytes))) => write(&mut io::stdout().lock(), &bytes)?,
                Ok(Some(ExecOutput::Stderr(bytes))) => write(&mut io::stderr().lock(), &bytes)?,
                Ok(Some(ExecOutput::Exit { code })) => {
                    // Beyond a byte there is no code, only failure.
                    return Ok(ExitCode::from(u8::try_from(code).unwrap_or(Exit::General.code())));
                }
                Ok(Some(ExecOutput::Failed { reason })) => {
                    return Err(Failure::general("the command could not be run").why(reason));
                }
                Ok(None) => return Err(Failure::general("the connection ended before the command did")),
                Err(broken) => return Err(broken.into_failure(session)),
            },
            failed = &mut typing, if !typed => {
                typed = true;
                // What it still writes is worth more than why it takes nothing any more.
                if let Err(error) = failed {
                    tracing::info!(%error, "no more input");
                }
            }
            _ = terminated.recv() => return Ok(Exit::Interrupted.into()),
            _ = hung_up.recv() => return Ok(Exit::Interrupted.into()),
        }
    }
}

fn listen(kind: SignalKind) -> Result<Signal, Failure> {
    signal(kind).map_err(|error| Failure::general("signals cannot be received").why(error.to_string()))
}

/// What is typed, and the window's size whenever it changes.
async fn pass_on(sender: &mut Sender, resizes: bool) -> io::Result<()> {
    let mut stdin = tokio::io::stdin();
    let mut resized = signal(SignalKind::window_change())?;
    let mut chunk = vec![0; CHUNK];
    loop {
        let input = tokio::select! {
            read = stdin.read(&mut chunk) => match read? {
                0 => ExecInput::End,
                length => ExecInput::Bytes(Opaque(chunk[..length].to_vec())),
            },
            _ = resized.recv(), if resizes => ExecInput::Resize(terminal::size()),
        };
        let ends = matches!(input, ExecInput::End);
        sender.send(&input).await.map_err(io::Error::other)?;
        if ends {
            return sender.finish().await.map_err(io::Error::other);
        }
    }
}

fn write(out: &mut impl io::Write, bytes: &Opaque) -> Result<(), Failure> {
    let written = out.write_all(&bytes.0).and_then(|()| out.flush());
    written.map_err(|error| Failure::general("its output cannot be written").why(error.to_string()))
}

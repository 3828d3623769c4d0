//! The control plane behind the ports of this node: opened, kept, and opened again for as long as it cannot be.

use std::time::{Duration, Instant};

use orca_control::{Control, Front, Handle, RunError, StartError};
use orca_wire::cause::chain;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use crate::exit::{Exit, Failure};

/// Before a control plane that has failed is opened again; doubles up to the second.
const REOPEN_PAUSE: Duration = Duration::from_secs(1);
const REOPEN_PAUSE_MAX: Duration = Duration::from_secs(15);

/// How the control plane of this node stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    Opening,
    Open,
    Failed { why: String },
}

/// Keeps a control plane behind the ports. One that cannot be opened, or cannot go on, is opened again and again: a
/// disk that was full may have room, a key may be put back. What runs is not touched meanwhile, and requests are
/// served by the routes there are; nothing can be changed, and whoever asks is told why.
pub struct Keeper {
    pub config: orca_control::Config,
    pub front: Front,
    pub standing: watch::Sender<Standing>,
    pub ending: CancellationToken,
}

impl Keeper {
    /// Until it is told to end; or the key turns out at the start to be another cluster's, which only a person can
    /// have given, and had better see at once.
    pub async fn keep(self, mut opened: Option<(Control, Handle)>) -> Result<(), Failure> {
        let mut pause = REOPEN_PAUSE;
        let mut said = String::new();
        loop {
            let attempt = match opened.take() {
                Some(opened) => Ok(opened),
                None => tokio::select! {
                    attempt = Control::open(&self.config, &self.front) => attempt,
                    () = self.rest(Duration::MAX) => {
                        self.front.close().await;
                        return Ok(());
                    }
                },
            };
            let why = match attempt {
                Ok((control, handle)) => {
                    if !said.is_empty() {
                        info!("the control plane is open");
                    }
                    self.standing.send_replace(Standing::Open);
                    let begun = Instant::now();
                    let Err(fault) = self.run(control, handle).await else { return Ok(()) };
                    if matches!(fault, RunError::Endpoint(_)) {
                        // Nobody can be told anything any more, and it opens anew only with the process.
                        return Err(Failure::from_error(Exit::General, &fault));
                    }
                    if begun.elapsed() > REOPEN_PAUSE_MAX {
                        pause = REOPEN_PAUSE;
                        said.clear();
                    }
                    chain(&fault)
                }
                Err(fault) if fault.is_wrong_key() && *self.standing.borrow() == Standing::Opening => {
                    return Err(not_started(fault));
                }
                Err(fault) => chain(&fault),
            };
            if said != why {
                error!(
                    why,
                    "the control plane is not open: what runs goes on and is served, and nothing can be changed; it is \
                     opened as soon as that is put right"
                );
                said.clone_from(&why);
            }
            self.front.say(why.clone());
            self.standing.send_replace(Standing::Failed { why });
            self.rest(pause).await;
            if self.ending.is_cancelled() {
                self.front.close().await;
                return Ok(());
            }
            pause = (pause * 2).min(REOPEN_PAUSE_MAX);
        }
    }

    async fn run(&self, control: Control, handle: Handle) -> Result<(), RunError> {
        let mut running = std::pin::pin!(control.run());
        tokio::select! {
            ended = &mut running => ended,
            () = self.ending.cancelled() => {
                handle.shutdown();
                running.await
            }
        }
    }

    /// Answers whoever asks with the reason meanwhile; shorter if it is told to end.
    async fn rest(&self, pause: Duration) {
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = self.ending.cancelled() => {}
            never = self.front.answer_without_control() => match never {},
        }
    }
}

/// Why there is no control plane, as whoever starts it is told.
pub fn not_started(error: StartError) -> Failure {
    let failure = Failure::from_error(Exit::General, &error);
    match error {
        StartError::Http { .. } | StartError::Quic { .. } => {
            failure.fix("stop what uses it, or choose another with --listen ADDR:PORT")
        }
        _ => failure,
    }
}

/// Until it is known whether the control plane opens; an error if this process must not go on.
pub async fn decided(
    control: &mut JoinHandle<Result<(), Failure>>,
    standing: &mut watch::Receiver<Standing>,
) -> Result<(), Failure> {
    tokio::select! {
        // Without its sender it has ended, which the other branch knows more about.
        Ok(_) = standing.wait_for(|standing| *standing != Standing::Opening) => Ok(()),
        ended = control => ended.map_err(|panicked| Failure::from_error(Exit::General, &panicked))?,
    }
}

//! Goals on their way into effect: each is in the ledger before anything is done about it, since whoever starts here next
//! goes by the ledger, and would undo what it does not know, or do it twice. A disk may take seconds for that, and the
//! node has other things to see to: one goal is written at a time, beside everything else, and of those that come
//! meanwhile the newest is next.

use orca_cluster::goal::Goal;
use orca_wire::cause::chain;
use tokio::task::JoinHandle;
use tokio::time::{Duration, Instant, sleep_until};
use tracing::{error, info};

use crate::ledger::{Ledger, LedgerError};

/// Between two tries to write a goal into the ledger.
const LEDGER_PAUSE: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub struct Intake {
    ledger: Ledger,
    /// The newest that came, if it is not being written.
    waiting: Option<Goal>,
    writing: Option<(Goal, JoinHandle<Result<(), LedgerError>>)>,
    /// Why the last one could not be written, and when that is tried again.
    fault: Option<(String, Instant)>,
}

impl Intake {
    pub fn new(ledger: Ledger) -> Intake {
        Intake { ledger, waiting: None, writing: None, fault: None }
    }

    /// Has this goal written, unless one as new is on its way already.
    pub fn take(&mut self, goal: Goal) {
        let known = self.waiting.as_ref().or(self.writing.as_ref().map(|(goal, _)| goal));
        if known.is_none_or(|known| known.number < goal.number) {
            self.waiting = Some(goal);
        }
    }

    /// Why goals cannot be written at the moment.
    pub fn fault(&self) -> Option<&str> {
        self.fault.as_ref().map(|(fault, _)| fault.as_str())
    }

    /// The next goal that is in the ledger. Can be given up at any point and taken up again.
    pub async fn written(&mut self) -> Goal {
        loop {
            if self.writing.is_none() {
                if self.waiting.is_none() {
                    std::future::pending::<()>().await;
                }
                if let Some((_, again)) = self.fault {
                    sleep_until(again).await;
                }
                self.writing = self.waiting.take().map(|goal| {
                    let (ledger, written) = (self.ledger.clone(), goal.clone());
                    (goal, tokio::task::spawn_blocking(move || ledger.write(&written)))
                });
            }
            let Some((_, task)) = &mut self.writing else { continue };
            let result = task.await;
            let Some((goal, _)) = self.writing.take() else { continue };
            let fault = match result {
                Ok(Ok(())) => {
                    if self.fault.take().is_some() {
                        info!("the ledger can be written again");
                    }
                    return goal;
                }
                Ok(Err(fault)) => chain(&fault),
                Err(fault) => fault.to_string(),
            };
            if self.fault.is_none() {
                error!(
                    error = fault,
                    "the ledger cannot be written: what runs goes on, and nothing new begins here before it can"
                );
            }
            self.fault = Some((fault, Instant::now() + LEDGER_PAUSE));
            self.waiting.get_or_insert(goal);
        }
    }
}

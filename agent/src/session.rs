//! Finds a control node and keeps to it: goals come down, reports go up, errands are run. When it is lost, another
//! is sought; whatever runs goes on meanwhile.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use orca_cluster::goal::Goal;
use orca_cluster::limit::MODULE_BYTES_MAX;
use orca_cluster::replica::Observed;
use orca_wire::cause::chain;
use orca_wire::client::ClientError;
use orca_wire::message::agent::{AgentRequest, Attach, Blob, Errand, FromAgent, ToAgent};
use orca_wire::stream::StreamError;
use orca_wire::{Client, Connection, Stream};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tracing::{debug, info};

use crate::errand::Errands;

/// How long one try to reach a control node may take before it is said that there is none.
const DIAL_DEADLINE: Duration = Duration::from_secs(10);
/// How long the bytes of a module may fail to come before the transfer is given up.
const SILENCE_MAX: Duration = Duration::from_secs(10);
/// Between losing a control node and looking for it again; doubles up to the second while none lets us in.
const PAUSE: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// A handle; cheap to clone.
#[derive(Debug, Clone)]
pub struct Session {
    client: Arc<Client>,
    silence_max: Duration,
}

#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    #[error("no control node could be asked")]
    Client(#[from] ClientError),
    #[error("the transfer broke")]
    Stream(#[from] StreamError),
    #[error("it has {0} bytes; at most {MODULE_BYTES_MAX} are accepted")]
    TooLarge(u64),
    #[error("it ended after {got} of {size} bytes")]
    Short { got: u64, size: u64 },
}

impl Session {
    pub fn new(client: Client) -> Session {
        Session { client: Arc::new(client), silence_max: SILENCE_MAX }
    }

    /// The bytes of a module; nothing if no control node has them.
    pub async fn module(&self, digest: &str) -> Result<Option<Bytes>, FetchError> {
        let request = AgentRequest::Module { digest: digest.to_owned() };
        let mut stream = self.client.open(&request, DIAL_DEADLINE).await?;
        let size = match stream.next_within::<Blob>(DIAL_DEADLINE).await? {
            Blob::Missing => return Ok(None),
            Blob::Here { size } if size > MODULE_BYTES_MAX => return Err(FetchError::TooLarge(size)),
            Blob::Here { size } => size,
        };
        let mut bytes = BytesMut::new();
        while (bytes.len() as u64) < size {
            let chunk = timeout(self.silence_max, stream.next_bytes()).await;
            match chunk.map_err(|_| StreamError::Deadline(self.silence_max))?? {
                Some(chunk) => bytes.extend_from_slice(&chunk),
                None => return Err(FetchError::Short { got: bytes.len() as u64, size }),
            }
        }
        Ok(Some(bytes.freeze()))
    }

    /// Keeps a control node until the agent ends: sends each new report, hands on each goal.
    pub async fn run(
        self,
        mut reports: watch::Receiver<Option<Arc<Observed>>>,
        goals: mpsc::Sender<Goal>,
        errands: Errands,
    ) {
        let mut pause = PAUSE;
        loop {
            match self.client.connection(DIAL_DEADLINE).await {
                Ok(connection) => {
                    pause = PAUSE;
                    info!(address = %connection.remote_address(), "control node found");
                    let lost = attach(&connection, &mut reports, &goals, &errands).await;
                    info!(reason = lost, "control node lost");
                }
                Err(error) => {
                    debug!(error = chain(&error), "no control node answers");
                    pause = (pause * 2).min(PAUSE_MAX);
                }
            }
            if goals.is_closed() {
                return;
            }
            tokio::time::sleep(pause).await;
        }
    }
}

/// Serves one connection to its end; says why it ended.
async fn attach(
    connection: &Connection,
    reports: &mut watch::Receiver<Option<Arc<Observed>>>,
    goals: &mpsc::Sender<Goal>,
    errands: &Errands,
) -> String {
    let attach = AgentRequest::Attach(Attach { version: env!("CARGO_PKG_VERSION").to_owned() });
    let stream = match connection.open(&attach).await {
        Ok(stream) => stream,
        Err(error) => return chain(&error),
    };
    let Stream { mut sender, mut receiver } = stream;
    let up = async {
        reports.mark_changed();
        loop {
            if reports.changed().await.is_err() {
                return "the agent ends".to_owned();
            }
            let Some(report) = reports.borrow_and_update().clone() else { continue };
            let report = FromAgent::Report(Box::new(Observed::clone(&report)));
            if let Err(error) = sender.send(&report).await {
                return chain(&error);
            }
        }
    };
    let down = async {
        loop {
            match receiver.next::<ToAgent>().await {
                Ok(Some(ToAgent::Goal(goal))) => {
                    if goals.send(*goal).await.is_err() {
                        return "the agent ends".to_owned();
                    }
                }
                Ok(None) => return "it closed the session".to_owned(),
                Err(error) => return chain(&error),
            }
        }
    };
    let errands = errands.clone();
    let asked = connection.serve(move |errand: Errand, stream| errands.clone().run(errand, stream));
    tokio::select! {
        reason = up => reason,
        reason = down => reason,
        error = asked => chain(&error),
    }
}

#[cfg(test)]
mod tests {

    use orca_wire::Plane;

    use super::*;

    use crate::testing::control_and_agent;

    /// A control node's part: of any module half the bytes come, and of one called `whole` the rest as well.
    async fn give(request: AgentRequest, mut stream: Stream, given_up: mpsc::UnboundedSender<()>) {
        let AgentRequest::Module { digest } = request else { panic!("{request:?}") };
        stream.send(&Blob::Here { size: 6 }).await.unwrap();
        stream.send_bytes(b"abc").await.unwrap();
        if digest == "whole" {
            stream.send_bytes(b"def").await.unwrap();
            stream.finish().await.unwrap();
        } else {
            stream.closed().await;
            given_up.send(()).unwrap();
        }
    }

    #[tokio::test]
    async fn a_module_whose_bytes_stop_coming_is_given_up_and_the_next_one_comes() {
        let (server, mut accepted, agent) = control_and_agent();
        let (tell, mut given_up) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            let connection = accepted.accept().await.unwrap();
            connection.serve(move |request, stream| give(request, stream, tell.clone())).await
        });
        let client = Client::new(agent, Plane::Agent, vec![server.local_address().unwrap()]);
        let session = Session::new(client);
        let impatient = Session { silence_max: Duration::from_millis(1), ..session.clone() };

        let transfers = async {
            let failed = impatient.module("stalled").await;
            assert!(
                matches!(failed, Err(FetchError::Stream(StreamError::Deadline(limit))) if limit == impatient.silence_max),
                "{failed:?}"
            );
            given_up.recv().await.unwrap();
            assert_eq!(session.module("whole").await.unwrap().unwrap(), "abcdef");
        };
        timeout(DIAL_DEADLINE, transfers).await.expect("it waits for bytes that do not come");
    }
}

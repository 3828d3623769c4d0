//! The agent plane: which agents are connected, goals out, reports in, modules served, errands opened. Which node an
//! agent is comes from its certificate and never from what it says; the newest session of a node is the one that
//! counts. There is no queue: only the newest goal matters to a node, and only the newest report to us.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use orca_cluster::goal::Goal;
use orca_cluster::id::NodeId;
use orca_wire::cause::chain;
use orca_wire::message::agent::{AgentRequest, Blob, Errand, FromAgent, ToAgent};
use orca_wire::stream::StreamError;
use orca_wire::{Connection, Peer, Stream};
use tokio::io::AsyncReadExt as _;
use tokio::sync::watch;
use tracing::{debug, error, info, warn};

use crate::blob::Blobs;
use crate::inbox::Inbox;

/// Bytes of a module read from disk at a time.
const CHUNK_LENGTH: usize = 64 * 1024;

/// The connected agents. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Sessions {
    held: Arc<Mutex<Held>>,
}

#[derive(Debug, Default)]
struct Held {
    /// Numbers sessions, so that the end of an old one is not taken for the end of its successor.
    opened: u64,
    sessions: BTreeMap<NodeId, Session>,
}

#[derive(Debug)]
struct Session {
    serial: u64,
    connection: Connection,
    goal: watch::Sender<Option<Arc<Goal>>>,
}

#[derive(Debug, thiserror::Error)]
pub enum ErrandError {
    #[error("node {0} is not connected")]
    NotConnected(NodeId),
    #[error("node {node} could not be asked")]
    Stream {
        node: NodeId,
        #[source]
        source: StreamError,
    },
}

impl Sessions {
    /// Gives the node its goal; one that is not connected gets it when it comes back, since its brain is told then.
    pub fn send_goal(&self, node: NodeId, goal: Goal) {
        self.with(|held| {
            if let Some(session) = held.sessions.get(&node) {
                session.goal.send_replace(Some(Arc::new(goal)));
            }
        });
    }

    /// The nodes whose agents are connected.
    pub fn connected(&self) -> Vec<NodeId> {
        self.with(|held| held.sessions.keys().copied().collect())
    }

    /// Asks a node's agent for something on behalf of a person.
    pub async fn errand(&self, node: NodeId, errand: &Errand) -> Result<Stream, ErrandError> {
        let connection = self.with(|held| held.sessions.get(&node).map(|session| session.connection.clone()));
        let connection = connection.ok_or(ErrandError::NotConnected(node))?;
        let opened = connection.open(errand).await.map_err(|source| ErrandError::Stream { node, source });
        opened.map(|mut stream| {
            // It is as fast as whoever reads it, and what that leaves unread keeps no report of the node from us.
            stream.may_rest();
            stream
        })
    }

    fn open(&self, node: NodeId, connection: Connection) -> (u64, watch::Receiver<Option<Arc<Goal>>>) {
        let (goal, goals) = watch::channel(None);
        let (serial, older) = self.with(|held| {
            held.opened += 1;
            let session = Session { serial: held.opened, connection, goal };
            (held.opened, held.sessions.insert(node, session))
        });
        if let Some(older) = older {
            older.connection.close("this node has a newer session");
        }
        (serial, goals)
    }

    /// Whether that was the node's newest session.
    fn close(&self, node: NodeId, serial: u64) -> bool {
        self.with(|held| {
            let newest = held.sessions.get(&node).is_some_and(|session| session.serial == serial);
            if newest {
                held.sessions.remove(&node);
            }
            newest
        })
    }

    fn with<T>(&self, act: impl FnOnce(&mut Held) -> T) -> T {
        // Whole values go in and out, so a panic elsewhere has left it whole.
        act(&mut self.held.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// What serving agents takes.
#[derive(Debug, Clone)]
pub struct AgentPlane {
    pub sessions: Sessions,
    pub inbox: Arc<Inbox>,
    pub blobs: Blobs,
}

impl AgentPlane {
    /// Serves one agent's connection to its end.
    pub async fn serve(self, connection: Connection) {
        let &Peer::Node { node, .. } = connection.peer() else {
            // The endpoint lets nobody else open this plane.
            connection.close("the agent plane is for nodes");
            return;
        };
        let (plane, ours) = (self, connection.clone());
        let end = connection
            .serve(move |request: AgentRequest, stream| {
                let (plane, connection) = (plane.clone(), ours.clone());
                async move {
                    let served = match request {
                        AgentRequest::Attach(attach) => {
                            info!(%node, version = attach.version, address = %connection.remote_address(), "agent attached");
                            plane.attach(node, connection, stream).await
                        }
                        AgentRequest::Module { digest } => plane.module(&digest, stream).await,
                    };
                    if let Err(error) = served {
                        debug!(%node, error = chain(&error), "a request of an agent ended early");
                    }
                }
            })
            .await;
        debug!(%node, %end, "an agent's connection ended");
    }

    /// Goals down, reports up, until one of the two ends.
    async fn attach(&self, node: NodeId, connection: Connection, stream: Stream) -> Result<(), StreamError> {
        let (serial, mut goals) = self.sessions.open(node, connection);
        let _session = Closing { sessions: self.sessions.clone(), inbox: self.inbox.clone(), node, serial };
        self.inbox.connected(node);
        let Stream { mut sender, mut receiver } = stream;
        let down = async {
            while goals.changed().await.is_ok() {
                let goal = goals.borrow_and_update().clone();
                let Some(goal) = goal else { continue };
                match sender.send(&ToAgent::Goal(Box::new(Goal::clone(&goal)))).await {
                    // Ending the session would bring the agent back for the same goal at once, for ever.
                    Err(StreamError::Encode(fault)) => {
                        error!(%node, number = ?goal.number, fault = chain(&fault), "a goal is too large and is not sent");
                    }
                    sent => sent?,
                }
            }
            sender.finish().await
        };
        let up = async {
            while let Some(FromAgent::Report(observed)) = receiver.next().await? {
                self.inbox.report(node, *observed);
            }
            Ok(())
        };
        tokio::select! {
            ended = down => ended,
            ended = up => ended,
        }
    }

    async fn module(&self, digest: &str, mut stream: Stream) -> Result<(), StreamError> {
        let (mut file, size) = match self.blobs.read(digest).await {
            Ok(Some(found)) => found,
            Ok(None) => return stream.answer(&Blob::Missing).await,
            Err(error) => {
                warn!(error = chain(&error), "a module cannot be given to a node");
                return stream.answer(&Blob::Missing).await;
            }
        };
        stream.send(&Blob::Here { size }).await?;
        let mut chunk = vec![0; CHUNK_LENGTH];
        loop {
            match file.read(&mut chunk).await {
                Ok(0) => return stream.finish().await,
                Ok(length) => stream.send_bytes(&Bytes::copy_from_slice(&chunk[..length])).await?,
                Err(error) => {
                    // Dropping the stream tells the node that it has not all.
                    warn!(%error, digest, "a module could not be read to its end");
                    return Ok(());
                }
            }
        }
    }
}

/// Ends the session when its stream is dropped, however that comes.
struct Closing {
    sessions: Sessions,
    inbox: Arc<Inbox>,
    node: NodeId,
    serial: u64,
}

impl Drop for Closing {
    fn drop(&mut self) {
        if self.sessions.close(self.node, self.serial) {
            self.inbox.gone(self.node);
            info!(node = %self.node, "agent gone");
        }
    }
}

#[cfg(test)]
pub mod tests {
    use std::net::Ipv4Addr;
    use std::time::Duration;

    use orca_cluster::id::{ClusterId, ServiceName};
    use orca_wire::identity::{Authority, KeyRequest};
    use orca_wire::message::agent::LogsErrand;
    use orca_wire::{Access, Endpoint, Plane, Wanted};
    use tokio::sync::mpsc;
    use tokio::time::timeout;

    use super::*;
    use crate::clock::now;

    pub const SOON: Duration = Duration::from_secs(10);
    const NODE: NodeId = NodeId(2);

    /// An agent's end of a connection, ours, and what keeps them open.
    pub async fn connections() -> (Connection, Connection, (Endpoint, Endpoint)) {
        let authority = Authority::create(ClusterId(7), now());
        let node = |node, raft| {
            let request = KeyRequest::generate();
            let issued = authority.issue_node(&request.request(), node, raft, now()).unwrap();
            request.into_identity(&issued).unwrap()
        };
        let address = (Ipv4Addr::LOCALHOST, 0).into();
        let (server, mut accepted) = Endpoint::server(address, node(NodeId(1), Some(1)), |_: &_| Ok(())).unwrap();
        let agent = Endpoint::client(Access::Certificate(node(NODE, None))).unwrap();
        let dialed = agent.dial(server.local_address().unwrap(), Plane::Agent, Wanted::Control).await.unwrap();
        (dialed, accepted.accept().await.unwrap(), (server, agent))
    }

    #[tokio::test]
    async fn logs_that_nobody_reads_on_hold_up_nothing_else_of_their_node() {
        // Together more than a connection takes unread.
        const RESTING: usize = 20;
        const ALMOST_FULL: usize = 15;
        let (agent, ours, _endpoints) = connections().await;
        let (tell, mut told) = mpsc::unbounded_channel();
        let serving = agent.serve(move |_: Errand, mut stream| {
            let tell = tell.clone();
            async move {
                for _ in 0..ALMOST_FULL {
                    stream.send_bytes(&[0; 64 << 10]).await.unwrap();
                }
                tell.send(()).unwrap();
                stream.closed().await;
            }
        });
        let sessions = Sessions::default();
        sessions.open(NODE, ours);
        let asking = async {
            let service: ServiceName = "shop/web".parse().unwrap();
            let (replica, module, since, tail, follow) = (orca_cluster::id::ReplicaId(1), false, None, None, true);
            let errand = Errand::Logs(LogsErrand { replica, service, module, since, tail, follow });
            let mut resting = Vec::new();
            for _ in 0..RESTING {
                resting.push(sessions.errand(NODE, &errand).await.unwrap());
            }
            for _ in 0..RESTING {
                timeout(SOON, told.recv()).await.expect("they hold each other up").unwrap();
            }
        };
        tokio::select! {
            _ = serving => panic!("the connection ended"),
            () = asking => {}
        }
    }
}

//! Raft between control nodes over the peer plane. A call is one stream: its length and its bytes there, the same
//! back. Each peer has one connection for each lane, because packets of one connection share a congestion window.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use orca_wire::cause::chain;
use orca_wire::stream::StreamError;
use orca_wire::{Connection, Endpoint, Peer, Plane, Stream, Wanted};
use tokio::time::timeout;
use tracing::debug;

use crate::raft::network::MESSAGE_BYTES_MAX;
use crate::raft::{CallError, Lane, PeerTransport, Raft, RaftId};

/// Calls other control nodes. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Peers {
    endpoint: Endpoint,
    connections: Arc<Mutex<HashMap<(RaftId, Lane), Connection>>>,
}

impl Peers {
    pub fn new(endpoint: Endpoint) -> Peers {
        Peers { endpoint, connections: Arc::default() }
    }

    async fn connection(&self, to: RaftId, address: &str, lane: Lane) -> Result<Connection, CallError> {
        let known = self.with(|connections| connections.get(&(to, lane)).cloned());
        if let Some(connection) = known.filter(|connection| !connection.is_closed()) {
            return Ok(connection);
        }
        let unreachable = |why: String| CallError::Unreachable(format!("{to} at {address}: {why}"));
        let found: Option<SocketAddr> =
            tokio::net::lookup_host(address).await.map_err(|error| unreachable(error.to_string()))?.next();
        let found = found.ok_or_else(|| unreachable("the name has no address".to_owned()))?;
        let dialed = self.endpoint.dial(found, Plane::Peer, Wanted::Raft(to.0)).await;
        let connection = dialed.map_err(|error| unreachable(chain(&error)))?;
        self.with(|connections| connections.insert((to, lane), connection.clone()));
        Ok(connection)
    }

    fn with<T>(&self, act: impl FnOnce(&mut HashMap<(RaftId, Lane), Connection>) -> T) -> T {
        // Whole values go in and out, so a panic elsewhere has left it whole.
        act(&mut self.connections.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl PeerTransport for Peers {
    async fn call(
        &self,
        to: RaftId,
        address: &str,
        lane: Lane,
        request: Bytes,
        deadline: Duration,
    ) -> Result<Bytes, CallError> {
        let call = async {
            let connection = self.connection(to, address, lane).await?;
            let answered = async {
                let mut stream = connection.open(&request.len()).await?;
                stream.send_bytes(&request).await?;
                stream.finish().await?;
                let length = stream.next().await?.ok_or(StreamError::Ended)?;
                receive(&mut stream, length).await
            };
            answered.await.map_err(|error: StreamError| CallError::Unreachable(format!("{to}: {error}")))
        };
        timeout(deadline, call).await.unwrap_or(Err(CallError::TimedOut))
    }
}

/// Answers another control node's calls until its connection ends.
pub async fn serve(raft: Raft, connection: Connection) {
    let &Peer::Node { raft: Some(from), .. } = connection.peer() else {
        // The endpoint lets nobody else open this plane.
        connection.close("the peer plane is for voters");
        return;
    };
    let from = RaftId(from);
    let end = connection
        .serve(move |length: usize, mut stream: Stream| {
            let raft = raft.clone();
            async move {
                let answered = async {
                    let request = receive(&mut stream, length).await?;
                    let answer = raft.handle(from, request).await;
                    stream.send(&answer.len()).await?;
                    stream.send_bytes(&answer).await?;
                    stream.finish().await
                };
                if let Err(error) = answered.await {
                    debug!(%from, error = chain(&error), "a call of a peer ended early");
                }
            }
        })
        .await;
    debug!(%from, %end, "a peer's connection ended");
}

async fn receive(stream: &mut Stream, length: usize) -> Result<Bytes, StreamError> {
    if length > MESSAGE_BYTES_MAX {
        return Err(StreamError::NotUnderstood);
    }
    // The length is only a limit: memory is taken as bytes come.
    let mut bytes = BytesMut::new();
    while bytes.len() < length {
        bytes.extend_from_slice(&stream.next_bytes().await?.ok_or(StreamError::Ended)?);
    }
    Ok(bytes.freeze())
}

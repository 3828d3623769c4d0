//! Openraft's network over whatever carries bytes between control nodes ([`PeerTransport`]).
//!
//! Absent: connections, retries, trust. A call is one request and one answer under a deadline; openraft decides
//! whether to ask again. The transport vouches for *who* is at the other end, and both ends check that it is who
//! was meant: an address may have passed to another node, and a node may only vote and lead in its own name.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Timeout, Unreachable};
use openraft::network::RPCOption;
use openraft::raft::TransferLeaderRequest;
use openraft::{OptionalSend, RPCTypes, RaftNetworkFactory, RaftNetworkV2};
use orca_cluster::state::State;

use super::codec::{self, Appended, Ask, Ballot, CodecError, Request, Response, Snapshot};
use super::log::ENTRIES_BYTES_MAX;
use super::machine::Machine;
use super::{
    Peer, RaftAppend, RaftAppended, RaftId, RaftSnapshot, RaftSnapshotAnswer, RaftTransferAnswer, RaftVote,
    RaftVoteAnswer, RaftVoteRequest, Types,
};

/// No message between peers is larger; a transport may cut off what is. A snapshot is the whole [`State`].
pub const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// Calls that must not wait for each other: a heartbeat stuck behind a snapshot looks like a dead leader. A
/// transport gives each lane its own connection or stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Lane {
    /// Small and urgent: heartbeats and votes.
    Pulse,
    /// The log, in order.
    Log,
    /// Large and rare.
    Snapshot,
}

/// Why a call has no answer. It may have arrived all the same.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    #[error("no answer in time")]
    TimedOut,
    #[error("cannot be reached: {0}")]
    Unreachable(String),
}

/// What carries calls to other control nodes.
pub trait PeerTransport: Clone + Send + Sync + 'static {
    /// Brings `request` to the control node `to` at `address` and its answer back, within `deadline`. It must
    /// fail if the node there is not `to`, by its certificate.
    fn call(
        &self,
        to: RaftId,
        address: &str,
        lane: Lane,
        request: Bytes,
        deadline: Duration,
    ) -> impl Future<Output = Result<Bytes, CallError>> + Send;
}

/// Makes a client for each peer and lane.
#[derive(Debug, Clone)]
pub struct Network<T> {
    id: RaftId,
    transport: T,
}

impl<T: PeerTransport> Network<T> {
    pub fn new(id: RaftId, transport: T) -> Network<T> {
        Network { id, transport }
    }

    fn client(&self, to: RaftId, peer: &Peer, lane: Lane) -> Client<T> {
        let address = peer.address.clone();
        Client { from: self.id, to, address, lane, transport: self.transport.clone() }
    }
}

impl<T: PeerTransport> RaftNetworkFactory<Types> for Network<T> {
    type Network = Client<T>;

    async fn new_client(&mut self, target: RaftId, peer: &Peer) -> Client<T> {
        self.client(target, peer, Lane::Log)
    }

    async fn new_heartbeat_client(&mut self, target: RaftId, peer: &Peer) -> Client<T> {
        self.client(target, peer, Lane::Pulse)
    }

    async fn new_snapshot_client(&mut self, target: RaftId, peer: &Peer) -> Client<T> {
        self.client(target, peer, Lane::Snapshot)
    }
}

/// One peer, on one lane.
#[derive(Debug)]
pub struct Client<T> {
    from: RaftId,
    to: RaftId,
    address: String,
    lane: Lane,
    transport: T,
}

impl<T: PeerTransport> Client<T> {
    async fn ask<S: serde::Serialize>(
        &self,
        kind: RPCTypes,
        lane: Lane,
        ask: Ask<S>,
        option: &RPCOption,
    ) -> Result<Response, RPCError<Types>> {
        let deadline = option.soft_ttl();
        let timed_out = || Timeout { action: kind, id: self.from, target: self.to, timeout: deadline };
        let request = codec::encode(&Request { to: self.to, ask }).into();
        let call = self.transport.call(self.to, &self.address, lane, request, deadline);
        // The transport keeps the deadline too; but a lost answer that nobody times out stops replication for
        // good, which is too much to trust another file with.
        let answer = match tokio::time::timeout(deadline, call).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(CallError::Unreachable(why))) => return Err(Unreachable::from_string(why).into()),
            Ok(Err(CallError::TimedOut)) | Err(_) => return Err(timed_out().into()),
        };
        match codec::decode(&answer) {
            // It would refuse again at once: wait before the next try, as for a node that is away.
            Ok(Response::Refused(why)) => Err(Unreachable::from_string(why).into()),
            Ok(answer) => Ok(answer),
            Err(error) => Err(NetworkError::new(&error).into()),
        }
    }
}

fn unexpected() -> RPCError<Types> {
    NetworkError::from_string("the peer answered another question").into()
}

impl<T: PeerTransport> RaftNetworkV2<Types> for Client<T> {
    type SnapshotData = Arc<State>;

    async fn append_entries(
        &mut self,
        request: RaftAppend,
        option: RPCOption,
    ) -> Result<RaftAppended, RPCError<Types>> {
        let total = request.entries.len();
        let mut entries = Vec::with_capacity(total);
        let mut bytes = 0;
        let mut last = None;
        for entry in request.entries {
            let entry = codec::Entry::from(entry);
            bytes += codec::encode(&entry).len();
            if !entries.is_empty() && bytes > ENTRIES_BYTES_MAX {
                break;
            }
            last = Some(codec::LogId { term: entry.term, index: entry.index });
            entries.push(entry);
        }
        let cut = entries.len() < total;
        let ask: Ask = Ask::Append {
            vote: (&request.vote).into(),
            previous: request.prev_log_id.map(Into::into),
            committed: request.leader_commit.map(Into::into),
            entries,
        };
        match self.ask(RPCTypes::AppendEntries, self.lane, ask, &option).await? {
            Response::Append(Appended::All) if cut => Ok(Appended::Upto(last).into()),
            Response::Append(answer) => Ok(answer.into()),
            _ => Err(unexpected()),
        }
    }

    async fn vote(&mut self, request: RaftVoteRequest, option: RPCOption) -> Result<RaftVoteAnswer, RPCError<Types>> {
        let ask: Ask = Ask::Vote(request.into());
        vote_answer(self.ask(RPCTypes::Vote, Lane::Pulse, ask, &option).await?)
    }

    async fn pre_vote(
        &mut self,
        request: RaftVoteRequest,
        option: RPCOption,
    ) -> Result<RaftVoteAnswer, RPCError<Types>> {
        let ask: Ask = Ask::PreVote(request.into());
        vote_answer(self.ask(RPCTypes::Vote, Lane::Pulse, ask, &option).await?)
    }

    async fn full_snapshot(
        &mut self,
        vote: RaftVote,
        snapshot: RaftSnapshot,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        option: RPCOption,
    ) -> Result<RaftSnapshotAnswer, StreamingError<Types>> {
        let whole = Snapshot::new(&snapshot.meta, &*snapshot.snapshot);
        let ask = Ask::Snapshot { vote: (&vote).into(), snapshot: Box::new(whole) };
        let sent = self.ask(RPCTypes::InstallSnapshot, Lane::Snapshot, ask, &option);
        tokio::select! {
            closed = cancel => Err(closed.into()),
            answer = sent => match answer? {
                Response::Snapshot { vote } => Ok(RaftSnapshotAnswer::new(vote.into())),
                _ => Err(unexpected().into()),
            },
        }
    }

    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<Types>,
        option: RPCOption,
    ) -> Result<RaftTransferAnswer, RPCError<Types>> {
        let ask = Ask::from(&request);
        match self.ask(RPCTypes::TransferLeader, Lane::Pulse, ask, &option).await? {
            Response::Transferred { accepted: true } => Ok(Ok(())),
            Response::Transferred { accepted: false } => {
                Err(NetworkError::from_string("the peer is not ready to lead").into())
            }
            _ => Err(unexpected()),
        }
    }
}

fn vote_answer(answer: Response) -> Result<RaftVoteAnswer, RPCError<Types>> {
    match answer {
        Response::Vote { vote, granted, last } => {
            let vote = RaftVote::from(vote);
            Ok(RaftVoteAnswer::new(vote, last.map(Into::into), granted))
        }
        _ => Err(unexpected()),
    }
}

/// Answers what the peer `from` asked. Never fails: what cannot be answered is refused, with the reason.
pub async fn serve(raft: &openraft::Raft<Types, Machine>, id: RaftId, from: RaftId, request: &[u8]) -> Vec<u8> {
    if request.len() > MESSAGE_BYTES_MAX {
        return refuse("the request is too large");
    }
    let answer = match codec::decode::<Request>(request) {
        Ok(request) => answer(raft, id, from, request).await,
        Err(error) => Err(error.into()),
    };
    match answer {
        Ok(answer) => codec::encode(&answer),
        Err(refusal) => refuse(&refusal.to_string()),
    }
}

pub fn refuse(why: &str) -> Vec<u8> {
    codec::encode(&Response::Refused(why.to_owned()))
}

#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error(transparent)]
    Codec(#[from] CodecError),
    #[error("this is {id}, not {to}")]
    NotMe { id: RaftId, to: RaftId },
    #[error("{from} spoke in the name of {claimed}")]
    NotYou { from: RaftId, claimed: RaftId },
    #[error("raft has stopped: {0}")]
    Stopped(io::Error),
}

fn stopped(error: impl std::error::Error + Send + Sync + 'static) -> ServeError {
    ServeError::Stopped(io::Error::other(error))
}

async fn answer(
    raft: &openraft::Raft<Types, Machine>,
    id: RaftId,
    from: RaftId,
    request: Request,
) -> Result<Response, ServeError> {
    if request.to != id {
        return Err(ServeError::NotMe { id, to: request.to });
    }
    let claimed = match &request.ask {
        Ask::Append { vote, .. } | Ask::Snapshot { vote, .. } | Ask::Transfer { from: vote, .. } => vote.node,
        Ask::Vote(Ballot { vote, .. }) | Ask::PreVote(Ballot { vote, .. }) => vote.node,
    };
    if claimed != from {
        return Err(ServeError::NotYou { from, claimed });
    }
    Ok(match request.ask {
        Ask::Append { vote, previous, committed, entries } => {
            let request = codec::append(vote, previous, committed, entries)?;
            Response::Append(raft.append_entries(request).await.map_err(stopped)?.into())
        }
        Ask::PreVote(ballot) => raft.pre_vote(ballot.into()).await.map_err(stopped)?.into(),
        Ask::Vote(ballot) => raft.vote(ballot.into()).await.map_err(stopped)?.into(),
        Ask::Snapshot { vote, snapshot } => {
            let (meta, state) = snapshot.open()?;
            let snapshot = RaftSnapshot { meta, snapshot: Arc::new(state) };
            let answer = raft.install_full_snapshot(vote.into(), snapshot).await.map_err(stopped)?;
            Response::Snapshot { vote: (&answer.vote).into() }
        }
        Ask::Transfer { from, to, last } => {
            let request = TransferLeaderRequest::new(from.into(), to, last.map(Into::into));
            raft.handle_transfer_leader(request).await.map_err(stopped)?.into()
        }
    })
}

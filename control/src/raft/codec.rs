//! How what openraft knows is written, on disk and to peers.
//!
//! Openraft's own types change between releases, so none of them is ever serialised (its `serde` feature is off:
//! it would not compile). They are copied into the structs below, written as JSON, and sealed in a
//! [frame](crate::store::frame). JSON, because the entries hold people's specifications, which must be readable
//! in ten years, and because at this size nothing is gained by another. `tests/golden` holds one of each.

use std::collections::{BTreeMap, BTreeSet};

use openraft::vote::leader_id_std;
use orca_cluster::command;
use orca_cluster::state::State;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{Change, RaftTransferAnswer};
use super::{
    Peer, RaftAppend, RaftAppended, RaftEntry, RaftId, RaftLogId, RaftMembership, RaftPayload, RaftSnapshotMeta,
    RaftStoredMembership, RaftTransfer, RaftVote, RaftVoteAnswer, RaftVoteRequest, Types,
};
use crate::store::frame::{self, FrameError, Kind};

/// Bytes that are not what they should be. Says which, and how so.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    #[error("the {what} is damaged: {error}")]
    Damaged { what: &'static str, error: FrameError },
    #[error("the {what} is whole and makes no sense")]
    Meaningless {
        what: &'static str,
        #[source]
        source: serde_json::Error,
    },
    #[error("the {what} contradicts itself: {why}")]
    Contradiction { what: &'static str, why: &'static str },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogId {
    pub term: u64,
    pub index: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vote {
    pub term: u64,
    pub node: RaftId,
    pub committed: bool,
}

/// Voters are a list of sets: while they change, a decision needs a majority of each.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    pub voters: Vec<BTreeSet<RaftId>>,
    pub nodes: BTreeMap<RaftId, Peer>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Entry {
    pub term: u64,
    pub index: u64,
    pub payload: Payload,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Payload {
    Blank,
    Change(command::Entry),
    Membership(Membership),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Snapshot<S = State> {
    pub last: Option<LogId>,
    pub membership_at: Option<LogId>,
    pub membership: Membership,
    pub state: S,
}

/// Whose store this is. A file copied to another node, or kept for another cluster, must not vote.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub cluster: String,
    pub id: RaftId,
}

/// What one control node asks another. `to` is checked: an address may have passed to another node.
#[derive(Debug, Serialize, Deserialize)]
pub struct Request<S = State> {
    pub to: RaftId,
    pub ask: Ask<S>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ask<S = State> {
    Append { vote: Vote, previous: Option<LogId>, committed: Option<LogId>, entries: Vec<Entry> },
    PreVote(Ballot),
    Vote(Ballot),
    Snapshot { vote: Vote, snapshot: Box<Snapshot<S>> },
    Transfer { from: Vote, to: RaftId, last: Option<LogId> },
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Ballot {
    pub vote: Vote,
    pub last: Option<LogId>,
    pub transfer: bool,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Response {
    Append(Appended),
    Vote { vote: Vote, granted: bool, last: Option<LogId> },
    Snapshot { vote: Vote },
    Transferred { accepted: bool },
    Refused(String),
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Appended {
    All,
    Upto(Option<LogId>),
    Conflict,
    HigherVote(Vote),
}

/// A value with a frame of its own.
pub trait Framed {
    const KIND: Kind;
    const WHAT: &'static str;
}

macro_rules! framed {
    ($($type:ty: $kind:ident, $what:literal;)*) => {$(
        impl Framed for $type {
            const KIND: Kind = Kind::$kind;
            const WHAT: &'static str = $what;
        }
    )*};
}

framed! {
    Entry: Entry, "log entry";
    Vote: Vote, "vote";
    Committed: Committed, "record of what is committed";
    Purged: Purged, "record of what was purged";
    Identity: Identity, "identity of the store";
    Response: Response, "answer of a peer";
}

impl<S> Framed for Snapshot<S> {
    const KIND: Kind = Kind::Snapshot;
    const WHAT: &'static str = "snapshot";
}

impl<S> Framed for Request<S> {
    const KIND: Kind = Kind::Request;
    const WHAT: &'static str = "request of a peer";
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Committed(pub Option<LogId>);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Purged(pub LogId);

pub fn encode<T: Framed + Serialize>(value: &T) -> Vec<u8> {
    let payload = serde_json::to_vec(value).expect("our types have string keys and no fallible serialisers");
    frame::seal(T::KIND, &payload)
}

pub fn decode<T: Framed + DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    let payload = frame::open(T::KIND, bytes).map_err(|error| CodecError::Damaged { what: T::WHAT, error })?;
    serde_json::from_slice(payload).map_err(|source| CodecError::Meaningless { what: T::WHAT, source })
}

impl From<RaftLogId> for LogId {
    fn from(id: RaftLogId) -> LogId {
        LogId { term: *id.leader_id, index: id.index }
    }
}

impl From<LogId> for RaftLogId {
    fn from(id: LogId) -> RaftLogId {
        RaftLogId::new_term_index(id.term, id.index)
    }
}

impl From<&RaftVote> for Vote {
    fn from(vote: &RaftVote) -> Vote {
        Vote { term: vote.leader_id.term, node: vote.leader_id.voted_for, committed: vote.committed }
    }
}

impl From<Vote> for RaftVote {
    fn from(vote: Vote) -> RaftVote {
        let leader_id = leader_id_std::LeaderId { term: vote.term, voted_for: vote.node };
        RaftVote { leader_id, committed: vote.committed }
    }
}

impl From<&RaftMembership> for Membership {
    fn from(membership: &RaftMembership) -> Membership {
        Membership {
            voters: membership.get_joint_config().clone(),
            nodes: membership.nodes().map(|(id, peer)| (*id, peer.clone())).collect(),
        }
    }
}

impl TryFrom<Membership> for RaftMembership {
    type Error = CodecError;
    fn try_from(membership: Membership) -> Result<RaftMembership, CodecError> {
        // What openraft calls the default membership it refuses to build: that of a node nobody has met yet.
        if membership.voters.is_empty() && membership.nodes.is_empty() {
            return Ok(RaftMembership::default());
        }
        RaftMembership::new(membership.voters, membership.nodes).map_err(|_| CodecError::Contradiction {
            what: "membership",
            why: "a voter is unknown, or a set of voters is empty",
        })
    }
}

impl From<RaftEntry> for Entry {
    fn from(entry: RaftEntry) -> Entry {
        let payload = match entry.payload {
            RaftPayload::Blank => Payload::Blank,
            RaftPayload::Normal(Change(change)) => Payload::Change(change),
            RaftPayload::Membership(membership) => Payload::Membership((&membership).into()),
        };
        Entry { term: *entry.log_id.leader_id, index: entry.log_id.index, payload }
    }
}

impl TryFrom<Entry> for RaftEntry {
    type Error = CodecError;
    fn try_from(entry: Entry) -> Result<RaftEntry, CodecError> {
        let payload = match entry.payload {
            Payload::Blank => RaftPayload::Blank,
            Payload::Change(change) => RaftPayload::Normal(Change(change)),
            Payload::Membership(membership) => RaftPayload::Membership(membership.try_into()?),
        };
        Ok(RaftEntry { log_id: RaftLogId::new_term_index(entry.term, entry.index), payload })
    }
}

impl<S> Snapshot<S> {
    pub fn new(meta: &RaftSnapshotMeta, state: S) -> Snapshot<S> {
        Snapshot {
            last: meta.last_log_id.map(LogId::from),
            membership_at: meta.last_membership.log_id().map(LogId::from),
            membership: meta.last_membership.membership().into(),
            state,
        }
    }

    pub fn open(self) -> Result<(RaftSnapshotMeta, S), CodecError> {
        let at = self.membership_at.map(RaftLogId::from);
        let meta = RaftSnapshotMeta {
            last_log_id: self.last.map(RaftLogId::from),
            last_membership: RaftStoredMembership::new(at, self.membership.try_into()?),
        };
        Ok((meta, self.state))
    }
}

impl From<RaftVoteRequest> for Ballot {
    fn from(request: RaftVoteRequest) -> Ballot {
        Ballot {
            vote: (&request.vote).into(),
            last: request.last_log_id.map(LogId::from),
            transfer: request.leadership_transfer,
        }
    }
}

impl From<Ballot> for RaftVoteRequest {
    fn from(ballot: Ballot) -> RaftVoteRequest {
        let mut request = RaftVoteRequest::new(ballot.vote.into(), ballot.last.map(RaftLogId::from));
        request.leadership_transfer = ballot.transfer;
        request
    }
}

impl From<RaftVoteAnswer> for Response {
    fn from(answer: RaftVoteAnswer) -> Response {
        Response::Vote {
            vote: (&answer.vote).into(),
            granted: answer.vote_granted,
            last: answer.last_log_id.map(LogId::from),
        }
    }
}

impl From<RaftAppended> for Appended {
    fn from(answer: RaftAppended) -> Appended {
        match answer {
            RaftAppended::Success => Appended::All,
            RaftAppended::PartialSuccess(upto) => Appended::Upto(upto.map(LogId::from)),
            RaftAppended::Conflict => Appended::Conflict,
            RaftAppended::HigherVote(vote) => Appended::HigherVote((&vote).into()),
        }
    }
}

impl From<Appended> for RaftAppended {
    fn from(answer: Appended) -> RaftAppended {
        match answer {
            Appended::All => RaftAppended::Success,
            Appended::Upto(upto) => RaftAppended::PartialSuccess(upto.map(RaftLogId::from)),
            Appended::Conflict => RaftAppended::Conflict,
            Appended::HigherVote(vote) => RaftAppended::HigherVote(vote.into()),
        }
    }
}

impl From<&RaftTransfer> for Ask {
    fn from(request: &RaftTransfer) -> Ask {
        Ask::Transfer {
            from: request.from_leader().into(),
            to: *request.to_node_id(),
            last: request.last_log_id().map(|id| LogId::from(*id)),
        }
    }
}

impl From<RaftTransferAnswer> for Response {
    fn from(answer: RaftTransferAnswer) -> Response {
        Response::Transferred { accepted: answer.is_ok() }
    }
}

/// A request to append, from its parts.
pub fn append(
    vote: Vote,
    previous: Option<LogId>,
    committed: Option<LogId>,
    entries: Vec<Entry>,
) -> Result<RaftAppend, CodecError> {
    Ok(openraft::raft::AppendEntriesRequest::<Types> {
        vote: vote.into(),
        prev_log_id: previous.map(RaftLogId::from),
        leader_commit: committed.map(RaftLogId::from),
        entries: entries.into_iter().map(RaftEntry::try_from).collect::<Result<_, _>>()?,
    })
}

#[cfg(test)]
mod golden;

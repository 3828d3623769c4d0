//! Everything two orca processes say to each other: QUIC with mutual TLS, one certificate authority for each
//! cluster, and three planes that share a port.
//!
//! ```text
//!   plane    ALPN           opened by                             to say
//!   peer     orca-peer/1    a voter's certificate                 Raft
//!   agent    orca-agent/1   a node's certificate                  goals, reports, orders to a node
//!   client   orca-client/1  a user's certificate, or a token      what people ask for; joining
//! ```
//!
//! Who somebody is comes from the handshake and from nowhere else. What he may do is not decided here, except for
//! the table above. Without TLS there is nothing: no plain port, no 0-RTT, no resumption.

use std::fmt;

pub mod cause;
pub mod client;
pub mod codec;
pub mod connection;
pub mod endpoint;
pub mod identity;
pub mod message;
pub mod stream;
pub mod version;

pub use client::Client;
pub use connection::Connection;
pub use endpoint::{Access, Endpoint, Listener, Rejection, Wanted};
pub use identity::Peer;
pub use stream::Stream;

/// One of the three kinds of conversation; chosen by whoever dials, by ALPN.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Plane {
    Peer,
    Agent,
    Client,
}

impl Plane {
    pub const ALL: [Plane; 3] = [Plane::Peer, Plane::Agent, Plane::Client];

    pub(crate) fn alpn(self) -> &'static [u8] {
        match self {
            Plane::Peer => b"orca-peer/1",
            Plane::Agent => b"orca-agent/1",
            Plane::Client => b"orca-client/1",
        }
    }

    pub(crate) fn from_alpn(alpn: &[u8]) -> Option<Plane> {
        Plane::ALL.into_iter().find(|plane| plane.alpn() == alpn)
    }

    /// Whether somebody with this certificate, or none, may open this plane. A node never acts for a user: it may
    /// not open the client plane.
    pub fn admits(self, peer: &Peer) -> bool {
        match (self, peer) {
            (Plane::Peer, Peer::Node { raft, .. }) => raft.is_some(),
            (Plane::Agent, Peer::Node { .. }) => true,
            (Plane::Client, Peer::User { .. } | Peer::Anonymous) => true,
            (Plane::Peer | Plane::Agent, Peer::User { .. } | Peer::Anonymous) => false,
            (Plane::Client, Peer::Node { .. }) => false,
        }
    }
}

impl fmt::Display for Plane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Plane::Peer => "peer",
            Plane::Agent => "agent",
            Plane::Client => "client",
        })
    }
}

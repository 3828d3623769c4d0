//! What several tests of this crate begin with.

use std::net::Ipv4Addr;

use orca_cluster::id::{ClusterId, NodeId};
use orca_wire::identity::{Authority, KeyRequest};
use orca_wire::{Access, Endpoint, Listener};

use crate::clock::now;

/// The endpoint of a control node that lets everybody in, what it accepts, and the endpoint of node 2 of its cluster.
pub fn control_and_agent() -> (Endpoint, Listener, Endpoint) {
    let authority = Authority::create(ClusterId(7), now());
    let node = |number, raft| {
        let request = KeyRequest::generate();
        let issued = authority.issue_node(&request.request(), NodeId(number), raft, now()).unwrap();
        request.into_identity(&issued).unwrap()
    };
    let (server, accepted) =
        Endpoint::server((Ipv4Addr::LOCALHOST, 0).into(), node(1, Some(1)), |_: &_| Ok(())).unwrap();
    (server, accepted, Endpoint::client(Access::Certificate(node(2, None))).unwrap())
}

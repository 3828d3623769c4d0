//! What a control node must be told. Everything else it knows from its data directory.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use orca_cluster::id::Label;
use zeroize::Zeroizing;

#[derive(Debug, Clone)]
pub struct Config {
    /// Holds everything a node keeps; made, for its owner only, if it is not there.
    pub data_dir: PathBuf,
    pub listen_quic: SocketAddr,
    /// Plain HTTP, therefore loopback only.
    pub listen_http: SocketAddr,
    /// What people call this node.
    pub node_name: String,
    /// Counts only when a cluster is founded.
    pub cluster_name: Label,
    pub unseal: UnsealSource,
    /// `host:port` at which others reach [`listen_quic`](Config::listen_quic); absent means that address itself.
    pub advertise: Option<String>,
}

/// Where the key comes from that opens the vault.
#[derive(Clone)]
pub enum UnsealSource {
    /// A file outside the data directory; made when the cluster is founded, unless it is there already.
    File(PathBuf),
    /// The value of [`UNSEAL_KEY_VARIABLE`](crate::vault::UNSEAL_KEY_VARIABLE).
    Variable(Zeroizing<String>),
}

impl std::fmt::Debug for UnsealSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            UnsealSource::File(path) => f.debug_tuple("File").field(path).finish(),
            UnsealSource::Variable(_) => f.debug_tuple("Variable").finish_non_exhaustive(),
        }
    }
}

/// Where things lie below a data directory.
#[derive(Debug, Clone)]
pub struct Layout {
    root: PathBuf,
}

impl Layout {
    pub fn new(data_dir: &Path) -> Layout {
        Layout { root: data_dir.to_owned() }
    }

    /// The Raft store.
    pub fn raft(&self) -> PathBuf {
        self.root.join("raft")
    }

    /// The Raft store of a cluster that is being founded: renamed to [`raft`](Layout::raft) when all is there, so
    /// that a store either has a whole cluster in it or does not exist.
    pub fn founding(&self) -> PathBuf {
        self.root.join("raft.founding")
    }

    /// The node's identity and its sealing key, which its agent uses too.
    pub fn node(&self) -> PathBuf {
        self.root.join("node")
    }

    /// The first administrator's identity, for whoever owns this machine.
    pub fn admin(&self) -> PathBuf {
        self.root.join("admin")
    }

    pub fn modules(&self) -> PathBuf {
        self.root.join("modules")
    }
}

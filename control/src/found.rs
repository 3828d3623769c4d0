//! Founding: from an empty data directory to a cluster of one node with one administrator.
//!
//! All is made beside where it belongs, and the last step is the rename of the Raft store to its place. So a process
//! that dies in between leaves no cluster, and the next start founds one anew; nobody was told of the first.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use orca_cluster::command::{Applied, Command, Detail, Entry, Founding, NewNode};
use orca_cluster::event::Actor;
use orca_cluster::id::{ClusterId, Label, NodeId};
use orca_cluster::secret::Scope;
use orca_cluster::state::{Role, Token as TokenRecord};
use orca_cluster::time::Timestamp;
use orca_wire::identity::file::PrivateFileError;
use orca_wire::identity::{
    Authority, AuthorityError, Fingerprint, Identity, IdentityError, KeyRequest, SealError, SealingKey, Token,
};
use zeroize::Zeroizing;

use crate::config::{Config, Layout, UnsealSource};
use crate::raft::{CallError, InitialiseError, Lane, Member, PeerTransport, ProposeError, Raft, RaftConfig, RaftId};
use crate::vault::{Place, UnsealKey, Vault, VaultError};

/// The founder's node id and Raft id: the index of the entry that founds a cluster, after the membership (0) and the
/// first leader's blank entry (1).
const FOUNDER: u64 = 2;

/// A certificate stands for a token and is worthless without it, so it may last as long as the token, which does not
/// expire. Ten years is as long as the authority itself.
const FIRST_USER_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60 - 24 * 60 * 60);

/// The name of the first token.
const FIRST_USER: &str = "admin";

/// What is said once, to whoever started the first server.
pub struct Founded {
    /// The cluster's.
    pub name: Label,
    /// The whole token, secret included.
    pub token: Zeroizing<String>,
    /// Key and certificate that stand for the token.
    pub user: Identity,
    /// PEM.
    pub ca_certificate: String,
    pub fingerprint: Fingerprint,
    pub cluster: ClusterId,
    /// Made just now: without it a backup of the data is useless, so people should be told to keep it.
    pub unseal_key: Option<PathBuf>,
}

impl std::fmt::Debug for Founded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Founded").field("cluster", &self.cluster).finish_non_exhaustive()
    }
}

#[derive(Debug, thiserror::Error)]
pub enum FoundError {
    #[error(transparent)]
    Vault(#[from] VaultError),
    #[error("the first certificate could not be made")]
    Authority(#[from] AuthorityError),
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error("the node's sealing key could not be made")]
    Sealing(#[from] SealError),
    #[error(transparent)]
    File(#[from] PrivateFileError),
    #[error("{} cannot be written", path.display())]
    Directory {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "{} holds no cluster, but the unseal key {} of one is there; mount the disk that the cluster's data is on, or \
         restore the data, or, if a new cluster is meant, move that key away", data.display(), key.display()
    )]
    OlderKey { data: PathBuf, key: PathBuf },
    #[error(
        "this node has an identity in {}, but its store {} is not there; mount or restore that, or, if a new cluster is \
         meant, remove the identity", node.display(), store.display()
    )]
    OlderNode { node: PathBuf, store: PathBuf },
    #[error(transparent)]
    Raft(#[from] crate::raft::StartError),
    #[error(transparent)]
    Initialise(#[from] InitialiseError),
    #[error("the founding of the cluster could not be written")]
    Propose(#[from] ProposeError),
    /// The log had another shape than ever seen: an election in the middle of it, say.
    #[error("founding the cluster was disturbed ({0}); start again")]
    Disturbed(String),
}

/// There are no peers while a cluster is founded.
#[derive(Clone)]
struct Alone;

impl PeerTransport for Alone {
    async fn call(
        &self,
        to: RaftId,
        _: &str,
        _: Lane,
        _: bytes::Bytes,
        _: Duration,
    ) -> Result<bytes::Bytes, CallError> {
        Err(CallError::Unreachable(format!("{to} cannot be: the cluster is being founded")))
    }
}

/// Founds a cluster in this data directory, which holds none.
pub async fn found(config: &Config, layout: &Layout, advertise: String, now: Timestamp) -> Result<Founded, FoundError> {
    let cluster = ClusterId(rand::random());
    let (unseal, made) = unseal_key(config, layout)?;
    let (vault, root) = Vault::create(cluster, &unseal);
    let data_key = vault.new_data_key(Scope::Cluster, 1, now);
    let authority = Authority::create(cluster, now);
    let ca_key = vault.seal(&data_key, &Place::authority(1), &authority.key().into())?;

    let token = Token::create(authority.fingerprint());
    let request = KeyRequest::generate();
    let issued = authority.issue_user(&request.request(), token.id.clone(), FIRST_USER_LIFE, now)?;
    let user = request.into_identity(&issued)?;
    user.save(&layout.admin())?;

    let request = KeyRequest::generate();
    let issued = authority.issue_node(&request.request(), NodeId(FOUNDER), Some(FOUNDER), now)?;
    request.into_identity(&issued)?.save(&layout.node())?;
    let sealing = SealingKey::load_or_create(&layout.node())?;

    let ca_certificate = pem::encode(&pem::Pem::new("CERTIFICATE", authority.certificate().to_vec()));
    let first_user = TokenRecord {
        name: FIRST_USER.to_owned(),
        hash: token.secret.hash(),
        role: Role::Admin,
        project: None,
        created: now,
        expires: None,
    };
    let founding = Founding {
        id: cluster.to_string(),
        name: config.cluster_name.clone(),
        ca_certificate: ca_certificate.clone(),
        ca_key,
        root,
        data_key,
        token: (token.id.clone(), first_user),
        node: NewNode {
            name: config.node_name.clone(),
            address: advertise.clone(),
            sealing_key: sealing.public().clone(),
        },
    };
    let member = Member { id: RaftId(FOUNDER), name: config.node_name.clone(), address: advertise };
    write(layout, cluster, member, founding, now).await?;
    Ok(Founded {
        name: config.cluster_name.clone(),
        token: token.reveal(),
        user,
        ca_certificate,
        fingerprint: authority.fingerprint(),
        cluster,
        unseal_key: made,
    })
}

/// The key, and where it was put if it is new. One that was there before anything was made here is of a cluster whose
/// data is elsewhere, on a disk that is not mounted perhaps: beside it, a new cluster would look like the loss of the
/// old one. Whoever brings a key along gives it in the variable.
fn unseal_key(config: &Config, layout: &Layout) -> Result<(UnsealKey, Option<PathBuf>), FoundError> {
    let begun = layout.founding().exists();
    if layout.node().exists() && !begun {
        return Err(FoundError::OlderNode { node: layout.node(), store: layout.raft() });
    }
    let path = match &config.unseal {
        UnsealSource::Variable(value) => return Ok((UnsealKey::from_variable(value)?, None)),
        UnsealSource::File(path) => path,
    };
    if path.exists() && !begun {
        return Err(FoundError::OlderKey { data: config.data_dir.clone(), key: path.clone() });
    }
    begin(layout)?;
    match UnsealKey::create(path, &config.data_dir) {
        Ok(key) => Ok((key, Some(path.clone()))),
        // Left by a founding that was interrupted.
        Err(VaultError::File(PrivateFileError::Exists { .. })) => Ok((UnsealKey::load(path)?, None)),
        Err(error) => Err(error.into()),
    }
}

/// Leaves a trace of the founding, before there is a key: by it an interrupted one is told from data that is away.
fn begin(layout: &Layout) -> Result<(), FoundError> {
    let making = layout.founding();
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&making).and_then(|()| match making.parent() {
        Some(parent) => fs::File::open(parent)?.sync_all(),
        None => Ok(()),
    });
    made.map_err(|source| FoundError::Directory { path: making, source })
}

fn empty(directory: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        fs::remove_file(entry?.path())?;
    }
    Ok(())
}

/// Writes the founding entry into a new store and puts the store into its place.
async fn write(
    layout: &Layout,
    cluster: ClusterId,
    member: Member,
    founding: Founding,
    now: Timestamp,
) -> Result<(), FoundError> {
    let (making, place) = (layout.founding(), layout.raft());
    // What an interrupted founding left in it goes; the directory stays, which is the trace of this one.
    empty(&making).map_err(|source| FoundError::Directory { path: making.clone(), source })?;
    let raft = Raft::start(RaftConfig::new(member.id, cluster.to_string(), &making), Alone).await?;
    let committed = async {
        raft.initialise(member).await?;
        let command = Command::Found(Box::new(founding));
        let entry = Entry { at: now, actor: Actor::Orca, source: None, command };
        Ok::<_, FoundError>(raft.propose(entry).await?)
    };
    let committed = committed.await;
    raft.shutdown().await;
    let committed = committed?;
    match committed.applied {
        Applied::Done { detail: Detail::Node(NodeId(FOUNDER)), .. } => {}
        other => return Err(FoundError::Disturbed(format!("entry {}: {other:?}", committed.index))),
    }
    let moved = fs::rename(&making, &place).and_then(|()| match place.parent() {
        // The new name is durable only once its directory is.
        Some(parent) => fs::File::open(parent)?.sync_all(),
        None => Ok(()),
    });
    moved.map_err(|source| FoundError::Directory { path: place, source })
}

//! Who somebody is. A cluster has its own certificate authority; a certificate names its holder by URI and nothing
//! else: no host names, no addresses, so that a node may move.
//!
//! ```text
//!   spiffe://<cluster>/node/<node>      a node; with the next one, a voter
//!   spiffe://<cluster>/raft/<raft id>
//!   spiffe://<cluster>/user/<token>     a person or a pipeline, standing for a token
//! ```
//!
//! A key is made where it is used and never travels: a [`KeyRequest`] goes to the leader, the [`Issued`] certificate
//! comes back, together they are an [`Identity`].

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use orca_cluster::id::{ClusterId, NodeId};
use orca_cluster::secret::{Opaque, TokenId};
use orca_cluster::time::Timestamp;
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use x509_parser::extensions::GeneralName;
use x509_parser::parse_x509_certificate;
use zeroize::Zeroizing;

pub mod authority;
pub mod file;
pub mod seal;
pub mod token;

pub use authority::{Authority, AuthorityError, Issued, NODE_CERTIFICATE_LIFE};
pub use seal::{SealError, SealingKey, goal_context, seal};
pub use token::{Fingerprint, Token, TokenError, TokenSecret};

use file::PrivateFileError;

/// Whom a connection is with, as its certificate says. Never taken from a message.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Peer {
    /// A node; `raft` is its Raft id if it is certified as a voter.
    Node { node: NodeId, raft: Option<u64> },
    /// Whoever holds a certificate made out for this token.
    User { token: TokenId },
    /// No certificate; a token in the hello must say more.
    Anonymous,
}

impl Peer {
    fn uris(&self, cluster: ClusterId) -> Vec<String> {
        match self {
            Peer::Node { node, raft } => {
                let raft = raft.map(|id| format!("spiffe://{cluster}/raft/{id}"));
                std::iter::once(format!("spiffe://{cluster}/node/{node}")).chain(raft).collect()
            }
            Peer::User { token } => vec![format!("spiffe://{cluster}/user/{token}")],
            Peer::Anonymous => Vec::new(),
        }
    }

    /// `None` unless the names are exactly those of one node, one voter or one user of one cluster.
    fn from_uris(uris: &[String]) -> Option<(ClusterId, Peer)> {
        let (mut cluster, mut node, mut raft, mut token) = (None::<ClusterId>, None, None, None);
        for uri in uris {
            let mut parts = uri.strip_prefix("spiffe://")?.split('/');
            let (Some(domain), Some(kind), Some(id), None) = (parts.next(), parts.next(), parts.next(), parts.next())
            else {
                return None;
            };
            if cluster.replace(domain.parse().ok()?).is_some_and(|other| other.to_string() != domain) {
                return None;
            }
            let twice = match kind {
                "node" => node.replace(id.parse::<NodeId>().ok()?).is_some(),
                "raft" => raft.replace(id.parse::<u64>().ok()?).is_some(),
                "user" => token.replace(id.parse::<TokenId>().ok()?).is_some(),
                _ => return None,
            };
            if twice {
                return None;
            }
        }
        let peer = match (node, raft, token) {
            (Some(node), raft, None) => Peer::Node { node, raft },
            (None, None, Some(token)) => Peer::User { token },
            _ => return None,
        };
        Some((cluster?, peer))
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Peer::Node { node, raft: None } => write!(f, "node {node}"),
            Peer::Node { node, raft: Some(raft) } => write!(f, "node {node} (raft {raft})"),
            Peer::User { token } => write!(f, "user {token}"),
            Peer::Anonymous => f.write_str("anonymous"),
        }
    }
}

/// What a certificate says. Whether to believe it is the business of the handshake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Named {
    pub cluster: ClusterId,
    pub peer: Peer,
    not_before: Timestamp,
    not_after: Timestamp,
}

pub(crate) fn named(certificate: &[u8]) -> Option<Named> {
    let (cluster, peer) = Peer::from_uris(&uris(certificate)?)?;
    let (_, parsed) = parse_x509_certificate(certificate).ok()?;
    let time = |seconds: i64| Some(Timestamp(u64::try_from(seconds).ok()?.checked_mul(1000)?));
    let validity = parsed.validity();
    Some(Named {
        cluster,
        peer,
        not_before: time(validity.not_before.timestamp())?,
        not_after: time(validity.not_after.timestamp())?,
    })
}

/// The alternative names, if all of them are URIs.
fn uris(certificate: &[u8]) -> Option<Vec<String>> {
    let (_, parsed) = parse_x509_certificate(certificate).ok()?;
    let names = parsed.subject_alternative_name().ok()??;
    let uri = |name: &GeneralName<'_>| match name {
        GeneralName::URI(uri) => Some((*uri).to_owned()),
        _ => None,
    };
    names.value.general_names.iter().map(uri).collect()
}

/// A key pair on its way to being an identity.
pub struct KeyRequest {
    key: KeyPair,
}

impl KeyRequest {
    pub fn generate() -> KeyRequest {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).expect("the operating system gives random bytes");
        KeyRequest { key }
    }

    /// The certificate request (PKCS#10): the public key, signed by the private one.
    pub fn request(&self) -> Vec<u8> {
        let request = CertificateParams::default().serialize_request(&self.key);
        request.expect("a request of fixed form can be written").der().to_vec()
    }

    pub fn into_identity(self, issued: &Issued) -> Result<Identity, IdentityError> {
        let certificates = std::iter::once(&issued.certificate).chain(&issued.authorities);
        let certificates = certificates.map(|der| CertificateDer::from(der.0.clone())).collect();
        Identity::new(Zeroizing::new(self.key.serialize_der()), certificates).map_err(IdentityError::Issued)
    }
}

impl fmt::Debug for KeyRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyRequest")
    }
}

/// A private key, the certificate that says whose it is, and the authorities its holder trusts.
#[derive(Clone)]
pub struct Identity {
    named: Named,
    key: Arc<Zeroizing<Vec<u8>>>,
    certificate: CertificateDer<'static>,
    authorities: Vec<CertificateDer<'static>>,
}

#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("there is no identity at {}; run: orca join", path.display())]
    Missing { path: PathBuf },
    #[error(transparent)]
    File(PrivateFileError),
    #[error("{} is damaged: {fault}; restore it, or remove it and join again", path.display())]
    Damaged { path: PathBuf, fault: IdentityFault },
    #[error("the certificate received is not usable: {0}")]
    Issued(IdentityFault),
    #[error("the certificate of {peer} in {} ended {} hours ago; join again", path.display(), ago.as_secs() / 3600)]
    Expired { path: PathBuf, peer: Peer, ago: std::time::Duration },
    #[error("{} is of cluster {found}, not of {wanted}; use another data directory for each cluster", path.display())]
    OtherCluster { path: PathBuf, found: ClusterId, wanted: ClusterId },
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityFault {
    #[error("it is not PEM with one private key and its certificates")]
    Form,
    #[error("its certificate names no node and no user")]
    Names,
    #[error("its key and its certificate do not belong together")]
    Mismatch,
    #[error("it names no authority")]
    Authority,
}

const FILE: &str = "identity.pem";
const KEY_TAG: &str = "PRIVATE KEY";
const CERTIFICATE_TAG: &str = "CERTIFICATE";

impl Identity {
    /// `certificates`: its own, then the authorities.
    fn new(key: Zeroizing<Vec<u8>>, certificates: Vec<CertificateDer<'static>>) -> Result<Identity, IdentityFault> {
        let mut certificates = certificates.into_iter();
        let certificate = certificates.next().ok_or(IdentityFault::Form)?;
        let authorities: Vec<_> = certificates.collect();
        let named = named(&certificate).ok_or(IdentityFault::Names)?;
        let pair = PrivatePkcs8KeyDer::from(key.as_slice());
        let pair =
            KeyPair::from_pkcs8_der_and_sign_algo(&pair, &PKCS_ECDSA_P256_SHA256).map_err(|_| IdentityFault::Form)?;
        if authority::fingerprint(&certificate) != Some(authority::fingerprint_of_key(&pair)) {
            return Err(IdentityFault::Mismatch);
        }
        if authorities.is_empty() || !authorities.iter().all(|one| authority::fingerprint(one).is_some()) {
            return Err(IdentityFault::Authority);
        }
        Ok(Identity { named, key: Arc::new(key), certificate, authorities })
    }

    /// What [`save`](Identity::save) wrote into the directory. With `wanted`, only if it is of that cluster.
    pub fn load(directory: &Path, wanted: Option<ClusterId>, now: Timestamp) -> Result<Identity, IdentityError> {
        let path = directory.join(FILE);
        let text = match file::read(&path) {
            Ok(text) => text,
            Err(PrivateFileError::Missing { .. }) => return Err(IdentityError::Missing { path }),
            Err(error) => return Err(IdentityError::File(error)),
        };
        let identity = match Identity::parse(&text) {
            Ok(identity) => identity,
            Err(fault) => return Err(IdentityError::Damaged { path, fault }),
        };
        let found = identity.cluster();
        if let Some(wanted) = wanted.filter(|wanted| *wanted != found) {
            return Err(IdentityError::OtherCluster { path, found, wanted });
        }
        if now >= identity.not_after() {
            let ago = now.since(identity.not_after());
            return Err(IdentityError::Expired { path, peer: identity.peer().clone(), ago });
        }
        Ok(identity)
    }

    /// Into one file of the directory, readable by its owner only, replaced as a whole.
    pub fn save(&self, directory: &Path) -> Result<(), IdentityError> {
        let key = pem::Pem::new(KEY_TAG, self.key.to_vec());
        let certificates = std::iter::once(&self.certificate).chain(&self.authorities);
        let certificates = certificates.map(|der| pem::Pem::new(CERTIFICATE_TAG, der.to_vec()));
        let blocks: Vec<_> = std::iter::once(key).chain(certificates).collect();
        let text = Zeroizing::new(pem::encode_many(&blocks));
        file::replace(&directory.join(FILE), text.as_bytes()).map_err(IdentityError::File)
    }

    fn parse(text: &[u8]) -> Result<Identity, IdentityFault> {
        let (mut key, mut certificates) = (None, Vec::new());
        for block in pem::parse_many(text).map_err(|_| IdentityFault::Form)? {
            match block.tag() {
                KEY_TAG if key.is_none() => key = Some(Zeroizing::new(block.into_contents())),
                CERTIFICATE_TAG => certificates.push(CertificateDer::from(block.into_contents())),
                _ => return Err(IdentityFault::Form),
            }
        }
        Identity::new(key.ok_or(IdentityFault::Form)?, certificates)
    }

    pub fn cluster(&self) -> ClusterId {
        self.named.cluster
    }

    /// Who its holder is.
    pub fn peer(&self) -> &Peer {
        &self.named.peer
    }

    pub fn not_after(&self) -> Timestamp {
        self.named.not_after
    }

    /// When to ask for the next certificate: two thirds into this one's life, so that a leaderless day is no loss.
    pub fn renew_at(&self) -> Timestamp {
        let Named { not_before, not_after, .. } = self.named;
        not_before + not_after.since(not_before) * 2 / 3
    }

    /// Whom it trusts, for others to do the same.
    pub fn authorities(&self) -> Vec<Opaque> {
        self.authorities.iter().map(|der| Opaque(der.to_vec())).collect()
    }

    /// What the handshake shows: its own certificate and then the authorities, of which a holder of a token knows
    /// only the fingerprint.
    pub(crate) fn chain(&self) -> Vec<CertificateDer<'static>> {
        std::iter::once(&self.certificate).chain(&self.authorities).cloned().collect()
    }

    pub(crate) fn trusted(&self) -> &[CertificateDer<'static>] {
        &self.authorities
    }

    pub(crate) fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.key.to_vec()).into()
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("cluster", &self.named.cluster)
            .field("peer", &self.named.peer)
            .field("not_after", &self.named.not_after)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    const NOW: Timestamp = Timestamp(1_800_000_000_000);

    fn node(authority: &Authority, node: u64, raft: Option<u64>) -> Identity {
        let request = KeyRequest::generate();
        let issued = authority.issue_node(&request.request(), NodeId(node), raft, NOW).unwrap();
        request.into_identity(&issued).unwrap()
    }

    #[test]
    fn a_certificate_says_who_its_holder_is() {
        let authority = Authority::create(ClusterId(7), NOW);
        let worker = node(&authority, 3, None);
        assert_eq!(worker.peer(), &Peer::Node { node: NodeId(3), raft: None });
        assert_eq!(worker.cluster(), ClusterId(7));
        assert_eq!(worker.not_after(), NOW + NODE_CERTIFICATE_LIFE);
        assert!(worker.renew_at() > NOW && worker.renew_at() < worker.not_after());
        let voter = node(&authority, 4, Some(9));
        assert_eq!(voter.peer(), &Peer::Node { node: NodeId(4), raft: Some(9) });

        let request = KeyRequest::generate();
        let token = Token::create(authority.fingerprint());
        let issued = authority.issue_user(&request.request(), token.id.clone(), Duration::from_secs(60), NOW).unwrap();
        let user = request.into_identity(&issued).unwrap();
        assert_eq!(user.peer(), &Peer::User { token: token.id });
    }

    #[test]
    fn the_authority_is_the_same_after_a_restart_and_signs_only_what_is_proven() {
        let authority = Authority::create(ClusterId(7), NOW);
        let again = Authority::open(authority.certificate(), &authority.key()).unwrap();
        assert_eq!((again.cluster(), again.fingerprint()), (ClusterId(7), authority.fingerprint()));
        let other = Authority::create(ClusterId(7), NOW);
        assert!(matches!(Authority::open(authority.certificate(), &other.key()), Err(AuthorityError::Mismatch)));
        assert!(matches!(Authority::open(b"", &other.key()), Err(AuthorityError::Damaged)));

        let mut request = KeyRequest::generate().request();
        let last = request.len() - 1;
        request[last] ^= 1;
        assert!(authority.issue_node(&request, NodeId(1), None, NOW).is_err());
        assert!(authority.issue_node(b"", NodeId(1), None, NOW).is_err());
    }

    /// Bytes where others are expected: anything, or the expected ones with some changed, and cut.
    fn damaged(sound: &'static [u8]) -> impl Strategy<Value = Vec<u8>> {
        let changes = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4);
        let changed = (changes, any::<prop::sample::Index>(), any::<bool>()).prop_map(|(changes, end, is_cut)| {
            let mut bytes = sound.to_vec();
            for (at, byte) in changes {
                *at.get_mut(&mut bytes) = byte;
            }
            bytes.truncate(if is_cut { end.index(sound.len()) } else { sound.len() });
            bytes
        });
        prop_oneof![1 => prop::collection::vec(any::<u8>(), 0..200), 4 => changed]
    }

    static AUTHORITY: LazyLock<Authority> = LazyLock::new(|| Authority::create(ClusterId(7), NOW));
    static REQUEST: LazyLock<Vec<u8>> = LazyLock::new(|| KeyRequest::generate().request());
    static ISSUED: LazyLock<Issued> =
        LazyLock::new(|| AUTHORITY.issue_node(&REQUEST, NodeId(1), Some(1), NOW).unwrap());

    proptest! {
        // Signing takes its time.
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn only_a_key_that_is_proven_is_certified(request in damaged(&REQUEST)) {
            if let Ok(issued) = AUTHORITY.issue_node(&request, NodeId(1), Some(1), NOW) {
                prop_assert_eq!(authority::fingerprint(&issued.certificate.0), authority::fingerprint(&ISSUED.certificate.0));
            }
        }

        #[test]
        fn no_bytes_panic_as_a_certificate(certificate in damaged(&ISSUED.certificate.0)) {
            let _ = named(&certificate);
            let _ = authority::fingerprint(&certificate);
            let _ = Authority::open(&certificate, &AUTHORITY.key());
        }
    }

    #[test]
    fn a_certificate_for_another_key_is_refused() {
        let authority = Authority::create(ClusterId(7), NOW);
        let issued = authority.issue_node(&KeyRequest::generate().request(), NodeId(1), None, NOW).unwrap();
        let error = KeyRequest::generate().into_identity(&issued).unwrap_err();
        assert!(matches!(error, IdentityError::Issued(IdentityFault::Mismatch)));
    }

    #[test]
    fn an_identity_is_saved_and_loaded_and_every_fault_is_told() {
        use std::os::unix::fs::PermissionsExt as _;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        let load = |wanted, now| Identity::load(path, wanted, now).map(|identity| identity.peer().clone());
        assert!(load(None, NOW).unwrap_err().to_string().contains("orca join"));

        let voter = node(&Authority::create(ClusterId(7), NOW), 4, Some(9));
        voter.save(path).unwrap();
        voter.save(path).unwrap();
        let mode = std::fs::metadata(path.join(FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(&load(Some(ClusterId(7)), NOW).unwrap(), voter.peer());
        assert!(matches!(load(Some(ClusterId(8)), NOW), Err(IdentityError::OtherCluster { .. })));
        assert!(matches!(load(None, voter.not_after()), Err(IdentityError::Expired { .. })));

        let text = std::fs::read_to_string(path.join(FILE)).unwrap();
        for cut in [0, 1, text.len() / 2, text.len() - 40] {
            std::fs::write(path.join(FILE), &text[..cut]).unwrap();
            assert!(matches!(load(None, NOW), Err(IdentityError::Damaged { .. })), "cut at {cut}");
        }
    }

    #[test]
    fn names_that_are_not_exactly_one_holder_name_nobody() {
        let own = "spiffe://00000000000000000000000000000007";
        let other = "spiffe://00000000000000000000000000000008";
        let read = |uris: &[&str]| Peer::from_uris(&uris.iter().map(|u| (*u).to_owned()).collect::<Vec<_>>());
        assert!(read(&[&format!("{own}/node/n1"), &format!("{own}/raft/1")]).is_some());
        for uris in [
            vec![],
            vec![format!("{own}/raft/1")],
            vec![format!("{own}/node/n1"), format!("{own}/node/n2")],
            vec![format!("{own}/node/n1"), format!("{own}/user/abcdefgh")],
            vec![format!("{own}/node/n1"), format!("{other}/raft/1")],
            vec![format!("{own}/node/n1/raft/1")],
            vec![format!("{own}/node/")],
            vec![format!("{own}/admin/1")],
            vec!["https://example.com/node/n1".to_owned()],
        ] {
            assert_eq!(read(&uris.iter().map(String::as_str).collect::<Vec<_>>()), None, "{uris:?}");
        }
    }
}

//! The cluster's certificate authority: one key, kept sealed in the cluster's state, used by the leader alone. It
//! puts the names into a certificate; a request brings nothing but a public key.

use std::fmt;
use std::time::Duration;

use orca_cluster::id::{ClusterId, NodeId};
use orca_cluster::secret::{Opaque, TokenId};
use orca_cluster::time::Timestamp;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType, date_time_ymd,
};
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::token::Fingerprint;
use super::{Peer, uris};

/// How long the authority itself lasts; its key is replaced long before.
const AUTHORITY_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);

/// Short, because there is no revocation list: a certificate nobody renews is soon worthless.
pub const NODE_CERTIFICATE_LIFE: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// Certificates begin this much before now: for a node whose clock is behind, they must not lie in the future.
const CLOCK_BEHIND_MAX: Duration = Duration::from_secs(60 * 60);

#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    #[error("the certificate request cannot be read or its signature is wrong")]
    Request(#[source] rcgen::Error),
    #[error("the certificate request has a key of another kind than ECDSA P-256")]
    KeyKind,
    #[error("the authority's key does not belong to its certificate")]
    Mismatch,
    #[error("the authority's key or certificate is damaged")]
    Damaged,
}

/// What the authority answers to a certificate request: the certificate, and whom to trust from now on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Issued {
    pub certificate: Opaque,
    pub authorities: Vec<Opaque>,
}

pub struct Authority {
    cluster: ClusterId,
    certificate: CertificateDer<'static>,
    fingerprint: Fingerprint,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub fn create(cluster: ClusterId, now: Timestamp) -> Authority {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).expect("the operating system gives random bytes");
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, format!("orca cluster {cluster}"));
        params.subject_alt_names = vec![uri(format!("spiffe://{cluster}"))];
        // No authority below this one.
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.not_before = date_time_ymd(1970, 1, 1) + begin(now);
        params.not_after = date_time_ymd(1970, 1, 1) + end(now, AUTHORITY_LIFE);
        let certificate = params.self_signed(&key).expect("a certificate of fixed form can be written");
        let certificate = certificate.der().clone();
        let key = Zeroizing::new(key.serialize_der());
        Authority::open(&certificate, &key).expect("what was just made can be opened")
    }

    /// From what [`certificate`](Authority::certificate) and [`key`](Authority::key) gave.
    pub fn open(certificate: &[u8], key: &[u8]) -> Result<Authority, AuthorityError> {
        let certificate = CertificateDer::from(certificate.to_vec());
        let cluster = uris(&certificate)
            .and_then(|uris| match uris.as_slice() {
                [one] => one.strip_prefix("spiffe://")?.parse().ok(),
                _ => None,
            })
            .ok_or(AuthorityError::Damaged)?;
        let fingerprint = fingerprint(&certificate).ok_or(AuthorityError::Damaged)?;
        let key = KeyPair::from_pkcs8_der_and_sign_algo(&PrivatePkcs8KeyDer::from(key), &PKCS_ECDSA_P256_SHA256)
            .map_err(|_| AuthorityError::Damaged)?;
        if fingerprint != fingerprint_of_key(&key) {
            return Err(AuthorityError::Mismatch);
        }
        let issuer = Issuer::from_ca_cert_der(&certificate, key).map_err(|_| AuthorityError::Damaged)?;
        Ok(Authority { cluster, certificate, fingerprint, issuer })
    }

    pub fn cluster(&self) -> ClusterId {
        self.cluster
    }

    pub fn certificate(&self) -> &[u8] {
        &self.certificate
    }

    /// The private key (PKCS#8), to be sealed.
    pub fn key(&self) -> Zeroizing<Vec<u8>> {
        Zeroizing::new(self.issuer.key().serialize_der())
    }

    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// Certifies the key of the request as this node's. `raft` makes it a voter.
    pub fn issue_node(
        &self,
        request: &[u8],
        node: NodeId,
        raft: Option<u64>,
        now: Timestamp,
    ) -> Result<Issued, AuthorityError> {
        let usages = [ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        self.issue(request, &Peer::Node { node, raft }, &usages, NODE_CERTIFICATE_LIFE, now)
    }

    /// Certifies the key of the request as standing for this user token, for at most as long as the token is good.
    pub fn issue_user(
        &self,
        request: &[u8],
        token: TokenId,
        life: Duration,
        now: Timestamp,
    ) -> Result<Issued, AuthorityError> {
        self.issue(request, &Peer::User { token }, &[ExtendedKeyUsagePurpose::ClientAuth], life, now)
    }

    fn issue(
        &self,
        request: &[u8],
        peer: &Peer,
        usages: &[ExtendedKeyUsagePurpose],
        life: Duration,
        now: Timestamp,
    ) -> Result<Issued, AuthorityError> {
        // Reading it checks its signature: the sender holds the private key.
        let request = CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(request))
            .map_err(AuthorityError::Request)?;
        if *request.public_key.algorithm() != PKCS_ECDSA_P256_SHA256 {
            return Err(AuthorityError::KeyKind);
        }
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, peer.to_string());
        params.subject_alt_names = peer.uris(self.cluster).into_iter().map(uri).collect();
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = usages.to_vec();
        params.use_authority_key_identifier_extension = true;
        params.not_before = date_time_ymd(1970, 1, 1) + begin(now);
        params.not_after = date_time_ymd(1970, 1, 1) + end(now, life);
        let certificate = params.signed_by(&request.public_key, &self.issuer).map_err(AuthorityError::Request)?;
        Ok(Issued {
            certificate: Opaque(certificate.der().to_vec()),
            authorities: vec![Opaque(self.certificate.to_vec())],
        })
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority")
            .field("cluster", &self.cluster)
            .field("fingerprint", &self.fingerprint)
            .finish_non_exhaustive()
    }
}

/// Of the public key inside a certificate; `None` when it is no certificate.
pub fn fingerprint(certificate: &[u8]) -> Option<Fingerprint> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    Some(sha256(parsed.tbs_certificate.subject_pki.raw))
}

pub(super) fn fingerprint_of_key(key: &KeyPair) -> Fingerprint {
    sha256(&rcgen::PublicKeyData::subject_public_key_info(key))
}

fn sha256(bytes: &[u8]) -> Fingerprint {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes);
    Fingerprint(digest.as_ref().try_into().expect("SHA-256 gives 32 bytes"))
}

fn uri(text: String) -> SanType {
    SanType::URI(text.try_into().expect("ids are ASCII"))
}

/// Since 1970, as [`end`].
fn begin(now: Timestamp) -> Duration {
    Duration::from_millis((now - CLOCK_BEHIND_MAX).0)
}

fn end(now: Timestamp, life: Duration) -> Duration {
    Duration::from_millis((now + life).0)
}

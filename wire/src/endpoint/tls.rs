//! TLS on both sides: 1.3 only, no resumption (a resumed session would skip the certificates), no 0-RTT (its data
//! can be replayed).

use std::sync::{Arc, OnceLock};

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::CryptoProvider;
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use super::{Access, Stranger, Wanted};
use crate::Plane;
use crate::identity::{Identity, Peer, authority, named};

const VERSIONS: &[&rustls::SupportedProtocolVersion] = &[&rustls::version::TLS13];

fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    PROVIDER.get_or_init(|| Arc::new(rustls::crypto::aws_lc_rs::default_provider())).clone()
}

fn roots<'a>(
    certificates: impl IntoIterator<Item = &'a CertificateDer<'static>>,
) -> Result<RootCertStore, rustls::Error> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates {
        roots.add(certificate.clone())?;
    }
    Ok(roots)
}

/// A certificate is asked for and checked if there is one; which planes need one is checked when the plane is known.
pub(super) fn server(identity: &Identity) -> Result<QuicServerConfig, rustls::Error> {
    let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots(identity.trusted())?), provider())
        .allow_unauthenticated()
        .build()
        .map_err(|error| rustls::Error::General(error.to_string()))?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(VERSIONS)?
        .with_client_cert_verifier(clients)
        .with_single_cert(identity.chain(), identity.private_key())?;
    config.alpn_protocols = Plane::ALL.iter().map(|plane| plane.alpn().to_vec()).collect();
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    QuicServerConfig::try_from(config).map_err(|error| rustls::Error::General(error.to_string()))
}

/// For one dial. Should the server turn out to be somebody else, `stranger` says who.
pub(super) fn client(
    access: &Access,
    plane: Plane,
    wanted: Wanted,
    stranger: Arc<OnceLock<Stranger>>,
) -> Result<QuicClientConfig, rustls::Error> {
    let verifier = Arc::new(Verifier { access: access.clone(), wanted, stranger });
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(VERSIONS)?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut config = match access {
        Access::Certificate(identity) => config.with_client_auth_cert(identity.chain(), identity.private_key())?,
        Access::Token(_) => config.with_no_client_auth(),
    };
    config.alpn_protocols = vec![plane.alpn().to_vec()];
    config.enable_sni = false;
    config.enable_early_data = false;
    config.resumption = Resumption::disabled();
    QuicClientConfig::try_from(config).map_err(|error| rustls::Error::General(error.to_string()))
}

/// Is the server a node of the cluster, and the one that is wanted? There are no host names to check: a node is known
/// by its id, wherever it is.
#[derive(Debug)]
struct Verifier {
    access: Access,
    wanted: Wanted,
    stranger: Arc<OnceLock<Stranger>>,
}

impl Verifier {
    fn check(
        &self,
        certificate: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let refuse = |stranger: Stranger| {
            // The first is the cause, and there is only one check in a handshake.
            let _ = self.stranger.set(stranger);
            rustls::Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)
        };
        let roots = match &self.access {
            Access::Certificate(identity) => roots(identity.trusted())?,
            Access::Token(token) => {
                let pinned = |der: &&CertificateDer<'_>| authority::fingerprint(der) == Some(token.authority);
                let Some(root) = others.iter().find(pinned) else {
                    return Err(refuse(Stranger::OtherAuthority));
                };
                roots([&root.clone().into_owned()])?
            }
        };
        let parsed = ParsedCertificate::try_from(certificate)?;
        let algorithms = provider().signature_verification_algorithms;
        if let Err(error) = verify_server_cert_signed_by_trust_anchor(&parsed, &roots, &[], now, algorithms.all) {
            return Err(refuse(match error {
                rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer) => Stranger::OtherAuthority,
                other => Stranger::Certificate(other.to_string()),
            }));
        }
        let Some(found) = named(certificate) else {
            return Err(refuse(Stranger::Nobody));
        };
        if let Access::Certificate(identity) = &self.access
            && identity.cluster() != found.cluster
        {
            return Err(refuse(Stranger::OtherAuthority));
        }
        let right = match (&found.peer, self.wanted) {
            (Peer::Node { .. }, Wanted::Anyone) => true,
            (Peer::Node { raft, .. }, Wanted::Control) => raft.is_some(),
            (Peer::Node { node, .. }, Wanted::Node(wanted)) => *node == wanted,
            (Peer::Node { raft, .. }, Wanted::Raft(wanted)) => *raft == Some(wanted),
            (Peer::User { .. } | Peer::Anonymous, _) => false,
        };
        if right { Ok(()) } else { Err(refuse(Stranger::Other { found: found.peer, wanted: self.wanted })) }
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.check(end_entity, intermediates, now).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &provider().signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &provider().signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

//! Sealing to one node: secrets in a goal cross the wire and lie in the node's ledger as ciphertext that only this
//! node's key opens (HPKE, RFC 9180, base mode: X25519, HKDF-SHA256, AES-256-GCM).

use std::fmt;
use std::path::{Path, PathBuf};

use orca_cluster::id::{ClusterId, NodeId};
use orca_cluster::secret::{Opaque, Sealed, SealingPublicKey, SecretName};
use rustls::crypto::aws_lc_rs::hpke::DH_KEM_X25519_HKDF_SHA256_AES_256 as SUITE;
use rustls::crypto::hpke::{EncapsulatedSecret, Hpke as _, HpkePrivateKey, HpkePublicKey};
use zeroize::Zeroizing;

use super::file::{self, PrivateFileError};

/// Keeps these ciphertexts apart from any other use of HPKE.
const INFO: &[u8] = b"orca.seal.v1";

/// An X25519 public key; also the length of what HPKE puts before the ciphertext.
const PUBLIC_KEY_LENGTH: usize = 32;

const FILE: &str = "sealing.pem";
const TAG: &str = "ORCA SEALING KEY";

#[derive(Debug, thiserror::Error)]
pub enum SealError {
    #[error("the public key is not an X25519 key")]
    PublicKey,
    #[error("the sealed value is for another node or another use, or is damaged")]
    Sealed,
    #[error("{} is damaged; remove it and the node's identity, and join again", path.display())]
    Damaged { path: PathBuf },
    #[error(transparent)]
    File(#[from] PrivateFileError),
}

/// What a secret in a goal is sealed together with: moved to another node or another name, it does not open.
pub fn goal_context(cluster: ClusterId, node: NodeId, name: &SecretName) -> String {
    format!("orca.goal.v1|{cluster}|{node}|{name}")
}

/// Seals for the holder of the private key, together with a context that opening must repeat.
pub fn seal(to: &SealingPublicKey, context: &[u8], plaintext: &[u8]) -> Result<Sealed, SealError> {
    if to.0.0.len() != PUBLIC_KEY_LENGTH {
        return Err(SealError::PublicKey);
    }
    let (secret, ciphertext) =
        SUITE.seal(INFO, context, plaintext, &HpkePublicKey(to.0.0.clone())).map_err(|_| SealError::PublicKey)?;
    let mut bytes = secret.0;
    bytes.extend_from_slice(&ciphertext);
    Ok(Sealed(Opaque(bytes)))
}

/// A node's own key pair for this; the private half never leaves the node.
pub struct SealingKey {
    public: SealingPublicKey,
    private: HpkePrivateKey,
}

impl SealingKey {
    pub fn generate() -> SealingKey {
        let (public, private) = SUITE.generate_key_pair().expect("the operating system gives random bytes");
        SealingKey { public: SealingPublicKey(Opaque(public.0)), private }
    }

    /// The key in the directory; made there the first time.
    pub fn load_or_create(directory: &Path) -> Result<SealingKey, SealError> {
        let path = directory.join(FILE);
        match file::read(&path) {
            Ok(text) => SealingKey::parse(&text).ok_or(SealError::Damaged { path }),
            Err(PrivateFileError::Missing { .. }) => {
                let key = SealingKey::generate();
                file::create(&path, key.text().as_bytes())?;
                Ok(key)
            }
            Err(error) => Err(error.into()),
        }
    }

    pub fn public(&self) -> &SealingPublicKey {
        &self.public
    }

    pub fn open(&self, context: &[u8], sealed: &Sealed) -> Result<Zeroizing<Vec<u8>>, SealError> {
        let bytes = &sealed.0.0;
        let (secret, ciphertext) = bytes.split_at_checked(PUBLIC_KEY_LENGTH).ok_or(SealError::Sealed)?;
        SUITE
            .open(&EncapsulatedSecret(secret.to_vec()), INFO, context, ciphertext, &self.private)
            .map(Zeroizing::new)
            .map_err(|_| SealError::Sealed)
    }

    /// Private half, then public half, in one block.
    fn text(&self) -> Zeroizing<String> {
        let mut both = self.private.secret_bytes().to_vec();
        both.extend_from_slice(&self.public.0.0);
        Zeroizing::new(pem::encode(&pem::Pem::new(TAG, both)))
    }

    fn parse(text: &[u8]) -> Option<SealingKey> {
        let block = pem::parse(text).ok()?;
        let (private, public) = block.contents().split_at_checked(block.contents().len() / 2)?;
        if block.tag() != TAG || public.len() != PUBLIC_KEY_LENGTH || private.len() != public.len() {
            return None;
        }
        let key = SealingKey {
            public: SealingPublicKey(Opaque(public.to_vec())),
            private: HpkePrivateKey::from(private.to_vec()),
        };
        // Two halves that do not belong together would lose every secret sealed from now on.
        let sealed = seal(&key.public, TAG.as_bytes(), b"").ok()?;
        key.open(TAG.as_bytes(), &sealed).ok()?;
        Some(key)
    }
}

impl fmt::Debug for SealingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SealingKey").field("public", &self.public).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_the_node_it_was_sealed_for_opens_it_and_only_in_its_place() {
        let (key, other) = (SealingKey::generate(), SealingKey::generate());
        let cluster = ClusterId(1);
        let context = goal_context(cluster, NodeId(3), &"web/DB".parse().unwrap());
        let sealed = seal(key.public(), context.as_bytes(), b"hunter2").unwrap();
        assert_eq!(key.open(context.as_bytes(), &sealed).unwrap().as_slice(), b"hunter2");
        assert!(other.open(context.as_bytes(), &sealed).is_err());
        for elsewhere in [
            goal_context(cluster, NodeId(4), &"web/DB".parse().unwrap()),
            goal_context(cluster, NodeId(3), &"web/DB2".parse().unwrap()),
            goal_context(cluster, NodeId(3), &"DB".parse().unwrap()),
            goal_context(ClusterId(2), NodeId(3), &"web/DB".parse().unwrap()),
        ] {
            assert!(key.open(elsewhere.as_bytes(), &sealed).is_err(), "{elsewhere}");
        }
        for length in 0..sealed.0.0.len() {
            let cut = Sealed(Opaque(sealed.0.0[..length].to_vec()));
            assert!(key.open(context.as_bytes(), &cut).is_err());
        }
        assert!(seal(&SealingPublicKey(Opaque(vec![1; 31])), b"", b"").is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn what_was_not_sealed_does_not_open(
            bytes in prop::collection::vec(any::<u8>(), 0..120), at in any::<prop::sample::Index>(), bits in 1u8..,
        ) {
            let key = SealingKey::generate();
            prop_assert!(key.open(b"c", &Sealed(Opaque(bytes))).is_err());
            let mut changed = seal(key.public(), b"c", b"hunter2").unwrap();
            let bytes = &mut changed.0.0;
            *at.get_mut(bytes) ^= bits;
            prop_assert!(key.open(b"c", &changed).is_err());
        }
    }

    #[test]
    fn the_key_is_the_same_after_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let first = SealingKey::load_or_create(directory.path()).unwrap();
        let second = SealingKey::load_or_create(directory.path()).unwrap();
        assert_eq!(first.public(), second.public());
        let sealed = seal(first.public(), b"c", b"x").unwrap();
        assert_eq!(second.open(b"c", &sealed).unwrap().as_slice(), b"x");
        file::replace(&directory.path().join(FILE), b"nonsense").unwrap();
        assert!(matches!(SealingKey::load_or_create(directory.path()), Err(SealError::Damaged { .. })));
    }
}

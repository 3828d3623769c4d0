//! Tokens: what someone without a certificate shows. The text carries the fingerprint of the cluster's authority, so
//! the holder knows whom it is talking to before it shows the secret.

use std::fmt;
use std::str::FromStr;

use aws_lc_rs::{constant_time, digest, rand};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use orca_cluster::secret::{Opaque, TOKEN_ID_LENGTH, TokenHash, TokenId};
use zeroize::Zeroizing;

/// The first part of every token; a scanner for leaked credentials can look for it.
const PREFIX: &str = "orca1";

/// SHA-256 of a certificate authority's public key (its SubjectPublicKeyInfo): it stays when the certificate around
/// the key is renewed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint(pub [u8; 32]);

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&URL_SAFE_NO_PAD.encode(self.0))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// 256 random bits. Can be compared with its hash and sent, and not printed.
#[derive(Clone)]
pub struct TokenSecret(Zeroizing<[u8; 32]>);

impl TokenSecret {
    /// What is stored of it.
    pub fn hash(&self) -> TokenHash {
        TokenHash(Opaque(digest::digest(&digest::SHA256, &*self.0).as_ref().to_vec()))
    }

    /// Whether the hash is of this secret; takes the same time whatever the answer.
    pub fn matches(&self, hash: &TokenHash) -> bool {
        constant_time::verify_slices_are_equal(&self.hash().0.0, &hash.0.0).is_ok()
    }

    pub(crate) fn reveal(&self) -> Zeroizing<String> {
        Zeroizing::new(URL_SAFE_NO_PAD.encode(*self.0))
    }

    pub(crate) fn parse(text: &str) -> Option<TokenSecret> {
        decode(text).map(|bytes| TokenSecret(Zeroizing::new(bytes)))
    }
}

impl fmt::Debug for TokenSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("hidden")
    }
}

/// A token as a person holds it: `orca1.<id>.<secret>.<fingerprint>`. Shown once, when it is made.
#[derive(Debug, Clone)]
pub struct Token {
    pub id: TokenId,
    pub secret: TokenSecret,
    pub authority: Fingerprint,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    #[error("a token has the form {PREFIX}.<id>.<secret>.<fingerprint>; copy all of it, in one line")]
    Form,
    #[error("the token's id, secret or fingerprint is damaged; copy all of it, in one line")]
    Damaged,
}

impl Token {
    /// A new token for the cluster with this authority. What it allows is for [`State`](orca_cluster) to say.
    pub fn create(authority: Fingerprint) -> Token {
        // 32 of them, so that the remainder below favours none.
        const ALPHABET: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";
        let id: String = random::<TOKEN_ID_LENGTH>().iter().map(|b| ALPHABET[usize::from(b % 32)] as char).collect();
        Token {
            id: id.parse().expect("the alphabet and the length are a token id's"),
            secret: TokenSecret(Zeroizing::new(random())),
            authority,
        }
    }

    /// The whole text, secret included.
    pub fn reveal(&self) -> Zeroizing<String> {
        Zeroizing::new(format!("{PREFIX}.{}.{}.{}", self.id, self.secret.reveal().as_str(), self.authority))
    }
}

impl FromStr for Token {
    type Err = TokenError;
    fn from_str(text: &str) -> Result<Token, TokenError> {
        let mut parts = text.trim().split('.');
        let (Some(PREFIX), Some(id), Some(secret), Some(authority), None) =
            (parts.next(), parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(TokenError::Form);
        };
        Ok(Token {
            id: id.parse().map_err(|_| TokenError::Damaged)?,
            secret: TokenSecret::parse(secret).ok_or(TokenError::Damaged)?,
            authority: Fingerprint(decode(authority).ok_or(TokenError::Damaged)?),
        })
    }
}

fn decode(text: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    // One byte longer than the text may decode to, so that a longer one is an error and not a panic.
    let mut space = Zeroizing::new([0; 33]);
    let length = URL_SAFE_NO_PAD.decode_slice(text, &mut *space).ok()?;
    if length != bytes.len() {
        return None;
    }
    bytes.copy_from_slice(&space[..length]);
    Some(bytes)
}

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    rand::fill(&mut bytes).expect("the operating system gives random bytes");
    bytes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_token_survives_its_text_and_hides_its_secret() {
        let token = Token::create(Fingerprint([7; 32]));
        let text = token.reveal();
        let read: Token = format!(" {}\n", text.as_str()).parse().unwrap();
        assert_eq!((&read.id, read.authority), (&token.id, token.authority));
        assert!(read.secret.matches(&token.secret.hash()));
        assert!(!read.secret.matches(&Token::create(Fingerprint([7; 32])).secret.hash()));
        assert!(!format!("{token:?}").contains(token.secret.reveal().as_str()));
    }

    #[test]
    fn a_damaged_token_is_refused() {
        let text = Token::create(Fingerprint([7; 32])).reveal();
        assert_eq!("orca2.a.b.c".parse::<Token>().unwrap_err(), TokenError::Form);
        assert_eq!(format!("{}.x", text.as_str()).parse::<Token>().unwrap_err(), TokenError::Form);
        for end in 0..text.len() {
            assert!(text[..end].parse::<Token>().is_err(), "cut at {end}");
        }
        assert!(format!("{}AAAA", text.as_str()).parse::<Token>().is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_a_token_in_one_way_or_none(
            parts in prop::collection::vec(prop_oneof!["[A-Za-z0-9_-]{43}", "[a-km-np-z2-9]{0,12}", "\\PC{0,50}"], 0..5),
        ) {
            let text = format!("{PREFIX}.{}", parts.join("."));
            if let Ok(token) = text.parse::<Token>() {
                let said = token.reveal();
                prop_assert_eq!(said.as_str(), text.trim());
            }
        }

        #[test]
        fn a_token_with_a_character_changed_is_not_the_same(at in any::<prop::sample::Index>(), to in "[ -~]") {
            let token = Token::create(Fingerprint([7; 32]));
            let mut text = token.reveal().to_string();
            let at = at.index(text.len());
            prop_assume!(text[at..=at] != to);
            text.replace_range(at..=at, &to);
            if let Ok(other) = text.parse::<Token>() {
                let is_same = (&other.id, other.authority) == (&token.id, token.authority);
                prop_assert!(!is_same || !other.secret.matches(&token.secret.hash()), "{}", text);
            }
        }
    }
}

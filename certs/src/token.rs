//! Enrolment tokens: everything a new part needs to join, in one string to paste.
//!
//! `tl1.` and base64url of: CA pin (32 bytes), secret (32), checksum (4), relay URL (the rest).
//! The checksum is there for people: it distinguishes a cut or mistyped token from a wrong one.

use crate::{CryptoError, Error, RelayUrlError, check_relay_url, sha256};
use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair as _};
use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use std::{fmt, str::FromStr};
use url::Url;
use zeroize::{Zeroize, Zeroizing};

const PREFIX: &str = "tl1.";
const CHECKSUM: usize = 4;
const HEAD: usize = 32 + 32 + CHECKSUM;
/// A URL of 2 KiB at most, far more than a real one has.
const MAX_TOKEN: usize = 4096;

/// A one-time secret of 256 bits, wiped from memory when it is dropped: the private half of an Ed25519
/// key (RFC 8032). It signs one enrolment request and never travels.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret([u8; 32]);

/// What `throwline token create` prints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EnrolmentToken {
    /// Where to enrol: the relay's public URL.
    pub relay: Url,
    /// The one-time secret, from which the token's key is derived.
    pub secret: Secret,
    /// SHA-256 of the authority's CA certificate.
    pub pin: [u8; 32],
}

/// The text is not a token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Without the prefix of a token.
    #[error("this is not an enrolment token: one begins with \"tl1.\"")]
    NotAToken,
    /// Of a later version.
    #[error("this token is of a version that this program does not know: update throwline")]
    UnknownVersion,
    /// The checksum does not match.
    #[error("the enrolment token is incomplete or mistyped: copy it again, whole")]
    Damaged,
    /// The relay's URL is not acceptable.
    #[error("the enrolment token's relay address cannot be used: {0}")]
    Relay(#[from] RelayUrlError),
}

impl Secret {
    /// A random secret.
    pub fn generate() -> Self {
        Self(rand::random())
    }

    /// As text. Never log it.
    pub fn expose(&self) -> String {
        BASE64_URL_SAFE_NO_PAD.encode(self.0)
    }

    /// The public half.
    pub(crate) fn public_key(&self) -> Result<Vec<u8>, Error> {
        Ok(self.key()?.public_key().as_ref().to_vec())
    }

    pub(crate) fn sign(&self, message: &[u8]) -> Result<Vec<u8>, Error> {
        Ok(self.key()?.sign(message).as_ref().to_vec())
    }

    /// The only form in which the authority keeps it: SHA-256 of the public half.
    ///
    /// # Errors
    /// The library for cryptography takes no key.
    pub fn hash(&self) -> Result<[u8; 32], Error> {
        Ok(sha256(&self.public_key()?))
    }

    fn key(&self) -> Result<Ed25519KeyPair, Error> {
        Ed25519KeyPair::from_seed_unchecked(&self.0).map_err(|_| CryptoError::TokenKey.into())
    }
}

impl FromStr for Secret {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        // The length of 32 bytes, checked before anything is allocated.
        if text.len() != 43 {
            return Err(TokenError::Damaged);
        }
        let bytes = BASE64_URL_SAFE_NO_PAD
            .decode(text)
            .map_err(|_| TokenError::Damaged)?;
        bytes.try_into().map(Self).map_err(|_| TokenError::Damaged)
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl fmt::Display for EnrolmentToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let url = self.relay.as_str().as_bytes();
        let mut bytes = Zeroizing::new(Vec::with_capacity(HEAD + url.len()));
        bytes.extend(self.pin);
        bytes.extend(self.secret.0);
        bytes.extend(checksum(&self.pin, &self.secret.0, url));
        bytes.extend(url);
        write!(f, "{PREFIX}{}", BASE64_URL_SAFE_NO_PAD.encode(&*bytes))
    }
}

impl FromStr for EnrolmentToken {
    type Err = TokenError;

    /// White space around the token is ignored: files and pasting add it.
    fn from_str(text: &str) -> Result<Self, TokenError> {
        let text = text.trim();
        let Some(body) = text.strip_prefix(PREFIX) else {
            // A token of a later version is not damaged, and needs another remedy.
            let other_version = text
                .strip_prefix("tl")
                .and_then(|rest| rest.split_once('.'));
            return Err(match other_version {
                Some((digits, _))
                    if !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()) =>
                {
                    TokenError::UnknownVersion
                }
                _ => TokenError::NotAToken,
            });
        };
        // Bounded before the decoder allocates.
        if body.len() > MAX_TOKEN {
            return Err(TokenError::Damaged);
        }
        let bytes = BASE64_URL_SAFE_NO_PAD
            .decode(body)
            .map(Zeroizing::new)
            .map_err(|_| TokenError::Damaged)?;
        let (pin, rest) = bytes.split_first_chunk::<32>().ok_or(TokenError::Damaged)?;
        let (secret, rest) = rest.split_first_chunk::<32>().ok_or(TokenError::Damaged)?;
        let (sum, url) = rest
            .split_first_chunk::<CHECKSUM>()
            .ok_or(TokenError::Damaged)?;
        // A token that was cut or mistyped is reported here; the relay could only answer that it is
        // unknown.
        if *sum != checksum(pin, secret, url) {
            return Err(TokenError::Damaged);
        }
        let url = std::str::from_utf8(url).map_err(|_| TokenError::Damaged)?;
        let relay = Url::parse(url).map_err(RelayUrlError::from)?;
        check_relay_url(&relay)?;
        Ok(Self {
            relay,
            secret: Secret(*secret),
            pin: *pin,
        })
    }
}

fn checksum(pin: &[u8; 32], secret: &[u8; 32], url: &[u8]) -> [u8; CHECKSUM] {
    let digest = sha256(&[pin.as_slice(), secret, url].concat());
    let mut sum = [0; CHECKSUM];
    sum.copy_from_slice(&digest[..CHECKSUM]);
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn token(url: &str) -> EnrolmentToken {
        EnrolmentToken {
            relay: Url::parse(url).unwrap(),
            secret: Secret::generate(),
            pin: rand::random(),
        }
    }

    proptest! {
        #[test]
        fn survives_printing(host in "[a-z]{1,20}(\\.[a-z]{2,5})?", port: u16, path in "(/[a-z]{1,5}){0,2}") {
            let token = token(&format!("https://{host}:{port}{path}"));
            let text = format!(" {token}\n");
            prop_assert_eq!(text.parse::<EnrolmentToken>().unwrap(), token);
        }

        #[test]
        fn nothing_panics(text in any::<String>(), body in "[A-Za-z0-9_-]{0,200}") {
            let _ = text.parse::<EnrolmentToken>();
            let _ = text.parse::<Secret>();
            let _ = format!("tl1.{body}").parse::<EnrolmentToken>();
        }

        #[test]
        fn every_cut_and_every_changed_letter_is_damage(at in 4usize..130, letter in "[A-Za-z0-9_-]") {
            let text = token("https://relay.example.com").to_string();
            let at = at.min(text.len() - 1);
            prop_assert_eq!(text[..at].parse::<EnrolmentToken>(), Err(TokenError::Damaged));
            let mut changed = text.clone();
            changed.replace_range(at..=at, &letter);
            if changed != text {
                prop_assert_eq!(changed.parse::<EnrolmentToken>(), Err(TokenError::Damaged));
            }
        }
    }

    #[test]
    fn says_what_is_wrong() {
        assert_eq!("".parse::<EnrolmentToken>(), Err(TokenError::NotAToken));
        assert_eq!(
            "hello".parse::<EnrolmentToken>(),
            Err(TokenError::NotAToken)
        );
        assert_eq!(
            "tl2.AAAA".parse::<EnrolmentToken>(),
            Err(TokenError::UnknownVersion)
        );
        for url in ["ftp://relay", "https://u:p@relay", "https://relay/?q"] {
            let result = token(url).to_string().parse::<EnrolmentToken>();
            assert!(
                matches!(result, Err(TokenError::Relay(_))),
                "{url}: {result:?}"
            );
        }
        let huge = format!("tl1.{}", "A".repeat(MAX_TOKEN + 1));
        assert_eq!(huge.parse::<EnrolmentToken>(), Err(TokenError::Damaged));
    }

    #[test]
    fn debug_does_not_tell_the_secret() {
        let token = token("https://relay.example.com");
        let text = format!("{token:?}");
        assert!(!text.contains(&token.secret.expose()) && text.contains("Secret(…)"));
    }
}

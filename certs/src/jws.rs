//! Assertions: compact JWS (RFC 7515) with ES256 and the signer's chain in `x5c`.
//!
//! The envelope is read here and not by a JWT library, because half of what such a library
//! offers (algorithm agility, key lookup, optional claims) is what must not be: the algorithm is
//! fixed, the key is taken from the chain alone, and the chain is checked by the [`Validator`]. The
//! tests check both directions against `jsonwebtoken`.

use crate::{
    CheckError, Error, ExpectedPeer, Identity, InvalidInput, JsonError, PeerIdentity, Validator,
    validator,
};
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED, UnparsedPublicKey};
use base64::{
    Engine,
    prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD},
};
use rustls_pki_types::CertificateDer;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::time::SystemTime;

/// Bytes of a whole token: half of what an AWS ALB takes in a header.
pub const MAX_TOKEN: usize = 8 * 1024;
/// Bytes of the certificates in `x5c`, as they stand there.
pub const MAX_X5C: usize = 4 * 1024;

/// Why a token was not accepted. Outward all of these are one constant answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JwsError {
    /// Larger than a valid one.
    #[error("the {0} is too large")]
    TooBig(&'static str),
    /// Not a compact JWS of this form.
    #[error("the token is malformed: {0}")]
    Malformed(#[source] MalformedToken),
    /// A field of the header is not allowed.
    #[error("the token's header is not acceptable: {0}")]
    Header(&'static str),
    /// The signer's certificate is not accepted.
    #[error(transparent)]
    Certificate(#[from] CheckError),
    /// The signature is not by the certificate's key.
    #[error("the token's signature is wrong")]
    BadSignature,
}

/// The rule of form that a token breaks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MalformedToken {
    /// A compact JWS has three parts.
    #[error("it does not have three parts")]
    Parts,
    /// A certificate has another encoding.
    #[error("x5c is not base64")]
    Chain,
    /// A part has another encoding.
    #[error("a part is not base64url")]
    Base64,
    /// Header or claims are of another shape.
    #[error(transparent)]
    Json(JsonError),
}

/// Members beyond these are ignored, as RFC 7515 asks, except `crit`, which is refused.
#[derive(Serialize, Deserialize)]
struct Header {
    alg: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    typ: Option<String>,
    #[serde(default)]
    x5c: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    crit: Option<serde_json::Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    b64: Option<serde_json::Value>,
}

/// Signs `claims`. The chain goes along without the CA, which the verifier has.
///
/// # Errors
/// The claims cannot be serialized, or the cryptography library fails.
pub fn sign<C: Serialize>(identity: &Identity, claims: &C) -> Result<String, Error> {
    let json = InvalidInput::Json;
    let header = Header {
        alg: "ES256".to_owned(),
        typ: Some("JWT".to_owned()),
        x5c: identity
            .chain()
            .iter()
            .map(|der| BASE64_STANDARD.encode(der))
            .collect(),
        crit: None,
        b64: None,
    };
    let mut token = BASE64_URL_SAFE_NO_PAD.encode(serde_json::to_vec(&header).map_err(json)?);
    token.push('.');
    token.push_str(&BASE64_URL_SAFE_NO_PAD.encode(serde_json::to_vec(claims).map_err(json)?));
    let signature = identity.sign_fixed(token.as_bytes())?;
    token.push('.');
    token.push_str(&BASE64_URL_SAFE_NO_PAD.encode(signature));
    Ok(token)
}

/// Checks, in this order, size, form, chain and signature, and last revocation and the certificate's
/// life: a [`CheckError::Revoked`] or [`CheckError::Expired`] therefore means that all else was good.
/// The claims are the caller's to check.
///
/// # Errors
/// The first check that failed; validity period and revocation are checked last.
pub fn verify<C: DeserializeOwned>(
    token: &str,
    validator: &Validator,
    expected: ExpectedPeer,
    now: SystemTime,
) -> Result<(PeerIdentity, C), JwsError> {
    let (peer, claims, life) = verify_ignoring_validity(token, validator, expected, now)?;
    life?;
    Ok((peer, claims))
}

/// The same for callers that still serve a peer whose certificate has expired, such as renewals. All
/// is checked except its validity period, whose check is the last part of the result.
///
/// # Errors
/// As [`verify`], except for the validity period.
pub fn verify_ignoring_validity<C: DeserializeOwned>(
    token: &str,
    validator: &Validator,
    expected: ExpectedPeer,
    now: SystemTime,
) -> Result<(PeerIdentity, C, Result<(), CheckError>), JwsError> {
    if token.len() > MAX_TOKEN {
        return Err(JwsError::TooBig("token"));
    }
    let not_compact = || JwsError::Malformed(MalformedToken::Parts);
    let (signed, signature) = token.rsplit_once('.').ok_or_else(not_compact)?;
    let (header, payload) = signed.split_once('.').ok_or_else(not_compact)?;
    let header: Header = json(&decode(header)?)?;
    let payload = decode(payload)?;
    let signature = decode(signature)?;
    let chain = chain_of(&header)?;

    let peer = validator.check_ignoring_validity(&chain, expected, now)?;
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, &peer.public_key)
        .verify(signed.as_bytes(), &signature)
        .map_err(|_| JwsError::BadSignature)?;
    // After the signature, so that only the key's holder learns that the certificate is revoked.
    validator.check_revoked(&peer)?;
    let life = validator::check_validity(&peer, now);
    Ok((peer, json(&payload)?, life))
}

fn chain_of(header: &Header) -> Result<Vec<CertificateDer<'static>>, JwsError> {
    // The algorithm is fixed: one that the token selects allows `none` or a public key as an HMAC's
    // (RFC 8725 section 3.1).
    if header.alg != "ES256" {
        return Err(JwsError::Header("alg is not ES256"));
    }
    // RFC 7515 section 4.1.11: extensions under `crit` that are not understood invalidate the
    // token; `b64` changes what is signed (RFC 7797).
    if header.crit.is_some() || header.b64.is_some() {
        return Err(JwsError::Header("crit and b64 are not supported"));
    }
    if header.x5c.is_empty() {
        return Err(JwsError::Header("there is no x5c"));
    }
    if header.x5c.iter().map(String::len).sum::<usize>() > MAX_X5C {
        return Err(JwsError::TooBig("certificate chain"));
    }
    header
        .x5c
        .iter()
        .map(|text| {
            BASE64_STANDARD
                .decode(text)
                .map(CertificateDer::from)
                .map_err(|_| JwsError::Malformed(MalformedToken::Chain))
        })
        .collect()
}

fn decode(part: &str) -> Result<Vec<u8>, JwsError> {
    BASE64_URL_SAFE_NO_PAD
        .decode(part)
        .map_err(|_| JwsError::Malformed(MalformedToken::Base64))
}

fn json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, JwsError> {
    serde_json::from_slice(bytes)
        .map_err(|error| JwsError::Malformed(MalformedToken::Json(error.into())))
}

#[cfg(test)]
mod tests;

//! Assertions: compact JWS (RFC 7515) with ES256 and the signer's chain in `x5c`.
//!
//! The envelope is read here and not by a JWT library, because half of what such a library
//! offers (algorithm agility, key lookup, optional claims) is what must not be: the algorithm is
//! fixed, the key comes from the chain alone, and the chain is judged by the [`Validator`]. The
//! tests check both directions against `jsonwebtoken`.

use crate::{CheckError, Error, Identity, PeerIdentity, Validator, Want, validator};
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
    #[error("the {0} is too large")]
    TooBig(&'static str),
    #[error("the token is malformed: {0}")]
    Malformed(String),
    #[error("the token's header is not acceptable: {0}")]
    Header(&'static str),
    #[error(transparent)]
    Certificate(#[from] CheckError),
    #[error("the token's signature is wrong")]
    BadSignature,
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
pub fn sign<C: Serialize>(identity: &Identity, claims: &C) -> Result<String, Error> {
    let json = |error: serde_json::Error| Error::Invalid(error.to_string());
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

/// Checks, in this order, size, form, chain and signature, and last the certificate's life: a
/// [`CheckError::Expired`] therefore means that all else was good. The claims are the caller's to
/// check.
pub fn verify<C: DeserializeOwned>(
    token: &str,
    validator: &Validator,
    want: Want,
    now: SystemTime,
) -> Result<(PeerIdentity, C), JwsError> {
    if token.len() > MAX_TOKEN {
        return Err(JwsError::TooBig("token"));
    }
    let not_compact = || JwsError::Malformed("it does not have three parts".to_owned());
    let (signed, signature) = token.rsplit_once('.').ok_or_else(not_compact)?;
    let (header, payload) = signed.split_once('.').ok_or_else(not_compact)?;
    let header: Header = json(&decode(header)?)?;
    let payload = decode(payload)?;
    let signature = decode(signature)?;
    let chain = chain_of(&header)?;

    let peer = validator.check_but_life(&chain, want, now)?;
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, &peer.public_key)
        .verify(signed.as_bytes(), &signature)
        .map_err(|_| JwsError::BadSignature)?;
    validator::check_life(&peer, now)?;
    Ok((peer, json(&payload)?))
}

fn chain_of(header: &Header) -> Result<Vec<CertificateDer<'static>>, JwsError> {
    if header.alg != "ES256" {
        return Err(JwsError::Header("alg is not ES256"));
    }
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
                .map_err(|_| JwsError::Malformed("x5c is not base64".to_owned()))
        })
        .collect()
}

fn decode(part: &str) -> Result<Vec<u8>, JwsError> {
    BASE64_URL_SAFE_NO_PAD
        .decode(part)
        .map_err(|_| JwsError::Malformed("a part is not base64url".to_owned()))
}

fn json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, JwsError> {
    serde_json::from_slice(bytes).map_err(|error| JwsError::Malformed(error.to_string()))
}

#[cfg(test)]
mod tests;

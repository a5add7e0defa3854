//! From an HTTP request to an authenticated carrier.
//!
//! The order matters: sizes, then parsing, chain, signature, claims, revocation (all before the
//! 101), then the challenge, and only then the mux. Nothing is held for a peer that has not
//! passed the step before. It stands apart from the server, so that others can be built from it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::header::{
    AUTHORIZATION, CONNECTION, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL,
    SEC_WEBSOCKET_VERSION, UPGRADE,
};
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode};
use throwline_certs::{
    CheckError, ExpectedPeer, Kind, PeerIdentity, Validator, jws, verify_signature,
};
use throwline_tunnel::carrier::{self, AcceptConfig, AcceptError, Connection};
use throwline_tunnel::proto::assertion::{self, Claims};
use throwline_tunnel::proto::messages::{Proof, Refusal, RefusalCode, Role};
use throwline_tunnel::proto::{SUBPROTOCOL, challenge};
use throwline_tunnel::ws;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use url::Url;

use super::denied::{AssertionError, Denied};
use super::response::Body;
use crate::limits::replay::ReplayCache;

/// Authenticates peers by their assertions and proofs.
pub struct Authenticator {
    validator: Validator,
    expected: ExpectedPeer,
    audience: String,
    clock_tolerance: Duration,
    replays: ReplayCache,
    accept: AcceptConfig,
    relays: Option<watch::Receiver<u32>>,
    renewable_until: Option<RenewableUntil>,
}

/// Until when a certificate can be renewed, expired or not.
type RenewableUntil = Box<dyn Fn(&PeerIdentity) -> SystemTime + Send + Sync>;

/// A peer whose assertion is valid. It has not proved yet that it holds the key now.
#[derive(Debug)]
pub struct VerifiedAssertion {
    pub peer: PeerIdentity,
    /// The carrier is for a renewal and for nothing else: the certificate may have expired.
    pub is_for_renewal: bool,
    assertion_hash: [u8; 32],
    websocket_accept: HeaderValue,
}

impl Authenticator {
    /// `remembered` is the number of assertions that are kept to refuse their replay.
    pub fn new(
        validator: Validator,
        public_url: &Url,
        clock_tolerance: Duration,
        remembered: usize,
        accept: AcceptConfig,
    ) -> Self {
        Self {
            validator,
            expected: ExpectedPeer::CARRIER,
            audience: assertion::audience(public_url),
            clock_tolerance,
            replays: ReplayCache::new(remembered),
            accept,
            relays: None,
            renewable_until: None,
        }
    }

    /// Accepts peers with an expired certificate too, up to this time, for a renewal alone.
    #[must_use]
    pub fn renewing(
        mut self,
        until: impl Fn(&PeerIdentity) -> SystemTime + Send + Sync + 'static,
    ) -> Self {
        self.renewable_until = Some(Box::new(until));
        self
    }

    /// Announces to dialers how many relays there are: an agent with one looks for another.
    #[must_use]
    pub fn of_set(mut self, relays: watch::Receiver<u32>) -> Self {
        self.relays = Some(relays);
        self
    }

    /// Accepts the other relays of the set, and no agent or user.
    #[must_use]
    pub fn for_peers(mut self) -> Self {
        self.expected = ExpectedPeer::PEER_CLIENT;
        self
    }

    /// Verifies a request for a carrier by its head. Uses up the assertion.
    pub fn check(&self, headers: &HeaderMap, now: SystemTime) -> Result<VerifiedAssertion, Denied> {
        let key = websocket_key(headers)?;
        if !offers_our_protocol(headers) {
            return Err(Denied::NoCommonProtocol(SUBPROTOCOL));
        }
        // Cheap checks are done: from here on signatures are verified.
        let token = bearer(headers)?;
        let (peer, claims, life) =
            jws::verify_ignoring_validity::<Claims>(token, &self.validator, self.expected, now)
                .map_err(|error| Denied::from_jws(error, now))?;
        let is_for_renewal = match claims.purpose.as_deref() {
            None => false,
            Some(assertion::RENEWAL) => true,
            Some(_) => return Err(Denied::Unauthenticated(AssertionError::Purpose)),
        };
        // After the signature: only the key's holder learns that the certificate has expired.
        if let Err(error) = life {
            let expired = matches!(error, CheckError::Expired { .. });
            let until = self.renewable_until.as_ref().map(|until| until(&peer));
            if !(expired && is_for_renewal && until.is_some_and(|until| now < until)) {
                return Err(Denied::from_jws(error.into(), now));
            }
        }
        let seconds = unix_seconds(now);
        let tolerance = self.clock_tolerance.as_secs();
        // Before the replay check, so that claims which are not accepted take no memory there.
        claims
            .check(&peer.id.to_string(), &self.audience, seconds, tolerance)
            .map_err(|error| Denied::from_claims(error, now))?;
        // Last, since it uses up the assertion. An entry lasts as long as the clock tolerance keeps
        // the assertion valid.
        self.replays
            .use_once(
                &claims.sub,
                &claims.jti,
                claims.exp.saturating_add(tolerance),
                seconds,
            )
            .map_err(Denied::from_replay)?;
        let websocket_accept = HeaderValue::from_str(&ws::accept_key(key))
            .map_err(|_| Denied::NotAnUpgrade("Sec-WebSocket-Key"))?;
        Ok(VerifiedAssertion {
            peer,
            is_for_renewal,
            assertion_hash: throwline_certs::sha256(token.as_bytes()),
            websocket_accept,
        })
    }

    /// After the 101: the challenge, the proof, and the mux.
    pub async fn establish<T>(
        &self,
        asserted: &VerifiedAssertion,
        io: T,
    ) -> Result<(Connection, Proof), AcceptError>
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let mut accept = self.accept.clone();
        if let Some(relays) = &self.relays {
            accept.relays = *relays.borrow();
        }
        carrier::accept(io, accept, |proof, nonce| {
            self.verify_proof(asserted, proof, nonce)
        })
        .await
    }

    fn verify_proof(
        &self,
        asserted: &VerifiedAssertion,
        proof: &Proof,
        nonce: &[u8; 32],
    ) -> Result<(), Refusal> {
        // The audience is this relay's: a proof that was made for another relay does not verify.
        let transcript = challenge::transcript(
            nonce,
            &proof.nonce,
            &asserted.assertion_hash,
            &self.audience,
            proof.version,
        );
        if !verify_signature(&asserted.peer, &transcript, &proof.signature) {
            return Err(Refusal::new(
                RefusalCode::Unauthenticated,
                "the proof was not accepted",
            ));
        }
        match (asserted.peer.id.kind(), proof.role()) {
            // `expected` decides which kinds come this far.
            (Kind::Cluster, Role::Agent)
            | (Kind::User, Role::LocalProxy)
            | (Kind::Relay, Role::Relay) => Ok(()),
            _ => Err(Refusal::new(
                RefusalCode::Unauthenticated,
                "the certificate is not for this role",
            )),
        }
    }
}

impl VerifiedAssertion {
    /// The 101 that begins the carrier.
    pub fn response(&self) -> Response<Body> {
        let mut response = Response::new(Body::default());
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        let headers = response.headers_mut();
        headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
        headers.insert(SEC_WEBSOCKET_ACCEPT, self.websocket_accept.clone());
        headers.insert(
            SEC_WEBSOCKET_PROTOCOL,
            HeaderValue::from_static(SUBPROTOCOL),
        );
        response
    }
}

fn unix_seconds(at: SystemTime) -> u64 {
    at.duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// RFC 6455, section 4.2.1.
fn websocket_key(headers: &HeaderMap) -> Result<&[u8], Denied> {
    if !lists(headers, &CONNECTION, "upgrade") {
        return Err(Denied::NotAnUpgrade("Connection"));
    }
    if !lists(headers, &UPGRADE, "websocket") {
        return Err(Denied::NotAnUpgrade("Upgrade"));
    }
    if headers
        .get(SEC_WEBSOCKET_VERSION)
        .map(HeaderValue::as_bytes)
        != Some(b"13")
    {
        return Err(Denied::NotAnUpgrade("Sec-WebSocket-Version"));
    }
    match headers.get(SEC_WEBSOCKET_KEY).map(HeaderValue::as_bytes) {
        // 16 bytes in base64.
        Some(key) if key.len() == 24 => Ok(key),
        _ => Err(Denied::NotAnUpgrade("Sec-WebSocket-Key")),
    }
}

fn offers_our_protocol(headers: &HeaderMap) -> bool {
    lists(headers, &SEC_WEBSOCKET_PROTOCOL, SUBPROTOCOL)
}

/// Whether a comma-separated header, which may be repeated, has this element.
fn lists(headers: &HeaderMap, name: &HeaderName, wanted: &str) -> bool {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|element| element.trim().eq_ignore_ascii_case(wanted))
}

fn bearer(headers: &HeaderMap) -> Result<&str, Denied> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let (Some(value), None) = (values.next(), values.next()) else {
        return Err(Denied::Unauthenticated(AssertionError::NotOne));
    };
    let (scheme, token) = value
        .to_str()
        .ok()
        .and_then(|value| value.split_once(' '))
        .ok_or(Denied::Unauthenticated(AssertionError::NotBearer))?;
    if !scheme.eq_ignore_ascii_case("bearer") {
        return Err(Denied::Unauthenticated(AssertionError::NotBearer));
    }
    Ok(token.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(HeaderName, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(name, HeaderValue::from_str(value).unwrap());
        }
        headers
    }

    fn upgrade(protocol: &str) -> HeaderMap {
        headers(&[
            (CONNECTION, "keep-alive, Upgrade"),
            (UPGRADE, "websocket"),
            (SEC_WEBSOCKET_VERSION, "13"),
            (SEC_WEBSOCKET_KEY, "dGhlIHNhbXBsZSBub25jZQ=="),
            (SEC_WEBSOCKET_PROTOCOL, protocol),
        ])
    }

    #[test]
    fn an_upgrade_needs_all_its_headers() {
        assert!(websocket_key(&upgrade("throwline.v1")).is_ok());
        for name in [
            CONNECTION,
            UPGRADE,
            SEC_WEBSOCKET_VERSION,
            SEC_WEBSOCKET_KEY,
        ] {
            let mut without = upgrade("throwline.v1");
            without.remove(&name);
            assert!(
                matches!(websocket_key(&without), Err(Denied::NotAnUpgrade(_))),
                "{name}"
            );
        }
    }

    #[test]
    fn our_protocol_is_found_among_others() {
        assert!(offers_our_protocol(&upgrade("throwline.v9, throwline.v1")));
        assert!(!offers_our_protocol(&upgrade("throwline.v10")));
        assert!(!offers_our_protocol(&upgrade("chat")));
    }

    #[test]
    fn one_bearer_token_is_one_bearer_token() {
        let token = |value| headers(&[(AUTHORIZATION, value)]);
        assert_eq!(bearer(&token("Bearer a.b.c")).unwrap(), "a.b.c");
        assert_eq!(bearer(&token("bearer a.b.c")).unwrap(), "a.b.c");
        assert!(bearer(&token("Basic a.b.c")).is_err());
        assert!(bearer(&token("Bearer")).is_err());
        assert!(bearer(&HeaderMap::new()).is_err());
        let two = headers(&[(AUTHORIZATION, "Bearer a"), (AUTHORIZATION, "Bearer b")]);
        assert!(bearer(&two).is_err());
    }
}

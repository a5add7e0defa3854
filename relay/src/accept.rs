//! From an HTTP request to an authenticated carrier.
//!
//! The order matters: sizes, then parsing, chain, signature, claims, revocation (all before the
//! 101), then the challenge, and only then the mux. Nothing is held for a peer that has not
//! passed the step before. It stands apart from the server, so that others can be built from it.

mod denied;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::header::{
    AUTHORIZATION, CONNECTION, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL,
    SEC_WEBSOCKET_VERSION, UPGRADE,
};
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode};
use throwline_certs::{Kind, PeerIdentity, Validator, Want, jws, verify_signature};
use throwline_tunnel::carrier::{self, AcceptConfig, AcceptError, Connection};
use throwline_tunnel::proto::assertion::{self, Claims};
use throwline_tunnel::proto::messages::{Proof, Refusal, RefusalCode, Role};
use throwline_tunnel::proto::{SUBPROTOCOL, challenge};
use throwline_tunnel::ws;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use url::Url;

pub use denied::Denied;

use crate::replay::ReplayCache;
use crate::response::Body;

/// Lets a peer in, or says why not.
pub struct Gate {
    validator: Validator,
    want: Want,
    audience: String,
    clock_tolerance: Duration,
    replays: ReplayCache,
    accept: AcceptConfig,
    relays: Option<watch::Receiver<u32>>,
}

/// A peer whose assertion was good. It has not proved yet that it holds the key now.
#[derive(Debug)]
pub struct Admission {
    pub peer: PeerIdentity,
    assertion_hash: [u8; 32],
    websocket_accept: HeaderValue,
}

impl Gate {
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
            want: Want::CARRIER,
            audience: assertion::audience(public_url),
            clock_tolerance,
            replays: ReplayCache::new(remembered),
            accept,
            relays: None,
        }
    }

    /// Tells dialers how many relays there are, so that an agent knows whether to look for another.
    #[must_use]
    pub fn of_set(mut self, relays: watch::Receiver<u32>) -> Self {
        self.relays = Some(relays);
        self
    }

    /// Lets the other relays of the set in, and nobody else.
    #[must_use]
    pub fn for_peers(mut self) -> Self {
        self.want = Want::PEER_CLIENT;
        self
    }

    /// Judges a request for a carrier by its head. Uses up the assertion.
    pub fn check(&self, headers: &HeaderMap, now: SystemTime) -> Result<Admission, Denied> {
        let key = websocket_key(headers)?;
        if !offers_our_protocol(headers) {
            return Err(Denied::NoCommonProtocol(SUBPROTOCOL));
        }
        let token = bearer(headers)?;
        let (peer, claims) = jws::verify::<Claims>(token, &self.validator, self.want, now)
            .map_err(|error| Denied::from_jws(error, now))?;
        let seconds = unix_seconds(now);
        let tolerance = self.clock_tolerance.as_secs();
        claims
            .check(&peer.id.to_string(), &self.audience, seconds, tolerance)
            .map_err(|error| Denied::from_claims(error, now))?;
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
        Ok(Admission {
            peer,
            assertion_hash: throwline_certs::sha256(token.as_bytes()),
            websocket_accept,
        })
    }

    /// After the 101: the challenge, the proof, and the mux.
    pub async fn establish<T>(
        &self,
        admission: &Admission,
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
            self.judge(admission, proof, nonce)
        })
        .await
    }

    fn judge(&self, admission: &Admission, proof: &Proof, nonce: &[u8; 32]) -> Result<(), Refusal> {
        let transcript = challenge::transcript(
            nonce,
            &proof.nonce,
            &admission.assertion_hash,
            &self.audience,
            proof.version,
        );
        if !verify_signature(&admission.peer, &transcript, &proof.signature) {
            return Err(Refusal::new(
                RefusalCode::Unauthenticated,
                "the proof was not accepted",
            ));
        }
        match (admission.peer.id.kind(), proof.role()) {
            // Which kinds come this far is the gate's `want`.
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

impl Admission {
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
        return Err(Denied::Unauthenticated("not exactly one assertion".into()));
    };
    let (scheme, token) = value
        .to_str()
        .ok()
        .and_then(|value| value.split_once(' '))
        .ok_or_else(|| Denied::Unauthenticated("the assertion is not a bearer token".into()))?;
    if !scheme.eq_ignore_ascii_case("bearer") {
        return Err(Denied::Unauthenticated(
            "the assertion is not a bearer token".into(),
        ));
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

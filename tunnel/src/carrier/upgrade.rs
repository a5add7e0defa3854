//! The HTTP/1.1 upgrade, from the dialer's side, and what a refusal of it means.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde::Deserialize;

use crate::proto::{CARRIER_PATH, SUBPROTOCOL, origin};
use crate::ws;

use super::socket::Socket;
use super::target::Target;
use super::{BoxError, DialConfig, DialError};

/// All headers of the upgrade together: what stands in between often allows 8 KiB. An assertion by the
/// largest certificate of a user (64 groups, a long name) has about 6 KiB.
const MAX_HEADERS: usize = 7 * 1024;

/// Longest answer other than 101 that is read.
const MAX_BODY: usize = 16 * 1024;

/// Upgrades; gives the socket back with the bytes that came behind the answer.
pub(super) async fn upgrade(
    socket: Socket,
    config: &DialConfig,
    target: &Target,
    assertion: &str,
) -> Result<(Socket, Bytes), DialError> {
    let not_a_relay = |why: BoxError| DialError::NotARelay {
        host: target.host.clone(),
        why,
    };
    let key = ws::new_key();
    let request = request(config, &key, assertion)?;
    let handshake = http1::handshake(TokioIo::new(socket)).await;
    let (mut sender, connection) = handshake.map_err(|error| not_a_relay(error.into()))?;
    // The connection is driven by a task, which would keep the socket when a deadline drops this
    // future.
    let connection = AbortOnDrop(tokio::spawn(connection.with_upgrades()));
    let answered = sender.send_request(request).await;
    let response = answered.map_err(|error| not_a_relay(error.into()))?;
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        return Err(refused(response, target).await);
    }
    check(response.headers(), &key).map_err(|why| not_a_relay(why.into()))?;
    let upgraded = hyper::upgrade::on(response).await;
    let upgraded = upgraded.map_err(|error| not_a_relay(error.into()))?;
    drop(connection);
    let parts = upgraded.downcast::<TokioIo<Socket>>();
    let parts = parts.map_err(|_| not_a_relay("the upgrade gave a foreign connection".into()))?;
    // The relay's Challenge may have arrived together with the 101.
    Ok((parts.io.into_inner(), parts.read_buf))
}

struct AbortOnDrop<T>(tokio::task::JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn request(
    config: &DialConfig,
    key: &str,
    assertion: &str,
) -> Result<Request<Empty<Bytes>>, DialError> {
    let bad = |why| DialError::BadUrl {
        url: config.relay.to_string(),
        why,
    };
    let url = &config.relay;
    let host = match (url.host_str(), url.port()) {
        (Some(host), Some(port)) => format!("{host}:{port}"),
        (Some(host), None) => host.to_owned(),
        (None, _) => return Err(bad("it has no host")),
    };
    let path = format!("{}/{CARRIER_PATH}", url.path().trim_end_matches('/'));
    let request = Request::get(path)
        .header(header::HOST, host)
        .header(header::CONNECTION, "Upgrade")
        .header(header::UPGRADE, "websocket")
        .header(header::SEC_WEBSOCKET_VERSION, "13")
        .header(header::SEC_WEBSOCKET_KEY, key)
        .header(header::SEC_WEBSOCKET_PROTOCOL, SUBPROTOCOL)
        .header(header::USER_AGENT, config.software.as_str())
        .header(header::AUTHORIZATION, format!("Bearer {assertion}"))
        .body(Empty::new())
        .map_err(|_| bad("it does not make a valid HTTP request"))?;
    let headers = request.headers().iter();
    let size: usize = headers
        .map(|(name, value)| name.as_str().len() + value.len() + 4)
        .sum();
    if size > MAX_HEADERS {
        let why = format!("the assertion makes {size} bytes of headers, over {MAX_HEADERS}");
        return Err(DialError::Prover(why.into()));
    }
    Ok(request)
}

fn check(headers: &HeaderMap, key: &str) -> Result<(), &'static str> {
    let is = |name, want: &str| {
        let value = headers.get(name).and_then(|value| value.to_str().ok());
        value.is_some_and(|value| value.trim().eq_ignore_ascii_case(want))
    };
    if !is(header::UPGRADE, "websocket") {
        return Err("its upgrade is not to a WebSocket");
    }
    // Shows that a WebSocket server has answered this request, not a cache (RFC 6455 section 1.3).
    let accept = headers.get(header::SEC_WEBSOCKET_ACCEPT);
    if accept.map(|value| value.as_bytes()) != Some(ws::accept_key(key.as_bytes()).as_bytes()) {
        return Err("its answer is not to this handshake");
    }
    // RFC 6455 section 4.1 requires this check; after permessage-deflate each message would be
    // misread.
    if headers.contains_key(header::SEC_WEBSOCKET_EXTENSIONS) {
        return Err("it chose an extension that was not offered");
    }
    if !is(header::SEC_WEBSOCKET_PROTOCOL, SUBPROTOCOL) {
        return Err("it did not choose the sub-protocol throwline.v1");
    }
    Ok(())
}

/// A relay's errors: `{"code": …, "message": …}`.
#[derive(Deserialize, Default)]
struct Body {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
    #[serde(default)]
    versions: Vec<String>,
}

async fn refused(response: Response<Incoming>, target: &Target) -> DialError {
    let (head, body) = response.into_parts();
    let retry_after = retry_after(&head.headers);
    let body = Limited::new(body, MAX_BODY).collect().await;
    let bytes = body
        .map(http_body_util::Collected::to_bytes)
        .unwrap_or_default();
    let parsed = serde_json::from_slice::<Body>(&bytes).ok();
    // Balancers and captive portals answer with pages; only JSON is taken for a relay's answer.
    let known = parsed.is_some();
    let Body {
        code,
        message,
        versions,
    } = parsed.unwrap_or_default();
    // Each error below names the relay itself.
    let message = origin::without(&message).to_owned();
    let status = head.status;
    match (status, code.as_str()) {
        (StatusCode::UNAUTHORIZED, "clock-skew") => DialError::ClockSkew { message },
        (StatusCode::UNAUTHORIZED, "certificate-expired") => {
            DialError::CertificateExpired { message }
        }
        (StatusCode::UNAUTHORIZED, "revoked") => DialError::Revoked,
        (StatusCode::UNAUTHORIZED, "unauthenticated") => DialError::Unauthenticated,
        (StatusCode::UPGRADE_REQUIRED, _) if known => DialError::Version {
            ours: SUBPROTOCOL.to_owned(),
            theirs: if versions.is_empty() {
                message
            } else {
                versions.join(", ")
            },
        },
        _ if known || status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error() => {
            DialError::Http {
                status: status.as_u16(),
                code,
                message,
                retry_after,
            }
        }
        _ => DialError::NotARelay {
            host: target.host.clone(),
            why: format!("status {status}").into(),
        },
    }
}

/// Seconds only: a relay does not send dates, and what stands in front of it seldom does.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get(header::RETRY_AFTER)?.to_str().ok()?;
    value.trim().parse().ok().map(Duration::from_secs)
}

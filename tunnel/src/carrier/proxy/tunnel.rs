//! One CONNECT, and what the answers mean.

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio_util::task::AbortOnDropHandle;

use super::ProxyFault;
use crate::PrefixedIo;
use crate::carrier::socket::Socket;

/// The longest head of an answer that is read. Squid's are below 1 KiB.
const MAX_HEAD: usize = 16 * 1024;

/// Asks the proxy at the other end of `socket` for a tunnel to `authority` (HOST:PORT). What the
/// far end sent already, in the same segment as the proxy's answer, is not lost.
pub(super) async fn ask(
    socket: Socket,
    authority: &str,
    credentials: Option<&HeaderValue>,
    software: &str,
) -> Result<Socket, ProxyFault> {
    let request = request(authority, credentials, software)?;
    let handshake = http1::Builder::new()
        .max_buf_size(MAX_HEAD)
        .handshake(TokioIo::new(socket))
        .await;
    let (mut sender, connection) = handshake.map_err(broken)?;
    let driver = AbortOnDropHandle::new(tokio::spawn(connection.with_upgrades()));
    let response = sender.send_request(request).await.map_err(broken)?;
    // Any 2xx, and only that, opens the tunnel (RFC 9110 section 9.3.6).
    if !response.status().is_success() {
        return Err(refused(&response, authority, credentials.is_some()));
    }
    let upgraded = hyper::upgrade::on(response).await.map_err(broken)?;
    drop(driver);
    let parts = upgraded.downcast::<TokioIo<Socket>>();
    let parts = parts.map_err(|_| ProxyFault::NotAProxy("a foreign connection".into()))?;
    let (early, io) = (parts.read_buf, parts.io.into_inner());
    Ok(Socket::Tunnel(Box::new(PrefixedIo::new(early, io))))
}

fn request(
    authority: &str,
    credentials: Option<&HeaderValue>,
    software: &str,
) -> Result<Request<Empty<Bytes>>, ProxyFault> {
    let mut request = Request::builder()
        .method(Method::CONNECT)
        .uri(authority)
        .header(header::HOST, authority)
        .header(header::USER_AGENT, software);
    if let Some(credentials) = credentials {
        request = request.header(header::PROXY_AUTHORIZATION, credentials);
    }
    let request = request.body(Empty::new());
    request.map_err(|_| ProxyFault::NotAProxy(format!("it cannot be asked for {authority}").into()))
}

fn broken(error: hyper::Error) -> ProxyFault {
    if error.is_parse() {
        return ProxyFault::NotAProxy(error.into());
    }
    ProxyFault::Lost(error)
}

fn refused(response: &Response<Incoming>, authority: &str, known: bool) -> ProxyFault {
    let (to, status) = (authority.to_owned(), response.status());
    if status == StatusCode::PROXY_AUTHENTICATION_REQUIRED {
        return match offered(response.headers()) {
            Some(offered) => ProxyFault::UnknownAuthentication { offered, to },
            None if known => ProxyFault::CredentialsRefused,
            None => ProxyFault::CredentialsMissing,
        };
    }
    let code = status.as_u16();
    match code {
        400..=499 => ProxyFault::Denied { to, status: code },
        500..=599 => ProxyFault::NoWay { to, status: code },
        _ => ProxyFault::NotAProxy(format!("status {code} to CONNECT").into()),
    }
}

/// The schemes that the proxy offers, if Basic is not among them.
fn offered(headers: &HeaderMap) -> Option<String> {
    let challenges = headers.get_all(header::PROXY_AUTHENTICATE).iter();
    // One challenge a line is what proxies send, and its first word is the scheme.
    let schemes: Vec<String> = challenges
        .filter_map(|value| value.to_str().ok()?.split_ascii_whitespace().next())
        .map(|scheme| scheme.trim_end_matches(',').chars().take(32).collect())
        .collect();
    let basic = |scheme: &String| scheme.eq_ignore_ascii_case("basic");
    let other = !schemes.is_empty() && !schemes.iter().any(basic);
    other.then(|| schemes.join(", "))
}

//! Header rules: framing that has two readings, names that have two spellings, and what belongs to
//! a connection instead of a request.

use std::borrow::Cow;

use http::header::{
    AUTHORIZATION, CONNECTION, CONTENT_LENGTH, COOKIE, EXPECT, HOST, SEC_WEBSOCKET_PROTOCOL,
    TRANSFER_ENCODING,
};
use http::{HeaderMap, HeaderName, HeaderValue, Version};
use throwline_kube_wire::Status;
use throwline_kube_wire::headers::{HOP_BY_HOP, connection_tokens};

use super::reader::Reader;

/// The API server takes a request's audit ID from it, and gives it in every answer.
pub const AUDIT_ID: HeaderName = HeaderName::from_static("audit-id");

/// Beginnings of headers by which a front proxy states the user or the address to the application behind
/// it: the API server (`Impersonate-*`, `X-Remote-*`), Authelia and Apache (`Remote-*`), oauth2-proxy,
/// Grafana, Kong, authentik, Pomerium, Vouch, Teleport, Tailscale, mod_auth_openidc, mod_auth_mellon,
/// Shibboleth, SiteMinder, WebSEAL, Oracle, Linkerd, Envoy, and those of AWS, Azure, Cloudflare and Google;
/// client certificates as RFC 9440, nginx, Envoy, Traefik and HAProxy pass them on.
///
/// A front proxy removes the client's own before it sets them; the agent is one here, and sets its own.
/// Each of these families is a front proxy's alone. Names that web applications also use for credentials
/// of their own (`X-Auth-Token`, `X-User-Id`, `X-Api-Key`) pass to a workload, and so do not belong here.
const IDENTITY_PREFIXES: [&str; 48] = [
    "impersonate-",
    "x-remote-",
    "remote-",
    "x-auth-request-",
    "x-webauth-",
    "x-authenticated-",
    "x-authentik-",
    "x-consumer-",
    "x-credential-",
    "x-anonymous-consumer",
    "x-pomerium-",
    "x-vouch-",
    "x-token-user-",
    "x-proxy-remote-",
    "teleport-",
    "tailscale-",
    "oidc-claim-",
    "oidc-access-token",
    "oidc-id-token",
    "mellon-",
    "shib-",
    "sm-",
    "iv-",
    "oam-",
    "l5d-",
    "x-envoy-",
    "x-amzn-oidc-",
    "x-amzn-mtls-",
    "x-ms-client-principal",
    "x-ms-token-",
    "x-arr-",
    "x-azure-clientip",
    "x-goog-authenticated-user-",
    "x-goog-iap-",
    "x-appengine-",
    "cf-",
    "client-cert",
    "x-client-cert",
    "x-client-dn",
    "x-client-s-dn",
    "x-client-subject",
    "x-client-issuer",
    "x-client-verify",
    "x-client-fingerprint",
    "x-ssl-",
    "ssl-client-",
    "x-tls-client-",
    "x-spiffe-",
];

/// The same, whole names.
const IDENTITY_NAMES: [&str; 24] = [
    "x-auth-user",
    "x-auth-username",
    "x-auth-userid",
    "x-auth-subject",
    "x-auth-groups",
    "x-auth-roles",
    "x-auth-email",
    "auth-user",
    "x-user",
    "x-username",
    "x-userinfo",
    "x-endpoint-api-userinfo",
    "x-apigateway-api-userinfo",
    "x-proxy-user",
    "x-mtls-client-cert",
    "x-clientcert",
    "true-client-ip",
    "x-client-ip",
    "x-cluster-client-ip",
    "fastly-client-ip",
    "x-original-forwarded-for",
    "x-real-ip",
    "forwarded",
    "x-forwarded",
];

/// Words of names that state the user of a request. To the API server no header passes that has one of them: which
/// names its request-header authenticator reads is its operator's choice (`--requestheader-…`), so no list
/// can be whole. A workload's own headers have such words, too.
const IDENTITY_WORDS: [&str; 32] = [
    "account",
    "auth",
    "authenticated",
    "cert",
    "certificate",
    "clientcert",
    "credential",
    "dn",
    "email",
    "group",
    "groups",
    "identity",
    "issuer",
    "jwt",
    "login",
    "oidc",
    "principal",
    "role",
    "roles",
    "saml",
    "spiffe",
    "ssl",
    "sso",
    "subject",
    "tls",
    "token",
    "uid",
    "upn",
    "user",
    "userid",
    "userinfo",
    "username",
];

/// It has one of the words, and names the client's program.
const USER_AGENT: &str = "user-agent";

/// What `X-Forwarded-` may go on with towards a workload: of the place that its links and redirects
/// lead to, not of who is asking, nor of the address, which would go into the API server's audit.
const PLACES: [&str; 6] = ["host", "port", "prefix", "proto", "server", "uri"];

/// A bearer token in the guise of a WebSocket sub-protocol, as browsers send it to Kubernetes.
const BEARER_SUBPROTOCOL: &str = "base64url.bearer.authorization.k8s.io.";

/// Refuses framing which two parsers could read in two ways (request smuggling).
pub(super) fn check_framing(headers: &HeaderMap, version: Version) -> Result<(), Status> {
    let mut lengths = headers.get_all(CONTENT_LENGTH).iter();
    let length = lengths.next();
    if lengths.next().is_some() {
        return Err(Status::bad_request(
            "the request has more than one content-length",
        ));
    }
    if length.is_some_and(|length| {
        length.is_empty() || !length.as_bytes().iter().all(u8::is_ascii_digit)
    }) {
        return Err(Status::bad_request("the content-length is not a number"));
    }
    let mut encodings = headers.get_all(TRANSFER_ENCODING).iter();
    if let Some(encoding) = encodings.next() {
        if length.is_some() {
            return Err(Status::bad_request(
                "the request has both a content-length and a transfer-encoding",
            ));
        }
        let chunked = encoding.as_bytes().eq_ignore_ascii_case(b"chunked");
        if version != Version::HTTP_11 || !chunked || encodings.next().is_some() {
            return Err(Status::bad_request(
                "the only transfer-encoding that passes is one \"chunked\" on HTTP/1.1",
            ));
        }
    }
    if headers.get_all(HOST).iter().count() > 1 {
        return Err(Status::bad_request("the request has more than one host"));
    }
    Ok(())
}

/// The header names that `Connection` declares to be hop-by-hop.
///
/// A client must not use it to have a header removed by which the request is understood
/// (CVE-2021-31999, CVE-2022-23652, CVE-2025-48865).
pub(super) fn named_by_connection(headers: &HeaderMap) -> Result<Vec<HeaderName>, Status> {
    if headers
        .get_all(CONNECTION)
        .iter()
        .any(|value| value.to_str().is_err())
    {
        return Err(Status::bad_request("the connection header is not ASCII"));
    }
    let mut named = Vec::new();
    for token in connection_tokens(headers) {
        let Ok(name) = HeaderName::from_bytes(token.as_bytes()) else {
            return Err(Status::bad_request(
                "the connection header names something that is no header",
            ));
        };
        let plain = dashed(name.as_str());
        let protected = is_identity(&plain)
            || matches!(
                plain.as_ref(),
                "authorization" | "host" | "content-length" | "transfer-encoding"
            );
        if protected {
            return Err(Status::bad_request(format!(
                "the connection header must not name {name}"
            )));
        }
        named.push(name);
    }
    Ok(named)
}

/// Refuses names with `_`, which CGI-like back ends read as `-`. To a workload they pass, as they do
/// through the API server, but for those that [`forwardable`] takes away in either spelling.
pub(super) fn check_names(headers: &HeaderMap, reader: Reader) -> Result<(), Status> {
    let mut names = headers.keys().map(HeaderName::as_str);
    match names.find(|name| name.contains('_') && reader == Reader::ApiServer) {
        Some(name) => Err(Status::bad_request(format!(
            "header names with '_' pass to workloads behind a proxy subresource only: {name}"
        ))),
        None => Ok(()),
    }
}

/// A copy without what belongs to the connection, to a proxy or to an identity.
pub(super) fn forwardable(headers: &HeaderMap, named: &[HeaderName], reader: Reader) -> HeaderMap {
    let mut kept = HeaderMap::with_capacity(headers.len() + 8);
    for (name, value) in headers {
        if is_dropped(name, reader) || named.contains(name) {
            continue;
        }
        if name == SEC_WEBSOCKET_PROTOCOL {
            if let Some(value) = without_bearer(value) {
                kept.append(name, value);
            }
            continue;
        }
        kept.append(name, value.clone());
    }
    kept
}

/// Whether the header states the user, to the API server or to an application behind a front proxy.
pub(super) fn is_identity(name: &str) -> bool {
    let plain = dashed(name);
    IDENTITY_PREFIXES
        .iter()
        .any(|prefix| plain.starts_with(prefix))
        || IDENTITY_NAMES.contains(&plain.as_ref())
}

fn has_identity_word(plain: &str) -> bool {
    plain != USER_AGENT && plain.split('-').any(|word| IDENTITY_WORDS.contains(&word))
}

/// Whether it is one of `Impersonate-*`, in either spelling.
pub(super) fn is_impersonation(name: &str) -> bool {
    dashed(name).starts_with("impersonate-")
}

fn dashed(name: &str) -> Cow<'_, str> {
    match name.contains('_') {
        true => Cow::Owned(name.replace('_', "-")),
        false => Cow::Borrowed(name),
    }
}

/// Whether the head announces a body.
pub(super) fn announces_body(headers: &HeaderMap) -> bool {
    let length = headers
        .get(CONTENT_LENGTH)
        .is_some_and(|length| length.as_bytes().iter().any(|digit| *digit != b'0'));
    length || headers.contains_key(TRANSFER_ENCODING)
}

fn is_dropped(name: &HeaderName, reader: Reader) -> bool {
    let text = dashed(name.as_str());
    let text = text.as_ref();
    let is_forwarded = || {
        let of = text.strip_prefix("x-forwarded-");
        of.is_some_and(|of| reader == Reader::ApiServer || !PLACES.contains(&of))
    };
    HOP_BY_HOP.contains(&text)
        || is_identity(text)
        || (reader == Reader::ApiServer && has_identity_word(text))
        // Ours alone: the agent's own authority and its own credentials are put in their place. The
        // API server removes this one itself after authentication.
        || text == AUTHORIZATION.as_str()
        || (text == COOKIE.as_str() && reader == Reader::ApiServer)
        || text == HOST.as_str()
        // hyper has answered it by the time that the body is read.
        || text == EXPECT.as_str()
        // With '_' it is not what frames the body, but a CGI-like workload would take it for that.
        || (text == CONTENT_LENGTH.as_str() && *name != CONTENT_LENGTH)
        // The agent's own, by which its audit and the API server's are joined.
        || text == AUDIT_ID.as_str()
        || text.starts_with("throwline-")
        || text.starts_with("proxy-")
        || is_forwarded()
}

/// The header without bearer tokens: untouched when there are none, gone when nothing else is in it.
fn without_bearer(value: &HeaderValue) -> Option<HeaderValue> {
    let is_bearer = |token: &[u8]| {
        let start = token.trim_ascii_start();
        start.len() >= BEARER_SUBPROTOCOL.len()
            && start[..BEARER_SUBPROTOCOL.len()].eq_ignore_ascii_case(BEARER_SUBPROTOCOL.as_bytes())
    };
    let members = || value.as_bytes().split(|byte| *byte == b',');
    if !members().any(is_bearer) {
        return Some(value.clone());
    }
    let kept = members()
        .filter(|token| !is_bearer(token))
        .map(<[u8]>::trim_ascii)
        .collect::<Vec<_>>()
        .join(&b", "[..]);
    if kept.is_empty() {
        None
    } else {
        HeaderValue::from_bytes(&kept).ok()
    }
}

//! Headers that belong to one connection and must not travel on to the next, and the two upgrades that
//! Kubernetes has.

use http::header::{CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, UPGRADE};
use http::{HeaderMap, HeaderName, HeaderValue};

/// Headers of a connection (RFC 9110, section 7.6.1), with the names that older software still sends.
pub const HOP_BY_HOP: [&str; 8] = [
    "connection",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "http2-settings",
];

/// The kinds of upgrade that Kubernetes has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Upgrade {
    /// RFC 6455.
    WebSocket,
    /// SPDY/3.1, as older clients of exec and port-forward speak it.
    Spdy,
}

impl Upgrade {
    /// As it is written in `Upgrade`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::WebSocket => "websocket",
            Self::Spdy => "SPDY/3.1",
        }
    }

    /// The upgrade that a request requests, or an answer grants; any other upgrade is none, as RFC 9110 allows.
    #[must_use]
    pub fn of(headers: &HeaderMap) -> Option<Self> {
        if !connection_tokens(headers).any(|token| token.eq_ignore_ascii_case("upgrade")) {
            return None;
        }
        let mut values = headers.get_all(UPGRADE).iter();
        let value = values.next()?.to_str().ok()?.trim();
        if values.next().is_some() {
            return None;
        }
        [Self::WebSocket, Self::Spdy]
            .into_iter()
            .find(|kind| value.eq_ignore_ascii_case(kind.as_str()))
    }
}

/// The comma-separated members of `Connection`; values that are not text are skipped.
pub fn connection_tokens(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|token| !token.is_empty())
}

/// Removes what a message has for this hop only: [`HOP_BY_HOP`] and all that `Connection` names. All other
/// headers keep their repetitions and order.
pub fn remove_hop_by_hop(headers: &mut HeaderMap) {
    remove(headers, &[]);
}

/// The same for an answer, in which `Connection` cannot take away what the answer's body is read by.
pub fn remove_hop_by_hop_of_answer(headers: &mut HeaderMap) {
    remove(headers, &[CONTENT_LENGTH, CONTENT_TYPE]);
}

fn remove(headers: &mut HeaderMap, kept: &[HeaderName]) {
    let named: Vec<HeaderName> = connection_tokens(headers)
        .filter_map(|token| HeaderName::from_bytes(token.as_bytes()).ok())
        .filter(|name| !kept.contains(name))
        .collect();
    for name in HOP_BY_HOP {
        headers.remove(name);
    }
    for name in named {
        headers.remove(name);
    }
}

/// Asks for the upgrade, or grants it, at the next hop.
pub fn set_upgrade(headers: &mut HeaderMap, upgrade: Upgrade) {
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static(upgrade.as_str()));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_static(value));
        }
        headers
    }

    #[test]
    fn only_the_two_upgrades_count_and_only_when_connection_says_so() {
        let of = |pairs: &[(&'static str, &'static str)]| Upgrade::of(&map(pairs));
        assert_eq!(
            of(&[("connection", "Upgrade"), ("upgrade", "websocket")]),
            Some(Upgrade::WebSocket)
        );
        assert_eq!(
            of(&[
                ("connection", "keep-alive, upgrade"),
                ("upgrade", "spdy/3.1")
            ]),
            Some(Upgrade::Spdy)
        );
        assert_eq!(of(&[("upgrade", "websocket")]), None);
        assert_eq!(of(&[("connection", "Upgrade")]), None);
        assert_eq!(of(&[("connection", "Upgrade"), ("upgrade", "h2c")]), None);
        assert_eq!(
            of(&[("connection", "Upgrade"), ("upgrade", "websocket, h2c")]),
            None
        );
        assert_eq!(
            of(&[
                ("connection", "Upgrade"),
                ("upgrade", "websocket"),
                ("upgrade", "SPDY/3.1")
            ]),
            None
        );
    }

    #[test]
    fn hop_by_hop_goes_with_what_connection_names_and_the_rest_stays_in_order() {
        let mut headers = map(&[
            ("connection", "close, X-Mine"),
            ("connection", "x-other"),
            ("x-mine", "1"),
            ("x-other", "2"),
            ("keep-alive", "timeout=5"),
            ("te", "trailers"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "h2c"),
            ("x-stream-protocol-version", "v5.channel.k8s.io"),
            ("x-stream-protocol-version", "v4.channel.k8s.io"),
            ("accept", "application/json"),
        ]);
        remove_hop_by_hop(&mut headers);
        assert_eq!(headers.keys_len(), 2);
        let versions: Vec<_> = headers
            .get_all("x-stream-protocol-version")
            .iter()
            .collect();
        assert_eq!(versions, ["v5.channel.k8s.io", "v4.channel.k8s.io"]);
    }

    #[test]
    fn a_connection_header_of_nonsense_harms_nothing() {
        let mut headers = map(&[("connection", ",, ,a b, \t,@"), ("accept", "x")]);
        remove_hop_by_hop(&mut headers);
        assert_eq!(headers.keys_len(), 1);
    }

    #[test]
    fn an_answer_keeps_what_its_body_is_read_by() {
        let mut headers = map(&[
            ("connection", "Content-Length, content-type, x-mine"),
            ("content-length", "3"),
            ("content-type", "text/plain"),
            ("x-mine", "1"),
            ("trailer", "x"),
        ]);
        let mut request = headers.clone();
        remove_hop_by_hop_of_answer(&mut headers);
        assert_eq!(headers.keys_len(), 2);
        assert_eq!(headers["content-length"], "3");
        remove_hop_by_hop(&mut request);
        assert!(request.is_empty());
    }
}

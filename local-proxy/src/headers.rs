//! Headers that belong to one connection and must not travel on to the next.

use http::{HeaderMap, HeaderName, HeaderValue, header};

/// RFC 9110, section 7.6.1, with the names that older software still sends.
static HOP_BY_HOP: [HeaderName; 7] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    HeaderName::from_static("http2-settings"),
    header::TE,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// The kinds of upgrade that Kubernetes has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Upgrade {
    WebSocket,
    Spdy,
}

impl Upgrade {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::WebSocket => "websocket",
            Self::Spdy => "SPDY/3.1",
        }
    }

    /// What a request asks for, or an answer grants; any other upgrade is none, as RFC 9110 allows.
    pub(crate) fn of(headers: &HeaderMap) -> Option<Self> {
        if !connection_tokens(headers).any(|token| token.eq_ignore_ascii_case("upgrade")) {
            return None;
        }
        let mut values = headers.get_all(header::UPGRADE).iter();
        let value = values.next()?.to_str().ok()?.trim();
        if values.next().is_some() {
            return None;
        }
        [Self::WebSocket, Self::Spdy]
            .into_iter()
            .find(|kind| value.eq_ignore_ascii_case(kind.as_str()))
    }
}

/// All that `Connection` names.
pub(crate) fn connection_tokens(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|token| !token.is_empty())
}

/// Removes what was said to this hop only. All other headers keep their repetitions and order.
pub(crate) fn remove_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = connection_tokens(headers)
        .filter_map(|token| HeaderName::from_bytes(token.as_bytes()).ok())
        .collect();
    for name in HOP_BY_HOP.iter().chain(&named) {
        headers.remove(name);
    }
}

/// Says the upgrade again, for the next hop.
pub(crate) fn set_upgrade(headers: &mut HeaderMap, upgrade: Upgrade) {
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static(upgrade.as_str()));
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
}

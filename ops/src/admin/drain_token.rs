//! Who may drain: a holder of the token, and no web page.

use axum::{
    http::{HeaderMap, StatusCode, header, uri::Authority},
    response::{IntoResponse, Response},
};
use std::{fmt, hint::black_box, net::IpAddr, sync::Arc};

/// What `POST /drain` must bring. `Debug` does not show it.
#[derive(Clone)]
pub struct DrainToken(Arc<str>);

/// Why a request to drain was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Denied {
    #[error("it comes from a web page")]
    WebPage,
    #[error("it has no token, or a wrong one")]
    NoToken,
}

impl DrainToken {
    /// # Panics
    /// The token is shorter than 32 bytes, and so can be guessed.
    pub fn new(token: &str) -> Self {
        assert!(token.len() >= 32, "a token of at least 32 bytes");
        Self(token.into())
    }

    pub(super) fn check(&self, headers: &HeaderMap) -> Result<(), Denied> {
        // A browser sends the first two itself; a page cannot leave them out or change them.
        let site = headers.get("sec-fetch-site");
        if headers.contains_key(header::ORIGIN)
            || site.is_some_and(|site| site != "none")
            || !is_of_a_machine(headers)
        {
            return Err(Denied::WebPage);
        }
        let given = headers
            .get(header::AUTHORIZATION)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
            .map(|(_, token)| token.trim());
        match given {
            Some(token) if is_same(token.as_bytes(), self.0.as_bytes()) => Ok(()),
            _ => Err(Denied::NoToken),
        }
    }
}

impl fmt::Debug for DrainToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DrainToken(…)")
    }
}

impl IntoResponse for Denied {
    fn into_response(self) -> Response {
        match self {
            Self::WebPage => (StatusCode::FORBIDDEN, "web pages may not drain\n").into_response(),
            Self::NoToken => (
                StatusCode::UNAUTHORIZED,
                [(header::WWW_AUTHENTICATE, "Bearer")],
                "send the relay's drain.token as Authorization: Bearer TOKEN\n",
            )
                .into_response(),
        }
    }
}

/// Whether a request is for an IP address or a name without a dot, such as localhost. A web page
/// reaches this listener by its own site's name, which has one, or by an address, and then its
/// `Origin` tells. Health checks of balancers may send no Host, or a name of the balancer's own.
pub(super) fn is_of_a_machine(headers: &HeaderMap) -> bool {
    let mut hosts = headers.get_all(header::HOST).iter();
    let host = match (hosts.next(), hosts.next()) {
        (None, _) => return true,
        (Some(host), None) => host,
        (Some(_), Some(_)) => return false,
    };
    let Ok(authority) = Authority::try_from(host.as_bytes()) else {
        return false;
    };
    let host = authority.host();
    let address = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'));
    !host.contains('.') && address.is_none() || address.unwrap_or(host).parse::<IpAddr>().is_ok()
}

/// In a time that does not depend on where the two differ.
fn is_same(a: &[u8], b: &[u8]) -> bool {
    let differ = a
        .iter()
        .zip(b)
        .fold(0, |all, (a, b)| black_box(all | (a ^ b)));
    a.len() == b.len() && differ == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: &str = "0123456789abcdef0123456789abcdef";

    fn check(headers: &[(&'static str, &str)]) -> Result<(), Denied> {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(*name, value.parse().unwrap());
        }
        DrainToken::new(TOKEN).check(&map)
    }

    #[test]
    fn the_token_is_needed_whole() {
        let good = format!("Bearer {TOKEN}");
        assert_eq!(
            check(&[("host", "10.1.2.3:9000"), ("authorization", &good)]),
            Ok(())
        );
        for bad in [
            "",
            "Bearer",
            "Bearer ",
            TOKEN,
            &format!("Basic {TOKEN}"),
            &format!("Bearer {}", &TOKEN[1..]),
            &format!("Bearer {TOKEN}0"),
            &format!("Bearer {}", TOKEN.to_uppercase()),
        ] {
            let denied = check(&[("host", "localhost"), ("authorization", bad)]);
            assert_eq!(denied, Err(Denied::NoToken), "{bad:?}");
        }
        assert_eq!(check(&[("host", "localhost")]), Err(Denied::NoToken));
    }

    #[test]
    fn a_web_page_is_refused_even_with_the_token() {
        let token = format!("Bearer {TOKEN}");
        for page in [
            &[("host", "127.0.0.1"), ("origin", "https://evil.example")][..],
            &[("host", "127.0.0.1"), ("origin", "null")],
            &[("host", "127.0.0.1"), ("sec-fetch-site", "cross-site")],
            &[("host", "127.0.0.1"), ("sec-fetch-site", "same-origin")],
            &[("host", "evil.example")],
            &[("host", "127.0.0.1.evil.example:9000")],
            &[("host", "localhost.evil.example")],
            &[("host", "127.0.0.1"), ("host", "evil.example")],
            &[("host", "evil.")],
            &[("host", "")],
        ] {
            let all: Vec<_> = [page, &[("authorization", &*token)]].concat();
            assert_eq!(check(&all), Err(Denied::WebPage), "{page:?}");
        }
        assert_eq!(check(&[("authorization", &token)]), Ok(()));
        for machine in [
            "127.0.0.1",
            "localhost:9000",
            "relay-0",
            "[::1]:9000",
            "[fd00::1]",
        ] {
            assert_eq!(
                check(&[("host", machine), ("authorization", &token)]),
                Ok(()),
                "{machine}"
            );
        }
    }
}

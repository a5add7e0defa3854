//! Where a relay is.

use url::Url;

use super::DialError;

/// Where the relay is, from its URL.
pub(super) struct Target {
    pub(super) host: String,
    pub(super) port: u16,
    pub(super) tls: bool,
}

impl Target {
    pub(super) fn at(url: &Url) -> Result<Self, DialError> {
        let tls = match url.scheme() {
            "https" => true,
            "http" => false,
            _ => return Err(bad(url, "it must begin with https://")),
        };
        // A relay authenticates by certificate alone, and a password in a URL ends up in logs.
        if !url.username().is_empty() || url.password().is_some() {
            return Err(bad(url, "it must not hold a user or password"));
        }
        let Some(host) = url.host_str() else {
            return Err(bad(url, "it has no host"));
        };
        let host = host
            .trim_start_matches('[')
            .trim_end_matches(']')
            .to_owned();
        Ok(Self {
            host,
            port: url.port_or_known_default().unwrap_or(443),
            tls,
        })
    }

    pub(super) fn authority(&self) -> String {
        authority(&self.host, self.port)
    }
}

pub(super) fn bad(url: &Url, why: &'static str) -> DialError {
    DialError::BadUrl {
        url: url.to_string(),
        why,
    }
}

/// HOST:PORT, an IPv6 address in brackets.
pub(super) fn authority(host: &str, port: u16) -> String {
    if host.contains(':') {
        format!("[{host}]:{port}")
    } else {
        format!("{host}:{port}")
    }
}

pub(super) fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(url::Host::Domain(name)) => name == "localhost" || name.ends_with(".localhost"),
        Some(url::Host::Ipv4(ip)) => ip.is_loopback(),
        Some(url::Host::Ipv6(ip)) => ip.is_loopback(),
        None => false,
    }
}

//! The client address of a connection, where balancers stand in between.
//!
//! **Invariant:** only a trusted address may name another client, be it by the PROXY protocol
//! or by `X-Forwarded-For`. For all others the address of the TCP connection counts.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use http::HeaderMap;
use ipnet::{IpNet, Ipv4Net};

/// The prefix of an IPv4 address that is written as IPv6 (RFC 4291, section 2.5.5.2).
const MAPPED_PREFIX: u8 = 96;

/// The balancers' addresses.
#[derive(Debug, Default)]
pub(crate) struct TrustedProxies {
    networks: Vec<IpNet>,
}

impl TrustedProxies {
    pub(crate) fn new(networks: &[IpNet]) -> Self {
        let networks = networks.iter().copied().map(canonical).collect();
        Self { networks }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.networks.is_empty()
    }

    pub(crate) fn contains(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.networks
            .iter()
            .any(|network| network.contains(&address))
    }

    /// The client of a request by `peer`: `X-Forwarded-For` is read from its right end, where the
    /// nearest balancer has written, for as long as the address before it is a trusted one. A
    /// malformed element ends the walk, since the address behind it is unknown. Without a port
    /// in the header, the port is 0.
    pub(crate) fn client(&self, peer: SocketAddr, headers: &HeaderMap) -> SocketAddr {
        let mut client = peer;
        for element in from_the_right(headers) {
            match parse(element) {
                Some(before) if self.contains(client.ip()) => client = before,
                _ => break,
            }
        }
        client
    }
}

/// A network of IPv4 addresses written as IPv6 would never match what it is compared with.
fn canonical(network: IpNet) -> IpNet {
    let IpNet::V6(six) = network else {
        return network;
    };
    let four = |address: Ipv4Addr| {
        let prefix = six.prefix_len().checked_sub(MAPPED_PREFIX)?;
        Ipv4Net::new(address, prefix).ok().map(IpNet::V4)
    };
    six.addr()
        .to_ipv4_mapped()
        .and_then(four)
        .unwrap_or(network)
}

/// The elements of all header lines as of one (RFC 9110, section 5.3), empty ones left out.
fn from_the_right(headers: &HeaderMap) -> impl Iterator<Item = &[u8]> {
    let lines = headers.get_all("x-forwarded-for").iter().rev();
    lines
        .flat_map(|line| line.as_bytes().rsplit(|byte| *byte == b','))
        .map(<[u8]>::trim_ascii)
        .filter(|element| !element.is_empty())
}

/// An address, with a port as Azure's Application Gateway writes it, or without.
fn parse(element: &[u8]) -> Option<SocketAddr> {
    let text = std::str::from_utf8(element).ok()?;
    let bare = text
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'))
        .unwrap_or(text);
    let address = bare
        .parse::<IpAddr>()
        .map(|ip| SocketAddr::new(ip, 0))
        .or_else(|_| text.parse::<SocketAddr>())
        .ok()?;
    Some(SocketAddr::new(address.ip().to_canonical(), address.port()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    const BALANCER: &str = "10.0.0.5";

    fn trusted(networks: &[&str]) -> TrustedProxies {
        let networks: Vec<IpNet> = networks.iter().map(|text| text.parse().unwrap()).collect();
        TrustedProxies::new(&networks)
    }

    /// The client of a connection from `peer` by these header lines.
    fn client(peer: &str, lines: &[&[u8]]) -> String {
        let mut headers = HeaderMap::new();
        for line in lines {
            let value = HeaderValue::from_bytes(line).unwrap();
            headers.append("x-forwarded-for", value);
        }
        let peer = SocketAddr::new(peer.parse().unwrap(), 1);
        let trusted = trusted(&["10.0.0.0/24", "192.168.7.7/32", "2001:db8:b::/48"]);
        trusted.client(peer, &headers).to_string()
    }

    #[test]
    fn the_nearest_address_that_is_not_a_balancer_is_the_client() {
        let peer = "10.0.0.5:1";
        for (lines, expected) in [
            (&[][..], peer),
            (&[&b"192.0.2.7"[..]][..], "192.0.2.7:0"),
            // What a client claims stands to the left of what the balancer wrote.
            (&[b"203.0.113.9, 192.0.2.7"], "192.0.2.7:0"),
            (&[b"203.0.113.9", b"192.0.2.7"], "192.0.2.7:0"),
            (&[b"203.0.113.9,10.0.0.9", b"192.0.2.7"], "192.0.2.7:0"),
            // Balancers behind balancers.
            (&[b"203.0.113.9, 192.0.2.7, 10.0.0.9"], "192.0.2.7:0"),
            (&[b"192.0.2.7,192.168.7.7", b"10.0.0.9 "], "192.0.2.7:0"),
            // One of our own machines is the client.
            (&[b"10.0.0.8, 10.0.0.9"], "10.0.0.8:0"),
            // Ports, brackets, notations, empty elements.
            (&[b"192.0.2.7:4711"], "192.0.2.7:4711"),
            (&[b"[2001:db8::7]:4711"], "[2001:db8::7]:4711"),
            (&[b"[2001:db8::7]"], "[2001:db8::7]:0"),
            (&[b"2001:db8::7"], "[2001:db8::7]:0"),
            (&[b"192.0.2.7, ::ffff:10.0.0.9"], "192.0.2.7:0"),
            (&[b"192.0.2.7,, 10.0.0.9 ,", b" "], "192.0.2.7:0"),
            (&[b"192.0.2.7, 2001:db8:b::1"], "192.0.2.7:0"),
            // Elements behind a malformed one do not count.
            (&[b"192.0.2.7, unknown"], peer),
            (&[b"192.0.2.7, _hidden, 10.0.0.9"], "10.0.0.9:0"),
            (&[b"192.0.2.7\xff"], peer),
            (&[b"192.0.2.7 192.0.2.8"], peer),
            (&[b"fe80::1%eth0"], peer),
            (&[b"192.0.2.7:66000"], peer),
        ] {
            assert_eq!(client(BALANCER, lines), expected, "{lines:?}");
        }
    }

    #[test]
    fn nobody_else_is_believed() {
        let claim: &[&[u8]] = &[b"192.0.2.7, 10.0.0.9"];
        assert_eq!(client("10.0.1.5", claim), "10.0.1.5:1");
        assert_eq!(client("192.0.2.1", claim), "192.0.2.1:1");
        assert_eq!(client("2001:db8::b", claim), "[2001:db8::b]:1");
        let nobody = TrustedProxies::default();
        assert!(nobody.is_empty());
        assert!(!nobody.contains("127.0.0.1".parse().unwrap()));
    }

    #[test]
    fn a_balancer_is_known_in_either_notation() {
        assert_eq!(client("::ffff:10.0.0.5", &[b"192.0.2.7"]), "192.0.2.7:0");
        let mapped = trusted(&["::ffff:10.0.0.0/120", "::/0"]);
        assert!(mapped.contains("10.0.0.255".parse().unwrap()));
        assert!(!mapped.contains("10.0.1.0".parse().unwrap()));
        assert!(mapped.contains("2001:db8::1".parse().unwrap()));
    }
}

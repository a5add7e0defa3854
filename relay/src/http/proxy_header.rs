//! The header of the PROXY protocol, by which a balancer names its client.
//!
//! Both versions of HAProxy's specification "The PROXY protocol": 1, a line of text, and 2,
//! binary. Framing is ours, so that not a byte too many is read; parsing is the crate's.

use std::io;
use std::net::{IpAddr, SocketAddr};

use ppp::{v1, v2};
use tokio::io::{AsyncRead, AsyncReadExt};

/// The bytes by which the versions are distinguished. Each header is longer than this.
const PREFIX: usize = v2::PROTOCOL_PREFIX.len();
/// The longest line of version 1, its CRLF included (section 2.1).
const V1_MOST: usize = 107;
/// Version 2 up to its length field (section 2.2).
const V2_HEAD: usize = 16;
/// The most bytes that we take after that. Addresses are 216 at most; a cloud's or HAProxy's
/// extensions (TLVs) some dozens each, and the specification wants all of it in 536.
const V2_MOST: usize = 1024;

/// Why a connection that must begin with a header is not served.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// As a health check that only connects would.
    #[error("the connection ended before its first byte")]
    Silent,
    #[error(
        "the balancer sent no PROXY header; turn it on there, or turn --proxy-protocol off here"
    )]
    Missing,
    #[error("the balancer's PROXY header is longer than the {0} bytes that it may have")]
    TooLong(usize),
    #[error("the balancer's PROXY header, version 1, is malformed: {0}")]
    V1(#[from] v1::BinaryParseError),
    #[error("the balancer's PROXY header, version 2, is malformed: {0}")]
    V2(#[from] v2::ParseError),
    #[error("the balancer's PROXY header could not be read to its end: {0}")]
    Io(#[from] io::Error),
}

/// Reads one header and not a byte beyond it. The answer is the client's address; `None` where
/// the balancer speaks for itself (a health check) or of something that is not TCP.
///
/// Not cancel safe; the caller sets the deadline.
pub(crate) async fn read<R>(io: &mut R) -> Result<Option<SocketAddr>, Error>
where
    R: AsyncRead + Unpin,
{
    let mut header = vec![0; PREFIX];
    let first = io.read(&mut header).await?;
    if first == 0 {
        return Err(Error::Silent);
    }
    io.read_exact(&mut header[first..]).await?;
    if header == v2::PROTOCOL_PREFIX {
        version_two(io, header).await
    } else if header.starts_with(v1::PROTOCOL_PREFIX.as_bytes()) {
        version_one(io, header).await
    } else {
        Err(Error::Missing)
    }
}

async fn version_one<R>(io: &mut R, mut line: Vec<u8>) -> Result<Option<SocketAddr>, Error>
where
    R: AsyncRead + Unpin,
{
    // Byte by byte: only its end determines its length, and the bytes that follow are the client's.
    while line.last() != Some(&b'\n') {
        if line.len() >= V1_MOST {
            return Err(Error::TooLong(V1_MOST));
        }
        line.push(io.read_u8().await?);
    }
    let header = v1::Header::try_from(line.as_slice())?;
    Ok(match header.addresses {
        v1::Addresses::Tcp4(tcp) => address(tcp.source_address, tcp.source_port),
        v1::Addresses::Tcp6(tcp) => address(tcp.source_address, tcp.source_port),
        v1::Addresses::Unknown => None,
    })
}

async fn version_two<R>(io: &mut R, mut header: Vec<u8>) -> Result<Option<SocketAddr>, Error>
where
    R: AsyncRead + Unpin,
{
    header.resize(V2_HEAD, 0);
    io.read_exact(&mut header[PREFIX..]).await?;
    let length = usize::from(u16::from_be_bytes([header[14], header[15]]));
    // The length is the peer's: bounded before the buffer grows to it.
    if length > V2_MOST {
        return Err(Error::TooLong(V2_HEAD + V2_MOST));
    }
    header.resize(V2_HEAD + length, 0);
    io.read_exact(&mut header[V2_HEAD..]).await?;
    let header = v2::Header::try_from(header.as_slice())?;
    Ok(match (header.command, header.addresses) {
        (v2::Command::Proxy, v2::Addresses::IPv4(tcp)) => {
            address(tcp.source_address, tcp.source_port)
        }
        (v2::Command::Proxy, v2::Addresses::IPv6(tcp)) => {
            address(tcp.source_address, tcp.source_port)
        }
        // LOCAL is a health check of the balancer, and UDP or UNIX addresses are none of a client
        // (PROXY protocol, section 2.2).
        _ => None,
    })
}

fn address(ip: impl Into<IpAddr>, port: u16) -> Option<SocketAddr> {
    Some(SocketAddr::new(ip.into().to_canonical(), port))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::io::AsyncWriteExt;

    const BEHIND: &[u8] = b"\x16\x03\x01 what TLS says next";

    fn v2(command: u8, family: u8, body: &[u8]) -> Vec<u8> {
        let length = u16::try_from(body.len()).unwrap().to_be_bytes();
        let mut header = v2::PROTOCOL_PREFIX.to_vec();
        header.extend([0x20 | command, family, length[0], length[1]]);
        header.extend(body);
        header
    }

    /// From 192.0.2.7:4711 to 198.51.100.1:443, and what `more` adds.
    fn v4(more: &[u8]) -> Vec<u8> {
        let mut body = vec![192, 0, 2, 7, 198, 51, 100, 1, 0x12, 0x67, 0x01, 0xbb];
        body.extend(more);
        v2(1, 0x11, &body)
    }

    /// From this address, port 4711.
    fn v6(source: &str) -> Vec<u8> {
        let source: std::net::Ipv6Addr = source.parse().unwrap();
        let mut body = source.octets().to_vec();
        body.extend([0; 16]);
        body.extend([0x12, 0x67, 0x01, 0xbb]);
        v2(1, 0x21, &body)
    }

    /// What is read of a header that is followed by other bytes, which must all be left.
    async fn of(header: &[u8]) -> Result<Option<String>, Error> {
        let bytes = [header, BEHIND].concat();
        let mut io = bytes.as_slice();
        let found = read(&mut io).await?;
        assert_eq!(io, BEHIND, "bytes that are not the header's were taken");
        Ok(found.map(|address| address.to_string()))
    }

    fn good() -> Vec<(Vec<u8>, Option<&'static str>)> {
        let tlv = [0xea, 0, 3, 1, b'v', b'p'];
        let line = |text: &str| format!("{text}\r\n").into_bytes();
        vec![
            (v4(&[]), Some("192.0.2.7:4711")),
            (v4(&tlv), Some("192.0.2.7:4711")),
            (v4(&[0; V2_MOST - 12]), Some("192.0.2.7:4711")),
            (v6("2001:db8::7"), Some("[2001:db8::7]:4711")),
            (v6("::ffff:192.0.2.7"), Some("192.0.2.7:4711")),
            // Its own connection, with and without addresses; and what has none that we know.
            (v2(0, 0x00, &[]), None),
            (v2(0, 0x11, &[1; 12]), None),
            (v2(1, 0x00, &tlv), None),
            (v2(1, 0x31, &[1; 216]), None),
            (
                line("PROXY TCP4 192.0.2.7 198.51.100.1 4711 443"),
                Some("192.0.2.7:4711"),
            ),
            (
                line("PROXY TCP6 2001:db8::7 2001:db8::1 4711 443"),
                Some("[2001:db8::7]:4711"),
            ),
            (line("PROXY UNKNOWN"), None),
            (line("PROXY UNKNOWN a b 1 2"), None),
        ]
    }

    #[tokio::test]
    async fn both_versions_name_the_client_and_take_nothing_else() {
        for (header, expected) in good() {
            let found = of(&header).await.unwrap();
            assert_eq!(found.as_deref(), expected, "{header:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_header_may_come_in_any_two_pieces() {
        for (header, expected) in good() {
            for cut in 1..header.len() {
                let (mut near, mut far) = tokio::io::duplex(2048);
                let late = async {
                    near.write_all(&header[..cut]).await.unwrap();
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    near.write_all(&header[cut..]).await.unwrap();
                };
                let (found, ()) = tokio::join!(read(&mut far), late);
                let found = found.unwrap().map(|address| address.to_string());
                assert_eq!(found.as_deref(), expected, "cut at {cut} of {header:?}");
            }
        }
    }

    #[tokio::test]
    async fn a_header_that_is_cut_is_none() {
        for (header, _) in good() {
            for cut in 1..header.len() {
                let mut io = &header[..cut];
                let found = read(&mut io).await;
                assert!(matches!(found, Err(Error::Io(_))), "{found:?} at {cut}");
            }
        }
        assert!(matches!(read(&mut &b""[..]).await, Err(Error::Silent)));
    }

    #[tokio::test]
    async fn garbage_is_refused() {
        let mut other_version = v4(&[]);
        other_version[12] = 0x31;
        let bad_v2 = [
            other_version,
            v2(2, 0x11, &[0; 12]),
            v2(1, 0x41, &[0; 12]),
            v2(1, 0x13, &[0; 12]),
            v2(1, 0x11, &[0; 11]),
            v2(1, 0x21, &[0; 35]),
        ];
        for header in bad_v2 {
            let found = of(&header).await;
            assert!(matches!(found, Err(Error::V2(_))), "{found:?}");
        }
        for line in [
            "PROXY TCP4 192.0.2.7 198.51.100.1 4711 443\n",
            "PROXY TCP4 192.0.2.7 198.51.100.1 4711\r\n",
            "PROXY TCP4 192.0.2.7 198.51.100.1 4711 443 5\r\n",
            "PROXY TCP4 192.0.2.700 198.51.100.1 4711 443\r\n",
            "PROXY TCP4 2001:db8::7 2001:db8::1 4711 443\r\n",
            "PROXY TCP4 192.0.2.7 198.51.100.1 4711 65536\r\n",
            "PROXY TCP4 192.0.2.7\r 198.51.100.1 4711 443\r\n",
            "PROXY UDP4 192.0.2.7 198.51.100.1 4711 443\r\n",
            "PROXYTCP4 192.0.2.7 198.51.100.1 4711 443\r\n",
            "PROXY TCP4 \u{1b}[2J 198.51.100.1 4711 443\r\n",
        ] {
            let found = of(line.as_bytes()).await;
            assert!(matches!(found, Err(Error::V1(_))), "{found:?} of {line:?}");
        }
        for bytes in [
            &b"GET /v1/ping HTTP/1.1\r\n"[..],
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\x00",
            b"proxy TCP4 192.0.2.7 198.51.100.1 4711 443\r\n",
        ] {
            assert!(matches!(of(bytes).await, Err(Error::Missing)));
        }
    }

    #[tokio::test]
    async fn an_endless_header_is_refused_at_its_bound() {
        let line = [&b"PROXY UNKNOWN "[..], &[b'x'; 4096]].concat();
        let mut io = line.as_slice();
        assert!(matches!(read(&mut io).await, Err(Error::TooLong(_))));
        assert_eq!(io.len(), line.len() - V1_MOST);
        let long = v4(&[0; V2_MOST - 11]);
        let mut io = long.as_slice();
        assert!(matches!(read(&mut io).await, Err(Error::TooLong(_))));
        assert_eq!(io.len(), long.len() - V2_HEAD);
    }
}

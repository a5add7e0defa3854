//! Linux tells of addresses by rtnetlink(7). All that is read is which address came or went, so
//! this needs none of the crates that model the whole protocol (a tenth of the build).

use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::net::UnixDatagram as Datagrams;

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with};
use tokio::net::UnixDatagram;

/// `RTMGRP_IPV4_IFADDR` and `RTMGRP_IPV6_IFADDR`.
const GROUPS: u32 = 0x10 | 0x100;
/// The kernel's messages fit into its own page-sized buffers, of 32 KiB at most.
const BUFFER: usize = 32 * 1024;

/// `nlmsghdr.nlmsg_type`.
const DONE: u16 = 3;
const NEW_ADDRESS: u16 = 20;
const DELETED_ADDRESS: u16 = 21;
const GET_ADDRESSES: u16 = 22;
/// `NLM_F_REQUEST | NLM_F_DUMP`.
const REQUEST_ALL: u16 = 0x1 | 0x300;
/// Lengths of `nlmsghdr`, `ifaddrmsg` and `rtattr`.
const HEADER: usize = 16;
const MESSAGE: usize = 8;
const ATTRIBUTE: usize = 4;
/// `rtattr.rta_type`: of a point-to-point link the peer's, and this end's own.
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;

/// The addresses of this machine, and what changes of them.
pub(super) struct Addresses {
    /// Not of the Unix family, but of datagrams, which is all that is used of it.
    socket: UnixDatagram,
    buffer: Vec<u8>,
    /// The kernel repeats an address whenever its lifetime changes, as with each IPv6
    /// advertisement; only one that was not there is news.
    known: HashSet<(u32, IpAddr)>,
    news: Vec<IpAddr>,
    /// The answer to the first request has been read: later messages are changes.
    is_complete: bool,
}

impl Addresses {
    /// Must be called within a tokio runtime.
    ///
    /// # Errors
    /// The system's, such as in a sandbox that forbids netlink.
    pub(super) fn new() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        // No protocol is NETLINK_ROUTE, 0.
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
        bind(&socket, &SocketAddrNetlink::new(0, GROUPS))?;
        let socket = Datagrams::from(socket);
        socket.send(&request())?;
        Ok(Self {
            socket: UnixDatagram::from_std(socket)?,
            buffer: vec![0; BUFFER],
            known: HashSet::new(),
            news: Vec::new(),
            is_complete: false,
        })
    }

    /// The next address that came or went. Cancel safe.
    ///
    /// # Errors
    /// The system tells no more.
    pub(super) async fn next(&mut self) -> io::Result<IpAddr> {
        loop {
            if let Some(address) = self.news.pop() {
                return Ok(address);
            }
            match self.socket.recv(&mut self.buffer).await {
                Ok(count) => {
                    let read = self.buffer.get(..count).unwrap_or_default();
                    note(read, &mut self.known, &mut self.news, &mut self.is_complete);
                }
                // Changes came faster than they were read, and some are lost: ask for all again.
                Err(error) if error.raw_os_error() == Some(Errno::NOBUFS.raw_os_error()) => {
                    self.socket.send(&request()).await?;
                }
                Err(error) => return Err(error),
            }
        }
    }
}

/// Asks for the addresses of all families.
fn request() -> [u8; HEADER + MESSAGE] {
    let mut request = [0; HEADER + MESSAGE];
    let length = (HEADER + MESSAGE) as u32;
    request[..4].copy_from_slice(&length.to_ne_bytes());
    request[4..6].copy_from_slice(&GET_ADDRESSES.to_ne_bytes());
    request[6..8].copy_from_slice(&REQUEST_ALL.to_ne_bytes());
    request
}

/// Takes one datagram of the kernel's.
fn note(
    mut datagram: &[u8],
    known: &mut HashSet<(u32, IpAddr)>,
    news: &mut Vec<IpAddr>,
    is_complete: &mut bool,
) {
    while let Some((message, kind, behind)) = message(datagram) {
        datagram = behind;
        let changed = match kind {
            DONE => {
                *is_complete = true;
                continue;
            }
            NEW_ADDRESS => address(message).filter(|address| known.insert(*address)),
            DELETED_ADDRESS => address(message).filter(|address| known.remove(address)),
            _ => continue,
        };
        // Until DONE these are the addresses that there were at the start, not changes.
        if let (Some((_, address)), true) = (changed, *is_complete) {
            news.push(address);
        }
    }
}

/// The body of the first message, its type, and what is behind it.
fn message(bytes: &[u8]) -> Option<(&[u8], u16, &[u8])> {
    let length = usize::try_from(u32::from_ne_bytes(at(bytes, 0)?)).ok()?;
    let kind = u16::from_ne_bytes(at(bytes, 4)?);
    let body = bytes.get(HEADER..length)?;
    // Messages are padded to 4 bytes (netlink(7)), the last one perhaps not.
    let behind = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some((body, kind, behind))
}

/// The interface and the address of an `ifaddrmsg`.
fn address(body: &[u8]) -> Option<(u32, IpAddr)> {
    let interface = u32::from_ne_bytes(at(body, 4)?);
    let mut attributes = body.get(MESSAGE..)?;
    let mut found = None;
    while let Some(length) = at(attributes, 0).map(u16::from_ne_bytes) {
        let kind = u16::from_ne_bytes(at(attributes, 2)?);
        let length = usize::from(length);
        let value = attributes.get(ATTRIBUTE..length)?;
        let address = match value.len() {
            4 => IpAddr::V4(Ipv4Addr::from(at::<4>(value, 0)?)),
            16 => IpAddr::V6(Ipv6Addr::from(at::<16>(value, 0)?)),
            _ => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        };
        match kind {
            // On a point-to-point link, IFA_ADDRESS is the address of the other end (rtnetlink(7)).
            IFA_LOCAL if !address.is_unspecified() => return Some((interface, address)),
            IFA_ADDRESS if !address.is_unspecified() => found = Some((interface, address)),
            _ => {}
        }
        attributes = attributes
            .get(length.next_multiple_of(4)..)
            .unwrap_or_default();
    }
    found
}

fn at<const N: usize>(bytes: &[u8], from: usize) -> Option<[u8; N]> {
    bytes.get(from..from.checked_add(N)?)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let length = (ATTRIBUTE + value.len()) as u16;
        let mut out = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
        out.extend_from_slice(value);
        out.resize(out.len().next_multiple_of(4), 0);
        out
    }

    fn message(kind: u16, interface: u32, attributes: &[Vec<u8>]) -> Vec<u8> {
        let mut body = vec![2, 24, 0, 0];
        body.extend_from_slice(&interface.to_ne_bytes());
        body.extend(attributes.concat());
        let length = (HEADER + body.len()) as u32;
        let mut out = length.to_ne_bytes().to_vec();
        out.extend_from_slice(&kind.to_ne_bytes());
        out.resize(HEADER, 0);
        out.extend(body);
        out
    }

    fn done() -> Vec<u8> {
        message(DONE, 0, &[])
    }

    fn news_of(datagrams: &[Vec<u8>]) -> Vec<String> {
        let (mut known, mut news, mut is_complete) = (HashSet::new(), Vec::new(), false);
        for datagram in datagrams {
            note(datagram, &mut known, &mut news, &mut is_complete);
        }
        news.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn only_what_changes_is_news() {
        let four = |kind| message(kind, 2, &[attribute(IFA_ADDRESS, &[192, 0, 2, 7])]);
        let six = |kind| {
            let address: Ipv6Addr = "2001:db8::7".parse().unwrap();
            message(kind, 2, &[attribute(IFA_ADDRESS, &address.octets())])
        };
        let first = [four(NEW_ADDRESS), done()].concat();
        let again = four(NEW_ADDRESS);
        let both = [four(DELETED_ADDRESS), six(NEW_ADDRESS)].concat();
        let gone = four(DELETED_ADDRESS);
        assert_eq!(
            news_of(&[first, again, both, six(NEW_ADDRESS), gone]),
            ["192.0.2.7", "2001:db8::7"]
        );
    }

    #[test]
    fn one_address_on_two_interfaces_is_two() {
        let on = |interface, kind| {
            let address = attribute(IFA_ADDRESS, &[10, 0, 0, 7]);
            message(kind, interface, &[address])
        };
        let datagrams = [done(), on(2, NEW_ADDRESS), on(3, NEW_ADDRESS)];
        assert_eq!(news_of(&datagrams).len(), 2);
    }

    #[test]
    fn of_a_point_to_point_link_this_end_counts() {
        let peer = attribute(IFA_ADDRESS, &[10, 0, 0, 1]);
        let own = attribute(IFA_LOCAL, &[10, 0, 0, 2]);
        // An attribute of another type, of a length that is padded.
        let label = attribute(3, b"tun10");
        let message = message(NEW_ADDRESS, 7, &[label, peer, own]);
        assert_eq!(news_of(&[done(), message]), ["10.0.0.2"]);
    }

    #[test]
    fn what_is_cut_or_nonsense_is_passed_over() {
        let whole = message(NEW_ADDRESS, 2, &[attribute(IFA_ADDRESS, &[10, 0, 0, 7])]);
        for length in 0..whole.len() {
            let cut = whole[..length].to_vec();
            assert!(news_of(&[done(), cut]).is_empty(), "{length}");
        }
        for length in [0_u32, 1, 15, u32::MAX] {
            let mut lying = whole.clone();
            lying[..4].copy_from_slice(&length.to_ne_bytes());
            assert!(news_of(&[done(), lying]).is_empty(), "{length}");
        }
        let mut lying = whole;
        lying[HEADER + MESSAGE..][..2].copy_from_slice(&[0, 0]);
        assert!(news_of(&[done(), lying]).is_empty());
    }

    /// The kernel answers, and knows loopback.
    #[tokio::test]
    async fn the_system_tells_its_addresses() {
        let mut addresses = Addresses::new().unwrap();
        let complete = async {
            while !addresses.is_complete {
                // Ends with a change, of which there may be none.
                let _ = tokio::time::timeout(Duration::from_millis(10), addresses.next()).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), complete)
            .await
            .unwrap();
        let loopback = IpAddr::from(Ipv4Addr::LOCALHOST);
        assert!(addresses.known.iter().any(|(_, each)| *each == loopback));
    }
}

//! Three network namespaces in a row, of which all addresses are private to them:
//!
//! ```text
//! user ──narrow──▶ path ──wide──▶ site
//! ```
//!
//! `narrow` is the user's link: a token bucket limits its rate in either direction, behind a queue, and
//! a rule drops packets that have passed it. `path` routes. A link with a round trip leads through a
//! tunnel of the kernel's, VXLAN, of which a process of `path` holds each packet back (see
//! [`super::path`]); so TCP at either end has the round trip of a real path, and nothing between them
//! accepts bytes on its own.
//!
//! Packets are Ethernet-sized and single everywhere: without segmentation offloads.

use std::net::{Ipv4Addr, SocketAddr};

use super::link::{LOSS_PERCENT, Link};
use super::namespace::Namespace;

/// Where the user's processes and the site's are, on every link.
const USER: Ipv4Addr = Ipv4Addr::new(10, 203, 0, 1);
pub(super) const SITE: Ipv4Addr = Ipv4Addr::new(10, 203, 0, 2);

/// Each end of the two hops.
const NARROW_USER: Ipv4Addr = Ipv4Addr::new(10, 203, 1, 1);
const NARROW_PATH: Ipv4Addr = Ipv4Addr::new(10, 203, 1, 2);
const WIDE_PATH: Ipv4Addr = Ipv4Addr::new(10, 203, 2, 1);
const WIDE_SITE: Ipv4Addr = Ipv4Addr::new(10, 203, 2, 2);

/// VXLAN's own port.
const VXLAN: u16 = 4789;
/// Of a packet, and of one with VXLAN's headers around it.
const MTU: u32 = 1_500;
const MTU_OUTSIDE: u32 = 1_550;
/// The longest that a packet waits in a queue of the link; then the queue is full and drops.
const QUEUE_MS: u32 = 100;

/// The name of the user's interface, and of the path's at its other end.
pub(super) const NARROW: &str = "narrow";
const WIDE: &str = "wide";
const FAR: &str = "far";

/// The namespaces of one run.
#[derive(Debug, Clone)]
pub(super) struct Network {
    pub(super) user: Namespace,
    pub(super) path: Namespace,
    pub(super) site: Namespace,
}

/// Where the process that delays packets listens, and where it sends what it received there.
pub(super) const DELAYED: [(SocketAddr, SocketAddr); 2] = [
    (vxlan(NARROW_PATH), vxlan(WIDE_SITE)),
    (vxlan(WIDE_PATH), vxlan(NARROW_USER)),
];

const fn vxlan(address: Ipv4Addr) -> SocketAddr {
    SocketAddr::V4(std::net::SocketAddrV4::new(address, VXLAN))
}

impl Network {
    /// The namespaces that the process `owner` has made, or is about to.
    pub(super) fn of(owner: u32) -> Self {
        Self {
            user: Namespace::named(owner, "user"),
            path: Namespace::named(owner, "path"),
            site: Namespace::named(owner, "site"),
        }
    }

    /// Makes namespaces and interfaces. `congestion_control`: of TCP in all of them; by default the
    /// machine's.
    ///
    /// # Errors
    /// Namespaces are not permitted, or a tool is missing. What was made until then is there.
    pub(super) fn make(&self, congestion_control: Option<&str>) -> anyhow::Result<()> {
        for namespace in self.all() {
            namespace.add()?;
            // Of one link for the next.
            namespace.set("ipv4/tcp_no_metrics_save", "1")?;
            if let Some(name) = congestion_control {
                namespace.set("ipv4/tcp_congestion_control", name)?;
            }
        }
        join(&self.user, &self.path, NARROW, [NARROW_USER, NARROW_PATH])?;
        join(&self.path, &self.site, WIDE, [WIDE_PATH, WIDE_SITE])?;
        self.path.set("ipv4/ip_forward", "1")?;
        self.path
            .ip(&format!("route add {USER} via {NARROW_USER}"))?;
        self.path.ip(&format!("route add {SITE} via {WIDE_SITE}"))?;
        for (namespace, address) in [(&self.user, USER), (&self.site, SITE)] {
            namespace.ip(&format!("address add {address}/32 dev lo"))?;
        }
        far(&self.user, NARROW_USER, NARROW_PATH)?;
        far(&self.site, WIDE_SITE, WIDE_PATH)
    }

    /// Makes the user's link this one. What is under way on the last one may be lost.
    pub(super) fn become_link(&self, link: Link) -> anyhow::Result<()> {
        for end in [&self.user, &self.path] {
            end.tc(&format!(
                "qdisc replace dev {NARROW} root tbf rate {}mbit burst {} latency {QUEUE_MS}ms",
                link.mbit,
                link.burst()
            ))?;
            // Before routing: so it meets the tunnel's packets, too.
            end.run("iptables", "-w -t raw -F PREROUTING")?;
            if link.is_lossy {
                let probability = f64::from(LOSS_PERCENT) / 100.0;
                end.run(
                    "iptables",
                    &format!(
                        "-w -t raw -A PREROUTING -i {NARROW} -m statistic --mode random \
                         --probability {probability} -j DROP"
                    ),
                )?;
            }
        }
        for (namespace, to, from, hop) in [
            (&self.user, SITE, USER, NARROW_PATH),
            (&self.site, USER, SITE, WIDE_PATH),
        ] {
            let by = match link.is_far {
                true => format!("dev {FAR}"),
                false => format!("via {hop}"),
            };
            namespace.ip(&format!("route replace {to} {by} src {from} mtu {MTU}"))?;
        }
        Ok(())
    }

    /// Removes all that was made, with the processes in it. Goes on where one fails; the last error is
    /// the result.
    pub(super) fn remove(&self) -> anyhow::Result<()> {
        let removed = self.all().map(Namespace::remove);
        removed.into_iter().rfold(Ok(()), |all, one| all.and(one))
    }

    fn all(&self) -> [&Namespace; 3] {
        [&self.user, &self.path, &self.site]
    }
}

/// A pair of interfaces of one name.
fn join(
    near: &Namespace,
    far: &Namespace,
    name: &str,
    addresses: [Ipv4Addr; 2],
) -> anyhow::Result<()> {
    near.ip(&format!(
        "link add {name} type veth peer name {name} netns {}",
        far.name()
    ))?;
    for (end, address) in [near, far].into_iter().zip(addresses) {
        end.ip(&format!("address add {address}/24 dev {name}"))?;
        up(end, name, MTU_OUTSIDE)?;
    }
    Ok(())
}

/// One end of the tunnel in which packets are delayed.
fn far(namespace: &Namespace, local: Ipv4Addr, remote: Ipv4Addr) -> anyhow::Result<()> {
    namespace.ip(&format!(
        "link add {FAR} type vxlan id 1 local {local} remote {remote} dstport {VXLAN} nolearning"
    ))?;
    // A checksum that is left to the interface would never be made: these packets pass a process.
    namespace.run("ethtool", &format!("-K {FAR} tx off"))?;
    up(namespace, FAR, MTU)
}

fn up(namespace: &Namespace, name: &str, mtu: u32) -> anyhow::Result<()> {
    namespace.run("ethtool", &format!("-K {name} tso off gso off gro off"))?;
    // TCP hands several segments over at once whatever the interface offers; but not here. And nothing of
    // IPv6 is sent unasked.
    namespace.ip(&format!(
        "link set {name} mtu {mtu} gso_max_segs 1 addrgenmode none up"
    ))
}

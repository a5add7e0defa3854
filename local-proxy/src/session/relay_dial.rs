//! How a local proxy dials its relay.

use throwline_certs::tls::Trust;
use throwline_tunnel::carrier::DialConfig;
use throwline_tunnel::proto::messages::Role;
use throwline_uplink::RelayTarget;

use crate::config::{Outbound, Timing};
use crate::failure::Failure;
use crate::store::Credentials;

/// How a local proxy with these credentials dials its relay.
pub(crate) fn dial_config(
    credentials: &Credentials,
    outbound: &Outbound,
    timing: &Timing,
    instance: &str,
) -> Result<DialConfig, Failure> {
    let relay = &credentials.relay;
    let target = RelayTarget {
        url: &relay.url,
        roots: &credentials.roots,
        trust: Trust {
            ca_file: outbound.extra_ca.as_deref().or(relay.ca_file.as_deref()),
            system: outbound.system_ca || relay.system_ca,
        },
        proxies: &outbound.proxies,
    };
    let mut config = target
        .dial_config(&credentials.identity, Role::LocalProxy, instance)
        .map_err(Failure::internal)?;
    config.timing = timing.carrier.clone();
    Ok(config)
}

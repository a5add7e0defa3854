//! How an enrolled component dials a relay: the proof of its identity, and what it trusts on the way.

use std::sync::Arc;

use throwline_certs::tls::{self, Trust};
use throwline_certs::{Error, Identity, Roots, jws, sha256};
use throwline_tunnel::carrier::{DialConfig, Prover, Proxies};
use throwline_tunnel::proto::messages::Role;
use url::Url;

/// A relay as its clients know it.
#[derive(Debug, Clone, Copy)]
pub struct RelayTarget<'a> {
    /// Its public URL.
    pub url: &'a Url,
    /// The authority that it must be of.
    pub roots: &'a Roots,
    /// Further CAs for TLS with the relay; a proxy on the way is trusted by the file's too.
    pub trust: Trust<'a>,
    /// Whether a proxy is on the way.
    pub proxies: &'a Proxies,
}

impl RelayTarget<'_> {
    /// A dial in the name of `identity`. `instance` tells two processes of one identity apart.
    ///
    /// # Errors
    /// A file of CAs cannot be read.
    pub fn dial_config(
        &self,
        identity: &Identity,
        role: Role,
        instance: &str,
    ) -> Result<DialConfig, Error> {
        // Any other scheme than these two is an error of the dial, which names it.
        let tls = match self.url.scheme() {
            "http" => None,
            _ => Some(tls::carrier_client(self.roots, self.trust)?),
        };
        let prover = Arc::new(prover(identity));
        let mut config = DialConfig::new(self.url.clone(), tls, prover, role, instance);
        let proxy_tls = || tls::proxy_client(self.trust.ca_file);
        config.proxies = self.proxies.trusting(self.url, proxy_tls)?;
        Ok(config)
    }
}

/// Proves this identity to a relay. The key stays in the process.
pub fn prover(identity: &Identity) -> Prover {
    let (asserting, signing) = (identity.clone(), identity.clone());
    Prover {
        assertion: Box::new(move |claims| Ok(jws::sign(&asserting, claims)?)),
        sign: Box::new(move |message| Ok(signing.sign(message)?)),
        sha256,
        id: identity.id().to_string(),
    }
}

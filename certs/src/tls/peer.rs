//! TLS between relays: mutual, TLS 1.3, each with the relay identity that it issued itself from
//! the authority that all relays of a set share.

use super::{
    Alpn, crypto, never_resume, provider,
    verifier::{ClientVerifier, ServerVerifier},
};
use crate::{Error, Identity, Kind, SpiffeId, Want, authority::Authority};
use arc_swap::ArcSwap;
use rustls::{
    ClientConfig, ServerConfig,
    client::Resumption,
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use std::{fmt, sync::Arc};

/// A relay's own identity, `/relay/INSTANCE`. It is made in memory, renewed at two thirds of its
/// life when it is next asked for, and never saved.
pub struct RelayIdentity {
    authority: Authority,
    id: SpiffeId,
    current: ArcSwap<Held>,
}

struct Held {
    identity: Identity,
    key: Arc<CertifiedKey>,
}

impl RelayIdentity {
    /// # Errors
    /// `instance` is no DNS label, or the authority cannot sign.
    pub fn new(authority: Authority, instance: &str) -> Result<Self, Error> {
        let domain = authority.trust_domain().clone();
        let id = SpiffeId::new(domain, Kind::Relay, instance)?;
        let current = ArcSwap::from_pointee(issue(&authority, &id)?);
        Ok(Self {
            authority,
            id,
            current,
        })
    }

    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// The identity to prove now. One that cannot be renewed is used to its end.
    pub fn current(&self) -> Identity {
        self.held().identity.clone()
    }

    fn held(&self) -> Arc<Held> {
        let held = self.current.load_full();
        if self.authority.now() < held.identity.renew_at() {
            return held;
        }
        // Two at once may both issue; either certificate is good.
        match issue(&self.authority, &self.id) {
            Ok(fresh) => {
                let fresh = Arc::new(fresh);
                self.current.store(Arc::clone(&fresh));
                tracing::info!(id = %self.id, "relay identity renewed");
                fresh
            }
            Err(error) => {
                tracing::error!(%error, id = %self.id, "relay identity cannot be renewed");
                held
            }
        }
    }
}

fn issue(authority: &Authority, id: &SpiffeId) -> Result<Held, Error> {
    let identity = authority.issue_relay_certificate(id.name(), &[])?;
    let chain = identity.chain().to_vec();
    let key = CertifiedKey::from_der(chain, identity.key_der(), &provider()).map_err(crypto)?;
    Ok(Held {
        identity,
        key: Arc::new(key),
    })
}

impl ResolvesServerCert for RelayIdentity {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.held().key))
    }
}

impl fmt::Debug for RelayIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RelayIdentity")
            .field("id", &self.id.to_string())
            .finish_non_exhaustive()
    }
}

/// The listener for peers: any relay of the trust domain may connect, and nobody else.
pub fn peer_server(identity: Arc<RelayIdentity>) -> Result<Arc<ServerConfig>, Error> {
    let verifier = ClientVerifier {
        validator: identity.authority.validator().clone(),
        want: Want::PEER_CLIENT,
    };
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(crypto)?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(identity);
    config.alpn_protocols = vec![Alpn::Http11.as_bytes().to_vec()];
    never_resume(&mut config);
    Ok(Arc::new(config))
}

/// Towards the relay named `instance`: whoever else answers is refused.
///
/// # Errors
/// `instance` is no DNS label.
pub fn peer_client(identity: &RelayIdentity, instance: &str) -> Result<Arc<ClientConfig>, Error> {
    let verifier = ServerVerifier {
        validator: identity.authority.validator().clone(),
        want: Want::PEER_SERVER,
        expect: SpiffeId::new(identity.id.domain().clone(), Kind::Relay, instance)?,
    };
    let own = identity.current();
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(crypto)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_auth_cert(own.chain().to_vec(), own.key_der())
        .map_err(crypto)?;
    config.alpn_protocols = vec![Alpn::Http11.as_bytes().to_vec()];
    config.resumption = Resumption::disabled();
    // The peer is known by its certificate; its address is nobody else's business.
    config.enable_sni = false;
    Ok(Arc::new(config))
}

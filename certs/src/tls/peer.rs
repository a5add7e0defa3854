//! TLS between relays: mutual, TLS 1.3, each with the relay identity that the authority of the set has
//! issued to it.

use super::{
    Alpn, never_resume, provider, single,
    verifier::{ClientVerifier, ServerVerifier},
};
use crate::{
    Error, ExpectedPeer, Identity, Kind, PendingIdentity, SpiffeId,
    directory::{Directory, DirectoryError},
};
use arc_swap::ArcSwap;
use rustls::{
    ClientConfig, ServerConfig,
    client::Resumption,
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use std::{fmt, sync::Arc};

/// A relay's own identity, `/relay/INSTANCE`. Its key is made here, in memory, and never saved.
///
/// It is due for renewal at two thirds of its life; [`renew_if_due`](Self::renew_if_due) is to be
/// called at intervals that are short against the last third.
pub struct RelayIdentity {
    directory: Arc<dyn Directory>,
    id: SpiffeId,
    current: ArcSwap<Held>,
}

struct Held {
    identity: Identity,
    key: Arc<CertifiedKey>,
}

/// Why a relay got no certificate from its authority.
#[derive(Debug, thiserror::Error)]
pub enum CertifyError {
    /// The authority did not certify the relay.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// The answer does not fit, or nothing can be asked for.
    #[error(transparent)]
    Own(#[from] Error),
}

impl RelayIdentity {
    /// Has the identity of this instance issued.
    ///
    /// # Errors
    /// `instance` is no DNS label, or the authority does not issue.
    pub async fn issue(
        directory: Arc<dyn Directory>,
        instance: &str,
    ) -> Result<Self, CertifyError> {
        let domain = directory.validator().domain().clone();
        let id = SpiffeId::new(domain, Kind::Relay, instance).map_err(Error::from)?;
        let current = ArcSwap::from_pointee(issue(&*directory, &id).await?);
        Ok(Self {
            directory,
            id,
            current,
        })
    }

    /// The relay's SPIFFE id.
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// The identity to prove now. One that cannot be renewed is used to its end.
    pub fn current(&self) -> Identity {
        self.current.load().identity.clone()
    }

    /// Replaces the identity if two thirds of its life have passed. What fails is logged, and tried
    /// again at the next call.
    pub async fn renew_if_due(&self) {
        if self.directory.now() < self.current.load().identity.renew_at() {
            return;
        }
        match issue(&*self.directory, &self.id).await {
            Ok(fresh) => {
                self.current.store(Arc::new(fresh));
                tracing::info!(id = %self.id, "relay identity renewed");
            }
            Err(error) => {
                tracing::error!(%error, id = %self.id, "relay identity cannot be renewed");
            }
        }
    }
}

async fn issue(directory: &dyn Directory, id: &SpiffeId) -> Result<Held, CertifyError> {
    let pending = PendingIdentity::generate()?;
    let chain = directory
        .certify_relay(id.name(), pending.csr_der())
        .await?;
    let identity = pending.complete(chain)?;
    let key = Arc::new(identity.certified_key());
    Ok(Held { identity, key })
}

impl ResolvesServerCert for RelayIdentity {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.current.load().key))
    }
}

impl fmt::Debug for RelayIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RelayIdentity")
            .field("id", &self.id.to_string())
            .finish_non_exhaustive()
    }
}

/// The listener for peers: only relays of the trust domain may connect.
///
/// # Errors
/// rustls rejects the configuration.
pub fn peer_server(identity: Arc<RelayIdentity>) -> Result<Arc<ServerConfig>, Error> {
    let verifier = ClientVerifier {
        validator: identity.directory.validator().clone(),
        expected: ExpectedPeer::PEER_CLIENT,
    };
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(identity);
    config.alpn_protocols = vec![Alpn::Http11.as_bytes().to_vec()];
    never_resume(&mut config);
    Ok(Arc::new(config))
}

/// Towards the relay named `instance`: any other peer is rejected.
///
/// # Errors
/// `instance` is no DNS label.
pub fn peer_client(identity: &RelayIdentity, instance: &str) -> Result<Arc<ClientConfig>, Error> {
    let verifier = ServerVerifier {
        validator: identity.directory.validator().clone(),
        expected: ExpectedPeer::PEER_SERVER,
        expect: SpiffeId::new(identity.id.domain().clone(), Kind::Relay, instance)?,
    };
    let own = identity.current();
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(single(&own));
    config.alpn_protocols = vec![Alpn::Http11.as_bytes().to_vec()];
    config.resumption = Resumption::disabled();
    // The peer is known by its certificate; its address is not disclosed.
    config.enable_sni = false;
    Ok(Arc::new(config))
}

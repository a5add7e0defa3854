//! rustls configurations, one for each place where TLS is spoken.
//!
//! **Invariant:** a sealed session is TLS 1.3, mutual, never resumed: a resumed handshake would
//! not look at the peer's certificate again.

mod peer;
mod provider;
mod relay;
mod verifier;

use crate::{
    CheckError, Damage, Error, ExpectedPeer, Identity, MalformedCertificate, PeerIdentity, Roots,
    SpiffeId, Validator, files,
};
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    client::Resumption,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
    server::NoServerSessionStorage,
    sign::SingleCertAndKey,
};
use std::{
    path::Path,
    sync::{Arc, OnceLock},
};
use verifier::{ClientVerifier, ServerVerifier};

pub use peer::{CertifyError, RelayIdentity, peer_client, peer_server};
pub use provider::{provide_to_libraries, provider};
pub use relay::{HttpsCertificate, RelayCertificate, relay_server};
pub use verifier::UnexpectedPeer;

/// What a sealed session carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alpn {
    /// An API session.
    H2,
    /// An upgrade session.
    Http11,
}

impl Alpn {
    /// The protocol name on the wire.
    pub fn as_bytes(self) -> &'static [u8] {
        match self {
            Self::H2 => b"h2",
            Self::Http11 => b"http/1.1",
        }
    }
}

/// The name to give to `TlsConnector::connect` on a sealed session. It is never sent and never
/// compared: the peer is known by its [`SpiffeId`].
pub fn session_name() -> ServerName<'static> {
    ServerName::IpAddress(std::net::IpAddr::from([127, 0, 0, 1]).into())
}

/// The user's end of a sealed session with the cluster `expect`.
///
/// # Errors
/// rustls rejects the configuration.
pub fn session_client(
    identity: &Identity,
    validator: &Validator,
    expect: SpiffeId,
    alpn: Alpn,
) -> Result<Arc<ClientConfig>, Error> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(ServerVerifier {
            validator: validator.clone(),
            expected: ExpectedPeer::SESSION_CLUSTER,
            expect,
        }))
        .with_client_cert_resolver(single(identity));
    config.alpn_protocols = vec![alpn.as_bytes().to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    Ok(Arc::new(config))
}

/// The cluster's end of sealed sessions with any user of the trust domain.
///
/// # Errors
/// rustls rejects the configuration.
pub fn session_server(
    identity: &Identity,
    validator: &Validator,
) -> Result<Arc<ServerConfig>, Error> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(ClientVerifier {
            validator: validator.clone(),
            expected: ExpectedPeer::SESSION_USER,
        }))
        .with_cert_resolver(single(identity));
    config.alpn_protocols = [Alpn::H2, Alpn::Http11]
        .map(|alpn| alpn.as_bytes().to_vec())
        .into();
    never_resume(&mut config);
    Ok(Arc::new(config))
}

/// Reads a chain that the handshake has already checked.
///
/// # Errors
/// The leaf is missing or malformed.
pub fn peer_of(chain: &[CertificateDer<'_>]) -> Result<PeerIdentity, CheckError> {
    let leaf = chain
        .first()
        .ok_or(CheckError::Malformed(MalformedCertificate::Missing))?;
    crate::validator::read(leaf)
}

/// CAs that are trusted for a relay's certificate beside the authority's own: none by default, so that
/// an intermediary that terminates TLS (a balancer, a proxy that inspects it) has to be named.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Trust<'a> {
    /// A PEM file of CAs.
    pub ca_file: Option<&'a Path>,
    /// The system's store of public CAs, and of those that an administrator put there.
    pub system: bool,
}

impl Trust<'_> {
    pub(crate) fn roots(self) -> Result<RootCertStore, Error> {
        let mut store = if self.system {
            system_roots()
        } else {
            RootCertStore::empty()
        };
        add_file(&mut store, self.ca_file)?;
        Ok(store)
    }
}

/// A client towards relays: trusts the authority's CA, and `trust`.
///
/// TLS 1.2 is possible because a balancer, which is not ours, may end it.
///
/// # Errors
/// A file of CAs cannot be used.
pub fn carrier_client(roots: &Roots, trust: Trust<'_>) -> Result<Arc<ClientConfig>, Error> {
    let mut store = trust.roots()?;
    for certificate in roots.certificates() {
        store.add(certificate.clone())?;
    }
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()?
        .with_root_certificates(store)
        .with_no_client_auth();
    config.alpn_protocols = vec![Alpn::Http11.as_bytes().to_vec()];
    Ok(Arc::new(config))
}

/// A client towards an outbound proxy that speaks TLS: trusts the system's store and `extra_ca`
/// (PEM). The authority's own CA is for relays and not for proxies.
///
/// # Errors
/// The file of CAs cannot be used.
pub fn proxy_client(extra_ca: Option<&Path>) -> Result<Arc<ClientConfig>, Error> {
    let mut store = system_roots();
    add_file(&mut store, extra_ca)?;
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()?
        .with_root_certificates(store)
        .with_no_client_auth();
    config.alpn_protocols = vec![Alpn::Http11.as_bytes().to_vec()];
    Ok(Arc::new(config))
}

/// The system's store, read once a process.
fn system_roots() -> RootCertStore {
    static SYSTEM: OnceLock<RootCertStore> = OnceLock::new();
    let system = SYSTEM.get_or_init(|| {
        let found = rustls_native_certs::load_native_certs();
        for error in &found.errors {
            // Not fatal: the authority's own CA is enough in most installations.
            tracing::warn!(%error, "part of the system's certificate store cannot be read");
        }
        let mut store = RootCertStore::empty();
        store.add_parsable_certificates(found.certs);
        store
    });
    system.clone()
}

/// The certificates of a file, read each time.
fn add_file(store: &mut RootCertStore, file: Option<&Path>) -> Result<(), Error> {
    let Some(path) = file else { return Ok(()) };
    for certificate in read_certificates(path)? {
        store
            .add(certificate)
            .map_err(|error| unusable(path, error.into()))?;
    }
    Ok(())
}

/// The certificates of a PEM file that an operator provides.
fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let pem = std::fs::read(path).map_err(|source| {
        files::failed("read the certificates in", path, source, "check the path")
    })?;
    let certificates = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| unusable(path, error.into()))?;
    if certificates.is_empty() {
        return Err(unusable(path, Damage::NoCertificate));
    }
    Ok(certificates)
}

fn unusable(path: &Path, source: Damage) -> Error {
    Error::Corrupt {
        path: path.to_owned(),
        source: Box::new(source),
        hint: "give a file of certificates in PEM",
    }
}

/// The same certificate for every peer.
fn single(identity: &Identity) -> Arc<SingleCertAndKey> {
    Arc::new(identity.certified_key().into())
}

fn never_resume(config: &mut ServerConfig) {
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
}

#[cfg(test)]
mod tests;

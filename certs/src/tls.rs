//! rustls configurations, one for each place where TLS is spoken.
//!
//! **Invariant:** a sealed session is TLS 1.3, mutual, never resumed: a resumed handshake would
//! not look at the peer's certificate again.

mod peer;
mod relay;
mod verifier;

use crate::{CheckError, Error, Identity, PeerIdentity, Roots, SpiffeId, Validator, Want, files};
use rustls::{
    ClientConfig, RootCertStore, ServerConfig, SupportedCipherSuite,
    client::Resumption,
    crypto::{CryptoProvider, aws_lc_rs, ring},
    pki_types::{CertificateDer, ServerName, pem::PemObject},
    server::NoServerSessionStorage,
};
use std::{
    path::Path,
    sync::{Arc, OnceLock},
};
use verifier::{ClientVerifier, ServerVerifier};

pub use peer::{RelayIdentity, peer_client, peer_server};
pub use relay::{RelayCertificate, relay_server};
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
    pub fn as_bytes(self) -> &'static [u8] {
        match self {
            Self::H2 => b"h2",
            Self::Http11 => b"http/1.1",
        }
    }
}

/// aws-lc-rs with AES-128-GCM first: it is the fastest where there is AES in hardware, and 128
/// bits are plenty. On a processor that does two blocks of AES at once but not four, ring's
/// AES-GCM, which has code for it: twice as fast there.
pub fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    let provider = PROVIDER.get_or_init(|| Arc::new(chosen(has_two_blocks_at_most())));
    Arc::clone(provider)
}

/// Makes [`provider`] what libraries take that ask for the process' default, as kube and sqlx do:
/// with two in the build rustls picks none by itself, and panics. A second call changes nothing.
pub fn provide_to_libraries() {
    let _ = Arc::unwrap_or_clone(provider()).install_default();
}

fn chosen(is_aes_of_ring: bool) -> CryptoProvider {
    let mut provider = aws_lc_rs::default_provider();
    if is_aes_of_ring {
        for suite in &mut provider.cipher_suites {
            *suite = from_ring(*suite);
        }
    }
    provider
        .cipher_suites
        .sort_by_key(|suite| suite.suite() != rustls::CipherSuite::TLS13_AES_128_GCM_SHA256);
    provider
}

/// aws-lc has vector AES for AVX-512 only, which AMD's processors before Zen 4 and Intel's small
/// ones do not have.
fn has_two_blocks_at_most() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("vaes")
        && is_x86_feature_detected!("vpclmulqdq")
        && !is_x86_feature_detected!("avx512f");
    #[cfg(not(target_arch = "x86_64"))]
    return false;
}

fn from_ring(suite: SupportedCipherSuite) -> SupportedCipherSuite {
    use rustls::CipherSuite::{TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384};
    match suite.suite() {
        TLS13_AES_128_GCM_SHA256 => ring::cipher_suite::TLS13_AES_128_GCM_SHA256,
        TLS13_AES_256_GCM_SHA384 => ring::cipher_suite::TLS13_AES_256_GCM_SHA384,
        _ => suite,
    }
}

/// The name to give to `TlsConnector::connect` on a sealed session. It is never sent and never
/// compared: the peer is known by its [`SpiffeId`].
pub fn session_name() -> ServerName<'static> {
    ServerName::IpAddress(std::net::IpAddr::from([127, 0, 0, 1]).into())
}

/// The user's end of a sealed session with the cluster `expect`.
pub fn session_client(
    identity: &Identity,
    validator: &Validator,
    expect: SpiffeId,
    alpn: Alpn,
) -> Result<Arc<ClientConfig>, Error> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(crypto)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(ServerVerifier {
            validator: validator.clone(),
            want: Want::SESSION_CLUSTER,
            expect,
        }))
        .with_client_auth_cert(identity.chain().to_vec(), identity.key_der())
        .map_err(crypto)?;
    config.alpn_protocols = vec![alpn.as_bytes().to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    Ok(Arc::new(config))
}

/// The cluster's end of sealed sessions with any user of the trust domain.
pub fn session_server(
    identity: &Identity,
    validator: &Validator,
) -> Result<Arc<ServerConfig>, Error> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(crypto)?
        .with_client_cert_verifier(Arc::new(ClientVerifier {
            validator: validator.clone(),
            want: Want::SESSION_USER,
        }))
        .with_single_cert(identity.chain().to_vec(), identity.key_der())
        .map_err(crypto)?;
    config.alpn_protocols = [Alpn::H2, Alpn::Http11]
        .map(|alpn| alpn.as_bytes().to_vec())
        .into();
    never_resume(&mut config);
    Ok(Arc::new(config))
}

/// Reads a chain that the handshake has already checked.
pub fn peer_of(chain: &[CertificateDer<'_>]) -> Result<PeerIdentity, CheckError> {
    let leaf = chain
        .first()
        .ok_or_else(|| CheckError::Malformed("there is none".to_owned()))?;
    crate::validator::read(leaf)
}

/// A client towards relays: trusts the authority's CA, the system's store, and `extra_ca` (PEM).
///
/// TLS 1.2 is possible because a balancer, which is not ours, may end it.
pub fn carrier_client(roots: &Roots, extra_ca: Option<&Path>) -> Result<Arc<ClientConfig>, Error> {
    let mut store = public_roots(extra_ca)?;
    for certificate in roots.certificates() {
        store.add(certificate.clone()).map_err(crypto)?;
    }
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(crypto)?
        .with_root_certificates(store)
        .with_no_client_auth();
    config.alpn_protocols = vec![Alpn::Http11.as_bytes().to_vec()];
    Ok(Arc::new(config))
}

/// A client towards an outbound proxy that speaks TLS: trusts the system's store and `extra_ca`
/// (PEM). The authority's own CA is for relays and not for proxies.
pub fn proxy_client(extra_ca: Option<&Path>) -> Result<Arc<ClientConfig>, Error> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(crypto)?
        .with_root_certificates(public_roots(extra_ca)?)
        .with_no_client_auth();
    config.alpn_protocols = vec![Alpn::Http11.as_bytes().to_vec()];
    Ok(Arc::new(config))
}

/// The system's store, read once a process, and the certificates of `extra_ca`, read each time.
pub(crate) fn public_roots(extra_ca: Option<&Path>) -> Result<RootCertStore, Error> {
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
    let mut store = system.clone();
    if let Some(path) = extra_ca {
        for certificate in read_certificates(path)? {
            store
                .add(certificate)
                .map_err(|error| unusable(path, error.to_string()))?;
        }
    }
    Ok(store)
}

/// The certificates of a PEM file that somebody else made.
fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let pem = std::fs::read(path).map_err(|source| {
        files::failed("read the certificates in", path, source, "check the path")
    })?;
    let certificates = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| unusable(path, error.to_string()))?;
    if certificates.is_empty() {
        return Err(unusable(path, "there is no certificate in it".to_owned()));
    }
    Ok(certificates)
}

fn unusable(path: &Path, what: String) -> Error {
    Error::Corrupt {
        path: path.to_owned(),
        what,
        hint: "give a file of certificates in PEM",
    }
}

fn never_resume(config: &mut ServerConfig) {
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
}

fn crypto(error: rustls::Error) -> Error {
    Error::Crypto(error.to_string())
}

#[cfg(test)]
mod tests;

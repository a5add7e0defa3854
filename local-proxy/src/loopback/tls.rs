//! TLS on loopback: kubectl sends no credentials over plain HTTP, and a port on 127.0.0.1 is open to
//! every user of the machine, so both sides show a certificate of an authority that only this
//! state directory has.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::crypto::aws_lc_rs::sign::any_ecdsa_type;
use rustls::pki_types::pem::{self, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::{NoServerSessionStorage, VerifierBuilderError, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{RootCertStore, ServerConfig};
use serde::{Deserialize, Serialize};
use throwline_certs::{WipedKey, files};
use time::OffsetDateTime;
use zeroize::Zeroizing;

use crate::cluster_name::SERVER_NAME_SUFFIX;
use crate::kubeconfig::Entry;
use crate::store::{Store, StoreError};

pub(crate) const CA: &str = "loopback-ca.pem";
const CA_KEY: &str = "loopback-ca-key.pem";
pub(crate) const CLIENT: &str = "loopback-client.pem";
pub(crate) const CLIENT_KEY: &str = "loopback-client-key.pem";
const LIFE_FILE: &str = "loopback.json";
const LOCK: &str = "loopback.lock";

/// Names kubectl may use for this port.
const NAMES: [&str; 3] = ["127.0.0.1", "::1", "localhost"];
/// Life of the authority and the client certificate: in effect, as long as the files are in use.
/// They are worthless beyond this machine's loopback.
const LIFE: Duration = Duration::from_secs(2 * 365 * 24 * 3600);
/// At a start with less than this left, they are replaced.
const MARGIN: Duration = Duration::from_secs(60 * 24 * 3600);
/// For a clock that is set back.
const BACKDATE: Duration = Duration::from_secs(24 * 3600);

#[derive(Debug, Serialize, Deserialize)]
struct Life {
    not_after_unix: u64,
}

/// Why kubectl cannot be served on loopback.
#[derive(Debug, thiserror::Error)]
pub enum LoopbackError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("cannot make the loopback certificates: {0}")]
    Make(#[from] rcgen::Error),
    #[error(
        "the loopback certificates in {} cannot be used: {source}; remove the files loopback-* there and start again",
        dir.display()
    )]
    Unusable {
        dir: PathBuf,
        source: CertificateError,
    },
}

/// What is wrong with the loopback certificates.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("loopback.json cannot be read: {0}")]
    Life(#[from] serde_json::Error),
    #[error("loopback.json has a date that is too late")]
    LifeOverflow,
    #[error("a file is not PEM: {0}")]
    Pem(#[from] pem::Error),
    #[error(transparent)]
    Issue(#[from] rcgen::Error),
    #[error(transparent)]
    Tls(#[from] rustls::Error),
    #[error(transparent)]
    Verifier(#[from] VerifierBuilderError),
    #[error("they were removed while they were made")]
    Removed,
}

/// What the state directory holds for loopback, and a server configuration made from it.
pub(crate) struct LoopbackTls {
    pub(crate) tls: Arc<ServerConfig>,
}

impl LoopbackTls {
    /// Loads the authority and the client's certificate, makes them if they are missing, damaged
    /// or near their end, and issues a server certificate for this run. Blocks.
    pub(crate) fn open(store: &Store) -> Result<Self, LoopbackError> {
        store.prepare()?;
        // Two proxies that start together must not each make an authority.
        let lock_path = store.path(LOCK);
        let lock = files::open_private(&lock_path).map_err(StoreError::Certs)?;
        lock.lock().map_err(|source| StoreError::Unwritable {
            path: lock_path,
            source,
        })?;
        let tls = match Self::load(store) {
            Ok(Some(tls)) => tls,
            Ok(None) => Self::renew(store)?,
            Err(error) => {
                tracing::warn!(%error, "loopback certificates are damaged; replacing them");
                Self::renew(store)?
            }
        };
        Ok(Self { tls: Arc::new(tls) })
    }

    /// A kubeconfig entry for `cluster` at this port.
    pub(crate) fn entry(store: &Store, cluster: &str, port: u16) -> Entry {
        // kubectl resolves relative paths against the kubeconfig's directory, not ours.
        let absolute = |name: &str| {
            let path = store.path(name);
            std::path::absolute(&path).unwrap_or(path)
        };
        Entry {
            name: cluster.to_owned(),
            server: format!("https://127.0.0.1:{port}/clusters/{cluster}"),
            certificate_authority: absolute(CA),
            client_certificate: absolute(CLIENT),
            client_key: absolute(CLIENT_KEY),
        }
    }

    fn renew(store: &Store) -> Result<ServerConfig, LoopbackError> {
        make(store)?;
        let unusable = |source| LoopbackError::Unusable {
            dir: store.dir().to_owned(),
            source,
        };
        Self::load(store)
            .map_err(unusable)?
            .ok_or_else(|| unusable(CertificateError::Removed))
    }

    /// `None` if anything is missing or near its end.
    fn load(store: &Store) -> Result<Option<ServerConfig>, CertificateError> {
        let (Some(ca), Some(ca_key), Some(client), Some(client_key), Some(life)) = (
            store.read(CA)?,
            store.read_secret(CA_KEY)?,
            store.read(CLIENT)?,
            store.read_secret(CLIENT_KEY)?,
            store.read(LIFE_FILE)?,
        ) else {
            return Ok(None);
        };
        let life: Life = serde_json::from_str(&life)?;
        let not_after = SystemTime::UNIX_EPOCH
            .checked_add(Duration::from_secs(life.not_after_unix))
            .ok_or(CertificateError::LifeOverflow)?;
        if not_after < SystemTime::now() + MARGIN {
            return Ok(None);
        }
        // kubectl reads these two, and its error would not name the remedy.
        CertificateDer::from_pem_slice(client.as_bytes())?;
        PrivateKeyDer::from_pem_slice(client_key.as_bytes()).map(Zeroizing::new)?;
        server_config(&ca, &ca_key, not_after).map(Some)
    }
}

/// A fresh authority and client certificate, written so that a crash half-way leaves an
/// incomplete set, which is made again: the file with their life is written last and removed first.
fn make(store: &Store) -> Result<(), LoopbackError> {
    let now = SystemTime::now();
    let not_after = now + LIFE;

    let ca_key = WipedKey::from(KeyPair::generate()?);
    let mut ca = CertificateParams::default();
    ca.distinguished_name
        .push(DnType::CommonName, "Throwline loopback of this user");
    ca.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    set_life(&mut ca, now, not_after);
    let ca_pem = ca.self_signed(&ca_key)?.pem();
    let ca_key_pem = Zeroizing::new(ca_key.serialize_pem());
    let issuer = Issuer::new(ca, ca_key);

    let client_key = Zeroizing::new(KeyPair::generate()?);
    let mut client = CertificateParams::default();
    client
        .distinguished_name
        .push(DnType::CommonName, "kubectl of this user");
    client.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    client.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    set_life(&mut client, now, not_after);
    let client_pem = client.signed_by(&*client_key, &issuer)?.pem();

    let life = Life {
        not_after_unix: not_after
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs(),
    };
    store.write(LIFE_FILE, b"{}")?;
    store.write(CA, ca_pem.as_bytes())?;
    store.write(CA_KEY, ca_key_pem.as_bytes())?;
    store.write(CLIENT, client_pem.as_bytes())?;
    let client_key_pem = Zeroizing::new(client_key.serialize_pem());
    store.write(CLIENT_KEY, client_key_pem.as_bytes())?;
    store.write_json(LIFE_FILE, &life)?;
    Ok(())
}

fn server_config(
    ca: &str,
    ca_key: &str,
    not_after: SystemTime,
) -> Result<ServerConfig, CertificateError> {
    let ca_der = CertificateDer::from_pem_slice(ca.as_bytes())?;
    let issuer_key = WipedKey::from(KeyPair::from_pem(ca_key)?);
    let issuer = Issuer::from_ca_cert_pem(ca, issuer_key)?;

    // A new key for each process, never on the disk.
    let key = Zeroizing::new(KeyPair::generate()?);
    let mut names: Vec<String> = NAMES.iter().map(|name| (*name).to_owned()).collect();
    names.push(format!("*{SERVER_NAME_SUFFIX}"));
    let mut server = CertificateParams::new(names)?;
    server
        .distinguished_name
        .push(DnType::CommonName, "Throwline local proxy");
    server.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    set_life(&mut server, SystemTime::now(), not_after);
    let certificate = server.signed_by(&*key, &issuer)?;

    // Not by `with_single_cert`, which does not wipe its copy of the key.
    let der = PrivatePkcs8KeyDer::from(key.serialize_der());
    let der = Zeroizing::new(PrivateKeyDer::Pkcs8(der));
    let signing = any_ecdsa_type(&der)?;
    let certified = CertifiedKey::new(vec![certificate.der().clone()], signing);

    // It has TLS 1.2, too, which an old kubectl may want.
    let provider = throwline_certs::tls::provider();
    let mut roots = RootCertStore::empty();
    roots.add(ca_der)?;
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build()?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(certified)));
    // A client that offers no ALPN, as kubectl's upgrades do, gets HTTP/1.1.
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    // Each kubectl is a new process that cannot resume; what is kept for resumption would be waste.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

fn set_life(params: &mut CertificateParams, now: SystemTime, not_after: SystemTime) {
    params.not_before = OffsetDateTime::from(now - BACKDATE);
    params.not_after = OffsetDateTime::from(not_after);
}

#[cfg(test)]
mod tests;

//! TLS on loopback: kubectl sends no credentials over plain HTTP, and a port on 127.0.0.1 is open to
//! every user of the machine, so both sides show a certificate of an authority that only this
//! state directory has.

use crate::{
    error::Error,
    kubeconfig::Entry,
    route::SERVER_NAMES,
    store::{Store, StoreError},
};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject as _},
    server::{NoServerSessionStorage, WebPkiClientVerifier},
};
use serde::{Deserialize, Serialize};
use std::{
    fs,
    sync::Arc,
    time::{Duration, SystemTime},
};
use time::OffsetDateTime;

pub(crate) const CA: &str = "loopback-ca.pem";
const CA_KEY: &str = "loopback-ca-key.pem";
pub(crate) const CLIENT: &str = "loopback-client.pem";
pub(crate) const CLIENT_KEY: &str = "loopback-client-key.pem";
const LIFE_FILE: &str = "loopback.json";
const LOCK: &str = "loopback.lock";

/// Names kubectl may use for this port.
const NAMES: [&str; 3] = ["127.0.0.1", "::1", "localhost"];
/// Life of the authority and the client certificate: until the files are read by nobody any more,
/// in effect. They are worth nothing beyond this machine's loopback.
const LIFE: Duration = Duration::from_secs(2 * 365 * 24 * 3600);
/// Made anew when less than this is left, at a start.
const MARGIN: Duration = Duration::from_secs(60 * 24 * 3600);
/// For a clock that is set back.
const BACKDATE: Duration = Duration::from_secs(24 * 3600);

#[derive(Debug, Serialize, Deserialize)]
struct Life {
    not_after_unix: u64,
}

/// What the state directory holds for loopback, and a server configuration made from it.
pub(crate) struct Loopback {
    pub(crate) tls: Arc<ServerConfig>,
}

impl Loopback {
    /// Loads the authority and the client's certificate, makes them if they are missing, damaged
    /// or near their end, and issues a server certificate for this run. Blocks.
    pub(crate) fn open(store: &Store) -> Result<Self, Error> {
        store.prepare()?;
        // Two proxies that start together must not each make an authority.
        let lock_path = store.path(LOCK);
        let unwritable = |source| StoreError::Unwritable {
            path: lock_path.clone(),
            source,
        };
        let lock = fs::OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&lock_path)
            .map_err(unwritable)?;
        lock.lock().map_err(unwritable)?;
        let tls = match Self::load(store) {
            Ok(Some(tls)) => tls,
            Ok(None) => Self::renew(store)?,
            Err(why) => {
                tracing::warn!(%why, "loopback certificates are damaged and made anew");
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

    fn renew(store: &Store) -> Result<ServerConfig, Error> {
        make(store)?;
        Self::load(store)
            .map_err(|why| broken(store, why))?
            .ok_or_else(|| broken(store, "they vanished while they were made".to_owned()))
    }

    /// `None` if anything is missing or near its end.
    fn load(store: &Store) -> Result<Option<ServerConfig>, String> {
        let read = |name| store.read(name).map_err(|error| error.to_string());
        let (Some(ca), Some(ca_key), Some(client), Some(client_key), Some(life)) = (
            read(CA)?,
            read(CA_KEY)?,
            read(CLIENT)?,
            read(CLIENT_KEY)?,
            read(LIFE_FILE)?,
        ) else {
            return Ok(None);
        };
        let life: Life = serde_json::from_str(&life).map_err(|error| error.to_string())?;
        let not_after = SystemTime::UNIX_EPOCH
            .checked_add(Duration::from_secs(life.not_after_unix))
            .ok_or("their life has no end")?;
        if not_after < SystemTime::now() + MARGIN {
            return Ok(None);
        }
        // kubectl reads these two; whether they can be read is known better here than there.
        CertificateDer::from_pem_slice(client.as_bytes()).map_err(|error| error.to_string())?;
        PrivateKeyDer::from_pem_slice(client_key.as_bytes()).map_err(|error| error.to_string())?;
        server_config(&ca, &ca_key, not_after).map(Some)
    }
}

/// A fresh authority and client certificate, written so that a crash half-way is seen as nothing
/// made: the file with their life comes last and is removed first.
fn make(store: &Store) -> Result<(), Error> {
    let internal =
        |error: rcgen::Error| Error::Internal(format!("cannot make certificates: {error}"));
    let now = SystemTime::now();
    let not_after = now + LIFE;

    let ca_key = KeyPair::generate().map_err(internal)?;
    let mut ca = CertificateParams::default();
    ca.distinguished_name
        .push(DnType::CommonName, "Throwline loopback of this user");
    ca.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    set_life(&mut ca, now, not_after);
    let ca_pem = ca.self_signed(&ca_key).map_err(internal)?.pem();
    let ca_key_pem = ca_key.serialize_pem();
    let issuer = Issuer::new(ca, ca_key);

    let client_key = KeyPair::generate().map_err(internal)?;
    let mut client = CertificateParams::default();
    client
        .distinguished_name
        .push(DnType::CommonName, "kubectl of this user");
    client.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    client.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    set_life(&mut client, now, not_after);
    let client_pem = client
        .signed_by(&client_key, &issuer)
        .map_err(internal)?
        .pem();

    let life = Life {
        not_after_unix: not_after
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs(),
    };
    let life = serde_json::to_vec(&life).map_err(|error| Error::Internal(error.to_string()))?;
    store.write(LIFE_FILE, b"{}")?;
    store.write(CA, ca_pem.as_bytes())?;
    store.write(CA_KEY, ca_key_pem.as_bytes())?;
    store.write(CLIENT, client_pem.as_bytes())?;
    store.write(CLIENT_KEY, client_key.serialize_pem().as_bytes())?;
    store.write(LIFE_FILE, &life)?;
    Ok(())
}

fn server_config(ca: &str, ca_key: &str, not_after: SystemTime) -> Result<ServerConfig, String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let ca_der = CertificateDer::from_pem_slice(ca.as_bytes()).map_err(|e| text(&e))?;
    let issuer_key = KeyPair::from_pem(ca_key).map_err(|e| text(&e))?;
    let issuer = Issuer::from_ca_cert_pem(ca, issuer_key).map_err(|e| text(&e))?;

    let key = KeyPair::generate().map_err(|e| text(&e))?;
    let mut names: Vec<String> = NAMES.iter().map(|name| (*name).to_owned()).collect();
    names.push(format!("*{SERVER_NAMES}"));
    let mut server = CertificateParams::new(names).map_err(|e| text(&e))?;
    server
        .distinguished_name
        .push(DnType::CommonName, "Throwline local proxy");
    server.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    set_life(&mut server, SystemTime::now(), not_after);
    let certificate = server.signed_by(&key, &issuer).map_err(|e| text(&e))?;

    // It has TLS 1.2, too, which an old kubectl may want.
    let provider = throwline_certs::tls::provider();
    let mut roots = RootCertStore::empty();
    roots.add(ca_der).map_err(|e| text(&e))?;
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .build()
        .map_err(|e| text(&e))?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
        .map_err(|e| text(&e))?
        .with_client_cert_verifier(verifier)
        .with_single_cert(
            vec![certificate.der().clone()],
            PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
        )
        .map_err(|e| text(&e))?;
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

fn broken(store: &Store, why: String) -> Error {
    Error::Loopback {
        dir: store.dir().display().to_string(),
        why,
    }
}

#[cfg(test)]
mod tests;

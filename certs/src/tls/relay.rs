//! The relay's public listener: a certificate of the authority's, or one from files.

use super::{Alpn, crypto, never_resume, provider, read_certificates, unusable};
use crate::{Error, Identity, authority::Authority, files, token::check_relay_url};
use arc_swap::ArcSwap;
use rustls::{
    ServerConfig,
    pki_types::{PrivateKeyDer, pem::PemObject},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use std::{
    fmt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, TryLockError},
    time::{Duration, Instant, SystemTime},
};
use url::Url;

/// How often the certificate's file is looked at, at most. Default and only value; the cost is
/// two `stat` calls each time, and this long until a renewed file is used.
const LOOK_AGAIN: Duration = Duration::from_secs(30);

/// Where the relay's certificate comes from.
#[derive(Debug)]
pub enum RelayCertificate<'a> {
    /// Issued by the authority for the public URL's host, and for loopback; it renews itself. The
    /// CA is part of the chain, so that an enrolling part can hold it against its token's pin.
    Own {
        authority: &'a Authority,
        public_url: &'a Url,
    },
    /// PEM files, read again when they change.
    Files { cert: PathBuf, key: PathBuf },
}

/// TLS 1.3 only, HTTP/1.1 only: every other version that a balancer may want, it speaks itself.
pub fn relay_server(certificate: RelayCertificate<'_>) -> Result<Arc<ServerConfig>, Error> {
    let resolver: Arc<dyn ResolvesServerCert> = match certificate {
        RelayCertificate::Own {
            authority,
            public_url,
        } => Arc::new(OwnCertificate::new(authority.clone(), public_url)?),
        RelayCertificate::Files { cert, key } => Arc::new(FileCertificate::new(cert, key)?),
    };
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(crypto)?
        .with_no_client_auth()
        .with_cert_resolver(resolver);
    config.alpn_protocols = vec![Alpn::Http11.as_bytes().to_vec()];
    // Carriers live for hours, so resumption would save little and cost memory.
    never_resume(&mut config);
    Ok(Arc::new(config))
}

struct OwnCertificate {
    authority: Authority,
    hosts: Vec<String>,
    current: ArcSwap<Current>,
}

struct Current {
    key: Arc<CertifiedKey>,
    renew_at: SystemTime,
}

impl OwnCertificate {
    fn new(authority: Authority, public_url: &Url) -> Result<Self, Error> {
        check_relay_url(public_url).map_err(Error::Invalid)?;
        let mut hosts = vec![
            "localhost".to_owned(),
            "127.0.0.1".to_owned(),
            "::1".to_owned(),
        ];
        let host = public_url.host_str().unwrap_or_default();
        let host = host
            .trim_start_matches('[')
            .trim_end_matches(']')
            .trim_end_matches('.');
        if !hosts.iter().any(|known| known == host) {
            hosts.insert(0, host.to_owned());
        }
        let current = ArcSwap::from_pointee(issue(&authority, &hosts)?);
        Ok(Self {
            authority,
            hosts,
            current,
        })
    }
}

fn issue(authority: &Authority, hosts: &[String]) -> Result<Current, Error> {
    let identity: Identity = authority.issue_relay_certificate("public", hosts)?;
    let mut chain = identity.chain().to_vec();
    chain.extend(authority.roots().certificates().iter().cloned());
    let key = CertifiedKey::from_der(chain, identity.key_der(), &provider()).map_err(crypto)?;
    Ok(Current {
        key: Arc::new(key),
        renew_at: identity.renew_at(),
    })
}

impl ResolvesServerCert for OwnCertificate {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let current = self.current.load();
        if self.authority.now() < current.renew_at {
            return Some(Arc::clone(&current.key));
        }
        // Two handshakes at once may both issue; either certificate is good.
        match issue(&self.authority, &self.hosts) {
            Ok(fresh) => {
                let key = Arc::clone(&fresh.key);
                self.current.store(Arc::new(fresh));
                tracing::info!("relay certificate renewed");
                Some(key)
            }
            Err(error) => {
                tracing::error!(%error, "relay certificate cannot be renewed");
                Some(Arc::clone(&current.key))
            }
        }
    }
}

impl fmt::Debug for OwnCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OwnCertificate")
            .field("hosts", &self.hosts)
            .finish_non_exhaustive()
    }
}

struct FileCertificate {
    cert: PathBuf,
    key: PathBuf,
    current: ArcSwap<CertifiedKey>,
    seen: Mutex<Seen>,
}

struct Seen {
    at: Instant,
    modified: [Option<SystemTime>; 2],
}

impl FileCertificate {
    fn new(cert: PathBuf, key: PathBuf) -> Result<Self, Error> {
        Ok(Self {
            seen: Mutex::new(Seen {
                at: Instant::now(),
                modified: [modified(&cert), modified(&key)],
            }),
            current: ArcSwap::from_pointee(read(&cert, &key)?),
            cert,
            key,
        })
    }

    fn refresh(&self) {
        // Whoever finds it locked has somebody who looks for him.
        let mut seen = match self.seen.try_lock() {
            Ok(seen) => seen,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        if seen.at.elapsed() < LOOK_AGAIN {
            return;
        }
        seen.at = Instant::now();
        let modified = [modified(&self.cert), modified(&self.key)];
        if modified == seen.modified {
            return;
        }
        match read(&self.cert, &self.key) {
            Ok(fresh) => {
                self.current.store(Arc::new(fresh));
                seen.modified = modified;
                tracing::info!("relay certificate read again");
            }
            // Certificate and key are replaced one after the other: the next look will do.
            Err(error) => tracing::warn!(%error, "changed relay certificate cannot be used yet"),
        }
    }
}

impl ResolvesServerCert for FileCertificate {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.refresh();
        Some(self.current.load_full())
    }
}

impl fmt::Debug for FileCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileCertificate")
            .field("cert", &self.cert)
            .finish_non_exhaustive()
    }
}

fn read(cert: &Path, key: &Path) -> Result<CertifiedKey, Error> {
    let chain = read_certificates(cert)?;
    let pem = std::fs::read(key)
        .map_err(|source| files::failed("read the key in", key, source, "check the path"))?;
    let private = PrivateKeyDer::from_pem_slice(&pem)
        .map_err(|error| unusable(key, format!("there is no private key in it: {error}")))?;
    CertifiedKey::from_der(chain, private, &provider()).map_err(|error| {
        unusable(
            cert,
            format!("it does not go with {}: {error}", key.display()),
        )
    })
}

fn modified(path: &Path) -> Option<SystemTime> {
    std::fs::metadata(path)
        .and_then(|metadata| metadata.modified())
        .ok()
}

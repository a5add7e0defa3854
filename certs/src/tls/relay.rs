//! The relay's public listener: a certificate of the authority's, or one from files.

use super::peer::CertifyError;
use super::{Alpn, never_resume, provider, read_certificates, unusable};
use crate::{
    Damage, Error, InvalidInput, PendingIdentity, check_relay_url, directory::Directory, files,
};
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

/// The source of the relay's certificate.
#[derive(Debug)]
pub enum RelayCertificate {
    /// Issued by the authority.
    Own(Arc<HttpsCertificate>),
    /// PEM files, read again when they change.
    Files {
        /// A PEM file with the chain.
        cert: PathBuf,
        /// A PEM file with the private key.
        key: PathBuf,
    },
}

/// TLS 1.3 only, HTTP/1.1 only: a balancer in front translates to other versions.
///
/// # Errors
/// The certificate's files cannot be used, or rustls rejects the configuration.
pub fn relay_server(certificate: RelayCertificate) -> Result<Arc<ServerConfig>, Error> {
    let resolver: Arc<dyn ResolvesServerCert> = match certificate {
        RelayCertificate::Own(certificate) => certificate,
        RelayCertificate::Files { cert, key } => Arc::new(FileCertificate::new(cert, key)?),
    };
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(resolver);
    config.alpn_protocols = vec![Alpn::Http11.as_bytes().to_vec()];
    // Carriers live for hours, so resumption would save little and cost memory.
    never_resume(&mut config);
    Ok(Arc::new(config))
}

/// A certificate of the authority's for the public URL's host, and for loopback. The CA is part of
/// the chain, so that an enrolling part can hold it against its token's pin.
///
/// It is due for renewal at two thirds of its life; [`renew_if_due`](Self::renew_if_due) is to be
/// called at intervals that are short against the last third.
pub struct HttpsCertificate {
    directory: Arc<dyn Directory>,
    hosts: Vec<String>,
    current: ArcSwap<Current>,
}

struct Current {
    key: Arc<CertifiedKey>,
    renew_at: SystemTime,
}

impl HttpsCertificate {
    /// Has the certificate issued. Its key is made here, in memory, and never saved.
    ///
    /// # Errors
    /// The URL is no relay's, or the authority does not issue.
    pub async fn issue(
        directory: Arc<dyn Directory>,
        public_url: &Url,
    ) -> Result<Self, CertifyError> {
        check_relay_url(public_url).map_err(|error| Error::from(InvalidInput::from(error)))?;
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
        let current = ArcSwap::from_pointee(issue(&*directory, &hosts).await?);
        Ok(Self {
            directory,
            hosts,
            current,
        })
    }

    /// Replaces the certificate if two thirds of its life have passed. What fails is logged, and tried
    /// again at the next call.
    pub async fn renew_if_due(&self) {
        if self.directory.now() < self.current.load().renew_at {
            return;
        }
        match issue(&*self.directory, &self.hosts).await {
            Ok(fresh) => {
                self.current.store(Arc::new(fresh));
                tracing::info!("relay certificate renewed");
            }
            Err(error) => tracing::error!(%error, "relay certificate cannot be renewed"),
        }
    }
}

async fn issue(directory: &dyn Directory, hosts: &[String]) -> Result<Current, CertifyError> {
    let pending = PendingIdentity::generate()?;
    let issued = directory.certify_https(hosts, pending.csr_der()).await?;
    let life = issued.not_after.duration_since(issued.not_before);
    let key = pending.into_certified_key(issued.chain)?;
    Ok(Current {
        key: Arc::new(key),
        renew_at: issued.not_before + life.unwrap_or_default() * 2 / 3,
    })
}

impl ResolvesServerCert for HttpsCertificate {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.current.load().key))
    }
}

impl fmt::Debug for HttpsCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpsCertificate")
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
        // If it is locked, another handshake is checking the files already.
        let mut seen = match self.seen.try_lock() {
            Ok(seen) => seen,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        if seen.at.elapsed() < LOOK_AGAIN {
            return;
        }
        seen.at = Instant::now();
        // Times of modification instead of contents: this runs in the TLS handshake.
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
    let pem = files::read_secret(key)?.ok_or_else(|| {
        let source = std::io::ErrorKind::NotFound.into();
        files::failed("read the key in", key, source, "check the path")
    })?;
    let private = PrivateKeyDer::from_pem_slice(pem.as_bytes())
        .map_err(|error| unusable(key, Damage::NoPrivateKey(error)))?;
    CertifiedKey::from_der(chain, private, &provider()).map_err(|source| {
        let key = key.to_owned();
        unusable(cert, Damage::OtherKey { key, source })
    })
}

fn modified(path: &Path) -> Option<SystemTime> {
    std::fs::metadata(path)
        .and_then(|metadata| metadata.modified())
        .ok()
}

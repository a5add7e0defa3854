//! The certificate of the public listener, and its renewal while the relay runs.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::SystemTime;

use rustls::ServerConfig;
use throwline_certs::authority::Authority;
use throwline_certs::tls::{RelayCertificate, relay_server};
use tracing::{info, warn};

use crate::config::{Config, Tls};
use crate::error::Error;
use crate::relay::Shared;

pub(crate) enum Source {
    Plaintext,
    /// Renews itself.
    Own(Arc<ServerConfig>),
    Files {
        cert: PathBuf,
        key: PathBuf,
        current: RwLock<(Arc<ServerConfig>, Stamp)>,
    },
}

/// When the two files were changed last.
type Stamp = (Option<SystemTime>, Option<SystemTime>);

impl Source {
    pub(crate) fn new(config: &Config, authority: &Authority) -> Result<Self, Error> {
        match &config.tls {
            Tls::Plaintext => Ok(Self::Plaintext),
            Tls::Own => relay_server(RelayCertificate::Own {
                authority,
                public_url: &config.public_url,
            })
            .map(Self::Own)
            .map_err(|error| Error::Tls(error.into())),
            Tls::Files { cert, key } => {
                let stamp = (changed(cert), changed(key));
                let tls = read(cert, key).map_err(|error| Error::Tls(error.into()))?;
                Ok(Self::Files {
                    cert: cert.clone(),
                    key: key.clone(),
                    current: RwLock::new((tls, stamp)),
                })
            }
        }
    }

    pub(crate) fn current(&self) -> Option<Arc<ServerConfig>> {
        match self {
            Self::Plaintext => None,
            Self::Own(tls) => Some(Arc::clone(tls)),
            Self::Files { current, .. } => {
                let current = current.read().unwrap_or_else(PoisonError::into_inner);
                Some(Arc::clone(&current.0))
            }
        }
    }

    /// Reads the files again if they changed; what cannot be used is left aside, for a half
    /// written pair must not take the relay off the net.
    fn look_again(&self) {
        let Self::Files { cert, key, current } = self else {
            return;
        };
        let stamp = (changed(cert), changed(key));
        let known = current.read().unwrap_or_else(PoisonError::into_inner).1;
        if stamp == known {
            return;
        }
        match read(cert, key) {
            Ok(tls) => {
                *current.write().unwrap_or_else(PoisonError::into_inner) = (tls, stamp);
                info!("the TLS certificate was read again");
            }
            Err(error) => warn!(%error, "the changed TLS certificate cannot be used"),
        }
    }
}

/// Follows changed files until it is aborted.
pub(crate) async fn refresh(shared: Arc<Shared>) {
    if !matches!(shared.tls_source(), Source::Files { .. }) {
        return;
    }
    let mut interval = tokio::time::interval(shared.config.timing.tls_refresh);
    loop {
        interval.tick().await;
        shared.tls_source().look_again();
    }
}

fn read(cert: &Path, key: &Path) -> Result<Arc<ServerConfig>, throwline_certs::Error> {
    relay_server(RelayCertificate::Files {
        cert: cert.to_owned(),
        key: key.to_owned(),
    })
}

fn changed(path: &Path) -> Option<SystemTime> {
    std::fs::metadata(path)
        .and_then(|file| file.modified())
        .ok()
}

//! The certificates that a relay gets from the authority, and their renewal.

use std::sync::Arc;
use std::time::Duration;

use throwline_certs::Directory;
use throwline_certs::tls::{HttpsCertificate, RelayIdentity};

use crate::config::{Config, Tls};
use crate::error::Error;

/// How often this relay's own certificates are checked for being due for renewal.
const RENEWAL_CHECK: Duration = Duration::from_secs(60);

/// The certificates that this relay got from the authority.
#[derive(Default)]
pub(super) struct OwnCertificates {
    /// `None` where TLS has another certificate, or a balancer terminates it.
    pub(super) https: Option<Arc<HttpsCertificate>>,
    /// `None` where there is one relay.
    pub(super) identity: Option<Arc<RelayIdentity>>,
}

impl OwnCertificates {
    pub(super) async fn issue(
        directory: &Arc<dyn Directory>,
        config: &Config,
        has_peers: bool,
    ) -> Result<Self, Error> {
        let mut own = Self::default();
        if has_peers {
            let identity = RelayIdentity::issue(Arc::clone(directory), &config.instance).await;
            own.identity = Some(Arc::new(identity.map_err(Error::Certificate)?));
        }
        if config.tls == Tls::Own {
            let https = HttpsCertificate::issue(Arc::clone(directory), &config.public_url).await;
            own.https = Some(Arc::new(https.map_err(Error::Certificate)?));
        }
        Ok(own)
    }

    /// Renews each when it is due. Never ends.
    pub(super) async fn keep_fresh(self) {
        loop {
            tokio::time::sleep(RENEWAL_CHECK).await;
            if let Some(https) = &self.https {
                https.renew_if_due().await;
            }
            if let Some(identity) = &self.identity {
                identity.renew_if_due().await;
            }
        }
    }
}

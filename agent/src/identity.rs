//! The agent's identity, which its carriers prove and its sessions show, and which a renewal replaces.

use std::sync::{Arc, Mutex, PoisonError};

use throwline_certs::{Identity, Roots, Validator, tls};
use tokio::sync::Notify;

pub(crate) struct AgentIdentity {
    pub(crate) roots: Roots,
    /// A relay reports that the certificate has expired, whatever this machine's clock shows.
    pub(crate) expired: Notify,
    validator: Validator,
    current: Mutex<Current>,
}

#[derive(Clone)]
struct Current {
    identity: Arc<Identity>,
    server: Arc<rustls::ServerConfig>,
}

impl AgentIdentity {
    /// # Errors
    /// TLS cannot use the identity.
    pub(crate) fn new(identity: Identity, roots: Roots) -> Result<Self, throwline_certs::Error> {
        let validator = Validator::new(roots.clone(), identity.id().domain().clone());
        let current = Current::new(identity, &validator)?;
        Ok(Self {
            roots,
            expired: Notify::new(),
            validator,
            current: Mutex::new(current),
        })
    }

    pub(crate) fn identity(&self) -> Arc<Identity> {
        self.current().identity
    }

    /// The configuration with which new sessions are accepted.
    pub(crate) fn session_server(&self) -> Arc<rustls::ServerConfig> {
        self.current().server
    }

    pub(crate) fn validator(&self) -> &Validator {
        &self.validator
    }

    /// New sessions and carriers use the new identity; live ones continue with the old one.
    pub(crate) fn replace(&self, identity: Identity) -> Result<(), throwline_certs::Error> {
        let current = Current::new(identity, &self.validator)?;
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = current;
        Ok(())
    }

    fn current(&self) -> Current {
        self.current
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl Current {
    fn new(identity: Identity, validator: &Validator) -> Result<Self, throwline_certs::Error> {
        let server = tls::session_server(&identity, validator)?;
        Ok(Self {
            identity: Arc::new(identity),
            server,
        })
    }
}

//! Dials to the relay with the newest identity, which is renewed first where it has expired.

use std::sync::Arc;

use throwline_tunnel::carrier::{self, Connection, DialError};
use throwline_tunnel::proto::close::CloseCode;
use throwline_tunnel::proto::messages::ClusterInfo;
use throwline_tunnel::proto::traffic::TrafficClass;

use super::{Inner, Link};
use crate::failure::Failure;
use crate::session::cluster_list::list;
use crate::session::errors::dial_error;
use crate::session::relay_dial::dial_config;
use crate::session::renew::{is_expired, renew_expired};
use crate::store::{Credentials, Store, StoreError};

impl Link {
    /// The clusters that the user may reach, requested over the present carrier. Without one:
    /// over a temporary one if `dial`, else `None`. This does not count as use of the carrier.
    pub(crate) async fn list(&self, dial: bool) -> Result<Option<Vec<ClusterInfo>>, Failure> {
        match self.0.interactive.present() {
            Some(carrier) => list(&carrier).await.map(Some),
            None if dial => {
                let connection = self.0.dial(TrafficClass::Interactive).await?;
                let listed = list(&connection.carrier).await;
                connection.carrier.close(CloseCode::Normal, "done");
                listed.map(Some)
            }
            None => Ok(None),
        }
    }
}

impl Inner {
    /// Dials once, with the newest identity there is.
    pub(super) async fn dial(&self, class: TrafficClass) -> Result<Connection, Failure> {
        let mut credentials = self.newest().await;
        if is_expired(&credentials) {
            credentials = self.renewed(&credentials).await?;
        }
        match self.dial_as(&credentials, class).await {
            // By the relay's clock.
            Err(DialError::CertificateExpired { .. }) => {
                credentials = self.renewed(&credentials).await?;
                self.dial_as(&credentials, class).await
            }
            dialled => dialled,
        }
        .map_err(|error| dial_error(&credentials, error))
    }

    async fn dial_as(
        &self,
        credentials: &Credentials,
        class: TrafficClass,
    ) -> Result<Connection, DialError> {
        let config = dial_config(credentials, &self.outbound, &self.timing, &self.instance);
        let mut config = config.map_err(|failure| DialError::Prover(failure.into()))?;
        config.class = class;
        Box::pin(carrier::dial(&config)).await
    }

    /// Renews credentials that have expired. A second caller finds them renewed.
    async fn renewed(&self, expired: &Credentials) -> Result<Arc<Credentials>, Failure> {
        let mut successor = self.successor.lock().await;
        let held = self.held().credentials;
        if held.identity.serial() != expired.identity.serial() {
            return Ok(held);
        }
        let renewed = renew_expired(
            &self.store,
            expired,
            &self.outbound,
            &self.timing,
            &self.instance,
            &mut successor,
        );
        Ok(self.hold(Box::pin(renewed).await?))
    }

    /// The identity on disk may be newer than ours: after another `throwline login`.
    async fn newest(&self) -> Arc<Credentials> {
        let ours = self.held().credentials;
        let store: Store = self.store.clone();
        let stored = tokio::task::spawn_blocking(move || store.load()).await;
        match stored {
            Ok(Ok(stored))
                if stored.identity.id() != ours.identity.id()
                    || stored.relay != ours.relay
                    || stored.identity.not_after() > ours.identity.not_after() =>
            {
                tracing::info!(identity = %stored.identity.id(), "another identity is in the state directory");
                self.hold(stored)
            }
            Ok(Err(error)) if !matches!(error, StoreError::Expired { .. }) => {
                tracing::warn!(%error, "the state directory cannot be read; going on with what is known");
                ours
            }
            _ => ours,
        }
    }
}

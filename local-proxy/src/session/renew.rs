//! Renewal of the user's certificate by its key, over a carrier: of one that is there, or, when it has
//! expired, of one for this alone.

use std::time::SystemTime;

use throwline_certs::{Identity, Validator};
use throwline_tunnel::carrier::{self, Carrier};
use throwline_tunnel::proto::close::CloseCode;
use throwline_tunnel::renewal::RenewalError as RequestError;
use throwline_uplink::{RenewalError, Successor};

use crate::config::{Outbound, Timing};
use crate::failure::Failure;
use crate::session::errors::{dial_error, open_error};
use crate::session::relay_dial::dial_config;
use crate::store::{Credentials, Store};

/// Renews credentials that have expired, over a carrier that is good for nothing else, and saves them.
///
/// # Errors
/// [`Failure::CertificateExpired`] if the authority does not renew them: then only a new token helps.
pub(crate) async fn renew_expired(
    store: &Store,
    old: &Credentials,
    outbound: &Outbound,
    timing: &Timing,
    instance: &str,
    successor: &mut Successor,
) -> Result<Credentials, Failure> {
    let mut config = dial_config(old, outbound, timing, instance)?;
    config.for_renewal = true;
    let connection = carrier::dial(&config)
        .await
        .map_err(|error| dial_error(old, error))?;
    let renewed = renewed_over(&connection.carrier, old, successor).await;
    connection.carrier.close(CloseCode::Normal, "renewed");
    let identity = renewed?;
    tracing::info!("certificate renewed, which had expired");
    save(store, &identity).await;
    Ok(Credentials {
        identity,
        ..old.clone()
    })
}

/// By this machine's clock.
pub(crate) fn is_expired(credentials: &Credentials) -> bool {
    credentials.identity.not_after() <= SystemTime::now()
}

pub(crate) async fn save(store: &Store, identity: &Identity) {
    let (store, identity) = (store.clone(), identity.clone());
    let saved = tokio::task::spawn_blocking(move || store.save_identity(&identity)).await;
    if let Ok(Err(error)) = saved {
        tracing::warn!(%error, "the renewed certificate cannot be saved; this process uses it");
    }
}

/// The identity that follows that of `old`, issued over this carrier.
pub(crate) async fn renewed_over(
    carrier: &Carrier,
    old: &Credentials,
    successor: &mut Successor,
) -> Result<Identity, Failure> {
    let domain = old.roots.trust_domain().clone();
    let validator = Validator::new(old.roots.clone(), domain);
    let renewed = successor.renew(carrier, &old.identity, &validator).await;
    renewed.map_err(|error| failure(old, error))
}

fn failure(old: &Credentials, error: RenewalError) -> Failure {
    let not_after = old.identity.not_after();
    match error {
        RenewalError::Request(RequestError::Open(error)) => open_error("of the authority", error),
        error if error.is_final() && not_after <= SystemTime::now() => {
            Failure::CertificateExpired { not_after }
        }
        error => Failure::internal(error),
    }
}

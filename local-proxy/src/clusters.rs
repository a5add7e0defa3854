//! `throwline clusters`: asks the relay what this user can reach.

use std::time::Duration;

use throwline_tunnel::carrier;
use throwline_tunnel::proto::close::CloseCode;
use throwline_tunnel::proto::messages::ClusterInfo;
use throwline_uplink::Successor;
use tokio::time::timeout;

use crate::config::{Outbound, Timing};
use crate::error::Error;
use crate::session::{dial_config, dial_error, is_expired, list, renew_expired};
use crate::store::Store;

/// Time for the close frame of the carrier to be written.
const GOODBYE: Duration = Duration::from_secs(2);

/// The clusters that the user may reach, sorted by name, over a separate carrier.
pub async fn clusters(store: &Store, outbound: &Outbound) -> Result<Vec<ClusterInfo>, Error> {
    let mut credentials = store.load_even_expired()?;
    let instance = format!("{:016x}", rand::random::<u64>());
    if is_expired(&credentials) {
        let timing = Timing::default();
        let successor = &mut Successor::default();
        let renewed = renew_expired(store, &credentials, outbound, &timing, &instance, successor);
        credentials = renewed.await?;
    }
    let config = dial_config(&credentials, outbound, &Timing::default(), &instance)?;
    let connection = carrier::dial(&config)
        .await
        .map_err(|error| dial_error(&credentials, error))?;
    let listed = list(&connection.carrier).await;
    connection.carrier.close(CloseCode::Normal, "done");
    // The process ends next. Without the close frame, the relay would count a network failure.
    let _ = timeout(GOODBYE, connection.carrier.gone()).await;
    Ok(listed?)
}

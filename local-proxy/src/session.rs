//! Sessions to clusters.
//!
//! Each cluster has API sessions (HTTP/2, one as a rule) and one warm upgrade session (HTTP/1.1).
//! They are opened through [`Dial`], so everything above it is tested without a relay.
//!
//! Imports go from `sessions` to `api` and `upgrade`, and from `link/` to `link`; both to the rest.

mod api;
mod body;
mod cluster_list;
mod context;
mod dial;
mod errors;
mod link;
mod long_transfers;
mod relay_dial;
mod renew;
mod sessions;
mod upgrade;

pub(crate) use api::Lease;
pub(crate) use body::{ResendableBody, UpgradeBody};
pub(crate) use cluster_list::list;
pub(crate) use context::SessionContext;
#[cfg(test)]
pub(crate) use dial::{Dial, Dialed, Epoch};
pub(crate) use errors::{dial_error, lost};
pub(crate) use link::Link;
pub(crate) use relay_dial::dial_config;
pub(crate) use renew::{is_expired, renew_expired};
pub(crate) use sessions::Sessions;
pub(crate) use upgrade::UpgradeSession;

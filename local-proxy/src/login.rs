//! `throwline login`: turns an enrolment token into an identity of this machine.

use std::time::SystemTime;

use throwline_certs::enrol::{self, EnrolError, Enrolled};
use throwline_certs::{EnrolmentToken, Kind, SpiffeId, tls};
use throwline_tunnel::carrier;
use url::Url;

use crate::config::Outbound;
use crate::store::{Credentials, RelayFile, Store, StoreError};

/// The identity after a login.
#[derive(Clone, Debug)]
pub struct LoginOutcome {
    pub user: String,
    pub groups: Vec<String>,
    pub relay: Url,
    pub not_after: SystemTime,
}

/// Why there is no new identity. The old one, if there was one, is as it was.
#[derive(Debug, thiserror::Error)]
pub enum LoginError {
    #[error(transparent)]
    Enrol(#[from] EnrolError),
    #[error(
        "the token is for {0}, not for a user; an agent takes it with 'throwline agent --token-file'"
    )]
    NotAUser(SpiffeId),
    #[error("{} cannot be read as a CA file: {source}", path.display())]
    CaFile {
        path: std::path::PathBuf,
        source: std::io::Error,
    },
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Redeems the token and keeps what it gives in `store`. The CA file of `outbound` is remembered
/// as a path; its proxies are not, for they belong to the network that this machine is in now.
pub async fn login(
    token: &EnrolmentToken,
    store: &Store,
    outbound: &Outbound,
) -> Result<LoginOutcome, LoginError> {
    // A token works once, so every local check is made before it is redeemed.
    store.prepare()?;
    let ca_file = outbound.extra_ca.as_deref();
    let ca_file = ca_file
        .map(|path| {
            path.canonicalize().map_err(|source| LoginError::CaFile {
                path: path.to_owned(),
                source,
            })
        })
        .transpose()?;
    let extra_ca = ca_file.as_deref();
    let proxies = &outbound.proxies;
    let proxies = proxies.trusting(&token.relay, || tls::proxy_client(extra_ca));
    let proxies = proxies.map_err(EnrolError::from)?;
    let connecting = carrier::reach(&token.relay, &proxies);
    let trust = tls::Trust {
        ca_file: extra_ca,
        system: outbound.system_ca,
    };
    let enrolled = enrol::redeem_over(token, &enrol::Asker::User, trust, connecting).await?;
    let Enrolled { identity, roots } = enrolled;
    if identity.id().kind() != Kind::User {
        return Err(LoginError::NotAUser(identity.id().clone()));
    }
    let outcome = LoginOutcome {
        user: identity.id().name().to_owned(),
        groups: identity.groups().to_vec(),
        relay: token.relay.clone(),
        not_after: identity.not_after(),
    };
    store.save(&Credentials {
        identity,
        roots,
        relay: RelayFile {
            url: token.relay.clone(),
            ca_file,
            system_ca: outbound.system_ca,
        },
    })?;
    Ok(outcome)
}

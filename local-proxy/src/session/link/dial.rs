//! What a dial needs, and what its errors mean to the user.

use super::Inner;
use crate::{
    config::{Outbound, Timing},
    error::Failure,
    store::{Credentials, Store, StoreError},
};
use std::{
    io,
    sync::{Arc, atomic::Ordering},
};
use throwline_certs::{jws, sha256, tls};
use throwline_tunnel::{
    carrier::{self, Connection, DialConfig, DialError, OpenError, Prover},
    line::LineError,
    proto::messages::{RefusalCode, Role},
};

/// How a local proxy with these credentials dials its relay.
pub(crate) fn dial_config(
    credentials: &Credentials,
    outbound: &Outbound,
    timing: &Timing,
    instance: &str,
) -> Result<DialConfig, Failure> {
    let internal = |error: &dyn std::fmt::Display| Failure::Internal(error.to_string());
    let relay = &credentials.relay;
    let extra_ca = outbound.extra_ca.as_deref().or(relay.ca_file.as_deref());
    let tls = (relay.url.scheme() == "https")
        .then(|| tls::carrier_client(&credentials.roots, extra_ca))
        .transpose()
        .map_err(|e| internal(&e))?;
    let asserting = credentials.identity.clone();
    let signing = credentials.identity.clone();
    let prover = Prover {
        assertion: Box::new(move |claims| jws::sign(&asserting, claims).map_err(Into::into)),
        sign: Box::new(move |message| signing.sign(message).map_err(Into::into)),
        sha256,
        id: credentials.identity.id().to_string(),
    };
    let mut config = DialConfig::new(
        relay.url.clone(),
        tls,
        Arc::new(prover),
        Role::LocalProxy,
        instance,
    );
    config.timing = timing.carrier.clone();
    let proxy_tls = || tls::proxy_client(extra_ca);
    let proxies = outbound.proxies.trusting(&relay.url, proxy_tls);
    config.proxies = proxies.map_err(|e| internal(&e))?;
    Ok(config)
}

impl Inner {
    /// Dials once, with the newest identity there is.
    pub(super) async fn dial(&self) -> Result<Connection, Failure> {
        let credentials = self.newest().await?;
        let config = dial_config(&credentials, &self.outbound, &self.timing, &self.instance)?;
        carrier::dial(&config)
            .await
            .map_err(|error| dial_error(&credentials, error))
    }

    /// The identity on disk may be newer than ours: somebody ran `throwline login` meanwhile.
    async fn newest(&self) -> Result<Arc<Credentials>, Failure> {
        let ours = self
            .credentials
            .read()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .clone();
        let store: Store = self.store.clone();
        let stored = tokio::task::spawn_blocking(move || store.load()).await;
        let newest = match stored {
            Ok(Ok(stored))
                if stored.identity.id() != ours.identity.id()
                    || stored.relay != ours.relay
                    || stored.identity.not_after() > ours.identity.not_after() =>
            {
                tracing::info!(identity = %stored.identity.id(), "another identity is in the state directory");
                let stored = Arc::new(stored);
                *self
                    .credentials
                    .write()
                    .unwrap_or_else(std::sync::PoisonError::into_inner) = stored.clone();
                self.generation.fetch_add(1, Ordering::AcqRel);
                stored
            }
            Ok(Err(error)) if !matches!(error, StoreError::Expired { .. }) => {
                tracing::warn!(%error, "the state directory cannot be read; going on with what is known");
                ours
            }
            _ => ours,
        };
        let not_after = newest.identity.not_after();
        if not_after <= std::time::SystemTime::now() {
            return Err(Failure::CertificateExpired { not_after });
        }
        Ok(newest)
    }
}

/// A failed dial in the user's words.
pub(crate) fn dial_error(credentials: &Credentials, error: DialError) -> Failure {
    let relay = credentials.relay.url.to_string();
    let why = error.to_string();
    match error {
        DialError::UnknownIssuer { .. }
        | DialError::WrongHost { .. }
        | DialError::ServerCertificateExpired { .. } => Failure::RelayNotTrusted { relay, why },
        DialError::CertificateExpired { .. } => Failure::CertificateExpired {
            not_after: credentials.identity.not_after(),
        },
        DialError::Unauthenticated => Failure::RelayRefusesUs { relay, why },
        DialError::Refused(refusal) if refusal.code() == RefusalCode::Unauthenticated => {
            Failure::RelayRefusesUs { relay, why }
        }
        other => Failure::RelayUnreachable {
            relay,
            why,
            transient: other.is_transient(),
        },
    }
}

/// A stream that was not opened, in the user's words.
pub(crate) fn open_error(cluster: &str, error: OpenError) -> Failure {
    let cluster = cluster.to_owned();
    match error {
        OpenError::Refused(refusal) => Failure::Refused { cluster, refusal },
        OpenError::Timeout(after) => Failure::Timeout {
            cluster,
            seconds: after.as_secs(),
        },
        // All streams of the carrier are in use: trying again does not mend that.
        OpenError::Limit => Failure::Ended {
            cluster,
            why: error.to_string(),
        },
        other => Failure::Lost {
            cluster,
            why: other.to_string(),
        },
    }
}

/// A line that did not come up: somebody in between was lost, or the agent says why not.
pub(super) fn line_error(cluster: &str, error: &LineError) -> Failure {
    let (cluster, why) = (cluster.to_owned(), error.to_string());
    match error {
        LineError::Cut | LineError::Io(_) => Failure::Lost { cluster, why },
        _ => Failure::Ended { cluster, why },
    }
}

/// A failed handshake of the sealed session: who did not trust whom, or only a cut.
pub(super) fn session_error(cluster: &str, error: &io::Error) -> Failure {
    if let Some(failure) = refused_by_agent(cluster, error) {
        return failure;
    }
    let cluster = cluster.to_owned();
    let why = error.to_string();
    let is_tls = error
        .get_ref()
        .is_some_and(|inner| inner.is::<rustls::Error>());
    match error.kind() {
        io::ErrorKind::TimedOut => Failure::Timeout {
            cluster,
            seconds: throwline_tunnel::session::HANDSHAKE.as_secs(),
        },
        _ if is_tls => Failure::SessionNotTrusted { cluster, why },
        _ => Failure::Lost { cluster, why },
    }
}

/// With TLS 1.3 the agent judges our certificate after our side of the handshake is done, so its
/// alert can also arrive in place of an answer.
pub(crate) fn refused_by_agent(cluster: &str, error: &io::Error) -> Option<Failure> {
    use rustls::AlertDescription as Alert;
    let tls = error.get_ref()?.downcast_ref::<rustls::Error>()?;
    let rustls::Error::AlertReceived(alert) = tls else {
        return None;
    };
    let why = match alert {
        Alert::CertificateExpired => "it has expired",
        Alert::CertificateRevoked => "it was revoked",
        Alert::UnknownCA => "it is from an authority that the agent does not know",
        Alert::CertificateRequired => "none was sent",
        Alert::BadCertificate | Alert::CertificateUnknown | Alert::UnsupportedCertificate => {
            "it is not a valid user certificate"
        }
        Alert::AccessDenied => "access is denied",
        _ => return None,
    };
    Some(Failure::AgentRefusesUs {
        cluster: cluster.to_owned(),
        why: why.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tls(error: rustls::Error) -> io::Error {
        io::Error::new(io::ErrorKind::InvalidData, error)
    }

    #[test]
    fn the_agents_alerts_are_told_from_our_own_distrust_and_from_a_cut() {
        let expired = tls(rustls::Error::AlertReceived(
            rustls::AlertDescription::CertificateExpired,
        ));
        let failure = session_error("prod", &expired);
        assert!(
            matches!(failure, Failure::AgentRefusesUs { .. }),
            "{failure}"
        );
        assert!(failure.to_string().contains("expired"));

        let unknown = tls(rustls::Error::InvalidCertificate(
            rustls::CertificateError::UnknownIssuer,
        ));
        let failure = session_error("prod", &unknown);
        assert!(
            matches!(failure, Failure::SessionNotTrusted { .. }),
            "{failure}"
        );

        let failure = session_error("prod", &io::ErrorKind::ConnectionReset.into());
        assert!(matches!(failure, Failure::Lost { .. }), "{failure}");
        let failure = session_error("prod", &io::ErrorKind::TimedOut.into());
        assert!(matches!(failure, Failure::Timeout { .. }), "{failure}");
    }

    #[test]
    fn only_what_time_can_mend_is_waited_for() {
        let open = |code| {
            let refusal = throwline_tunnel::proto::messages::Refusal::new(code, "");
            open_error("prod", OpenError::Refused(refusal))
        };
        assert!(!open(RefusalCode::NotAllowed).may_pass());
        assert!(!open(RefusalCode::Offline).may_pass());
        let late = open_error(
            "prod",
            OpenError::Timeout(std::time::Duration::from_secs(10)),
        );
        assert_eq!(late.to_string(), "cluster prod did not answer within 10 s");
    }
}

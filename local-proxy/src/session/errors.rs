//! Errors of a dial, a stream, a line, a sealed session and its HTTP as failures of a request.

use std::io;
use std::sync::Arc;

use throwline_tunnel::carrier::{DialError, OpenError};
use throwline_tunnel::line::LineError;
use throwline_tunnel::proto::messages::RefusalCode;

use crate::failure::{Cause, CertificateRejection, Failure, Unreachable};
use crate::store::Credentials;

/// A failed dial in the user's words.
pub(crate) fn dial_error(credentials: &Credentials, error: DialError) -> Failure {
    let relay = credentials.relay.url.to_string();
    let source = Arc::new(error);
    match &*source {
        DialError::UnknownIssuer { .. }
        | DialError::WrongHost { .. }
        | DialError::ServerCertificateExpired { .. } => Failure::RelayNotTrusted { relay, source },
        DialError::CertificateExpired { .. } => Failure::CertificateExpired {
            not_after: credentials.identity.not_after(),
        },
        DialError::Revoked => Failure::Revoked,
        DialError::Unauthenticated => Failure::RelayRefusesUs { relay, source },
        DialError::Refused(refusal) if refusal.code() == RefusalCode::Unauthenticated => {
            Failure::RelayRefusesUs { relay, source }
        }
        _ => Failure::RelayUnreachable {
            relay,
            source: Unreachable::Dial(source),
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
            source: error.into(),
        },
        other => Failure::Lost {
            cluster,
            source: other.into(),
        },
    }
}

/// A line that was not established: the relay was lost, or the agent gives the reason.
pub(crate) fn line_error(cluster: &str, error: LineError) -> Failure {
    let cluster = cluster.to_owned();
    match error {
        LineError::Cut | LineError::Io(_) => Failure::Lost {
            cluster,
            source: error.into(),
        },
        _ => Failure::Ended {
            cluster,
            source: error.into(),
        },
    }
}

/// A failed handshake of the sealed session: which end did not trust the other, or only a cut.
pub(crate) fn session_error(cluster: &str, error: io::Error) -> Failure {
    if let Some(failure) = refused_by_agent(cluster, &error) {
        return failure;
    }
    let cluster = cluster.to_owned();
    let is_tls = error
        .get_ref()
        .is_some_and(|inner| inner.is::<rustls::Error>());
    match error.kind() {
        io::ErrorKind::TimedOut => Failure::Timeout {
            cluster,
            seconds: throwline_tunnel::session::HANDSHAKE.as_secs(),
        },
        _ if is_revoked(&error) => Failure::ClusterRevoked { cluster },
        _ if is_tls => Failure::SessionNotTrusted {
            cluster,
            source: Arc::new(error),
        },
        _ => Failure::Lost {
            cluster,
            source: Cause::Io(Arc::new(error)),
        },
    }
}

/// Whether our own list has the agent's certificate.
fn is_revoked(error: &io::Error) -> bool {
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref());
    let revoked = rustls::Error::InvalidCertificate(rustls::CertificateError::Revoked);
    tls.is_some_and(|error: &rustls::Error| *error == revoked)
}

/// With TLS 1.3 the agent judges our certificate after our side of the handshake is done, so its
/// alert can also arrive in place of an answer.
fn refused_by_agent(cluster: &str, error: &io::Error) -> Option<Failure> {
    use rustls::AlertDescription as Alert;
    let tls = error.get_ref()?.downcast_ref::<rustls::Error>()?;
    let rustls::Error::AlertReceived(alert) = tls else {
        return None;
    };
    let source = match alert {
        Alert::CertificateExpired => CertificateRejection::Expired,
        Alert::CertificateRevoked => CertificateRejection::Revoked,
        Alert::UnknownCA => CertificateRejection::UnknownAuthority,
        Alert::CertificateRequired => CertificateRejection::Missing,
        Alert::BadCertificate | Alert::CertificateUnknown | Alert::UnsupportedCertificate => {
            CertificateRejection::Invalid
        }
        Alert::AccessDenied => CertificateRejection::Denied,
        _ => return None,
    };
    Some(Failure::AgentRefusesUs {
        cluster: cluster.to_owned(),
        source,
    })
}

/// The HTTP connection of a session has ended, which can be the agent's alert about our certificate;
/// see [`refused_by_agent`].
pub(crate) fn lost(cluster: &str, error: hyper::Error) -> Failure {
    let mut cause: Option<&dyn std::error::Error> = Some(&error);
    while let Some(error) = cause {
        let io = error.downcast_ref::<io::Error>().or_else(|| {
            let h2 = error.downcast_ref::<h2::Error>()?;
            h2.get_io()
        });
        if let Some(failure) = io.and_then(|io| refused_by_agent(cluster, io)) {
            return failure;
        }
        cause = error.source();
    }
    Failure::Lost {
        cluster: cluster.to_owned(),
        source: Cause::Http(Arc::new(error)),
    }
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
        let failure = session_error("prod", expired);
        assert!(
            matches!(failure, Failure::AgentRefusesUs { .. }),
            "{failure}"
        );
        assert!(failure.to_string().contains("expired"));

        let unknown = tls(rustls::Error::InvalidCertificate(
            rustls::CertificateError::UnknownIssuer,
        ));
        let failure = session_error("prod", unknown);
        assert!(
            matches!(failure, Failure::SessionNotTrusted { .. }),
            "{failure}"
        );

        let revoked = tls(rustls::Error::InvalidCertificate(
            rustls::CertificateError::Revoked,
        ));
        let failure = session_error("prod", revoked);
        assert!(
            matches!(failure, Failure::ClusterRevoked { .. }),
            "{failure}"
        );

        let failure = session_error("prod", io::ErrorKind::ConnectionReset.into());
        assert!(matches!(failure, Failure::Lost { .. }), "{failure}");
        let failure = session_error("prod", io::ErrorKind::TimedOut.into());
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

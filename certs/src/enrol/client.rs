//! One HTTP/1.1 POST, over TLS whose certificate is verified by the token's pin or a trusted CA.

use super::{
    error::{BadAnswer, EnrolError, InvalidNow},
    pin::PinVerifier,
};
use crate::{
    EnrolmentToken,
    tls::{self, Trust},
};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Request, header};
use hyper_util::rt::TokioIo;
use rustls::{CertificateError, ClientConfig, pki_types::ServerName};
use std::{
    io,
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;
use url::{Host, Url};

/// Two chains in PEM have about 5 KiB.
const MAX_ANSWER: usize = 64 * 1024;

pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) retry_after: Option<Duration>,
    pub(super) body: Bytes,
}

pub(super) async fn post<T>(
    token: &EnrolmentToken,
    trust: Trust<'_>,
    connecting: impl Future<Output = Result<T, EnrolError>>,
    body: Vec<u8>,
) -> Result<Answer, EnrolError>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let relay = &token.relay;
    if relay.scheme() == "https" {
        // Read first: no relay is dialled while our own files cannot be used.
        let config = config(token, trust)?;
        let tls = TlsConnector::from(config)
            .connect(server_name(relay)?, connecting.await?)
            .await
            .map_err(|error| broken_tls(relay, error))?;
        exchange(relay, tls, body).await
    } else {
        exchange(relay, connecting.await?, body).await
    }
}

pub(super) async fn connect(relay: &Url) -> Result<TcpStream, EnrolError> {
    let host = host_of(relay)?;
    let port = relay.port_or_known_default().unwrap_or(443);
    let found = tokio::net::lookup_host((host.as_str(), port))
        .await
        .map(|found| found.collect::<Vec<_>>());
    let addresses = found.map_err(|source| EnrolError::Resolve { host, source })?;
    let unreachable = |source| EnrolError::Unreachable {
        relay: relay.clone(),
        source,
    };
    let tcp = TcpStream::connect(&addresses[..])
        .await
        .map_err(unreachable)?;
    tcp.set_nodelay(true).map_err(unreachable)?;
    Ok(tcp)
}

pub(super) fn config(
    token: &EnrolmentToken,
    trust: Trust<'_>,
) -> Result<Arc<ClientConfig>, EnrolError> {
    let verifier = PinVerifier::new(token.pin, trust.roots()?)?;
    let mut config = ClientConfig::builder_with_provider(tls::provider())
        .with_safe_default_protocol_versions()
        .map_err(crate::Error::from)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    config.alpn_protocols = vec![tls::Alpn::Http11.as_bytes().to_vec()];
    Ok(Arc::new(config))
}

async fn exchange<T>(relay: &Url, io: T, body: Vec<u8>) -> Result<Answer, EnrolError>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    // In TLS 1.3 the server's alert can arrive after the client's handshake is done; it is then
    // inside hyper's error.
    let broken = |error: hyper::Error| match tls_cause(&error) {
        Some(tls) => failed_handshake(relay, tls.clone()),
        None => EnrolError::Unreachable {
            relay: relay.clone(),
            source: io::Error::other(error),
        },
    };
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(io))
        .await
        .map_err(broken)?;
    let driver = tokio::spawn(connection);
    let path = format!("{}/v1/enroll", relay.path().trim_end_matches('/'));
    let authority = &relay[url::Position::BeforeHost..url::Position::AfterPort];
    let request = Request::post(path)
        .header(header::HOST, authority)
        .header(header::CONTENT_TYPE, "application/json")
        .header(header::ACCEPT, "application/json")
        .body(Full::new(Bytes::from(body)))
        .map_err(BadAnswer::from)?;
    let answer = async {
        let response = sender.send_request(request).await.map_err(broken)?;
        let (head, body) = response.into_parts();
        let body = Limited::new(body, MAX_ANSWER)
            .collect()
            .await
            .map_err(BadAnswer::Body)?;
        let retry_after = head
            .headers
            .get(header::RETRY_AFTER)
            .and_then(|value| value.to_str().ok()?.parse().ok())
            .map(Duration::from_secs);
        Ok(Answer {
            status: head.status.as_u16(),
            retry_after,
            body: body.to_bytes(),
        })
    };
    let answer = answer.await;
    driver.abort();
    answer
}

fn server_name(relay: &Url) -> Result<ServerName<'static>, EnrolError> {
    let host = host_of(relay)?;
    ServerName::try_from(host).map_err(|error| EnrolError::Tls {
        relay: relay.clone(),
        source: Box::new(error.into()),
    })
}

/// Without the brackets of an IPv6 address.
fn host_of(relay: &Url) -> Result<String, EnrolError> {
    match relay.host() {
        Some(Host::Domain(name)) => Ok(name.to_owned()),
        Some(Host::Ipv4(address)) => Ok(address.to_string()),
        Some(Host::Ipv6(address)) => Ok(address.to_string()),
        None => Err(BadAnswer::NoHost(relay.clone()).into()),
    }
}

fn tls_cause(error: &hyper::Error) -> Option<&rustls::Error> {
    rustls_error(std::error::Error::source(error)?.downcast_ref()?)
}

fn rustls_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

fn broken_tls(relay: &Url, error: io::Error) -> EnrolError {
    match rustls_error(&error) {
        Some(cause) => failed_handshake(relay, cause.clone()),
        None => EnrolError::Tls {
            relay: relay.clone(),
            source: Box::new(error.into()),
        },
    }
}

fn failed_handshake(relay: &Url, cause: rustls::Error) -> EnrolError {
    let relay = relay.clone();
    match cause {
        rustls::Error::InvalidCertificate(CertificateError::Other(other))
            if other.0.is::<super::pin::OtherAuthority>() =>
        {
            EnrolError::WrongPin { relay }
        }
        rustls::Error::InvalidCertificate(
            reason @ (CertificateError::Expired
            | CertificateError::ExpiredContext { .. }
            | CertificateError::NotValidYet
            | CertificateError::NotValidYetContext { .. }),
        ) => EnrolError::Clock {
            source: Box::new(InvalidNow::Server { relay, reason }),
            now: SystemTime::now(),
        },
        rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            EnrolError::UnknownIssuer { relay }
        }
        // What a busy relay answers instead of a ServerHello: docs/protocol.md, "Connecting".
        rustls::Error::AlertReceived(rustls::AlertDescription::Unknown(code @ 0xc0..)) => {
            EnrolError::Busy {
                retry_after: Duration::from_secs(u64::from(code - 0xbf)),
            }
        }
        cause => EnrolError::Tls {
            relay,
            source: Box::new(cause.into()),
        },
    }
}

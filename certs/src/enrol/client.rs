//! One HTTP/1.1 POST, over TLS whose certificate the token may vouch for.

use super::{EnrolError, pin::PinVerifier};
use crate::{EnrolmentToken, tls};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Request, header};
use hyper_util::rt::TokioIo;
use rustls::{CertificateError, ClientConfig, pki_types::ServerName};
use std::{
    io,
    path::Path,
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
    extra_ca: Option<&Path>,
    connecting: impl Future<Output = Result<T, EnrolError>>,
    body: Vec<u8>,
) -> Result<Answer, EnrolError>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let relay = &token.relay;
    if relay.scheme() == "https" {
        // Read first: nobody is called on while our own files cannot be used.
        let config = config(token, extra_ca)?;
        let tls = TlsConnector::from(config)
            .connect(server_name(relay)?, connecting.await?)
            .await
            .map_err(|error| tls_error(relay, &error))?;
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

fn config(
    token: &EnrolmentToken,
    extra_ca: Option<&Path>,
) -> Result<Arc<ClientConfig>, EnrolError> {
    let own = |error: rustls::Error| crate::Error::Crypto(error.to_string());
    let verifier = PinVerifier::new(token.pin, tls::public_roots(extra_ca)?)?;
    let mut config = ClientConfig::builder_with_provider(tls::provider())
        .with_safe_default_protocol_versions()
        .map_err(own)?
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
    let broken = |error: hyper::Error| match tls_cause(&error) {
        Some(tls) => tls_error(relay, tls),
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
        .map_err(|error| EnrolError::BadAnswer(error.to_string()))?;
    let answer = async {
        let response = sender.send_request(request).await.map_err(broken)?;
        let (head, body) = response.into_parts();
        let body = Limited::new(body, MAX_ANSWER)
            .collect()
            .await
            .map_err(|error| EnrolError::BadAnswer(error.to_string()))?;
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
        reason: error.to_string(),
    })
}

/// Without the brackets of an IPv6 address.
fn host_of(relay: &Url) -> Result<String, EnrolError> {
    match relay.host() {
        Some(Host::Domain(name)) => Ok(name.to_owned()),
        Some(Host::Ipv4(address)) => Ok(address.to_string()),
        Some(Host::Ipv6(address)) => Ok(address.to_string()),
        None => Err(EnrolError::BadAnswer(format!("{relay} has no host"))),
    }
}

fn tls_cause(error: &hyper::Error) -> Option<&io::Error> {
    std::error::Error::source(error)?
        .downcast_ref::<io::Error>()
        .filter(|error| rustls_error(error).is_some())
}

fn rustls_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

fn tls_error(relay: &Url, error: &io::Error) -> EnrolError {
    let relay = relay.clone();
    let Some(cause) = rustls_error(error) else {
        return EnrolError::Tls {
            relay,
            reason: error.to_string(),
        };
    };
    match cause {
        rustls::Error::InvalidCertificate(CertificateError::Other(other))
            if other.0.is::<super::pin::OtherAuthority>() =>
        {
            EnrolError::WrongPin { relay }
        }
        rustls::Error::InvalidCertificate(
            error @ (CertificateError::Expired
            | CertificateError::ExpiredContext { .. }
            | CertificateError::NotValidYet
            | CertificateError::NotValidYetContext { .. }),
        ) => EnrolError::Clock {
            reason: format!("the certificate of {relay} is not valid now: {error}"),
            now: SystemTime::now(),
        },
        rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            EnrolError::UnknownIssuer { relay }
        }
        cause => EnrolError::Tls {
            relay,
            reason: cause.to_string(),
        },
    }
}

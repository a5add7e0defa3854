//! Dialling a relay: addresses, TCP, TLS, HTTP upgrade, proof.

use std::io;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::compat::FuturesAsyncReadCompatExt as _;
use url::Url;

use crate::message;
use crate::mux::Side;
use crate::proto::assertion::{Claims, audience};
use crate::proto::challenge::transcript;
use crate::proto::close::{CloseCode, CloseReason};
use crate::proto::messages::{Challenge, HandshakeReply, Proof, RefusalCode, Verdict, Welcome};
use crate::proto::wire::HANDSHAKE_CAP;
use crate::proto::{VERSION, VERSION_MIN};
use crate::ws::{self, WsDriver, WsIo};

use super::handle::start;
use super::socket::{Socket, secure};
use super::{Connection, DialConfig, DialError, RelayName, proxy, upgrade};

/// Dials the relay: resolves its name anew, tries all its addresses, upgrades, proves who we are.
pub async fn dial(config: &DialConfig) -> Result<Connection, DialError> {
    let target = Target::of(config)?;
    let socket = reach(config, &target).await?;

    let (aud, assertion) = assert(config)?;
    let within = config.timing.connect;
    let upgraded = upgrade::upgrade(socket, config, &target, &assertion);
    let (socket, early) = timely(within, "asking for the upgrade", upgraded).await?;
    join(socket, early, config, &aud, &assertion).await
}

/// Dials over a connection that somebody else made and upgraded.
pub async fn dial_over<T>(io: T, config: &DialConfig) -> Result<Connection, DialError>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (aud, assertion) = assert(config)?;
    join(io, Bytes::new(), config, &aud, &assertion).await
}

/// The audience, and the assertion for it.
fn assert(config: &DialConfig) -> Result<(String, String), DialError> {
    let aud = audience(&config.relay);
    let claims = Claims::new(
        config.prover.id.as_str(),
        aud.as_str(),
        unix_seconds(),
        new_id(),
    );
    let assertion = (config.prover.assertion)(&claims).map_err(DialError::Prover)?;
    Ok((aud, assertion))
}

async fn join<T>(
    io: T,
    early: Bytes,
    config: &DialConfig,
    aud: &str,
    assertion: &str,
) -> Result<Connection, DialError>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut io, driver) = ws::wrap(io, early, ws::Side::Client, &config.ws).await;
    let within = config.timing.handshake;
    let proven = prove(&mut io, &driver, config, aud, assertion);
    match timely(within, "proving this identity", proven).await {
        Ok((welcome, relay)) => Ok(begin(io, driver, config, welcome, relay)),
        Err(error) => {
            let (code, reason) = match &error {
                DialError::Version { .. } => (CloseCode::Version, ""),
                DialError::Protocol(_) => (CloseCode::Protocol, ""),
                DialError::Unwanted(_) => (CloseCode::Normal, "another relay is wanted"),
                _ => (CloseCode::Normal, ""),
            };
            driver.close(code, reason, config.timing.close).await;
            Err(error)
        }
    }
}

/// Where the relay is, from its URL.
pub(super) struct Target {
    pub(super) host: String,
    pub(super) port: u16,
    pub(super) tls: bool,
}

impl Target {
    fn of(config: &DialConfig) -> Result<Self, DialError> {
        let url = &config.relay;
        let target = Self::at(url)?;
        if !target.tls && !is_loopback(url) && !config.allow_plaintext {
            return Err(bad(url, "http:// is for loopback hosts only; use https://"));
        }
        if target.tls && config.tls.is_none() {
            return Err(bad(url, "https:// needs a TLS configuration"));
        }
        Ok(target)
    }

    pub(super) fn at(url: &Url) -> Result<Self, DialError> {
        let tls = match url.scheme() {
            "https" => true,
            "http" => false,
            _ => return Err(bad(url, "it must begin with https://")),
        };
        if !url.username().is_empty() || url.password().is_some() {
            return Err(bad(url, "it must not hold a user or password"));
        }
        let Some(host) = url.host_str() else {
            return Err(bad(url, "it has no host"));
        };
        let host = host
            .trim_start_matches('[')
            .trim_end_matches(']')
            .to_owned();
        Ok(Self {
            host,
            port: url.port_or_known_default().unwrap_or(443),
            tls,
        })
    }

    pub(super) fn authority(&self) -> String {
        authority(&self.host, self.port)
    }
}

fn bad(url: &Url, why: &'static str) -> DialError {
    DialError::BadUrl {
        url: url.to_string(),
        why,
    }
}

/// HOST:PORT, an IPv6 address in brackets.
pub(super) fn authority(host: &str, port: u16) -> String {
    match host.contains(':') {
        true => format!("[{host}]:{port}"),
        false => format!("{host}:{port}"),
    }
}

pub(super) fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(url::Host::Domain(name)) => name == "localhost" || name.ends_with(".localhost"),
        Some(url::Host::Ipv4(ip)) => ip.is_loopback(),
        Some(url::Host::Ipv6(ip)) => ip.is_loopback(),
        None => false,
    }
}

async fn reach(config: &DialConfig, target: &Target) -> Result<Socket, DialError> {
    let (relay, within) = (&config.relay, config.timing.connect);
    let connecting = proxy::connected(relay, target, &config.proxies, &config.software, within);
    let socket = connecting.await?;
    let (true, Some(tls)) = (target.tls, &config.tls) else {
        return Ok(socket);
    };
    let name = ServerName::try_from(target.host.clone())
        .map_err(|_| bad(relay, "its host is not a name that TLS can check"))?;
    let handshake = async {
        let shaken = secure(socket, name, tls.clone()).await;
        shaken.map_err(|error| tls_error(&target.host, error))
    };
    timely(within, "in the TLS handshake", handshake).await
}

fn tls_error(host: &str, error: io::Error) -> DialError {
    use rustls::CertificateError as Bad;
    use rustls::Error::InvalidCertificate;
    let host = host.to_owned();
    let inner = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match inner {
        Some(InvalidCertificate(Bad::UnknownIssuer | Bad::BadSignature)) => {
            DialError::UnknownIssuer { host }
        }
        Some(InvalidCertificate(
            Bad::Expired
            | Bad::ExpiredContext { .. }
            | Bad::NotValidYet
            | Bad::NotValidYetContext { .. },
        )) => DialError::ServerCertificateExpired { host },
        Some(InvalidCertificate(Bad::NotValidForName | Bad::NotValidForNameContext { .. })) => {
            DialError::WrongHost { host }
        }
        _ => DialError::Tls {
            host,
            source: error,
        },
    }
}

async fn prove<T>(
    io: &mut WsIo<T>,
    driver: &WsDriver<T>,
    config: &DialConfig,
    aud: &str,
    assertion: &str,
) -> Result<(Welcome, RelayName), DialError>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let mut io = io.compat();
    let lost = |error: io::Error| shut(driver.ended(), error);
    let challenge: Challenge = message::read(&mut io, HANDSHAKE_CAP).await.map_err(lost)?;
    let version = common_version(&challenge)?;
    if challenge.nonce.len() != 32 {
        return Err(DialError::Protocol("its nonce is not 32 bytes".to_owned()));
    }
    let relay = RelayName::of(&challenge);
    if is_unwanted(&relay, &config.avoid) {
        return Err(DialError::Unwanted(relay.instance));
    }
    let nonce: [u8; 32] = rand::random();
    let hash = (config.prover.sha256)(assertion.as_bytes());
    let signed = transcript(&challenge.nonce, &nonce, &hash, aud, version);
    let proof = Proof {
        version,
        nonce: nonce.to_vec(),
        signature: (config.prover.sign)(&signed).map_err(DialError::Prover)?,
        role: config.role.into(),
        instance: config.instance.clone(),
        software: config.software.clone(),
    };
    message::write(&mut io, &proof, HANDSHAKE_CAP)
        .await
        .map_err(lost)?;
    driver.flush().await.map_err(lost)?;
    let reply: HandshakeReply = message::read(&mut io, HANDSHAKE_CAP).await.map_err(lost)?;
    match reply.verdict {
        Some(Verdict::Welcome(welcome)) => Ok((welcome, relay)),
        Some(Verdict::Refused(refusal)) => Err(match refusal.code() {
            RefusalCode::Version => DialError::Version {
                ours: format!("{VERSION_MIN} to {VERSION}"),
                theirs: format!("{} to {}", challenge.version_min, challenge.version_max),
            },
            RefusalCode::Unauthenticated => DialError::Unauthenticated,
            _ => DialError::Refused(refusal),
        }),
        None => Err(DialError::Protocol(
            "it neither welcomed nor refused".to_owned(),
        )),
    }
}

fn is_unwanted(relay: &RelayName, avoid: &[String]) -> bool {
    let others = usize::try_from(relay.relays).unwrap_or(usize::MAX);
    // Of a set that is no larger than what is avoided, there is no better one to be had.
    avoid.contains(&relay.instance) && (others == 0 || others > avoid.len())
}

fn common_version(challenge: &Challenge) -> Result<u32, DialError> {
    let version = challenge.version_max.min(VERSION);
    if version < VERSION_MIN || version < challenge.version_min {
        return Err(DialError::Version {
            ours: format!("{VERSION_MIN} to {VERSION}"),
            theirs: format!("{} to {}", challenge.version_min, challenge.version_max),
        });
    }
    Ok(version)
}

/// What a close frame says is clearer than the end of bytes that it caused.
fn shut(ended: Option<CloseReason>, error: io::Error) -> DialError {
    match ended {
        Some(CloseReason {
            code: CloseCode::Unauthenticated | CloseCode::Revoked,
            ..
        }) => DialError::Unauthenticated,
        Some(CloseReason {
            code: CloseCode::Abnormal,
            ..
        })
        | None => match error.kind() {
            io::ErrorKind::InvalidData => DialError::Protocol(error.to_string()),
            _ => DialError::Lost(error),
        },
        Some(reason) => DialError::Protocol(reason.to_string()),
    }
}

fn begin<T>(
    io: WsIo<T>,
    driver: WsDriver<T>,
    config: &DialConfig,
    welcome: Welcome,
    relay: RelayName,
) -> Connection
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut timing, mut mux) = (config.timing.clone(), config.mux.clone());
    if welcome.ping_interval_ms > 0 {
        // Asked for by a relay that knows what stands in front of it. Not below a tenth of a
        // second, whatever it asks.
        let asked = Duration::from_millis(u64::from(welcome.ping_interval_ms));
        timing.ping_interval = timing
            .ping_interval
            .min(asked.max(Duration::from_millis(100)));
    }
    if welcome.max_streams > 0 {
        let granted = usize::try_from(welcome.max_streams).unwrap_or(usize::MAX);
        mux.max_streams = mux.max_streams.min(granted);
    }
    let id = welcome.carrier_id.clone();
    let (carrier, incoming) = start(io, driver, id, Side::Dialer, &mux, &timing);
    Connection {
        carrier,
        incoming,
        welcome,
        relay,
    }
}

pub(super) async fn timely<T>(
    within: Duration,
    phase: &'static str,
    step: impl Future<Output = Result<T, DialError>>,
) -> Result<T, DialError> {
    match tokio::time::timeout(within, step).await {
        Ok(result) => result,
        Err(_) => Err(DialError::Timeout {
            phase,
            after: within,
        }),
    }
}

fn new_id() -> String {
    format!("{:032x}", rand::random::<u128>())
}

fn unix_seconds() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs())
}

//! Dialling a relay: addresses, TCP, TLS, HTTP upgrade, proof.

use std::io;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::compat::FuturesAsyncReadCompatExt as _;

use crate::message;
use crate::mux::Side;
use crate::proto::assertion::{Claims, RENEWAL, audience};
use crate::proto::busy;
use crate::proto::challenge::transcript;
use crate::proto::close::{CloseCode, CloseReason};
use crate::proto::messages::{Challenge, HandshakeReply, Proof, RefusalCode, Verdict, Welcome};
use crate::proto::wire::HANDSHAKE_CAP;
use crate::proto::{VERSION, VERSION_MIN};
use crate::ws::{self, WsDriver, WsIo};

use super::handle::start;
use super::socket::{Socket, secure};
use super::target::{Target, bad, is_loopback};
use super::timing::timely;
use super::{Connection, DialConfig, DialError, RelayName, proxy, upgrade};

/// Dials the relay: resolves its name again, tries all its addresses, upgrades, authenticates itself.
///
/// # Errors
/// [`DialError`], which names the component at fault and the remedy.
pub async fn dial(config: &DialConfig) -> Result<Connection, DialError> {
    let target = target(config)?;
    let socket = reach(config, &target).await?;
    let ends = socket.ends();

    // Signed only once the connection is there: an assertion lives 60 s, and a proxy or the TLS
    // handshake may use up a part of it.
    let (aud, assertion) = assert(config)?;
    let within = config.timing.connect;
    let upgraded = upgrade::upgrade(socket, config, &target, &assertion);
    let (socket, early) = timely(within, "asking for the upgrade", upgraded).await?;
    let joined = join(socket, early, config, &aud, &assertion).await;
    joined.map(|connection| Connection { ends, ..connection })
}

/// Dials over a connection that the caller has made and upgraded.
///
/// # Errors
/// As [`dial`].
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
    let mut claims = Claims::new(
        config.prover.id.as_str(),
        aud.as_str(),
        unix_seconds(),
        new_id(),
    );
    claims.purpose = config.for_renewal.then(|| RENEWAL.to_owned());
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
            // Each failure ends with a close frame, so that the relay need not wait for its
            // deadline.
            let (code, reason) = match &error {
                DialError::Version { .. } => (CloseCode::Version, ""),
                DialError::Protocol(_) | DialError::Malformed(_) => (CloseCode::Protocol, ""),
                DialError::Unwanted(_) => (CloseCode::Normal, "another relay is wanted"),
                _ => (CloseCode::Normal, ""),
            };
            driver.close(code, reason, config.timing.close).await;
            Err(error)
        }
    }
}

/// Where the relay of this configuration is, if the configuration allows to dial it.
fn target(config: &DialConfig) -> Result<Target, DialError> {
    let url = &config.relay;
    let target = Target::at(url)?;
    // Without TLS, the path reads the assertion and the metadata of each line.
    if !target.tls && !is_loopback(url) && !config.allow_plaintext {
        return Err(bad(url, "http:// is for loopback hosts only; use https://"));
    }
    if target.tls && config.tls.is_none() {
        return Err(bad(url, "https:// needs a TLS configuration"));
    }
    Ok(target)
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
        // An unassigned alert in place of a ServerHello is a relay without a free handshake slot
        // (docs/protocol.md, Upgrade). It is not authenticated, and only delays the next dial.
        Some(rustls::Error::AlertReceived(rustls::AlertDescription::Unknown(code)))
            if busy::retry_after(*code).is_some() =>
        {
            DialError::Busy {
                host,
                retry_after: busy::retry_after(*code).unwrap_or(busy::LONGEST),
            }
        }
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
    // The proof is fresh only by this nonce; a short one could repeat.
    if challenge.nonce.len() != 32 {
        return Err(DialError::Protocol("its nonce is not 32 bytes".to_owned()));
    }
    let relay = RelayName::of(&challenge);
    // Before the proof, so that the relay has registered nothing and replaces no carrier.
    if is_unwanted(&relay, &config.avoid) {
        return Err(DialError::Unwanted(relay.instance));
    }
    let nonce: [u8; 32] = rand::random();
    // The signature binds nonces, assertion and audience: a captured assertion is of no use without
    // the key, and a relay cannot use the proof at another.
    let hash = (config.prover.sha256)(assertion.as_bytes());
    let signed = transcript(&challenge.nonce, &nonce, &hash, aud, version);
    let proof = Proof {
        version,
        nonce: nonce.to_vec(),
        signature: (config.prover.sign)(&signed).map_err(DialError::Prover)?,
        role: config.role.into(),
        instance: config.instance.clone(),
        software: config.software.clone(),
        shares_identity: config.shares_identity,
        bulk: config.class.is_bulk(),
    };
    message::write(&mut io, &proof, HANDSHAKE_CAP)
        .await
        .map_err(lost)?;
    // Writes are corked until a flush; without it both ends would wait.
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
            RefusalCode::Revoked => DialError::Revoked,
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
    // The highest of both; the relay checks the chosen one again in the proof.
    let version = challenge.version_max.min(VERSION);
    if version < VERSION_MIN || version < challenge.version_min {
        return Err(DialError::Version {
            ours: format!("{VERSION_MIN} to {VERSION}"),
            theirs: format!("{} to {}", challenge.version_min, challenge.version_max),
        });
    }
    Ok(version)
}

/// The reason in a close frame is clearer than the end of bytes that it caused.
fn shut(ended: Option<CloseReason>, error: io::Error) -> DialError {
    match ended {
        Some(CloseReason {
            code: CloseCode::Unauthenticated,
            ..
        }) => DialError::Unauthenticated,
        Some(CloseReason {
            code: CloseCode::Revoked,
            ..
        }) => DialError::Revoked,
        Some(CloseReason {
            code: CloseCode::Abnormal,
            ..
        })
        | None => match error.kind() {
            io::ErrorKind::InvalidData => DialError::Malformed(error),
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
        // The relay is configured for the balancer in front of it. At least a tenth of a second,
        // against a relay that would have us ping without pause.
        let requested = Duration::from_millis(u64::from(welcome.ping_interval_ms));
        timing.ping_interval = timing
            .ping_interval
            .min(requested.max(Duration::from_millis(100)));
    }
    // A stream beyond the relay's limit would only be refused, one round trip later.
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
        ends: None,
    }
}

fn new_id() -> String {
    format!("{:032x}", rand::random::<u128>())
}

fn unix_seconds() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs())
}

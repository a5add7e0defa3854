//! The relay's end of the handshake: challenge, proof, welcome.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::compat::FuturesAsyncReadCompatExt as _;

use crate::message;
use crate::mux::{self, Side};
use crate::proto::close::{CloseCode, CloseReason, ClosedBy};
use crate::proto::messages::{
    Challenge, HandshakeReply, Proof, Refusal, RefusalCode, Verdict, Welcome,
};
use crate::proto::wire::HANDSHAKE_CAP;
use crate::proto::{VERSION, VERSION_MIN};
use crate::ws::{self, WsDriver, WsIo};

use super::handle::start;
use super::{AcceptError, Connection, RelayName, Timing};

/// How a relay accepts a carrier.
#[derive(Clone, Debug)]
pub struct AcceptConfig {
    /// This relay's name, by which a dialer detects that it has a carrier to it already.
    pub instance: String,
    /// Relays of the set that take lines, this one among them; 0: not sent.
    pub relays: u32,
    /// `ping_interval` is also requested of the dialer.
    pub timing: Timing,
    /// The WebSocket's limits.
    pub ws: ws::Config,
    /// The multiplexer's limits.
    pub mux: mux::Config,
    /// Streams the dialer may have open at once. Stands above `mux.max_incoming`; 0 leaves it.
    pub max_streams: u32,
}

impl AcceptConfig {
    /// The defaults, for the relay of this name.
    pub fn new(instance: impl Into<String>) -> Self {
        Self {
            instance: instance.into(),
            relays: 0,
            timing: Timing::default(),
            ws: ws::Config::default(),
            mux: mux::Config::default(),
            max_streams: 0,
        }
    }
}

/// Accepts a carrier on a connection whose 101 has been sent. `verify` gets the proof and the
/// nonce of the challenge; a proof of another version never reaches it. All within
/// `timing.handshake`; a dialer that fails receives the reason in the close frame.
///
/// # Errors
/// [`AcceptError`]; the dialer has received the reason where that was possible.
pub async fn accept<T, V>(
    io: T,
    mut config: AcceptConfig,
    verify: V,
) -> Result<(Connection, Proof), AcceptError>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    V: FnOnce(&Proof, &[u8; 32]) -> Result<(), Refusal>,
{
    let (mut io, driver) = ws::wrap(io, Bytes::new(), ws::Side::Server, &config.ws).await;
    if config.max_streams > 0 {
        config.mux.max_incoming = usize::try_from(config.max_streams).unwrap_or(usize::MAX);
    }
    // One deadline for the whole exchange: a byte now and then cannot hold a connection that is not
    // authenticated.
    let within = config.timing.handshake;
    let shaken = handshake(&mut io, &driver, &config, verify);
    let failed = match tokio::time::timeout(within, shaken).await {
        Ok(Ok((welcome, proof))) => {
            let relay = RelayName {
                instance: config.instance,
                relays: config.relays,
            };
            let id = welcome.carrier_id.clone();
            let (carrier, incoming) =
                start(io, driver, id, Side::Acceptor, &config.mux, &config.timing);
            let connection = Connection {
                carrier,
                incoming,
                welcome,
                relay,
                ends: None,
            };
            return Ok((connection, proof));
        }
        // By a close frame, not by a lost connection.
        Ok(Err(AcceptError::Lost(_)))
            if matches!(
                driver.ended(),
                Some(CloseReason {
                    by: ClosedBy::Peer,
                    code: CloseCode::Normal,
                    ..
                })
            ) =>
        {
            AcceptError::Declined
        }
        Ok(Err(error)) => error,
        Err(_) => AcceptError::Timeout(within),
    };
    let (code, reason) = goodbye(&failed);
    driver.close(code, &reason, config.timing.close).await;
    Err(failed)
}

async fn handshake<T, V>(
    io: &mut WsIo<T>,
    driver: &WsDriver<T>,
    config: &AcceptConfig,
    verify: V,
) -> Result<(Welcome, Proof), AcceptError>
where
    T: AsyncRead + AsyncWrite + Unpin,
    V: FnOnce(&Proof, &[u8; 32]) -> Result<(), Refusal>,
{
    let mut io = io.compat();
    let nonce: [u8; 32] = rand::random();
    let challenge = Challenge {
        version_min: VERSION_MIN,
        version_max: VERSION,
        nonce: nonce.to_vec(),
        relay_instance: config.instance.clone(),
        relays: config.relays,
        time_unix_ms: unix_ms(),
    };
    message::write(&mut io, &challenge, HANDSHAKE_CAP)
        .await
        .map_err(lost)?;
    driver.flush().await.map_err(lost)?;

    let proof: Proof = message::read(&mut io, HANDSHAKE_CAP).await.map_err(lost)?;
    // The version first, since `verify` reads the proof by the rules of this one.
    let verdict = judge(&proof).and_then(|()| verify(&proof, &nonce));
    let verdict = match verdict {
        Ok(()) => Verdict::Welcome(Welcome {
            version: proof.version,
            carrier_id: carrier_id(),
            ping_interval_ms: millis(config.timing.ping_interval),
            max_streams: u32::try_from(config.mux.incoming_permits()).unwrap_or(u32::MAX),
        }),
        Err(refusal) => Verdict::Refused(refusal),
    };
    let reply = HandshakeReply {
        verdict: Some(verdict.clone()),
    };
    message::write(&mut io, &reply, HANDSHAKE_CAP)
        .await
        .map_err(lost)?;
    driver.flush().await.map_err(lost)?;
    match verdict {
        Verdict::Welcome(welcome) => Ok((welcome, proof)),
        Verdict::Refused(refusal) => Err(AcceptError::Refused(refusal)),
    }
}

fn judge(proof: &Proof) -> Result<(), Refusal> {
    if !(VERSION_MIN..=VERSION).contains(&proof.version) {
        let message = format!(
            "this relay speaks protocol versions {VERSION_MIN} to {VERSION}, not {}",
            proof.version
        );
        return Err(Refusal::new(RefusalCode::Version, message));
    }
    if proof.nonce.len() != 32 {
        return Err(Refusal::new(
            RefusalCode::BadRequest,
            "the proof's nonce is not 32 bytes",
        ));
    }
    Ok(())
}

fn goodbye(failed: &AcceptError) -> (CloseCode, String) {
    match failed {
        AcceptError::Timeout(_) => (CloseCode::Timeout, "no proof in time".to_owned()),
        AcceptError::Protocol(_) => (CloseCode::Protocol, "malformed handshake".to_owned()),
        AcceptError::Declined => (CloseCode::Normal, String::new()),
        AcceptError::Lost(_) => (CloseCode::Protocol, "handshake ended early".to_owned()),
        AcceptError::Refused(refusal) => {
            let code = match refusal.code() {
                RefusalCode::Version => CloseCode::Version,
                RefusalCode::Limit => CloseCode::Limit,
                RefusalCode::Draining => CloseCode::GoingAway,
                RefusalCode::BadRequest => CloseCode::Protocol,
                RefusalCode::Internal => CloseCode::Internal,
                _ => CloseCode::Unauthenticated,
            };
            (code, refusal.message.clone())
        }
    }
}

fn lost(error: std::io::Error) -> AcceptError {
    use crate::proto::wire::WireError;
    match error.downcast::<WireError>() {
        Ok(wire) => AcceptError::Protocol(wire),
        Err(error) => AcceptError::Lost(error),
    }
}

fn carrier_id() -> String {
    format!("{:016x}", rand::random::<u64>())
}

fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

fn unix_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| u64::try_from(now.as_millis()).unwrap_or(u64::MAX))
}

//! The agent's certificate, renewed over the carrier with a key that is made here and stays here.

use std::path::Path;
use std::time::{Duration, SystemTime};

use rustls::pki_types::CertificateDer;
use throwline_certs::{CheckError, PendingIdentity, Want};
use throwline_tunnel::carrier::{Carrier, OpenError};
use throwline_tunnel::message;
use throwline_tunnel::proto::messages::{Certificate, Renew, StreamHeader, StreamKind};
use throwline_tunnel::proto::wire::CERTIFICATE_CAP;

use crate::agent::Agent;

/// The relay signs in milliseconds; a database that is locked may take longer.
const DEADLINE: Duration = Duration::from_secs(30);

#[derive(Debug, thiserror::Error)]
pub(crate) enum RenewalError {
    #[error("the relay did not renew it: {0}")]
    Open(#[from] OpenError),
    #[error("the relay's answer was cut: {0}")]
    Cut(#[from] std::io::Error),
    #[error("the relay did not answer within {} s", DEADLINE.as_secs())]
    Timeout,
    /// The relay, or who signs for it, gave something else than was asked for.
    #[error("the new certificate is not ours: {0}")]
    Wrong(String),
    #[error("the new certificate is not good: {0}")]
    Check(#[from] CheckError),
    #[error(transparent)]
    Own(#[from] throwline_certs::Error),
}

/// Renews, saves and puts to use; on any failure the old identity stays as it is.
pub(crate) async fn renew(
    agent: &Agent,
    carrier: &Carrier,
    state_dir: &Path,
) -> Result<SystemTime, RenewalError> {
    let pending = PendingIdentity::generate()?;
    let header = StreamHeader {
        kind: Some(StreamKind::Renew(Renew {
            csr: pending.csr_der().to_vec(),
        })),
    };
    let asking = async {
        let (mut stream, _) = carrier.open(header).await?;
        Ok::<_, RenewalError>(message::read::<Certificate, _>(&mut stream, CERTIFICATE_CAP).await?)
    };
    let answer = tokio::time::timeout(DEADLINE, asking)
        .await
        .map_err(|_| RenewalError::Timeout)??;
    let chain: Vec<CertificateDer<'static>> =
        answer.chain.into_iter().map(CertificateDer::from).collect();
    let peer = agent
        .validator()
        .check(&chain, Want::CARRIER, SystemTime::now())?;
    if peer.id != *agent.identity().id() {
        return Err(RenewalError::Wrong(format!("it names {}", peer.id)));
    }
    // Refuses a certificate for another key than the one that was just made.
    let identity = pending.complete(chain)?;
    identity.save(state_dir)?;
    let not_after = identity.not_after();
    agent.replace(identity)?;
    Ok(not_after)
}

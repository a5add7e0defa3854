//! The dialer's side of a renewal: asks for a new certificate on a carrier.
//!
//! A carrier only transports this. An intermediary that terminates its TLS can open such a stream too,
//! so the authority relies on the signature by the old certificate's key over its challenge and the
//! new request.

use std::io;
use std::time::Duration;

use crate::carrier::{BoxError, Carrier, OpenError};
use crate::message;
use crate::proto::messages::{
    Certificate, Refusal, Renewal, RenewalChallenge, RenewalReply, RenewalRequest, RenewalVerdict,
    StreamKind,
};
use crate::proto::wire::CERTIFICATE_CAP;

/// The authority signs in milliseconds; a database that is locked may take longer.
const DEADLINE: Duration = Duration::from_secs(30);

/// Why there is no new certificate.
#[derive(Debug, thiserror::Error)]
pub enum RenewalError {
    /// The stream for the renewal was not opened.
    #[error("the relay took no renewal: {0}")]
    Open(#[from] OpenError),
    /// Sent by the authority, by way of the relay.
    #[error("{0}")]
    Refused(Refusal),
    /// The stream ended before the answer.
    #[error("the renewal was cut: {0}")]
    Cut(#[from] io::Error),
    /// The relay did not answer within the deadline.
    #[error("the relay did not answer within {} s", DEADLINE.as_secs())]
    Timeout,
    /// The answer has neither certificate nor refusal.
    #[error("the relay neither renewed nor refused")]
    Empty,
    /// Our own side would not sign.
    #[error("the renewal was not signed: {0}")]
    NotSigned(BoxError),
}

/// Asks for a certificate in place of `chain` (DER, leaf first), for the key of `csr` (PKCS #10, DER).
/// `sign` makes the old key's signature for the challenge, or refuses an authority that is not ours.
/// Within 30 s. What is returned is unchecked.
///
/// # Errors
/// See [`RenewalError`]; the old certificate is as good as before, whichever it is.
pub async fn ask(
    carrier: &Carrier,
    chain: Vec<Vec<u8>>,
    csr: &[u8],
    sign: impl FnOnce(&RenewalChallenge) -> Result<Vec<u8>, BoxError>,
) -> Result<Certificate, RenewalError> {
    let asking = async {
        let header = StreamKind::Renewal(Renewal {});
        let (mut stream, _) = carrier.open(header.into()).await?;
        let challenge: RenewalChallenge = message::read(&mut stream, CERTIFICATE_CAP).await?;
        let signature = sign(&challenge).map_err(RenewalError::NotSigned)?;
        let request = RenewalRequest {
            chain,
            csr: csr.to_vec(),
            signature,
        };
        message::write(&mut stream, &request, CERTIFICATE_CAP).await?;
        let reply: RenewalReply = message::read(&mut stream, CERTIFICATE_CAP).await?;
        match reply.verdict {
            Some(RenewalVerdict::Issued(certificate)) => Ok(certificate),
            Some(RenewalVerdict::Refused(refusal)) => Err(RenewalError::Refused(refusal)),
            None => Err(RenewalError::Empty),
        }
    };
    let answer = tokio::time::timeout(DEADLINE, asking).await;
    answer.map_err(|_| RenewalError::Timeout)?
}

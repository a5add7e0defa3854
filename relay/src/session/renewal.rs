//! `Renewal`: a new certificate for the identity that the carrier has proved.
//!
//! Only a signature by the old certificate's key counts: a proxy that terminates the carrier's TLS can
//! open this stream as well.

use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::CertificateDer;
use throwline_certs::directory::{Issued, RenewError};
use throwline_certs::renewal::Request;
use throwline_certs::{Directory, SpiffeId};
use throwline_tunnel::carrier::IncomingStream;
use throwline_tunnel::message;
use throwline_tunnel::proto::messages::{
    Certificate, Refusal, RefusalCode, RenewalChallenge, RenewalReply, RenewalRequest,
    RenewalVerdict, StreamReply,
};
use throwline_tunnel::proto::wire::CERTIFICATE_CAP;
use tokio::io::AsyncWriteExt;
use tokio::sync::OwnedSemaphorePermit;
use tracing::{debug, error, info, warn};

use crate::metrics::Metrics;
use crate::refusals::refuse;

/// How long a signature may take to come: half of what the client waits for its certificate.
const ANSWER: Duration = Duration::from_secs(15);
/// How long a carrier that brought a bad request waits until it may bring the next.
const PENALTY: Duration = Duration::from_secs(1);

/// Renews certificates of peers.
pub(crate) struct Renewals {
    pub(crate) directory: Arc<dyn Directory>,
    pub(crate) metrics: Metrics,
}

impl Renewals {
    /// `one` is the carrier's permit for one renewal at a time, if it was free.
    pub(super) async fn serve(
        &self,
        carrier: &SpiffeId,
        stream: IncomingStream,
        one: Option<OwnedSemaphorePermit>,
    ) {
        let Some(_one) = one else {
            let refused = Refusal::new(
                RefusalCode::Limit,
                "a renewal is under way on this carrier already",
            );
            self.metrics.renewal("limit");
            let refused = refused.retry_after(PENALTY * 2);
            return refuse(&self.metrics, stream, refused).await;
        };
        // Drawn for this stream only: a signature for another stream's nonce does not verify here.
        let challenge = match self.directory.renewal_challenge().await {
            Ok(challenge) => challenge,
            Err(error) => {
                error!(%error, "a renewal failed in the authority");
                let refused = Refusal::new(RefusalCode::Internal, INTERNAL);
                return refuse(&self.metrics, stream, refused).await;
            }
        };
        let asked = async {
            let mut stream = stream.accept(StreamReply::accepted()).await?;
            let message = RenewalChallenge {
                nonce: challenge.nonce().to_vec(),
                authority: challenge.authority().to_vec(),
            };
            message::write(&mut stream, &message, CERTIFICATE_CAP).await?;
            let request: RenewalRequest = message::read(&mut stream, CERTIFICATE_CAP).await?;
            Ok::<_, std::io::Error>((stream, request))
        };
        // The challenge stays in memory for as long as this waits.
        let (mut stream, request) = match tokio::time::timeout(ANSWER, asked).await {
            Ok(Ok(asked)) => asked,
            Ok(Err(error)) => {
                self.metrics.renewal("cut");
                return debug!(%error, "a renewal was not asked for to its end");
            }
            Err(_) => {
                self.metrics.renewal("timeout");
                return debug!("a renewal was not signed in time");
            }
        };
        let chain: Vec<CertificateDer<'_>> = (request.chain.iter())
            .map(|der| CertificateDer::from(der.as_slice()))
            .collect();
        let request = Request {
            chain: &chain,
            csr: &request.csr,
            signature: &request.signature,
        };
        let renewed = self.directory.renew(challenge, carrier, request).await;
        let (verdict, is_bad) = match renewed {
            Ok(issued) => {
                // The authority's own log names the certificates.
                info!(second = issued.is_second, "renewed a certificate");
                let outcome = match issued.is_second {
                    true => "second-key",
                    false => "issued",
                };
                self.metrics.renewal(outcome);
                (RenewalVerdict::Issued(certificate(&issued)), false)
            }
            Err(error) => {
                self.metrics.renewal(label(&error));
                (RenewalVerdict::Refused(refused(&error)), true)
            }
        };
        let reply = RenewalReply {
            verdict: Some(verdict),
        };
        let sent = async {
            message::write(&mut stream, &reply, CERTIFICATE_CAP).await?;
            stream.shutdown().await
        };
        if let Err(error) = sent.await {
            debug!(%error, "the answer to a renewal was not taken");
        }
        // Holds the carrier's one permit, so that failing requests are at most one a second.
        if is_bad {
            tokio::time::sleep(PENALTY).await;
        }
    }
}

const INTERNAL: &str = "the authority cannot answer now";

fn certificate(issued: &Issued) -> Certificate {
    let der = |chain: &[CertificateDer<'static>]| chain.iter().map(|one| one.to_vec()).collect();
    Certificate {
        chain: der(&issued.chain),
        ca: der(&issued.ca),
    }
}

fn label(error: &RenewError) -> &'static str {
    match error {
        RenewError::NotSigned | RenewError::WrongCarrier { .. } => "not-signed",
        RenewError::Certificate(_) | RenewError::BadCsr(_) => "bad-request",
        RenewError::Unknown | RenewError::Superseded => "unknown",
        RenewError::EnrolmentTooOld { .. } | RenewError::Expired { .. } => "expired",
        RenewError::Revoked | RenewError::Released => "revoked",
        RenewError::TooOften { .. } => "limit",
        RenewError::SystemName(_) => "system-name",
        RenewError::Unavailable(_) => "failed",
    }
}

fn refused(error: &RenewError) -> Refusal {
    if let RenewError::Unavailable(cause) = error {
        error!(%cause, "a renewal failed in the authority");
        return Refusal::new(RefusalCode::Internal, INTERNAL);
    }
    warn!(%error, "refused a renewal");
    match error {
        RenewError::Unavailable(_) => Refusal::new(RefusalCode::Internal, INTERNAL),
        RenewError::BadCsr(_) => Refusal::new(
            RefusalCode::BadRequest,
            "the certificate request cannot be used",
        ),
        RenewError::NotSigned | RenewError::WrongCarrier { .. } | RenewError::Certificate(_) => {
            Refusal::new(
                RefusalCode::NotAllowed,
                "the renewal is not signed by the key of the certificate that it is to renew",
            )
        }
        RenewError::SystemName(_) => Refusal::new(RefusalCode::NotAllowed, error.to_string()),
        RenewError::EnrolmentTooOld { .. } => Refusal::new(
            RefusalCode::NotAllowed,
            "the enrolment is too old to be renewed; enrol again with a new token",
        ),
        RenewError::TooOften { retry_after } => Refusal::new(
            RefusalCode::Limit,
            "this identity was renewed too often; is its key in use elsewhere?",
        )
        .retry_after(*retry_after),
        RenewError::Revoked => Refusal::new(
            RefusalCode::Revoked,
            "this identity was revoked; enrol again with a new token",
        ),
        RenewError::Unknown
        | RenewError::Expired { .. }
        | RenewError::Superseded
        | RenewError::Released => Refusal::new(
            RefusalCode::NotAllowed,
            "this identity cannot be renewed; enrol again with a new token",
        ),
    }
}

//! `Renew`: a new certificate for the identity that the carrier has proved.

use std::sync::Arc;

use throwline_certs::authority::{Issued, RenewError};
use throwline_tunnel::carrier::IncomingStream;
use throwline_tunnel::proto::messages::{Certificate, Refusal, RefusalCode, Renew, StreamReply};
use throwline_tunnel::proto::wire::{self, CERTIFICATE_CAP};
use tokio::io::AsyncWriteExt;
use tracing::{debug, error, info, warn};

use crate::relay::Shared;
use crate::session::Peer;

pub(crate) async fn handle(
    shared: Arc<Shared>,
    peer: Arc<Peer>,
    stream: IncomingStream,
    wanted: Renew,
) {
    let issued = match shared.authority.renew(&peer.identity, &wanted.csr).await {
        Ok(issued) => issued,
        Err(error) => {
            shared.refuse(stream, refused(&error)).await;
            return;
        }
    };
    info!("renewed a certificate");
    if let Err(error) = send(stream, &issued).await {
        debug!(%error, "a renewed certificate was not taken");
    }
}

async fn send(stream: IncomingStream, issued: &Issued) -> std::io::Result<()> {
    let der = |chain: &[rustls::pki_types::CertificateDer<'static>]| {
        chain.iter().map(|one| one.to_vec()).collect()
    };
    let message = Certificate {
        chain: der(&issued.chain),
        ca: der(&issued.ca),
    };
    let bytes = wire::encode(&message, CERTIFICATE_CAP).map_err(std::io::Error::other)?;
    let mut stream = stream.accept(StreamReply::accepted()).await?;
    stream.write_all(&bytes).await?;
    stream.shutdown().await
}

fn refused(error: &RenewError) -> Refusal {
    match error {
        RenewError::Internal(cause) => {
            error!(%cause, "a renewal failed in the authority");
            Refusal::new(RefusalCode::Internal, "the authority cannot answer now")
        }
        RenewError::BadCsr(_) => {
            warn!(%error, "refused a renewal");
            Refusal::new(
                RefusalCode::BadRequest,
                "the certificate request cannot be used",
            )
        }
        RenewError::EnrolmentTooOld { .. } => Refusal::new(
            RefusalCode::NotAllowed,
            "the enrolment is too old to be renewed; enrol again with a new token",
        ),
        RenewError::Unknown | RenewError::Expired { .. } | RenewError::Revoked => {
            warn!(%error, "refused a renewal");
            Refusal::new(
                RefusalCode::NotAllowed,
                "this identity cannot be renewed; enrol again with a new token",
            )
        }
    }
}

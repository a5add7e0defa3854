//! After a renewal: puts the new certificate under the lines that live, so that nothing on them ends
//! with the old one.
//!
//! Each agent gets it in a new API session, whose handshake proves the certificate, with a proof for
//! each line by the key that only the two ends of that line have. No relay sees any of it.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{Method, Request, StatusCode, Version};
use http_body_util::{BodyExt as _, Either, Full, Limited};
use throwline_tunnel::proto::messages::{
    LINE_CREDENTIALS_HOST, LineCredential, LineCredentials, LineCredentialsReply,
};
use throwline_tunnel::proto::wire::{self, CREDENTIALS_CAP};
use tokio::time::{sleep, timeout};

use super::{HeldLine, Link};
use crate::failure::{Cause, Failure};
use crate::session::errors::lost;
use crate::session::sessions::Sessions;

/// Between attempts, at first and at most. The old certificate still has a third of its life.
const AGAIN: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));
/// A line that was being opened when the identity changed may have taken the old certificate: what
/// was opened until then is looked at once more.
const OPENING: Duration = Duration::from_secs(20);
const ANSWER: Duration = Duration::from_secs(15);
/// Lines in one request: 60 KiB hold about a thousand.
const AT_ONCE: usize = 500;

impl Link {
    /// Proves each new identity for all lines. Never ends.
    pub(crate) async fn keep_proved(self, sessions: Arc<Sessions>) {
        loop {
            self.0.renewed.notified().await;
            self.prove_all(&sessions).await;
            tokio::select! {
                () = sleep(OPENING) => self.prove_all(&sessions).await,
                // Another one already.
                () = self.0.renewed.notified() => self.0.renewed.notify_one(),
            }
        }
    }

    /// Tries until no line of the present user is left that another certificate stands for.
    async fn prove_all(&self, sessions: &Arc<Sessions>) {
        let mut wait = AGAIN.0;
        loop {
            let mut is_done = true;
            for (cluster, lines) in self.unproved() {
                for lines in lines.chunks(AT_ONCE) {
                    if let Err(failure) = self.prove(sessions, &cluster, lines).await {
                        tracing::info!(cluster, %failure, "the renewed certificate does not stand for what runs there yet");
                        is_done = false;
                    }
                }
            }
            if is_done {
                return;
            }
            sleep(wait).await;
            wait = (wait * 2).min(AGAIN.1);
        }
    }

    /// The lines that another certificate stands for, by cluster.
    fn unproved(&self) -> BTreeMap<String, Vec<HeldLine>> {
        let present = self.credentials().identity.as_peer().fingerprint;
        let mut clusters: BTreeMap<String, Vec<HeldLine>> = BTreeMap::new();
        for line in self.lines() {
            if line.fingerprint != present && !line.handle.phase().over {
                clusters.entry(line.cluster.clone()).or_default().push(line);
            }
        }
        clusters
    }

    async fn prove(
        &self,
        sessions: &Arc<Sessions>,
        cluster: &str,
        lines: &[HeldLine],
    ) -> Result<(), Failure> {
        let fingerprint = self.credentials().identity.as_peer().fingerprint;
        let proofs = lines.iter().filter_map(|line| {
            Some(LineCredential {
                line_id: line.handle.id().to_vec(),
                mac: line.handle.sign_credential(&fingerprint)?,
            })
        });
        let message = LineCredentials {
            lines: proofs.collect(),
        };
        if message.lines.is_empty() {
            return Ok(());
        }
        let asking = ask(sessions, cluster, &message);
        let accepted = timeout(ANSWER, asking)
            .await
            .map_err(|_| Failure::Timeout {
                cluster: cluster.to_owned(),
                seconds: ANSWER.as_secs(),
            })??;
        // A line that was refused, for one that has another user's or other groups' certificate, is
        // not asked about again: it ends with its own.
        let refused = message.lines.len().saturating_sub(accepted.len());
        if refused > 0 {
            tracing::info!(
                cluster,
                refused,
                "what runs ends with the certificate that it began with"
            );
        }
        let asked: HashSet<&[u8]> = lines.iter().map(|line| line.handle.id()).collect();
        for line in self.lock_lines().held.values_mut() {
            if asked.contains(line.handle.id()) {
                line.fingerprint = fingerprint;
            }
        }
        Ok(())
    }
}

/// Sends the proofs in a session of the present identity; the lines that were accepted.
async fn ask(
    sessions: &Arc<Sessions>,
    cluster: &str,
    message: &LineCredentials,
) -> Result<Vec<Vec<u8>>, Failure> {
    let body: Bytes = wire::encode(message, CREDENTIALS_CAP).map_err(Failure::internal)?;
    let mut lease = sessions.api(cluster, false).await?;
    let request = Request::builder()
        .method(Method::POST)
        .version(Version::HTTP_2)
        .uri(format!("https://{LINE_CREDENTIALS_HOST}/"))
        .body(Either::Right(Full::new(body)))
        .map_err(Failure::internal)?;
    let response = lease
        .sender
        .send_request(request)
        .await
        .map_err(|error| lost(cluster, error))?;
    if response.status() != StatusCode::OK {
        // An agent of an earlier version.
        return Ok(Vec::new());
    }
    let lost = |source| Failure::Lost {
        cluster: cluster.to_owned(),
        source,
    };
    let body = Limited::new(response.into_body(), CREDENTIALS_CAP + 2);
    let body = body.collect().await;
    let body = body.map_err(|error| lost(Cause::Body(error.into())))?;
    let mut body = BytesMut::from(&body.to_bytes()[..]);
    let reply: Option<LineCredentialsReply> = wire::decode(&mut body, CREDENTIALS_CAP)
        .map_err(|error| lost(Cause::Message(Arc::new(error))))?;
    Ok(reply.unwrap_or_default().accepted)
}

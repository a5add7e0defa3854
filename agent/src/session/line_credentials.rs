//! Renewed certificates under live lines: the local proxy opens a session with the new certificate, and
//! proves in it, by the key of each line, that it has the line's other end.
//!
//! **Invariant:** the user is that of the certificate that this very session has verified; the proof of a
//! line only shows that the same process has both.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{Method, Request, Response, StatusCode, Version};
use http_body_util::{BodyExt, Either, Full, Limited};
use hyper::body::Incoming;
use throwline_tunnel::proto::messages::{
    LINE_CREDENTIALS_HOST, LineCredentials as Requested, LineCredentialsReply,
};
use throwline_tunnel::proto::wire::{self, CREDENTIALS_CAP};

use crate::request::AnswerBody;

/// For a body of 60 KiB.
const BODY: Duration = Duration::from_secs(10);

/// Puts the session's certificate under the line of this id, if the MAC is the line's; true if it stands
/// for the line now.
type Renew = dyn Fn(&[u8], &[u8]) -> bool + Send + Sync;

/// Answers the requests by which a session's certificate is put under lines.
#[derive(Clone)]
pub struct LineCredentials {
    user: Arc<str>,
    renew: Arc<Renew>,
}

impl LineCredentials {
    pub(crate) fn new(user: &str, renew: Arc<Renew>) -> Self {
        let user = user.into();
        Self { user, renew }
    }

    /// Whether a request is for the agent itself. A local proxy writes the host of each other request
    /// itself, as the cluster's name, which has no dot.
    pub(crate) fn is_for_agent<B>(request: &Request<B>) -> bool {
        request.version() == Version::HTTP_2
            && request.method() == Method::POST
            && request.uri().host() == Some(LINE_CREDENTIALS_HOST)
    }

    pub(crate) async fn answer(
        &self,
        request: Request<Incoming>,
    ) -> Result<Response<AnswerBody>, Infallible> {
        let body = Limited::new(request.into_body(), CREDENTIALS_CAP).collect();
        let (status, body) = match tokio::time::timeout(BODY, body).await {
            Ok(Ok(body)) => self.accept(&body.to_bytes()),
            _ => (StatusCode::BAD_REQUEST, Bytes::new()),
        };
        let mut response = Response::new(Either::Left(Full::new(body)));
        *response.status_mut() = status;
        Ok(response)
    }

    fn accept(&self, body: &[u8]) -> (StatusCode, Bytes) {
        let mut body = BytesMut::from(body);
        let Ok(Some(requested)) = wire::decode::<Requested>(&mut body, CREDENTIALS_CAP) else {
            return (StatusCode::BAD_REQUEST, Bytes::new());
        };
        let accepted: Vec<_> = requested
            .lines
            .into_iter()
            .filter(|line| (self.renew)(&line.line_id, &line.mac))
            .map(|line| line.line_id)
            .collect();
        tracing::debug!(
            user = &*self.user,
            lines = accepted.len(),
            "a renewed certificate stands for lines"
        );
        match wire::encode(&LineCredentialsReply { accepted }, CREDENTIALS_CAP) {
            Ok(reply) => (StatusCode::OK, reply),
            Err(_) => (StatusCode::BAD_REQUEST, Bytes::new()),
        }
    }
}

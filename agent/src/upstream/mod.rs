//! The way to the API server: credentials of the agent's own, a small pool of HTTP/2 connections for
//! requests, a fresh HTTP/1.1 connection for each upgrade.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::header::{AUTHORIZATION, HOST};
use http::uri::PathAndQuery;
use http::{HeaderMap, Method, Request, Response, Uri};
use http_body_util::{Either, Full};
use hyper::body::Incoming;
use tokio::time::Instant;

use crate::body::Upload;
use crate::metrics::Metrics;

mod access;
mod connect;
mod pool;
pub(crate) mod rights;

pub use access::{AccessError, ClusterAccess, read_kubeconfig};
pub(crate) use connect::Transport;
pub(crate) use pool::Lease;

use access::Credentials;
use pool::{Failed, Pool};

/// What goes up: bytes of our own, or a user's as they come.
pub(crate) type OutBody = Either<Full<Bytes>, Upload>;

/// Knobs of the way to the API server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// TCP and TLS together. Default 10 s.
    pub connect: Duration,
    /// From the end of a request to the head of its answer, for requests that are not upgrades.
    /// Default 70 s: the API server itself gives up after 60 s (`--request-timeout`).
    pub answer: Duration,
    /// Streams in flight on one HTTP/2 connection before another is opened. Default 80, below the
    /// API server's limit of 100 (SETTINGS_MAX_CONCURRENT_STREAMS).
    pub streams: usize,
    /// Connections at most. Default 64: with `streams` that is 5,120 requests and watches at once;
    /// more are refused with 503. Worst case about 64 × 80 × 0.75 MiB when every reader stalls.
    pub connections: usize,
    /// Flow-control window of a stream. Default 256 KiB, plenty beside an API server; what a reader that stalls costs, together
    /// with the send buffer of 256 KiB towards it.
    pub stream_window: u32,
    /// HTTP/2 PING while idle, so that a dead connection is gone before the next request. Default 30 s.
    pub keep_alive: Duration,
    /// An extra connection without streams is closed after this. Default 60 s.
    pub idle: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            answer: Duration::from_secs(70),
            streams: 80,
            connections: 64,
            stream_window: 256 * 1024,
            keep_alive: Duration::from_secs(30),
            idle: Duration::from_secs(60),
        }
    }
}

/// Why there is no answer from the API server; each says whose fault it is.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The network between agent and API server, or an API server that is down.
    #[error("the agent cannot reach its cluster's API server: {0}")]
    Connect(String),
    /// The API server's certificate, or the agent's idea of its CA.
    #[error("the agent and its cluster's API server cannot agree on TLS: {0}")]
    Tls(String),
    /// The agent's own account: an exec plugin, a token file.
    #[error("the agent has no credentials for its cluster's API server: {0}")]
    Credentials(String),
    /// Our own bound on connections.
    #[error("the agent has as many requests under way as it may have; try again")]
    Busy,
    /// The API server broke the exchange off, and the request may have been processed.
    #[error("the cluster's API server broke off the request before it answered: {0}")]
    Exchange(String),
    /// The API server broke HTTP's rules.
    #[error("the cluster's API server gave an answer that cannot be passed on: {0}")]
    Broken(&'static str),
    #[error("the cluster's API server did not answer in time")]
    Timeout,
}

/// A request ready to go, without what depends on the connection.
pub(crate) struct Outgoing {
    pub(crate) method: Method,
    pub(crate) target: PathAndQuery,
    pub(crate) headers: HeaderMap,
    pub(crate) body: OutBody,
}

/// An answer's head, its body to come, and the place in the pool that it holds until then.
pub(crate) struct Answer {
    pub(crate) response: Response<Incoming>,
    pub(crate) lease: Lease,
}

/// The API server, as the whole agent shares it.
pub struct Upstream {
    source: ClusterAccess,
    limits: Limits,
    metrics: Metrics,
    pool: Mutex<Arc<Pool>>,
    reloaded: tokio::sync::Mutex<Option<Instant>>,
}

/// Attempts of one request, all but the last of which were certainly not sent.
const ATTEMPTS: usize = 4;
/// Credentials are read anew at most this often.
const RELOAD_EVERY: Duration = Duration::from_secs(10);

impl Upstream {
    /// Loads the credentials; does not connect, because an API server that is down for a moment is
    /// no reason for an agent not to start.
    ///
    /// # Errors
    /// A kubeconfig or service account that cannot be used.
    pub async fn load(
        source: ClusterAccess,
        limits: Limits,
        metrics: Metrics,
    ) -> Result<Self, AccessError> {
        let credentials = Credentials::load(&source).await?;
        let pool = Mutex::new(Arc::new(Pool::new(credentials, limits, metrics.clone())));
        Ok(Self {
            source,
            limits,
            metrics,
            pool,
            reloaded: tokio::sync::Mutex::new(None),
        })
    }

    /// Sends on a pooled connection, and again on another when it was certainly not sent.
    pub(crate) async fn send(&self, outgoing: Outgoing) -> Result<Answer, Error> {
        let Outgoing {
            method,
            target,
            headers,
            body,
        } = outgoing;
        let has_body = match &body {
            Either::Left(_) => true,
            Either::Right(upload) => !upload.is_empty(),
        };
        // What cannot be had back after it was refused is kept, if it is only a head.
        let spare = (!has_body).then(|| (method.clone(), headers.clone()));
        let mut next = Some((method, headers, body));
        let mut failure = Error::Timeout;
        for _ in 0..ATTEMPTS {
            let Some((method, mut headers, body)) = next.take() else {
                break;
            };
            let pool = self.pool();
            self.authorize(&pool, &mut headers).await?;
            let lease = match pool.lease().await {
                Ok(lease) => lease,
                Err(error) => {
                    // The CA or the client certificate may have been rotated on disk.
                    if matches!(error, Error::Tls(_)) {
                        Box::pin(self.reload()).await;
                    }
                    return Err(error);
                }
            };
            let request =
                pool.credentials
                    .request(method, &target, headers, body, lease.is_http2());
            match lease.send(request).await {
                Ok(answer) => return Ok(answer),
                Err(Failed::NotSent { request, error }) => {
                    let (parts, body) = request.into_parts();
                    next = Some((parts.method, parts.headers, body));
                    failure = error;
                }
                Err(Failed::NotProcessed(error)) => {
                    next = spare
                        .clone()
                        .map(|(method, headers)| (method, headers, Either::Left(Full::default())));
                    failure = error;
                }
                Err(Failed::Unknown(error)) => return Err(error),
            }
        }
        Err(failure)
    }

    /// A fresh HTTP/1.1 connection for one upgrade; it never goes into the pool.
    pub(crate) async fn fresh(&self) -> Result<Transport, Error> {
        let pool = self.pool();
        let connected = connect::connect(
            &pool.credentials,
            connect::Protocols::Http1,
            self.limits.connect,
        )
        .await;
        Ok(connected?.io)
    }

    /// The head of an upgrade for [`Upstream::fresh`].
    pub(crate) async fn upgrade_request(
        &self,
        method: Method,
        target: &PathAndQuery,
        mut headers: HeaderMap,
    ) -> Result<Request<OutBody>, Error> {
        let pool = self.pool();
        self.authorize(&pool, &mut headers).await?;
        Ok(pool.credentials.request(
            method,
            target,
            headers,
            Either::Left(Full::default()),
            false,
        ))
    }

    /// The API server does not know the agent (401): reads the credentials anew, in case they were
    /// rotated on disk, and leaves the old connections to the requests on them.
    pub(crate) async fn reload(&self) {
        let mut reloaded = self.reloaded.lock().await;
        if reloaded.is_some_and(|at| at.elapsed() < RELOAD_EVERY) {
            return;
        }
        *reloaded = Some(Instant::now());
        match Credentials::load(&self.source).await {
            Ok(credentials) => {
                let fresh = Arc::new(Pool::new(credentials, self.limits, self.metrics.clone()));
                *self.pool.lock().unwrap_or_else(PoisonError::into_inner) = fresh;
            }
            Err(error) => {
                tracing::warn!(%error, "the credentials for the API server cannot be read again")
            }
        }
    }

    pub(crate) fn limits(&self) -> Limits {
        self.limits
    }

    fn pool(&self) -> Arc<Pool> {
        self.pool
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    async fn authorize(&self, pool: &Pool, headers: &mut HeaderMap) -> Result<(), Error> {
        headers.remove(AUTHORIZATION);
        if let Some(value) = pool
            .credentials
            .authorization()
            .await
            .map_err(Error::Credentials)?
        {
            headers.insert(AUTHORIZATION, value);
        }
        Ok(())
    }
}

impl Credentials {
    /// The same bytes of the path, in the form of the connection's protocol.
    fn request(
        &self,
        method: Method,
        target: &PathAndQuery,
        mut headers: HeaderMap,
        body: OutBody,
        http2: bool,
    ) -> Request<OutBody> {
        let path = self.prefixed(target);
        let uri = if http2 {
            headers.remove(HOST);
            let mut parts = http::uri::Parts::default();
            parts.scheme = Some(self.scheme.clone());
            parts.authority = Some(self.authority.clone());
            parts.path_and_query = Some(path);
            // All three are there, which is all that can be wrong with parts.
            Uri::from_parts(parts).unwrap_or_default()
        } else {
            headers.insert(HOST, self.host.clone());
            Uri::from(path)
        };
        let mut request = Request::new(body);
        (
            *request.method_mut(),
            *request.uri_mut(),
            *request.headers_mut(),
        ) = (method, uri, headers);
        request
    }
}

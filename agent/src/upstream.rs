//! Connections to the API server with the agent's own credentials: a small pool of HTTP/2 connections for
//! requests, a fresh HTTP/1.1 connection for each upgrade.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::header::{AUTHORIZATION, HOST};
use http::uri::PathAndQuery;
use http::{HeaderMap, Method, Request, Uri};
use http_body_util::{Either, Full};
use throwline_kube_wire::http1::request_line::PLACEHOLDER;
use throwline_kube_wire::http1::target::Target;
use tokio::time::Instant;

use crate::metrics::Metrics;

mod access;
pub(crate) mod api;
mod connect;
mod error;
pub(crate) mod impersonation;
mod limits;
mod pool;
pub(crate) mod self_access_review;
mod trust;
pub(crate) mod uid;
mod upload;
pub(crate) mod wiped;

pub use access::{AccessError, ClusterAccess, read_kubeconfig};
pub(crate) use connect::Transport;
pub use error::{ConnectError, CredentialsError, Error, ExchangeError};
pub use limits::Limits;
pub(crate) use pool::{Answer, INTERIM, Lease};
pub(crate) use upload::{OutBody, Upload};

use access::Credentials;
use connect::Protocols;
use pool::{Failed, Pool};

/// A request ready to go, without what depends on the connection.
pub(crate) struct Outgoing {
    pub(crate) method: Method,
    pub(crate) target: Target,
    pub(crate) headers: HeaderMap,
    pub(crate) body: OutBody,
    /// On a separate HTTP/1.1 connection, because its answer, or the size of its head, could end a shared
    /// one for all requests on it.
    pub(crate) is_apart: bool,
}

/// The API server, shared by the whole agent.
pub struct Upstream {
    source: ClusterAccess,
    limits: Limits,
    metrics: Metrics,
    pools: Mutex<Pools>,
    reloaded: tokio::sync::Mutex<Option<Instant>>,
}

/// Connections with one set of credentials.
#[derive(Clone)]
struct Pools {
    shared: Arc<Pool>,
    /// HTTP/1.1 only.
    apart: Arc<Pool>,
}

impl Pools {
    fn new(credentials: Credentials, limits: Limits, metrics: &Metrics) -> Self {
        let credentials = Arc::new(credentials);
        let pool = |protocols| {
            let credentials = credentials.clone();
            Arc::new(Pool::new(credentials, protocols, limits, metrics.clone()))
        };
        Self {
            shared: pool(Protocols::Any),
            apart: pool(Protocols::Http1),
        }
    }
}

/// Attempts of one request, all but the last of which were certainly not sent.
const ATTEMPTS: usize = 4;
/// Credentials are read again at most this often.
const RELOAD_EVERY: Duration = Duration::from_secs(10);

impl Upstream {
    /// Loads the credentials; does not connect, so that an agent starts while the API server is down.
    ///
    /// # Errors
    /// A kubeconfig or service account that cannot be used.
    pub async fn load(
        source: ClusterAccess,
        limits: Limits,
        metrics: Metrics,
    ) -> Result<Self, AccessError> {
        let credentials = Credentials::load(&source).await?;
        let pools = Mutex::new(Pools::new(credentials, limits, &metrics));
        Ok(Self {
            source,
            limits,
            metrics,
            pools,
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
            is_apart,
        } = outgoing;
        let has_body = match &body {
            Either::Left(_) => true,
            Either::Right(upload) => !upload.is_empty(),
        };
        // A copy for a repetition, where there is only a head.
        let spare = (!has_body).then(|| (method.clone(), headers.clone()));
        let is_safe = matches!(method, Method::GET | Method::HEAD) && !has_body;
        let mut is_again = false;
        let mut next = Some((method, headers, body));
        let mut failure = Error::Timeout;
        for _ in 0..ATTEMPTS {
            let Some((method, mut headers, body)) = next.take() else {
                break;
            };
            // Taken in each attempt: a reload of the credentials replaces the pools.
            let pool = self.pool(is_apart);
            self.authorize(&pool, &mut headers).await?;
            let target = pool.credentials.prefixed(&target);
            let long = target.short().is_none().then(|| target.clone());
            let lease = match pool.lease(long).await {
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
                // GOAWAY or REFUSED_STREAM: the API server has not processed it (RFC 9113 sections
                // 6.8 and 8.7), but the body is gone.
                Err(Failed::NotProcessed(error)) => {
                    next = spare
                        .clone()
                        .map(|(method, headers)| (method, headers, Either::Left(Full::default())));
                    failure = error;
                }
                // It may have been processed, which does no harm to a read (RFC 9110, section 9.2.2): an API
                // server that was restarted ends its connections so. One that is silent, or violates HTTP,
                // would do so again.
                Err(Failed::Unknown(error))
                    if is_safe
                        && !is_again
                        && !matches!(error, Error::Silent(_) | Error::Broken(_)) =>
                {
                    is_again = true;
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
        let pool = self.pool(true);
        let connected =
            connect::connect(&pool.credentials, Protocols::Http1, self.limits.connect).await;
        Ok(connected?.io)
    }

    /// The head of an upgrade for [`Upstream::fresh`], and its target where that is too long for it.
    pub(crate) async fn upgrade_request(
        &self,
        method: Method,
        target: &Target,
        mut headers: HeaderMap,
    ) -> Result<(Request<OutBody>, Option<Target>), Error> {
        let pool = self.pool(true);
        self.authorize(&pool, &mut headers).await?;
        let target = pool.credentials.prefixed(target);
        let body = Either::Left(Full::default());
        let request = pool
            .credentials
            .request(method, &target, headers, body, false);
        let long = target.short().is_none().then_some(target);
        Ok((request, long))
    }

    /// After a 401 to the agent itself: reads the credentials again, in case they were rotated on disk. The
    /// old connections end with the requests on them.
    pub(crate) async fn reload(&self) {
        let mut reloaded = self.reloaded.lock().await;
        // Every request fails at once when credentials expire; an exec plugin must not run for
        // each.
        if reloaded.is_some_and(|at| at.elapsed() < RELOAD_EVERY) {
            return;
        }
        *reloaded = Some(Instant::now());
        match Credentials::load(&self.source).await {
            Ok(credentials) => {
                let fresh = Pools::new(credentials, self.limits, &self.metrics);
                *self.pools.lock().unwrap_or_else(PoisonError::into_inner) = fresh;
            }
            Err(error) => {
                tracing::warn!(%error, "the credentials for the API server cannot be read again")
            }
        }
    }

    pub(crate) fn limits(&self) -> Limits {
        self.limits
    }

    fn pool(&self, is_apart: bool) -> Arc<Pool> {
        let pools = self.pools.lock().unwrap_or_else(PoisonError::into_inner);
        match is_apart {
            true => pools.apart.clone(),
            false => pools.shared.clone(),
        }
    }

    async fn authorize(&self, pool: &Pool, headers: &mut HeaderMap) -> Result<(), Error> {
        headers.remove(AUTHORIZATION);
        if let Some(value) = pool
            .credentials
            .authorization()
            .await
            .map_err(CredentialsError::Refresh)?
        {
            headers.insert(AUTHORIZATION, value);
        }
        Ok(())
    }
}

impl Credentials {
    /// The same bytes of the path, in the form of the connection's protocol. `target` has its prefix; one
    /// that is too long is left to [`RequestLine`](throwline_kube_wire::http1::request_line::RequestLine).
    fn request(
        &self,
        method: Method,
        target: &Target,
        mut headers: HeaderMap,
        body: OutBody,
        http2: bool,
    ) -> Request<OutBody> {
        let path = target
            .short()
            .cloned()
            .unwrap_or_else(|| PathAndQuery::from_static(PLACEHOLDER));
        let uri = if http2 {
            headers.remove(HOST);
            let mut parts = http::uri::Parts::default();
            parts.scheme = Some(self.scheme.clone());
            parts.authority = Some(self.authority.clone());
            parts.path_and_query = Some(path);
            // All three are set, so the parts are valid.
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

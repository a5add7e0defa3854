//! Requests to the API server on the agent's own account.

use http::header::{ACCEPT, CONTENT_TYPE};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use http_body_util::{BodyExt, Either, Full, Limited};
use serde_json::Value;

use super::wiped::{self, Wiped};
use super::{CredentialsError, Error, ExchangeError, Outgoing, Upstream};

/// Longest answer that is read, bytes. The rules of an account are some kilobytes.
const ANSWER_MAX: usize = 1024 * 1024;

/// The API server's version, such as `v1.36.0`.
pub(crate) async fn version(upstream: &Upstream) -> Result<String, Error> {
    let path = PathAndQuery::from_static("/version");
    let (status, answer) = ask(upstream, Method::GET, path, HeaderMap::new(), None).await?;
    match answer["gitVersion"].as_str() {
        Some(version) if status.is_success() => Ok(version
            .chars()
            .filter(|c| !c.is_control())
            .take(64)
            .collect()),
        _ if status == StatusCode::UNAUTHORIZED => {
            upstream.reload().await;
            Err(CredentialsError::Rejected.into())
        }
        _ => Err(Error::Broken("no version")),
    }
}

/// One object of the API.
pub(crate) async fn object(
    upstream: &Upstream,
    method: Method,
    path: &str,
    body: Option<Wiped>,
) -> Result<(StatusCode, Value), Error> {
    let path = PathAndQuery::try_from(path).map_err(|_| Error::Broken("no such path"))?;
    ask(upstream, method, path, HeaderMap::new(), body).await
}

pub(super) async fn ask(
    upstream: &Upstream,
    method: Method,
    path: PathAndQuery,
    mut headers: HeaderMap,
    body: Option<Wiped>,
) -> Result<(StatusCode, Value), Error> {
    headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
    let body = body.map(|body| wiped::to_bytes(&body)).unwrap_or_default();
    if !body.is_empty() {
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    }
    let asking = async {
        let answer = upstream
            .send(Outgoing {
                method,
                target: path.into(),
                headers,
                is_apart: false,
                body: Either::Left(Full::new(body)),
            })
            .await?;
        let status = answer.response.status();
        let whole = Limited::new(answer.response.into_body(), ANSWER_MAX)
            .collect()
            .await;
        let whole = whole.map_err(ExchangeError::Body)?.to_bytes();
        answer.lease.give_back();
        let read = serde_json::from_slice(&whole).unwrap_or_default();
        wiped::wipe_bytes(whole);
        Ok((status, read))
    };
    tokio::time::timeout(upstream.limits().connect * 2, asking)
        .await
        .unwrap_or(Err(Error::Timeout))
}

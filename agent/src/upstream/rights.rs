//! What the agent's own account may do: it must be allowed to impersonate, and says so when it is not.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_TYPE};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use http_body_util::{BodyExt, Either, Full, Limited};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::{Error, Outgoing, Upstream};
use crate::gateway::Gateway;
use crate::rules::CREDENTIAL_EXTRA;

/// The account is asked about at most this often.
const ASK_EVERY: Duration = Duration::from_secs(10 * 60);
const ANSWER_MAX: usize = 1024 * 1024;

/// Remembers when the question was last put.
#[derive(Debug, Default)]
pub(crate) struct Rights(Mutex<Option<Instant>>);

impl Rights {
    /// A user was refused: perhaps because the agent may not speak for users at all.
    pub(crate) fn check_in_background(&self, gateway: &Arc<Gateway>) {
        let mut asked = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if asked.is_some_and(|at| at.elapsed() < ASK_EVERY) {
            return;
        }
        *asked = Some(Instant::now());
        let gateway = gateway.clone();
        tokio::spawn(async move {
            match missing(gateway.upstream()).await {
                Ok(missing) if missing.is_empty() => {}
                Ok(missing) => warn(&missing),
                Err(error) => tracing::debug!(%error, "the agent's rights cannot be asked for"),
            }
        });
    }
}

pub(crate) fn warn(missing: &[String]) {
    tracing::warn!(
        missing = missing.join(", "),
        "the agent's own account may not impersonate; bind it to a ClusterRole with the verb impersonate on these"
    );
}

/// The resources that the agent's account lacks the verb `impersonate` for.
pub(crate) async fn missing(upstream: &Upstream) -> Result<Vec<String>, Error> {
    let mut missing = Vec::new();
    let extra = format!("userextras/{CREDENTIAL_EXTRA}");
    for (group, resource, subresource) in [
        ("", "users", ""),
        ("", "groups", ""),
        ("authentication.k8s.io", "userextras", CREDENTIAL_EXTRA),
    ] {
        let review = json!({
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": {
                "verb": "impersonate", "group": group, "resource": resource, "subresource": subresource,
            }},
        });
        let path =
            PathAndQuery::from_static("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews");
        let (status, answer) = ask(upstream, Method::POST, path, Some(review)).await?;
        if status.is_success() && answer["status"]["allowed"] == Value::Bool(false) {
            missing.push(if subresource.is_empty() {
                resource.to_owned()
            } else {
                extra.clone()
            });
        }
    }
    Ok(missing)
}

/// The API server's version, such as `v1.36.0`; asked on the agent's own account.
pub(crate) async fn version(upstream: &Upstream) -> Result<String, Error> {
    let (status, answer) = ask(
        upstream,
        Method::GET,
        PathAndQuery::from_static("/version"),
        None,
    )
    .await?;
    match answer["gitVersion"].as_str() {
        Some(version) if status.is_success() => Ok(version
            .chars()
            .filter(|c| !c.is_control())
            .take(64)
            .collect()),
        _ if status == StatusCode::UNAUTHORIZED => {
            upstream.reload().await;
            Err(Error::Credentials(
                "the API server does not accept them (401)".to_owned(),
            ))
        }
        _ => Err(Error::Broken("no version")),
    }
}

async fn ask(
    upstream: &Upstream,
    method: Method,
    target: PathAndQuery,
    body: Option<Value>,
) -> Result<(StatusCode, Value), Error> {
    let mut headers = HeaderMap::new();
    headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
    let body = body
        .map(|body| Bytes::from(body.to_string()))
        .unwrap_or_default();
    if !body.is_empty() {
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    }
    let asking = async {
        let answer = upstream
            .send(Outgoing {
                method,
                target,
                headers,
                body: Either::Left(Full::new(body)),
            })
            .await?;
        let status = answer.response.status();
        let whole = Limited::new(answer.response.into_body(), ANSWER_MAX)
            .collect()
            .await;
        let whole = whole
            .map_err(|error| Error::Exchange(error.to_string()))?
            .to_bytes();
        answer.lease.give_back();
        Ok((status, serde_json::from_slice(&whole).unwrap_or_default()))
    };
    tokio::time::timeout(upstream.limits().connect * 2, asking)
        .await
        .unwrap_or(Err(Error::Timeout))
}

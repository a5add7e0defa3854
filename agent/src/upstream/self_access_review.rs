//! Finds the rights of the agent's own account by access reviews.

use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use serde_json::{Value, json};
use throwline_policy::rules::CREDENTIAL_EXTRA;
use throwline_tunnel::proto::messages::Impersonation;

use super::api::ask;
use super::impersonation::{AUTHENTICATION, LEGACY, Parts, Rights, WHO};
use super::{Error, Upstream};

const RULES: &str = "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews";
const ACCESS: &str = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews";
/// A user that does not exist, with a UID, which none of our roles grants: always refused.
const PROBE: &str = "throwline-probe";

/// How the agent's account may act for users: by one request where RBAC answers, else by several.
/// `before` is the last result; where the rules are the same, the API server is not probed again, because
/// each probe leaves a refusal in the cluster's audit.
pub(crate) async fn rights(
    upstream: &Upstream,
    needs_extra: bool,
    before: Option<&Rights>,
) -> Result<Rights, Error> {
    let review = json!({
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectRulesReview",
        "spec": {"namespace": "default"},
    });
    // One request in place of seven; authorizers that cannot list their rules report it as
    // incomplete.
    let (status, answer) = post(upstream, RULES, review).await?;
    let listed = status
        .is_success()
        .then(|| Rights::read(&answer, needs_extra));
    let mut rights = match listed.flatten() {
        Some(rights) => rights,
        None => one_by_one(upstream, needs_extra).await?,
    };
    // The rules may name verbs of constrained impersonation (KEP-5284) on an API server that has
    // the feature off.
    if rights.how == Impersonation::Constrained {
        let known = before.filter(|before| {
            matches!(
                before.how,
                Impersonation::Constrained | Impersonation::Unsupported
            )
        });
        rights.how = match known {
            Some(before) => before.how,
            None => probe(upstream).await?,
        };
        if rights.how == Impersonation::Unsupported {
            rights.ceiling.clear();
        }
    }
    Ok(rights)
}

/// Other authorizers than RBAC do not list all rules.
async fn one_by_one(upstream: &Upstream, needs_extra: bool) -> Result<Rights, Error> {
    // An account with all rights has no ceiling, though it also has the rights of one.
    let everything = may(
        upstream,
        "throwline:no-such-verb",
        AUTHENTICATION,
        "users",
        "",
    )
    .await?;
    let mut constrained = Parts::default();
    if !everything {
        constrained = Parts {
            users: may(upstream, WHO, AUTHENTICATION, "users", "").await?,
            groups: may(upstream, WHO, AUTHENTICATION, "groups", "").await?,
            extras: may(
                upstream,
                WHO,
                AUTHENTICATION,
                "userextras",
                CREDENTIAL_EXTRA,
            )
            .await?,
        };
    }
    let legacy = Parts {
        users: may(upstream, LEGACY, "", "users", "").await?,
        groups: may(upstream, LEGACY, "", "groups", "").await?,
        extras: may(
            upstream,
            LEGACY,
            AUTHENTICATION,
            "userextras",
            CREDENTIAL_EXTRA,
        )
        .await?,
    };
    Ok(Rights::new(constrained, legacy, needs_extra))
}

async fn may(
    upstream: &Upstream,
    verb: &str,
    group: &str,
    resource: &str,
    subresource: &str,
) -> Result<bool, Error> {
    let review = json!({
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": {
            "verb": verb, "group": group, "resource": resource, "subresource": subresource,
        }},
    });
    let (status, answer) = post(upstream, ACCESS, review).await?;
    Ok(status.is_success() && answer["status"]["allowed"] == Value::Bool(true))
}

/// Whether the API server supports constrained impersonation: by the text of a refusal, since the rights of
/// an account do not show it.
async fn probe(upstream: &Upstream) -> Result<Impersonation, Error> {
    let mut headers = HeaderMap::new();
    headers.insert("impersonate-user", HeaderValue::from_static(PROBE));
    headers.insert("impersonate-uid", HeaderValue::from_static(PROBE));
    let path = PathAndQuery::from_static("/version");
    let (status, answer) = ask(upstream, Method::GET, path, headers, None).await?;
    let message = answer["message"].as_str().unwrap_or_default();
    // Passed: then by rights of the new kind, since there are no others.
    Ok(
        match status.is_success() || message.contains(":user-info") {
            true => Impersonation::Constrained,
            false if status == StatusCode::FORBIDDEN => Impersonation::Unsupported,
            false => Impersonation::Unspecified,
        },
    )
}

async fn post(
    upstream: &Upstream,
    path: &'static str,
    review: Value,
) -> Result<(StatusCode, Value), Error> {
    let path = PathAndQuery::from_static(path);
    let review = Some(review.into());
    ask(upstream, Method::POST, path, HeaderMap::new(), review).await
}

//! Reviews, which are asked and answered but never kept, and tokens of service accounts.

use http::Response;
use serde_json::{Value, json};

use super::Call;
use crate::{
    Cluster,
    access::User,
    json,
    json::{number, strings, text},
    rbac::Review,
    request::Attributes,
    status::{Body, Failure, answer},
};

pub(super) fn answer_review(
    cluster: &Cluster,
    call: &Call,
    mut body: Value,
) -> Result<Response<Body>, Failure> {
    let kind = call.target.kind;
    json::set(&mut body, &["apiVersion"], json!(kind.api_version()));
    json::set(&mut body, &["kind"], json!(kind.kind));
    let status = match kind.kind {
        "SelfSubjectReview" => json!({"userInfo": call.user.to_json()}),
        "SelfSubjectRulesReview" => {
            Review::new(cluster, &call.user).rules_in(text(&body, "/spec/namespace"))
        }
        "SelfSubjectAccessReview" => access(cluster, &call.user, &body)?,
        _ => {
            let groups: Vec<String> = strings(&body, "/spec/groups")
                .into_iter()
                .map(str::to_owned)
                .collect();
            let name = text(&body, "/spec/user");
            if name.is_empty() && groups.is_empty() {
                return Err(Failure::invalid(
                    kind,
                    "",
                    &[(
                        "spec.user".to_owned(),
                        "FieldValueInvalid",
                        "Invalid value: \"\": at least one of user or group must be specified"
                            .to_owned(),
                    )],
                ));
            }
            let user = User {
                name: name.to_owned(),
                groups,
                ..User::default()
            };
            access(cluster, &user, &body)?
        }
    };
    json::set(&mut body, &["status"], status);
    json::default(&mut body, &["metadata", "creationTimestamp"], Value::Null);
    let form = call.accept.form()?;
    if form == super::negotiate::Form::Table {
        let object = std::sync::Arc::new(body);
        return Ok(answer(
            201,
            &super::list::shape(kind, form, &object, call, true),
        ));
    }
    Ok(answer(201, &body))
}

fn access(cluster: &Cluster, user: &User, body: &Value) -> Result<Value, Failure> {
    let wanted = if let Some(resource) = body.pointer("/spec/resourceAttributes") {
        Attributes {
            subresource: text(resource, "/subresource").to_owned(),
            ..Attributes::resource(
                text(resource, "/verb"),
                text(resource, "/group"),
                text(resource, "/resource"),
                text(resource, "/namespace"),
                text(resource, "/name"),
            )
        }
    } else if let Some(path) = body.pointer("/spec/nonResourceAttributes") {
        Attributes {
            path: Some(text(path, "/path").to_owned()),
            ..Attributes::resource(text(path, "/verb"), "", "", "", "")
        }
    } else {
        return Err(Failure::bad_request(
            "exactly one of nonResourceAttributes or resourceAttributes must be specified",
        ));
    };
    Ok(if Review::new(cluster, user).allows(&wanted) {
        json!({"allowed": true, "reason": "RBAC: allowed"})
    } else {
        json!({"allowed": false})
    })
}

pub(super) fn issue_token(
    cluster: &Cluster,
    call: &Call,
    mut body: Value,
) -> Result<Response<Body>, Failure> {
    let target = &call.target;
    if cluster
        .store
        .get(target.kind, &target.namespace, &target.name)
        .is_none()
    {
        return Err(Failure::not_found(target.kind, &target.name));
    }
    let seconds = number(&body, "/spec/expirationSeconds")
        .unwrap_or(3600)
        .clamp(600, 1 << 32);
    let until = time::OffsetDateTime::now_utc() + time::Duration::seconds(seconds);
    let token = cluster
        .tokens
        .issue(User::service_account(&target.namespace, &target.name));
    json::set(
        &mut body,
        &["apiVersion"],
        json!("authentication.k8s.io/v1"),
    );
    json::set(&mut body, &["kind"], json!("TokenRequest"));
    json::set(
        &mut body,
        &["status"],
        json!({"token": token, "expirationTimestamp": json::stamp(until)}),
    );
    Ok(answer(201, &body))
}

//! From a request to its answer: authenticate, authorise, then the resource or the path.

mod delete;
mod discovery;
mod list;
mod negotiate;
mod objects;
mod protobuf;
mod reviews;
mod watch;

use std::sync::Arc;

use bytes::Bytes;
use http::{Method, Request, Response, header};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::Incoming;
use serde_json::{Value, json};
use throwline_kube_wire::http1::target::Target as LongTarget;

pub(crate) use delete::remove_now;
pub(crate) use objects::random_suffix;

use crate::{
    Cluster,
    access::{self, User},
    rbac::{self, Review},
    request::{Attributes, Query, Target},
    runtime, schema,
    status::{Body, Failure, answer, bytes_response},
    stream,
};
use negotiate::Accept;

/// The largest request body, as the API server limits it.
const MAX_BODY: usize = 3 << 20;

/// A request for a resource, authorised, with what its handlers need.
pub(crate) struct Call {
    pub(crate) target: Target,
    pub(crate) query: Query,
    pub(crate) user: User,
    pub(crate) accept: Accept,
    pub(crate) verb: String,
    /// `fieldManager`, or the first part of the user agent.
    pub(crate) manager: String,
}

pub(crate) async fn handle(
    cluster: &Arc<Cluster>,
    certificate: Option<&User>,
    request: Request<Incoming>,
) -> Result<Response<Body>, Failure> {
    let long = request.extensions().get::<LongTarget>();
    let (path, query) = match long {
        Some(long) => (long.path(), long.query()),
        None => (request.uri().path(), request.uri().query()),
    };
    let (path, query) = (path.to_owned(), Query::parse(query.unwrap_or_default()));
    let wanted = Attributes::of(request.method(), &path, &query);
    let user = access::authenticate(cluster, certificate, request.headers(), &wanted)?;
    let review = Review::new(cluster, &user);
    if !review.allows(&wanted) {
        return Err(rbac::refusal(&user, &wanted));
    }
    let accept = Accept::of(request.headers());
    let Some(target) = Target::parse(&path)? else {
        return plain(cluster, &path, request.method(), &accept);
    };
    let agent = request
        .headers()
        .get(header::USER_AGENT)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let agent = agent
        .split('/')
        .next()
        .filter(|agent| !agent.is_empty())
        .unwrap_or("unknown");
    let manager = query
        .get("fieldManager")
        .filter(|name| !name.is_empty())
        .unwrap_or(agent)
        .to_owned();
    let verb = wanted.verb.clone();
    let call = Call {
        target,
        query,
        user,
        accept,
        verb,
        manager,
    };
    if matches!(call.target.subresource(), "exec" | "attach" | "portforward") {
        // A WebSocket is a GET, and must not be a way around `create`.
        let create = Attributes {
            verb: "create".to_owned(),
            ..wanted
        };
        if !review.allows(&create) {
            return Err(rbac::refusal(&call.user, &create));
        }
        return stream::serve(cluster, &call, request).await;
    }
    resource(cluster, call, request).await
}

async fn resource(
    cluster: &Arc<Cluster>,
    call: Call,
    request: Request<Incoming>,
) -> Result<Response<Body>, Failure> {
    let sub = call.target.subresource();
    if call.target.kind.review {
        if request.method() != Method::POST {
            return Err(Failure::method_not_allowed());
        }
        let body = read_object(request).await?;
        return reviews::answer_review(cluster, &call, body);
    }
    match (request.method().clone(), sub) {
        (Method::GET, "log") => runtime::log::serve(cluster, &call),
        (Method::POST, "eviction") => {
            let body = read_object(request).await?;
            delete::delete(cluster, &call, body)
        }
        (Method::POST, "token") => {
            let body = read_object(request).await?;
            reviews::issue_token(cluster, &call, body)
        }
        (Method::PUT, "finalize") => objects::update(cluster, &call, read_object(request).await?),
        (Method::GET | Method::HEAD, _) if call.verb == "watch" => watch::serve(cluster, &call),
        (Method::GET | Method::HEAD, "") if call.target.name.is_empty() => {
            list::list(cluster, &call)
        }
        (Method::GET | Method::HEAD, _) => objects::get(cluster, &call),
        (Method::POST, "") if call.target.name.is_empty() => {
            objects::create(cluster, &call, read_object(request).await?)
        }
        (Method::PUT, _) if !call.target.name.is_empty() => {
            objects::update(cluster, &call, read_object(request).await?)
        }
        (Method::PATCH, _) if !call.target.name.is_empty() => {
            let content_type = content_type(&request);
            let body = read(request).await?;
            objects::patch(cluster, &call, &content_type, &body)
        }
        (Method::DELETE, "") if call.target.name.is_empty() => {
            read(request).await?;
            delete::delete_collection(cluster, &call)
        }
        (Method::DELETE, "") => {
            let content_type = content_type(&request);
            let body = read(request).await?;
            let options = if body.is_empty() {
                Value::Null
            } else {
                parse(&body, &content_type)?
            };
            delete::delete(cluster, &call, options)
        }
        _ => Err(Failure::method_not_allowed()),
    }
}

/// Paths that are not resources.
fn plain(
    cluster: &Cluster,
    path: &str,
    method: &Method,
    accept: &Accept,
) -> Result<Response<Body>, Failure> {
    if !matches!(*method, Method::GET | Method::HEAD) {
        return Err(Failure::method_not_allowed());
    }
    match path.trim_end_matches('/') {
        "/healthz" | "/livez" | "/readyz" => Ok(bytes_response(
            200,
            "text/plain; charset=utf-8",
            Bytes::from("ok"),
        )),
        "/version" => {
            let version = cluster.options.version.as_str();
            let mut numbers = version.trim_start_matches('v').split('.');
            Ok(answer(
                200,
                &json!({
                    "major": numbers.next().unwrap_or("1"), "minor": numbers.next().unwrap_or("36"),
                    "gitVersion": version, "gitCommit": "", "gitTreeState": "clean", "buildDate": "2026-06-01T00:00:00Z",
                    "goVersion": "none", "compiler": "rustc",
                    "platform": format!("{}/{}", std::env::consts::OS, std::env::consts::ARCH),
                }),
            ))
        }
        path if path.starts_with("/openapi/") => schema::serve(path, accept.first_type()),
        path => discovery::serve(path, accept),
    }
}

fn content_type(request: &Request<Incoming>) -> String {
    let value = request
        .headers()
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    value
        .split(';')
        .next()
        .unwrap_or_default()
        .trim()
        .to_ascii_lowercase()
}

async fn read(request: Request<Incoming>) -> Result<Bytes, Failure> {
    match Limited::new(request.into_body(), MAX_BODY).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<http_body_util::LengthLimitError>() => Err(Failure::new(
            413,
            "RequestEntityTooLarge",
            format!("limit is {MAX_BODY}"),
        )),
        Err(error) => Err(Failure::bad_request(format!(
            "the body could not be read: {error}"
        ))),
    }
}

async fn read_object(request: Request<Incoming>) -> Result<Value, Failure> {
    let content_type = content_type(&request);
    let body = read(request).await?;
    parse(&body, &content_type)
}

pub(crate) fn parse(body: &[u8], content_type: &str) -> Result<Value, Failure> {
    let parsed = match content_type {
        "" | "application/json" => {
            serde_json::from_slice::<Value>(body).map_err(|error| error.to_string())
        }
        "application/vnd.kubernetes.protobuf" => return protobuf::decode(body),
        "application/yaml" => {
            serde_norway::from_slice::<Value>(body).map_err(|error| error.to_string())
        }
        other => {
            return Err(Failure::new(
                415,
                "UnsupportedMediaType",
                format!(
                    "the body of the request was in an unknown format - accepted media types include: application/json, \
                     application/yaml, not {other:?}"
                ),
            ));
        }
    };
    let value = parsed
        .map_err(|error| Failure::bad_request(format!("error decoding the body: {error}")))?;
    if value.is_object() {
        Ok(value)
    } else {
        Err(Failure::bad_request("the body is not an object"))
    }
}

/// `dryRun=All`, the only value there is.
pub(crate) fn dry_run(query: &Query) -> Result<bool, Failure> {
    match query.all("dryRun").as_slice() {
        [] | [""] => Ok(false),
        values if values.iter().all(|value| *value == "All") => Ok(true),
        values => Err(Failure::bad_request(format!(
            "Unsupported value: {values:?}: supported values: \"All\""
        ))),
    }
}

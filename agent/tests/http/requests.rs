//! What reaches the API server.

use http::Request;
use http_body_util::BodyExt;
use hyper::body::Frame;
use throwline_agent::{Audit, Limits};

use super::support::{Agent, ApiServer, get, text, within};

#[tokio::test]
async fn a_request_arrives_as_the_users_with_the_agents_credentials() {
    let server = ApiServer::saying(200, &[("content-type", "application/json")], "{}").await;
    let agent = Agent::before(server.kubeconfig.clone()).await;
    let mut user = agent.http2().await;
    let path = "/api/v1/namespaces/a/pods?labelSelector=a%2Fb&limit=500";
    let mut request = get(path);
    for (name, value) in [
        ("authorization", "Bearer users"),
        ("x-remote-user", "root"),
        ("cookie", "a=b"),
    ] {
        request.headers_mut().insert(name, value.parse().unwrap());
    }
    let response = within(user.send_request(request)).await.unwrap();
    assert_eq!(response.headers()["content-type"], "application/json");
    assert_eq!(text(response).await, "{}");
    let seen = &server.seen()[0];
    assert_eq!(seen.path, path);
    assert_eq!(seen.all("impersonate-user"), ["jane"]);
    assert_eq!(seen.all("impersonate-group"), ["dev", "ops"]);
    assert_eq!(seen.all("authorization"), ["Bearer agents-own"]);
    assert!(seen.all("x-remote-user").is_empty() && seen.all("cookie").is_empty());
}

#[tokio::test]
async fn impersonation_is_refused_before_the_api_server() {
    let server = ApiServer::saying(200, &[], "").await;
    let agent = Agent::before(server.kubeconfig.clone()).await;
    let mut user = agent.http2().await;
    let mut request = get("/api/v1/pods");
    request
        .headers_mut()
        .insert("Impersonate-User", "admin".parse().unwrap());
    let response = within(user.send_request(request)).await.unwrap();
    assert_eq!(response.status(), 403);
    let status: serde_json::Value = serde_json::from_str(&text(response).await).unwrap();
    assert_eq!(
        (status["kind"].as_str(), status["reason"].as_str()),
        (Some("Status"), Some("Forbidden"))
    );
    assert!(status["message"].as_str().unwrap().contains("--as"));
    assert!(server.seen().is_empty());
}

#[tokio::test]
async fn trailers_do_not_pass() {
    let server = ApiServer::saying(200, &[], "ok").await;
    let agent = Agent::before(server.kubeconfig.clone()).await;
    let mut user = agent.http2().await;
    let mut trailers = http::HeaderMap::new();
    trailers.insert("impersonate-user", "admin".parse().unwrap());
    let frames =
        [Frame::data("body".into()), Frame::trailers(trailers)].map(Ok::<_, std::io::Error>);
    let body = http_body_util::StreamBody::new(futures::stream::iter(frames)).boxed_unsync();
    let request = Request::post("https://agent/api/v1/namespaces/a/configmaps")
        .body(body)
        .unwrap();
    assert_eq!(
        within(user.send_request(request)).await.unwrap().status(),
        200
    );
    let seen = &server.seen()[0];
    assert_eq!(
        (seen.body.as_ref(), seen.trailers, seen.method.as_str()),
        (&b"body"[..], false, "POST")
    );
    assert_eq!(seen.all("impersonate-user"), ["jane"]);
}

#[tokio::test]
async fn requests_that_smuggle_are_refused_and_never_arrive() {
    let server = ApiServer::saying(200, &[], "ok").await;
    let agent = Agent::before(server.kubeconfig.clone()).await;
    for head in [
        "POST /api HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /evil HTTP/1.1\r\n\r\n",
        "POST /api HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
        "POST /api HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx",
        "POST /api HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n",
        "POST /api HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, identity\r\n\r\n",
        "GET /api HTTP/1.1\nHost: a\n\n",
        "GET /api HTTP/1.1\r\nHost: a\r\nX: y\r\n  Impersonate-User: admin\r\n\r\n",
        "GET /api HTTP/1.1\r\nHost: a\r\nImpersonate_User: admin\r\n\r\n",
        "GET /api HTTP/1.1\r\nHost: a\r\nConnection: Impersonate-User\r\n\r\n",
        "GET /api HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        "GET http://elsewhere/api HTTP/1.1\r\nHost: a\r\n\r\n",
        "GET /api/../secrets HTTP/1.1\r\nHost: a\r\n\r\n",
        "nonsense\r\n\r\n",
    ] {
        let answer = agent.raw(head.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{head:?}: {answer}");
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{head:?}: {answer}");
    }
    assert!(server.seen().is_empty(), "{:?}", server.seen());
}

#[tokio::test]
async fn a_session_of_http1_serves_one_request_and_ends() {
    let server = ApiServer::saying(200, &[], "first").await;
    let agent = Agent::before(server.kubeconfig.clone()).await;
    let two = "GET /one HTTP/1.1\r\nHost: a\r\n\r\nGET /two HTTP/1.1\r\nHost: a\r\n\r\n";
    let answer = agent.raw(two.as_bytes()).await;
    assert!(
        answer.ends_with("first") && answer.contains("connection: close"),
        "{answer}"
    );
    assert_eq!(
        server
            .seen()
            .iter()
            .map(|seen| seen.path.clone())
            .collect::<Vec<_>>(),
        ["/one"]
    );
}

#[tokio::test]
async fn every_request_is_one_line_of_the_audit() {
    let server = ApiServer::saying(200, &[], "ok").await;
    let file = server.dir.join("audit.log");
    {
        let agent = Agent::with(
            server.kubeconfig.clone(),
            Audit::File(file.clone()),
            Limits::default(),
        )
        .await;
        let mut user = agent.http2().await;
        let mut request = get("/api/v1/namespaces/a/pods/b%E2%80%A8c");
        request
            .headers_mut()
            .insert("kubectl-command", "kubectl get".parse().unwrap());
        request.headers_mut().insert(
            "user-agent",
            http::HeaderValue::from_bytes("k\u{2028}\u{85}".as_bytes()).unwrap(),
        );
        text(within(user.send_request(request)).await.unwrap()).await;
        text(
            within(user.send_request(get("/api/v1/pods?watch=1")))
                .await
                .unwrap(),
        )
        .await;
        let mut refused = get("/api/v1/pods");
        refused
            .headers_mut()
            .insert("impersonate-group", "system:masters".parse().unwrap());
        text(within(user.send_request(refused)).await.unwrap()).await;
    }
    let read = || std::fs::read_to_string(&file).unwrap_or_default();
    super::support::eventually(|| read().lines().count() == 4).await;
    let events: Vec<serde_json::Value> = read()
        .split_terminator('\n')
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let find = |verb: &str, stage: &str, code: u64| {
        let fits = |event: &&serde_json::Value| {
            event["verb"] == verb
                && event["stage"] == stage
                && event["responseStatus"]["code"] == code
        };
        events
            .iter()
            .find(fits)
            .unwrap_or_else(|| panic!("{verb} {stage} {code}: {events:#?}"))
            .clone()
    };
    let got = find("get", "ResponseComplete", 200);
    assert_eq!(got["objectRef"]["name"], "b\u{2028}c");
    assert_eq!(got["user"]["username"], "jane");
    assert_eq!(got["user"]["groups"], serde_json::json!(["dev", "ops"]));
    assert_eq!(got["sourceIPs"], serde_json::json!(["192.0.2.1"]));
    assert_eq!(got["annotations"]["throwline.dev/cluster"], "prod-eu");
    assert_eq!(
        got["annotations"]["throwline.dev/kubectl-command"],
        "kubectl get"
    );
    let started = find("watch", "ResponseStarted", 200);
    assert_eq!(
        started["auditID"],
        find("watch", "ResponseComplete", 200)["auditID"]
    );
    let refused = find("list", "ResponseComplete", 403);
    assert_eq!(refused["responseStatus"]["reason"], "Forbidden");
}

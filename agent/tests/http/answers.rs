//! How answers come back: at once, whole or cut, never waiting for each other.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::Response;
use http_body_util::BodyExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::support::{Agent, ApiServer, Body, Tcp, eventually, fed, full, get, text, within};

const H2: &[&[u8]] = &[b"h2"];
const H1: &[&[u8]] = &[b"http/1.1"];

/// A server whose every answer is the given body; one request only.
async fn streaming(alpn: &[&[u8]], body: Body) -> ApiServer {
    let body = std::sync::Mutex::new(Some(body));
    ApiServer::start(alpn, move |_| {
        let body = body.lock().unwrap().take().unwrap_or_else(|| full("later"));
        Box::pin(async move { Response::new(body) })
    })
    .await
}

#[tokio::test]
async fn the_first_event_of_a_watch_comes_before_its_end() {
    for alpn in [H2, H1] {
        let (feed, body) = fed();
        let server = streaming(alpn, body).await;
        let agent = Agent::before(server.kubeconfig.clone()).await;
        let mut user = agent.http2().await;
        let response = within(user.send_request(get("/api/v1/pods?watch=1")))
            .await
            .unwrap();
        let mut body = response.into_body();
        for event in ["one", "two"] {
            feed.send(Ok(event.into())).await.unwrap();
            let frame = within(body.frame()).await.unwrap().unwrap();
            assert_eq!(frame.into_data().unwrap(), event);
        }
        drop(feed);
        let rest = within(body.collect()).await.expect("a clean end");
        assert!(rest.to_bytes().is_empty());
    }
}

#[tokio::test]
async fn a_cut_answer_is_cut_for_the_user_too() {
    for alpn in [H2, H1] {
        let (feed, body) = fed();
        let server = streaming(alpn, body).await;
        let agent = Agent::before(server.kubeconfig.clone()).await;
        let mut user = agent.http2().await;
        let mut body = within(user.send_request(get("/logs")))
            .await
            .unwrap()
            .into_body();
        feed.send(Ok("part".into())).await.unwrap();
        assert_eq!(
            within(body.frame())
                .await
                .unwrap()
                .unwrap()
                .into_data()
                .unwrap(),
            "part"
        );
        feed.send(Err(std::io::Error::other("pulled")))
            .await
            .unwrap();
        assert!(
            within(body.frame())
                .await
                .expect("not a clean end")
                .is_err()
        );
    }
}

#[tokio::test]
async fn a_cut_answer_has_no_end_on_http1() {
    let (feed, body) = fed();
    let server = streaming(H2, body).await;
    let agent = Agent::before(server.kubeconfig.clone()).await;
    let mut session = agent.session(throwline_agent::session::Protocol::Http1);
    session
        .write_all(b"GET /logs HTTP/1.1\r\nHost: a\r\n\r\n")
        .await
        .unwrap();
    feed.send(Ok("part".into())).await.unwrap();
    let mut seen = Vec::new();
    while !String::from_utf8_lossy(&seen).contains("part") {
        assert_ne!(within(session.read_buf(&mut seen)).await.unwrap(), 0);
    }
    feed.send(Err(std::io::Error::other("pulled")))
        .await
        .unwrap();
    within(session.read_to_end(&mut seen)).await.unwrap();
    let answer = String::from_utf8_lossy(&seen);
    assert!(
        answer.contains("transfer-encoding: chunked") && !answer.contains("0\r\n\r\n"),
        "{answer}"
    );
}

#[tokio::test]
async fn a_redirect_is_passed_on_and_not_followed() {
    let server = ApiServer::saying(302, &[("location", "https://127.0.0.1:1/evil")], "").await;
    let agent = Agent::before(server.kubeconfig.clone()).await;
    let mut user = agent.http2().await;
    let response = within(user.send_request(get("/api/v1/pods")))
        .await
        .unwrap();
    assert_eq!(response.status(), 302);
    assert_eq!(response.headers()["location"], "https://127.0.0.1:1/evil");
    assert_eq!(server.seen().len(), 1);
}

#[tokio::test]
async fn a_stalled_reader_costs_little_and_stops_nobody() {
    let given = Arc::new(AtomicUsize::new(0));
    let counting = given.clone();
    let server = ApiServer::start(H2, move |seen| {
        let counting = counting.clone();
        Box::pin(async move {
            if seen.path != "/endless" {
                return Response::new(full("quick"));
            }
            let chunk = Bytes::from(vec![0; 16 * 1024]);
            let frames = futures::stream::repeat_with(move || {
                counting.fetch_add(chunk.len(), Ordering::Relaxed);
                Ok(hyper::body::Frame::data(chunk.clone()))
            });
            Response::new(http_body_util::StreamBody::new(frames).boxed_unsync())
        })
    })
    .await;
    let agent = Agent::before(server.kubeconfig.clone()).await;
    let mut user = agent.http2().await;
    let stalled = within(user.send_request(get("/endless"))).await.unwrap();
    eventually(|| given.load(Ordering::Relaxed) > 100_000).await;
    for _ in 0..50 {
        assert_eq!(
            text(within(user.send_request(get("/quick"))).await.unwrap()).await,
            "quick"
        );
    }
    // The agent's two windows and buffers, the pipe, the kernel's sockets and the server's own buffer.
    assert!(
        given.load(Ordering::Relaxed) < 4 << 20,
        "{}",
        given.load(Ordering::Relaxed)
    );
    drop(stalled);
}

#[tokio::test]
async fn two_hundred_at_once_pass_an_api_server_that_takes_a_hundred_a_connection() {
    let all = Arc::new(tokio::sync::Barrier::new(200));
    let server = ApiServer::start(H2, move |_| {
        let all = all.clone();
        Box::pin(async move {
            all.wait().await;
            Response::new(full("met"))
        })
    })
    .await;
    let agent = Agent::before(server.kubeconfig.clone()).await;
    let user = agent.http2().await;
    let requests = (0..200).map(|at| {
        let mut user = user.clone();
        async move { text(user.send_request(get(&format!("/r/{at}"))).await.unwrap()).await }
    });
    let answers = within(futures::future::join_all(requests)).await;
    assert!(answers.iter().all(|answer| answer == "met"));
    let connections = server.connections.lock().unwrap().len();
    assert!((2..=4).contains(&connections), "{connections}");
}

#[tokio::test]
async fn an_http1_api_server_is_served_too_and_its_connections_are_used_again() {
    let server = ApiServer::start(H1, |seen| {
        Box::pin(async move { Response::new(full(seen.path)) })
    })
    .await;
    let agent = Agent::before(server.kubeconfig.clone()).await;
    let mut user = agent.http2().await;
    for at in 0..20 {
        let path = format!("/r/{at}");
        assert_eq!(
            text(within(user.send_request(get(&path))).await.unwrap()).await,
            path
        );
        tokio::task::yield_now().await;
    }
    let connections = server.connections.lock().unwrap().len();
    assert!(connections < 20, "{connections}");
    assert!(server.seen()[0].all("host")[0].starts_with("127.0.0.1:"));
}

#[tokio::test]
async fn a_dead_connection_is_replaced() {
    let server = ApiServer::saying(200, &[], "ok").await;
    let agent = Agent::before(server.kubeconfig.clone()).await;
    let mut user = agent.http2().await;
    for _ in 0..3 {
        // The cut may be seen before the request or by it; a request that was not sent is sent again,
        // and one that may have been is answered by a clear failure.
        let response = within(user.send_request(get("/api"))).await.unwrap();
        assert!(
            [200, 502].contains(&response.status().as_u16()),
            "{}",
            response.status()
        );
        text(response).await;
        for connection in server.connections.lock().unwrap().drain(..) {
            connection.abort();
        }
    }
    let mut last = 0;
    for _ in 0..3 {
        let response = within(user.send_request(get("/api"))).await.unwrap();
        last = response.status().as_u16();
        text(response).await;
    }
    assert_eq!(last, 200);
}

#[tokio::test]
async fn an_api_server_that_is_down_is_named_as_such() {
    let tcp = Tcp::bind(H2).await;
    let (kubeconfig, address) = (tcp.kubeconfig(), tcp.address);
    let agent = Agent::before(kubeconfig).await;
    let mut user = agent.http2().await;
    drop(tcp);
    // Discovery keeps nothing of a 503.
    for (path, status, form) in [
        ("/api/v1/pods", 503, "application/json"),
        ("/api", 502, "text/plain; charset=utf-8"),
    ] {
        let response = within(user.send_request(get(path))).await.unwrap();
        assert_eq!(response.status(), status);
        assert_eq!(response.headers()["content-type"], form);
        let message = text(response).await;
        assert!(
            message.contains("cannot reach its cluster's API server"),
            "{message}"
        );
        assert!(message.contains(&address.to_string()), "{message}");
    }
}

#[tokio::test]
async fn a_401_is_the_agents_and_not_the_users() {
    let server = ApiServer::saying(401, &[], "who?").await;
    let agent = Agent::before(server.kubeconfig.clone()).await;
    let mut user = agent.http2().await;
    let response = within(user.send_request(get("/api/v1/pods")))
        .await
        .unwrap();
    assert_eq!(response.status(), 502);
    assert!(text(response).await.contains("agent's own credentials"));
    let workload = get("/api/v1/namespaces/a/pods/b/proxy/login");
    assert_eq!(
        within(user.send_request(workload)).await.unwrap().status(),
        401
    );
}

#[tokio::test]
async fn a_session_ends_with_the_users_certificate() {
    let (feed, body) = fed();
    let server = streaming(H2, body).await;
    let agent = Agent::before(server.kubeconfig.clone()).await;
    let agent = agent.expiring(SystemTime::now() + Duration::from_millis(300));
    let mut user = agent.http2().await;
    let mut body = within(user.send_request(get("/api/v1/pods?watch=1")))
        .await
        .unwrap()
        .into_body();
    assert!(
        within(body.frame())
            .await
            .expect("not a clean end")
            .is_err()
    );
    assert!(within(user.send_request(get("/api"))).await.is_err());
    drop(feed);
}

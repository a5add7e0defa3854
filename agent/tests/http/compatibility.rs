//! What the API server takes and gives passes the agent, and what does not pass leaves its trace.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use http::Response;
use serde_json::Value;
use throwline_agent::session::Protocol;
use throwline_agent::{Audit, Limits, upstream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::support::{Agent, ApiServer, Tcp, full, get, text, within};

const BOTH: [&[u8]; 2] = [b"h2", b"http/1.1"];
const WORKLOAD: &str = "/api/v1/namespaces/a/services/http:web:80/proxy/";

/// The events that the agent has written to `path`, once there are as many as `count`.
async fn events(path: &std::path::Path, count: usize) -> Vec<Value> {
    within(async {
        loop {
            let text = std::fs::read_to_string(path).unwrap_or_default();
            if text.lines().count() >= count {
                return text
                    .lines()
                    .map(|line| serde_json::from_str(line).unwrap())
                    .collect();
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
}

#[tokio::test]
async fn a_command_of_a_megabyte_reaches_the_api_server_in_its_request_line() {
    let tcp = Tcp::bind(&[b"http/1.1"]).await;
    let agent = Agent::before(tcp.kubeconfig()).await;
    let target = format!(
        "/api/v1/namespaces/a/pods/b/exec?command=sh&command={}",
        "x".repeat(1_000_000)
    );
    let server = tokio::spawn(async move {
        let mut tls = tcp.accept().await;
        let mut read = Vec::new();
        while !read.ends_with(b"\r\n\r\n") {
            assert_ne!(tls.read_buf(&mut read).await.unwrap(), 0);
        }
        let switch = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nhello";
        tls.write_all(switch.as_bytes()).await.unwrap();
        tls.shutdown().await.unwrap();
        String::from_utf8(read).unwrap()
    });
    let request = format!(
        "GET {target} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    );
    let said = agent.raw(request.as_bytes()).await;
    assert!(
        said.starts_with("HTTP/1.1 101 ") && said.ends_with("hello"),
        "{said}"
    );
    let seen = within(server).await.unwrap();
    assert!(seen.starts_with(&format!("GET {target} HTTP/1.1\r\n")));
    assert!(seen.contains("impersonate-user: jane"));
}

#[tokio::test]
async fn large_heads_of_plain_requests_pass_on_a_connection_of_their_own() {
    let server = ApiServer::saying(200, &[], "ok").await;
    let agent = Agent::before(server.kubeconfig.clone()).await;
    let large = "y".repeat(200_000);
    let request = format!("GET /api/v1/pods HTTP/1.1\r\nHost: x\r\nx-large: {large}\r\n\r\n");
    let said = agent.raw(request.as_bytes()).await;
    assert!(
        said.starts_with("HTTP/1.1 200 ") && said.ends_with("ok"),
        "{said}"
    );
    assert!(server.seen()[0].all("x-large") == [large]);
}

#[tokio::test]
async fn beyond_its_share_of_large_heads_a_user_is_told_to_try_again() {
    let server = ApiServer::saying(200, &[], "ok").await;
    let agent = Agent::before(server.kubeconfig.clone()).await;
    let unfinished = format!(
        "GET /api/v1/pods HTTP/1.1\r\nHost: x\r\nx-large: {}",
        "y".repeat(200_000)
    );
    let mut held = Vec::new();
    for _ in 0..4 {
        let mut session = agent.session(Protocol::Http1);
        // All of it is taken only once the agent has it in memory.
        session.write_all(unfinished.as_bytes()).await.unwrap();
        held.push(session);
    }
    let whole = format!("{unfinished}\r\n\r\n");
    let said = agent.raw(whole.as_bytes()).await;
    assert!(
        said.starts_with("HTTP/1.1 503 ") && said.contains("try again"),
        "{said}"
    );
    drop(held);
    within(async {
        while !agent
            .raw(whole.as_bytes())
            .await
            .starts_with("HTTP/1.1 200 ")
        {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn both_audits_have_the_id_that_the_agent_made() {
    let server = ApiServer::saying(200, &[], "ok").await;
    let file = server.dir.join("audit.log");
    let audit = Audit::File(file.clone());
    let agent = Agent::with(server.kubeconfig.clone(), audit, Limits::default()).await;
    let mut request = get("/api/v1/pods");
    let headers = request.headers_mut();
    headers.insert("audit-id", "of-the-client".parse().unwrap());
    let mut user = agent.http2().await;
    text(within(user.send_request(request)).await.unwrap()).await;
    let mut refused = get("/api/v1/pods");
    let headers = refused.headers_mut();
    headers.insert("impersonate-user", "admin".parse().unwrap());
    let refused = within(user.send_request(refused)).await.unwrap();
    let events = events(&file, 2).await;
    let id = events[0]["auditID"].as_str().unwrap();
    assert_eq!(server.seen()[0].all("audit-id"), [id]);
    assert_ne!(id, "of-the-client");
    assert_eq!(
        refused.headers()["audit-id"],
        events[1]["auditID"].as_str().unwrap()
    );
}

#[tokio::test]
async fn what_no_parser_reads_is_answered_with_a_status_and_leaves_an_event() {
    let server = ApiServer::saying(200, &[], "ok").await;
    let file = server.dir.join("audit.log");
    let audit = Audit::File(file.clone());
    let agent = Agent::with(server.kubeconfig.clone(), audit, Limits::default()).await;
    let requests = [
        (
            "GET /api/v1/pods?a=\"b\" HTTP/1.1\r\nHost: x\r\n\r\n",
            "400",
        ),
        ("GET /api/v1/p\u{1}ds HTTP/1.1\r\nHost: x\r\n\r\n", "400"),
        ("G(T /api HTTP/1.1\r\nHost: x\r\n\r\n", "400"),
        ("GET /api HTTP/3.0\r\nHost: x\r\n\r\n", "400"),
        ("GET /api HTTP/1.1\r\nHo st: x\r\n\r\n", "400"),
        ("GET /api HTTP/1.1\r\nHost: x\r\na: \u{7}\r\n\r\n", "400"),
        ("CONNECT a:1 HTTP/1.1\r\nHost: x\r\n\r\n", "405"),
        ("\u{16}\u{3}\u{1}\n\n", "400"),
    ];
    for (request, code) in requests {
        let said = agent.raw(request.as_bytes()).await;
        assert_eq!(said.get(9..12), Some(code), "{request:?}: {said}");
        assert!(
            said.contains("\"kind\":\"Status\"") && said.contains("audit-id: "),
            "{said}"
        );
    }
    let events = events(&file, requests.len()).await;
    assert_eq!(events.len(), requests.len());
    for (event, (_, code)) in events.iter().zip(requests) {
        assert_eq!(event["responseStatus"]["code"].to_string(), code, "{event}");
        assert_eq!(event["user"]["username"], "jane");
    }
    assert_eq!(events[0]["requestURI"], "/");
    assert_eq!(events[3]["requestURI"], "/api");
    assert!(server.seen().is_empty());
}

#[tokio::test]
async fn a_workloads_cookies_names_and_targets_pass() {
    let server = ApiServer::saying(200, &[("set-cookie", "a=b")], "ok").await;
    let agent = Agent::before(server.kubeconfig.clone()).await;
    let request = format!(
        "GET {WORKLOAD}<\u{e9}>?q=\"<\" HTTP/1.1\r\nHost: x\r\nCookie: s=1\r\nX_Token: t\r\n\
         Remote-User: root\r\nX-Client-Cert: c\r\n\r\n"
    );
    let said = agent.raw(request.as_bytes()).await;
    assert!(
        said.starts_with("HTTP/1.1 200 ") && said.contains("set-cookie: a=b"),
        "{said}"
    );
    let seen = &server.seen()[0];
    assert_eq!(seen.path, format!("{WORKLOAD}%3C%C3%A9%3E?q=%22%3C%22"));
    assert_eq!(
        (seen.all("cookie"), seen.all("x_token")),
        (vec!["s=1".into()], vec!["t".into()])
    );
    assert!(seen.all("remote-user").is_empty() && seen.all("x-client-cert").is_empty());
    assert_eq!(seen.all("impersonate-user"), ["jane"]);
    // Elsewhere the strict rules hold, and say so.
    let said = agent
        .raw(b"GET /api/v1/pods HTTP/1.1\r\nHost: x\r\nX_Token: t\r\n\r\n")
        .await;
    assert!(
        said.starts_with("HTTP/1.1 400 ") && said.contains("x_token"),
        "{said}"
    );
}

#[tokio::test]
async fn a_workloads_answer_cannot_end_the_watches_of_others() {
    let server = ApiServer::start(&BOTH, |seen| {
        Box::pin(async move {
            if seen.path.starts_with("/api/v1/pods?watch") {
                let (feed, body) = super::support::fed();
                tokio::spawn(async move {
                    // Open for as long as the test is.
                    let _ = feed.send(Ok("event".into())).await;
                    std::future::pending::<()>().await;
                    drop(feed);
                });
                return Response::new(body);
            }
            let response = Response::builder().header("x-large", "y".repeat(300_000));
            response.body(full("large")).unwrap()
        })
    })
    .await;
    let agent = Agent::before(server.kubeconfig.clone()).await;
    let mut user = agent.http2().await;
    let mut watch = within(user.send_request(get("/api/v1/pods?watch=1")))
        .await
        .unwrap();
    let frame = http_body_util::BodyExt::frame(watch.body_mut());
    assert!(within(frame).await.unwrap().is_ok());
    let answer = within(user.send_request(get(WORKLOAD))).await.unwrap();
    assert_eq!(answer.status(), 503);
    let rest = http_body_util::BodyExt::frame(watch.body_mut());
    let rest = tokio::time::timeout(Duration::from_millis(300), rest).await;
    assert!(rest.is_err(), "the watch has ended");
}

#[tokio::test]
async fn logs_take_their_time_and_lists_have_a_limit() {
    let server = ApiServer::start(&BOTH, |_| {
        Box::pin(async {
            tokio::time::sleep(Duration::from_millis(600)).await;
            Response::new(full("late"))
        })
    })
    .await;
    let limits = Limits {
        upstream: upstream::Limits {
            answer: Duration::from_millis(50),
            ..upstream::Limits::default()
        },
        ..Limits::default()
    };
    let agent = Agent::with(server.kubeconfig.clone(), Audit::Off, limits).await;
    for target in [
        "/api/v1/namespaces/a/pods/b/log",
        "/api/v1/namespaces/a/pods/b/log?follow=false",
        "/api/v1/pods?watch=1",
        WORKLOAD,
        "/debug/pprof/profile?seconds=1",
    ] {
        let mut user = agent.http2().await;
        let answer = within(user.send_request(get(target))).await.unwrap();
        assert_eq!(answer.status(), 200, "{target}");
    }
}

#[tokio::test]
async fn an_api_server_that_hangs_is_given_up() {
    let server = ApiServer::start(&BOTH, |_| Box::pin(std::future::pending())).await;
    let limits = Limits {
        upstream: upstream::Limits {
            answer: Duration::from_millis(50),
            ..upstream::Limits::default()
        },
        ..Limits::default()
    };
    let agent = Agent::with(server.kubeconfig.clone(), Audit::Off, limits).await;
    let mut user = agent.http2().await;
    let answer = within(user.send_request(get("/api/v1/pods")))
        .await
        .unwrap();
    assert_eq!(answer.status(), 504);
    // The client's own time counts where it is longer.
    let patient = user.send_request(get("/api/v1/pods?timeout=30s"));
    let patient = tokio::time::timeout(Duration::from_millis(500), patient);
    assert!(patient.await.is_err());
}

#[tokio::test]
async fn interim_answers_without_end_are_given_up() {
    for target in [WORKLOAD, "/api/v1/namespaces/a/pods/b/exec"] {
        let tcp = Tcp::bind(&[b"http/1.1"]).await;
        let agent = Agent::before(tcp.kubeconfig()).await;
        tokio::spawn(async move {
            let mut tls = tcp.accept().await;
            let _ = tls.read(&mut [0; 4096]).await;
            while tls
                .write_all(b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n")
                .await
                .is_ok()
            {}
        });
        let upgrade = match target {
            WORKLOAD => "",
            _ => "Connection: Upgrade\r\nUpgrade: websocket\r\n",
        };
        let request = format!("GET {target} HTTP/1.1\r\nHost: x\r\n{upgrade}\r\n");
        let said = agent.raw(request.as_bytes()).await;
        assert!(
            said.starts_with("HTTP/1.1 502 ") && said.contains("1xx"),
            "{said}"
        );
    }
}

/// An API server that answers each request on HTTP/2 by 103 without end. How many bytes it could write.
async fn hints_without_end(tcp: Tcp, written: Arc<AtomicU64>) {
    loop {
        let mut tls = tcp.accept().await;
        let written = written.clone();
        tokio::spawn(async move {
            let _ = tls.read(&mut [0; 4096]).await;
            // SETTINGS, then `:status: 103` by its name in the table, in a separate frame.
            let hint = [0, 0, 5, 1, 4, 0, 0, 0, 1, 0x08, 3, b'1', b'0', b'3'];
            let hints = hint.repeat(1000);
            let mut next = vec![0, 0, 0, 4, 0, 0, 0, 0, 0];
            while tls.write_all(&next).await.is_ok() {
                written.fetch_add(next.len() as u64, Ordering::Relaxed);
                next.clone_from(&hints);
            }
        });
    }
}

#[tokio::test]
async fn interim_answers_without_end_are_given_up_on_http2_too() {
    let tcp = Tcp::bind(&[b"h2"]).await;
    let agent = Agent::before(tcp.kubeconfig()).await;
    let written = Arc::new(AtomicU64::new(0));
    let serving = tokio::spawn(hints_without_end(tcp, written.clone()));
    let mut user = agent.http2().await;
    let answer = within(user.send_request(get("/api/v1/pods")))
        .await
        .unwrap();
    assert_eq!(answer.status(), 502);
    let said = text(answer).await;
    assert!(said.contains("1xx"), "{said}");
    // What the sockets hold, and no stream of it.
    assert!(written.load(Ordering::Relaxed) < 64 * 1024 * 1024);
    serving.abort();
}

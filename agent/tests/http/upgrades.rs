//! Upgrades against a server that is scripted in bytes.

use std::time::Duration;

use throwline_agent::session::Protocol;
use throwline_agent::{Audit, Limits, request};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinHandle;

use super::support::{Agent, Tcp, get, text, within};

pub(crate) const EXEC: &str = "POST /api/v1/namespaces/a/pods/b/exec?command=sh HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\n\
                    Upgrade: SPDY/3.1\r\nContent-Length: 0\r\nX-Stream-Protocol-Version: v5.channel.k8s.io\r\n\
                    X-Stream-Protocol-Version: v4.channel.k8s.io\r\n\r\n";
pub(crate) const SWITCH: &str = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\
                      X-Stream-Protocol-Version: v4.channel.k8s.io\r\n\r\n";

/// Takes one connection: reads a head, answers in bytes, then gives back all that it ever read.
pub(crate) async fn scripted(answer: &str, end: bool) -> (Agent, JoinHandle<String>) {
    scripted_with(answer, end, Limits::default()).await
}

async fn scripted_with(answer: &str, end: bool, limits: Limits) -> (Agent, JoinHandle<String>) {
    let tcp = Tcp::bind(&[b"http/1.1"]).await;
    let agent = Agent::with(tcp.kubeconfig(), Audit::Off, limits).await;
    let answer = answer.to_owned();
    let server = tokio::spawn(async move {
        let mut tls = tcp.accept().await;
        let mut read = Vec::new();
        while !read.windows(4).any(|four| four == b"\r\n\r\n") {
            assert_ne!(tls.read_buf(&mut read).await.unwrap(), 0);
        }
        tls.write_all(answer.as_bytes()).await.unwrap();
        tls.flush().await.unwrap();
        if end {
            tls.shutdown().await.unwrap();
        }
        let _ = tls.read_to_end(&mut read).await;
        String::from_utf8_lossy(&read).into_owned()
    });
    (agent, server)
}

#[tokio::test]
async fn after_the_101_bytes_flow_and_none_that_came_early_is_lost() {
    let (agent, server) = scripted(&format!("{SWITCH}hello"), false).await;
    let mut session = agent.session(Protocol::Http1);
    session
        .write_all(format!("{EXEC}early").as_bytes())
        .await
        .unwrap();
    let mut read = Vec::new();
    while !read.ends_with(b"hello") {
        assert_ne!(
            within(session.read_buf(&mut read)).await.unwrap(),
            0,
            "{}",
            String::from_utf8_lossy(&read)
        );
    }
    let head = String::from_utf8_lossy(&read).to_ascii_lowercase();
    assert!(
        head.starts_with("http/1.1 101 ") && head.contains("upgrade: spdy/3.1"),
        "{head}"
    );
    assert!(
        head.contains("x-stream-protocol-version: v4.channel.k8s.io"),
        "{head}"
    );
    session.write_all(b" late").await.unwrap();
    session.shutdown().await.unwrap();
    let seen = within(server).await.unwrap();
    assert!(seen.ends_with("\r\n\r\nearly late"), "{seen}");
    let seen = seen.to_ascii_lowercase();
    let versions = "x-stream-protocol-version: v5.channel.k8s.io\r\nx-stream-protocol-version: v4.channel.k8s.io";
    assert!(seen.contains(versions), "{seen}");
    assert!(
        seen.contains("impersonate-user: jane")
            && seen.contains("authorization: bearer agents-own"),
        "{seen}"
    );
    assert_eq!(seen.matches("connection:").count(), 1, "{seen}");
}

#[tokio::test]
async fn what_is_pipelined_behind_a_refused_upgrade_never_arrives() {
    let refusal =
        "HTTP/1.1 403 Forbidden\r\nContent-Length: 4\r\nContent-Type: text/plain\r\n\r\nnope";
    let (agent, server) = scripted(refusal, false).await;
    let request =
        format!("{EXEC}GET /api/v1/secrets HTTP/1.1\r\nHost: x\r\nImpersonate-User: admin\r\n\r\n");
    let answer = agent.raw(request.as_bytes()).await;
    assert!(
        answer.starts_with("HTTP/1.1 403 ") && answer.ends_with("\r\n\r\nnope"),
        "{answer}"
    );
    assert!(
        answer.contains("connection: close") && answer.contains("content-type: text/plain"),
        "{answer}"
    );
    let seen = within(server).await.unwrap();
    assert_eq!(seen.matches("HTTP/1.1").count(), 1, "{seen}");
    assert!(
        !seen.contains("secrets") && !seen.contains("admin"),
        "{seen}"
    );
}

#[tokio::test]
async fn neither_success_nor_redirect_is_an_answer_to_an_upgrade() {
    for answer in [
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
        "HTTP/1.1 204 No Content\r\n\r\n",
        "HTTP/1.1 302 Found\r\nLocation: https://127.0.0.1:1/evil\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n\r\n",
    ] {
        let (agent, server) = scripted(answer, false).await;
        let said = agent
            .raw(format!("{EXEC}GET /evil HTTP/1.1\r\n\r\n").as_bytes())
            .await;
        assert!(
            said.starts_with("HTTP/1.1 502 ") && !said.contains("127.0.0.1:1"),
            "{answer}: {said}"
        );
        assert!(!within(server).await.unwrap().contains("/evil"), "{answer}");
    }
}

#[tokio::test]
async fn a_101_that_nobody_asked_for_is_not_passed_on() {
    let (agent, server) = scripted(SWITCH, false).await;
    let mut user = agent.http2().await;
    let response = within(user.send_request(get("/api/v1/pods")))
        .await
        .unwrap();
    assert_eq!(response.status(), 502);
    text(response).await;
    within(server).await.unwrap();
}

#[tokio::test]
async fn a_refusal_that_does_not_end_is_given_up() {
    let limits = Limits {
        request: request::Limits {
            refusal: Duration::from_millis(100),
            ..request::Limits::default()
        },
        ..Limits::default()
    };
    let endless = "HTTP/1.1 403 Forbidden\r\nContent-Length: 100\r\n\r\npart";
    let (agent, server) = scripted_with(endless, false, limits).await;
    let said = agent.raw(EXEC.as_bytes()).await;
    assert!(said.starts_with("HTTP/1.1 502 "), "{said}");
    within(server).await.unwrap();
}

#[tokio::test]
async fn when_the_server_ends_the_user_is_ended_too() {
    let (agent, server) = scripted(&format!("{SWITCH}bye"), true).await;
    let said = agent.raw(EXEC.as_bytes()).await;
    assert!(
        said.starts_with("HTTP/1.1 101 ") && said.ends_with("bye"),
        "{said}"
    );
    within(server).await.unwrap();
}

#[tokio::test]
async fn an_upgrade_ends_with_the_users_certificate() {
    let (agent, server) = scripted(SWITCH, false).await;
    let agent = agent.expiring(std::time::SystemTime::now() + Duration::from_millis(300));
    let said = agent.raw(EXEC.as_bytes()).await;
    assert!(said.starts_with("HTTP/1.1 101 "), "{said}");
    within(server).await.unwrap();
}

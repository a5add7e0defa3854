//! Dialling over real sockets, and what each refusal becomes.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::time::Duration;

use support::{accept_config, dial_config, gone};
use throwline_tunnel::carrier::{self, DialError};
use throwline_tunnel::ws;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

async fn head(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    String::from_utf8(head).unwrap()
}

fn value<'a>(head: &'a str, name: &str) -> &'a str {
    let line = head.lines().find(|line| {
        line.split_once(':')
            .is_some_and(|(key, _)| key.eq_ignore_ascii_case(name))
    });
    line.and_then(|line| line.split_once(": ")).unwrap().1
}

/// Answers one dial with `answer`, in which `{accept}` stands for the right key.
async fn answered(answer: &str) -> DialError {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let relay = format!("http://{}", listener.local_addr().unwrap());
    let answer = answer.to_owned();
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let head = head(&mut stream).await;
        let key = ws::accept_key(value(&head, "sec-websocket-key").as_bytes());
        let answer = answer.replace("{accept}", &key);
        stream.write_all(answer.as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
        let _ = stream.read_to_end(&mut Vec::new()).await;
    });
    let error = carrier::dial(&dial_config(&relay)).await.unwrap_err();
    server.await.unwrap();
    error
}

fn json(status: &str, extra: &str, body: &str) -> String {
    let len = body.len();
    format!("HTTP/1.1 {status}\r\n{extra}content-length: {len}\r\n\r\n{body}")
}

#[tokio::test]
async fn a_dial_upgrades_below_the_prefix_and_proves_itself() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let relay = format!("http://{}/edge/", listener.local_addr().unwrap());
    let accepting = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let head = head(&mut stream).await;
        assert!(
            head.starts_with("GET /edge/v1/carrier HTTP/1.1\r\n"),
            "{head}"
        );
        assert_eq!(value(&head, "sec-websocket-protocol"), "throwline.v1");
        assert_eq!(
            value(&head, "authorization"),
            "Bearer assertion-of-spiffe://test/cluster/c"
        );
        let accept = ws::accept_key(value(&head, "sec-websocket-key").as_bytes());
        let answer = format!(
            "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Accept: {accept}\r\nSec-WebSocket-Protocol: throwline.v1\r\n\r\n"
        );
        stream.write_all(answer.as_bytes()).await.unwrap();
        carrier::accept(stream, accept_config(), |proof, nonce| {
            let signed = throwline_tunnel::proto::challenge::transcript(
                nonce,
                &proof.nonce,
                &[7; 32],
                relay.trim_end_matches('/'),
                1,
            );
            assert_eq!(proof.signature, signed);
            Ok(())
        })
        .await
    };
    let config = dial_config(&relay);
    let (dialed, accepted) = tokio::join!(carrier::dial(&config), accepting);
    let (accepted, proof) = accepted.unwrap();
    assert_eq!(proof.instance, "instance-1");
    let dialed = dialed.unwrap();
    assert_eq!(dialed.carrier.id(), accepted.carrier.id());
    drop(listener);
    gone(dialed, accepted).await;
}

#[tokio::test]
async fn each_answer_has_its_own_error() {
    let body = r#"{"code":"unauthenticated","message":"the assertion was not accepted"}"#;
    let error = answered(&json("401 Unauthorized", "", body)).await;
    assert!(matches!(error, DialError::Unauthenticated), "{error}");

    let body = r#"{"code":"clock-skew","message":"the relay's time is 12:00"}"#;
    let error = answered(&json("401 Unauthorized", "", body)).await;
    assert!(error.to_string().contains("12:00"), "{error}");
    assert!(matches!(error, DialError::ClockSkew { .. }), "{error}");

    let body = r#"{"code":"certificate-expired","message":"it ended yesterday"}"#;
    let error = answered(&json("401 Unauthorized", "", body)).await;
    assert!(
        matches!(error, DialError::CertificateExpired { .. }),
        "{error}"
    );

    let body = r#"{"code":"busy","message":"too many handshakes"}"#;
    let error = answered(&json("503 Busy", "Retry-After: 7\r\n", body)).await;
    assert_eq!(error.retry_after(), Some(Duration::from_secs(7)), "{error}");
    assert!(error.is_transient());

    let body = r#"{"code":"version","message":"no","versions":["throwline.v9"]}"#;
    let error = answered(&json("426 Upgrade Required", "", body)).await;
    assert!(error.to_string().contains("throwline.v9"), "{error}");

    let error = answered(&json("404 Not Found", "", "<html>")).await;
    assert!(matches!(error, DialError::NotARelay { .. }), "{error}");
    let error = answered("SSH-2.0-OpenSSH_9.9\r\n").await;
    assert!(matches!(error, DialError::NotARelay { .. }), "{error}");
    let endless = format!("HTTP/1.1 500 No\r\n\r\n{}", "x".repeat(100_000));
    let error = answered(&endless).await;
    assert!(
        matches!(error, DialError::Http { status: 500, .. }),
        "{error}"
    );

    let switched = |key: &str, protocol: &str| {
        format!(
            "HTTP/1.1 101 S\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Accept: {key}\r\n{protocol}\r\n"
        )
    };
    let error = answered(&switched(
        "bogus",
        "Sec-WebSocket-Protocol: throwline.v1\r\n",
    ))
    .await;
    assert!(matches!(error, DialError::NotARelay { .. }), "{error}");
    let error = answered(&switched("{accept}", "")).await;
    assert!(error.to_string().contains("sub-protocol"), "{error}");
    let error = answered(&switched(
        "{accept}",
        "Sec-WebSocket-Protocol: throwline.v1\r\n",
    ))
    .await;
    assert!(matches!(error, DialError::Lost(_)), "{error}");
}

#[tokio::test]
async fn what_cannot_be_dialled_says_what_to_do() {
    let error = carrier::dial(&dial_config("http://relay.example"))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("https://"), "{error}");
    assert!(!error.is_transient());
    let error = carrier::dial(&dial_config("https://relay.example"))
        .await
        .unwrap_err();
    assert!(matches!(error, DialError::BadUrl { .. }), "{error}");
    let mut nowhere = dial_config("http://nowhere.invalid:1");
    nowhere.allow_plaintext = true;
    let error = carrier::dial(&nowhere).await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains("check"), "{text}");

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let closed = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let error = carrier::dial(&dial_config(&closed)).await.unwrap_err();
    assert!(matches!(error, DialError::Connect { .. }), "{error}");
}

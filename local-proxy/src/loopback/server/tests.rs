use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use throwline_kube_wire::http1::target::Target;
use throwline_kube_wire::http2::frames::{
    END_HEADERS, END_STREAM, Frame, GOAWAY, HEADER, HEADERS, RST_STREAM,
};
use throwline_tunnel::proto::messages::{Refusal, RefusalCode};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::config::{LoopbackLimits, Timing};
use crate::failure::Failure;
use crate::store::Store;
use crate::testing::{
    Agent, Answer, Running, answer, client_config, empty, eventually, fed, read, text, tls,
};

/// Answers with what it was asked.
fn mirror() -> Arc<Agent> {
    Agent::new(|request: Request<Incoming>| async move {
        let mut seen = format!("{} {}\n", request.method(), request.uri());
        for (name, value) in request.headers() {
            seen += &format!("{name}: {}\n", value.to_str().unwrap());
        }
        let body = request.into_body().collect().await.unwrap().to_bytes();
        seen += &String::from_utf8_lossy(&body);
        let mut response = answer(seen);
        response
            .headers_mut()
            .insert("location", HeaderValue::from_static("https://elsewhere/x"));
        response
    })
}

#[tokio::test]
async fn both_http_versions_reach_the_cluster_with_the_prefix_removed() {
    let agent = mirror();
    let proxy = Running::start(&agent).await;
    let path = "/clusters/prod/api/v1/a%2Fb?x=%20&y";
    let (status, seen) = read(proxy.get(path).await).await;
    assert_eq!(status, 200);
    assert_eq!(seen, "GET https://prod/api/v1/a%2Fb?x=%20&y\n");

    let request = Request::post(proxy.url(path)).body(text("hello")).unwrap();
    let response = proxy.http2().await.send_request(request).await.unwrap();
    assert_eq!(response.headers()["location"], "https://elsewhere/x");
    let (_, seen) = read(response).await;
    assert_eq!(
        seen,
        "POST https://prod/api/v1/a%2Fb?x=%20&y\ncontent-length: 5\nhello"
    );
    assert_eq!(
        agent.api_dials.load(Ordering::SeqCst),
        1,
        "one session for both"
    );
}

#[tokio::test]
async fn headers_keep_their_order_and_lose_only_what_was_for_this_hop() {
    let proxy = Running::start(&mirror()).await;
    let request = proxy
        .request("GET", "/clusters/prod/api")
        .header("accept", "a")
        .header("x-one", "1")
        .header("accept", "b")
        .header("connection", "x-gone")
        .header("x-gone", "1")
        .header("te", "trailers")
        .header("authorization", "Bearer theirs")
        .header("impersonate-user", "root")
        .body(empty())
        .unwrap();
    let response = proxy.http1().await.send_request(request).await.unwrap();
    let (_, seen) = read(response).await;
    let mut lines: Vec<_> = seen.lines().skip(1).collect();
    assert_eq!(
        lines
            .iter()
            .filter(|l| l.starts_with("accept"))
            .collect::<Vec<_>>(),
        [&"accept: a", &"accept: b"]
    );
    lines.retain(|line| !line.starts_with("accept"));
    lines.sort_unstable();
    // What a client may say about identity is for the agent to judge, so it is not hidden from it.
    assert_eq!(
        lines,
        [
            "authorization: Bearer theirs",
            "impersonate-user: root",
            "x-one: 1"
        ]
    );
}

#[tokio::test]
async fn only_holders_of_the_client_certificate_get_in() {
    let agent = mirror();
    let proxy = Running::start(&agent).await;
    let other = tempfile::tempdir().unwrap();
    let other = Store::new(other.path());
    crate::loopback::tls::LoopbackTls::open(&other).unwrap();
    let v13 = &[&rustls::version::TLS13];
    let strangers = [
        client_config(&proxy.store, &other, &[], true, v13),
        client_config(&proxy.store, &other, &[], false, v13),
    ];
    for config in strangers {
        // With TLS 1.3 the server refuses after the client's side is done.
        let refused = match tls(proxy.addr, config).await {
            Err(_) => true,
            Ok(mut stream) => {
                let _ = stream
                    .write_all(b"GET /clusters/a/api HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
                    .await;
                !matches!(stream.read(&mut [0; 16]).await, Ok(1..))
            }
        };
        assert!(refused);
    }
    assert_eq!(agent.api_dials.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn old_tls_and_any_alpn_are_accepted() {
    let proxy = Running::start(&mirror()).await;
    let both: [&'static rustls::SupportedProtocolVersion; 2] =
        [&rustls::version::TLS12, &rustls::version::TLS13];
    for version in both {
        for alpn in [&[][..], &[&b"http/1.1"[..]][..]] {
            let config = client_config(&proxy.store, &proxy.store, alpn, true, &[version]);
            let mut stream = tls(proxy.addr, config).await.unwrap();
            stream
                .write_all(
                    b"GET /clusters/a/api HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n",
                )
                .await
                .unwrap();
            let mut seen = String::new();
            stream.read_to_string(&mut seen).await.unwrap();
            assert!(seen.starts_with("HTTP/1.1 200 "), "{seen}");
        }
    }
}

#[tokio::test]
async fn a_silent_client_is_dropped_and_does_not_disturb_others() {
    let timing = Timing {
        handshake: Duration::from_millis(100),
        request_head: Duration::from_millis(100),
        ..Timing::default()
    };
    let proxy = Running::start_with(&mirror(), timing).await;
    let mut silent = TcpStream::connect(proxy.addr).await.unwrap();
    let mut dripping = proxy.connect(&[]).await;
    dripping.write_all(b"GET /clus").await.unwrap();
    assert_eq!(read(proxy.get("/clusters/a/api").await).await.0, 200);
    assert_eq!(silent.read(&mut [0; 1]).await.unwrap_or(0), 0);
    let mut rest = Vec::new();
    let _ = dripping.read_to_end(&mut rest).await;
    assert!(!String::from_utf8_lossy(&rest).contains("200"));
    eventually("connections end", || proxy.metrics.connections.get() == 0).await;
}

#[tokio::test]
async fn foreign_hosts_and_crafted_paths_never_reach_a_cluster() {
    let agent = mirror();
    let proxy = Running::start(&agent).await;
    for (request, expected) in [
        (
            "GET /clusters/a/api HTTP/1.1\r\nhost: evil.example\r\n\r\n",
            421,
        ),
        ("GET /clusters/a/api HTTP/1.1\r\n\r\n", 421),
        (
            "GET /clusters/a/api HTTP/1.1\r\nhost: 127.0.0.1\r\nhost: b\r\n\r\n",
            400,
        ),
        (
            "GET /clusters/%61/api HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n",
            400,
        ),
        (
            "GET /clusters/../api HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n",
            400,
        ),
        ("GET /api HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n", 502),
        ("GET /else HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n", 404),
        (
            "GET https://127.0.0.1/clusters/a HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n",
            400,
        ),
        (
            "GET /clusters/a/api HTTP/1.0\r\nhost: 127.0.0.1\r\n\r\n",
            505,
        ),
        (
            "GET /clusters/a/api HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: impersonate-user\r\n\r\n",
            400,
        ),
        (
            "POST /clusters/a HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
            400,
        ),
        ("GET /clusters/a\0 HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n", 400),
        (
            "POST /clusters/a HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
        ),
    ] {
        let mut stream = proxy.connect(&[]).await;
        // A second request behind the refused one must not be taken for one.
        let both = format!("{request}GET /clusters/a/second HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n");
        stream.write_all(both.as_bytes()).await.unwrap();
        let seen = everything(&mut stream).await;
        assert_eq!(
            seen.get(9..12),
            Some(expected.to_string().as_str()),
            "{request:?}: {seen}"
        );
        assert_eq!(seen.matches("HTTP/1.1 ").count(), 1, "{request:?}: {seen}");
    }
    assert_eq!(agent.api_dials.load(Ordering::SeqCst), 0);
}

/// All bytes up to the end, also where that is not a clean one.
async fn everything(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> String {
    let mut all = Vec::new();
    while let Ok(1..) = stream.read_buf(&mut all).await {}
    String::from_utf8_lossy(&all).into_owned()
}

/// An agent that answers with the size of the head that it received.
fn measuring() -> Arc<Agent> {
    Agent::new(|request: Request<Incoming>| async move {
        let target = request.extensions().get::<Target>();
        let target = target.map_or(request.uri().path().len(), |long| long.as_str().len());
        let headers = request.headers().values();
        let headers: usize = headers.map(HeaderValue::len).sum();
        answer(format!("{target} {}", headers >= 200_000))
    })
}

#[tokio::test]
async fn large_heads_pass_over_both_versions() {
    let proxy = Running::start(&measuring()).await;
    let large = HeaderValue::from_str(&"y".repeat(200_000)).unwrap();
    let target = format!("/api?{}", "x".repeat(900_000));
    let mut stream = proxy.connect(&[]).await;
    let head =
        format!("GET /clusters/a{target} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    let seen = everything(&mut stream).await;
    assert!(seen.starts_with("HTTP/1.1 200 "), "{seen}");
    assert!(seen.contains(&target.len().to_string()), "{seen}");

    let request = proxy
        .request("GET", "/clusters/a/api")
        .header("x-large", large.clone())
        .body(empty())
        .unwrap();
    let response = proxy.http1().await.send_request(request).await.unwrap();
    assert_eq!(read(response).await, (200, "4 true".to_owned()));

    let request = Request::get(proxy.url("/clusters/a/api")).header("x-large", large);
    let request = request.body(empty()).unwrap();
    let response = proxy.http2().await.send_request(request).await.unwrap();
    assert_eq!(read(response).await, (200, "4 true".to_owned()));
}

#[tokio::test]
async fn a_head_that_is_too_large_is_refused_on_its_own_stream() {
    let (feed, body) = fed();
    let proxy = Running::start(&streaming(body)).await;
    let mut sender = proxy.http2().await;
    let watch = Request::get(proxy.url("/clusters/prod/watch"));
    let mut watch = sender
        .send_request(watch.body(empty()).unwrap())
        .await
        .unwrap();
    for size in [1_100_000, 2_000_000, 3_000_000] {
        let large = Request::get(proxy.url("/clusters/a/api")).header("x-large", "y".repeat(size));
        let refused = sender
            .send_request(large.body(empty()).unwrap())
            .await
            .unwrap();
        let (status, body) = read(refused).await;
        assert_eq!(status, 431, "{size}");
        assert!(body.contains("1 MiB") && body.contains("Status"), "{body}");
    }
    feed.send(Ok(Bytes::from("event"))).await.unwrap();
    let frame = watch.frame().await.unwrap().unwrap();
    assert_eq!(frame.into_data().unwrap(), "event");
}

#[tokio::test]
async fn an_agents_interim_answers_without_end_are_given_up() {
    let agent = measuring();
    agent.hinting.store(1, Ordering::SeqCst);
    let proxy = Running::start(&agent).await;
    let response = proxy.get("/clusters/prod/api").await;
    assert_eq!(response.status(), 200, "of another session");
    assert_eq!(agent.api_dials.load(Ordering::SeqCst), 2);
}

/// A string of HPACK as it is, behind its length with a prefix of so many bits.
fn plain(into: &mut Vec<u8>, text: &str) {
    let mut rest = text.len();
    if rest < 127 {
        into.push(rest as u8);
    } else {
        into.push(127);
        rest -= 127;
        while rest >= 128 {
            into.push(0x80 | (rest % 128) as u8);
            rest /= 128;
        }
        into.push(rest as u8);
    }
    into.extend(text.as_bytes());
}

/// HEADERS of a GET, and what CONTINUATION it takes: a client that checks nothing.
fn raw_get(stream: u32, path: &str) -> Vec<u8> {
    let mut fields = vec![0x82, 0x87, 0x01];
    plain(&mut fields, "127.0.0.1");
    fields.push(0x04);
    plain(&mut fields, path);
    let mut all = Vec::new();
    let pieces = fields.chunks(16_000).count();
    for (at, piece) in fields.chunks(16_000).enumerate() {
        let last = if at + 1 == pieces { END_HEADERS } else { 0 };
        let (kind, flags) = match at {
            0 => (HEADERS, last | END_STREAM),
            _ => (9, last),
        };
        let frame = Frame {
            kind,
            flags,
            stream,
            length: piece.len(),
        };
        all.extend(frame.header());
        all.extend(piece);
    }
    all
}

#[tokio::test]
async fn a_target_that_http2s_library_refuses_is_answered_in_words_and_ends_nothing_else() {
    let proxy = Running::start(&mirror()).await;
    let mut stream = proxy.connect(&[b"h2"]).await;
    let settings = Frame {
        kind: 4,
        flags: 0,
        stream: 0,
        length: 0,
    };
    stream
        .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        .await
        .unwrap();
    stream.write_all(&settings.header()).await.unwrap();
    let path = "/clusters/a/api/v1/namespaces/a/services/b/proxy/";
    let bad = [
        format!("{path}?{}", "x".repeat(70_000)),
        format!("{path}<"),
        format!("{path}>"),
        format!("{path}?a=<"),
        format!("{path}?a=\""),
        format!("{path} "),
    ];
    let mut asked = 1;
    for target in bad {
        for (target, expected) in [(target.as_str(), 0x80 | 12), (path, 0x80 | 8)] {
            stream.write_all(&raw_get(asked, target)).await.unwrap();
            let (mut answer, mut reset) = (None, None);
            while answer.is_none() || (expected == 0x8c && reset.is_none()) {
                let mut header = [0; HEADER];
                stream.read_exact(&mut header).await.unwrap();
                let frame = Frame::read(&header);
                let mut payload = vec![0; frame.length];
                stream.read_exact(&mut payload).await.unwrap();
                assert_ne!(frame.kind, GOAWAY);
                match frame.kind {
                    HEADERS if frame.stream == asked => answer = Some(payload),
                    RST_STREAM if frame.stream == asked => reset = Some(payload),
                    _ => {}
                }
            }
            let answer = answer.unwrap();
            // h2's own begins with the size of the table.
            assert!(answer[..4].contains(&expected), "{target:.100} {answer:?}");
            if expected == 0x8c {
                let text = String::from_utf8_lossy(&answer);
                assert!(
                    text.contains("64 KiB") && text.contains("DISABLE_HTTP2"),
                    "{text}"
                );
                assert_eq!(reset.unwrap(), [0; 4], "no error");
            }
            asked += 2;
        }
    }
    let refused = proxy.metrics.requests.with_label_values(&["refused"]);
    assert_eq!(refused.get(), 6);
}

#[tokio::test]
async fn a_refusal_arrives_however_much_is_still_on_its_way() {
    let proxy = Running::start(&mirror()).await;
    for (request, expected) in [
        (
            format!(
                "GET /clusters/a/api?{} HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n",
                "x".repeat(3_000_000)
            ),
            "431",
        ),
        (
            format!(
                "GET /clusters/a/\u{1}api HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n{}",
                "x".repeat(3_000_000)
            ),
            "400",
        ),
        (
            format!(
                "POST /elsewhere HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 3000000\r\n\r\n{}",
                "x".repeat(3_000_000)
            ),
            "404",
        ),
    ] {
        for _ in 0..5 {
            let stream = proxy.connect(&[]).await;
            let (mut reading, mut writing) = tokio::io::split(stream);
            // All of it can be sent, and the answer read only then, as simple clients do.
            writing.write_all(request.as_bytes()).await.unwrap();
            writing.flush().await.unwrap();
            let seen = everything(&mut reading).await;
            assert_eq!(seen.get(9..12), Some(expected), "{seen}");
            assert!(seen.ends_with('}') && seen.contains("Status"), "{seen}");
        }
    }
    eventually("connections end", || proxy.metrics.connections.get() == 0).await;
}

#[tokio::test]
async fn every_request_on_a_connection_is_looked_at() {
    let proxy = Running::start(&mirror()).await;
    let workload = "/api/v1/namespaces/a/services/b/proxy";
    for (second, code, message) in [
        (
            "GET /clusters/a/api?\"x\" HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n",
            "400",
            "percent-encoded",
        ),
        (
            "GET /clusters/a/api HTTP/1.1\r\nhost : 127.0.0.1\r\n\r\n",
            "400",
            "token",
        ),
        (
            "GET /clusters/a/api HTTP/1.1\nhost: 127.0.0.1\n\n",
            "400",
            "carriage return",
        ),
        (
            "CONNECT a:1 HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n",
            "405",
            "CONNECT",
        ),
    ] {
        let mut stream = proxy.connect(&[]).await;
        let first = "POST /clusters/a/api HTTP/1.1\r\nhost: 127.0.0.1\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n";
        stream
            .write_all(format!("{first}{second}").as_bytes())
            .await
            .unwrap();
        let seen = everything(&mut stream).await;
        assert!(
            seen.starts_with("HTTP/1.1 200 ") && seen.contains("hello"),
            "{seen}"
        );
        let rest = &seen[seen.rfind("HTTP/1.1 ").unwrap()..];
        assert_eq!(rest.get(9..12), Some(code), "{rest}");
        assert!(rest.contains(message), "{rest}");
    }
    let mut stream = proxy.connect(&[]).await;
    for _ in 0..2 {
        let request =
            format!("GET /clusters/a{workload}/<é>?\"#\" HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut seen = String::new();
        while !seen.contains("%3C%C3%A9%3E?%22%23%22") {
            let mut piece = [0; 1024];
            let count = stream.read(&mut piece).await.unwrap();
            assert!(count > 0, "{seen}");
            seen += &String::from_utf8_lossy(&piece[..count]);
        }
    }
}

#[tokio::test]
async fn redirects_keep_the_cluster_for_who_names_it_in_the_path_only() {
    let agent = Agent::new(|_| async {
        let mut response = answer("");
        *response.status_mut() = StatusCode::FOUND;
        let to = HeaderValue::from_static("/api/v1/x/proxy/login?a=b");
        response.headers_mut().insert("location", to);
        response
    });
    let proxy = Running::start(&agent).await;
    let response = proxy.get("/clusters/prod/api/v1/x/proxy/").await;
    assert_eq!(
        response.headers()["location"],
        "/clusters/prod/api/v1/x/proxy/login?a=b"
    );
}

/// Streams what the test feeds.
fn streaming(body: crate::testing::AnyBody) -> Arc<Agent> {
    let body = Mutex::new(Some(body));
    Agent::new(move |_| {
        let body = body.lock().unwrap().take();
        async move { Response::new(body.unwrap_or_else(empty)) }
    })
}

#[tokio::test]
async fn headers_and_chunks_come_at_once() {
    for http2 in [false, true] {
        let (feed, body) = fed();
        let proxy = Running::start(&streaming(body)).await;
        let mut response = ask(&proxy, http2).await;
        for chunk in ["ADDED", "MODIFIED"] {
            feed.send(Ok(Bytes::from(chunk))).await.unwrap();
            let frame = response.frame().await.unwrap().unwrap();
            assert_eq!(frame.into_data().unwrap(), chunk);
        }
        assert_eq!(proxy.metrics.requests_in_flight.get(), 1);
        drop(feed);
        assert!(response.collect().await.unwrap().to_bytes().is_empty());
        eventually("nothing in flight", || {
            proxy.metrics.requests_in_flight.get() == 0
        })
        .await;
    }
}

async fn ask(proxy: &Running, http2: bool) -> Response<Incoming> {
    let path = "/clusters/prod/watch";
    if http2 {
        let request = Request::get(proxy.url(path)).body(empty()).unwrap();
        proxy.http2().await.send_request(request).await.unwrap()
    } else {
        proxy.get(path).await
    }
}

#[tokio::test]
async fn a_cut_is_never_a_clean_end() {
    for http2 in [false, true] {
        for by_session in [false, true] {
            let (feed, body) = fed();
            let agent = streaming(body);
            let proxy = Running::start(&agent).await;
            let mut response = ask(&proxy, http2).await;
            feed.send(Ok(Bytes::from("half"))).await.unwrap();
            response.frame().await.unwrap().unwrap();
            if by_session {
                agent.cut();
            } else {
                feed.send(Err(io::ErrorKind::ConnectionReset.into()))
                    .await
                    .unwrap();
            }
            let end = response.frame().await;
            assert!(
                matches!(end, Some(Err(_))),
                "http2 {http2} session {by_session}: {end:?}"
            );
        }
    }
}

#[tokio::test]
async fn an_upload_that_is_cut_is_cut_at_the_cluster_too() {
    let (report, mut reported) = tokio::sync::mpsc::unbounded_channel();
    let agent = Agent::new(move |request: Request<Incoming>| {
        let report = report.clone();
        async move {
            let whole = request.into_body().collect().await.is_ok();
            report.send(whole).unwrap();
            answer("")
        }
    });
    let proxy = Running::start(&agent).await;
    let mut stream = proxy.connect(&[]).await;
    stream
        .write_all(b"POST /clusters/a/x HTTP/1.1\r\nhost: 127.0.0.1\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n")
        .await
        .unwrap();
    eventually("it is forwarded", || {
        proxy.metrics.requests_in_flight.get() == 1
    })
    .await;
    drop(stream);
    // Either the agent sees the cut, or its handler is dropped before it can: both are no end.
    tokio::select! {
        whole = reported.recv() => assert_ne!(whole, Some(true)),
        () = eventually("the request is gone", || proxy.metrics.requests_in_flight.get() == 0) => {}
    }
    assert!(reported.try_recv() != Ok(true));
}

/// Grants upgrades and echoes; refuses on `/refuse`.
fn echo(seen: Arc<Mutex<Vec<String>>>) -> Arc<Agent> {
    Agent::new(move |mut request: Request<Incoming>| {
        let seen = seen.clone();
        async move {
            let mut head = format!("{} {}", request.method(), request.uri());
            for (name, value) in request.headers() {
                head += &format!("\n{name}: {}", value.to_str().unwrap());
            }
            seen.lock().unwrap().push(head);
            if request.uri().path() == "/refuse" {
                let mut response = answer("no websocket here");
                *response.status_mut() = StatusCode::FORBIDDEN;
                response
                    .headers_mut()
                    .insert("x-why", HeaderValue::from_static("spdy"));
                return response;
            }
            if request.headers().get(header::UPGRADE).is_none() {
                return answer("plain");
            }
            let mut response = answer("");
            *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
            for name in [header::UPGRADE, header::CONNECTION] {
                let value = request.headers()[&name].clone();
                response.headers_mut().insert(name, value);
            }
            response
                .headers_mut()
                .insert("sec-websocket-accept", HeaderValue::from_static("x"));
            let upgraded = hyper::upgrade::on(&mut request);
            tokio::spawn(async move {
                let io = TokioIo::new(upgraded.await.unwrap());
                let (mut read, mut write) = tokio::io::split(io);
                let _ = tokio::io::copy(&mut read, &mut write).await;
                let _ = write.shutdown().await;
            });
            response
        }
    })
}

const EXEC: &str = "POST /clusters/prod/exec?command=ls HTTP/1.1\r\nHost: 127.0.0.1\r\n\
    Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\nContent-Length: 0\r\n\
    X-Stream-Protocol-Version: v5.channel.k8s.io\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\n\r\n";

async fn head(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    String::from_utf8(head).unwrap()
}

#[tokio::test]
async fn an_upgrade_becomes_a_copy_of_bytes() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let agent = echo(seen.clone());
    let proxy = Running::start(&agent).await;
    let mut stream = proxy.connect(&[]).await;
    // Bytes sent right behind the head belong to the new protocol.
    stream
        .write_all(format!("{EXEC}early ").as_bytes())
        .await
        .unwrap();
    let head = head(&mut stream).await.to_ascii_lowercase();
    assert!(head.starts_with("http/1.1 101 "), "{head}");
    assert!(
        head.contains("upgrade: spdy/3.1\r\n") && head.contains("connection: upgrade\r\n"),
        "{head}"
    );
    assert!(head.contains("sec-websocket-accept: x\r\n"), "{head}");
    stream.write_all(b"bytes").await.unwrap();
    let mut back = [0; 11];
    stream.read_exact(&mut back).await.unwrap();
    assert_eq!(&back, b"early bytes");

    let seen = seen.lock().unwrap().join("\n");
    assert!(seen.starts_with("POST /exec?command=ls\n"), "{seen}");
    assert!(
        seen.contains("x-stream-protocol-version: v5.channel.k8s.io\nx-stream-protocol-version: v4.channel.k8s.io"),
        "{seen}"
    );
    assert_eq!(proxy.metrics.upgraded.get(), 1);
    stream.shutdown().await.unwrap();
    drop(stream);
    eventually("the copy ends", || proxy.metrics.upgraded.get() == 0).await;
    eventually("the session is given back", || {
        proxy.metrics.requests_in_flight.get() == 0 && proxy.metrics.connections.get() == 0
    })
    .await;
    // The warm spare is what is left.
    eventually("one spare", || proxy.metrics.upgrade_sessions.get() == 1).await;
}

#[tokio::test]
async fn a_refused_upgrade_passes_whole_and_ends_the_connection() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let proxy = Running::start(&echo(seen.clone())).await;
    let mut stream = proxy.connect(&[]).await;
    let request = EXEC.replace("/exec?command=ls", "/refuse");
    let behind = "GET /clusters/prod/second HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n";
    stream
        .write_all(format!("{request}{behind}").as_bytes())
        .await
        .unwrap();
    let mut all = String::new();
    // A clean end: the bytes before it are the whole answer.
    stream.read_to_string(&mut all).await.unwrap();
    let lower = all.to_ascii_lowercase();
    assert!(lower.starts_with("http/1.1 403 "), "{all}");
    assert!(
        lower.contains("x-why: spdy\r\n") && lower.contains("connection: close\r\n"),
        "{all}"
    );
    assert!(lower.contains("no websocket here"), "{all}");
    let seen = seen.lock().unwrap();
    assert_eq!(
        seen.len(),
        1,
        "the request behind it was forwarded: {seen:?}"
    );
}

#[tokio::test]
async fn a_cluster_that_is_used_has_one_warm_spare() {
    let agent = echo(Arc::default());
    let proxy = Running::start(&agent).await;
    assert_eq!(read(proxy.get("/clusters/prod/api").await).await.1, "plain");
    eventually("a spare after a plain request", || {
        proxy.proxy.sessions.counts("prod").1
    })
    .await;
    assert_eq!(agent.upgrade_dials.load(Ordering::SeqCst), 1);

    let mut stream = proxy.connect(&[]).await;
    stream.write_all(EXEC.as_bytes()).await.unwrap();
    assert!(head(&mut stream).await.contains("101"));
    eventually("the next spare", || proxy.proxy.sessions.counts("prod").1).await;
    assert_eq!(
        agent.upgrade_dials.load(Ordering::SeqCst),
        2,
        "the first one was used"
    );
}

#[tokio::test]
async fn a_dead_spare_costs_the_request_nothing() {
    let agent = echo(Arc::default());
    let proxy = Running::start(&agent).await;
    read(proxy.get("/clusters/prod/api").await).await;
    eventually("a spare", || proxy.proxy.sessions.counts("prod").1).await;
    agent.cut();
    let mut stream = proxy.connect(&[]).await;
    stream.write_all(EXEC.as_bytes()).await.unwrap();
    assert!(head(&mut stream).await.contains("101"));
}

#[tokio::test]
async fn requests_outlive_a_session_that_closes_between_them() {
    let agent = mirror();
    let proxy = Running::start(&agent).await;
    let mut client = proxy.http2().await;
    for round in 0..6 {
        let request = Request::post(proxy.url("/clusters/prod/api"))
            .body(text("x"))
            .unwrap();
        let response = client.send_request(request).await.unwrap();
        assert_eq!(read(response).await.0, 200, "round {round}");
        if round % 2 == 0 {
            agent.drain()
        } else {
            agent.cut()
        }
    }
    eventually("closed sessions are gone", || {
        proxy.metrics.api_sessions.get() <= 1
    })
    .await;
}

#[tokio::test]
async fn a_request_that_a_session_did_not_look_at_is_sent_again() {
    let agent = mirror();
    let proxy = Running::start(&agent).await;
    agent.ending.store(1, Ordering::SeqCst);
    let (status, _) = read(proxy.get("/clusters/prod/api").await).await;
    assert_eq!(status, 200);
    assert_eq!(agent.api_dials.load(Ordering::SeqCst), 2);
    // What only reads is sent as often as it takes for a while,
    agent.ending.store(2, Ordering::SeqCst);
    agent.cut();
    let (status, answer) = read(proxy.get("/clusters/prod/api").await).await;
    assert_eq!(status, 200, "{answer}");
    // and all else once more, and no more.
    agent.ending.store(2, Ordering::SeqCst);
    agent.cut();
    let mut client = proxy.http2().await;
    let request = Request::post(proxy.url("/clusters/prod/api/v1/namespaces"));
    let request = request.body(text("x")).unwrap();
    let (status, answer) = read(client.send_request(request).await.unwrap()).await;
    assert_eq!(status, 503, "{answer}");
}

#[tokio::test]
async fn a_new_carrier_gets_the_new_requests_and_the_old_session_finishes() {
    let (feed, body) = fed();
    let agent = streaming(body);
    let proxy = Running::start(&agent).await;
    let mut watch = ask(&proxy, false).await;
    agent.epoch.fetch_add(1, Ordering::SeqCst);
    assert_eq!(read(ask(&proxy, false).await).await.0, 200);
    assert_eq!(agent.api_dials.load(Ordering::SeqCst), 2);
    feed.send(Ok(Bytes::from("late"))).await.unwrap();
    assert_eq!(
        watch.frame().await.unwrap().unwrap().into_data().unwrap(),
        "late"
    );
    drop(feed);
    assert!(watch.frame().await.is_none());
    eventually("the old session ends with its last stream", || {
        proxy.metrics.api_sessions.get() == 1
    })
    .await;
}

#[tokio::test]
async fn many_streams_open_a_second_session_before_the_first_is_full() {
    let started = Arc::new(AtomicUsize::new(0));
    let (go, gate) = tokio::sync::watch::channel(false);
    let agent = Agent::new({
        let started = started.clone();
        move |_| {
            started.fetch_add(1, Ordering::SeqCst);
            let mut gate = gate.clone();
            async move {
                gate.wait_for(|open| *open).await.unwrap();
                answer("")
            }
        }
    });
    let proxy = Running::start(&agent).await;
    let client = proxy.http2().await;
    let answers: Vec<_> = (0..250)
        .map(|_| {
            let request = Request::get(proxy.url("/clusters/prod/api"))
                .body(empty())
                .unwrap();
            let mut client = client.clone();
            tokio::spawn(async move { client.send_request(request).await.unwrap().status() })
        })
        .collect();
    eventually("all are at the agent", || {
        started.load(Ordering::SeqCst) == 250
    })
    .await;
    assert_eq!(agent.api_dials.load(Ordering::SeqCst), 2);
    go.send(true).unwrap();
    for answer in answers {
        assert_eq!(answer.await.unwrap(), 200);
    }
    eventually("nothing in flight", || {
        proxy.metrics.requests_in_flight.get() == 0
    })
    .await;
}

fn refusal(code: RefusalCode) -> Failure {
    Failure::Refused {
        cluster: "prod".to_owned(),
        refusal: Refusal::new(code, ""),
    }
}

#[tokio::test]
async fn forty_at_once_share_one_failed_dial_and_all_are_told() {
    let agent = mirror();
    *agent.failure.lock().unwrap() = Some(refusal(RefusalCode::NeverConnected));
    let proxy = Running::start(&agent).await;
    let client = proxy.http2().await;
    let answers: Vec<_> = (0..40)
        .map(|_| {
            let request = Request::get(proxy.url("/clusters/prod/apis/x/y"))
                .body(empty())
                .unwrap();
            let mut client = client.clone();
            tokio::spawn(async move { read(client.send_request(request).await.unwrap()).await })
        })
        .collect();
    for answer in answers {
        let (status, body) = answer.await.unwrap();
        assert_eq!(status, 503);
        assert!(
            body.contains("never connected") && body.contains(r#""kind":"Status""#),
            "{body}"
        );
    }
    let dials = agent.api_dials.load(Ordering::SeqCst);
    assert!(dials <= 3, "{dials} dials");

    // And it is over as soon as the cluster is back.
    *agent.failure.lock().unwrap() = None;
    assert_eq!(read(proxy.get("/clusters/prod/api").await).await.0, 200);
}

#[tokio::test]
async fn an_upgrade_that_cannot_be_forwarded_is_told_as_a_status_too() {
    let agent = mirror();
    *agent.failure.lock().unwrap() = Some(refusal(RefusalCode::NotAllowed));
    let proxy = Running::start(&agent).await;
    let mut stream = proxy.connect(&[]).await;
    stream.write_all(EXEC.as_bytes()).await.unwrap();
    let all = everything(&mut stream).await;
    assert!(
        all.starts_with("HTTP/1.1 403 ") && all.contains("you may not reach cluster prod"),
        "{all}"
    );
}

#[tokio::test]
async fn a_stalled_reader_holds_little_and_stops_nobody() {
    let sent = Arc::new(AtomicUsize::new(0));
    let agent = Agent::new({
        let sent = sent.clone();
        move |request: Request<Incoming>| {
            let sent = sent.clone();
            async move {
                if request.uri().path() != "/flood" {
                    return answer("quick");
                }
                let (feed, body) = fed();
                tokio::spawn(async move {
                    let chunk = Bytes::from(vec![0; 16 * 1024]);
                    while feed.send(Ok(chunk.clone())).await.is_ok() {
                        sent.fetch_add(chunk.len(), Ordering::SeqCst);
                    }
                });
                Response::new(body) as Answer
            }
        }
    });
    let proxy = Running::start(&agent).await;
    const READERS: usize = 20;
    let client = proxy.http2().await;
    let mut stalled = Vec::new();
    for _ in 0..READERS {
        let request = Request::get(proxy.url("/clusters/prod/flood"))
            .body(empty())
            .unwrap();
        stalled.push(client.clone().send_request(request).await.unwrap());
    }
    // Until nothing moves any more.
    let mut last = usize::MAX;
    while last != sent.load(Ordering::SeqCst) {
        last = sent.load(Ordering::SeqCst);
        for _ in 0..20 {
            assert_eq!(
                read(proxy.get("/clusters/prod/quick").await).await.1,
                "quick"
            );
        }
    }
    // What a reader's own kernel and HTTP/2 client hold is in this number too.
    let each = last / READERS;
    assert!(each <= 1024 * 1024 + 256 * 1024, "{each} bytes a reader");
    drop(stalled);
    drop(client);
    eventually("all is given back", || {
        proxy.metrics.requests_in_flight.get() == 0
    })
    .await;
}

#[tokio::test]
async fn a_client_that_goes_takes_its_request_with_it() {
    let (feed, body) = fed();
    let agent = streaming(body);
    let proxy = Running::start(&agent).await;
    let response = ask(&proxy, true).await;
    feed.send(Ok(Bytes::from("x"))).await.unwrap();
    drop(response);
    // Dropped at the agent: the feed has no reader.
    feed.closed().await;
    eventually("baseline", || {
        proxy.metrics.requests_in_flight.get() == 0 && proxy.metrics.connections.get() == 0
    })
    .await;
}

#[tokio::test]
async fn shutdown_lets_the_open_request_finish_and_takes_no_new_connection() {
    let (feed, body) = fed();
    let proxy = Running::start(&streaming(body)).await;
    let mut response = ask(&proxy, false).await;
    proxy.shutdown.trigger();
    feed.send(Ok(Bytes::from("last"))).await.unwrap();
    assert_eq!(
        response
            .frame()
            .await
            .unwrap()
            .unwrap()
            .into_data()
            .unwrap(),
        "last"
    );
    drop(feed);
    assert!(response.frame().await.is_none());
    eventually("the connection ends", || {
        proxy.metrics.connections.get() == 0
    })
    .await;
    assert!(TcpStream::connect(proxy.addr).await.is_err());
}

#[tokio::test]
async fn idle_sessions_are_swept() {
    let proxy = Running::start(&mirror()).await;
    read(proxy.get("/clusters/prod/api").await).await;
    eventually("a spare", || proxy.proxy.sessions.counts("prod").1).await;
    eventually("idle", || proxy.metrics.requests_in_flight.get() == 0).await;
    let sessions = &proxy.proxy.sessions;
    sessions.sweep(tokio::time::Instant::now());
    assert_eq!(sessions.counts("prod"), (1, true), "not yet");
    sessions.sweep(tokio::time::Instant::now() + Duration::from_secs(3600));
    assert_eq!(sessions.counts("prod"), (0, false));
    eventually("both have ended", || {
        proxy.metrics.api_sessions.get() == 0 && proxy.metrics.upgrade_sessions.get() == 0
    })
    .await;
}

#[tokio::test]
async fn silent_connections_make_room_for_who_shows_a_certificate() {
    let agent = mirror();
    let timing = Timing {
        handshake: Duration::from_secs(3600),
        ..Timing::default()
    };
    let proxy = Running::start_with(&agent, timing).await;
    let half_open = LoopbackLimits::default().half_open;
    let mut silent = Vec::new();
    for _ in 0..half_open + 64 {
        silent.push(TcpStream::connect(proxy.addr).await.unwrap());
    }
    let open = proxy.http1().await;
    let (status, _) = read(proxy.get("/clusters/prod/api").await).await;
    assert_eq!(status, 200);
    // The oldest have gone, and no more than those.
    let mut byte = [0];
    assert!(matches!(silent[0].read(&mut byte).await, Ok(0) | Err(_)));
    let metrics = &proxy.metrics;
    let most = i64::try_from(half_open).unwrap() + 2;
    eventually("the shed ones are gone", || {
        metrics.connections.get() <= most
    })
    .await;
    // One that has shown its certificate is no member any more, however old it is.
    for _ in 0..half_open {
        silent.push(TcpStream::connect(proxy.addr).await.unwrap());
    }
    let (status, _) = read(proxy.get("/clusters/prod/api").await).await;
    assert_eq!(status, 200);
    assert!(!open.is_closed());
}

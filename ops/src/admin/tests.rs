use super::*;
use std::{net::SocketAddr, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

const TOKEN: &str = "an admin token of thirty-two bytes";

async fn get(address: SocketAddr, path: &str) -> String {
    ask(address, "GET", path, "").await
}

async fn ask(address: SocketAddr, method: &str, path: &str, headers: &str) -> String {
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: {address}\r\n{headers}connection: close\r\n\r\n"
    );
    raw(address, &request).await
}

async fn raw(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

struct Listening {
    address: SocketAddr,
    drained: Shutdown,
    trigger: crate::ShutdownTrigger,
    server: tokio::task::JoinHandle<io::Result<()>>,
}

async fn listening(registry: Registry, readiness: Readiness) -> Listening {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (drain, drained) = Shutdown::new();
    let drain = std::sync::Arc::new(drain);
    let (trigger, shutdown) = Shutdown::new();
    let server = tokio::spawn(run_with_drain(
        listener,
        registry,
        readiness,
        DrainToken::new(TOKEN),
        move || drain.trigger(),
        shutdown,
    ));
    Listening {
        address,
        drained,
        trigger,
        server,
    }
}

#[tokio::test]
async fn answers_and_stops() {
    let registry = Registry::new();
    let counter = prometheus::IntCounter::new("throwline_test_total", "a test").unwrap();
    registry.register(Box::new(counter)).unwrap();
    let readiness = Readiness::new();
    let condition = readiness.condition("listening");
    let this = listening(registry, readiness).await;
    let address = this.address;

    assert!(get(address, "/healthz").await.starts_with("HTTP/1.1 200"));
    let answer = get(address, "/readyz").await;
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("listening: not yet"));
    condition.ready();
    assert!(get(address, "/readyz").await.starts_with("HTTP/1.1 200"));
    let metrics = get(address, "/metrics").await;
    assert!(metrics.contains("throwline_test_total 0"), "{metrics}");
    assert!(metrics.contains("\nthrowline_tasks "), "{metrics}");
    assert!(get(address, "/else").await.starts_with("HTTP/1.1 404"));

    // A scraper that stays does not hold the process.
    let mut open = TcpStream::connect(address).await.unwrap();
    this.trigger.trigger();
    let ended = tokio::time::timeout(Duration::from_secs(10), this.server).await;
    ended.unwrap().unwrap().unwrap();
    assert_eq!(open.read(&mut [0; 1]).await.unwrap_or(0), 0);
}

#[tokio::test]
async fn a_post_with_the_token_drains_and_nothing_else_does() {
    let this = listening(Registry::new(), Readiness::new()).await;
    let token = format!("authorization: Bearer {TOKEN}\r\n");
    let form = "content-type: application/x-www-form-urlencoded\r\ncontent-length: 0\r\n";
    for (method, headers, status) in [
        ("GET", token.clone(), 405),
        ("POST", String::new(), 401),
        ("POST", "authorization: Bearer wrong\r\n".to_owned(), 401),
        // A form of another site, as a browser sends it.
        (
            "POST",
            format!("origin: https://evil.example\r\n{form}"),
            403,
        ),
        ("POST", format!("origin: null\r\n{token}{form}"), 403),
    ] {
        let answer = ask(this.address, method, "/drain", &headers).await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status}")),
            "{headers} {answer}"
        );
        assert!(!this.drained.is_requested(), "{headers}");
    }
    for _ in 0..2 {
        let answer = ask(this.address, "POST", "/drain", &token).await;
        assert!(answer.starts_with("HTTP/1.1 202"), "{answer}");
    }
    assert!(this.drained.is_requested());
}

#[tokio::test]
async fn a_name_that_was_made_to_resolve_here_gets_no_answer() {
    let this = listening(Registry::new(), Readiness::new()).await;
    for path in ["/metrics", "/readyz", "/healthz"] {
        for host in ["evil.example", "127.0.0.1.evil.example:9000", ""] {
            let request =
                format!("GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
            let answer = raw(this.address, &request).await;
            assert!(
                !answer.starts_with("HTTP/1.1 200"),
                "{path} {host} {answer}"
            );
            assert!(!answer.contains("throwline_tasks"), "{answer}");
        }
    }
}

#[tokio::test]
async fn strangers_who_hold_connections_keep_nobody_out() {
    let this = listening(Registry::new(), Readiness::new()).await;
    let mut held = Vec::new();
    for number in 0..300 {
        let mut stream = TcpStream::connect(this.address).await.unwrap();
        // Some say nothing, some never come to the end of a head.
        if number % 2 == 0 {
            let _ = stream.write_all(b"GET /healthz HTTP/1.1\r\nhost: x").await;
        }
        held.push(stream);
    }
    let answer = get(this.address, "/healthz").await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    // The oldest are gone.
    let mut byte = [0; 1];
    let read = held[0].read(&mut byte);
    let read = tokio::time::timeout(Duration::from_secs(10), read)
        .await
        .unwrap();
    assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
}

#[tokio::test(start_paused = true)]
async fn a_head_that_never_ends_has_ten_seconds() {
    let this = listening(Registry::new(), Readiness::new()).await;
    let mut stream = TcpStream::connect(this.address).await.unwrap();
    stream
        .write_all(b"GET /healthz HTTP/1.1\r\nhost: x")
        .await
        .unwrap();
    let start = tokio::time::Instant::now();
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest).await;
    assert!(
        start.elapsed() <= Duration::from_secs(11),
        "{:?}",
        start.elapsed()
    );
    let text = String::from_utf8_lossy(&rest);
    assert!(
        text.is_empty() || text.starts_with("HTTP/1.1 408"),
        "{text}"
    );
}

#[tokio::test]
async fn a_huge_head_is_refused() {
    let this = listening(Registry::new(), Readiness::new()).await;
    let mut stream = TcpStream::connect(this.address).await.unwrap();
    let head = format!(
        "GET /healthz HTTP/1.1\r\nhost: x\r\nx: {}\r\n\r\n",
        "x".repeat(64 * 1024)
    );
    // It may close before it was sent all of it.
    let _ = stream.write_all(head.as_bytes()).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    let answer = String::from_utf8_lossy(&answer);
    assert!(
        answer.is_empty() || answer.starts_with("HTTP/1.1 431"),
        "{answer}"
    );
}

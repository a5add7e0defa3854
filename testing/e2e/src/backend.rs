//! An API server that does what a test tells it, and keeps every head that it was sent.
//!
//! It stands behind a real agent where the story is about bytes: large bodies, cut ones, what an
//! API server must never see.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use bytes::Bytes;
use futures::stream;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;

use crate::free_address;
use crate::pki::Authority;

type Body = BoxBody<Bytes, std::io::Error>;

/// One request's head, as it arrived.
#[derive(Debug, Clone)]
pub struct Head {
    pub method: String,
    pub path: String,
    pub headers: Vec<(String, String)>,
}

impl Head {
    /// All values of a header.
    pub fn all(&self, name: &str) -> Vec<&str> {
        self.headers
            .iter()
            .filter(|(header, _)| header == name)
            .map(|(_, value)| value.as_str())
            .collect()
    }
}

#[derive(Default)]
struct Seen {
    heads: Mutex<Vec<Head>>,
    uploaded: AtomicU64,
}

pub struct Backend {
    pub kubeconfig: PathBuf,
    pub address: SocketAddr,
    seen: Arc<Seen>,
    task: JoinHandle<()>,
}

/// Where an upgrade is granted, and input is sent back.
pub const ECHO: &str = "/test/echo";
/// The bearer token by which an agent reaches it.
pub const TOKEN: &str = "the-agents-own-token";

impl Backend {
    pub async fn start(dir: &Path) -> Result<Self> {
        let authority = Authority::new("test API server")?;
        let acceptor = TlsAcceptor::from(authority.server_config(&[b"h2", b"http/1.1"])?);
        // A story may drop this and go on with its address, which must have no listener then.
        let listener = TcpListener::bind(free_address()?).await?;
        let address = listener.local_addr()?;
        let ca_file = dir.join("backend-ca.pem");
        std::fs::write(&ca_file, authority.pem())?;
        let kubeconfig = dir.join("backend.kubeconfig");
        let config = serde_json::json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "backend",
            "clusters": [{"name": "backend", "cluster": {
                "server": format!("https://127.0.0.1:{}", address.port()),
                "certificate-authority": ca_file,
            }}],
            "users": [{"name": "agent", "user": {"token": TOKEN}}],
            "contexts": [{"name": "backend", "context": {"cluster": "backend", "user": "agent"}}],
        });
        std::fs::write(&kubeconfig, config.to_string())?;
        let seen = Arc::new(Seen::default());
        let shared = seen.clone();
        let task = tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let (acceptor, seen) = (acceptor.clone(), shared.clone());
                tokio::spawn(async move {
                    let _ = tcp.set_nodelay(true);
                    let Ok(tls) = acceptor.accept(tcp).await else {
                        return;
                    };
                    let service =
                        service_fn(move |request| answer(seen.clone(), address.port(), request));
                    let builder = auto::Builder::new(TokioExecutor::new());
                    // A client that goes away is what some stories are about.
                    let _ = builder
                        .serve_connection_with_upgrades(TokioIo::new(tls), service)
                        .await;
                });
            }
        });
        Ok(Self {
            kubeconfig,
            address,
            seen,
            task,
        })
    }

    /// The heads of requests below this path, oldest first.
    pub fn heads(&self, path: &str) -> Vec<Head> {
        let heads = self
            .seen
            .heads
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        heads
            .iter()
            .filter(|head| head.path.starts_with(path))
            .cloned()
            .collect()
    }

    /// Bytes of bodies received so far.
    pub fn uploaded(&self) -> u64 {
        self.seen.uploaded.load(Ordering::Relaxed)
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn answer(
    seen: Arc<Seen>,
    port: u16,
    request: Request<Incoming>,
) -> Result<Response<Body>, Infallible> {
    let text = |value: &http::HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    let head = Head {
        method: request.method().to_string(),
        path: request
            .uri()
            .path_and_query()
            .map(ToString::to_string)
            .unwrap_or_default(),
        headers: request
            .headers()
            .iter()
            .map(|(name, value)| (name.to_string(), text(value)))
            .collect(),
    };
    seen.heads
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push(head);
    if request.uri().path() == ECHO {
        return Ok(echo(request));
    }
    let (parts, mut body) = request.into_parts();
    let path = parts.uri.path().to_owned();
    let number = path
        .rsplit('/')
        .next()
        .and_then(|last| last.parse::<u64>().ok())
        .unwrap_or(0);
    Ok(match path.split('/').nth(2) {
        // /test/bytes/N: N bytes.
        Some("bytes") => respond(StatusCode::OK, endless(number, None)),
        // /test/numbered/N: N lines of 16 bytes that count.
        Some("numbered") => respond(StatusCode::OK, numbered(number)),
        // /test/cut/N: promises more, and breaks off after N bytes.
        Some("cut") => respond(StatusCode::OK, endless(u64::MAX, Some(number))),
        // /test/upload: takes all, and returns how much it was.
        Some("upload") => {
            let mut total = 0;
            while let Some(Ok(frame)) = body.frame().await {
                let length = frame.data_ref().map_or(0, |data| data.len() as u64);
                total += length;
                seen.uploaded.fetch_add(length, Ordering::Relaxed);
            }
            let text = serde_json::json!({"kind": "Status", "apiVersion": "v1", "message": total.to_string()});
            respond(StatusCode::CREATED, full(text.to_string()))
        }
        // /test/refuse-upgrade: an answer that is no 101, with nothing behind it.
        Some("refuse-upgrade") => respond(StatusCode::FORBIDDEN, full("no".to_owned())),
        _ if path == "/version" => respond(
            StatusCode::OK,
            full(r#"{"major":"1","minor":"36","gitVersion":"v1.36.0-backend"}"#.to_owned()),
        ),
        // What tells this cluster from others.
        _ if path == "/api/v1/namespaces/kube-system" => respond(
            StatusCode::OK,
            full(format!(r#"{{"metadata":{{"uid":"backend-{port}"}}}}"#)),
        ),
        _ => respond(StatusCode::OK, full("{}".to_owned())),
    })
}

/// Switches to whatever is asked for, and echoes its input until the client ends.
fn echo(mut request: Request<Incoming>) -> Response<Body> {
    let protocol = request.headers().get(http::header::UPGRADE).cloned();
    let Some(protocol) = protocol else {
        return respond(
            StatusCode::BAD_REQUEST,
            full("an upgrade is wanted".to_owned()),
        );
    };
    tokio::spawn(async move {
        if let Ok(upgraded) = hyper::upgrade::on(&mut request).await {
            let (mut read, mut write) = tokio::io::split(TokioIo::new(upgraded));
            // A client that goes away is its end.
            let _ = tokio::io::copy(&mut read, &mut write).await;
        }
    });
    let mut response = Response::new(full(String::new()));
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    let upgrade = http::HeaderValue::from_static("Upgrade");
    headers.insert(http::header::CONNECTION, upgrade);
    headers.insert(http::header::UPGRADE, protocol);
    response
}

fn respond(status: StatusCode, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let json = http::HeaderValue::from_static("application/json");
    response
        .headers_mut()
        .insert(http::header::CONTENT_TYPE, json);
    response
}

fn full(text: String) -> Body {
    Full::new(Bytes::from(text))
        .map_err(|never| match never {})
        .boxed()
}

/// `total` lines, each its own number in 15 hexadecimal digits: what is missing, double or elsewhere
/// shows.
fn numbered(total: u64) -> Body {
    const LINES: u64 = 2048;
    let pieces = stream::unfold(0u64, move |sent| async move {
        let end = total.min(sent + LINES);
        if sent == end {
            return None;
        }
        let text: String = (sent..end).map(|line| format!("{line:015x}\n")).collect();
        let frame = Frame::data(Bytes::from(text));
        Some((Ok::<_, std::io::Error>(frame), end))
    });
    BodyExt::boxed(StreamBody::new(pieces))
}

/// `total` bytes in pieces, made as they are taken; with `cut`, an error after so many.
fn endless(total: u64, cut: Option<u64>) -> Body {
    const PIECE: u64 = 32 * 1024;
    let piece = Bytes::from(vec![b'x'; 32 * 1024]);
    let pieces = stream::try_unfold(0u64, move |sent| {
        let piece = piece.clone();
        async move {
            if cut.is_some_and(|cut| sent >= cut) {
                return Err(std::io::Error::other("cut by the test"));
            }
            let left = total - sent;
            if left == 0 {
                return Ok(None);
            }
            let length = left.min(PIECE);
            let data = piece.slice(..usize::try_from(length).unwrap_or(0));
            Ok(Some((Frame::data(data), sent + length)))
        }
    });
    BodyExt::boxed(StreamBody::new(pieces))
}

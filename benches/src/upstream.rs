//! The upstream of every measurement: a small HTTPS server that stands where an API server
//! would, in a separate process so that its work is not counted as the tunnel's.
//!
//! `/bytes/N` is N bytes, `/upload` the number of bytes that came, and an upgraded request is an
//! echo, as `kubectl exec -i -- cat` would be.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use anyhow::Context as _;
use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Either, Full};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use crate::client::yardstick;

/// One allocation serves every chunk of every bulk answer.
static CHUNK: [u8; 64 * 1024] = [0x5a; 64 * 1024];

/// What a client must know to reach the upstream.
#[derive(serde::Serialize, serde::Deserialize)]
pub(crate) struct Address {
    pub(crate) addr: SocketAddr,
    pub(crate) ca_pem: String,
}

/// Serves until the process is stopped; prints its [`Address`] as one line of JSON first.
pub(crate) async fn serve() -> anyhow::Result<()> {
    let key = rcgen::generate_simple_self_signed(vec!["127.0.0.1".into(), "localhost".into()])?;
    let mut tls = rustls::ServerConfig::builder_with_provider(yardstick())
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(
            vec![key.cert.der().clone()],
            rustls::pki_types::PrivatePkcs8KeyDer::from(key.signing_key.serialize_der()).into(),
        )?;
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(tls));
    let listener = TcpListener::bind("127.0.0.1:0")
        .await
        .context("cannot bind the upstream")?;
    let address = Address {
        addr: listener.local_addr()?,
        ca_pem: key.cert.pem(),
    };
    println!("{}", serde_json::to_string(&address)?);
    loop {
        let (tcp, _) = listener.accept().await?;
        tcp.set_nodelay(true)?;
        let acceptor = acceptor.clone();
        tokio::spawn(async move {
            let Ok(tls) = acceptor.accept(tcp).await else {
                return;
            };
            let mut server = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
            server
                .http2()
                .initial_stream_window_size(1 << 20)
                .initial_connection_window_size(16 << 20)
                .max_frame_size(256 * 1024);
            // A client that goes away in the middle is how some measurements end.
            let _ = server
                .serve_connection_with_upgrades(
                    TokioIo::new(tls),
                    hyper::service::service_fn(answer),
                )
                .await;
        });
    }
}

type Answer = Either<Full<Bytes>, Bulk>;

async fn answer(request: Request<Incoming>) -> Result<Response<Answer>, Infallible> {
    if let Some(protocol) = request.headers().get(header::UPGRADE).cloned() {
        return Ok(echo(request, protocol));
    }
    let (head, mut body) = request.into_parts();
    let mut received = 0_u64;
    while let Some(Ok(frame)) = body.frame().await {
        received += frame.data_ref().map_or(0, |data| data.len() as u64);
    }
    let path = head.uri.path();
    let size = path
        .strip_prefix("/bytes/")
        .and_then(|n| n.parse::<u64>().ok());
    let answer = match (path, size) {
        (_, Some(size)) => Response::new(Either::Right(Bulk { left: size })),
        ("/upload", _) => Response::new(Either::Left(Full::new(Bytes::from(received.to_string())))),
        ("/version", _) => Response::new(Either::Left(Full::new(Bytes::from_static(
            br#"{"major":"1","minor":"36","gitVersion":"v1.36.0-bench"}"#,
        )))),
        _ => {
            let mut missing = Response::new(Either::Left(Full::default()));
            *missing.status_mut() = StatusCode::NOT_FOUND;
            missing
        }
    };
    Ok(answer)
}

/// Switches, and sends back whatever it receives.
fn echo(request: Request<Incoming>, protocol: HeaderValue) -> Response<Answer> {
    tokio::spawn(async move {
        let Ok(upgraded) = hyper::upgrade::on(request).await else {
            return;
        };
        let (mut from, mut to) = tokio::io::split(TokioIo::new(upgraded));
        // It ends as its client does.
        let _ = tokio::io::copy(&mut from, &mut to).await;
    });
    let mut switching = Response::new(Either::Left(Full::default()));
    *switching.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = switching.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::UPGRADE, protocol);
    switching
}

/// A body of so many bytes, made as it is sent.
struct Bulk {
    left: u64,
}

impl Body for Bulk {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.left == 0 {
            return Poll::Ready(None);
        }
        let take = self.left.min(CHUNK.len() as u64);
        self.left -= take;
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(
            &CHUNK[..take as usize],
        )))))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

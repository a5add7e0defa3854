//! The listener: TLS, then HTTP/1.1 or HTTP/2 as the client prefers.

use std::{convert::Infallible, sync::Arc, time::Duration};

use http::{HeaderName, Request, Response};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use rustls::ServerConfig;
use throwline_kube_wire::http1::{
    gate::{Allowance, Gate, Permit},
    head::{self, HeadError},
};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use crate::{
    Cluster,
    access::User,
    api, pki,
    status::{Body, bytes_response},
};

/// A client that does not finish its handshake or its headers by then is dropped.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// A client may choose it; the API server tells it in the answer.
const AUDIT_ID: HeaderName = HeaderName::from_static("audit-id");

pub(crate) async fn run(cluster: Arc<Cluster>, listener: TcpListener, tls: Arc<ServerConfig>) {
    let acceptor = TlsAcceptor::from(tls);
    loop {
        let accepted = tokio::select! {
            () = cluster.stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                let connection = serve(Arc::clone(&cluster), acceptor.clone(), stream);
                let stop = cluster.stop.clone();
                cluster.tasks.spawn(async move {
                    tokio::select! { () = stop.cancelled() => {}, () = connection => {} }
                });
            }
            Err(error) => {
                // No descriptors, most likely: the ones in use must end before the next accept can work.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn serve(cluster: Arc<Cluster>, acceptor: TlsAcceptor, stream: TcpStream) {
    // Only speeds things up; a socket that refuses it still works.
    let _ = stream.set_nodelay(true);
    let tls = match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
        Ok(Ok(tls)) => tls,
        Ok(Err(error)) => return tracing::debug!(%error, "tls handshake failed"),
        Err(_) => return tracing::debug!("tls handshake took too long"),
    };
    let certificates = tls.get_ref().1.peer_certificates();
    let user = certificates
        .and_then(|chain| chain.first())
        .and_then(pki::user_of)
        .map(Arc::new);

    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HANDSHAKE);
    // Windows and streams as the real API server announces them, with room for large uploads.
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(250)
        .initial_stream_window_size(256 << 10)
        .initial_connection_window_size(1 << 20)
        .max_send_buf_size(256 << 10);
    // Targets of 1 MiB, as the real one takes them, which hyper does not.
    let gate = match tls.get_ref().1.alpn_protocol() {
        Some(b"h2") => Gate::open(tls),
        _ => {
            builder
                .http1()
                .max_buf_size(2 * head::MAX)
                .max_headers(head::MAX_HEADERS);
            let mut gate = Gate::new(tls, |_| 0, Arc::new(Anybody));
            if gate.first(HANDSHAKE, HANDSHAKE).await.is_err() {
                return;
            }
            gate
        }
    };
    let notes = gate.notes();
    let service = service_fn(move |mut request: Request<Incoming>| {
        let note = notes.take();
        if let Some(long) = note.target {
            request.extensions_mut().insert(long);
        }
        respond(Arc::clone(&cluster), user.clone(), request, note.refused)
    });
    if let Err(error) = builder
        .serve_connection_with_upgrades(TokioIo::new(gate), service)
        .await
    {
        tracing::debug!(error, "connection ended");
    }
}

/// Each client may send large heads: there is one user here.
struct Anybody;

impl Allowance for Anybody {
    fn admit(&self) -> Option<Permit> {
        Some(Arc::new(()))
    }
}

async fn respond(
    cluster: Arc<Cluster>,
    user: Option<Arc<User>>,
    request: Request<Incoming>,
    refused: Option<HeadError>,
) -> Result<Response<Body>, Infallible> {
    if let Some(error) = refused {
        let text = error.to_string().into();
        let response = bytes_response(error.status().as_u16(), "text/plain", text);
        return Ok(response);
    }
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let audit_id = request.headers().get(AUDIT_ID).cloned();
    let mut response = match api::handle(&cluster, user.as_deref(), request).await {
        Ok(response) => response,
        Err(failure) => failure.into_response(),
    };
    if let Some(id) = audit_id {
        response.headers_mut().insert(AUDIT_ID, id);
    }
    tracing::debug!(%method, path, status = response.status().as_u16(), "answered");
    Ok(response)
}

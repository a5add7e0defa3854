//! The listener: TLS, then HTTP/1.1 or HTTP/2 as the client prefers.

use std::{convert::Infallible, sync::Arc, time::Duration};

use http::{Request, Response};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use rustls::ServerConfig;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use crate::{Cluster, access::User, api, pki, status::Body};

/// A client that does not finish its handshake or its headers by then is dropped.
const HANDSHAKE: Duration = Duration::from_secs(10);

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
    let service = service_fn(move |request| respond(Arc::clone(&cluster), user.clone(), request));
    if let Err(error) = builder
        .serve_connection_with_upgrades(TokioIo::new(tls), service)
        .await
    {
        tracing::debug!(error, "connection ended");
    }
}

async fn respond(
    cluster: Arc<Cluster>,
    user: Option<Arc<User>>,
    request: Request<Incoming>,
) -> Result<Response<Body>, Infallible> {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let response = match api::handle(&cluster, user.as_deref(), request).await {
        Ok(response) => response,
        Err(failure) => failure.into_response(),
    };
    tracing::debug!(%method, path, status = response.status().as_u16(), "answered");
    Ok(response)
}

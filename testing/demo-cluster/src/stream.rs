//! Upgraded requests: exec, attach and port-forward, over SPDY/3.1 and over WebSocket.

mod connection;
mod exec;
mod forward;
mod remote;
mod sockets;
mod transport;

use std::sync::Arc;

use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use throwline_kube_wire::headers::{Upgrade, set_upgrade};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use crate::{
    Cluster,
    api::Call,
    status::{Body, Failure, full},
};
use transport::Io;

const STREAM_PROTOCOL: HeaderName = HeaderName::from_static("x-stream-protocol-version");
const ACCEPTED: HeaderName = HeaderName::from_static("x-accepted-stream-protocol-versions");

pub(crate) async fn serve(
    cluster: &Arc<Cluster>,
    call: &Call,
    mut request: Request<Incoming>,
) -> Result<Response<Body>, Failure> {
    let upgrade = upgrade_of(request.headers())?;
    let forward = call.target.subresource() == "portforward";
    let supported: &[&str] = match (forward, upgrade) {
        (true, Upgrade::Spdy) => &["portforward.k8s.io"],
        (true, Upgrade::WebSocket) => &["SPDY/3.1+portforward.k8s.io", "v4.channel.k8s.io"],
        (false, Upgrade::Spdy) => &[
            "v4.channel.k8s.io",
            "v3.channel.k8s.io",
            "v2.channel.k8s.io",
            "channel.k8s.io",
        ],
        (false, Upgrade::WebSocket) => {
            &["v5.channel.k8s.io", "v4.channel.k8s.io", "channel.k8s.io"]
        }
    };
    let offered = match upgrade {
        Upgrade::Spdy => list(request.headers(), &STREAM_PROTOCOL),
        Upgrade::WebSocket => list(request.headers(), &header::SEC_WEBSOCKET_PROTOCOL),
    };
    let Some(protocol) = choose(&offered, supported, upgrade) else {
        return Ok(no_protocol(upgrade, &offered, supported));
    };
    // Everything that can be refused is refused before the protocol changes.
    let job = if forward {
        Job::Forward(forward::prepare(cluster, call)?)
    } else {
        Job::Command(exec::prepare(cluster, call)?)
    };

    let mut response = Response::new(full(bytes::Bytes::new()));
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    set_upgrade(headers, upgrade);
    let chosen = HeaderValue::from_static(protocol);
    match upgrade {
        Upgrade::Spdy => {
            headers.insert(STREAM_PROTOCOL, chosen);
        }
        Upgrade::WebSocket => {
            let key = request.headers().get(header::SEC_WEBSOCKET_KEY);
            let key = key.ok_or_else(|| Failure::bad_request("Sec-WebSocket-Key is missing"))?;
            let accept = HeaderValue::from_str(&derive_accept_key(key.as_bytes()));
            let accept =
                accept.map_err(|_| Failure::bad_request("Sec-WebSocket-Key is not valid"))?;
            headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
            if !offered.is_empty() {
                headers.insert(header::SEC_WEBSOCKET_PROTOCOL, chosen);
            }
        }
    }
    let upgraded = hyper::upgrade::on(&mut request);
    let stop = cluster.stop.clone();
    let lossy = cluster.options.lossy_sockets.filter(|_| !forward);
    cluster.tasks.spawn(async move {
        let work = async move {
            match upgraded.await {
                Ok(io) => {
                    let io = Box::pin(TokioIo::new(io));
                    match lossy {
                        Some(bytes) => {
                            sockets::lossy(io, bytes, |io| job.run(upgrade, protocol, io)).await
                        }
                        None => job.run(upgrade, protocol, io).await,
                    }
                }
                Err(error) => tracing::debug!(%error, "upgrade failed"),
            }
        };
        tokio::select! { () = stop.cancelled() => {}, () = work => {} }
    });
    Ok(response)
}

enum Job {
    Command(exec::Command),
    Forward(forward::Forward),
}

impl Job {
    async fn run(self, upgrade: Upgrade, protocol: &'static str, io: Io) {
        match (self, upgrade) {
            (Self::Command(command), Upgrade::Spdy) => {
                if let Some(remote) = remote::over_spdy(io, command.streams(), protocol).await {
                    command.run(remote).await;
                }
            }
            (Self::Command(command), Upgrade::WebSocket) => {
                let remote = remote::over_websocket(io, protocol).await;
                command.run(remote).await;
            }
            (Self::Forward(forward), Upgrade::Spdy) => {
                let (source, sink) = transport::raw(io);
                forward
                    .run(connection::Connection::start(source, sink))
                    .await;
            }
            (Self::Forward(forward), Upgrade::WebSocket) if protocol == "v4.channel.k8s.io" => {
                forward.run_channels(io).await;
            }
            (Self::Forward(forward), Upgrade::WebSocket) => {
                let (source, sink) = transport::tunnelled(io).await;
                forward
                    .run(connection::Connection::start(source, sink))
                    .await;
            }
        }
    }
}

fn upgrade_of(headers: &HeaderMap) -> Result<Upgrade, Failure> {
    Upgrade::of(headers).ok_or_else(|| Failure::bad_request("Upgrade request required"))
}

/// The values of a header that may be repeated and may hold commas.
fn list(headers: &HeaderMap, name: &HeaderName) -> Vec<String> {
    let values = headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok());
    values
        .flat_map(|value| value.split(','))
        .map(|one| one.trim().to_owned())
        .filter(|one| !one.is_empty())
        .collect()
}

/// The first that the client offers and we speak; one that offers none gets the oldest.
fn choose(
    offered: &[String],
    supported: &[&'static str],
    upgrade: Upgrade,
) -> Option<&'static str> {
    if offered.is_empty() && !(upgrade == Upgrade::WebSocket && supported.len() == 2) {
        return supported.last().copied();
    }
    offered
        .iter()
        .find_map(|offer| supported.iter().find(|one| *one == offer))
        .copied()
}

fn no_protocol(upgrade: Upgrade, offered: &[String], supported: &[&'static str]) -> Response<Body> {
    let text = format!(
        "unable to upgrade: unable to negotiate protocol: client supports {offered:?}, server accepts {supported:?}"
    );
    let mut response = Response::new(full(text.into()));
    *response.status_mut() = match upgrade {
        Upgrade::Spdy => StatusCode::FORBIDDEN,
        Upgrade::WebSocket => StatusCode::BAD_REQUEST,
    };
    if upgrade == Upgrade::Spdy {
        for protocol in supported {
            response
                .headers_mut()
                .append(ACCEPTED, HeaderValue::from_static(protocol));
        }
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeated_headers_are_offers_in_order() {
        let mut headers = HeaderMap::new();
        for protocol in [
            "v5.channel.k8s.io",
            "v4.channel.k8s.io",
            "v3.channel.k8s.io",
        ] {
            headers.append(STREAM_PROTOCOL, HeaderValue::from_static(protocol));
        }
        let offered = list(&headers, &STREAM_PROTOCOL);
        let spoken = ["v4.channel.k8s.io", "v3.channel.k8s.io"];
        assert_eq!(
            choose(&offered, &spoken, Upgrade::Spdy),
            Some("v4.channel.k8s.io")
        );
        assert_eq!(choose(&["v9".to_owned()], &spoken, Upgrade::Spdy), None);
    }

    #[test]
    fn an_upgrade_must_be_asked_for_in_connection() {
        let mut headers = HeaderMap::new();
        headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
        assert!(upgrade_of(&headers).is_err());
        headers.insert(
            header::CONNECTION,
            HeaderValue::from_static("keep-alive, Upgrade"),
        );
        assert_eq!(upgrade_of(&headers).unwrap(), Upgrade::WebSocket);
    }
}

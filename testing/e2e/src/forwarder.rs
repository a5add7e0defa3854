//! An address whose far ends a story can move: a balancer's, or a database's name.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::eventually;

/// Passes TCP connections on, to its far ends in turn, past those that refuse; when it is dropped,
/// it and they end.
pub struct Forwarder {
    to: Arc<Mutex<Vec<SocketAddr>>>,
    as_many: Arc<AtomicBool>,
    _stop: DropGuard,
}

impl Forwarder {
    pub async fn start(from: SocketAddr, to: &[SocketAddr]) -> Result<Self> {
        let listener = eventually(Duration::from_secs(30), "the address is free", || async {
            Ok(TcpListener::bind(from).await?)
        })
        .await?;
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let target = Arc::new(Mutex::new(to.to_vec()));
        let now = Arc::clone(&target);
        let as_many: Arc<AtomicBool> = Arc::default();
        let disguised = Arc::clone(&as_many);
        let mut served = 0_u16;
        tokio::spawn(stop.clone().run_until_cancelled_owned(async move {
            loop {
                let mut near = match listener.accept().await {
                    Ok((near, _)) => near,
                    // Descriptors are short for a moment, or the client has gone.
                    Err(error) => {
                        eprintln!("a forwarder cannot accept: {error}");
                        tokio::time::sleep(Duration::from_millis(50)).await;
                        continue;
                    }
                };
                let to = {
                    let mut to = now.lock().unwrap_or_else(PoisonError::into_inner);
                    if !to.is_empty() {
                        to.rotate_left(1);
                    }
                    to.clone()
                };
                served = served.wrapping_add(1);
                let from = match disguised.load(Ordering::Relaxed) {
                    true => {
                        Ipv4Addr::from([127, 2, served.to_be_bytes()[0], served.to_be_bytes()[1]])
                    }
                    false => Ipv4Addr::LOCALHOST,
                };
                tokio::spawn(stopped.clone().run_until_cancelled_owned(async move {
                    if let Some(mut far) = first_of(&to, from).await {
                        let _ = (near.set_nodelay(true), far.set_nodelay(true));
                        // Either end may cut it; that is its end.
                        let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                    }
                }));
            }
        }));
        Ok(Self {
            to: target,
            as_many,
            _stop: stop.drop_guard(),
        })
    }

    /// From now on each connection has another loopback source address, as from many networks.
    pub fn come_from_many(&self) {
        self.as_many.store(true, Ordering::Relaxed);
    }

    /// Leads new connections to `to`; those that are there stay.
    pub fn lead_to(&self, to: SocketAddr) {
        *self.to.lock().unwrap_or_else(PoisonError::into_inner) = vec![to];
    }
}

async fn first_of(to: &[SocketAddr], from: Ipv4Addr) -> Option<TcpStream> {
    for to in to {
        let connecting = async {
            let socket = TcpSocket::new_v4()?;
            socket.bind(SocketAddr::new(from.into(), 0))?;
            socket.connect(*to).await
        };
        if let Ok(stream) = connecting.await {
            return Some(stream);
        }
    }
    None
}

//! An address whose far ends a story can move: a balancer's, or a database's name.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::eventually;

/// Passes TCP connections on, to its far ends in turn, past those that refuse; when it is dropped,
/// it and they end.
pub struct Forwarder {
    to: Arc<Mutex<Vec<SocketAddr>>>,
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
        tokio::spawn(stop.clone().run_until_cancelled_owned(async move {
            while let Ok((mut near, _)) = listener.accept().await {
                let to = {
                    let mut to = now.lock().unwrap_or_else(PoisonError::into_inner);
                    if !to.is_empty() {
                        to.rotate_left(1);
                    }
                    to.clone()
                };
                tokio::spawn(stopped.clone().run_until_cancelled_owned(async move {
                    if let Some(mut far) = first_of(&to).await {
                        let _ = (near.set_nodelay(true), far.set_nodelay(true));
                        // Either end may cut it; that is its end.
                        let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                    }
                }));
            }
        }));
        Ok(Self {
            to: target,
            _stop: stop.drop_guard(),
        })
    }

    /// Leads new connections to `to`; those that are there stay.
    pub fn lead_to(&self, to: SocketAddr) {
        *self.to.lock().unwrap_or_else(PoisonError::into_inner) = vec![to];
    }
}

async fn first_of(to: &[SocketAddr]) -> Option<TcpStream> {
    for to in to {
        if let Ok(stream) = TcpStream::connect(to).await {
            return Some(stream);
        }
    }
    None
}

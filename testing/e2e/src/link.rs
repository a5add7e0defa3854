//! The way from one client out to the relays, which a story can cut.
//!
//! It is an HTTP proxy for this client alone (`--proxy`), so that a client that runs on this machine
//! has a separate link without a network namespace and without root. Cut silently, it does what
//! a network does that loses every packet: what was sent is neither delivered nor refused, and is
//! delivered late when the link is mended before anybody has given up.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

/// The head of a CONNECT: more is not ours.
const MOST_HEAD: usize = 8 * 1024;
/// Between attempts to accept when this process has no descriptors.
const AGAIN: Duration = Duration::from_millis(100);

/// How a link is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Whole,
    /// Nothing passes, without an error.
    Silent,
    /// Connections end, and new ones are closed at once.
    Closed,
}

/// What connections watch.
#[derive(Debug, Clone, Copy)]
struct Now {
    state: State,
    /// How often what was open has been swallowed.
    swallowed: u64,
    /// Rises with each limit on what a connection may carry, and the present one.
    limit: (u64, Option<u64>),
}

/// Leads to one address; ends, with all that it carries, when it is dropped.
pub struct Link {
    address: SocketAddr,
    now: watch::Sender<Now>,
    stalled: Arc<AtomicUsize>,
    _stop: DropGuard,
}

impl Link {
    /// Forwards each connection to `to`, whatever host it asks for.
    pub async fn start(to: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let now = watch::Sender::new(Now {
            state: State::Whole,
            swallowed: 0,
            limit: (0, None),
        });
        let seen = now.subscribe();
        let stalled = Arc::<AtomicUsize>::default();
        let counted = stalled.clone();
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        tokio::spawn(stop.clone().run_until_cancelled_owned(async move {
            loop {
                let Ok((near, _)) = listener.accept().await else {
                    tokio::time::sleep(AGAIN).await;
                    continue;
                };
                let serve = serve(near, to, seen.clone(), counted.clone());
                tokio::spawn(stopped.clone().run_until_cancelled_owned(serve));
            }
        }));
        Ok(Self {
            address,
            now,
            stalled,
            _stop: stop.drop_guard(),
        })
    }

    /// What its client is given as `--proxy`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn set(&self, state: State) {
        self.now.send_modify(|now| now.state = state);
    }

    /// A connection that carries more than this from now on, both ways together, stalls: nothing of it is read
    /// any more, as behind a slow reader. `None` lets them go on.
    pub fn limit(&self, bytes: Option<u64>) {
        self.now
            .send_modify(|now| now.limit = (now.limit.0 + 1, bytes));
    }

    /// Directions of connections that are stalled now.
    pub fn stalled(&self) -> usize {
        self.stalled.load(Ordering::SeqCst)
    }

    /// Open connections pass nothing any more, without an error; later ones do.
    pub fn swallow_what_is_open(&self) {
        self.now.send_modify(|now| now.swallowed += 1);
    }
}

/// Either end may be cut, or be closed by the link; that is the connection's end.
async fn serve(
    near: TcpStream,
    to: SocketAddr,
    now: watch::Receiver<Now>,
    stalled: Arc<AtomicUsize>,
) {
    let mut closed = now.clone();
    let (born, limit) = (now.borrow().swallowed, now.borrow().limit.0);
    let mut way = Way {
        born,
        now,
        carried: Arc::new(Mutex::new((limit, 0))),
        stalled,
    };
    tokio::select! {
        _ = closed.wait_for(|now| now.state == State::Closed) => {}
        _ = lead(near, to, &mut way) => {}
    }
}

async fn lead(mut near: TcpStream, to: SocketAddr, way: &mut Way) -> io::Result<()> {
    near.set_nodelay(true)?;
    let mut head = Vec::new();
    // A client sends nothing before it is answered, so nothing follows the head.
    while !head.ends_with(b"\r\n\r\n") {
        if near.read_buf(&mut head).await? == 0 || head.len() > MOST_HEAD {
            return Err(io::ErrorKind::InvalidData.into());
        }
    }
    way.passable().await;
    let far = TcpStream::connect(to).await?;
    far.set_nodelay(true)?;
    near.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await?;
    let (near_read, near_write) = near.into_split();
    let (far_read, far_write) = far.into_split();
    let out = pass(near_read, far_write, way.clone());
    let back = pass(far_read, near_write, way.clone());
    tokio::try_join!(out, back).map(drop)
}

async fn pass(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut way: Way) -> io::Result<()> {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let count = from.read(&mut buffer).await;
        // An end, too, is passed on only when data passes again.
        way.passable().await;
        match count? {
            0 => return to.shutdown().await,
            count => {
                way.within_limit(count as u64).await;
                to.write_all(&buffer[..count]).await?;
            }
        }
    }
}

/// The link as one connection sees it.
#[derive(Clone)]
struct Way {
    born: u64,
    now: watch::Receiver<Now>,
    /// The limit under which bytes were counted, and how many, both ways.
    carried: Arc<Mutex<(u64, u64)>>,
    stalled: Arc<AtomicUsize>,
}

impl Way {
    async fn passable(&mut self) {
        let born = self.born;
        let passes = |now: &Now| now.state != State::Silent && now.swallowed == born;
        // Its sender lives as long as the link, and this as long as either.
        let _ = self.now.wait_for(passes).await;
    }

    /// Ends when so many bytes more may pass.
    async fn within_limit(&mut self, count: u64) {
        let carried = self.carried.clone();
        let passes = |now: &Now| {
            let mut carried = carried.lock().unwrap_or_else(PoisonError::into_inner);
            if carried.0 != now.limit.0 {
                *carried = (now.limit.0, 0);
            }
            now.limit.1.is_none_or(|limit| carried.1 + count <= limit)
        };
        if !passes(&self.now.borrow()) {
            self.stalled.fetch_add(1, Ordering::SeqCst);
            let _ = self.now.wait_for(&passes).await;
            self.stalled.fetch_sub(1, Ordering::SeqCst);
        }
        let mut carried = carried.lock().unwrap_or_else(PoisonError::into_inner);
        carried.1 += count;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn connected(link: &Link) -> TcpStream {
        let mut near = TcpStream::connect(link.address).await.unwrap();
        near.write_all(b"CONNECT far:443 HTTP/1.1\r\n\r\n")
            .await
            .unwrap();
        near
    }

    async fn answered(near: &mut TcpStream) {
        let mut answer = [0; 19];
        near.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"HTTP/1.1 200 OK\r\n\r\n");
    }

    #[tokio::test]
    async fn what_was_sent_into_a_silent_link_comes_when_it_is_mended() {
        let far = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let link = Link::start(far.local_addr().unwrap()).await.unwrap();
        let mut near = connected(&link).await;
        answered(&mut near).await;
        let (mut far, _) = far.accept().await.unwrap();
        link.set(State::Silent);
        near.write_all(b"ahoy").await.unwrap();
        drop(near);
        let mut got = Vec::new();
        let silent = tokio::time::timeout(Duration::from_millis(50), far.read_to_end(&mut got));
        assert!(silent.await.is_err() && got.is_empty());
        link.set(State::Whole);
        far.read_to_end(&mut got).await.unwrap();
        assert_eq!(got, b"ahoy");
    }

    #[tokio::test]
    async fn a_closed_link_ends_what_is_there_and_what_comes() {
        let far = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let link = Link::start(far.local_addr().unwrap()).await.unwrap();
        let mut near = connected(&link).await;
        answered(&mut near).await;
        link.set(State::Closed);
        let mut rest = Vec::new();
        let _ = near.read_to_end(&mut rest).await;
        assert!(rest.is_empty());
        let mut next = connected(&link).await;
        let _ = next.read_to_end(&mut rest).await;
        assert!(rest.is_empty());
        link.set(State::Whole);
        answered(&mut connected(&link).await).await;
    }
}

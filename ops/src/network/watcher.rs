//! macOS and others report addresses through their own interfaces, which `if-watch` supports.

use std::io;
use std::net::IpAddr;

use futures::StreamExt as _;
use if_watch::IfEvent;
use if_watch::tokio::IfWatcher;

pub(super) struct Addresses(IfWatcher);

impl Addresses {
    /// Must be called within a tokio runtime.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(IfWatcher::new()?))
    }

    /// The next address that came or went; first, those that there are. Cancel safe.
    ///
    /// # Errors
    /// The system tells no more.
    pub(super) async fn next(&mut self) -> io::Result<IpAddr> {
        match self.0.next().await {
            Some(Ok(IfEvent::Up(net) | IfEvent::Down(net))) => Ok(net.addr()),
            Some(Err(error)) => Err(error),
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

//! A dialled connection: TCP, TLS over one, or a proxy's tunnel in one.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::PrefixedIo;
use crate::read_ahead::ReadAhead;

pub(super) enum Socket {
    Plain(TcpStream),
    Tls(Box<TlsStream<ReadAhead<Socket>>>),
    /// Through a proxy, which may have sent the far end's first bytes with its own.
    Tunnel(Box<PrefixedIo<Socket>>),
}

impl Socket {
    /// The addresses of the TCP connection below: ours and the other's.
    pub(super) fn ends(&self) -> Option<(SocketAddr, SocketAddr)> {
        match self {
            Self::Plain(tcp) => Some((tcp.local_addr().ok()?, tcp.peer_addr().ok()?)),
            Self::Tls(tls) => tls.get_ref().0.get_ref().ends(),
            Self::Tunnel(tunnel) => tunnel.get_ref().ends(),
        }
    }
}

/// Speaks TLS on it, and HTTP/1.1 in there: upgrades and CONNECT exist in this version only.
pub(super) async fn secure(
    socket: Socket,
    name: ServerName<'static>,
    mut tls: Arc<rustls::ClientConfig>,
) -> io::Result<Socket> {
    if tls.alpn_protocols != [b"http/1.1"] {
        let mut only = (*tls).clone();
        only.alpn_protocols = vec![b"http/1.1".to_vec()];
        tls = only.into();
    }
    let stream = TlsConnector::from(tls)
        .connect(name, ReadAhead::new(socket))
        .await?;
    Ok(Socket::Tls(Box::new(stream)))
}

macro_rules! each {
    ($self:ident, $method:ident $(, $arg:expr)*) => {
        match $self.get_mut() {
            Socket::Plain(io) => Pin::new(io).$method($($arg),*),
            Socket::Tls(io) => Pin::new(io.as_mut()).$method($($arg),*),
            Socket::Tunnel(io) => Pin::new(io.as_mut()).$method($($arg),*),
        }
    };
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        each!(self, poll_read, cx, buf)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        each!(self, poll_write, cx, buf)
    }

    /// As many TLS records as there are in one system call.
    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        each!(self, poll_write_vectored, cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(io) => io.is_write_vectored(),
            Self::Tls(io) => io.is_write_vectored(),
            Self::Tunnel(io) => io.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, poll_flush, cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, poll_shutdown, cx)
    }
}

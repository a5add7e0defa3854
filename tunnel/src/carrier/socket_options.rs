//! The TCP options of a carrier's connection, at both ends.

use std::io;

use tokio::net::TcpStream;

/// Bytes that TCP has taken and not sent yet, at most. Behind more of them a keystroke would wait: 13 ms
/// at 20 Mbit/s. Less costs throughput where a process is not woken in time to write more.
const UNSENT: u32 = 32 * 1024;

/// Sets what a carrier's connection needs: small frames wait neither for acknowledgements of others
/// (`TCP_NODELAY`), nor in a full send buffer (`TCP_NOTSENT_LOWAT`, tcp(7)).
///
/// # Errors
/// The connection has ended already.
pub fn set_socket_options(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    #[cfg(any(target_os = "linux", target_os = "android"))]
    if let Err(error) = socket2::SockRef::from(stream).set_tcp_notsent_lowat(UNSENT) {
        tracing::debug!(%error, "the send buffer of a connection is not bounded");
    }
    Ok(())
}

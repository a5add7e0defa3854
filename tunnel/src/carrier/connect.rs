//! TCP to whichever address of a host answers first.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use tokio::net::{TcpStream, lookup_host};

use super::DialError;
use super::socket_options::set_socket_options;

/// Head start of each address before the next is tried as well (RFC 8305 section 5).
const STAGGER: Duration = Duration::from_millis(250);

/// Resolves `host` now, and connects. Families alternate, the resolver's first choice first.
pub(super) async fn connect(host: &str, port: u16) -> Result<TcpStream, DialError> {
    let resolved = lookup_host((host, port)).await;
    let addrs: Vec<_> = resolved
        .map_err(|source| DialError::Resolve {
            host: host.to_owned(),
            source,
        })?
        .collect();
    let raced = race(alternate(addrs)).await;
    let stream = raced.map_err(|source| DialError::Connect {
        host: format!("{host}:{port}"),
        source,
    })?;
    // Without it the connection works, and small frames wait.
    let _ = set_socket_options(&stream);
    Ok(stream)
}

async fn race(addrs: Vec<SocketAddr>) -> io::Result<TcpStream> {
    let mut waiting = addrs.into_iter();
    let mut trying = FuturesUnordered::new();
    let mut failed = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    loop {
        // Happy Eyeballs (RFC 8305 section 5): the next address starts after a failure or a delay,
        // beside those that still connect.
        match waiting.next() {
            Some(addr) => trying.push(TcpStream::connect(addr)),
            None if trying.is_empty() => return Err(failed),
            None => {}
        }
        let last = waiting.len() == 0;
        tokio::select! {
            Some(result) = trying.next() => match result {
                Ok(stream) => return Ok(stream),
                Err(error) => failed = error,
            },
            () = tokio::time::sleep(STAGGER), if !last => {}
        }
    }
}

fn alternate(addrs: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let Some(first) = addrs.first() else {
        return addrs;
    };
    // The resolver's first choice (RFC 6724) stays first; behind it the families alternate, so that
    // a broken one costs one delay (RFC 8305 section 4).
    let v6_first = first.is_ipv6();
    let (like, unlike): (Vec<_>, Vec<_>) = addrs
        .into_iter()
        .partition(|addr| addr.is_ipv6() == v6_first);
    let mut out = Vec::with_capacity(like.len() + unlike.len());
    let (mut like, mut unlike) = (like.into_iter(), unlike.into_iter());
    loop {
        match (like.next(), unlike.next()) {
            (None, None) => return out,
            pair => out.extend([pair.0, pair.1].into_iter().flatten()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    #[test]
    fn families_alternate_behind_the_first_choice() {
        let parse = |text: &str| text.parse::<SocketAddr>().unwrap();
        let [a, b, c] = [parse("[::1]:1"), parse("[::2]:1"), parse("127.0.0.1:1")];
        assert_eq!(alternate(vec![a, b, c]), [a, c, b]);
        assert_eq!(alternate(vec![c, a, b]), [c, a, b]);
    }

    #[tokio::test]
    async fn goes_on_to_an_address_that_answers() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let good = listener.local_addr().unwrap();
        let closed = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let bad = closed.local_addr().unwrap();
        drop(closed);
        let stream = race(vec![bad, good]).await.unwrap();
        assert_eq!(stream.peer_addr().unwrap(), good);
        assert!(race(vec![bad]).await.is_err());
        assert!(race(Vec::new()).await.is_err());
    }
}

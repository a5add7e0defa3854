//! Two ends of a carrier in one process, and the questions that every test asks at its end.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::allow_attributes,
    reason = "each test file uses a part"
)]

use std::sync::Arc;
use std::time::Duration;

use throwline_tunnel::carrier::{self, AcceptConfig, Connection, DialConfig, Prover};
use throwline_tunnel::line::{self, Line, LineBudgets, LineError};
use throwline_tunnel::mux;
use throwline_tunnel::proto::messages::{LineKind, Open, Role, StreamHeader, StreamReply};
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream};
use url::Url;

pub fn prover() -> Arc<Prover> {
    Arc::new(Prover {
        assertion: Box::new(|claims| Ok(format!("assertion-of-{}", claims.sub))),
        sign: Box::new(|transcript| Ok(transcript.to_vec())),
        sha256: |_| [7; 32],
        id: "spiffe://test/cluster/c".to_owned(),
    })
}

pub fn dial_config(relay: &str) -> DialConfig {
    let relay = Url::parse(relay).unwrap();
    DialConfig::new(relay, None, prover(), Role::Agent, "instance-1")
}

pub fn accept_config() -> AcceptConfig {
    AcceptConfig::new("relay-1")
}

/// A carrier over a pipe that holds `pipe` bytes a direction.
pub async fn pair(pipe: usize) -> (Connection, Connection) {
    pair_with(pipe, dial_config("http://localhost"), accept_config()).await
}

pub async fn pair_with(
    pipe: usize,
    dial: DialConfig,
    accept: AcceptConfig,
) -> (Connection, Connection) {
    let (dialer, acceptor) = tokio::io::duplex(pipe);
    let (dialed, accepted) = tokio::join!(
        carrier::dial_over(dialer, &dial),
        carrier::accept(acceptor, accept, |_, _| Ok(()))
    );
    (dialed.unwrap(), accepted.unwrap().0)
}

/// Accepts a line that ends with its stream.
pub async fn accept<S>(stream: S) -> Result<Line<S>, LineError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    line::accept(stream, Duration::ZERO, LineBudgets::default())
        .await?
        .into_new()
}

pub fn header() -> StreamHeader {
    Open {
        version: 1,
        cluster: "c".to_owned(),
        line_id: vec![0; 16],
        kind: LineKind::Api.into(),
        ..Open::default()
    }
    .into()
}

/// One stream, both ends of it.
pub async fn stream(from: &Connection, to: &mut Connection) -> (mux::Stream, mux::Stream) {
    let (opened, accepted) = tokio::join!(from.carrier.open(header()), async {
        let incoming = to.incoming.next().await.unwrap();
        incoming.accept(StreamReply::accepted()).await.unwrap()
    });
    (opened.unwrap().0, accepted)
}

/// Waits until `is` holds, and fails after ten seconds of it not holding.
pub async fn eventually(what: &str, mut is: impl FnMut() -> bool) {
    for _ in 0..1000 {
        if is() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("never came true: {what}");
}

/// Bytes that differ by place, so that a gap or a swap shows.
pub fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i ^ (i >> 8) ^ (i >> 16)) as u8).collect()
}

/// Closes both and checks that nothing is left of them.
pub async fn gone(a: Connection, b: Connection) {
    use throwline_tunnel::proto::close::CloseCode;
    eventually("streams are gone", || {
        a.carrier.streams() + b.carrier.streams() == 0
    })
    .await;
    a.carrier.close(CloseCode::Normal, "done");
    a.carrier.closed().await;
    assert_eq!(b.carrier.closed().await.code, CloseCode::Normal);
    drop((a, b));
    eventually("tasks are gone", || {
        tokio::runtime::Handle::current()
            .metrics()
            .num_alive_tasks()
            == 0
    })
    .await;
}

pub fn pipe(size: usize) -> (DuplexStream, DuplexStream) {
    tokio::io::duplex(size)
}

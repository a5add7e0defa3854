//! Carriers against peers that do what no honest peer does.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::time::Duration;

use support::{
    accept_config, dial_config, eventually, gone, header, pair, pair_with, pipe, stream,
};
use throwline_tunnel::carrier::{self, AcceptError, Connection, DialError, OpenError, Timing};
use throwline_tunnel::message;
use throwline_tunnel::proto::close::{CloseCode, ClosedBy};
use throwline_tunnel::proto::messages::{Challenge, Proof, Refusal, RefusalCode};
use throwline_tunnel::proto::wire::HANDSHAKE_CAP;
use throwline_tunnel::ws::{self, Side};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::time::timeout;
use tokio_util::compat::FuturesAsyncReadCompatExt as _;

fn frame(opcode: u8, payload: &[u8]) -> Vec<u8> {
    // Masked with zeros: a mask as the RFC demands, and readable.
    let mut out = vec![opcode];
    match payload.len() {
        len @ 0..=125 => out.push(0x80 | len as u8),
        len => {
            out.push(0x80 | 126);
            out.extend_from_slice(&(len as u16).to_be_bytes());
        }
    }
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(payload);
    out
}

/// A carrier accepted from a raw WebSocket client that speaks the handshake by hand.
async fn raw_client() -> (DuplexStream, Connection) {
    let (mut raw, io) = pipe(64 * 1024);
    let accepting = tokio::spawn(carrier::accept(io, accept_config(), |_, _| Ok(())));
    let _challenge = read_message(&mut raw).await;
    let proof = Proof {
        version: 1,
        nonce: vec![1; 32],
        ..Proof::default()
    };
    let bytes = throwline_tunnel::proto::wire::encode(&proof, HANDSHAKE_CAP).unwrap();
    raw.write_all(&frame(0x82, &bytes)).await.unwrap();
    let _welcome = read_message(&mut raw).await;
    let (connection, _) = accepting.await.unwrap().unwrap();
    (raw, connection)
}

/// One unmasked server frame: opcode and payload.
async fn read_message(raw: &mut DuplexStream) -> (u8, Vec<u8>) {
    let opcode = raw.read_u8().await.unwrap();
    let len = match raw.read_u8().await.unwrap() {
        126 => usize::from(raw.read_u16().await.unwrap()),
        len => usize::from(len),
    };
    let mut body = vec![0; len];
    raw.read_exact(&mut body).await.unwrap();
    (opcode, body)
}

async fn close_code(raw: &mut DuplexStream) -> u16 {
    loop {
        let (opcode, body) = read_message(raw).await;
        if opcode == 0x88 {
            return u16::from_be_bytes([body[0], body[1]]);
        }
    }
}

async fn closes_with(bytes: Vec<u8>, want: CloseCode) {
    let (raw, connection) = raw_client().await;
    let (reader, mut writer) = tokio::io::split(raw);
    let writing = tokio::spawn(async move {
        // The other side may stop reading at any point.
        let _ = writer.write_all(&bytes).await;
        writer
    });
    let ended = timeout(Duration::from_secs(10), connection.carrier.closed());
    let ended = ended.await.expect("lives on");
    assert_eq!((ended.code, ended.by), (want, ClosedBy::Us), "{ended}");
    let writer = writing.await.unwrap();
    let mut raw = reader.unsplit(writer);
    assert_eq!(close_code(&mut raw).await, want.to_u16());
    drop(connection);
}

#[tokio::test]
async fn lengths_over_the_limit_close_with_1009() {
    let mut huge = vec![0x82, 0xff];
    huge.extend_from_slice(&(1u64 << 63).to_be_bytes());
    huge.extend_from_slice(&[0; 4]);
    // The top bit must be 0 in a length (RFC 6455 section 5.2); both answers are right.
    closes_with(huge, CloseCode::TooBig).await;
    let mut over = vec![0x82, 0xff];
    over.extend_from_slice(&(256 * 1024 + 1u64).to_be_bytes());
    over.extend_from_slice(&[0; 4]);
    closes_with(over, CloseCode::TooBig).await;
}

#[tokio::test]
async fn floods_and_foreign_frames_close() {
    let pings: Vec<u8> = (0..500).flat_map(|_| frame(0x89, b"x")).collect();
    closes_with(pings, CloseCode::Protocol).await;
    let empty: Vec<u8> = (0..500).flat_map(|_| frame(0x82, b"")).collect();
    closes_with(empty, CloseCode::Protocol).await;
    let mut fragments = frame(0x02, b"a");
    for _ in 0..80_000 {
        fragments.extend_from_slice(&frame(0x00, b""));
    }
    closes_with(fragments, CloseCode::Protocol).await;
    closes_with(frame(0x81, b"text"), CloseCode::Unsupported).await;
    // Unmasked, from a client.
    closes_with(vec![0x82, 0x01, 0x00], CloseCode::Protocol).await;
}

#[tokio::test]
async fn mux_windows_and_credits_overrun_kill_the_tunnel_only() {
    let mux = |kind: u8, flags: u16, stream: u32, len: u32, body: usize| {
        let mut out = vec![0, kind];
        out.extend_from_slice(&flags.to_be_bytes());
        out.extend_from_slice(&stream.to_be_bytes());
        out.extend_from_slice(&len.to_be_bytes());
        out.resize(out.len() + body, 0);
        out
    };
    let dies = async |frames: Vec<Vec<u8>>| {
        let (mut raw, connection) = raw_client().await;
        let bytes: Vec<u8> = frames.into_iter().flat_map(|f| frame(0x82, &f)).collect();
        let (mut reader, mut writer) = tokio::io::split(&mut raw);
        let writing = writer.write_all(&bytes);
        let draining = async {
            let mut sink = vec![0; 4096];
            while matches!(reader.read(&mut sink).await, Ok(n) if n > 0) {}
        };
        let ended = timeout(Duration::from_secs(10), connection.carrier.closed());
        let ended = tokio::select! {
            ended = ended => ended.expect("lives on"),
            _ = async { tokio::join!(writing, draining) } => connection.carrier.closed().await,
        };
        assert_ne!(ended.code, CloseCode::Internal, "{ended}");
    };
    // A good header, and then more than the window for a stream without a reader.
    let good = throwline_tunnel::proto::wire::encode(&header(), 4096).unwrap();
    let mut syn = mux(0, 1, 1, good.len() as u32, 0);
    syn.extend_from_slice(&good);
    let mut over = vec![syn];
    over.extend((0..5).map(|_| mux(0, 0, 1, 60_000, 60_000)));
    dies(over).await;
    // One frame over the limit.
    dies(vec![mux(0, 1, 1, 100_000, 0)]).await;
    // Credit that overflows.
    dies(vec![mux(1, 1, 1, u32::MAX, 0)]).await;
    dies(vec![mux(0, 1, 1, 0, 0), mux(1, 0, 1, u32::MAX, 0)]).await;
    // A stream that only the other side may number, an unknown type, an unsolicited pong.
    dies(vec![mux(0, 1, 2, 0, 0)]).await;
    dies(vec![mux(9, 0, 0, 0, 0)]).await;
    dies(vec![mux(3, 0, 0, 0, 0)]).await;
}

#[tokio::test]
async fn the_cap_of_streams_refuses_and_the_others_live() {
    let mut dial = dial_config("http://localhost");
    dial.mux.max_streams = 100;
    let mut accept = accept_config();
    accept.max_streams = 4;
    let (dialed, mut accepted) = pair_with(64 * 1024, dial, accept).await;
    assert_eq!(dialed.welcome.max_streams, 4);
    let mut ends = Vec::new();
    for _ in 0..4 {
        ends.push(stream(&dialed, &mut accepted).await);
    }
    let over = dialed.carrier.open(header()).await;
    assert!(matches!(over, Err(OpenError::Limit)), "{over:?}");
    for (a, b) in &mut ends {
        a.write_all(b"alive").await.unwrap();
        let mut got = [0; 5];
        b.read_exact(&mut got).await.unwrap();
    }
    ends.pop();
    eventually("a place is free", || accepted.carrier.streams() == 3).await;
    ends.push(stream(&dialed, &mut accepted).await);
    drop(ends);
    gone(dialed, accepted).await;
}

#[tokio::test]
async fn a_peer_that_ignores_the_cap_is_refused_stream_by_stream() {
    let mut accept = accept_config();
    accept.mux.max_streams = 50;
    let mut dial = dial_config("http://localhost");
    dial.mux.max_incoming = 2;
    let (mut dialed, accepted) = pair_with(64 * 1024, dial, accept).await;
    let first = stream(&accepted, &mut dialed).await;
    let second = stream(&accepted, &mut dialed).await;
    for _ in 0..20 {
        match accepted.carrier.open(header()).await {
            Err(OpenError::Refused(refusal)) => assert_eq!(refusal.code(), RefusalCode::Limit),
            other => panic!("{other:?}"),
        }
    }
    drop(first);
    eventually("a place is free", || dialed.carrier.streams() == 1).await;
    drop(stream(&accepted, &mut dialed).await);
    drop(second);
    gone(dialed, accepted).await;
}

#[tokio::test]
async fn three_hundred_silent_streams_hold_up_nobody() {
    let (dialed, mut accepted) = pair(64 * 1024).await;
    let mut silent = Vec::new();
    for _ in 0..300 {
        let carrier = dialed.carrier.clone();
        silent.push(tokio::spawn(async move { carrier.open(header()).await }));
    }
    // Opened, and never answered.
    let mut unanswered = Vec::new();
    for _ in 0..300 {
        let next = timeout(Duration::from_secs(5), accepted.incoming.next());
        unanswered.push(next.await.expect("blocked").unwrap());
    }
    let next = timeout(Duration::from_secs(1), stream(&dialed, &mut accepted));
    drop(next.await.expect("the next stream does not open"));
    drop(unanswered);
    for open in silent {
        assert!(matches!(open.await.unwrap(), Err(OpenError::Unanswered(_))));
    }
    gone(dialed, accepted).await;
}

#[tokio::test]
async fn closing_while_the_peer_writes_resets_it() {
    let (dialed, mut accepted) = pair(64 * 1024).await;
    let (mut a, mut b) = stream(&dialed, &mut accepted).await;
    let writing = tokio::spawn(async move {
        let chunk = vec![0; 64 * 1024];
        while b.write_all(&chunk).await.is_ok() {}
    });
    a.read_exact(&mut [0; 1000]).await.unwrap();
    a.shutdown().await.unwrap();
    drop(a);
    timeout(Duration::from_secs(5), writing)
        .await
        .expect("the writer hangs")
        .unwrap();
    gone(dialed, accepted).await;
}

#[tokio::test]
async fn a_reset_is_an_error_and_an_end_is_not() {
    let (dialed, mut accepted) = pair(64 * 1024).await;
    let (a, mut b) = stream(&dialed, &mut accepted).await;
    drop(a);
    let error = b.read(&mut [0; 1]).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    drop(b);
    let (mut a, mut b) = stream(&dialed, &mut accepted).await;
    a.shutdown().await.unwrap();
    assert_eq!(b.read(&mut [0; 1]).await.unwrap(), 0);
    drop((a, b));
    gone(dialed, accepted).await;
}

#[tokio::test]
async fn refusals_reach_the_opener_with_their_words() {
    let (dialed, mut accepted) = pair(64 * 1024).await;
    let open = dialed.carrier.open(header());
    let refuse = async {
        let incoming = accepted.incoming.next().await.unwrap();
        let refusal = Refusal::new(RefusalCode::Offline, "cluster c is offline").since(5);
        incoming.refuse(refusal).await;
    };
    let (opened, ()) = tokio::join!(open, refuse);
    match opened {
        Err(OpenError::Refused(refusal)) => {
            assert_eq!(refusal.code(), RefusalCode::Offline);
            assert_eq!(refusal.to_string(), "cluster c is offline");
            assert_eq!(refusal.since_unix_ms, 5);
        }
        other => panic!("{other:?}"),
    }
    gone(dialed, accepted).await;
}

#[tokio::test]
async fn older_and_newer_peers_receive_the_version() {
    // A dialer of the future.
    let (raw, io) = pipe(64 * 1024);
    let accepting = tokio::spawn(carrier::accept(io, accept_config(), |_, _| Ok(())));
    let config = ws::Config::default();
    let (mut io, driver) = ws::wrap(raw, bytes::Bytes::new(), Side::Client, &config).await;
    let mut stream = (&mut io).compat();
    let _: Challenge = message::read(&mut stream, HANDSHAKE_CAP).await.unwrap();
    let proof = Proof {
        version: 9,
        nonce: vec![0; 32],
        ..Proof::default()
    };
    message::write(&mut stream, &proof, HANDSHAKE_CAP)
        .await
        .unwrap();
    driver.flush().await.unwrap();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await.unwrap();
    assert_eq!(driver.ended().unwrap().code, CloseCode::Version);
    match accepting.await.unwrap() {
        Err(AcceptError::Refused(refusal)) => assert_eq!(refusal.code(), RefusalCode::Version),
        other => panic!("{other:?}"),
    }

    // A relay of the future.
    let (raw, io) = pipe(64 * 1024);
    let relay = tokio::spawn(async move {
        let config = ws::Config::default();
        let (mut io, driver) = ws::wrap(raw, bytes::Bytes::new(), Side::Server, &config).await;
        let mut stream = (&mut io).compat();
        let challenge = Challenge {
            version_min: 5,
            version_max: 6,
            nonce: vec![0; 32],
            ..Challenge::default()
        };
        message::write(&mut stream, &challenge, HANDSHAKE_CAP)
            .await
            .unwrap();
        driver.flush().await.unwrap();
        stream.read_to_end(&mut Vec::new()).await.unwrap();
        driver.ended().unwrap().code
    });
    let dialed = carrier::dial_over(io, &dial_config("http://localhost")).await;
    assert!(
        matches!(dialed, Err(DialError::Version { .. })),
        "{dialed:?}"
    );
    assert_eq!(relay.await.unwrap(), CloseCode::Version);
}

#[tokio::test(start_paused = true)]
async fn a_silent_dialer_is_dropped_and_a_silent_relay_given_up() {
    let (raw, io) = pipe(64 * 1024);
    let accepted = carrier::accept(io, accept_config(), |_, _| Ok(())).await;
    assert!(
        matches!(accepted, Err(AcceptError::Timeout(_))),
        "{accepted:?}"
    );
    drop(raw);
    let (_raw, io) = pipe(64 * 1024);
    let dialed = carrier::dial_over(io, &dial_config("http://localhost")).await;
    assert!(
        matches!(dialed, Err(DialError::Timeout { .. })),
        "{dialed:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_dead_link_is_noticed_within_a_minute_and_a_live_one_kept() {
    let (dialed, accepted) = pair(64 * 1024).await;
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert!(!dialed.carrier.is_closed() && !accepted.carrier.is_closed());
    assert!(dialed.carrier.round_trip().is_some());
    drop((dialed, accepted));

    // A link that goes silent: the pipe stays open, and its other end is not read.
    let (raw, connection) = raw_client().await;
    let began = tokio::time::Instant::now();
    let ended = connection.carrier.closed().await;
    assert_eq!(ended.code, CloseCode::Timeout);
    assert!(
        began.elapsed() <= Duration::from_secs(60),
        "{:?}",
        began.elapsed()
    );
    drop(raw);
}

#[tokio::test(start_paused = true)]
async fn a_network_that_takes_no_bytes_kills_the_tunnel() {
    let dial = dial_config("http://localhost");
    let mut accept = accept_config();
    accept.timing = Timing {
        dead_after: Duration::from_secs(3600),
        ..Timing::default()
    };
    let (near, mut wire_near) = pipe(64 * 1024);
    let (far, mut wire_far) = pipe(64 * 1024);
    // The wire forwards until it is stopped.
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let wire = tokio::spawn(async move {
        let forwarding = tokio::io::copy_bidirectional(&mut wire_near, &mut wire_far);
        tokio::select! {
            _ = forwarding => {}
            _ = stopped => {}
        }
        (wire_near, wire_far)
    });
    let (dialed, accepted) = tokio::join!(
        carrier::dial_over(near, &dial),
        carrier::accept(far, accept, |_, _| Ok(()))
    );
    let (dialed, mut accepted) = (dialed.unwrap(), accepted.unwrap().0);
    let (_a, mut b) = stream(&dialed, &mut accepted).await;
    stop.send(()).unwrap();
    let _held = wire.await.unwrap();
    let began = tokio::time::Instant::now();
    let flood = tokio::spawn(async move { while b.write_all(&[0; 4096]).await.is_ok() {} });
    let ended = accepted.carrier.closed().await;
    assert_eq!(ended.code, CloseCode::Timeout);
    assert!(
        began.elapsed() <= Duration::from_secs(35),
        "{:?}",
        began.elapsed()
    );
    flood.await.unwrap();
}

//! A line over a carrier: bytes arrive as they were sent, its end is its own, and a cut anywhere
//! is an error.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::time::Duration;

use support::{accept, eventually, gone, pair, pattern, pipe, stream};
use throwline_tunnel::budget::Budget;
use throwline_tunnel::line::{self, Line, LineBudgets, LineError};
use throwline_tunnel::proto::close::CloseCode;
use throwline_tunnel::proto::line::{HEADER_LEN, MAX_WINDOW, ResetCode, WINDOW, kind, put};
use throwline_tunnel::proto::messages::{LineHello, LineHelloReply};
use throwline_tunnel::splice::{self, Meter, splice};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, copy, split};
use tokio::time::timeout;

async fn line_pair<S>(a: S, b: S) -> (Line<S>, Line<S>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let hello = LineHello::new([9; 16], Duration::ZERO);
    let (opened, accepted) =
        tokio::join!(line::connect(a, hello, LineBudgets::default()), accept(b));
    (opened.unwrap(), accepted.unwrap())
}

fn cause(error: &std::io::Error) -> &LineError {
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    error.get_ref().unwrap().downcast_ref().unwrap()
}

#[tokio::test]
async fn both_directions_flood_and_end_cleanly() {
    let (dialed, mut accepted) = pair(16 * 1024).await;
    let (a, b) = stream(&dialed, &mut accepted).await;
    let (a, b) = line_pair(a, b).await;
    assert_eq!(b.id(), [9; 16]);
    let end = |line: Line<_>| async {
        let (mut reader, mut writer) = split(line);
        let bytes = pattern(5 * 1024 * 1024);
        let write = async {
            writer.write_all(&bytes).await.unwrap();
            writer.shutdown().await.unwrap();
        };
        let mut got = Vec::new();
        let (read, ()) = tokio::join!(reader.read_to_end(&mut got), write);
        read.unwrap();
        assert!(got == bytes);
    };
    let both = async { tokio::join!(end(a), end(b)) };
    timeout(Duration::from_secs(60), both)
        .await
        .expect("stands still");
    gone(dialed, accepted).await;
}

#[tokio::test]
async fn a_writer_that_does_not_read_is_acknowledged_past_the_peers_data() {
    let (a, b) = pipe(4096);
    let (mut a, b) = line_pair(a, b).await;
    let bytes = pattern(3 * WINDOW as usize);
    let far = tokio::spawn(async move {
        let (mut reader, mut writer) = split(b);
        // Data stands before the acknowledgements, and is not read yet.
        let writing = writer.write_all(&[7; 500_000]);
        let mut got = vec![0; 3 * WINDOW as usize];
        let (wrote, read) = tokio::join!(writing, reader.read_exact(&mut got));
        wrote.unwrap();
        read.unwrap();
        writer.shutdown().await.unwrap();
        got
    });
    timeout(Duration::from_secs(20), a.write_all(&bytes))
        .await
        .expect("stuck")
        .unwrap();
    a.flush().await.unwrap();
    let mut got = Vec::new();
    a.read_to_end(&mut got).await.unwrap();
    assert_eq!(got.len(), 500_000);
    assert!(far.await.unwrap() == bytes);
}

#[tokio::test]
async fn reader_and_writer_in_different_tasks_both_wake() {
    let (a, b) = pipe(512);
    let (a, b) = line_pair(a, b).await;
    let echo = tokio::spawn(async move {
        let (mut reader, mut writer) = split(b);
        copy(&mut reader, &mut writer).await.unwrap();
        writer.shutdown().await.unwrap();
    });
    let (mut reader, mut writer) = split(a);
    let writing = tokio::spawn(async move {
        for chunk in pattern(2_000_000).chunks(777) {
            writer.write_all(chunk).await.unwrap();
        }
        writer.shutdown().await.unwrap();
    });
    let mut got = Vec::new();
    let read = reader.read_to_end(&mut got);
    timeout(Duration::from_secs(30), read)
        .await
        .expect("a waker was lost")
        .unwrap();
    assert!(got == pattern(2_000_000));
    writing.await.unwrap();
    echo.await.unwrap();
}

#[tokio::test]
async fn small_writes_leave_as_one_frame() {
    let (a, mut b) = pipe(64 * 1024);
    let hello = LineHello::new([1; 16], Duration::ZERO);
    let (line, ()) = tokio::join!(
        line::connect(a, hello, LineBudgets::default()),
        answer_hello(&mut b)
    );
    let mut line = line.unwrap();
    // A SPDY frame header, as clients write it.
    for piece in [2, 2, 4, 4, 4, 1] {
        line.write_all(&vec![5; piece]).await.unwrap();
    }
    line.flush().await.unwrap();
    let mut frame = [0; HEADER_LEN + 17];
    b.read_exact(&mut frame).await.unwrap();
    assert_eq!(&frame[..4], [kind::DATA, 0, 0, 17]);
}

async fn answer_hello(raw: &mut DuplexStream) {
    use prost::Message as _;
    let mut head = [0; HEADER_LEN];
    raw.read_exact(&mut head).await.unwrap();
    let mut body = vec![0; usize::from(u16::from_be_bytes([head[2], head[3]]))];
    raw.read_exact(&mut body).await.unwrap();
    let reply = LineHelloReply {
        version: 1,
        epoch: 0,
        window: WINDOW,
        detached_ms: 0,
    };
    let reply = reply.encode_to_vec();
    let mut out = bytes::BytesMut::new();
    put(&mut out, kind::HELLO_REPLY, reply.len() as u16, 0);
    out.extend_from_slice(&reply);
    raw.write_all(&out).await.unwrap();
}

/// Everything a line sends for ten bytes and its end, cut after every byte: only the whole is a
/// clean end.
#[tokio::test]
async fn a_cut_at_any_point_is_never_a_clean_end() {
    let mut whole = bytes::BytesMut::new();
    put(&mut whole, kind::DATA, 10, 0);
    whole.extend_from_slice(&[3; 10]);
    put(&mut whole, kind::FIN, 0, 10);
    for cut in 0..=whole.len() {
        let (a, mut raw) = pipe(4096);
        let hello = LineHello::new([1; 16], Duration::ZERO);
        let (line, ()) = tokio::join!(
            line::connect(a, hello, LineBudgets::default()),
            answer_hello(&mut raw)
        );
        let mut line = line.unwrap();
        raw.write_all(&whole[..cut]).await.unwrap();
        drop(raw);
        let mut got = Vec::new();
        let read = line.read_to_end(&mut got).await;
        if cut == whole.len() {
            read.unwrap();
            assert_eq!(got, [3; 10]);
        } else {
            let error = read.unwrap_err();
            assert!(
                matches!(cause(&error), LineError::Cut),
                "cut at {cut}: {error}"
            );
        }
    }
}

#[tokio::test]
async fn hostile_frames_end_the_line_with_a_reset_that_says_why() {
    let frame = |kind, len, value| {
        let mut out = bytes::BytesMut::new();
        put(&mut out, kind, len, value);
        out.extend_from_slice(&vec![0; usize::from(len)]);
        out
    };
    let mut reserved = frame(kind::DATA, 1, 0);
    reserved[1] = 1;
    let mut twice = frame(kind::FIN, 0, 0);
    twice.extend_from_slice(&frame(kind::DATA, 1, 0));
    let cases = [
        ("gap", frame(kind::DATA, 5, 1), ResetCode::Protocol),
        (
            "overflow",
            frame(kind::DATA, 5, u64::MAX),
            ResetCode::Protocol,
        ),
        ("empty data", frame(kind::DATA, 0, 0), ResetCode::Protocol),
        (
            "ack beyond sent",
            frame(kind::ACK, 0, 1),
            ResetCode::Protocol,
        ),
        ("wrong end", frame(kind::FIN, 0, 1), ResetCode::Protocol),
        ("data after the end", twice, ResetCode::Protocol),
        (
            "second hello",
            frame(kind::HELLO, 0, 0),
            ResetCode::Protocol,
        ),
        ("unknown type", frame(0x66, 0, 0), ResetCode::Protocol),
        ("reserved byte", reserved, ResetCode::Protocol),
        ("resumption", frame(kind::RESUME, 0, 0), ResetCode::Protocol),
        ("ping", frame(kind::PING, 0, 0), ResetCode::Protocol),
    ];
    for (name, bytes, want) in cases {
        let (a, mut raw) = pipe(1024 * 1024);
        let hello = LineHello::new([1; 16], Duration::ZERO);
        let (line, ()) = tokio::join!(
            line::connect(a, hello, LineBudgets::default()),
            answer_hello(&mut raw)
        );
        let mut line = line.unwrap();
        raw.write_all(&bytes).await.unwrap();
        let mut got = Vec::new();
        let mut read = line.read_to_end(&mut got).await;
        if name == "data after the end" {
            // The reader has its clean end; the next read finds the violation.
            continue;
        }
        let error = std::mem::replace(&mut read, Ok(0)).unwrap_err();
        assert!(
            matches!(cause(&error), LineError::Violation(_)),
            "{name}: {error}"
        );
        let mut head = [0; HEADER_LEN];
        raw.read_exact(&mut head).await.unwrap();
        assert_eq!(head[0], kind::RESET, "{name}");
        assert_eq!(u64::from(head[11]), want.to_u64(), "{name}");
        assert!(line.write_all(b"more").await.is_err(), "{name}");
    }
}

#[tokio::test]
async fn payload_behind_a_refused_header_is_never_handed_out() {
    let (a, mut raw) = pipe(1024 * 1024);
    let hello = LineHello::new([1; 16], Duration::ZERO);
    let (line, ()) = tokio::join!(
        line::connect(a, hello, LineBudgets::default()),
        answer_hello(&mut raw)
    );
    let mut line = line.unwrap();
    let mut bytes = bytes::BytesMut::new();
    put(&mut bytes, kind::DATA, 4, 0);
    bytes.extend_from_slice(b"good");
    put(&mut bytes, kind::DATA, 4, 99);
    bytes.extend_from_slice(b"evil");
    raw.write_all(&bytes).await.unwrap();
    let mut got = Vec::new();
    let error = line.read_to_end(&mut got).await.unwrap_err();
    assert!(matches!(cause(&error), LineError::Violation(_)), "{error}");
    assert_eq!(got, b"good");
}

#[tokio::test]
async fn a_peer_beyond_its_window_is_cut_off() {
    let most = u64::from(MAX_WINDOW);
    let (a, mut raw) = pipe(2 * MAX_WINDOW as usize);
    let hello = LineHello::new([1; 16], Duration::ZERO);
    let (line, ()) = tokio::join!(
        line::connect(a, hello, LineBudgets::default()),
        answer_hello(&mut raw)
    );
    let mut line = line.unwrap();
    let mut flood = bytes::BytesMut::new();
    for i in 0..=most / 32768 {
        put(&mut flood, kind::DATA, 32768, i * 32768);
        flood.extend_from_slice(&[0; 32768]);
    }
    raw.write_all(&flood).await.unwrap();
    // The writer waits for room, and so takes frames in without consuming any.
    let error = line
        .write_all(&vec![0; 2 * WINDOW as usize])
        .await
        .unwrap_err();
    assert!(matches!(cause(&error), LineError::Violation(_)), "{error}");
}

#[tokio::test]
async fn dropping_a_line_resets_it_and_losing_the_carrier_cuts_it() {
    let (dialed, mut accepted) = pair(64 * 1024).await;
    let (a, b) = stream(&dialed, &mut accepted).await;
    let (mut a, mut b) = line_pair(a, b).await;
    a.write_all(b"half a th").await.unwrap();
    a.flush().await.unwrap();
    drop(a);
    let error = b.read_to_end(&mut Vec::new()).await.unwrap_err();
    let abandoned = matches!(
        cause(&error),
        LineError::Reset {
            code: ResetCode::Abandoned,
            ..
        }
    );
    assert!(abandoned, "{error}");
    drop(b);

    let (a, b) = stream(&dialed, &mut accepted).await;
    let (mut a, mut b) = line_pair(a, b).await;
    a.write_all(b"half a th").await.unwrap();
    a.flush().await.unwrap();
    let mut got = [0; 9];
    b.read_exact(&mut got).await.unwrap();
    dialed.carrier.close(CloseCode::GoingAway, "moving");
    for line in [&mut a, &mut b] {
        let error = line.read_to_end(&mut Vec::new()).await.unwrap_err();
        assert!(matches!(cause(&error), LineError::Cut), "{error}");
    }
    drop((a, b, dialed, accepted));
}

#[tokio::test]
async fn what_was_said_before_a_carrier_is_closed_arrives() {
    let (dialed, mut accepted) = pair(64 * 1024).await;
    let (a, b) = stream(&dialed, &mut accepted).await;
    let (a, mut b) = line_pair(a, b).await;
    // Nothing has driven the carrier in between.
    drop(a);
    dialed.carrier.close(CloseCode::GoingAway, "stopping");
    let error = b.read_to_end(&mut Vec::new()).await.unwrap_err();
    let abandoned = matches!(
        cause(&error),
        LineError::Reset {
            code: ResetCode::Abandoned,
            ..
        }
    );
    assert!(abandoned, "{error}");
    drop((b, dialed, accepted));
}

#[tokio::test]
async fn another_version_is_reported_to_the_peer() {
    let (a, b) = pipe(4096);
    let newer = LineHello {
        version: 2,
        ..LineHello::new([1; 16], Duration::ZERO)
    };
    let (opened, accepted) =
        tokio::join!(line::connect(a, newer, LineBudgets::default()), accept(b));
    let opened = opened.unwrap_err();
    assert!(
        matches!(
            opened,
            LineError::Reset {
                code: ResetCode::Version,
                ..
            }
        ),
        "{opened}"
    );
    assert!(matches!(
        accepted.unwrap_err(),
        LineError::Version { theirs: 2 }
    ));
}

#[tokio::test]
async fn through_two_carriers_and_a_splice() {
    let (proxy, mut relay_near) = pair(64 * 1024).await;
    let (mut agent, relay_far) = pair(64 * 1024).await;
    let (a, near) = stream(&proxy, &mut relay_near).await;
    let (far, b) = stream(&relay_far, &mut agent).await;
    let spliced = tokio::spawn(async move {
        let meter = Meter::default();
        splice(near, far, &splice::Config::default(), &meter).await
    });
    let (mut a, mut b) = line_pair(a, b).await;
    let serve = tokio::spawn(async move {
        let mut got = Vec::new();
        b.read_to_end(&mut got).await.unwrap();
        b.write_all(&got).await.unwrap();
        b.shutdown().await.unwrap();
        assert_eq!(b.read(&mut [0; 1]).await.unwrap(), 0);
    });
    // Not more than a window, because the echo starts when all has been read.
    let bytes = pattern(900_000);
    a.write_all(&bytes).await.unwrap();
    a.shutdown().await.unwrap();
    let mut got = Vec::new();
    timeout(Duration::from_secs(20), a.read_to_end(&mut got))
        .await
        .expect("stuck")
        .unwrap();
    assert!(got == bytes);
    serve.await.unwrap();
    drop(a);
    let outcome = timeout(Duration::from_secs(10), spliced)
        .await
        .expect("hangs")
        .unwrap();
    assert!(outcome.a_to_b.bytes > 900_000, "{outcome:?}");
    eventually("streams are gone", || {
        proxy.carrier.streams() + agent.carrier.streams() + relay_near.carrier.streams() == 0
    })
    .await;
    drop((proxy, relay_near));
    gone(relay_far, agent).await;
}

/// The memory bound of a reader that never reads again, over two hops.
#[tokio::test]
async fn a_stalled_reader_holds_up_at_most_a_window() {
    let (proxy, mut relay_near) = pair(64 * 1024).await;
    let (mut agent, relay_far) = pair(64 * 1024).await;
    let (a, near) = stream(&proxy, &mut relay_near).await;
    let (far, b) = stream(&relay_far, &mut agent).await;
    let spliced = tokio::spawn(async move {
        let meter = Meter::default();
        splice(near, far, &splice::Config::default(), &meter).await
    });
    let (a, mut b) = line_pair(a, b).await;
    let mut sent = 0;
    let chunk = vec![0; 16 * 1024];
    while let Ok(result) = timeout(Duration::from_secs(1), b.write_all(&chunk)).await {
        result.unwrap();
        sent += chunk.len();
    }
    assert!(
        sent <= WINDOW as usize,
        "{sent} bytes went out and nobody read"
    );
    drop((a, b));
    timeout(Duration::from_secs(10), spliced)
        .await
        .expect("the splice hangs")
        .unwrap();
    drop((proxy, relay_near));
    gone(relay_far, agent).await;
}

/// Where the memory budget is used up, a line keeps little for a peer that does not acknowledge, and
/// still delivers everything to one that does.
#[tokio::test]
async fn a_memory_budget_bounds_what_is_kept_for_a_peer_that_does_not_read() {
    const BUDGET: u64 = 512 * 1024;
    let memory = Budget::new(BUDGET);
    let bytes = pattern(3 * WINDOW as usize);
    let mut held = Vec::new();
    let mut kept = 0;
    for _ in 0..6 {
        // The network takes as much as the peer's window.
        let (a, b) = pipe(2 * WINDOW as usize);
        let (a, mut b) = line_pair(a, b).await;
        b.charge(memory.clone());
        let mut sent = 0;
        while let Ok(result) = timeout(
            Duration::from_millis(200),
            b.write(&bytes[sent..sent + 16 * 1024]),
        )
        .await
        {
            sent += result.unwrap();
        }
        assert!(
            sent >= 128 * 1024,
            "{sent} bytes are too few for an acknowledgement"
        );
        kept += sent as u64;
        held.push((a, b, sent));
    }
    assert!(memory.used() <= BUDGET);
    // What no budget is asked for, and a piece that was begun.
    let unasked = 6 * 256 * 1024;
    assert!(kept <= BUDGET + unasked, "{kept} bytes are kept");
    for (mut a, mut b, sent) in held {
        let rest = async {
            b.write_all(&bytes[sent..]).await.unwrap();
            b.shutdown().await.unwrap();
        };
        let mut got = Vec::new();
        let (read, ()) = timeout(Duration::from_secs(30), async {
            tokio::join!(a.read_to_end(&mut got), rest)
        })
        .await
        .expect("stands still");
        read.unwrap();
        assert!(got == bytes);
    }
    assert_eq!(memory.used(), 0);
}

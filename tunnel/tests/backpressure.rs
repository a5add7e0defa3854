//! Both sides flood, over a pipe far smaller than any window. Neither side may deadlock.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::time::Duration;

use support::{gone, pair, pattern, stream};
use throwline_tunnel::mux::Stream;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

const BYTES: usize = 2 * 1024 * 1024;

/// Writes everything, then reads everything: what a splice never does, and what shows whether
/// windows alone keep both sides moving.
async fn flood(stream: Stream) {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let sent = pattern(BYTES);
    let write = async {
        writer.write_all(&sent).await.unwrap();
        writer.shutdown().await.unwrap();
    };
    let read = async {
        let mut got = Vec::new();
        reader.read_to_end(&mut got).await.unwrap();
        got
    };
    let ((), got) = tokio::join!(write, read);
    assert!(
        got == pattern(BYTES),
        "{} bytes came, not those sent",
        got.len()
    );
}

async fn flood_both_ways(pipe: usize, streams: usize) {
    let (dialed, mut accepted) = pair(pipe).await;
    let mut ends = Vec::new();
    for _ in 0..streams {
        let (a, b) = stream(&dialed, &mut accepted).await;
        ends.extend([tokio::spawn(flood(a)), tokio::spawn(flood(b))]);
    }
    for end in ends {
        timeout(Duration::from_secs(60), end)
            .await
            .expect("stands still")
            .unwrap();
    }
    gone(dialed, accepted).await;
}

#[tokio::test]
async fn one_stream_over_a_pipe_of_64_bytes() {
    flood_both_ways(64, 1).await;
}

#[tokio::test]
async fn eight_streams_over_a_pipe_of_4_kib() {
    flood_both_ways(4096, 8).await;
}

#[tokio::test]
async fn a_reader_that_stops_stops_only_its_own_stream() {
    let (dialed, mut accepted) = pair(64 * 1024).await;
    let (mut stuck, idle) = stream(&dialed, &mut accepted).await;
    let (mut live, mut end) = stream(&dialed, &mut accepted).await;
    let flood = tokio::spawn(async move {
        let chunk = vec![1; 64 * 1024];
        let mut total = 0;
        while let Ok(Ok(())) = timeout(Duration::from_secs(1), stuck.write_all(&chunk)).await {
            total += chunk.len();
        }
        total
    });
    for _ in 0..100 {
        live.write_all(b"ping").await.unwrap();
        live.flush().await.unwrap();
        let mut got = [0; 4];
        let read = end.read_exact(&mut got);
        timeout(Duration::from_secs(1), read)
            .await
            .expect("held up")
            .unwrap();
    }
    let held = flood.await.unwrap();
    assert!(
        held <= 1024 * 1024,
        "{held} bytes are held for a reader that stopped"
    );
    drop((live, end, idle));
    gone(dialed, accepted).await;
}

//! A whole line on a stream of any bytes: a clean end only behind a FIN.
#![no_main]

use std::sync::LazyLock;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use throwline_tunnel::line::{self, LineBudgets};
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio::runtime::{Builder, Runtime};

/// Its clock is paused, so that a deadline costs nothing.
static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .expect("a runtime")
});

fuzz_target!(|data: &[u8]| {
    RUNTIME.block_on(async {
        let (ours, mut theirs) = duplex(64 * 1024);
        let write = async {
            // Ours may have given up.
            let _ = theirs.write_all(data).await;
            let _ = theirs.shutdown().await;
            let mut answer = Vec::new();
            let _ = theirs.read_to_end(&mut answer).await;
        };
        let read = async {
            let Ok(Ok(mut line)) = line::accept(ours, Duration::ZERO, LineBudgets::default())
                .await
                .map(line::Accepted::into_new)
            else {
                return;
            };
            let mut bytes = Vec::new();
            if line.read_to_end(&mut bytes).await.is_ok() {
                assert!(
                    data.iter().any(|byte| *byte == 0x12),
                    "a clean end without a FIN"
                );
            }
        };
        tokio::join!(write, read);
    });
});

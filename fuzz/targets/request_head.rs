//! The head of an HTTP/1.1 request: whatever passes has one reading.
#![no_main]

use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use throwline_tunnel::http1::head;
use tokio::runtime::{Builder, Runtime};

static RUNTIME: std::sync::LazyLock<Runtime> = std::sync::LazyLock::new(|| {
    Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .expect("a runtime")
});

fuzz_target!(|data: &[u8]| {
    let mut input = data;
    let limit = Duration::from_secs(1);
    let Ok(bytes) = RUNTIME.block_on(head::read(&mut input, limit, limit)) else {
        return;
    };
    assert!(data.starts_with(&bytes), "bytes were changed");
    // Up to its end there is no bare line feed, which the next parser might read as an end.
    let end = bytes
        .windows(4)
        .position(|window| window == b"\r\n\r\n")
        .expect("a head has an end");
    for at in 0..end {
        assert!(
            bytes[at] != b'\n' || bytes[at - 1] == b'\r',
            "a bare line feed passed"
        );
    }
});

//! The PROXY protocol's header: whatever is taken is one header, and nothing beyond it.
#![no_main]

#[allow(dead_code, reason = "the crate uses more of it than this target")]
#[path = "../../../relay/src/http/proxy_header.rs"]
mod proxy_header;

use libfuzzer_sys::fuzz_target;
use tokio::runtime::{Builder, Runtime};

/// Either version with its bound.
const MOST: usize = 16 + 1024;

static RUNTIME: std::sync::LazyLock<Runtime> =
    std::sync::LazyLock::new(|| Builder::new_current_thread().build().expect("a runtime"));

fuzz_target!(|data: &[u8]| {
    let mut rest = data;
    let found = RUNTIME.block_on(proxy_header::read(&mut rest));
    let taken = data.len() - rest.len();
    assert!(taken <= MOST, "{taken} bytes were read of a bounded header");
    let Ok(client) = found else { return };
    // What stood behind the header had no say in it, and is all still there.
    let mut alone = &data[..taken];
    let again = RUNTIME
        .block_on(proxy_header::read(&mut alone))
        .expect("the header alone is one");
    assert_eq!(again, client, "the bytes behind the header changed it");
    if let Some(client) = client {
        assert_eq!(client.ip(), client.ip().to_canonical());
    }
});

//! The channel frames of Kubernetes' WebSocket protocols.
#![no_main]

use libfuzzer_sys::fuzz_target;
use throwline_kube_wire::stream::channel;

fuzz_target!(|data: &[u8]| {
    for closing in [false, true] {
        let _ = channel::decode_channel(data, closing);
    }
    if let Some((rows, columns)) = channel::terminal_size(data) {
        let _ = (rows, columns);
    }
});

//! Both ends of a line through any sequence of writes, reads, cuts and resumptions: nothing is
//! lost, nothing arrives twice, and when the network is well again, everything arrives.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../../tunnel/tests/support/line_pair.rs"]
mod line_pair;

use line_pair::{Op, Pair};

fuzz_target!(|data: &[u8]| {
    let mut pair = Pair::default();
    // More than this takes long and finds no more.
    for step in data.chunks_exact(6).take(300) {
        let [kind, side, bytes @ ..] = step else {
            return;
        };
        let bytes = bytes
            .iter()
            .fold(0, |all, byte| all << 8 | u32::from(*byte));
        pair.apply(Op::of(*kind, side % 2 == 1, bytes));
    }
    pair.heal();
});

//! WebSocket frames that pass through the local proxy: where they end, however they are cut.
#![no_main]

use libfuzzer_sys::fuzz_target;
use throwline_kube_wire::stream::websocket::{Frames, Opcode, frame};

const CHANNEL: u8 = 3;

/// What follows the bytes, by a decoder that has all of them at once (RFC 6455, section 5.2).
#[derive(Debug, PartialEq, Eq)]
struct Place {
    may_close: bool,
    may_speak: bool,
    is_spoken: bool,
}

fn expected(mut bytes: &[u8]) -> Place {
    let (mut in_message, mut is_closed, mut is_spoken) = (false, false, false);
    let lost = |is_spoken| Place {
        may_close: false,
        may_speak: false,
        is_spoken,
    };
    while let [first, second, rest @ ..] = bytes {
        let extended = match second & 0x7f {
            126 => 2,
            127 => 8,
            _ => 0,
        };
        let Some((length, rest)) = rest.split_at_checked(extended) else {
            return lost(is_spoken);
        };
        let length = match extended {
            0 => u64::from(second & 0x7f),
            _ => length
                .iter()
                .fold(0, |sum, byte| (sum << 8) | u64::from(*byte)),
        };
        let (is_final, opcode) = (first & 0x80 != 0, first & 0x0f);
        let is_sound = match opcode {
            0 => in_message,
            1 | 2 => !in_message,
            8..=10 => is_final && length <= 125,
            _ => false,
        };
        if !is_sound || first & 0x70 != 0 || second & 0x80 != 0 || length > u64::MAX >> 1 {
            return lost(is_spoken);
        }
        is_closed |= opcode == 8;
        if opcode < 8 {
            in_message = !is_final;
        }
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let may_name_a_channel = matches!(opcode, 1 | 2) && (length > 1 || !is_final);
        is_spoken |= may_name_a_channel && length > 0 && rest.first() == Some(&CHANNEL);
        match rest.split_at_checked(length) {
            Some((_, behind)) => bytes = behind,
            None => return lost(is_spoken),
        }
    }
    Place {
        may_close: bytes.is_empty() && !is_closed,
        may_speak: bytes.is_empty() && !is_closed && !in_message,
        is_spoken,
    }
}

fn place(frames: &Frames) -> Place {
    Place {
        may_close: frames.may_close(),
        may_speak: frames.may_speak(),
        is_spoken: frames.is_spoken(),
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((step, bytes)) = data.split_first() else {
        return;
    };
    let mut whole = Frames::new(CHANNEL);
    whole.pass(bytes);
    let mut pieces = Frames::new(CHANNEL);
    for piece in bytes.chunks(usize::from(*step).max(1)) {
        pieces.pass(piece);
    }
    let whole = place(&whole);
    assert_eq!(place(&pieces), whole, "cut in pieces of {step}");
    assert_eq!(whole, expected(bytes));

    let mut ours = Frames::new(CHANNEL);
    ours.pass(&frame(Opcode::Binary, bytes));
    assert!(ours.may_speak(), "our own frame is none");
    ours.pass(&frame(Opcode::Close, &bytes[..bytes.len().min(125)]));
    assert!(!ours.may_close(), "something may follow a close");
});

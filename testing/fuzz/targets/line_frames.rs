//! Line frames as a sequence: headers into the state machine of both halves, in the order in which
//! a peer sends them, with a reader that takes what the input tells it to.
#![no_main]

use bytes::{Buf, BytesMut};
use libfuzzer_sys::fuzz_target;
use throwline_tunnel::proto::line::{HEADER_LEN, Header, Receiver, Sender, WINDOW, parse};

fuzz_target!(|data: &[u8]| {
    let Some((window, data)) = data.split_first() else {
        return;
    };
    let window = (u32::from(*window) + 1) * (WINDOW / 256);
    let (mut receiver, mut sender) = (Receiver::new(window), Sender::new(window));
    let mut input = BytesMut::from(data);
    let (mut received, mut consumed) = (0u64, 0u64);
    while let Ok(Some(header)) = parse(&input) {
        input.advance(HEADER_LEN);
        match header {
            Header::Data { offset, len } => {
                if receiver.on_data(offset, len).is_err() {
                    return;
                }
                received += len as u64;
                assert!(
                    received - consumed <= 2 * u64::from(window),
                    "more than the window is held"
                );
                input.advance(len.min(input.len()));
                // The reader takes some of it, more or less.
                let take = (received - consumed).min(offset % 70_000 + 1);
                receiver.consume(usize::try_from(take).expect("small"));
                consumed += take;
                if let Some(ack) = receiver.take_ack() {
                    assert!(ack <= received, "acknowledged what never came");
                }
            }
            Header::Ack { received } => {
                let room = sender.room();
                sender.advance(room.min(1000));
                if sender.on_ack(received).is_err() {
                    return;
                }
                assert!(sender.room() <= window as usize);
            }
            Header::Fin { end } => {
                if receiver.on_fin(end).is_err() {
                    return;
                }
                assert_eq!(end, received, "an end that is not where the data ended");
            }
            Header::Reset { .. } => return,
            Header::Hello { len }
            | Header::HelloReply { len }
            | Header::Resume { len, .. }
            | Header::Ok { len, .. }
            | Header::Gone { len, .. } => input.advance(len.min(input.len())),
            Header::Done { .. } | Header::Ping | Header::Pong | Header::Move => {}
        }
    }
});

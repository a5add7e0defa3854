//! SPDY frames and their compressed headers, one after another as on a connection.
#![no_main]

use bytes::{Buf, BytesMut};
use libfuzzer_sys::fuzz_target;
use throwline_kube_wire::stream::spdy::{self, Frame};
use throwline_kube_wire::stream::spdy_headers;

fuzz_target!(|data: &[u8]| {
    let mut input = BytesMut::from(data);
    let mut decoder = spdy_headers::Decoder::new();
    while let Ok(Some((frame, length))) = spdy::decode(&input) {
        assert!(length <= input.len() && length >= 8);
        let mut again = BytesMut::new();
        frame.encode(&mut again);
        if !matches!(frame, Frame::Ignored { .. }) {
            let (decoded, _) = spdy::decode(&again).expect("our own frame").expect("whole");
            assert_eq!(decoded, frame);
        }
        input.advance(length);
        if let Frame::SynStream { headers, .. }
        | Frame::SynReply { headers, .. }
        | Frame::Headers { headers, .. } = frame
            && decoder.decode(&headers).is_err()
        {
            return;
        }
    }
});

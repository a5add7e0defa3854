//! Every message of the wire, from any bytes: what decodes must encode to the same again.
#![no_main]

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use throwline_tunnel::proto::messages::{
    Certificate, Challenge, ClusterList, ControlMessage, HandshakeReply, Proof, StreamHeader,
    StreamReply,
};
use throwline_tunnel::proto::wire;

fn short<M: prost::Message + Default + PartialEq + std::fmt::Debug>(data: &[u8]) {
    let mut buffer = BytesMut::from(data);
    let Ok(Some(message)) = wire::decode::<M>(&mut buffer, wire::HANDSHAKE_CAP) else {
        return;
    };
    if let Ok(bytes) = wire::encode(&message, wire::HANDSHAKE_CAP) {
        let mut again = BytesMut::from(&bytes[..]);
        let decoded = wire::decode::<M>(&mut again, wire::HANDSHAKE_CAP);
        assert_eq!(decoded.expect("our own bytes"), Some(message));
        assert!(again.is_empty());
    }
}

fn long<M: prost::Message + Default + PartialEq + std::fmt::Debug>(data: &[u8]) {
    let mut buffer = BytesMut::from(data);
    let _ = wire::decode_long::<M>(&mut buffer, wire::CLUSTER_LIST_CAP);
}

fuzz_target!(|data: &[u8]| {
    let Some((which, data)) = data.split_first() else {
        return;
    };
    match which % 8 {
        0 => short::<Challenge>(data),
        1 => short::<Proof>(data),
        2 => short::<HandshakeReply>(data),
        3 => short::<StreamHeader>(data),
        4 => short::<StreamReply>(data),
        5 => short::<ControlMessage>(data),
        6 => long::<ClusterList>(data),
        _ => long::<Certificate>(data),
    }
});

//! Requests and WebSocket frames written by hand, for peers that a proper dialer never is.

use std::collections::HashMap;
use std::net::SocketAddr;

use throwline_certs::{Identity, jws, sha256};
use throwline_tunnel::proto::assertion::{Claims, audience};
use throwline_tunnel::proto::challenge::transcript;
use throwline_tunnel::proto::messages::{Challenge, HandshakeReply, Proof, Role};
use throwline_tunnel::proto::wire::{self, HANDSHAKE_CAP};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use url::Url;

use crate::harness::{PATIENCE, unique, unix_now};

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HashMap<String, String>,
    pub(crate) body: String,
    stream: TcpStream,
    early: Vec<u8>,
}

impl Answer {
    pub(crate) fn code(&self) -> String {
        let body: serde_json::Value = serde_json::from_str(&self.body).unwrap();
        body["code"].as_str().unwrap().to_owned()
    }
}

/// Sends a request's bytes and reads the answer; of a 101, its head.
pub(crate) async fn send(address: SocketAddr, request: &[u8]) -> Answer {
    tokio::time::timeout(PATIENCE, exchange(address, request))
        .await
        .expect("an answer")
}

async fn exchange(address: SocketAddr, request: &[u8]) -> Answer {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request).await.unwrap();
    let mut read = Vec::new();
    let end = loop {
        if let Some(end) = read.windows(4).position(|four| four == b"\r\n\r\n") {
            break end;
        }
        assert_ne!(stream.read_buf(&mut read).await.unwrap(), 0, "no answer");
    };
    let head = String::from_utf8(read[..end].to_vec()).unwrap();
    let mut early = read.split_off(end + 4);
    let mut lines = head.split("\r\n");
    let status = lines.next().unwrap()[9..12].parse().unwrap();
    let headers = lines
        .map(|line| line.split_once(": ").unwrap())
        .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
        .collect();
    let mut body = String::new();
    if status != 101 {
        // One request a connection: the body ends with it.
        stream.read_to_end(&mut early).await.unwrap();
        body = String::from_utf8(std::mem::take(&mut early)).unwrap();
    }
    Answer {
        status,
        headers,
        body,
        stream,
        early,
    }
}

pub(crate) async fn get(address: SocketAddr, path: &str) -> Answer {
    let request = format!("GET {path} HTTP/1.1\r\nHost: relay\r\n\r\n");
    send(address, request.as_bytes()).await
}

pub(crate) async fn post(address: SocketAddr, path: &str, body: &str) -> Answer {
    let request = format!(
        "POST {path} HTTP/1.1\r\nHost: relay\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    send(address, request.as_bytes()).await
}

/// The claims of an honest peer.
pub(crate) fn claims(identity: &Identity, relay: &Url) -> Claims {
    let jti = format!("{:032x}", unique());
    Claims::new(identity.id().to_string(), audience(relay), unix_now(), jti)
}

pub(crate) fn assertion(identity: &Identity, relay: &Url) -> String {
    jws::sign(identity, &claims(identity, relay)).unwrap()
}

/// An upgrade with these values of `Authorization` and `Sec-WebSocket-Protocol`.
pub(crate) fn upgrade(host: &str, path: &str, assertion: &str, protocol: &str) -> String {
    format!(
        "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
         Sec-WebSocket-Protocol: {protocol}\r\nAuthorization: Bearer {assertion}\r\n\r\n"
    )
}

pub(crate) async fn carrier(address: SocketAddr, assertion: &str) -> Answer {
    let request = upgrade("relay", "/v1/carrier", assertion, "throwline.v1");
    send(address, request.as_bytes()).await
}

/// A WebSocket after its 101, for as far as the handshake needs one.
pub(crate) struct Socket {
    stream: TcpStream,
    raw: bytes::BytesMut,
    payload: bytes::BytesMut,
}

impl Socket {
    pub(crate) fn after(answer: Answer) -> Self {
        assert_eq!(answer.status, 101, "{}", answer.body);
        Self {
            stream: answer.stream,
            raw: answer.early.as_slice().into(),
            payload: bytes::BytesMut::new(),
        }
    }

    /// One message of the handshake; `None` when the relay closed instead.
    pub(crate) async fn read<M: prost::Message + Default>(&mut self) -> Option<M> {
        loop {
            if let Some(message) = wire::decode(&mut self.payload, HANDSHAKE_CAP).unwrap() {
                return Some(message);
            }
            let payload = self.frame().await?;
            self.payload.extend_from_slice(&payload);
        }
    }

    /// One unfragmented, unmasked binary frame, as servers send.
    async fn frame(&mut self) -> Option<Vec<u8>> {
        let head = self.take(2).await?;
        if head[0] == 0x88 {
            return None;
        }
        assert_eq!(head[0], 0x82, "a binary message");
        let length = match head[1] {
            126 => {
                let long = self.take(2).await?;
                usize::from(u16::from_be_bytes([long[0], long[1]]))
            }
            short => usize::from(short),
        };
        self.take(length).await
    }

    async fn take(&mut self, length: usize) -> Option<Vec<u8>> {
        while self.raw.len() < length {
            let read = self.stream.read_buf(&mut self.raw);
            let read = tokio::time::timeout(PATIENCE, read).await.expect("bytes");
            if !matches!(read, Ok(1..)) {
                return None;
            }
        }
        Some(self.raw.split_to(length).to_vec())
    }

    pub(crate) async fn write<M: prost::Message>(&mut self, message: &M) {
        let payload = wire::encode(message, HANDSHAKE_CAP).unwrap();
        // A mask of zeros is a mask.
        let length = u16::try_from(payload.len()).unwrap().to_be_bytes();
        let mut frame = vec![0x82, 0x80 | 126, length[0], length[1], 0, 0, 0, 0];
        frame.extend_from_slice(&payload);
        self.stream.write_all(&frame).await.unwrap();
    }

    /// Answers the challenge with what `bend` makes of an honest proof.
    pub(crate) async fn prove(
        &mut self,
        identity: &Identity,
        assertion: &str,
        relay: &Url,
        bend: impl FnOnce(&mut Proof),
    ) -> Option<HandshakeReply> {
        let challenge: Challenge = self.read().await?;
        let mut proof = Proof {
            version: 1,
            nonce: vec![9; 32],
            role: Role::LocalProxy.into(),
            instance: "raw".into(),
            software: "raw/1".into(),
            ..Proof::default()
        };
        let signed = transcript(
            &challenge.nonce,
            &proof.nonce,
            &sha256(assertion.as_bytes()),
            &audience(relay),
            proof.version,
        );
        proof.signature = identity.sign(&signed).unwrap();
        bend(&mut proof);
        self.write(&proof).await;
        self.read().await
    }
}

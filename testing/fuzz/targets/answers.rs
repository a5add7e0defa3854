//! What servers answer before anything is trusted. The first byte chooses: a proxy's answer to
//! CONNECT, a relay's to the upgrade, a relay's to an enrolment, and an enrolment's request.
#![no_main]

#[path = "shared/authority.rs"]
mod authority;

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use throwline_certs::EnrolmentToken;
use throwline_certs::enrol::{Asker, EnrolRequest, redeem_over};
use throwline_certs::tls::Trust;
use throwline_tunnel::carrier::{self, DialConfig, Prover, Proxies};
use throwline_tunnel::proto::messages::Role;
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio::net::TcpListener;
use tokio::runtime::{Builder, Runtime};
use url::Url;

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime")
});

fuzz_target!(|data: &[u8]| {
    let Some((which, data)) = data.split_first() else {
        return;
    };
    match which % 4 {
        0 => RUNTIME.block_on(connect(data)),
        1 => RUNTIME.block_on(upgrade(data)),
        2 => {
            // Made on another runtime, so not within this one.
            LazyLock::force(&TOKEN);
            RUNTIME.block_on(enrolled(data));
        }
        _ => enrolment(data),
    }
});

/// A server that answers the first request by these bytes and an end.
async fn answering(data: &[u8]) -> (u16, impl Future<Output = ()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("its address").port();
    let serving = async move {
        let Ok((mut tcp, _)) = listener.accept().await else {
            return;
        };
        let _ = tcp.read(&mut [0; 16 * 1024]).await;
        // The client may have hung up.
        let _ = tcp.write_all(data).await;
        let _ = tcp.shutdown().await;
        while let Ok(1..) = tcp.read(&mut [0; 4096]).await {}
    };
    (port, serving)
}

async fn connect(data: &[u8]) {
    let (port, serving) = answering(data).await;
    let proxies = Proxies::always(&format!("http://127.0.0.1:{port}"), "--proxy");
    let proxies = proxies.expect("a proxy's URL");
    let relay = Url::parse("https://relay.example").expect("a URL");
    let asking = async {
        let Ok(mut stream) = carrier::reach(&relay, &proxies).await else {
            return;
        };
        let mut behind = Vec::new();
        // A reset is no loss here: the kernel may send one after an unread request.
        let read = stream.read_to_end(&mut behind).await;
        let answer = data.trim_ascii_start();
        assert!(answer.starts_with(b"HTTP/1."), "a tunnel without an answer");
        // What the far end sent at once is behind the answer, all of it.
        assert!(data.ends_with(&behind), "bytes were made up");
        let head = &data[..data.len() - behind.len()];
        if read.is_ok() {
            let ends = [&b"\r\n\r\n"[..], b"\n\n", b"\n\r\n"];
            assert!(ends.iter().any(|end| head.ends_with(end)), "bytes are lost");
        }
    };
    tokio::join!(serving, asking);
}

async fn upgrade(data: &[u8]) {
    let (port, serving) = answering(data).await;
    let relay = Url::parse(&format!("http://127.0.0.1:{port}")).expect("a URL");
    let prover = Prover {
        assertion: Box::new(|claims| Ok(format!("assertion-of-{}", claims.sub))),
        sign: Box::new(|transcript| Ok(transcript.to_vec())),
        sha256: |_| [7; 32],
        id: "spiffe://fuzz/cluster/c".to_owned(),
    };
    let mut config = DialConfig::new(relay, None, Arc::new(prover), Role::Agent, "fuzz");
    // A close frame waits so long for its echo.
    config.timing.close = Duration::from_millis(1);
    let dialling = async {
        if let Ok(connection) = carrier::dial(&config).await {
            let switched = data.windows(5).any(|five| five == b" 101 ");
            assert!(switched, "a carrier without a 101");
            drop(connection);
        }
    };
    tokio::join!(serving, dialling);
}

static TOKEN: LazyLock<EnrolmentToken> = LazyLock::new(|| {
    let fixture = &*authority::FIXTURE;
    let url = Url::parse("http://127.0.0.1:1").expect("a URL");
    let subject = throwline_authority::Subject::Cluster("alpha".to_owned());
    let life = Duration::from_secs(3600);
    let token = fixture.authority.create_token(&subject, life, &url);
    fixture.runtime.block_on(token).expect("a token")
});

/// The answer's body: as it is, or ours with bytes changed, by its first byte.
async fn enrolled(data: &[u8]) {
    let fixture = &*authority::FIXTURE;
    let Some((which, data)) = data.split_first() else {
        return;
    };
    let answer = match which % 3 {
        // A whole answer with its head.
        0 => data.to_vec(),
        1 => response(data),
        _ => {
            // Of the right authority, for another key.
            let body = serde_json::json!({
                "chain": fixture.identity.chain_pem(),
                "ca": fixture.authority.roots().to_pem(),
            });
            let mut body = body.to_string().into_bytes();
            for change in data.chunks_exact(3) {
                let at = usize::from(u16::from_be_bytes([change[0], change[1]])) % body.len();
                body[at] = change[2];
            }
            response(&body)
        }
    };
    let (near, mut far) = duplex(64 * 1024);
    let serving = async move {
        let _ = far.read(&mut [0; 4096]).await;
        let _ = far.write_all(&answer).await;
        let _ = far.shutdown().await;
        while let Ok(1..) = far.read(&mut [0; 4096]).await {}
    };
    let connecting = async { Ok::<_, std::io::Error>(near) };
    let redeeming = redeem_over(&TOKEN, &Asker::User, Trust::default(), connecting);
    let ((), redeemed) = tokio::join!(serving, redeeming);
    let error = redeemed.expect_err("an identity for a key that nobody signed");
    let shown = error.to_string();
    assert!(!shown.contains(&TOKEN.secret.expose()), "a secret is shown");
}

fn response(body: &[u8]) -> Vec<u8> {
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
    [head.as_bytes(), body].concat()
}

/// What a relay does with the body before it asks its database.
fn enrolment(data: &[u8]) {
    let Ok(request) = serde_json::from_slice::<EnrolRequest>(data) else {
        return;
    };
    let Some(key) = request.key() else {
        return;
    };
    assert_eq!(key.len(), 32);
    assert!(!request.is_signed(&key, &[7; 32]), "signed without the key");
}

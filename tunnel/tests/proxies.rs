//! The way through an HTTP proxy, and what each of its answers becomes.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::time::Duration;

use support::{accept_config, dial_config, gone};
use throwline_tunnel::carrier::{self, Connection, DialConfig, DialError, Proxies, ProxyFault};
use throwline_tunnel::ws;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// Only a proxy could find it.
const RELAY: &str = "http://relay.invalid:8080";

async fn head(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    String::from_utf8(head).unwrap()
}

fn through(proxy: &str) -> DialConfig {
    let mut config = dial_config(RELAY);
    config.allow_plaintext = true;
    config.proxies = Proxies::always(proxy, "a test").unwrap();
    config
}

async fn listener() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (listener, address)
}

/// A proxy that answers one CONNECT with these bytes and ends.
async fn answering(answer: Vec<u8>) -> (String, JoinHandle<String>) {
    let (listener, address) = listener().await;
    let serving = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let head = head(&mut stream).await;
        // Who reads no more may have closed by now.
        let _ = stream.write_all(&answer).await;
        let _ = stream.shutdown().await;
        let _ = stream.read_to_end(&mut Vec::new()).await;
        head
    });
    (address, serving)
}

/// The fault that this answer becomes, without and with a user in the proxy's URL.
async fn faults(answer: &str) -> [ProxyFault; 2] {
    let mut faults = Vec::new();
    for user in ["", "ann:secret@"] {
        let (address, serving) = answering(answer.into()).await;
        let config = through(&format!("http://{user}{address}"));
        let error = carrier::dial(&config).await.unwrap_err();
        assert!(
            serving
                .await
                .unwrap()
                .starts_with("CONNECT relay.invalid:8080 ")
        );
        let said = error.to_string();
        assert!(said.starts_with(&format!("the proxy {address} ")), "{said}");
        assert!(!said.contains("secret"), "{said}");
        let transient = error.is_transient();
        let DialError::Proxy { fault, .. } = error else {
            panic!("{said}")
        };
        assert_eq!(transient, fault.is_transient());
        faults.push(fault);
    }
    faults.try_into().unwrap()
}

#[tokio::test]
async fn a_carrier_goes_through() {
    let (listener, address) = listener().await;
    let accepting = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let asked = head(&mut stream).await;
        stream
            .write_all(b"HTTP/1.1 200 Connection established\r\nContent-Length: 5\r\n\r\n")
            .await
            .unwrap();
        // From here on it is the relay who speaks.
        let upgrade = head(&mut stream).await;
        let key = upgrade.lines().find_map(|line| {
            let (name, value) = line.split_once(": ")?;
            name.eq_ignore_ascii_case("sec-websocket-key")
                .then_some(value)
        });
        let accept = ws::accept_key(key.unwrap().as_bytes());
        let answer = format!(
            "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Accept: {accept}\r\nSec-WebSocket-Protocol: throwline.v1\r\n\r\n"
        );
        stream.write_all(answer.as_bytes()).await.unwrap();
        let accepted = carrier::accept(stream, accept_config(), |_, _| Ok(())).await;
        (asked, upgrade, accepted.unwrap().0)
    };
    let config = through(&format!(
        "http://ann:p%40ss%3Aw%2Frd%25%C3%A9%20%23%3F@{address}"
    ));
    let (dialed, (asked, upgrade, accepted)) = tokio::join!(carrier::dial(&config), accepting);
    let dialed: Connection = dialed.unwrap();
    let asked = asked.to_ascii_lowercase();
    assert!(
        asked.starts_with("connect relay.invalid:8080 http/1.1\r\n"),
        "{asked}"
    );
    assert!(
        asked.contains("\r\nhost: relay.invalid:8080\r\n"),
        "{asked}"
    );
    assert!(asked.contains("\r\nuser-agent: throwline/"), "{asked}");
    let credentials = "proxy-authorization: basic yw5uonbac3m6dy9yzcxdqsajpw==";
    assert!(asked.contains(credentials), "{asked}");
    // They are the proxy's, not the relay's.
    assert!(
        !upgrade.to_ascii_lowercase().contains("proxy-"),
        "{upgrade}"
    );
    drop(listener);
    gone(dialed, accepted).await;
}

#[tokio::test]
async fn what_came_with_the_answer_is_not_lost() {
    let answer = b"HTTP/1.1 200 OK\r\n\r\nearly".to_vec();
    let (address, serving) = answering(answer).await;
    let proxies = Proxies::always(&address, "a test").unwrap();
    let relay = "https://relay.invalid".parse().unwrap();
    let mut stream = carrier::reach(&relay, &proxies).await.unwrap();
    let mut early = String::new();
    stream.read_to_string(&mut early).await.unwrap();
    assert_eq!(early, "early");
    drop(stream);
    assert!(
        serving
            .await
            .unwrap()
            .starts_with("CONNECT relay.invalid:443 ")
    );
}

#[tokio::test]
async fn credentials_are_asked_for_by_what_was_given() {
    let answer = "HTTP/1.1 407 No\r\nProxy-Authenticate: Negotiate\r\n\
                  proxy-authenticate: BASIC realm=\"x\"\r\nContent-Length: 4\r\n\r\nbody";
    let [without, with] = faults(answer).await;
    assert!(
        matches!(without, ProxyFault::CredentialsMissing),
        "{without}"
    );
    assert!(matches!(with, ProxyFault::CredentialsRefused), "{with}");
    assert!(!without.is_transient() && !with.is_transient());
    let [without, _] = faults("HTTP/1.1 407 No\r\n\r\n").await;
    assert!(
        matches!(without, ProxyFault::CredentialsMissing),
        "{without}"
    );

    let answer =
        "HTTP/1.1 407 No\r\nProxy-Authenticate: NTLM\r\nProxy-Authenticate: Negotiate\r\n\r\n";
    for fault in faults(answer).await {
        let said = fault.to_string();
        assert!(said.contains("NTLM, Negotiate"), "{said}");
        assert!(said.contains("relay.invalid:8080"), "{said}");
    }
}

#[tokio::test]
async fn each_refusal_says_who_can_help() {
    let [fault, _] = faults("HTTP/1.1 403 Forbidden\r\n\r\n<html>").await;
    assert!(!fault.is_transient());
    let said = fault.to_string();
    assert!(
        said.contains("does not allow CONNECT to relay.invalid:8080"),
        "{said}"
    );
    assert!(said.contains("403"), "{said}");
    for status in [500, 502, 503, 504] {
        let [fault, _] = faults(&format!("HTTP/1.1 {status} x\r\n\r\n")).await;
        assert!(fault.is_transient());
        assert!(
            matches!(&fault, ProxyFault::NoWay { to, status: is } if to == "relay.invalid:8080" && *is == status),
            "{fault}"
        );
    }
}

#[tokio::test]
async fn what_is_no_proxy_is_distinguished_from_one_that_goes_away() {
    for answer in [
        "SSH-2.0-OpenSSH_9.9\r\n",
        "\u{15}\u{3}\u{3}\0\u{2}\u{2}\n",
        "HTTP/1.1 302 Found\r\nLocation: /portal\r\n\r\n",
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    ] {
        for fault in faults(answer).await {
            assert!(
                matches!(fault, ProxyFault::NotAProxy(_)),
                "{answer:?}: {fault:?}"
            );
        }
    }
    for answer in ["", "HTTP/1.1 200 O"] {
        for fault in faults(answer).await {
            assert!(
                matches!(fault, ProxyFault::Lost(_)),
                "{answer:?}: {fault:?}"
            );
            assert!(fault.is_transient());
        }
    }
}

#[tokio::test]
async fn a_head_without_end_is_not_read_to_its_end() {
    let (listener, address) = listener().await;
    let serving = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        head(&mut stream).await;
        stream.write_all(b"HTTP/1.1 200 OK\r\nx: ").await.unwrap();
        // Until the dialer has had enough.
        while stream.write_all(&[b'x'; 4096]).await.is_ok() {}
    });
    let error = carrier::dial(&through(&address)).await.unwrap_err();
    let DialError::Proxy { fault, .. } = error else {
        panic!("{error}")
    };
    assert!(matches!(fault, ProxyFault::NotAProxy(_)), "{fault:?}");
    serving.await.unwrap();
}

#[tokio::test]
async fn silence_and_absence_are_the_proxys() {
    let (listener, address) = listener().await;
    let mut config = through(&address);
    config.timing.connect = Duration::from_millis(100);
    let error = carrier::dial(&config).await.unwrap_err();
    let said = error.to_string();
    assert!(
        matches!(
            error,
            DialError::Proxy {
                fault: ProxyFault::Timeout { .. },
                ..
            }
        ),
        "{said}"
    );
    assert!(said.contains(&address) && error.is_transient(), "{said}");

    drop(listener);
    let error = carrier::dial(&through(&address)).await.unwrap_err();
    assert!(
        matches!(
            error,
            DialError::Proxy {
                fault: ProxyFault::Connect(_),
                ..
            }
        ),
        "{error}"
    );
    let error = carrier::dial(&through("http://ann:secret@proxy.invalid:1")).await;
    let said = error.unwrap_err().to_string();
    assert!(
        said.starts_with("the proxy proxy.invalid:1 cannot be found"),
        "{said}"
    );
}

/// An https:// proxy without anything to check it against is a mistake of the caller's, not a
/// connection in the clear.
#[tokio::test]
async fn a_proxy_over_tls_is_never_spoken_to_in_the_clear() {
    let (listener, address) = listener().await;
    let error = carrier::dial(&through(&format!("https://ann:secret@{address}"))).await;
    let error = error.unwrap_err();
    assert!(
        matches!(
            error,
            DialError::Proxy {
                fault: ProxyFault::NoTrust,
                ..
            }
        ),
        "{error}"
    );
    let (mut stream, _) = listener.accept().await.unwrap();
    let mut said = Vec::new();
    stream.read_to_end(&mut said).await.unwrap();
    assert!(said.is_empty());
}

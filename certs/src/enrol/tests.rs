use super::*;
use crate::{
    directory::{Directory as _, Issued},
    testing::TestAuthority,
    tls::{self, HttpsCertificate, RelayCertificate},
};
use http_body_util::{BodyExt, Full};
use hyper::{Request, Response, body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use std::{io, path::Path, sync::Arc};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

/// A relay that supports enrolment only.
struct Relay {
    url: Url,
    authority: TestAuthority,
}

/// What the relay answers.
#[derive(Clone)]
enum Behaviour {
    Honest,
    Fixed(u16, &'static str),
    /// Issues, but shows another CA.
    OtherCa(Arc<TestAuthority>),
}

async fn relay(scheme: &str, behaviour: Behaviour) -> Relay {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let url = Url::parse(&format!("{scheme}://127.0.0.1:{port}/below/")).unwrap();
    let authority = TestAuthority::new(&url);
    let tls = acceptor(&authority, &url).await;
    let tls = (scheme == "https").then_some(tls);
    tokio::spawn(serve(listener, tls, authority.clone(), behaviour));
    Relay { url, authority }
}

async fn acceptor(authority: &TestAuthority, url: &Url) -> TlsAcceptor {
    let certificate = HttpsCertificate::issue(authority.directory(), url).await;
    let certificate = RelayCertificate::Own(Arc::new(certificate.unwrap()));
    TlsAcceptor::from(tls::relay_server(certificate).unwrap())
}

async fn serve(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    authority: TestAuthority,
    behaviour: Behaviour,
) {
    loop {
        let (tcp, _) = listener.accept().await.unwrap();
        let (tls, authority, behaviour) = (tls.clone(), authority.clone(), behaviour.clone());
        tokio::spawn(async move {
            let service =
                service_fn(move |request| answer(request, authority.clone(), behaviour.clone()));
            let http = hyper::server::conn::http1::Builder::new();
            match tls {
                Some(tls) => {
                    if let Ok(io) = tls.accept(tcp).await {
                        let _ = http.serve_connection(TokioIo::new(io), service).await;
                    }
                }
                None => {
                    let _ = http.serve_connection(TokioIo::new(tcp), service).await;
                }
            }
        });
    }
}

async fn answer(
    request: Request<Incoming>,
    authority: TestAuthority,
    behaviour: Behaviour,
) -> Result<Response<Full<bytes::Bytes>>, hyper::Error> {
    assert_eq!(request.uri().path(), "/below/v1/enroll");
    let body = request.into_body().collect().await?.to_bytes();
    let request: EnrolRequest = serde_json::from_slice(&body).unwrap();
    let (status, body) = match behaviour {
        Behaviour::Fixed(status, body) => (status, body.to_owned()),
        Behaviour::Honest => match authority.redeem(&request).await {
            Ok(issued) => (200, json(&issued)),
            Err(error) => {
                let body = ErrorBody {
                    code: code::REDEEMED.to_owned(),
                    message: error.to_string(),
                };
                (403, serde_json::to_string(&body).unwrap())
            }
        },
        Behaviour::OtherCa(other) => {
            let mut issued = authority.redeem(&request).await.unwrap();
            issued.ca = other.roots().certificates().to_vec();
            (200, json(&issued))
        }
    };
    let response = Response::builder()
        .status(status)
        .header("retry-after", "7");
    Ok(response.body(Full::new(body.into())).unwrap())
}

fn json(issued: &Issued) -> String {
    serde_json::to_string(&issued.to_answer()).unwrap()
}

fn prod() -> Asker {
    Asker::Cluster {
        uid: "1f".to_owned(),
    }
}

fn file(path: &Path) -> Trust<'_> {
    Trust {
        ca_file: Some(path),
        system: false,
    }
}

async fn token(relay: &Relay) -> EnrolmentToken {
    relay.authority.create_token("prod", &relay.url)
}

#[tokio::test]
async fn a_token_becomes_an_identity_once() {
    for scheme in ["https", "http"] {
        let relay = relay(scheme, Behaviour::Honest).await;
        let token = token(&relay).await;
        let enrolled = redeem(&token, &prod(), Trust::default()).await.unwrap();
        assert_eq!(enrolled.identity.id().name(), "prod");
        assert_eq!(&enrolled.roots, relay.authority.roots());
        let error = redeem(&token, &prod(), Trust::default()).await.unwrap_err();
        assert!(
            matches!(&error, EnrolError::AlreadyRedeemed(text) if text.contains("used already")),
            "{error}"
        );

        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        assert!(Identity::load(&state).unwrap().is_none());
        enrolled.identity.save(&state).unwrap();
        enrolled.roots.save(&state).unwrap();
        let loaded = Identity::load(&state).unwrap().unwrap();
        assert_eq!(loaded.as_peer(), enrolled.identity.as_peer());
        assert_eq!(Roots::load(&state).unwrap().as_ref(), Some(&enrolled.roots));
    }
}

#[tokio::test]
async fn another_authority_is_recognised() {
    let other = relay("https", Behaviour::Honest).await;
    // In the handshake, where the secret has not been sent yet.
    let mut stale = token(&other).await;
    let honest = relay("https", Behaviour::Honest).await;
    stale.relay = honest.url.clone();
    let error = redeem(&stale, &prod(), Trust::default()).await.unwrap_err();
    assert!(matches!(error, EnrolError::WrongPin { .. }), "{error}");
    // In the answer.
    for scheme in ["https", "http"] {
        let liar = relay(
            scheme,
            Behaviour::OtherCa(Arc::new(other.authority.clone())),
        )
        .await;
        let error = redeem(&token(&liar).await, &prod(), Trust::default())
            .await
            .unwrap_err();
        assert!(matches!(error, EnrolError::WrongPin { .. }), "{error}");
    }
}

#[tokio::test]
async fn a_private_ca_of_a_balancer_is_trusted_when_given() {
    // The balancer's CA is any CA; here it is another authority's, without the pin.
    let balancer = relay("https", Behaviour::Honest).await;
    let behind = relay("https", Behaviour::Honest).await;
    let mut through = token(&behind).await;
    through.relay = balancer.url.clone();
    let ca = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(ca.path(), balancer.authority.roots().to_pem()).unwrap();
    let error = redeem(&through, &prod(), file(ca.path()))
        .await
        .unwrap_err();
    // TLS was accepted, and the authority behind it does not know the token.
    assert!(matches!(error, EnrolError::AlreadyRedeemed(_)), "{error}");

    let error = redeem(&through, &prod(), file(Path::new("/no/such/ca")))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("/no/such/ca"), "{error}");
    std::fs::write(ca.path(), "nonsense").unwrap();
    let error = redeem(&through, &prod(), file(ca.path()))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("PEM"), "{error}");
}

#[tokio::test]
async fn each_refusal_has_its_type() {
    let redeem_at = async |status, body| {
        let relay = relay("http", Behaviour::Fixed(status, body)).await;
        redeem(&token(&relay).await, &prod(), Trust::default())
            .await
            .unwrap_err()
    };
    let error = redeem_at(403, r#"{"code":"token-unknown","message":"m"}"#).await;
    assert!(matches!(error, EnrolError::Unknown));
    let error = redeem_at(
        403,
        r#"{"code":"token-expired","message":"at\u001b[31m noon"}"#,
    )
    .await;
    assert!(matches!(error, EnrolError::Expired(text) if text == "at[31m noon"));
    let error = redeem_at(503, "").await;
    assert!(matches!(error, EnrolError::Busy { retry_after } if retry_after.as_secs() == 7));
    let error = redeem_at(404, "<html>").await;
    assert!(matches!(error, EnrolError::NotARelay { status: 404, .. }));
    let error = redeem_at(400, r#"{"code":"bad-request","message":"m"}"#).await;
    assert!(matches!(error, EnrolError::Refused { status: 400, .. }));
    for body in ["", "[]", r#"{"chain":"","ca":1}"#] {
        assert!(matches!(
            redeem_at(200, body).await,
            EnrolError::BadAnswer(_)
        ));
    }
    assert!(matches!(
        redeem_at(200, r#"{"chain":"","ca":""}"#).await,
        EnrolError::WrongPin { .. }
    ));
}

#[tokio::test]
async fn a_relay_that_is_not_there() {
    let relay = relay("https", Behaviour::Honest).await;
    let mut token = token(&relay).await;
    let gone = TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap();
    token.relay = Url::parse(&format!("https://{gone}")).unwrap();
    assert!(matches!(
        redeem(&token, &prod(), Trust::default()).await,
        Err(EnrolError::Unreachable { .. })
    ));
    token.relay = Url::parse("http://relay.example.com").unwrap();
    assert!(matches!(
        redeem(&token, &prod(), Trust::default()).await,
        Err(EnrolError::Insecure { .. })
    ));
    token.relay = Url::parse("https://does-not-exist.invalid").unwrap();
    assert!(matches!(
        redeem(&token, &prod(), Trust::default()).await,
        Err(EnrolError::Resolve { .. })
    ));
}

/// A connector is used instead of the network here, and its error is shown unchanged.
#[tokio::test]
async fn a_connection_may_come_from_elsewhere() {
    let relay = relay("https", Behaviour::Honest).await;
    let mut token = token(&relay).await;
    let port = relay.url.port().unwrap();
    token.relay = Url::parse(&format!("https://relay.example:{port}/below")).unwrap();
    let refused = async { Err::<tokio::net::TcpStream, _>("the proxy is closed") };
    let error = redeem_over(&token, &prod(), Trust::default(), refused)
        .await
        .unwrap_err();
    assert_eq!(error.to_string(), "the proxy is closed");
    // Wherever the stream leads, the name of the token's relay must be in the certificate.
    let led = tokio::net::TcpStream::connect(("127.0.0.1", port));
    let error = redeem_over(&token, &prod(), Trust::default(), led)
        .await
        .unwrap_err();
    assert!(matches!(error, EnrolError::Tls { .. }), "{error}");
    token.relay = relay.url.clone();
    let led = tokio::net::TcpStream::connect(("127.0.0.1", port));
    redeem_over(&token, &prod(), Trust::default(), led)
        .await
        .unwrap();
}

/// A proxy that inspects TLS, when its CA is not configured.
#[tokio::test]
async fn an_unknown_issuer_hints_at_something_in_between() {
    let relay = relay("https", Behaviour::Honest).await;
    let token = token(&relay).await;
    let key = rcgen::KeyPair::generate().unwrap();
    let names = vec!["127.0.0.1".to_owned()];
    let params = rcgen::CertificateParams::new(names).unwrap();
    let certificate = params.self_signed(&key).unwrap();
    let config = rustls::ServerConfig::builder_with_provider(tls::provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![certificate.der().clone()],
            rustls::pki_types::PrivatePkcs8KeyDer::from(key.serialize_der()).into(),
        )
        .unwrap();
    let (near, far) = tokio::io::duplex(64 * 1024);
    let accepting = TlsAcceptor::from(Arc::new(config)).accept(far);
    let connecting = async { Ok::<_, io::Error>(near) };
    let prod = prod();
    let redeeming = redeem_over(&token, &prod, Trust::default(), connecting);
    let (redeemed, _) = tokio::join!(redeeming, accepting);
    let error = redeemed.unwrap_err();
    assert!(matches!(error, EnrolError::UnknownIssuer { .. }), "{error}");
    assert!(error.to_string().contains("--ca-file"), "{error}");
}

/// A server that accepts connections and sends nothing is given up after the deadline.
#[tokio::test]
async fn silence_is_given_up() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let relay = relay("https", Behaviour::Honest).await;
    let mut token = token(&relay).await;
    token.relay = Url::parse(&format!("http://{}", listener.local_addr().unwrap())).unwrap();
    let result = redeem_within(
        Duration::from_millis(20),
        &token,
        &prod(),
        Trust::default(),
        client::connect(&token.relay),
    )
    .await;
    assert!(
        matches!(result, Err(EnrolError::Timeout { .. })),
        "{result:?}"
    );
}

/// What a token buys is worth stealing later, too.
#[tokio::test]
async fn the_key_exchange_is_post_quantum_at_both_ends() {
    let relay = relay("https", Behaviour::Honest).await;
    let server = acceptor(&relay.authority, &relay.url).await;
    let client = client::config(&token(&relay).await, Trust::default()).unwrap();
    let name = rustls::pki_types::ServerName::try_from("127.0.0.1").unwrap();
    let (near, far) = tokio::io::duplex(64 * 1024);
    let (near, far) = tokio::join!(
        tokio_rustls::TlsConnector::from(client).connect(name, near),
        server.accept(far)
    );
    let (near, far) = (near.unwrap(), far.unwrap());
    for group in [
        near.get_ref().1.negotiated_key_exchange_group(),
        far.get_ref().1.negotiated_key_exchange_group(),
    ] {
        let group = group.map(|group| group.name());
        assert_eq!(group, Some(rustls::NamedGroup::X25519MLKEM768));
    }
}

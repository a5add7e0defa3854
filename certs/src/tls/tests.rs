use super::*;
use crate::{Kind, testing::World};
use rustls::{CertificateError, ProtocolVersion, time_provider::TimeProvider};
use rustls_pki_types::UnixTime;
use std::{io, time::Duration};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

type Pipe = tokio::io::DuplexStream;

/// Both ends of a handshake. TLS 1.3 tells a client only later that it was refused, so each end
/// also sends and reads a byte.
async fn handshake(
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    name: ServerName<'static>,
) -> (
    io::Result<client::TlsStream<Pipe>>,
    io::Result<server::TlsStream<Pipe>>,
) {
    let (near, far) = tokio::io::duplex(64 * 1024);
    let dial = async {
        let mut stream = TlsConnector::from(client).connect(name, near).await?;
        stream.write_all(b"x").await?;
        stream.read_u8().await?;
        Ok(stream)
    };
    let accept = async {
        let mut stream = TlsAcceptor::from(server).accept(far).await?;
        stream.read_u8().await?;
        stream.write_all(b"y").await?;
        Ok(stream)
    };
    tokio::join!(dial, accept)
}

fn tls_error(error: &io::Error) -> &rustls::Error {
    error.get_ref().unwrap().downcast_ref().unwrap()
}

struct Session {
    world: World,
    alice: Identity,
    prod: Identity,
}

impl Session {
    async fn new() -> Self {
        let world = World::new().await;
        Self {
            alice: world.user("alice").await,
            prod: world.cluster("prod").await,
            world,
        }
    }

    fn client(&self, expect: &str, alpn: Alpn) -> Arc<ClientConfig> {
        let validator = self.world.authority.validator();
        let expect = SpiffeId::new(validator.domain().clone(), Kind::Cluster, expect).unwrap();
        session_client(&self.alice, validator, expect, alpn).unwrap()
    }

    fn server(&self, identity: &Identity) -> Arc<ServerConfig> {
        session_server(identity, self.world.authority.validator()).unwrap()
    }
}

#[tokio::test]
async fn a_session_knows_both_ends() {
    let session = Session::new().await;
    for alpn in [Alpn::H2, Alpn::Http11] {
        let client = session.client("prod", alpn);
        // Twice with one configuration: the second must not be resumed.
        for _ in 0..2 {
            let server = session.server(&session.prod);
            let (near, far) = handshake(Arc::clone(&client), server, session_name()).await;
            let (near, far) = (near.unwrap(), far.unwrap());
            let (near, far) = (near.get_ref().1, far.get_ref().1);
            assert_eq!(
                peer_of(far.peer_certificates().unwrap()).unwrap(),
                *session.alice.as_peer()
            );
            assert_eq!(
                peer_of(near.peer_certificates().unwrap()).unwrap(),
                *session.prod.as_peer()
            );
            assert_eq!(far.protocol_version(), Some(ProtocolVersion::TLSv1_3));
            assert_eq!(far.alpn_protocol(), Some(alpn.as_bytes()));
            assert_eq!(far.server_name(), None);
            assert_eq!(far.handshake_kind(), Some(rustls::HandshakeKind::Full));
            let suite = far.negotiated_cipher_suite().unwrap().suite();
            assert_eq!(suite, rustls::CipherSuite::TLS13_AES_128_GCM_SHA256);
        }
    }
}

#[tokio::test]
async fn another_cluster_is_not_the_expected_one() {
    let session = Session::new().await;
    let server = session.server(&session.prod);
    let (near, _) = handshake(session.client("staging", Alpn::H2), server, session_name()).await;
    let error = near.unwrap_err();
    let rustls::Error::InvalidCertificate(CertificateError::Other(other)) = tls_error(&error)
    else {
        panic!("{error}");
    };
    let unexpected = other.0.downcast_ref::<UnexpectedPeer>().unwrap();
    assert_eq!(
        (unexpected.expected.name(), unexpected.found.name()),
        ("staging", "prod")
    );
}

#[tokio::test]
async fn strangers_and_the_wrong_kinds_are_refused() {
    let session = Session::new().await;
    let unknown = |error: &io::Error| {
        matches!(
            tls_error(error),
            rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer)
        )
    };
    // A relay in between that shows a certificate of its own making.
    let other = Session::new().await;
    let (near, _) = handshake(
        session.client("prod", Alpn::H2),
        other.server(&other.prod),
        session_name(),
    )
    .await;
    assert!(unknown(&near.unwrap_err()));
    let (_, far) = handshake(
        other.client("prod", Alpn::H2),
        session.server(&session.prod),
        session_name(),
    )
    .await;
    assert!(far.is_err());
    // A user as server, a cluster as client.
    let (near, _) = handshake(
        session.client("prod", Alpn::H2),
        session.server(&session.alice),
        session_name(),
    )
    .await;
    assert!(matches!(
        tls_error(&near.unwrap_err()),
        rustls::Error::InvalidCertificate(CertificateError::Other(_))
    ));
    let validator = session.world.authority.validator();
    let client = session_client(
        &session.prod,
        validator,
        session.prod.id().clone(),
        Alpn::H2,
    )
    .unwrap();
    let (_, far) = handshake(client, session.server(&session.prod), session_name()).await;
    assert!(matches!(
        tls_error(&far.unwrap_err()),
        rustls::Error::InvalidCertificate(CertificateError::Other(_))
    ));
    // Nobody at all.
    let roots = session.world.authority.roots();
    let mut nobody = Arc::unwrap_or_clone(carrier_client(roots, None).unwrap());
    nobody
        .dangerous()
        .set_certificate_verifier(Arc::new(ServerVerifier {
            want: Want::SESSION_CLUSTER,
            validator: validator.clone(),
            expect: session.prod.id().clone(),
        }));
    nobody.alpn_protocols = vec![b"h2".to_vec()];
    let (_, far) = handshake(
        Arc::new(nobody),
        session.server(&session.prod),
        session_name(),
    )
    .await;
    assert!(matches!(
        tls_error(&far.unwrap_err()),
        rustls::Error::NoCertificatesPresented
    ));
}

#[tokio::test]
async fn the_revoked_are_refused() {
    let session = Session::new().await;
    let validator = session.world.authority.validator();
    let (client, server) = (
        session.client("prod", Alpn::H2),
        session.server(&session.prod),
    );
    validator.revoke([session.alice.serial().to_owned()].into());
    let (near, far) = handshake(client, server, session_name()).await;
    let revoked = rustls::Error::InvalidCertificate(CertificateError::Revoked);
    assert_eq!(*tls_error(&far.unwrap_err()), revoked);
    let alert = rustls::Error::AlertReceived(rustls::AlertDescription::CertificateRevoked);
    assert_eq!(*tls_error(&near.unwrap_err()), alert);
}

/// A clock that is off by some seconds.
#[derive(Debug)]
struct Skewed(i64);

impl TimeProvider for Skewed {
    fn current_time(&self) -> Option<UnixTime> {
        let now = UnixTime::now().as_secs().checked_add_signed(self.0)?;
        Some(UnixTime::since_unix_epoch(Duration::from_secs(now)))
    }
}

#[tokio::test]
async fn clocks_that_differ() {
    let session = Session::new().await;
    for (skew, good) in [
        (-600, false),
        (-60, true),
        (60, true),
        (600, true),
        (2 * 86_400, false),
    ] {
        let mut server = Arc::unwrap_or_clone(session.server(&session.prod));
        server.time_provider = Arc::new(Skewed(skew));
        let (_, far) = handshake(
            session.client("prod", Alpn::H2),
            Arc::new(server),
            session_name(),
        )
        .await;
        assert_eq!(far.is_ok(), good, "{skew}: {far:?}");
        if let Err(error) = far {
            let text = error.to_string();
            assert!(
                text.contains("not valid yet") || text.contains("expired"),
                "{text}"
            );
        }
    }
}

#[tokio::test]
async fn the_relay_is_known_by_its_names() {
    let world = World::new().await;
    let server = || {
        relay_server(RelayCertificate::Own {
            authority: &world.authority,
            public_url: &world.url,
        })
        .unwrap()
    };
    let client = carrier_client(world.authority.roots(), None).unwrap();
    for name in ["relay.example.com", "localhost", "127.0.0.1", "::1"] {
        let name = ServerName::try_from(name).unwrap();
        let (near, far) = handshake(Arc::clone(&client), server(), name).await;
        far.unwrap();
        assert_eq!(
            near.unwrap().get_ref().1.alpn_protocol(),
            Some(&b"http/1.1"[..])
        );
    }
    let name = ServerName::try_from("elsewhere.example.com").unwrap();
    let (near, _) = handshake(Arc::clone(&client), server(), name).await;
    let error = near.unwrap_err();
    assert!(matches!(
        tls_error(&error),
        rustls::Error::InvalidCertificate(CertificateError::NotValidForNameContext { .. })
    ));
    let stranger = World::new().await;
    let other = carrier_client(stranger.authority.roots(), None).unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    let (near, _) = handshake(other, server(), name).await;
    assert!(near.is_err());
}

/// An enrolled cluster cannot pretend to be the relay.
#[tokio::test]
async fn a_cluster_is_no_relay() {
    let session = Session::new().await;
    let mut server = Arc::unwrap_or_clone(session.server(&session.prod));
    server.alpn_protocols = vec![b"http/1.1".to_vec()];
    let client = carrier_client(session.world.authority.roots(), None).unwrap();
    let name = ServerName::try_from("relay.example.com").unwrap();
    let (near, _) = handshake(client, Arc::new(server), name).await;
    assert!(matches!(
        tls_error(&near.unwrap_err()),
        rustls::Error::InvalidCertificate(CertificateError::NotValidForNameContext { .. })
    ));
}

#[tokio::test]
async fn certificates_from_files() {
    let world = World::new().await;
    let dir = tempfile::tempdir().unwrap();
    let (cert, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
    let files = || RelayCertificate::Files {
        cert: cert.clone(),
        key: key.clone(),
    };
    let error = relay_server(files()).unwrap_err().to_string();
    assert!(error.contains("cert.pem"), "{error}");
    let issue = || {
        let hosts = ["relay.example.com".to_owned()];
        world
            .authority
            .issue_relay_certificate("a", &hosts)
            .unwrap()
    };
    let identity = issue();
    std::fs::write(&cert, identity.chain_pem()).unwrap();
    std::fs::write(&key, issue().key_pem()).unwrap();
    let error = relay_server(files()).unwrap_err().to_string();
    assert!(error.contains("does not go with"), "{error}");
    std::fs::write(&key, "nonsense").unwrap();
    let error = relay_server(files()).unwrap_err().to_string();
    assert!(error.contains("key.pem"), "{error}");
    std::fs::write(&key, identity.key_pem()).unwrap();
    let client = carrier_client(world.authority.roots(), None).unwrap();
    let name = ServerName::try_from("relay.example.com").unwrap();
    let (near, far) = handshake(client, relay_server(files()).unwrap(), name).await;
    near.unwrap();
    far.unwrap();
}

/// Two relays know each other by name, both ways, and let nobody else in.
#[tokio::test]
async fn relays_know_each_other_by_name() {
    let world = World::new().await;
    let relay =
        |instance: &str| Arc::new(RelayIdentity::new(world.authority.clone(), instance).unwrap());
    let (a, b) = (relay("a"), relay("b"));
    let serve_b = || peer_server(Arc::clone(&b)).unwrap();

    let towards_b = peer_client(&a, "b").unwrap();
    let (near, far) = handshake(towards_b, serve_b(), session_name()).await;
    let name = |chain: Option<&[CertificateDer<'_>]>| peer_of(chain.unwrap()).unwrap().id;
    assert_eq!(&name(near.unwrap().get_ref().1.peer_certificates()), b.id());
    assert_eq!(&name(far.unwrap().get_ref().1.peer_certificates()), a.id());

    let towards_c = peer_client(&a, "c").unwrap();
    let (near, _) = handshake(towards_c, serve_b(), session_name()).await;
    let error = near.unwrap_err();
    let rustls::Error::InvalidCertificate(CertificateError::Other(other)) = tls_error(&error)
    else {
        panic!("{error}");
    };
    let unexpected = other.0.downcast_ref::<UnexpectedPeer>().unwrap();
    assert_eq!(&unexpected.found, b.id());
    let said = unexpected.to_string();
    assert!(said.contains("another relay answers"), "{said}");

    // A relay of another authority, an identity that has ended, nobody at all.
    let stranger = World::new().await;
    let foreign = RelayIdentity::new(stranger.authority.clone(), "a").unwrap();
    let short = crate::authority::Lives {
        relay: Duration::ZERO,
        ..crate::authority::Lives::default()
    };
    let ended = RelayIdentity::new(world.authority.clone().with_lives(short), "a").unwrap();
    let ended = peer_client(&ended, "b").unwrap();
    let mut anonymous = Arc::unwrap_or_clone(peer_client(&a, "b").unwrap());
    let without = carrier_client(world.authority.roots(), None).unwrap();
    anonymous.client_auth_cert_resolver = Arc::clone(&without.client_auth_cert_resolver);
    // Certificates know whole seconds.
    tokio::time::sleep(Duration::from_millis(2100)).await;
    let foreign = peer_client(&foreign, "b").unwrap();
    for client in [foreign, ended, Arc::new(anonymous)] {
        let (near, far) = handshake(client, serve_b(), session_name()).await;
        assert!(near.is_err() && far.is_err());
    }
}

#[tokio::test]
async fn users_and_clusters_are_no_peers() {
    let session = Session::new().await;
    let authority = session.world.authority.clone();
    let relay = Arc::new(RelayIdentity::new(authority, "a").unwrap());
    let user = session.client("prod", Alpn::Http11);
    let server = peer_server(Arc::clone(&relay)).unwrap();
    let mut client = Arc::unwrap_or_clone(peer_client(&relay, "a").unwrap());
    client.client_auth_cert_resolver = Arc::clone(&user.client_auth_cert_resolver);
    let (near, far) = handshake(Arc::new(client), server, session_name()).await;
    assert!(near.is_err());
    assert!(matches!(
        tls_error(&far.unwrap_err()),
        rustls::Error::InvalidCertificate(CertificateError::Other(_))
    ));
    let client = peer_client(&relay, "prod").unwrap();
    let (near, _) = handshake(client, session.server(&session.prod), session_name()).await;
    assert!(near.is_err());
}

#[tokio::test]
async fn the_two_libraries_seal_for_one_another() {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(made.cert.der().clone()).unwrap();
    for (near, far) in [(false, true), (true, false), (true, true)] {
        let client = ClientConfig::builder_with_provider(Arc::new(chosen(near)))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots.clone())
            .with_no_client_auth();
        let key = rustls_pki_types::PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
        let server = ServerConfig::builder_with_provider(Arc::new(chosen(far)))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key.into())
            .unwrap();
        let name = ServerName::try_from("localhost").unwrap();
        let (client, server) = handshake(client.into(), server.into(), name).await;
        let suite = client
            .unwrap()
            .get_ref()
            .1
            .negotiated_cipher_suite()
            .unwrap();
        assert_eq!(
            suite.suite(),
            rustls::CipherSuite::TLS13_AES_128_GCM_SHA256,
            "near by ring: {near}, far: {far}"
        );
        server.unwrap();
    }
}

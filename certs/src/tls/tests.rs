use super::provider::chosen;
use super::*;
use crate::{
    Directory as _, Kind,
    testing::{TestAuthority, World},
};
use rustls::{
    CertificateError, NamedGroup, ProtocolVersion, crypto::CryptoProvider,
    time_provider::TimeProvider,
};
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

/// Both ends say that the key exchange was post-quantum, and in the first flight.
fn assert_post_quantum(near: &client::TlsStream<Pipe>, far: &server::TlsStream<Pipe>) {
    let (near, far) = (near.get_ref().1, far.get_ref().1);
    for (group, kind) in [
        (near.negotiated_key_exchange_group(), near.handshake_kind()),
        (far.negotiated_key_exchange_group(), far.handshake_kind()),
    ] {
        assert_eq!(
            group.map(|group| group.name()),
            Some(NamedGroup::X25519MLKEM768)
        );
        // Not `FullWithHelloRetryRequest`, which would cost a round trip.
        assert_eq!(kind, Some(rustls::HandshakeKind::Full));
    }
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
            assert_post_quantum(&near, &far);
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
    // A relay in between that presents a forged certificate.
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
    // No certificate at all.
    let roots = session.world.authority.roots();
    let mut anonymous = Arc::unwrap_or_clone(carrier_client(roots, Trust::default()).unwrap());
    anonymous
        .dangerous()
        .set_certificate_verifier(Arc::new(ServerVerifier {
            expected: ExpectedPeer::SESSION_CLUSTER,
            validator: validator.clone(),
            expect: session.prod.id().clone(),
        }));
    anonymous.alpn_protocols = vec![b"h2".to_vec()];
    let (_, far) = handshake(
        Arc::new(anonymous),
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
    validator.replace_revocations(crate::Revocations::new(1).serial(session.alice.serial()));
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
    let own = HttpsCertificate::issue(world.authority.directory(), &world.url).await;
    let own = Arc::new(own.unwrap());
    let server = || relay_server(RelayCertificate::Own(Arc::clone(&own))).unwrap();
    let client = carrier_client(world.authority.roots(), Trust::default()).unwrap();
    for name in ["relay.example.com", "localhost", "127.0.0.1", "::1"] {
        let name = ServerName::try_from(name).unwrap();
        let (near, far) = handshake(Arc::clone(&client), server(), name).await;
        let (near, far) = (near.unwrap(), far.unwrap());
        assert_post_quantum(&near, &far);
        assert_eq!(near.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
    }
    let name = ServerName::try_from("elsewhere.example.com").unwrap();
    let (near, _) = handshake(Arc::clone(&client), server(), name).await;
    let error = near.unwrap_err();
    assert!(matches!(
        tls_error(&error),
        rustls::Error::InvalidCertificate(CertificateError::NotValidForNameContext { .. })
    ));
    let stranger = World::new().await;
    let other = carrier_client(stranger.authority.roots(), Trust::default()).unwrap();
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
    let client = carrier_client(session.world.authority.roots(), Trust::default()).unwrap();
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
    let (made, other) = (https("relay.example.com"), https("relay.example.com"));
    std::fs::write(&cert, made.0).unwrap();
    let write_key = |pem: &str| crate::files::write_private(&key, pem.as_bytes()).unwrap();
    write_key(&other.1);
    let error = relay_server(files()).unwrap_err().to_string();
    assert!(error.contains("does not go with"), "{error}");
    write_key("nonsense");
    let error = relay_server(files()).unwrap_err().to_string();
    assert!(error.contains("key.pem"), "{error}");
    write_key(&made.1);
    let trust = Trust {
        ca_file: Some(&cert),
        system: false,
    };
    let client = carrier_client(world.authority.roots(), trust).unwrap();
    let name = ServerName::try_from("relay.example.com").unwrap();
    let (near, far) = handshake(client, relay_server(files()).unwrap(), name).await;
    assert_post_quantum(&near.unwrap(), &far.unwrap());
}

/// A certificate and key in PEM that an operator brings.
fn https(host: &str) -> (String, String) {
    let made = rcgen::generate_simple_self_signed([host.to_owned()]).unwrap();
    (made.cert.pem(), made.signing_key.serialize_pem())
}

async fn relay(authority: &TestAuthority, instance: &str) -> Arc<RelayIdentity> {
    let identity = RelayIdentity::issue(authority.directory(), instance).await;
    Arc::new(identity.unwrap())
}

/// A holder of the public certificate's key, such as an HTTPS front of a relay, is
/// no relay to other relays: neither to one that dials nor to one that listens.
#[tokio::test]
async fn the_public_certificate_is_no_relays_identity() {
    let world = World::new().await;
    let hosts = ["public".to_owned(), "relay.example.com".to_owned()];
    let pending = crate::PendingIdentity::generate().unwrap();
    let issued = world
        .authority
        .certify_https(&hosts, pending.csr_der())
        .await;
    let public = pending.into_certified_key(issued.unwrap().chain).unwrap();
    let names = peer_of(&public.cert).map(|peer| peer.id.to_string());
    assert!(names.is_err(), "{names:?}");
    for expected in [ExpectedPeer::PEER_CLIENT, ExpectedPeer::PEER_SERVER] {
        let now = world.authority.now();
        assert!(
            world
                .authority
                .validator()
                .check(&public.cert, expected, now)
                .is_err()
        );
    }
    let single = || Arc::new(rustls::sign::SingleCertAndKey::from(public.clone()));
    let (a, b) = (
        relay(&world.authority, "a").await,
        relay(&world.authority, "b").await,
    );

    let mut as_client = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(ServerVerifier {
            validator: world.authority.validator().clone(),
            expected: ExpectedPeer::PEER_SERVER,
            expect: b.id().clone(),
        }))
        .with_client_cert_resolver(single());
    as_client.alpn_protocols = vec![Alpn::Http11.as_bytes().to_vec()];
    let towards = peer_server(b).unwrap();
    let (_, far) = handshake(Arc::new(as_client), towards, session_name()).await;
    assert!(matches!(
        tls_error(&far.unwrap_err()),
        rustls::Error::InvalidCertificate(_)
    ));

    let mut as_server = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(single());
    as_server.alpn_protocols = vec![Alpn::Http11.as_bytes().to_vec()];
    let dialling = peer_client(&a, "public").unwrap();
    let (near, _) = handshake(dialling, Arc::new(as_server), session_name()).await;
    assert!(matches!(
        tls_error(&near.unwrap_err()),
        rustls::Error::InvalidCertificate(_)
    ));
}

/// Two relays verify each other by name, both ways, and reject any other peer.
#[tokio::test]
async fn relays_know_each_other_by_name() {
    let world = World::new().await;
    let (a, b) = (
        relay(&world.authority, "a").await,
        relay(&world.authority, "b").await,
    );
    let serve_b = || peer_server(Arc::clone(&b)).unwrap();

    let towards_b = peer_client(&a, "b").unwrap();
    let (near, far) = handshake(towards_b, serve_b(), session_name()).await;
    let (near, far) = (near.unwrap(), far.unwrap());
    assert_post_quantum(&near, &far);
    let name = |chain: Option<&[CertificateDer<'_>]>| peer_of(chain.unwrap()).unwrap().id;
    assert_eq!(&name(near.get_ref().1.peer_certificates()), b.id());
    assert_eq!(&name(far.get_ref().1.peer_certificates()), a.id());

    let towards_c = peer_client(&a, "c").unwrap();
    let (near, _) = handshake(towards_c, serve_b(), session_name()).await;
    let error = near.unwrap_err();
    let rustls::Error::InvalidCertificate(CertificateError::Other(other)) = tls_error(&error)
    else {
        panic!("{error}");
    };
    let unexpected = other.0.downcast_ref::<UnexpectedPeer>().unwrap();
    assert_eq!(&unexpected.found, b.id());
    let text = unexpected.to_string();
    assert!(text.contains("another relay answers"), "{text}");

    // A relay of another authority, an identity that has expired, no certificate at all.
    let stranger = World::new().await;
    let foreign = relay(&stranger.authority, "a").await;
    let short = world.authority.clone().with_relay_life(Duration::ZERO);
    let ended = relay(&short, "a").await;
    let ended = peer_client(&ended, "b").unwrap();
    let mut anonymous = Arc::unwrap_or_clone(peer_client(&a, "b").unwrap());
    let without = carrier_client(world.authority.roots(), Trust::default()).unwrap();
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
    let relay = relay(&session.world.authority, "a").await;
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

/// kube and sqlx take the process' default: towards the API server and PostgreSQL.
#[test]
fn libraries_are_given_the_same_key_exchange() {
    provide_to_libraries();
    let default = CryptoProvider::get_default().unwrap();
    assert_eq!(
        default.kx_groups[0].name(),
        NamedGroup::X25519MLKEM768,
        "{:?}",
        default.kx_groups
    );
}

/// A balancer or a proxy that ends TLS may be old. It chooses the X25519 share that was sent beside
/// the hybrid one, without a round trip more.
#[tokio::test]
async fn an_end_without_ml_kem_costs_no_round_trip() {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let mut classic = chosen(false);
    classic
        .kx_groups
        .retain(|group| group.name() != NamedGroup::X25519MLKEM768);
    let key = rustls_pki_types::PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let mut server = ServerConfig::builder_with_provider(Arc::new(classic))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key.into())
        .unwrap();
    server.alpn_protocols = vec![b"http/1.1".to_vec()];
    let dir = tempfile::tempdir().unwrap();
    let ca = dir.path().join("ca.pem");
    std::fs::write(&ca, made.cert.pem()).unwrap();
    let client = proxy_client(Some(&ca)).unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    let (near, far) = handshake(client, Arc::new(server), name).await;
    far.unwrap();
    let near = near.unwrap();
    let near = near.get_ref().1;
    assert_eq!(near.handshake_kind(), Some(rustls::HandshakeKind::Full));
    let group = near.negotiated_key_exchange_group().unwrap();
    assert_eq!(group.name(), NamedGroup::X25519);
}

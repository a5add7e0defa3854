//! What ends the TLS of a carrier speaks on it in its owner's place, and gains nothing by it.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use throwline_certs::{Identity, PendingIdentity, Roots, SpiffeId, Validator, tls};
use throwline_e2e::environment::{ASK_THE_CLUSTER, USER, private_dir};
use throwline_e2e::terminator::{Meddle, Taken, Terminator, open};
use throwline_e2e::upstream::Upstream;
use throwline_e2e::{
    Agent, Kubectl, Proxy, Relay, Suite, User, contains, eventually, free_address, tools,
};
use throwline_tunnel::carrier::{IncomingStream, OpenError};
use throwline_tunnel::line::{self, LineBudgets};
use throwline_tunnel::proto::messages::{
    AgentStatus, ClusterList, Control, ControlKind, ControlMessage, Drain, LineHello, LineKind,
    ListClusters, Open, RefusalCode, RelaySet, Renewal, RenewalChallenge, RenewalReply,
    RenewalRequest, RenewalVerdict, RevocationList, RevocationsVersion, Role, StreamKind,
};
use throwline_tunnel::proto::wire::{
    CERTIFICATE_CAP, CLUSTER_LIST_CAP, CONTROL_CAP, REVOCATIONS_CAP,
};
use throwline_tunnel::{message, mux, proto, session};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};

const CLUSTER: &str = "prod";
/// A certificate is back-dated by a minute, so one of 66 s is due after 24 s.
const SHORT: [&str; 4] = [
    "--user-certificate-life",
    "66s",
    "--agent-certificate-life",
    "66s",
];

fn main() -> ExitCode {
    let minutes = |count: u64| Duration::from_secs(60 * count);
    Suite::new()
        .alone(
            "a_terminator_obtains_no_identity",
            minutes(4),
            renewals_in_another_name,
        )
        .alone(
            "a_terminator_speaks_each_message_in_vain",
            minutes(4),
            every_other_message,
        )
        .run(|| async { Ok(()) })
}

/// Everything real, and what ends TLS between.
struct Place {
    terminator: Terminator,
    relay: Relay,
    agent: Agent,
    user: User,
    proxy: Proxy,
    kubectl: Kubectl,
    _upstream: Upstream,
    _dir: tempfile::TempDir,
}

impl Place {
    async fn new(arguments: &[&str]) -> Result<Self> {
        let dir = private_dir()?;
        let upstream = Upstream::start(dir.path()).await?;
        let listen = free_address()?;
        let terminator = Terminator::start(listen).await?;
        let url = format!("http://127.0.0.1:{}", terminator.address.port());
        let arguments = [&["--plaintext"], arguments].concat();
        let relay = Relay::at(dir.path(), listen, &url, &arguments).await?;
        let token = relay.token(&["--cluster", CLUSTER]).await?;
        let kubeconfig = upstream.kubeconfig().to_owned();
        let agent =
            Agent::start(dir.path(), CLUSTER, &token, &kubeconfig, &[ASK_THE_CLUSTER]).await?;
        agent.connected().await?;
        let token = relay
            .token(&["--user", USER, "--group", upstream.group()])
            .await?;
        let user = User::login(dir.path(), USER, &token, &[]).await?;
        let proxy = Proxy::start(&user, &[CLUSTER], &[]).await?;
        let kubectl = Kubectl::new(&tools::newest_kubectl()?, &proxy.kubeconfig, dir.path())
            .context(&format!("throwline-{CLUSTER}"))
            .namespace("default");
        Ok(Self {
            terminator,
            relay,
            agent,
            user,
            proxy,
            kubectl,
            _upstream: upstream,
            _dir: dir,
        })
    }

    /// The positive control: what it passes on works.
    async fn works(&self) -> Result<()> {
        self.kubectl.ok(&["get", "pods"]).await.map(drop)
    }

    async fn taken(&self, role: Role) -> Result<Taken> {
        let limit = Duration::from_secs(30);
        eventually(limit, "a carrier was taken over", || async {
            self.terminator.taken(role).context("none yet").map(drop)
        })
        .await?;
        self.terminator.taken(role).context("it has gone")
    }

    async fn renewed(&self) -> Result<[f64; 2]> {
        let metrics = self.relay.metrics().await?;
        let name = "throwline_relay_renewals_total";
        Ok([r#"outcome="issued""#, r#"outcome="second-key""#]
            .map(|outcome| metrics.sum(name, &[outcome])))
    }
}

/// Asks for a certificate for `request` as the relay's protocol wants it.
async fn ask(
    taken: &Taken,
    make: impl FnOnce(&RenewalChallenge) -> Result<RenewalRequest>,
) -> Result<RenewalReply> {
    let mut stream = open(&taken.as_victim, StreamKind::Renewal(Renewal {})).await?;
    let challenge: RenewalChallenge = message::read(&mut stream, CERTIFICATE_CAP).await?;
    message::write(&mut stream, &make(&challenge)?, CERTIFICATE_CAP).await?;
    Ok(message::read(&mut stream, CERTIFICATE_CAP).await?)
}

fn refused(reply: RenewalReply) -> Result<()> {
    match reply.verdict {
        Some(RenewalVerdict::Refused(refusal)) => {
            ensure!(refusal.code() == RefusalCode::NotAllowed, "{refusal:?}");
            Ok(())
        }
        other => bail!("not refused: {other:?}"),
    }
}

async fn renewals_in_another_name(_: Arc<()>) -> Result<()> {
    let place = Place::new(&SHORT).await?;
    place.works().await?;
    let attacker = PendingIdentity::generate()?;
    let csr = attacker.csr_der().to_vec();

    // With the victims' certificates, which everybody may see, and without their keys.
    for (role, state) in [
        (Role::Agent, &place.agent.state),
        (Role::LocalProxy, &place.user.state),
    ] {
        let victim = Identity::load(state)?.context("an identity")?;
        let roots = Roots::load(state)?.context("roots")?;
        let chain: Vec<Vec<u8>> = victim.chain().iter().map(|der| der.to_vec()).collect();
        // A key of the attacker's own, under any certificate: it signs, and is not the victim's.
        let own = Identity::from_pem(&forged(&victim)?)?;
        let taken = place.taken(role).await?;
        for signature in [
            &|_: &RenewalChallenge| Ok(Vec::new()) as Result<Vec<u8>>,
            &|asked: &RenewalChallenge| Ok(own.sign(&asked.nonce)?),
            &|asked: &RenewalChallenge| {
                let (nonce, authority) = (&asked.nonce, &asked.authority);
                Ok(throwline_certs::renewal::sign(
                    &own, &roots, nonce, authority, &csr,
                )?)
            },
        ] as [&(dyn Fn(&RenewalChallenge) -> Result<Vec<u8>> + Sync); 3]
        {
            let reply = ask(&taken, |asked| {
                Ok(RenewalRequest {
                    chain: chain.clone(),
                    csr: csr.clone(),
                    signature: signature(asked)?,
                })
            });
            refused(reply.await?).with_context(|| format!("{role:?}"))?;
            // The relay lets a carrier that brought a bad one wait.
            tokio::time::sleep(Duration::from_millis(1200)).await;
        }
    }
    ensure!(place.renewed().await? == [0.0, 0.0], "something was issued");

    // With the owners' signatures, when they renew by themselves: over another request, and again.
    let seen = Arc::new(AtomicUsize::new(0));
    place.terminator.meddle(Some(swap(csr, seen.clone())));
    let limit = Duration::from_secs(90);
    eventually(limit, "both have asked for a renewal", || async {
        ensure!(seen.load(Ordering::SeqCst) >= 2, "not yet");
        Ok(())
    })
    .await?;
    ensure!(place.renewed().await? == [0.0, 0.0], "something was issued");
    place.terminator.meddle(None);
    eventually(limit, "the user's own renewal goes through", || async {
        contains(&place.proxy.process.log(), "certificate renewed")
    })
    .await?;
    let [issued, second] = place.renewed().await?;
    ensure!(issued >= 1.0 && second == 0.0, "{issued} {second}");
    place.works().await
}

/// The victim's certificate has its identity; the key beside it is another. Its own certificate is
/// self-signed with the same name.
fn forged(victim: &Identity) -> Result<String> {
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    let name = victim.id().name();
    params
        .distinguished_name
        .push(rcgen::DnType::CommonName, name);
    let uri = victim.id().to_string();
    params.subject_alt_names = vec![rcgen::SanType::URI(uri.as_str().try_into()?)];
    params.is_ca = rcgen::IsCa::ExplicitNoCa;
    params.key_usages = vec![rcgen::KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![
        rcgen::ExtendedKeyUsagePurpose::ClientAuth,
        rcgen::ExtendedKeyUsagePurpose::ServerAuth,
    ];
    let certificate = params.self_signed(&key)?;
    Ok(format!("{}{}", certificate.pem(), key.serialize_pem()))
}

/// Lets a victim sign for the relay's challenge, and puts another request under the signature; then
/// shows the whole answer of the victim to another challenge.
fn swap(csr: Vec<u8>, seen: Arc<AtomicUsize>) -> Meddle {
    Arc::new(move |taken, stream| {
        let (csr, seen) = (csr.clone(), seen.clone());
        Box::pin(async move {
            if !matches!(stream.header.kind, Some(StreamKind::Renewal(_))) {
                return Some(stream);
            }
            let swapped = async {
                let kind = StreamKind::Renewal(Renewal {});
                let mut far = open(&taken.as_victim, kind).await?;
                let challenge: RenewalChallenge = message::read(&mut far, CERTIFICATE_CAP).await?;
                let mut near = stream
                    .accept(proto::messages::StreamReply::accepted())
                    .await?;
                message::write(&mut near, &challenge, CERTIFICATE_CAP).await?;
                let owners: RenewalRequest = message::read(&mut near, CERTIFICATE_CAP).await?;
                let ours = RenewalRequest {
                    csr,
                    ..owners.clone()
                };
                message::write(&mut far, &ours, CERTIFICATE_CAP).await?;
                let reply: RenewalReply = message::read(&mut far, CERTIFICATE_CAP).await?;
                refused(reply.clone())?;
                message::write(&mut near, &reply, CERTIFICATE_CAP).await?;
                tokio::time::sleep(Duration::from_millis(1200)).await;
                // What the owner signed is for a challenge that was used.
                refused(ask(&taken, |_| Ok(owners)).await?)?;
                anyhow::Ok(())
            };
            match swapped.await {
                Ok(()) => drop(seen.fetch_add(1, Ordering::SeqCst)),
                Err(error) => tracing::error!(error = format!("{error:#}"), "not refused"),
            }
            None
        })
    })
}

async fn every_other_message(_: Arc<()>) -> Result<()> {
    let place = Place::new(&[]).await?;
    place.works().await?;
    let (agent, proxy) = (
        place.taken(Role::Agent).await?,
        place.taken(Role::LocalProxy).await?,
    );
    let domain = Identity::load(&place.user.state)?
        .context("an identity")?
        .id()
        .domain()
        .clone();
    let wanted = SpiffeId::new(domain.clone(), throwline_certs::Kind::Cluster, CLUSTER)?;
    let roots = Roots::load(&place.user.state)?.context("roots")?;
    let validator = Validator::new(roots, domain);

    // Open: a line in the user's name, by way of the relay and straight to the agent. The session on
    // it needs the user's key; a certificate of the same name from no authority opens none.
    let victim = Identity::load(&place.user.state)?.context("an identity")?;
    let own = Identity::from_pem(&forged(&victim)?)?;
    for carrier in [&proxy.as_victim, &agent.as_relay] {
        let line_id: [u8; 16] = rand::random();
        let kind = StreamKind::Open(Open {
            version: proto::VERSION,
            cluster: CLUSTER.to_owned(),
            line_id: line_id.to_vec(),
            kind: LineKind::Upgrade.into(),
            user: victim.id().to_string(),
            client_addr: "192.0.2.1:1".to_owned(),
            ..Open::default()
        });
        let stream = open(carrier, kind).await?;
        let hello = LineHello::new(line_id, Duration::ZERO);
        let line = line::connect(stream, hello, LineBudgets::default()).await?;
        let config = tls::session_client(&own, &validator, wanted.clone(), tls::Alpn::Http11)?;
        let outcome = session::connect(line, config, tls::session_name()).await;
        ensure!(
            !is_answered(outcome.ok()).await,
            "a session without the user's key"
        );
    }

    // Open, at the victim that opens nothing: a local proxy accepts no streams.
    let kind = StreamKind::Control(Control {});
    let outcome = open(&proxy.as_relay, kind.clone()).await;
    is_refused(outcome, RefusalCode::Unsupported)?;
    is_refused(open(&agent.as_relay, kind).await, RefusalCode::Unsupported)?;

    // ListClusters: the names that a relay knows anyway, and nothing in an agent's name.
    let kind = || StreamKind::ListClusters(ListClusters {});
    let mut stream = open(&proxy.as_victim, kind()).await?;
    let list: ClusterList = message::read_long(&mut stream, CLUSTER_LIST_CAP).await?;
    ensure!(list.clusters.len() == 1, "{list:?}");
    let outcome = open(&agent.as_victim, kind()).await;
    is_refused(outcome, RefusalCode::NotAllowed)?;

    // Control: the victim has the one that there is.
    let kind = || StreamKind::Control(Control {});
    is_refused(
        open(&proxy.as_victim, kind()).await,
        RefusalCode::BadRequest,
    )?;
    is_refused(
        open(&agent.as_victim, kind()).await,
        RefusalCode::BadRequest,
    )?;

    // Open, from an agent's carrier and of the wrong kind of identity.
    let kind = StreamKind::Open(Open {
        version: proto::VERSION,
        cluster: CLUSTER.to_owned(),
        line_id: vec![0; 16],
        kind: LineKind::Api.into(),
        ..Open::default()
    });
    is_refused(open(&agent.as_victim, kind).await, RefusalCode::NotAllowed)?;
    place.works().await?;

    // The control stream may be forged: what the relay shows of a cluster, where it asks
    // ends to go. None of it decides on an identity, and the ends go on working.
    place.terminator.meddle(Some(forge_control()));
    for taken in [&agent, &proxy] {
        let gone = throwline_tunnel::proto::close::CloseCode::GoingAway;
        taken.as_relay.close(gone, "the test");
        taken.as_victim.close(gone, "the test");
    }
    let limit = Duration::from_secs(60);
    eventually(limit, "the forged status is shown", || async {
        let shown = place.user.clusters().await?;
        contains(&shown.to_string(), "forged-status")
    })
    .await?;
    eventually(limit, "both have fetched the forged list", || async {
        for log in [place.agent.process.log(), place.proxy.process.log()] {
            contains(&log, "not signed by this authority")?;
        }
        Ok(())
    })
    .await?;
    place.works().await?;
    place.terminator.meddle(None);
    ensure!(place.renewed().await? == [0.0, 0.0], "something was issued");
    Ok(())
}

/// Whether the agent answers a request.
async fn is_answered(session: Option<impl AsyncRead + AsyncWrite + Unpin>) -> bool {
    // A client's handshake ends before the server has judged its certificate.
    let Some(mut session) = session else {
        return false;
    };
    let request = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n";
    if tokio::io::AsyncWriteExt::write_all(&mut session, request)
        .await
        .is_err()
    {
        return false;
    }
    let mut answer = Vec::new();
    let read = session.read_to_end(&mut answer);
    let _ = tokio::time::timeout(Duration::from_secs(10), read).await;
    !answer.is_empty()
}

fn is_refused(outcome: Result<mux::Stream, OpenError>, code: RefusalCode) -> Result<()> {
    match outcome {
        Err(OpenError::Refused(refusal)) if refusal.code() == code => Ok(()),
        other => bail!("not refused with {code:?}: {other:?}"),
    }
}

/// Takes the victims' control streams, and sends other messages to both ends of them.
fn forge_control() -> Meddle {
    Arc::new(|taken: Taken, stream| {
        Box::pin(async move {
            match stream.header.kind {
                Some(StreamKind::Control(_)) => {}
                Some(StreamKind::FetchRevocations(_)) => {
                    if let Err(error) = forged_list(stream).await {
                        tracing::debug!(%error, "a forged list was not taken");
                    }
                    return None;
                }
                _ => return Some(stream),
            }
            let forged = async {
                let kind = StreamKind::Control(Control {});
                let mut far = open(&taken.as_victim, kind).await?;
                let mut near = stream
                    .accept(proto::messages::StreamReply::accepted())
                    .await?;
                let status = ControlKind::AgentStatus(AgentStatus {
                    kubernetes_version: "v0".to_owned(),
                    agent_version: "v0".to_owned(),
                    api_server_reachable: true,
                    message: "forged-status".to_owned(),
                    ..AgentStatus::default()
                });
                let drain = ControlKind::Drain(Drain {
                    delay_ms: 0,
                    spread_ms: 0,
                    reason: "forged".to_owned(),
                });
                let set = ControlKind::RelaySet(RelaySet { relays: 7 });
                let version = u64::MAX;
                let list = ControlKind::Revocations(RevocationsVersion { version });
                message::write(&mut far, &ControlMessage::from(status), CONTROL_CAP).await?;
                for kind in [set, list, drain] {
                    message::write(&mut near, &ControlMessage::from(kind), CONTROL_CAP).await?;
                }
                // The owner's own words would take the place of the forged ones at once.
                let (mut unheard, mut near) = tokio::io::split(near);
                let (mut from_relay, _kept_open) = tokio::io::split(far);
                let mut nowhere = tokio::io::sink();
                tokio::try_join!(
                    tokio::io::copy(&mut unheard, &mut nowhere),
                    tokio::io::copy(&mut from_relay, &mut near),
                )?;
                anyhow::Ok(())
            };
            if let Err(error) = forged.await {
                tracing::debug!(error = format!("{error:#}"), "a control stream ended");
            }
            None
        })
    })
}

/// Revokes everybody, by nobody's signature.
async fn forged_list(stream: IncomingStream) -> std::io::Result<()> {
    let entry = |kind: &str, name: &str| serde_json::json!({"kind": kind, "name": name, "last_not_before": u64::MAX});
    let list = serde_json::json!({
        "domain": "127.0.0.1",
        "version": u64::MAX,
        "identities": [entry("user", USER), entry("cluster", CLUSTER)],
    });
    let list = RevocationList {
        list: list.to_string().into_bytes(),
        signature: vec![0; 70],
    };
    let accepted = proto::messages::StreamReply::accepted();
    let mut stream = stream.accept(accepted).await?;
    message::write_long(&mut stream, &list, REVOCATIONS_CAP).await
}

//! The relay sees ciphertext and routing, and whatever it does to a line shows as an error.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use throwline_authority::{Authority, Subject};
use throwline_certs::enrol::Asker;
use throwline_certs::{EnrolmentToken, Identity, PendingIdentity};
use throwline_e2e::environment::{USER, private_dir, tail};
use throwline_e2e::malicious_relay::{Attack, FORGED, MaliciousRelay};
use throwline_e2e::recorder::{Recorder, find, unwrap_websocket};
use throwline_e2e::suite::Fixture;
use throwline_e2e::upstream::Upstream;
use throwline_e2e::{
    Agent, Kubectl, Proxy, Relay, Suite, User, eventually, free_address, lacks, tools, unique,
};

fn main() -> ExitCode {
    let minutes = |count: u64| Duration::from_secs(60 * count);
    Suite::new()
        .alone(
            "the_relay_sees_no_secret_path_or_token",
            minutes(3),
            the_relay_sees_nothing,
        )
        .alone(
            "a_tampering_relay_leads_to_errors_never_to_data",
            minutes(8),
            a_tampering_relay,
        )
        .run(|| async { Ok(()) })
}

const ALPHA: &str = "alpha-cluster";
const BETA: &str = "beta-cluster";

async fn the_relay_sees_nothing(_: Arc<()>) -> Result<()> {
    let dir = private_dir()?;
    let upstream = Upstream::start(dir.path()).await?;
    let (kubeconfig, token) = upstream.with_token(dir.path()).await?;
    let listen = free_address()?;
    let recorder = Recorder::start(listen).await?;
    let url = format!("http://127.0.0.1:{}", recorder.address.port());
    let relay = Relay::at(dir.path(), listen, &url, &["--plaintext"]).await?;
    let cluster_token = relay.token(&["--cluster", ALPHA]).await?;
    let agent = Agent::start(dir.path(), ALPHA, &cluster_token, &kubeconfig, &[]).await?;
    agent.connected().await?;
    let user_token = relay
        .token(&["--user", USER, "--group", upstream.group()])
        .await?;
    let user = User::login(dir.path(), USER, &user_token, &[]).await?;
    let proxy = Proxy::start(&user, &[ALPHA], &[]).await?;

    let (name, secret) = (unique("sealed"), unique("the-secret-itself-"));
    let namespace = upstream.namespace("sealed-").await?;
    let admin = upstream.admin()?.namespace(&namespace);
    let literal = format!("--from-literal=key={secret}");
    admin
        .ok(&["create", "secret", "generic", &name, &literal])
        .await?;
    let kubectl = Kubectl::new(&tools::newest_kubectl()?, &proxy.kubeconfig, dir.path())
        .context(&format!("throwline-{ALPHA}"))
        .namespace(&namespace);
    let read = kubectl
        .ok(&["get", "secret", &name, "-o", "jsonpath={.data.key}"])
        .await?;
    let encoded = STANDARD.encode(&secret);
    ensure!(read == encoded, "the secret did not come through: {read}");
    admin.ok(&["delete", "secret", &name]).await?;

    let carriers = recorder.carriers();
    ensure!(
        carriers.len() >= 2,
        "{} carriers, not the agent's and the user's",
        carriers.len()
    );
    let mut seen = Vec::new();
    for tape in &carriers {
        for direction in [&tape.to_relay, &tape.from_relay] {
            seen.push(unwrap_websocket(direction));
            seen.push(direction.clone());
        }
    }
    // The search itself is sound: what does pass in clear is found, on both carriers.
    let found = |what: &str| {
        seen.iter()
            .filter(|bytes| find(bytes, what.as_bytes()).is_some())
            .count()
    };
    ensure!(
        found(ALPHA) >= 2,
        "the cluster's name was not found: the search is broken"
    );
    ensure!(
        found("/v1/carrier") >= 2,
        "the upgrade was not found: the search is broken"
    );
    let api_path = format!("/api/v1/namespaces/{namespace}/secrets");
    for (what, text) in [
        ("the secret", secret.as_str()),
        ("the secret in base64", &encoded),
        ("the secret's name", &name),
        ("the path", &api_path),
        ("a part of the path", "/api/v1"),
        ("the resource", "secrets"),
        ("the agent's token", &token),
        ("an impersonation", "mpersonate-"),
        ("kubectl", "kubectl"),
    ] {
        // HPACK may hide text from this search, so the secret's body above is what counts most.
        ensure!(found(text) == 0, "{what} passed in clear: {text}");
    }
    for process in [&relay.process, &agent.process, &proxy.process] {
        for text in [&secret, &encoded, &token, &cluster_token, &user_token] {
            lacks(&process.log(), text).with_context(|| format!("log of {}", process.name()))?;
        }
    }
    upstream.clean().await
}

/// A relay that two clusters and a user have enrolled at, then taken over by its enemy.
struct TakenOver {
    relay: MaliciousRelay,
    authority: Authority,
    agents: Vec<Agent>,
    proxy: Proxy,
    upstream: Upstream,
    secret: String,
    namespace: String,
    name: String,
    dir: tempfile::TempDir,
}

impl Fixture for TakenOver {}

impl TakenOver {
    async fn start() -> Result<Self> {
        let dir = private_dir()?;
        let upstream = Upstream::start(dir.path()).await?;
        let listen = free_address()?;
        let url = format!("http://127.0.0.1:{}", listen.port());
        let relay = Relay::at(dir.path(), listen, &url, &["--plaintext"]).await?;
        let mut agents = Vec::new();
        for cluster in [ALPHA, BETA] {
            let token = relay.token(&["--cluster", cluster]).await?;
            let agent =
                Agent::start(dir.path(), cluster, &token, upstream.kubeconfig(), &[]).await?;
            agent.connected().await?;
            agents.push(agent);
        }
        let token = relay
            .token(&["--user", USER, "--group", upstream.group()])
            .await?;
        let user = User::login(dir.path(), USER, &token, &[]).await?;
        relay.process.stop(Duration::from_secs(30)).await?;

        let authority = Authority::open(&relay.state).await?;
        let relay = MaliciousRelay::start(listen, &url, &authority, Attack::None).await?;
        let proxy = Proxy::start(&user, &[ALPHA, BETA], &[]).await?;
        let clusters = || async {
            ensure!(relay.clusters().len() == 2, "only {:?}", relay.clusters());
            Ok(())
        };
        eventually(Duration::from_secs(60), "both agents came back", clusters).await?;

        // Large enough that no offset used below lies behind its end.
        let (name, secret) = (unique("prey"), unique("unreadable-").repeat(2000));
        let namespace = upstream.namespace("sealed-").await?;
        let admin = upstream.admin()?.namespace(&namespace);
        let file = dir.path().join("secret");
        std::fs::write(&file, &secret)?;
        let from = format!("--from-file=key={}", file.display());
        admin
            .ok(&["create", "secret", "generic", &name, &from])
            .await?;
        Ok(Self {
            relay,
            authority,
            agents,
            proxy,
            upstream,
            secret,
            namespace,
            name,
            dir,
        })
    }

    fn kubectl(&self, cluster: &str) -> Result<Kubectl> {
        let home = self.dir.path().join(cluster);
        std::fs::create_dir_all(&home)?;
        Ok(
            Kubectl::new(&tools::newest_kubectl()?, &self.proxy.kubeconfig, &home)
                .context(&format!("throwline-{cluster}"))
                .namespace(&self.namespace)
                .within(Duration::from_secs(90)),
        )
    }

    /// Reads the secret through a line that is opened now.
    async fn read(&mut self, cluster: &str) -> Result<throwline_e2e::Output> {
        self.proxy.process.stop(Duration::from_secs(30)).await?;
        self.proxy.restart().await?;
        self.kubectl(cluster)?
            .run(&["get", "secret", &self.name, "-o", "json"])
            .await
    }

    async fn succeeds(&mut self, cluster: &str) -> Result<()> {
        let output = self.read(cluster).await?;
        ensure!(
            output.code == Some(0),
            "an untouched line failed: {}",
            output.stderr
        );
        ensure!(
            output.text().contains(&STANDARD.encode(&self.secret)),
            "the secret is missing"
        );
        Ok(())
    }

    /// kubectl shows the true secret, or fails.
    async fn is_whole_or_fails(&mut self, cluster: &str, attack: Attack) -> Result<()> {
        self.relay.set_attack(attack);
        let output = self.read(cluster).await?;
        self.relay.set_attack(Attack::None);
        let whole = output.text().contains(&STANDARD.encode(&self.secret));
        ensure!(
            whole == (output.code == Some(0)),
            "{:?}: {}",
            output.code,
            output.text()
        );
        Ok(())
    }

    /// The error is clean: kubectl fails in time, with a message, and shows no data.
    async fn fails_cleanly(&mut self, cluster: &str, attack: Attack) -> Result<()> {
        let lines = self.relay.lines();
        self.relay.set_attack(attack);
        let output = self.read(cluster).await?;
        self.relay.set_attack(Attack::None);
        ensure!(
            self.relay.lines() > lines,
            "no line was opened: nothing was tampered with"
        );
        ensure!(
            output.code.is_some_and(|code| code != 0),
            "kubectl succeeded: {}",
            output.text()
        );
        let said = format!("{}{}", output.text(), output.stderr);
        ensure!(
            !output.stderr.trim().is_empty(),
            "kubectl failed without a word"
        );
        lacks(&said, FORGED)?;
        lacks(&said, &STANDARD.encode(&self.secret)[..64])?;
        lacks(&said, "panicked")?;
        for process in self
            .agents
            .iter()
            .map(|agent| &agent.process)
            .chain([&self.proxy.process])
        {
            process.check_running().await?;
            lacks(&process.log(), "panicked").with_context(|| process.name().to_owned())?;
        }
        Ok(())
    }
}

async fn a_tampering_relay(_: Arc<()>) -> Result<()> {
    let mut fixture = TakenOver::start().await?;
    let told = tampering(&mut fixture).await;
    let diagnostics = || {
        let logs = fixture
            .agents
            .iter()
            .map(|agent| &agent.process)
            .chain([&fixture.proxy.process]);
        logs.map(|process| tail(process.name(), &process.log()))
            .collect::<String>()
    };
    told.with_context(diagnostics)?;
    fixture.upstream.clean().await
}

async fn tampering(fixture: &mut TakenOver) -> Result<()> {
    // The control: this relay, left alone, serves.
    fixture.succeeds(ALPHA).await.context("the control")?;
    ensure!(
        fixture.relay.recorded(ALPHA) > 20_000,
        "too little passed to tamper with"
    );

    // In a frame's type, in the handshake, in the answer.
    for offset in [0, 300, 1_500, 20_000] {
        let cleanly = fixture
            .fails_cleanly(ALPHA, Attack::FlipToUser(offset))
            .await;
        cleanly.with_context(|| format!("a bit flipped at {offset}, agent to user"))?;
    }
    for offset in [0, 300, 1_200] {
        let cleanly = fixture
            .fails_cleanly(ALPHA, Attack::FlipToAgent(offset))
            .await;
        cleanly.with_context(|| format!("a bit flipped at {offset}, user to agent"))?;
    }
    // The hello of a line is the relay's to read; its content proves nothing about the line, and
    // a change there must at most end the line.
    for attack in [Attack::FlipToUser(20), Attack::FlipToAgent(20)] {
        fixture
            .is_whole_or_fails(ALPHA, attack)
            .await
            .context("a bit flipped in the hello")?;
    }
    let cleanly = fixture
        .fails_cleanly(ALPHA, Attack::SwapClusters(ALPHA, BETA))
        .await;
    cleanly.context("two lines swapped as they are opened")?;
    let attack = Attack::SwapAnswers {
        from: ALPHA,
        to: BETA,
        after: 8_000,
    };
    fixture
        .fails_cleanly(BETA, attack)
        .await
        .context("two lines swapped in the middle")?;

    let validator = fixture.authority.validator().clone();
    let identity = forged_identity(fixture.dir.path().join("forger"), &fixture.authority).await?;
    let attack = Attack::OwnAgent {
        identity,
        validator: validator.clone(),
    };
    fixture
        .fails_cleanly(ALPHA, attack)
        .await
        .context("an agent of another authority")?;
    let identity =
        Identity::load(&fixture.agents[1].state)?.context("the agent has an identity")?;
    let attack = Attack::OwnAgent {
        identity,
        validator,
    };
    fixture
        .fails_cleanly(ALPHA, attack)
        .await
        .context("another cluster's agent")?;

    // None of it has affected later requests.
    fixture
        .succeeds(ALPHA)
        .await
        .context("after the tampering")?;
    fixture.succeeds(BETA).await.context("after the tampering")
}

/// The same cluster's name, from an authority of the relay's own making.
async fn forged_identity(dir: PathBuf, real: &Authority) -> Result<Identity> {
    std::fs::create_dir_all(&dir)?;
    let url = real.relay_url().await?;
    let forger = Authority::open_or_create(&dir, &url).await?;
    let subject = Subject::Cluster(ALPHA.to_owned());
    let token: EnrolmentToken = forger
        .create_token(&subject, Duration::from_secs(60), &url)
        .await?;
    let pending = PendingIdentity::generate()?;
    let asker = Asker::Cluster {
        uid: "forged".to_owned(),
    };
    let request = token.request(&asker, pending.csr_pem())?;
    let issued = forger.redeem(&request).await?;
    let identity = pending.complete(issued.chain)?;
    Ok(identity)
}

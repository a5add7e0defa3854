//! Three relays behind HAProxy, nginx and Envoy, each ending TLS and each passing it through, by
//! the files of `deploy/balancers`. Relays, agent and local proxy stay while one balancer follows
//! another at one address.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::{ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures::future::{BoxFuture, FutureExt, try_join};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use throwline_certs::tls;
use throwline_database::Database;
use throwline_e2e::balancer::{Balancer, Mode, Product, Site};
use throwline_e2e::environment::{CLUSTER, USER, private_dir, said, tail};
use throwline_e2e::pod::{self, Pod};
use throwline_e2e::postgres::{self, OWNER, Postgres};
use throwline_e2e::upstream::Upstream;
use throwline_e2e::{
    Agent, Fixture, Kubectl, Process, Proxy, Relay, Suite, User, contains, eventually,
    free_address, lacks, tools, unique,
};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::TcpStream;
use tokio::process::{Child, ChildStdout};
use tokio::sync::Mutex;

fn main() -> ExitCode {
    use Product::{Envoy, Haproxy, Nginx};
    let mut suite = Suite::new();
    for (name, product) in [("haproxy", Haproxy), ("nginx", Nginx), ("envoy", Envoy)] {
        suite = suite
            .alone(&format!("{name}_ends_tls"), LIMIT, move |both| {
                through(both, Mode::Terminate, product)
            })
            .alone(&format!("{name}_passes_tls_through"), LIMIT, move |both| {
                through(both, Mode::Passthrough, product)
            });
    }
    suite
        .alone("haproxy_reloads_under_an_exec", LIMIT, reload)
        .alone(
            "a_forwarded_address_from_elsewhere_is_not_believed",
            LIMIT,
            forwarded_from_elsewhere,
        )
        .alone(
            "a_proxy_header_from_elsewhere_is_not_believed",
            LIMIT,
            proxy_header_from_elsewhere,
        )
        .run(Both::start)
}

const LIMIT: Duration = Duration::from_secs(240);
const PATIENCE: Duration = Duration::from_secs(60);

/// What the balancers let be silent, how often we speak, and a silence that is longer.
const IDLE_SECONDS: u32 = 4;
const PING: &str = "1s";
const QUIET: Duration = Duration::from_secs(10);

/// From where agent and local proxy come to the balancer.
const CLIENT: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// The balancer's address, which the relays trust.
const BALANCER: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 9));
/// The address of one that they do not trust.
const STRANGER: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 8));

/// One set of relays behind a balancer that ends TLS, another behind one that does not.
struct Both {
    terminating: Set,
    passing: Set,
}

impl Both {
    async fn start() -> Result<Self> {
        let (terminating, passing) =
            try_join(Set::start(Mode::Terminate), Set::start(Mode::Passthrough)).await?;
        Ok(Self {
            terminating,
            passing,
        })
    }

    fn of(&self, mode: Mode) -> &Set {
        match mode {
            Mode::Terminate => &self.terminating,
            Mode::Passthrough => &self.passing,
        }
    }
}

impl Fixture for Both {
    fn diagnostics(&self) -> String {
        [self.terminating.diagnostics(), self.passing.diagnostics()].concat()
    }

    fn close(&self) -> BoxFuture<'_, Result<()>> {
        async {
            for set in [&self.terminating, &self.passing] {
                set.upstream.clean().await?;
            }
            Ok(())
        }
        .boxed()
    }
}

struct Clients {
    proxy: Proxy,
    agent: Agent,
}

struct Set {
    site: Site,
    // Dropped in this order: clients first.
    clients: Mutex<Clients>,
    user: User,
    kubeconfig: PathBuf,
    relays: Vec<Relay>,
    _server: Postgres,
    upstream: Upstream,
    namespace: String,
    dir: tempfile::TempDir,
}

impl Set {
    async fn start(mode: Mode) -> Result<Self> {
        let dir = private_dir()?;
        let upstream = Upstream::start(dir.path()).await?;
        let listen = free_address()?;
        let (port, admin_port) = (free_address()?.port(), free_address()?.port());
        let relays = [11, 12, 13].map(|last| SocketAddr::from(([127, 0, 0, last], port)));
        let site = Site {
            dir: dir.path().join("balancer"),
            mode,
            listen,
            relays,
            admin_port,
            source: BALANCER,
            idle_seconds: IDLE_SECONDS,
        };
        site.prepare()?;
        let server = Postgres::start().await?;
        postgres::migrate(&Database::from_url(&server.url(OWNER))?).await?;
        let relays = start_relays(dir.path(), &site, &server.url(OWNER)).await?;
        // Whichever, to enrol.
        let balancer = Balancer::start(Product::Haproxy, &site).await?;
        let ca_file = site.ca_file().display().to_string();
        let ca: &[&str] = match mode {
            Mode::Terminate => &["--ca-file", &ca_file],
            Mode::Passthrough => &[],
        };
        let token = relays[0].token(&["--cluster", CLUSTER]).await?;
        let agent = Agent::start(dir.path(), CLUSTER, &token, upstream.kubeconfig(), ca).await?;
        agent.connected().await?;
        let token = relays[0]
            .token(&["--user", USER, "--group", upstream.group()])
            .await?;
        let user = User::login(dir.path(), USER, &token, ca).await?;
        let proxy = Proxy::start(&user, &[CLUSTER], &[]).await?;
        balancer.kill().await?;
        let kubeconfig = proxy.kubeconfig.clone();
        let namespace = upstream.namespace("throwline-e2e-").await?;
        Ok(Self {
            site,
            clients: Mutex::new(Clients { proxy, agent }),
            user,
            kubeconfig,
            relays,
            _server: server,
            upstream,
            namespace,
            dir,
        })
    }

    fn kubectl(&self) -> Result<Kubectl> {
        Ok(
            Kubectl::new(&tools::newest_kubectl()?, &self.kubeconfig, self.dir.path())
                .context(&format!("throwline-{CLUSTER}"))
                .namespace(&self.namespace),
        )
    }

    /// This balancer, and agent and proxy started behind it: after the stories before, they would
    /// wait long before they try again.
    async fn behind(&self, product: Product, site: &Site) -> Result<Balancer> {
        let balancer = Balancer::start(product, site).await?;
        let mut clients = self.clients.lock().await;
        clients.agent.process.kill().await?;
        clients.agent.restart().await?;
        clients.proxy.process.kill().await?;
        clients.proxy.restart().await?;
        drop(clients);
        self.works().await?;
        Ok(balancer)
    }

    /// Waits until kubectl gets an answer.
    async fn works(&self) -> Result<()> {
        let kubectl = self.kubectl()?;
        let since = Instant::now();
        eventually(PATIENCE, "kubectl works", || async {
            kubectl.ok(&["get", "pods"]).await.map(drop)
        })
        .await?;
        println!("  kubectl works after {:?}", since.elapsed());
        Ok(())
    }

    /// Since when the audit's events count: those so far.
    async fn events(&self) -> Result<usize> {
        Ok(self.clients.lock().await.agent.audit_events()?.len())
    }

    /// The source of all later requests, by the audit.
    async fn source(&self, after: usize) -> Result<IpAddr> {
        let events = self.clients.lock().await.agent.audit_events()?;
        let sources: BTreeSet<String> = events[after..]
            .iter()
            .map(|event| event["sourceIPs"].to_string())
            .collect();
        ensure!(sources.len() == 1, "not of one client: {sources:?}");
        let source = sources.first().context("no event")?;
        let source = source.trim_matches(['[', ']', '"']);
        source
            .parse()
            .with_context(|| format!("not one address: {source}"))
    }

    /// What all relays have logged since a moment, which is the logs' lengths then.
    fn logs(&self, since: &[usize]) -> String {
        let logs = self.relays.iter().map(|relay| relay.process.log());
        logs.zip(since)
            .map(|(log, since)| log[*since..].to_owned())
            .collect()
    }

    fn now(&self) -> Vec<usize> {
        let logs = self.relays.iter().map(|relay| relay.process.log());
        logs.map(|log| log.len()).collect()
    }

    async fn count(&self, metric: &str, labels: &[&str]) -> Result<f64> {
        let mut sum = 0.0;
        for relay in &self.relays {
            sum += relay.metrics().await?.sum(metric, labels);
        }
        Ok(sum)
    }

    fn diagnostics(&self) -> String {
        let logs = |process: &Process| tail(process.name(), &process.log());
        let mut text: String = self
            .relays
            .iter()
            .map(|relay| logs(&relay.process))
            .collect();
        if let Ok(clients) = self.clients.try_lock() {
            text.push_str(&logs(&clients.agent.process));
            text.push_str(&logs(&clients.proxy.process));
        }
        text
    }
}

/// A port that is free on loopback addresses other than the first, most likely.
async fn start_relays(dir: &std::path::Path, site: &Site, database: &str) -> Result<Vec<Relay>> {
    let balancer = BALANCER.to_string();
    let url = format!("https://localhost:{}", site.listen.port());
    let mode: &[&str] = match site.mode {
        Mode::Terminate => &["--plaintext"],
        Mode::Passthrough => &["--proxy-protocol"],
    };
    let arguments = [
        &["--database", database, "--ping-interval", PING][..],
        &["--trust-proxy", &balancer],
        mode,
    ]
    .concat();
    let mut relays: Vec<Relay> = Vec::new();
    for (number, listen) in site.relays.iter().enumerate() {
        let dir = dir.join(format!("relay-{number}"));
        if let Some(first) = relays.first() {
            first.share_the_ca(&dir)?;
        }
        let admin = SocketAddr::new(listen.ip(), site.admin_port);
        relays.push(Relay::with_admin(&dir, *listen, admin, &url, &arguments).await?);
    }
    Ok(relays)
}

/// The whole of what a configuration must do.
async fn through(both: Arc<Both>, mode: Mode, product: Product) -> Result<()> {
    let set = both.of(mode);
    let since = set.now();
    let mut balancer = set.behind(product, &set.site).await?;
    let told = async {
        let events = set.events().await?;
        let pod = Pod::start(&set.upstream, &set.namespace, pod::IDLE).await?;
        let kubectl = set.kubectl()?;
        let script = "echo ahoy; head -c 3000000 /dev/zero | wc -c; exit 3";
        let output = kubectl
            .run(&["exec", &pod.name, "--", "sh", "-c", script])
            .await?;
        ensure!(
            output.text() == "ahoy\n3000000\n" && output.code == Some(3),
            "{output:?}"
        );
        a_quiet_watch(set).await?;

        // Who asks, and from where: the client, not the balancer.
        let client = set.source(events).await?;
        if (product, mode) == (Product::Envoy, Mode::Terminate) {
            // For a client on loopback, Envoy gives the machine's own address.
            ensure!(client != BALANCER && TcpListener::bind((client, 0)).is_ok());
        } else {
            ensure!(client == CLIENT, "{client}");
        }
        a_claim_is_not_believed(set).await?;
        let logs = set.logs(&since);
        contains(&logs, &format!("client={client}:"))?;
        lacks(&logs, &format!("client={BALANCER}"))?;

        let killed = Instant::now();
        balancer.kill().await?;
        balancer.restart().await?;
        set.works().await?;
        println!("  {:?} after the balancer was killed", killed.elapsed());
        pod.remove().await
    };
    told.await
        .with_context(|| tail("the balancer", &balancer.process.log()))
}

/// A watch in which nothing happens for longer than the balancer bears.
async fn a_quiet_watch(set: &Set) -> Result<()> {
    let (mut child, mut lines) = watch(set)?;
    let admin = set.upstream.admin()?.namespace(&set.namespace);
    let (before, after) = (unique("before-"), unique("after-"));
    admin.ok(&["create", "secret", "generic", &before]).await?;
    until(&mut lines, &before)
        .await
        .context("the watch does not work")?;
    // The silence is what is tested.
    tokio::time::sleep(QUIET).await;
    admin.ok(&["create", "secret", "generic", &after]).await?;
    until(&mut lines, &after)
        .await
        .context("after the silence")?;
    ensure!(child.try_wait()?.is_none(), "the watch ended");
    child.kill().await?;
    Ok(())
}

fn watch(set: &Set) -> Result<(Child, Lines<BufReader<ChildStdout>>)> {
    let kubectl = set.kubectl()?;
    let mut child = kubectl
        .command(&["get", "secrets", "-w", "-o", "name"])
        .stderr(Stdio::inherit())
        .spawn()?;
    let output = child.stdout.take().context("no output")?;
    Ok((child, BufReader::new(output).lines()))
}

async fn until(lines: &mut Lines<BufReader<ChildStdout>>, part: &str) -> Result<()> {
    let read = async {
        while let Some(line) = lines.next_line().await? {
            if line.contains(part) {
                return Ok(());
            }
        }
        anyhow::bail!("it ended")
    };
    let limit = Duration::from_secs(10);
    tokio::time::timeout(limit, read)
        .await
        .context("nothing came")?
}

/// A client that writes `X-Forwarded-For` itself is who it is.
async fn a_claim_is_not_believed(set: &Set) -> Result<()> {
    const CLAIM: &str = "203.0.113.7";
    let since = set.now();
    let ca = match set.site.mode {
        Mode::Terminate => set.site.ca_file(),
        Mode::Passthrough => set.relays[0].state.join("ca.pem"),
    };
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(ca)?)?;
    let config = rustls::ClientConfig::builder_with_provider(tls::provider())
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let tcp = TcpStream::connect(set.site.listen).await?;
    let mut stream = tokio_rustls::TlsConnector::from(Arc::new(config))
        .connect(ServerName::try_from("localhost")?, tcp)
        .await?;
    let request = format!(
        "GET /v1/carrier HTTP/1.1\r\nHost: localhost\r\nX-Forwarded-For: {CLAIM}\r\n\
         Connection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await?;
    stream.flush().await?;
    let mut answer = Vec::new();
    // A balancer may leave without TLS's goodbye; what counts was read by then.
    let _ = stream.read_to_end(&mut answer).await;
    contains(&String::from_utf8_lossy(&answer), "HTTP/1.1 4")?;
    let logs = set.logs(&since);
    contains(&logs, "refused a carrier")?;
    lacks(&logs, CLAIM)
}

/// The old process keeps its connections; the new one accepts new ones.
async fn reload(both: Arc<Both>) -> Result<()> {
    for mode in [Mode::Terminate, Mode::Passthrough] {
        let set = both.of(mode);
        let balancer = set.behind(Product::Haproxy, &set.site).await?;
        let pod = Pod::start(&set.upstream, &set.namespace, pod::IDLE).await?;
        let mut exec = set
            .kubectl()?
            .command(&["exec", "-i", &pod.name, "--", "sh", "-c"])
            .arg("echo begin; read line; echo \"$line\"; exit 3")
            .stdin(Stdio::piped())
            .spawn()?;
        let mut lines = BufReader::new(exec.stdout.take().context("no output")?).lines();
        until(&mut lines, "begin").await?;
        let old = children(&balancer)?;
        balancer.reload().await?;
        ensure!(children(&balancer)? != old, "no new process");
        // A new connection goes through the new process.
        contains(&set.user.clusters().await?.to_string(), CLUSTER)?;
        let mut stdin = exec.stdin.take().context("no input")?;
        stdin.write_all(b"over the old process\n").await?;
        drop(stdin);
        until(&mut lines, "over the old process").await?;
        let status = tokio::time::timeout(PATIENCE, exec.wait()).await??;
        ensure!(status.code() == Some(3), "exec ended with {status}");
        pod.remove().await?;
        balancer.kill().await?;
    }
    Ok(())
}

fn children(balancer: &Balancer) -> Result<String> {
    let pid = balancer.process.pid();
    Ok(std::fs::read_to_string(format!(
        "/proc/{pid}/task/{pid}/children"
    ))?)
}

/// A balancer's address that relays do not trust.
fn strange(site: &Site) -> Site {
    Site {
        source: STRANGER,
        ..site.clone()
    }
}

async fn forwarded_from_elsewhere(both: Arc<Both>) -> Result<()> {
    let set = &both.terminating;
    let balancer = set.behind(Product::Haproxy, &strange(&set.site)).await?;
    let events = set.events().await?;
    set.kubectl()?.ok(&["get", "configmaps"]).await?;
    let source = set.source(events).await?;
    ensure!(source == STRANGER, "{source}");
    balancer.kill().await
}

async fn proxy_header_from_elsewhere(both: Arc<Both>) -> Result<()> {
    let set = &both.passing;
    let since = set.now();
    let (handshakes, failed) = ("throwline_relay_handshakes_total", &["tls-failed"]);
    let before = set.count(handshakes, failed).await?;
    let balancer = Balancer::start(Product::Haproxy, &strange(&set.site)).await?;
    // To such a relay, the header is a malformed beginning of TLS.
    let output = set.user.run(&["clusters"]).await?;
    ensure!(!output.status.success(), "{}", said(&output));
    ensure!(set.count(handshakes, failed).await? > before);
    let logs = set.logs(&since);
    lacks(&logs, &format!("client={CLIENT}:"))?;
    lacks(&logs, "a carrier is up")?;
    balancer.kill().await
}

//! Out of networks that let nothing out but through a proxy: real Squid and real Tinyproxy.

use std::path::PathBuf;
use std::process::{ExitCode, Output};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::future::{BoxFuture, FutureExt};
use throwline_e2e::environment::{private_dir, said, tail};
use throwline_e2e::pod::{self, Pod};
use throwline_e2e::squid::{self, Squid};
use throwline_e2e::tinyproxy::Tinyproxy;
use throwline_e2e::upstream::Upstream;
use throwline_e2e::{
    Agent, Fixture, Kubectl, Process, Proxy, Relay, Suite, User, contains, eventually,
    free_address, lacks, tools, unique,
};

fn main() -> ExitCode {
    Suite::new()
        .story(
            "by_https_proxy_to_a_name_that_only_the_proxy_knows",
            by_https_proxy,
        )
        .story("with_a_password_of_hard_characters", with_a_password)
        .story("over_tls_to_the_proxy", over_tls)
        .story("under_a_proxy_that_inspects_tls", inspected)
        .story("by_tinyproxy", by_tinyproxy)
        .story("past_a_dead_proxy_by_no_proxy", past_a_dead_proxy)
        .story("the_agent_survives_its_proxy", survives)
        .run(Locked::start)
}

/// A name that no resolver of this machine knows.
const NAME: &str = "relay.corp.invalid";

/// A relay behind a Squid, and one beside.
struct Locked {
    /// Under [`NAME`].
    relay: Relay,
    /// Under 0.0.0.0: this machine, by an address that the proxies' variables do not exempt, as
    /// they do loopback's.
    open_relay: Relay,
    squid: Squid,
    upstream: Upstream,
    namespace: String,
    dir: tempfile::TempDir,
}

impl Locked {
    async fn start() -> Result<Self> {
        let dir = private_dir()?;
        let upstream = Upstream::start(dir.path()).await?;
        let listen = free_address()?;
        let url = format!("https://{NAME}:{}", listen.port());
        let relay = Relay::at(&dir.path().join("locked"), listen, &url, &[]).await?;
        let listen = free_address()?;
        let url = format!("https://0.0.0.0:{}", listen.port());
        let open_relay = Relay::at(&dir.path().join("open"), listen, &url, &[]).await?;
        let ca = std::fs::read_to_string(relay.state.join("ca.pem"))?;
        let squid = Squid::start(NAME, &ca).await?;
        let namespace = upstream.namespace("throwline-e2e-").await?;
        Ok(Self {
            relay,
            open_relay,
            squid,
            upstream,
            namespace,
            dir,
        })
    }

    /// A user who never signed in, with this environment.
    fn somebody(&self, environment: &[(&str, &str)]) -> Result<User> {
        Ok(User::nobody(self.dir.path(), &unique("user-"))?.within(environment))
    }

    /// Login that must fail, and its output.
    async fn refused(
        &self,
        relay: &Relay,
        environment: &[(&str, &str)],
        arguments: &[&str],
    ) -> Result<String> {
        let user = self.somebody(environment)?;
        let token = relay.token(&["--user", &user.name]).await?;
        let output = user.sign_in(&token, arguments).await?;
        ensure!(output.status.code() == Some(1), "{}", said(&output));
        let said = said(&output);
        lacks(&said, &token)?;
        Ok(said)
    }

    /// An agent, a signed-in user and a local proxy, all of this way out.
    async fn line(
        &self,
        relay: &Relay,
        environment: &[(&str, &str)],
        arguments: &[&str],
    ) -> Result<Line> {
        let cluster = unique("c-");
        let token = relay.token(&["--cluster", &cluster]).await?;
        let agent = Agent::start_in(
            self.dir.path(),
            &cluster,
            &token,
            self.upstream.kubeconfig(),
            arguments,
            environment,
        )
        .await?;
        agent.connected().await?;
        let user = self.somebody(environment)?;
        let group = self.upstream.group();
        let token = relay
            .token(&["--user", &user.name, "--group", group])
            .await?;
        let login = user.sign_in(&token, arguments).await?;
        ensure!(login.status.success(), "{}", said(&login));
        let proxy = Proxy::start(&user, &[&cluster], arguments).await?;
        Ok(Line {
            agent,
            proxy,
            user,
            login,
            cluster,
        })
    }

    /// A get and an exec, both ways with bytes.
    async fn works(&self, line: &Line) -> Result<()> {
        let kubectl = line.kubectl(self)?;
        contains(
            &kubectl.ok(&["get", "namespaces", "-o", "name"]).await?,
            &self.namespace,
        )?;
        let pod = Pod::start(&self.upstream, &self.namespace, pod::IDLE).await?;
        let exec = [
            "exec",
            "-i",
            &pod.name,
            "--",
            "sh",
            "-c",
            "cat; echo end; exit 3",
        ];
        let input = vec![b'x'; 300_000];
        let output = kubectl.feed(&exec, &input).await?;
        ensure!(
            output.code == Some(3),
            "{:?} {}",
            output.code,
            output.stderr
        );
        let mut expected = input;
        expected.extend(b"end\n");
        ensure!(output.stdout == expected, "exec's bytes differ");
        pod.remove().await
    }

    /// `throwline clusters` of this line, with the arguments that it needs.
    async fn lists(&self, line: &Line, arguments: &[&str]) -> Result<()> {
        let output = line
            .user
            .run(&[&["clusters", "-o", "json"], arguments].concat())
            .await?;
        ensure!(output.status.success(), "{}", said(&output));
        contains(&said(&output), &line.cluster)
    }

    fn ca(&self) -> String {
        self.squid.ca_file.display().to_string()
    }
}

impl Fixture for Locked {
    fn diagnostics(&self) -> String {
        let mut text = tail("relay", &self.relay.process.log());
        text += &tail("open relay", &self.open_relay.process.log());
        text += &tail("squid", &self.squid.log());
        text += &tail("squid's accesses", &self.squid.accesses());
        for entry in walk(self.dir.path()) {
            let name = entry.display().to_string();
            if name.contains("agent-c-") || name.ends_with("proxy.log") {
                text += &tail(&name, &std::fs::read_to_string(&entry).unwrap_or_default());
            }
        }
        text
    }

    fn close(&self) -> BoxFuture<'_, Result<()>> {
        async { self.upstream.clean().await }.boxed()
    }
}

/// The logs below a directory.
fn walk(dir: &std::path::Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() && !path.is_symlink() {
            found.extend(walk(&path));
        } else if path.extension().is_some_and(|end| end == "log") {
            found.push(path);
        }
    }
    found
}

struct Line {
    agent: Agent,
    proxy: Proxy,
    user: User,
    login: Output,
    cluster: String,
}

impl Line {
    fn kubectl(&self, fixture: &Locked) -> Result<Kubectl> {
        let version = tools::newest_kubectl()?;
        let home = fixture.dir.path().join(&self.cluster);
        Ok(Kubectl::new(&version, &self.proxy.kubeconfig, &home)
            .context(&format!("throwline-{}", self.cluster))
            .namespace(&fixture.namespace))
    }

    fn processes(&self) -> [&Process; 2] {
        [&self.agent.process, &self.proxy.process]
    }
}

async fn by_https_proxy(fixture: Arc<Locked>) -> Result<()> {
    let said = fixture.refused(&fixture.relay, &[], &[]).await?;
    contains(&said, &format!("cannot find the address of {NAME}"))?;
    let url = format!("http://{}", fixture.squid.doors.open);
    let environment = [("HTTPS_PROXY", url.as_str()), ("NO_PROXY", "10.0.0.0/8")];
    let line = fixture.line(&fixture.relay, &environment, &[]).await?;
    fixture.works(&line).await?;
    fixture.lists(&line, &[]).await?;
    // Squid writes a tunnel down when it ends: the login's has.
    let accesses = || async { contains(&fixture.squid.accesses(), &format!("CONNECT {NAME}")) };
    eventually(
        Duration::from_secs(10),
        "it all went through Squid",
        accesses,
    )
    .await?;
    // The flag wins over the environment.
    let nowhere = format!("http://{}", free_address()?);
    let said = fixture
        .refused(&fixture.relay, &environment, &["--proxy", &nowhere])
        .await?;
    contains(&said, "cannot be connected to")
}

async fn with_a_password(fixture: Arc<Locked>) -> Result<()> {
    let with = |password: &str| {
        let user = squid::USER;
        format!("http://{user}:{password}@{}", fixture.squid.doors.known)
    };
    let url = with(squid::PASSWORD_IN_URL);
    let line = fixture
        .line(&fixture.relay, &[("THROWLINE_PROXY", url.as_str())], &[])
        .await?;
    fixture.works(&line).await?;
    fixture.lists(&line, &[]).await?;
    let mut told = said(&line.login);
    for process in line.processes() {
        told += &process.log();
        told += &process.stdout();
        let arguments = std::fs::read(format!("/proc/{}/cmdline", process.pid()))?;
        told += &String::from_utf8_lossy(&arguments);
    }

    let without = format!("http://{}", fixture.squid.doors.known);
    let said = fixture
        .refused(&fixture.relay, &[("HTTPS_PROXY", &without)], &[])
        .await?;
    contains(&said, "requires a user and a password (407)")?;
    contains(&said, "percent-encoded")?;
    told += &said;

    let wrong = with("wr0ng%20one");
    let environment = [("https_proxy", wrong.as_str())];
    let said = fixture.refused(&fixture.relay, &environment, &[]).await?;
    contains(&said, "does not accept the user and password")?;
    contains(&said, &fixture.squid.doors.known.to_string())?;
    told += &said;

    // A likely mistake; the error shows the right form.
    let raw = with(squid::PASSWORD);
    let said = fixture
        .refused(&fixture.relay, &[("HTTPS_PROXY", &raw)], &[])
        .await?;
    contains(&said, "HTTPS_PROXY")?;
    contains(&said, "percent-encoded")?;
    told += &said;
    let mut help = line.user.command(&["login", "--help"])?;
    let help = help.env("THROWLINE_PROXY", &url).output().await?;
    told += &throwline_e2e::environment::said(&help);

    let encoded = "YW5uOnBAc3M6dy9yZCXDqSAjPw";
    for secret in [
        squid::PASSWORD,
        squid::PASSWORD_IN_URL,
        encoded,
        "p@ss",
        "p%40ss",
        "wr0ng",
    ] {
        lacks(&told, secret)?;
    }
    // An agent, too, ends before its token is spent.
    let cluster = unique("c-late-");
    let token = fixture.relay.token(&["--cluster", &cluster]).await?;
    let agent = Agent::start_in(
        fixture.dir.path(),
        &cluster,
        &token,
        fixture.upstream.kubeconfig(),
        &[],
        &environment,
    )
    .await?;
    let status = agent.process.ended(Duration::from_secs(30)).await?;
    ensure!(status.code() == Some(1), "{status}");
    contains(
        &agent.process.log(),
        "does not accept the user and password",
    )?;
    lacks(&agent.process.log(), "wr0ng")
}

async fn over_tls(fixture: Arc<Locked>) -> Result<()> {
    let (user, password) = (squid::USER, squid::PASSWORD_IN_URL);
    let port = fixture.squid.doors.over_tls.port();
    let url = format!("https://{user}:{password}@localhost:{port}");
    let environment = [("HTTPS_PROXY", url.as_str())];
    let ca = fixture.ca();
    let with_ca = ["--ca-file", ca.as_str()];
    let line = fixture.line(&fixture.relay, &environment, &with_ca).await?;
    fixture.works(&line).await?;
    // Remembered at login.
    fixture.lists(&line, &[]).await?;

    let said = fixture.refused(&fixture.relay, &environment, &[]).await?;
    contains(&said, "--ca-file")?;
    contains(&said, &format!("the proxy localhost:{port}"))?;
    // Under another name than its certificate's.
    let url = format!("https://127.0.0.1:{port}");
    let said = fixture
        .refused(&fixture.relay, &[("HTTPS_PROXY", &url)], &with_ca)
        .await?;
    contains(&said, "certificate for another name")?;
    // Without TLS where there is TLS, and the other way around.
    let url = format!("http://localhost:{port}");
    let said = fixture
        .refused(&fixture.relay, &[("HTTPS_PROXY", &url)], &[])
        .await?;
    contains(&said, "https://")?;
    let url = format!("https://localhost:{}", fixture.squid.doors.open.port());
    let said = fixture
        .refused(&fixture.relay, &[("HTTPS_PROXY", &url)], &[])
        .await?;
    contains(&said, "http://")
}

async fn inspected(fixture: Arc<Locked>) -> Result<()> {
    let url = format!("http://{}", fixture.squid.doors.inspecting);
    let environment = [("HTTPS_PROXY", url.as_str())];
    let said = fixture.refused(&fixture.relay, &environment, &[]).await?;
    contains(&said, "something in between may end TLS")?;
    contains(&said, "--ca-file")?;

    let ca = fixture.ca();
    let line = fixture
        .line(&fixture.relay, &environment, &["--ca-file", &ca])
        .await?;
    fixture.works(&line).await?;
    fixture.lists(&line, &[]).await?;
    // It did look in, or this story shows nothing: a request in the clear is in its log.
    contains(&fixture.squid.accesses(), "/v1/enroll")?;
    // And it did not see kubectl's requests.
    lacks(&fixture.squid.accesses(), "/api/v1/namespaces")
}

async fn by_tinyproxy(fixture: Arc<Locked>) -> Result<()> {
    // Its configuration knows letters, digits, '-', '.' and '_' only.
    let password = "s3cret-pass";
    let dir = fixture.dir.path().join("basic");
    let known = format!("BasicAuth ann {password}");
    let tinyproxy = Tinyproxy::start(&dir, &known).await?;
    let url = format!("http://ann:{password}@{}", tinyproxy.address);
    let environment = [("HTTPS_PROXY", url.as_str())];
    let line = fixture.line(&fixture.open_relay, &environment, &[]).await?;
    fixture.works(&line).await?;
    fixture.lists(&line, &[]).await?;
    contains(&tinyproxy.accesses(), "CONNECT 0.0.0.0:")?;

    // One that has no leave for the relay's port.
    let dir = fixture.dir.path().join("narrow");
    let narrow = Tinyproxy::start(&dir, "ConnectPort 443").await?;
    let url = format!("http://{}", narrow.address);
    let said = fixture
        .refused(&fixture.open_relay, &[], &["--proxy", &url])
        .await?;
    contains(&said, "does not allow CONNECT to 0.0.0.0:")?;
    contains(&said, "403")
}

async fn past_a_dead_proxy(fixture: Arc<Locked>) -> Result<()> {
    let dead = format!("http://{}", free_address()?);
    let environment = [("HTTPS_PROXY", dead.as_str())];
    let said = fixture
        .refused(&fixture.open_relay, &environment, &[])
        .await?;
    contains(&said, "cannot be connected to")?;
    contains(&said, "HTTPS_PROXY")?;
    for exceptions in ["0.0.0.0", "*", "example.com, 0.0.0.0/8"] {
        let environment = [environment[0], ("NO_PROXY", exceptions)];
        let user = fixture.somebody(&environment)?;
        let token = fixture.open_relay.token(&["--user", &user.name]).await?;
        let output = user.sign_in(&token, &[]).await?;
        ensure!(
            output.status.success(),
            "{exceptions}: {}",
            throwline_e2e::environment::said(&output)
        );
    }
    let environment = [environment[0], ("no_proxy", "0.0.0.0")];
    let line = fixture.line(&fixture.open_relay, &environment, &[]).await?;
    fixture.works(&line).await?;

    // kubectl gets the reason, too, when the way is lost: its error names the proxy.
    let url = "socks5://127.0.0.1:1080";
    let said = fixture
        .refused(&fixture.open_relay, &[("HTTPS_PROXY", url)], &[])
        .await?;
    contains(&said, "HTTPS_PROXY")?;
    contains(&said, "SOCKS")
}

async fn survives(fixture: Arc<Locked>) -> Result<()> {
    let ca = std::fs::read_to_string(fixture.relay.state.join("ca.pem"))?;
    let mut squid = Squid::start(NAME, &ca).await?;
    let url = format!("http://{}", squid.doors.open);
    let line = fixture
        .line(&fixture.relay, &[], &["--proxy", &url])
        .await?;
    fixture.works(&line).await?;
    squid.process.kill().await?;
    let connected = || async { throwline_e2e::metrics::ready(line.agent.admin).await };
    eventually(Duration::from_secs(20), "the agent notices", || async {
        ensure!(
            connected().await.is_err(),
            "it still says that it is connected"
        );
        Ok(())
    })
    .await?;
    eventually(Duration::from_secs(20), "the agent says why", || async {
        contains(&line.agent.process.log(), "cannot be connected to")
    })
    .await?;
    let output = line.kubectl(&fixture)?.fails(&["get", "pods"]).await?;
    contains(&output.stderr, "the proxy 127.0.0.1:")?;
    squid.restart().await?;
    eventually(Duration::from_secs(60), "the agent is back", connected)
        .await
        .with_context(|| line.agent.process.log())?;
    eventually(Duration::from_secs(60), "kubectl works again", || async {
        line.kubectl(&fixture)?.ok(&["get", "pods"]).await
    })
    .await?;
    fixture.works(&line).await
}

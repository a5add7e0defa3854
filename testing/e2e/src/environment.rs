//! A whole Throwline of real processes, and the parts that stories with special needs put
//! together themselves.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::future::{BoxFuture, FutureExt};
use tokio::process::Command;

use crate::kubectl::{Kubectl, Version};
use crate::link::Link;
use crate::metrics::{self, Metrics};
use crate::process::Process;
use crate::suite::Fixture;
use crate::upstream::Upstream;
use crate::{free_address, tools};

/// How long a start may take on a busy machine.
const START: Duration = Duration::from_secs(30);

/// Ours in detail, of others what an operator would see.
const LOG: &str = "info,throwline=debug,throwline_relay=debug,throwline_agent=debug,\
                   throwline_local_proxy=debug,throwline_tunnel=debug,throwline_uplink=debug";

/// The real binary with an empty environment but for what it needs.
pub fn throwline(home: &Path) -> Result<Command> {
    std::fs::create_dir_all(home)?;
    let mut command = Command::new(tools::throwline()?);
    command
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("HOME", home)
        .env(
            "THROWLINE_LOG",
            std::env::var("THROWLINE_LOG").unwrap_or_else(|_| LOG.into()),
        )
        .stdin(std::process::Stdio::null())
        .kill_on_drop(true);
    // Only root sees the descriptors and the memory of a process that keeps its own to itself.
    if !rustix::process::geteuid().is_root() {
        command.env("THROWLINE_CORE_DUMPS", "true");
    }
    Ok(command)
}

/// Variables beside those that every process of ours gets.
type Variables = Vec<(String, String)>;

fn owned(variables: &[(&str, &str)]) -> Variables {
    let pairs = variables.iter();
    pairs
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect()
}

/// In the place of an argument: this agent asks its API server which cluster it is.
pub const ASK_THE_CLUSTER: &str = "(ask the cluster)";

/// A kubeconfig of an API server that is not there: an agent holds carriers all the same.
pub fn no_cluster(dir: &Path) -> Result<PathBuf> {
    let file = dir.join("no-cluster");
    let text = "{apiVersion: v1, kind: Config, current-context: c, users: [{name: u, user: {}}], \
                clusters: [{name: c, cluster: {server: 'http://127.0.0.1:1'}}], \
                contexts: [{name: c, context: {cluster: c, user: u}}]}";
    std::fs::write(&file, text)?;
    Ok(file)
}

/// A relay's arguments for measurements in which one user holds a thousand lines.
pub const MANY_LINES_AT_A_RELAY: [&str; 4] = [
    "--max-lines-per-user",
    "8192",
    "--max-lines-per-user-and-carrier",
    "1024",
];
/// An agent's, for the same.
pub const MANY_LINES_AT_AN_AGENT: [&str; 4] = [
    "--max-lines-per-user",
    "2000",
    "--max-requests-per-user",
    "4096",
];

/// A relay of the real binary.
pub struct Relay {
    pub process: Process,
    pub public_url: String,
    pub listen: SocketAddr,
    pub admin: SocketAddr,
    pub state: PathBuf,
    dir: PathBuf,
    arguments: Vec<String>,
}

impl Relay {
    /// With a certificate of its authority's, reached directly.
    pub async fn start(dir: &Path, arguments: &[&str]) -> Result<Self> {
        let listen = free_address()?;
        Self::at(
            dir,
            listen,
            &format!("https://localhost:{}", listen.port()),
            arguments,
        )
        .await
    }

    /// Behind something else that has this URL.
    pub async fn at(
        dir: &Path,
        listen: SocketAddr,
        public_url: &str,
        arguments: &[&str],
    ) -> Result<Self> {
        Self::with_admin(dir, listen, free_address()?, public_url, arguments).await
    }

    /// With its admin listener where a balancer's health checks look for it.
    pub async fn with_admin(
        dir: &Path,
        listen: SocketAddr,
        admin: SocketAddr,
        public_url: &str,
        arguments: &[&str],
    ) -> Result<Self> {
        let state = dir.join("relay-state");
        std::fs::create_dir_all(dir)?;
        let mut all: Vec<String> = ["relay", "--listen", &listen.to_string(), "--public-url"]
            .map(str::to_owned)
            .to_vec();
        all.extend([
            public_url.to_owned(),
            "--state-dir".into(),
            state.display().to_string(),
        ]);
        all.extend(["--admin-listen".into(), admin.to_string()]);
        // Five minutes by default, for lines that end by themselves; here nothing is worth that.
        if !arguments.contains(&"--drain-timeout") {
            all.extend(["--drain-timeout".into(), "5s".into()]);
        }
        if arguments.contains(&"--database") {
            // Several relays share this machine.
            all.extend(["--peer-listen".into(), "127.0.0.1:0".into()]);
        }
        all.extend(arguments.iter().map(|argument| (*argument).to_owned()));
        let process = Self::spawn(dir, &all)?;
        let public_url = public_url.to_owned();
        let dir = dir.to_owned();
        let this = Self {
            process,
            public_url,
            listen,
            admin,
            state,
            dir,
            arguments: all,
        };
        this.ready().await?;
        Ok(this)
    }

    fn spawn(dir: &Path, arguments: &[String]) -> Result<Process> {
        let mut command = throwline(&dir.join("home"))?;
        command.args(arguments);
        Process::start("relay", dir, command)
    }

    async fn ready(&self) -> Result<()> {
        let ready = || metrics::ready(self.admin);
        self.process.until(START, "the relay is ready", ready).await
    }

    /// Gives a relay that is to be started in `home`, on the same database, this one's CA.
    pub fn share_the_ca(&self, home: &Path) -> Result<()> {
        let state = home.join("relay-state");
        std::fs::create_dir_all(&state)?;
        for file in ["ca.pem", "ca.key"] {
            std::fs::copy(self.state.join(file), state.join(file))?;
        }
        Ok(())
    }

    /// The same relay again, after its process was stopped or killed.
    pub async fn restart(&mut self) -> Result<()> {
        self.process = Self::spawn(&self.dir, &self.arguments)?;
        self.ready().await
    }

    pub async fn metrics(&self) -> Result<Metrics> {
        Metrics::of(self.admin).await
    }

    /// `POST /drain`, with the token that the relay has left for it.
    pub async fn drain(&self) -> Result<()> {
        let token = std::fs::read_to_string(self.state.join("drain.token"))?;
        let headers = format!("Authorization: Bearer {token}\r\n");
        let (status, body) = metrics::post(self.admin, "/drain", &headers).await?;
        ensure!(status == 202, "not drained: {status} {body}");
        Ok(())
    }

    /// A token by `throwline token create`; the arguments say for whom.
    pub async fn token(&self, arguments: &[&str]) -> Result<String> {
        let mut command = throwline(&self.dir.join("home"))?;
        command
            .args(["token", "create"])
            .args(arguments)
            .arg("--state-dir")
            .arg(&self.state);
        // Its tables are where the relay's are.
        if let Some(at) = self.arguments.iter().position(|flag| flag == "--database") {
            command.args(self.arguments.iter().skip(at).take(2));
        }
        let output = command.output().await?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "token create failed: {error}");
        let token = String::from_utf8(output.stdout)?;
        ensure!(
            token.trim_end().lines().count() == 1,
            "not the token alone: {token:?}"
        );
        Ok(token.trim().to_owned())
    }
}

/// An agent of the real binary.
pub struct Agent {
    pub process: Process,
    pub cluster: String,
    pub admin: SocketAddr,
    pub state: PathBuf,
    pub audit: PathBuf,
    dir: PathBuf,
    arguments: Vec<String>,
    variables: Variables,
}

impl Agent {
    /// Enrols with `token` and starts; it may not be connected yet.
    pub async fn start(
        dir: &Path,
        cluster: &str,
        token: &str,
        kubeconfig: &Path,
        arguments: &[&str],
    ) -> Result<Self> {
        Self::start_in(dir, cluster, token, kubeconfig, arguments, &[]).await
    }

    /// The same with further environment variables.
    pub async fn start_in(
        dir: &Path,
        cluster: &str,
        token: &str,
        kubeconfig: &Path,
        arguments: &[&str],
        variables: &[(&str, &str)],
    ) -> Result<Self> {
        let variables = owned(variables);
        let dir = dir.join(format!("agent-{cluster}"));
        std::fs::create_dir_all(&dir)?;
        let token_file = dir.join("token");
        write_secret(&token_file, &format!("{token}\n"))?;
        let admin = free_address()?;
        let state = dir.join("state");
        let audit = dir.join("audit.log");
        let mut later: Vec<String> = vec!["agent".into()];
        for (flag, value) in [
            ("--state-dir", state.display().to_string()),
            ("--kubeconfig", kubeconfig.display().to_string()),
            ("--admin-listen", admin.to_string()),
        ] {
            later.extend([flag.to_owned(), value]);
        }
        if !arguments.contains(&"--audit-log") {
            later.extend(["--audit-log".into(), audit.display().to_string()]);
        }
        // Many stories are about accounts with few rights, or API servers that are not there.
        if !arguments.contains(&ASK_THE_CLUSTER) {
            later.extend(["--cluster-uid".into(), format!("uid-of-{cluster}")]);
        }
        let others = arguments.iter().filter(|it| **it != ASK_THE_CLUSTER);
        later.extend(others.map(|argument| (*argument).to_owned()));
        let mut first = later.clone();
        first.extend(["--token-file".into(), token_file.display().to_string()]);
        let process = Self::spawn(&dir, cluster, &first, &variables)?;
        let cluster = cluster.to_owned();
        Ok(Self {
            process,
            cluster,
            admin,
            state,
            audit,
            dir,
            arguments: later,
            variables,
        })
    }

    fn spawn(
        dir: &Path,
        cluster: &str,
        arguments: &[String],
        variables: &Variables,
    ) -> Result<Process> {
        let mut command = throwline(&dir.join("home"))?;
        command.args(arguments).envs(variables.iter().cloned());
        Process::start(&format!("agent-{cluster}"), dir, command)
    }

    /// The same agent again, now without its token.
    pub async fn restart(&mut self) -> Result<()> {
        self.process = Self::spawn(&self.dir, &self.cluster, &self.arguments, &self.variables)?;
        self.connected().await
    }

    /// The same agent again, with another token and the state directory that it has.
    pub async fn restart_with(&mut self, token: &str) -> Result<()> {
        self.process.stop(START).await?;
        let file = self.dir.join("token");
        write_secret(&file, &format!("{token}\n"))?;
        let mut arguments = self.arguments.clone();
        arguments.extend(["--token-file".into(), file.display().to_string()]);
        self.process = Self::spawn(&self.dir, &self.cluster, &arguments, &self.variables)?;
        Ok(())
    }

    /// Waits until it holds a carrier.
    pub async fn connected(&self) -> Result<()> {
        // Not /readyz: that is about the API server, too, which is not there in some stories.
        let connected = || async {
            let relays = Metrics::of(self.admin)
                .await?
                .sum("throwline_agent_relays", &[]);
            ensure!(relays >= 1.0, "no carrier yet");
            Ok(())
        };
        self.process
            .until(START, "the agent is connected", connected)
            .await
    }

    /// The audit events so far.
    pub fn audit_events(&self) -> Result<Vec<serde_json::Value>> {
        let text = std::fs::read_to_string(&self.audit).unwrap_or_default();
        text.lines()
            .map(|line| {
                serde_json::from_str(line).with_context(|| format!("not one event a line: {line}"))
            })
            .collect()
    }
}

/// A signed-in user: a state directory.
pub struct User {
    pub name: String,
    pub state: PathBuf,
    dir: PathBuf,
    variables: Variables,
}

impl User {
    pub async fn login(dir: &Path, name: &str, token: &str, arguments: &[&str]) -> Result<Self> {
        let this = Self::nobody(dir, name)?;
        let output = this.sign_in(token, arguments).await?;
        ensure!(output.status.success(), "login failed: {}", said(&output));
        Ok(this)
    }

    /// `throwline login`, with either result.
    pub async fn sign_in(&self, token: &str, arguments: &[&str]) -> Result<std::process::Output> {
        let token_file = self.dir.join("token");
        write_secret(&token_file, token)?;
        let file = token_file.display().to_string();
        self.run(&[&["login", "--token-file", &file], arguments].concat())
            .await
    }

    /// The same user with these variables in the environment of all commands.
    pub fn within(mut self, variables: &[(&str, &str)]) -> Self {
        self.variables = owned(variables);
        self
    }

    /// A user who never signed in.
    pub fn nobody(dir: &Path, name: &str) -> Result<Self> {
        let dir = dir.join(format!("user-{name}"));
        std::fs::create_dir_all(&dir)?;
        Ok(Self {
            name: name.to_owned(),
            state: dir.join("state"),
            dir,
            variables: Variables::new(),
        })
    }

    /// The binary with this user's state directory.
    pub fn command(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = throwline(&self.dir.join("home"))?;
        command
            .args(arguments)
            .envs(self.variables.iter().cloned())
            .env("THROWLINE_STATE_DIR", &self.state);
        Ok(command)
    }

    /// Runs a command to its end; 60 s at most.
    pub async fn run(&self, arguments: &[&str]) -> Result<std::process::Output> {
        let limit = Duration::from_secs(60);
        let output = tokio::time::timeout(limit, self.command(arguments)?.output()).await;
        Ok(output.with_context(|| format!("throwline {arguments:?} did not end"))??)
    }

    pub async fn clusters(&self) -> Result<serde_json::Value> {
        let output = self.run(&["clusters", "-o", "json"]).await?;
        ensure!(
            output.status.success(),
            "clusters failed: {}",
            said(&output)
        );
        Ok(serde_json::from_slice(&output.stdout)?)
    }
}

/// Both streams of a command that has ended.
pub fn said(output: &std::process::Output) -> String {
    format!(
        "{}\n{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// A local proxy of the real binary.
pub struct Proxy {
    pub process: Process,
    pub kubeconfig: PathBuf,
    pub admin: SocketAddr,
    dir: PathBuf,
    arguments: Vec<String>,
    variables: Variables,
    clusters: Vec<String>,
}

impl Proxy {
    /// Forwards these clusters, and waits until kubeconfig holds their contexts.
    pub async fn start(user: &User, clusters: &[&str], arguments: &[&str]) -> Result<Self> {
        let kubeconfig = user.dir.join("kubeconfig");
        let admin = free_address()?;
        let port = free_address()?.port();
        let mut all: Vec<String> = vec!["proxy".into()];
        all.extend(clusters.iter().map(|cluster| (*cluster).to_owned()));
        for (flag, value) in [
            ("--port", port.to_string()),
            ("--kubeconfig", kubeconfig.display().to_string()),
            ("--admin-listen", admin.to_string()),
            ("--state-dir", user.state.display().to_string()),
        ] {
            all.extend([flag.to_owned(), value]);
        }
        all.extend(arguments.iter().map(|argument| (*argument).to_owned()));
        let variables = user.variables.clone();
        let process = Self::spawn(&user.dir, &all, &variables)?;
        let clusters = clusters
            .iter()
            .map(|cluster| (*cluster).to_owned())
            .collect();
        let dir = user.dir.clone();
        let this = Self {
            process,
            kubeconfig,
            admin,
            dir,
            arguments: all,
            variables,
            clusters,
        };
        this.ready().await?;
        Ok(this)
    }

    fn spawn(dir: &Path, arguments: &[String], variables: &Variables) -> Result<Process> {
        let mut command = throwline(&dir.join("home"))?;
        command.args(arguments).envs(variables.iter().cloned());
        Process::start("proxy", dir, command)
    }

    async fn ready(&self) -> Result<()> {
        let written = || async {
            let text = std::fs::read_to_string(&self.kubeconfig)?;
            for cluster in &self.clusters {
                crate::contains(&text, &format!("throwline-{cluster}"))?;
            }
            metrics::ready(self.admin).await
        };
        self.process
            .until(START, "the local proxy has written kubeconfig", written)
            .await
    }

    pub async fn restart(&mut self) -> Result<()> {
        self.process = Self::spawn(&self.dir, &self.arguments, &self.variables)?;
        self.ready().await
    }

    pub async fn metrics(&self) -> Result<Metrics> {
        Metrics::of(self.admin).await
    }
}

/// What an environment is made with.
#[derive(Debug, Default)]
pub struct Builder {
    relay_arguments: Vec<String>,
    agent_arguments: Vec<String>,
    proxy_arguments: Vec<String>,
    kubeconfig: Option<PathBuf>,
    lossy_sockets: Option<usize>,
    has_links: bool,
}

impl Builder {
    /// The agent and the local proxy each reach the relay by a [`Link`].
    pub fn by_links(mut self) -> Self {
        self.has_links = true;
        self
    }

    /// A demo cluster loses output as a real one does: see its `lossy_sockets`.
    pub fn lossy_sockets(mut self, bytes: usize) -> Self {
        self.lossy_sockets = Some(bytes);
        self
    }

    pub fn agent_arguments(mut self, arguments: &[&str]) -> Self {
        let arguments = arguments.iter().map(|argument| (*argument).to_owned());
        self.agent_arguments = arguments.collect();
        self
    }

    pub fn proxy_arguments(mut self, arguments: &[&str]) -> Self {
        let arguments = arguments.iter().map(|argument| (*argument).to_owned());
        self.proxy_arguments = arguments.collect();
        self
    }

    pub fn relay_arguments(mut self, arguments: &[&str]) -> Self {
        self.relay_arguments = arguments
            .iter()
            .map(|argument| (*argument).to_owned())
            .collect();
        self
    }

    /// An agent that reaches this instead of the environment's cluster.
    pub fn agent_kubeconfig(mut self, file: &Path) -> Self {
        self.kubeconfig = Some(file.to_owned());
        self
    }

    pub async fn start(self) -> Result<Environment> {
        let dir = private_dir()?;
        let upstream = Arc::new(match self.lossy_sockets {
            Some(bytes) => Upstream::lossy(dir.path(), bytes).await?,
            None => Upstream::start(dir.path()).await?,
        });
        let arguments: Vec<&str> = self.relay_arguments.iter().map(String::as_str).collect();
        let relay = Relay::start(dir.path(), &arguments).await?;
        let links = match self.has_links {
            true => vec![
                Link::start(relay.listen).await?,
                Link::start(relay.listen).await?,
            ],
            false => Vec::new(),
        };
        let urls: Vec<String> = links.iter().map(Link::url).collect();
        let by = |number: usize| -> Vec<&str> {
            let url = urls.get(number).map(|url| ["--proxy", url]);
            url.into_iter().flatten().collect()
        };
        let kubeconfig = self
            .kubeconfig
            .as_deref()
            .unwrap_or(upstream.kubeconfig())
            .to_owned();
        let token = relay.token(&["--cluster", CLUSTER]).await?;
        let mut arguments: Vec<&str> = self.agent_arguments.iter().map(String::as_str).collect();
        arguments.extend(by(0));
        let agent = Agent::start(dir.path(), CLUSTER, &token, &kubeconfig, &arguments).await?;
        agent.connected().await?;
        let token = relay
            .token(&["--user", USER, "--group", upstream.group()])
            .await?;
        let user = User::login(dir.path(), USER, &token, &[]).await?;
        let mut arguments: Vec<&str> = self.proxy_arguments.iter().map(String::as_str).collect();
        arguments.extend(by(1));
        let proxy = Proxy::start(&user, &[CLUSTER], &arguments).await?;
        let namespace = upstream.namespace("throwline-e2e-").await?;
        Ok(Environment {
            relay,
            agent,
            user,
            proxy,
            upstream,
            namespace,
            links,
            dir,
        })
    }
}

/// The cluster and the user of an ordinary environment.
pub const CLUSTER: &str = "alpha";
pub const USER: &str = "dana";

/// Relay, one agent, one user with a local proxy, and a namespace of their own.
pub struct Environment {
    // Dropped in this order: clients first.
    pub proxy: Proxy,
    pub agent: Agent,
    pub relay: Relay,
    pub user: User,
    pub upstream: Arc<Upstream>,
    pub namespace: String,
    /// The agent's and the local proxy's, where they were asked for.
    pub links: Vec<Link>,
    dir: tempfile::TempDir,
}

impl Environment {
    pub async fn start() -> Result<Self> {
        Builder::default().start().await
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// kubectl through the line, in the environment's namespace.
    pub fn kubectl(&self, version: &Version) -> Kubectl {
        Kubectl::new(version, &self.proxy.kubeconfig, self.dir.path())
            .context(&format!("throwline-{CLUSTER}"))
            .namespace(&self.namespace)
    }

    /// The newest kubectl through the line.
    pub fn newest(&self) -> Result<Kubectl> {
        Ok(self.kubectl(&tools::newest_kubectl()?))
    }

    /// All that is ours, for what is measured of each.
    pub fn processes(&self) -> [&Process; 3] {
        [
            &self.proxy.process,
            &self.relay.process,
            &self.agent.process,
        ]
    }
}

impl Fixture for Environment {
    fn diagnostics(&self) -> String {
        let mut text = String::new();
        for process in self.processes() {
            text.push_str(&tail(process.name(), &process.log()));
        }
        text
    }

    fn close(&self) -> BoxFuture<'_, Result<()>> {
        async { self.upstream.clean().await }.boxed()
    }
}

/// The end of a log under its name.
pub fn tail(name: &str, log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    let from = lines.len().saturating_sub(60);
    format!(
        "---- log of {name}, last lines\n{}\n",
        lines[from..].join("\n")
    )
}

/// A file with a token or a key, as the binary wants it: for its owner alone.
pub fn write_secret(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text)?;
    Ok(std::fs::set_permissions(
        path,
        std::fs::Permissions::from_mode(0o600),
    )?)
}

/// A directory that goes when it is dropped. `THROWLINE_E2E_KEEP` keeps it, for a look.
pub fn private_dir() -> Result<tempfile::TempDir> {
    let mut dir = tempfile::Builder::new()
        .prefix("throwline-e2e-")
        .permissions(std::fs::Permissions::from_mode(0o700))
        .tempdir()?;
    if std::env::var_os("THROWLINE_E2E_KEEP").is_some() {
        dir.disable_cleanup(true);
        eprintln!("kept: {}", dir.path().display());
    }
    Ok(dir)
}

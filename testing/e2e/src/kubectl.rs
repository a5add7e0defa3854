//! Real kubectl, with a deadline and everything shown when it does not do as expected.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

/// One of the versions of kubectl that stories use.
#[derive(Debug, Clone)]
pub struct Version {
    /// As `1.20`.
    pub label: String,
    pub path: PathBuf,
    pub minor: u32,
}

/// What carries an upgraded request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    Spdy,
    WebSocket,
}

impl Version {
    /// The transports that this version can be set to for exec and port-forward.
    pub fn transports(&self) -> Vec<Transport> {
        // 1.29 knows the variables as alpha; from 1.31 both default to WebSocket.
        if self.minor >= 30 {
            vec![Transport::WebSocket, Transport::Spdy]
        } else {
            vec![Transport::Spdy]
        }
    }
}

/// A kubectl of one version with one kubeconfig.
#[derive(Debug, Clone)]
pub struct Kubectl {
    pub version: Version,
    kubeconfig: PathBuf,
    context: Option<String>,
    namespace: Option<String>,
    home: PathBuf,
    env: Vec<(String, String)>,
    limit: Duration,
}

/// How a kubectl ended.
#[derive(Debug, Clone)]
pub struct Output {
    /// None: it was killed by a signal.
    pub code: Option<i32>,
    pub stdout: Vec<u8>,
    pub stderr: String,
    pub took: Duration,
}

impl Output {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

impl Kubectl {
    /// `home` holds kubectl's discovery cache; it must be private to the cluster.
    pub fn new(version: &Version, kubeconfig: &Path, home: &Path) -> Self {
        Self {
            version: version.clone(),
            kubeconfig: kubeconfig.to_owned(),
            context: None,
            namespace: None,
            home: home.join(format!("kubectl-{}", version.label)),
            env: Vec::new(),
            limit: Duration::from_secs(60),
        }
    }

    pub fn context(mut self, name: &str) -> Self {
        self.context = Some(name.to_owned());
        self
    }

    pub fn namespace(mut self, name: &str) -> Self {
        self.namespace = Some(name.to_owned());
        self
    }

    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// How long a call may take. Default: 60 s.
    pub fn within(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Exec, attach, cp and port-forward over this transport.
    pub fn over(self, transport: Transport) -> Self {
        if self.version.minor < 30 {
            return self;
        }
        let value = if transport == Transport::WebSocket {
            "true"
        } else {
            "false"
        };
        self.env("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", value)
            .env("KUBECTL_PORT_FORWARD_WEBSOCKETS", value)
    }

    /// The command itself, for stories that hold it while it runs.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.version.path);
        command.arg("--kubeconfig").arg(&self.kubeconfig);
        if let Some(context) = &self.context {
            command.args(["--context", context]);
        }
        if let Some(namespace) = &self.namespace {
            command.args(["--namespace", namespace]);
        }
        command
            .args(arguments)
            .env("HOME", &self.home)
            .env("TERM", "xterm")
            .env_remove("KUBECONFIG")
            .env_remove("http_proxy")
            .env_remove("https_proxy")
            .env_remove("HTTP_PROXY")
            .env_remove("HTTPS_PROXY")
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        command
    }

    /// Runs it to its end, whatever that is.
    pub async fn run(&self, arguments: &[&str]) -> Result<Output> {
        self.feed(arguments, &[]).await
    }

    /// The same with bytes on standard input (none: closed at once).
    pub async fn feed(&self, arguments: &[&str], input: &[u8]) -> Result<Output> {
        std::fs::create_dir_all(&self.home)?;
        let mut command = self.command(arguments);
        if !input.is_empty() {
            command.stdin(Stdio::piped());
        }
        let start = Instant::now();
        let mut child = command
            .spawn()
            .with_context(|| format!("could not start {}", self.version.path.display()))?;
        let stdin = child.stdin.take();
        let write = async {
            if let Some(mut stdin) = stdin {
                // A kubectl that ends early closes its input; its own status tells why.
                let _ = stdin.write_all(input).await;
                let _ = stdin.shutdown().await;
            }
        };
        let both = async { tokio::join!(write, child.wait_with_output()).1 };
        let output = match tokio::time::timeout(self.limit, both).await {
            Ok(output) => output?,
            Err(_) => bail!(
                "{} did not end within {:?}",
                self.shown(arguments),
                self.limit
            ),
        };
        Ok(Output {
            code: output.status.code(),
            stdout: output.stdout,
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
            took: start.elapsed(),
        })
    }

    /// Runs it; anything but success is an error that shows all its output.
    pub async fn ok(&self, arguments: &[&str]) -> Result<String> {
        self.ok_with(arguments, &[]).await
    }

    pub async fn ok_with(&self, arguments: &[&str], input: &[u8]) -> Result<String> {
        let output = self.feed(arguments, input).await?;
        if output.code != Some(0) {
            bail!(
                "{} ended with {:?} after {:?}\nstdout: {}\nstderr: {}",
                self.shown(arguments),
                output.code,
                output.took,
                shortened(&output.text()),
                shortened(&output.stderr),
            );
        }
        Ok(output.text())
    }

    /// Runs it; it must fail by its own exit code.
    pub async fn fails(&self, arguments: &[&str]) -> Result<Output> {
        let output = self.run(arguments).await?;
        match output.code {
            Some(code) if code != 0 => Ok(output),
            code => bail!(
                "{} should have failed and ended with {code:?}\nstdout: {}\nstderr: {}",
                self.shown(arguments),
                shortened(&output.text()),
                shortened(&output.stderr),
            ),
        }
    }

    /// The answer as JSON.
    pub async fn json(&self, arguments: &[&str]) -> Result<serde_json::Value> {
        let text = self.ok(&[arguments, &["-o", "json"]].concat()).await?;
        serde_json::from_str(&text).with_context(|| format!("not JSON: {}", shortened(&text)))
    }

    /// Creates or replaces an object of text.
    pub async fn apply(&self, manifest: &str) -> Result<String> {
        self.ok_with(&["apply", "-f", "-"], manifest.as_bytes())
            .await
    }

    fn shown(&self, arguments: &[&str]) -> String {
        format!("kubectl {} {}", self.version.label, arguments.join(" "))
    }
}

fn shortened(text: &str) -> &str {
    match text.char_indices().nth(4000) {
        Some((end, _)) => &text[..end],
        None => text,
    }
}

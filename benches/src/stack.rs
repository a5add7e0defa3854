//! The processes of one measurement: the upstream, and the product as a person would run it.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use crate::client::Target;
use crate::upstream::Address;

/// How long a part may take to start, on a machine that does something else too.
const START: Duration = Duration::from_secs(60);

/// Everything that runs; dropping it stops all of it.
pub(crate) struct Stack {
    pub(crate) direct: Target,
    pub(crate) through: Target,
    /// By a local proxy whose lines end with their carrier.
    pub(crate) unkept: Target,
    parts: Vec<(&'static str, Child)>,
    _dir: tempfile::TempDir,
}

impl Stack {
    pub(crate) async fn start(throwline: &Path) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("throwline-bench-")
            .tempdir()?;
        let at = |name: &str| dir.path().join(name);
        let mut parts = Vec::new();

        let mut upstream = Command::new(std::env::current_exe()?)
            .arg("upstream")
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("cannot start the upstream")?;
        let line = first_line(&mut upstream)
            .await
            .context("the upstream did not start")?;
        let address: Address = serde_json::from_str(&line)?;
        parts.push(("upstream", upstream));

        let upstream_kubeconfig = at("upstream.kubeconfig");
        std::fs::write(at("upstream-ca.pem"), &address.ca_pem)?;
        std::fs::write(
            &upstream_kubeconfig,
            format!(
                "apiVersion: v1\nkind: Config\ncurrent-context: bench\n\
                 clusters: [{{name: bench, cluster: {{server: 'https://{}', certificate-authority: '{}'}}}}]\n\
                 users: [{{name: bench, user: {{token: bench}}}}]\n\
                 contexts: [{{name: bench, context: {{cluster: bench, user: bench}}}}]\n",
                address.addr,
                at("upstream-ca.pem").display()
            ),
        )?;

        let relay_port = free_port()?;
        let run = |log: &str, args: &[&str]| -> anyhow::Result<Child> {
            let log = std::fs::File::create(at(log))?;
            Command::new(throwline)
                .args(args)
                .stdin(Stdio::null())
                .stdout(log.try_clone()?)
                .stderr(log)
                .kill_on_drop(true)
                .spawn()
                .with_context(|| format!("cannot run {}", throwline.display()))
        };
        let relay_state = at("relay").display().to_string();
        let listen = format!("127.0.0.1:{relay_port}");
        let public_url = format!("https://{listen}");
        parts.push((
            "relay",
            run(
                "relay.log",
                &[
                    "relay",
                    "--listen",
                    &listen,
                    "--public-url",
                    &public_url,
                    "--state-dir",
                    &relay_state,
                ],
            )?,
        ));
        wait_for("the relay", || async {
            tokio::net::TcpStream::connect(&listen).await.is_ok()
        })
        .await?;

        let token = |subject: [String; 2], file: PathBuf| {
            let relay_state = relay_state.clone();
            async move {
                let made = Command::new(throwline)
                    .args([
                        "token",
                        "create",
                        &subject[0],
                        &subject[1],
                        "--state-dir",
                        &relay_state,
                    ])
                    .output()
                    .await?;
                ensure!(
                    made.status.success(),
                    "token create failed: {}",
                    String::from_utf8_lossy(&made.stderr)
                );
                std::fs::write(&file, made.stdout)?;
                anyhow::Ok(file.display().to_string())
            }
        };
        let agent_token = token(["--cluster".into(), "bench".into()], at("agent.token")).await?;
        let agent_state = at("agent").display().to_string();
        let kubeconfig = upstream_kubeconfig.display().to_string();
        parts.push((
            "agent",
            run(
                "agent.log",
                &[
                    "agent",
                    "--token-file",
                    &agent_token,
                    "--state-dir",
                    &agent_state,
                    "--kubeconfig",
                    &kubeconfig,
                    "--audit-log",
                    "off",
                ],
            )?,
        ));

        let user_token = token(["--user".into(), "bench".into()], at("user.token")).await?;
        let user_state = at("user").display().to_string();
        let login = Command::new(throwline)
            .args([
                "login",
                "--token-file",
                &user_token,
                "--state-dir",
                &user_state,
            ])
            .output()
            .await?;
        ensure!(
            login.status.success(),
            "login failed: {}",
            String::from_utf8_lossy(&login.stderr)
        );
        wait_for("the agent", || async {
            let clusters = Command::new(throwline)
                .args(["clusters", "-o", "json", "--state-dir", &user_state])
                .output()
                .await;
            clusters.is_ok_and(|out| {
                String::from_utf8_lossy(&out.stdout)
                    .replace(' ', "")
                    .contains("\"connected\":true")
            })
        })
        .await
        .with_context(|| logs(dir.path()))?;

        let mut ways = Vec::new();
        for (name, detached) in [("local proxy", "120s"), ("local proxy, unkept", "0s")] {
            let file = at(&format!("{detached}.kubeconfig"));
            let kubeconfig = file.display().to_string();
            let port = free_port()?.to_string();
            let arguments = [
                "proxy",
                "bench",
                "--state-dir",
                &user_state,
                "--kubeconfig",
                &kubeconfig,
                "--port",
                &port,
                "--detached-life",
                detached,
            ];
            parts.push((name, run(&format!("proxy-{detached}.log"), &arguments)?));
            wait_for("the local proxy", || async { file.exists() })
                .await
                .with_context(|| logs(dir.path()))?;
            ways.push(through(&file)?);
        }
        let [through, unkept]: [Target; 2] = ways
            .try_into()
            .map_err(|_| anyhow::anyhow!("there are two ways"))?;

        let direct = Target::new("direct", address.addr, "", address.ca_pem.as_bytes(), None)?;
        let stack = Self {
            direct,
            through,
            unkept,
            parts,
            _dir: dir,
        };
        for way in [&stack.through, &stack.unkept] {
            wait_for("a first answer through the line", || async {
                match way.connect().await {
                    Ok(mut connection) => connection.get(1).await.is_ok(),
                    Err(_) => false,
                }
            })
            .await?;
        }
        Ok(stack)
    }

    /// CPU seconds (user and system) that the product's processes have used so far.
    pub(crate) fn cpu_seconds(&self) -> f64 {
        self.product().filter_map(|(_, pid)| cpu_seconds(pid)).sum()
    }

    /// The most resident memory each of the product's processes has had, in MiB.
    pub(crate) fn peak_resident_mib(&self) -> Vec<(&'static str, f64)> {
        self.product()
            .filter_map(|(name, pid)| Some((name, peak_resident_kib(pid)? / 1024.0)))
            .collect()
    }

    fn product(&self) -> impl Iterator<Item = (&'static str, u32)> {
        self.parts
            .iter()
            .filter(|(name, _)| *name != "upstream")
            .filter_map(|(name, child)| Some((*name, child.id()?)))
    }
}

/// The way through the line, as the kubeconfig that the local proxy wrote says it.
fn through(kubeconfig: &Path) -> anyhow::Result<Target> {
    let text = std::fs::read_to_string(kubeconfig)?;
    let field = |name: &str| {
        text.lines()
            .find_map(|line| {
                line.trim()
                    .trim_start_matches("- ")
                    .strip_prefix(name)?
                    .strip_prefix(':')
            })
            .map(|value| value.trim().trim_matches(['"', '\'']).to_owned())
            .with_context(|| format!("the kubeconfig has no {name}"))
    };
    let server = field("server")?;
    let rest = server
        .strip_prefix("https://")
        .context("the server is not https")?;
    let (authority, path) = rest.split_once('/').context("the server has no path")?;
    let ca = std::fs::read(field("certificate-authority")?)?;
    let (cert, key) = (
        PathBuf::from(field("client-certificate")?),
        PathBuf::from(field("client-key")?),
    );
    Target::new(
        "through the line",
        authority.parse()?,
        &format!("/{path}"),
        &ca,
        Some((&cert, &key)),
    )
}

async fn first_line(child: &mut Child) -> anyhow::Result<String> {
    let stdout = child.stdout.take().context("no standard output")?;
    let line = tokio::time::timeout(START, BufReader::new(stdout).lines().next_line()).await??;
    line.context("it ended at once")
}

async fn wait_for<F: Future<Output = bool>>(
    what: &str,
    mut ready: impl FnMut() -> F,
) -> anyhow::Result<()> {
    let deadline = tokio::time::Instant::now() + START;
    while !ready().await {
        if tokio::time::Instant::now() > deadline {
            bail!("{what} did not come up within {} s", START.as_secs());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

fn logs(dir: &Path) -> String {
    ["relay.log", "agent.log", "proxy.log"]
        .iter()
        .map(|name| {
            format!(
                "--- {name}\n{}",
                std::fs::read_to_string(dir.join(name)).unwrap_or_default()
            )
        })
        .collect()
}

fn free_port() -> anyhow::Result<u16> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?
        .local_addr()?
        .port())
}

/// From /proc/PID/stat: utime and stime, in ticks of 10 ms.
fn cpu_seconds(pid: u32) -> Option<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    Some((fields.get(11)?.parse::<f64>().ok()? + fields.get(12)?.parse::<f64>().ok()?) / 100.0)
}

fn peak_resident_kib(pid: u32) -> Option<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?
        .split_whitespace()
        .next()?
        .parse()
        .ok()
}

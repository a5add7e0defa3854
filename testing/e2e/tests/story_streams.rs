//! exec, attach, cp and port-forward, over WebSocket and SPDY where kubectl speaks both.

use std::process::{ExitCode, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use futures::future::try_join_all;
use throwline_e2e::kubectl::Transport;
use throwline_e2e::pod::{self, FileServer, Pod};
use throwline_e2e::process::Process;
use throwline_e2e::pty::Pty;
use throwline_e2e::{
    Environment, Kubectl, Suite, Version, contains, eventually, free_address, tools, unique,
};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};

fn main() -> ExitCode {
    Suite::new()
        .each(
            "exec_output_input_and_exit_code",
            exec_output_input_and_exit_code,
        )
        .each(
            "exec_in_a_terminal_with_a_resize",
            exec_in_a_terminal_with_a_resize,
        )
        .each(
            "attach_sees_what_the_process_prints",
            attach_sees_what_the_process_prints,
        )
        .each("cp_both_ways", cp_both_ways)
        .each("port_forward_both_ways", port_forward_both_ways)
        .story(
            "exec_without_reading_or_writing_ends",
            exec_without_reading_or_writing_ends,
        )
        .story("a_failed_exec_says_why", a_failed_exec_says_why)
        .alone(
            "cp_100_mb_both_ways_on_each_transport",
            Duration::from_secs(400),
            cp_100_mb,
        )
        .alone(
            "port_forward_with_200_connections",
            Duration::from_secs(240),
            two_hundred_connections,
        )
        .alone(
            "port_forward_downloads_256_mb",
            Duration::from_secs(300),
            download_256_mb,
        )
        .run(Environment::start)
}

/// Runs a story's body for each transport of this kubectl.
async fn each_transport<F, Fut>(env: &Environment, version: &Version, body: F) -> Result<()>
where
    F: Fn(Kubectl) -> Fut,
    Fut: Future<Output = Result<()>>,
{
    for transport in version.transports() {
        let kubectl = env.kubectl(version).over(transport);
        body(kubectl)
            .await
            .with_context(|| format!("{} over {transport:?}", version.label))?;
    }
    Ok(())
}

async fn idle_pod(env: &Environment) -> Result<Pod> {
    Pod::start(&env.upstream, &env.namespace, pod::IDLE).await
}

async fn exec_output_input_and_exit_code(env: Arc<Environment>, version: Version) -> Result<()> {
    let pod = idle_pod(&env).await?;
    each_transport(&env, &version, |kubectl| {
        let pod = &pod.name;
        async move {
            let both = kubectl
                .run(&["exec", pod, "--", "sh", "-c", "echo out; echo err >&2"])
                .await?;
            ensure!(both.code == Some(0), "{both:?}");
            ensure!(both.text() == "out\n", "{both:?}");
            contains(&both.stderr, "err")?;
            let script = "sum=$(wc -c); echo \"got $sum\" | tr -s ' '; exit 42";
            let input = vec![b'z'; 3 * 1024 * 1024 + 17];
            let fed = kubectl
                .feed(&["exec", "-i", pod, "--", "sh", "-c", script], &input)
                .await?;
            ensure!(fed.code == Some(42), "{fed:?}");
            ensure!(
                fed.text().trim() == format!("got {}", input.len()),
                "{fed:?}"
            );
            let bytes: Vec<u8> = (0..=255).cycle().take(1 << 20).collect();
            let echoed = kubectl
                .feed(&["exec", "-i", pod, "--", "cat"], &bytes)
                .await?;
            ensure!(echoed.code == Some(0), "{}", echoed.stderr);
            ensure!(
                echoed.stdout == bytes,
                "{} bytes of {} came back",
                echoed.stdout.len(),
                bytes.len()
            );
            Ok(())
        }
    })
    .await?;
    pod.remove().await
}

async fn exec_in_a_terminal_with_a_resize(env: Arc<Environment>, version: Version) -> Result<()> {
    let pod = idle_pod(&env).await?;
    each_transport(&env, &version, |kubectl| {
        let pod = &pod.name;
        async move {
            // The text that is awaited must not be in what is typed, which the terminal echoes.
            let script = "echo rea''dy; while read -r line; do case $line in size) stty size;; \
                          end) exit 7;; *) echo \"heard:$line\";; esac; done";
            let command = kubectl.command(&["exec", "-it", pod, "--", "sh", "-c", script]);
            let mut terminal = Pty::start(&command, 33, 77)?;
            terminal.shows("ready").await?;
            terminal.type_in("hello\n")?;
            terminal.shows("heard:hello").await?;
            asks_size(&mut terminal, "33 77").await?;
            terminal.resize(44, 111)?;
            asks_size(&mut terminal, "44 111").await?;
            terminal.type_in("end\n")?;
            let code = terminal.ended().await?;
            ensure!(code == Some(7), "{code:?}: {:?}", terminal.screen());
            Ok(())
        }
    })
    .await?;
    pod.remove().await
}

/// A resize travels beside the input, so the size may be asked for before it has arrived.
async fn asks_size(terminal: &mut Pty, size: &str) -> Result<()> {
    for _ in 0..40 {
        terminal.type_in("size\n")?;
        for _ in 0..10 {
            if terminal.screen().contains(size) {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
    }
    bail!("the terminal never became {size}: {:?}", terminal.screen())
}

async fn attach_sees_what_the_process_prints(
    env: Arc<Environment>,
    version: Version,
) -> Result<()> {
    let script = "i=0; while :; do echo tick $i; i=$((i+1)); sleep 0.3; done";
    let pod = Pod::start(&env.upstream, &env.namespace, script).await?;
    each_transport(&env, &version, |kubectl| {
        let pod = &pod.name;
        async move {
            let mut child = kubectl.command(&["attach", pod]).spawn()?;
            let mut lines = BufReader::new(child.stdout.take().context("no output")?).lines();
            let read = async {
                for _ in 0..3 {
                    let line = lines.next_line().await?.context("attach ended")?;
                    ensure!(line.starts_with("tick "), "{line:?}");
                }
                Ok(())
            };
            tokio::time::timeout(Duration::from_secs(20), read)
                .await
                .context("nothing came")??;
            child.kill().await?;
            Ok(())
        }
    })
    .await?;
    pod.remove().await?;
    // With standard input, to a process that reads it.
    let script = "while read -r line; do echo \"heard $line\"; [ \"$line\" = end ] && exit 0; done";
    let reader = serde_json::json!({"stdin": true, "stdinOnce": true});
    let transports = version.transports();
    for transport in transports {
        let pod = Pod::start_with(&env.upstream, &env.namespace, script, reader.clone()).await?;
        let kubectl = env.kubectl(&version).over(transport);
        let attached = kubectl
            .feed(&["attach", "-i", &pod.name], b"one\nend\n")
            .await?;
        contains(&attached.text(), "heard one")
            .with_context(|| format!("{transport:?}: {}", attached.stderr))?;
        pod.remove().await?;
    }
    Ok(())
}

/// Random bytes in a file, and their checksum.
async fn random_file(path: &std::path::Path, mib: usize) -> Result<String> {
    let script = format!(
        "head -c {} /dev/urandom > \"$1\" && sha256sum < \"$1\"",
        mib << 20
    );
    let output = Command::new("sh")
        .args(["-c", &script, "sh"])
        .arg(path)
        .output()
        .await?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    checksum(&String::from_utf8_lossy(&output.stdout))
}

async fn file_checksum(path: &std::path::Path) -> Result<String> {
    let output = Command::new("sha256sum").arg(path).output().await?;
    checksum(&String::from_utf8_lossy(&output.stdout))
}

fn checksum(printed: &str) -> Result<String> {
    match printed.split_whitespace().next() {
        Some(sum) if sum.len() == 64 => Ok(sum.to_owned()),
        _ => bail!("no checksum in {printed:?}"),
    }
}

async fn copy_both_ways(env: &Environment, kubectl: &Kubectl, pod: &str, mib: usize) -> Result<()> {
    // An absolute path of our own: in the demo cluster pods live in this file system.
    let remote = unique("/tmp/throwline-e2e-");
    let (local, back) = (
        env.dir().join(unique("there-")),
        env.dir().join(unique("back-")),
    );
    let sum = random_file(&local, mib).await?;
    let there = format!("{pod}:{remote}");
    kubectl
        .ok(&["cp", &local.display().to_string(), &there])
        .await?;
    let arrived = kubectl
        .ok(&["exec", pod, "--", "sha256sum", &remote])
        .await?;
    ensure!(checksum(&arrived)? == sum, "the upload was changed");
    kubectl
        .ok(&["cp", &there, &back.display().to_string()])
        .await?;
    ensure!(
        file_checksum(&back).await? == sum,
        "the download was changed"
    );
    kubectl
        .ok(&["exec", pod, "--", "rm", "-f", &remote])
        .await?;
    std::fs::remove_file(&local)?;
    std::fs::remove_file(&back)?;
    Ok(())
}

async fn cp_both_ways(env: Arc<Environment>, version: Version) -> Result<()> {
    let pod = idle_pod(&env).await?;
    for transport in version.transports() {
        let kubectl = env.kubectl(&version).over(transport);
        copy_both_ways(&env, &kubectl, &pod.name, 5)
            .await
            .with_context(|| format!("{} over {transport:?}", version.label))?;
    }
    pod.remove().await
}

async fn cp_100_mb(env: Arc<Environment>) -> Result<()> {
    let pod = idle_pod(&env).await?;
    let version = tools::newest_kubectl()?;
    for transport in [Transport::WebSocket, Transport::Spdy] {
        let kubectl = env
            .kubectl(&version)
            .over(transport)
            .within(Duration::from_secs(180));
        let copied = copy_both_ways(&env, &kubectl, &pod.name, 100).await;
        copied.with_context(|| format!("over {transport:?}"))?;
    }
    pod.remove().await
}

/// A kubectl that forwards a local port.
struct Forward {
    _child: Child,
    port: u16,
}

impl Forward {
    async fn start(kubectl: &Kubectl, pod: &str, remote: u16) -> Result<Self> {
        let port = free_address()?.port();
        let ports = format!("{port}:{remote}");
        let mut command = kubectl.command(&["port-forward", "--address", "127.0.0.1", pod, &ports]);
        let mut child = command.stderr(Stdio::inherit()).spawn()?;
        let mut lines = BufReader::new(child.stdout.take().context("no output")?).lines();
        let line = tokio::time::timeout(Duration::from_secs(30), lines.next_line()).await;
        let line = line
            .context("port-forward does not listen")??
            .unwrap_or_default();
        contains(&line, "Forwarding from")?;
        // It prints a line a connection; its output must be read.
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        Ok(Self {
            _child: child,
            port,
        })
    }

    /// GET of the pod's file: the bytes behind the head.
    async fn download(&self) -> Result<Vec<u8>> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).await?;
        stream.write_all(b"GET /file HTTP/1.0\r\n\r\n").await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        let head = answer.windows(4).position(|window| window == b"\r\n\r\n");
        let head = head.with_context(|| format!("no answer in {} bytes", answer.len()))?;
        ensure!(
            answer.starts_with(b"HTTP/1.") && answer[8..].starts_with(b" 200"),
            "not 200"
        );
        Ok(answer.split_off(head + 4))
    }
}

async fn checksum_of(bytes: &[u8]) -> String {
    throwline_certs::sha256(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

async fn port_forward_both_ways(env: Arc<Environment>, version: Version) -> Result<()> {
    let FileServer {
        pod,
        port,
        file: sum,
        ..
    } = pod::file_server(&env.upstream, &env.namespace, 2).await?;
    for transport in version.transports() {
        let kubectl = env.kubectl(&version).over(transport);
        let context = || format!("{} over {transport:?}", version.label);
        let forward = Forward::start(&kubectl, &pod.name, port)
            .await
            .with_context(context)?;
        for _ in 0..3 {
            let bytes = forward.download().await.with_context(context)?;
            ensure!(
                checksum_of(&bytes).await == sum,
                "changed: {} bytes",
                bytes.len()
            );
        }
    }
    pod.remove().await
}

async fn two_hundred_connections(env: Arc<Environment>) -> Result<()> {
    let FileServer {
        pod,
        port,
        file: sum,
        ..
    } = pod::file_server(&env.upstream, &env.namespace, 1).await?;
    let version = tools::newest_kubectl()?;
    for transport in [Transport::WebSocket, Transport::Spdy] {
        let kubectl = env.kubectl(&version).over(transport);
        let forward = Forward::start(&kubectl, &pod.name, port).await?;
        let downloads = (0..200).map(|_| async {
            let bytes = forward.download().await?;
            ensure!(
                checksum_of(&bytes).await == sum,
                "changed: {} bytes",
                bytes.len()
            );
            Ok(())
        });
        try_join_all(downloads)
            .await
            .with_context(|| format!("over {transport:?}"))?;
    }
    pod.remove().await
}

async fn download_256_mb(env: Arc<Environment>) -> Result<()> {
    let FileServer {
        pod,
        port,
        file: sum,
        ..
    } = pod::file_server(&env.upstream, &env.namespace, 256).await?;
    let version = tools::newest_kubectl()?;
    for transport in [Transport::WebSocket, Transport::Spdy] {
        let forward =
            Forward::start(&env.kubectl(&version).over(transport), &pod.name, port).await?;
        let bytes = forward
            .download()
            .await
            .with_context(|| format!("over {transport:?}"))?;
        ensure!(
            checksum_of(&bytes).await == sum,
            "changed: {} bytes",
            bytes.len()
        );
    }
    pod.remove().await
}

async fn exec_without_reading_or_writing_ends(env: Arc<Environment>) -> Result<()> {
    let pod = idle_pod(&env).await?;
    let version = tools::newest_kubectl()?;
    each_transport(&env, &version, |kubectl| {
        let pod = &pod.name;
        async move {
            ensure!(kubectl.ok(&["exec", pod, "--", "true"]).await?.is_empty());
            let failed = kubectl.fails(&["exec", pod, "--", "false"]).await?;
            ensure!(failed.code == Some(1), "{failed:?}");
            Ok(())
        }
    })
    .await?;
    pod.remove().await
}

async fn a_failed_exec_says_why(env: Arc<Environment>) -> Result<()> {
    let kubectl = env.newest()?;
    let missing = kubectl
        .fails(&["exec", "there-is-none", "--", "true"])
        .await?;
    contains(&missing.stderr, "not found")?;
    let pod = idle_pod(&env).await?;
    let program = kubectl
        .fails(&["exec", &pod.name, "--", "there-is-no-such-program"])
        .await?;
    ensure!(!program.stderr.is_empty());
    let container = kubectl
        .fails(&["exec", &pod.name, "-c", "other", "--", "true"])
        .await?;
    contains(&container.stderr, "other")?;
    baseline(&env).await?;
    pod.remove().await
}

/// No stream is left of what has ended.
async fn baseline(env: &Environment) -> Result<()> {
    let processes: Vec<&Process> = env.processes().to_vec();
    for process in processes {
        process.check_running().await?;
    }
    eventually(
        Duration::from_secs(20),
        "no upgraded request is left at the relay",
        || async {
            let metrics = env.relay.metrics().await?;
            ensure!(metrics.has("throwline_relay_lines"), "{}", metrics.text());
            // The API session and the warm spares may stay.
            let lines = metrics.sum("throwline_relay_lines", &[]);
            ensure!(lines <= 4.0, "{lines} lines");
            Ok(())
        },
    )
    .await
}

//! The commands themselves: `demo`, help, exit codes, and that no secret is anywhere to be seen.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use throwline_e2e::environment::{CLUSTER, USER, private_dir, said, throwline};
use throwline_e2e::{Environment, Suite, contains, eventually, lacks, tools};
use tokio::io::{AsyncBufReadExt, BufReader};

fn main() -> ExitCode {
    Suite::new()
        .story(
            "demo_runs_a_command_and_leaves_nothing",
            demo_runs_a_command,
        )
        .story("demo_stays_until_stopped", demo_stays_until_stopped)
        .story(
            "demo_in_front_of_a_cluster_of_ones_own",
            demo_with_a_kubeconfig,
        )
        .story("help_is_written_for_a_person", help)
        .story("wrong_usage_is_exit_code_2", wrong_usage)
        .story("clusters_as_table_and_json", clusters)
        .story("no_secret_in_argv_or_logs", no_secret)
        .story("state_is_private", state_is_private)
        .run(Environment::start)
}

async fn demo(arguments: &[&str]) -> Result<std::process::Output> {
    let dir = private_dir()?;
    let mut command = throwline(&dir.path().join("home"))?;
    command
        .arg("demo")
        .args(arguments)
        .env("TMPDIR", dir.path());
    let output = tokio::time::timeout(Duration::from_secs(120), command.output()).await;
    let output = output.with_context(|| format!("demo {arguments:?} does not end"))??;
    let left: Vec<_> = std::fs::read_dir(dir.path())?
        .filter_map(|entry| entry.ok().map(|entry| entry.file_name()))
        .filter(|name| name != "home")
        .collect();
    ensure!(left.is_empty(), "demo left {left:?}: {}", said(&output));
    Ok(output)
}

async fn demo_runs_a_command(_: Arc<Environment>) -> Result<()> {
    let kubectl = tools::newest_kubectl()?.path.display().to_string();
    let output = demo(&["--", &kubectl, "get", "pods", "-A"]).await?;
    ensure!(output.status.code() == Some(0), "{}", said(&output));
    contains(&String::from_utf8_lossy(&output.stdout), "Running")?;
    let script =
        format!("{kubectl} auth whoami >&2 || exit 9; test -f \"$KUBECONFIG\" || exit 8; exit 42");
    let output = demo(&["--", "sh", "-c", &script]).await?;
    ensure!(
        output.status.code() == Some(42),
        "the status was not passed on: {}",
        said(&output)
    );
    let output = demo(&["--", "/there/is/no/such/program"]).await?;
    ensure!(
        output.status.code().is_some_and(|code| code != 0),
        "{}",
        said(&output)
    );
    Ok(())
}

async fn demo_stays_until_stopped(_: Arc<Environment>) -> Result<()> {
    let dir = private_dir()?;
    let mut command = throwline(&dir.path().join("home"))?;
    command.arg("demo").env("TMPDIR", dir.path());
    command
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped());
    let mut child = command.spawn()?;
    let mut lines = BufReader::new(child.stdout.take().context("no output")?).lines();
    let mut errors = BufReader::new(child.stderr.take().context("no errors")?).lines();
    let told = async {
        // Either stream may have the output; the kubeconfig's path is on its line.
        loop {
            let line = tokio::select! {
                Ok(Some(line)) = lines.next_line() => line,
                Ok(Some(line)) = errors.next_line() => line,
                else => anyhow::bail!("demo ended"),
            };
            if let Some((_, path)) = line.split_once("KUBECONFIG=") {
                return Ok(path.trim().to_owned());
            }
        }
    };
    let kubeconfig = tokio::time::timeout(Duration::from_secs(60), told).await;
    let kubeconfig = kubeconfig.context("demo does not say where its kubeconfig is")??;
    let kubectl = throwline_e2e::Kubectl::new(
        &tools::newest_kubectl()?,
        std::path::Path::new(&kubeconfig),
        dir.path(),
    );
    let nodes = || async { kubectl.ok(&["get", "namespaces"]).await };
    eventually(Duration::from_secs(30), "it serves", nodes).await?;
    let pid = child
        .id()
        .and_then(|id| i32::try_from(id).ok())
        .context("demo ended")?;
    let pid = rustix::process::Pid::from_raw(pid).context("a pid is not 0")?;
    rustix::process::kill_process(pid, rustix::process::Signal::INT)?;
    let ended = tokio::time::timeout(Duration::from_secs(30), child.wait()).await;
    ended.context("demo does not stop on Ctrl-C")??;
    ensure!(
        !std::path::Path::new(&kubeconfig).exists(),
        "{kubeconfig} was left"
    );
    Ok(())
}

async fn demo_with_a_kubeconfig(env: Arc<Environment>) -> Result<()> {
    let kubectl = tools::newest_kubectl()?.path.display().to_string();
    let kubeconfig = env.upstream.kubeconfig().display().to_string();
    let group = env.upstream.group();
    let flags = [
        "--kubeconfig",
        &kubeconfig,
        "--user",
        "erin",
        "--group",
        group,
        "--",
    ];
    let whoami = [kubectl.as_str(), "auth", "whoami", "-o", "json"];
    let output = demo(&[&flags[..], &whoami].concat()).await?;
    ensure!(output.status.code() == Some(0), "{}", said(&output));
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    ensure!(
        answer["status"]["userInfo"]["username"] == "erin",
        "{answer}"
    );
    contains(&answer.to_string(), group)?;
    // The kubeconfig's own user: where it is in system:masters, without that group, with a message.
    let admin = env.upstream.admin()?.json(&["auth", "whoami"]).await?;
    let is_master = admin["status"]["userInfo"]["groups"]
        .as_array()
        .is_some_and(|groups| groups.iter().any(|group| group == "system:masters"));
    let output = demo(&[
        "--kubeconfig",
        &kubeconfig,
        "--",
        &kubectl,
        "auth",
        "whoami",
        "-o",
        "json",
    ])
    .await?;
    if is_master {
        contains(&said(&output), "system:masters")?;
    }
    if output.status.success() {
        let answer: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        lacks(&answer.to_string(), "system:masters")?;
    }
    Ok(())
}

async fn help(env: Arc<Environment>) -> Result<()> {
    for command in [
        "demo", "relay", "token", "agent", "login", "clusters", "proxy",
    ] {
        let output = env.user.run(&[command, "--help"]).await?;
        ensure!(output.status.code() == Some(0), "{}", said(&output));
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(text.lines().count() > 5, "{command}: {text}");
        contains(&text, "Usage: throwline")?;
    }
    let output = env.user.run(&["--version"]).await?;
    contains(&said(&output), "throwline ")
}

async fn wrong_usage(env: Arc<Environment>) -> Result<()> {
    for arguments in [
        &[][..],
        &["no-such-command"],
        &["proxy", "--no-such-flag"],
        &["relay"],
        &["token", "create", "--state-dir", "x"],
        &["agent", "--token-file"],
        &["clusters", "-o", "xml"],
        &["login"],
    ] {
        let output = env.user.run(arguments).await?;
        ensure!(
            output.status.code() == Some(2),
            "{arguments:?}: {}",
            said(&output)
        );
        ensure!(!output.stderr.is_empty(), "{arguments:?} says nothing");
    }
    // Well-formed, and impossible.
    let output = env
        .user
        .run(&["login", "--token-file", "/there/is/no/such/file"])
        .await?;
    ensure!(output.status.code() == Some(1), "{}", said(&output));
    contains(&said(&output), "/there/is/no/such/file")
}

async fn clusters(env: Arc<Environment>) -> Result<()> {
    let listed = || async {
        let clusters = env.user.clusters().await?;
        let entry = clusters
            .as_array()
            .and_then(|all| all.iter().find(|entry| entry["name"] == CLUSTER));
        let entry = entry.with_context(|| format!("{clusters}"))?;
        ensure!(entry["connected"] == true, "{entry}");
        ensure!(
            entry["kubernetesVersion"]
                .as_str()
                .is_some_and(|text| text.starts_with("v1.")),
            "{entry}"
        );
        ensure!(
            entry["agentVersion"]
                .as_str()
                .is_some_and(|text| !text.is_empty()),
            "{entry}"
        );
        ensure!(
            entry["roundTripMicros"]
                .as_u64()
                .is_some_and(|micros| micros > 0),
            "{entry}"
        );
        Ok(())
    };
    eventually(
        Duration::from_secs(30),
        "the cluster is listed whole",
        listed,
    )
    .await?;
    let table = env.user.run(&["clusters"]).await?;
    let table = String::from_utf8_lossy(&table.stdout).into_owned();
    contains(&table, "NAME")?;
    contains(&table, CLUSTER)?;
    contains(&table, "connected")
}

async fn no_secret(env: Arc<Environment>) -> Result<()> {
    let token = env.relay.token(&["--user", "quiet"]).await?;
    ensure!(token.starts_with("tl1."), "{token}");
    throwline_e2e::User::login(env.dir(), "quiet", &token, &[]).await?;
    env.newest()?.ok(&["get", "namespaces"]).await?;
    let secrets = [token.as_str(), "tl1.", "PRIVATE KEY", "Bearer ey"];
    for process in env.processes() {
        let arguments = std::fs::read(format!("/proc/{}/cmdline", process.pid()))?;
        let arguments = String::from_utf8_lossy(&arguments).replace('\0', " ");
        for secret in secrets {
            lacks(&arguments, secret).with_context(|| process.name().to_owned())?;
            lacks(&process.log(), secret).with_context(|| process.name().to_owned())?;
        }
    }
    // The administrator's token of the first start is in a file, whose path is printed.
    lacks(&env.relay.process.stdout(), "tl1.")?;
    let file = env.relay.state.join("admin.token");
    contains(&env.relay.process.log(), &file.display().to_string())?;
    contains(&std::fs::read_to_string(&file)?, "tl1.")?;
    let file = file.display().to_string();
    let admin = throwline_e2e::User::nobody(env.dir(), "the-first-admin")?;
    let output = admin.run(&["login", "--token-file", &file]).await?;
    ensure!(output.status.success(), "{}", said(&output));
    ensure!(!env.user.name.is_empty() && env.user.name == USER);
    Ok(())
}

async fn state_is_private(env: Arc<Environment>) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    for dir in [&env.user.state, &env.agent.state, &env.relay.state] {
        let mut waiting = vec![dir.clone()];
        let mut keys = 0;
        while let Some(path) = waiting.pop() {
            let metadata = std::fs::symlink_metadata(&path)?;
            let mode = metadata.permissions().mode() & 0o777;
            ensure!(mode & 0o077 == 0, "{}: {mode:o}", path.display());
            if metadata.is_dir() {
                for entry in std::fs::read_dir(&path)? {
                    waiting.push(entry?.path());
                }
                continue;
            }
            let content = std::fs::read(&path)?;
            keys += usize::from(content.windows(11).any(|window| window == b"PRIVATE KEY"));
        }
        ensure!(keys > 0, "no key in {}", dir.display());
    }
    Ok(())
}

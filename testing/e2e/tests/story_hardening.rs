//! Against other users of the same machine, web pages, and outputs that stand still.

use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use throwline_authority::Authority;
use throwline_e2e::environment::{CLUSTER, USER, private_dir, said, throwline, write_secret};
use throwline_e2e::malicious_relay::{Attack, MaliciousRelay};
use throwline_e2e::{
    Agent, Environment, Process, Relay, Suite, User, contains, eventually, free_address, lacks,
    metrics, tools,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

fn main() -> ExitCode {
    Suite::new()
        .story("what_others_could_have_changed_is_refused", exposed_state)
        .story("tokens_that_others_can_read_are_refused", exposed_tokens)
        .story(
            "a_relay_is_drained_by_its_token_alone",
            drained_by_its_token,
        )
        .story("held_admin_connections_keep_no_probe_out", held_admin)
        .story("a_crash_leaves_no_core_dump", no_core_dump)
        .story("the_demos_directory_is_private", private_demo)
        .story(
            "a_database_in_the_clear_is_warned_of",
            database_in_the_clear,
        )
        .story("a_required_audit_that_fails_refuses", failing_audit)
        .story("ten_thousand_clusters_are_listed_and_let_go", ten_thousand)
        .run(Environment::start)
}

fn mode(path: &Path, mode: u32) -> Result<()> {
    Ok(std::fs::set_permissions(
        path,
        std::fs::Permissions::from_mode(mode),
    )?)
}

/// Runs a command that must be refused before it does anything.
async fn refused(dir: &Path, arguments: &[&str]) -> Result<String> {
    let mut command = throwline(&dir.join("home"))?;
    command.args(arguments);
    let output = tokio::time::timeout(Duration::from_secs(60), command.output()).await;
    let output = output.with_context(|| format!("{arguments:?} was not refused"))??;
    ensure!(
        output.status.code() == Some(1),
        "{arguments:?}: {}",
        said(&output)
    );
    Ok(said(&output))
}

/// What is exposed, how, and the command that mends it: all three parts, their directories and
/// what is in them.
async fn exposed_state(env: Arc<Environment>) -> Result<()> {
    let dir = private_dir()?;
    let relay = Relay::start(dir.path(), &[]).await?;
    let token = relay.token(&["--cluster", CLUSTER]).await?;
    // Of a cluster that is there: an agent looks which one it is when it enrols.
    let kubeconfig = env.upstream.kubeconfig();
    let agent = Agent::start(dir.path(), CLUSTER, &token, kubeconfig, &[]).await?;
    agent.connected().await?;
    let token = relay.token(&["--user", USER]).await?;
    let user = User::login(dir.path(), USER, &token, &[]).await?;
    for process in [&relay.process, &agent.process] {
        process.stop(Duration::from_secs(30)).await?;
    }
    let listen = free_address()?.to_string();
    let [of_the_relay, of_the_agent, of_the_user] =
        [&relay.state, &agent.state, &user.state].map(|path| path.display().to_string());
    let kubeconfig = kubeconfig.display().to_string();
    let start_relay = [
        "relay",
        "--listen",
        &listen,
        "--public-url",
        &relay.public_url,
        "--state-dir",
        &of_the_relay,
    ];
    let make_token = [
        "token",
        "create",
        "--user",
        "x",
        "--state-dir",
        &of_the_relay,
    ];
    let start_agent = [
        "agent",
        "--state-dir",
        &of_the_agent,
        "--kubeconfig",
        &kubeconfig,
    ];
    let list = ["clusters", "--state-dir", &of_the_user];
    let forward = [
        "proxy",
        "--state-dir",
        &of_the_user,
        "--kubeconfig",
        "kubeconfig",
    ];
    /// A state directory, the commands that use it, and the private files in it.
    type Case<'a> = (&'a Path, &'a [&'a [&'a str]], &'a [&'a str]);
    let cases: [Case<'_>; 3] = [
        (
            &relay.state,
            &[&start_relay, &make_token],
            &["ca.key", "authority.db"],
        ),
        (
            &agent.state,
            &[&start_agent],
            &["identity.pem", "relay.json"],
        ),
        (&user.state, &[&list, &forward], &["identity.pem", "ca.pem"]),
    ];
    for (state, commands, files) in cases {
        for command in commands {
            mode(state, 0o777)?;
            let told = refused(dir.path(), command).await?;
            contains(&told, "mode 0777")?;
            contains(&told, &format!("chmod 700 {}", state.display()))?;
            mode(state, 0o700)?;
            for file in files {
                let file = state.join(file);
                mode(&file, 0o666)?;
                let told = refused(dir.path(), command).await?;
                contains(&told, &format!("chmod 600 {}", file.display()))?;
                mode(&file, 0o600)?;
                if rustix::process::geteuid().is_root() {
                    chown(&file, Some(4242), None)?;
                    let told = refused(dir.path(), command).await?;
                    contains(&told, "uid 4242")?;
                    contains(&told, &format!("chown 0 {}", file.display()))?;
                    chown(&file, Some(0), None)?;
                }
            }
        }
    }
    mode(&relay.state.join("ca.key"), 0o644)?;
    contains(
        &refused(dir.path(), &start_relay).await?,
        "can be read by other users",
    )?;
    mode(&relay.state.join("ca.key"), 0o600)?;
    // Nothing of it did harm.
    let mut relay = relay;
    relay.restart().await?;
    let output = user.run(&["clusters"]).await?;
    ensure!(output.status.success(), "{}", said(&output));
    Ok(())
}

async fn exposed_tokens(env: Arc<Environment>) -> Result<()> {
    let dir = private_dir()?;
    let token = env.relay.token(&["--user", "exposed"]).await?;
    let file = dir.path().join("a token");
    write_secret(&file, &token)?;
    mode(&file, 0o644)?;
    let state = dir.path().join("state").display().to_string();
    let path = file.display().to_string();
    let login = ["login", "--state-dir", &state, "--token-file", &path];
    let told = refused(dir.path(), &login).await?;
    contains(&told, "chmod 600")?;
    lacks(&told, &token)?;
    // It was not redeemed, so it is good once the file is private.
    mode(&file, 0o600)?;
    let output = throwline(&dir.path().join("home"))?
        .args(login)
        .output()
        .await?;
    ensure!(output.status.success(), "{}", said(&output));

    // `token create` makes such a file itself, and warns when a shell made another.
    let out = dir.path().join("out").display().to_string();
    let create = ["--user", "other", "--out", &out];
    let state = env.relay.state.display().to_string();
    let all = [&["token", "create", "--state-dir", &state][..], &create].concat();
    let output = throwline(&dir.path().join("home"))?
        .args(&all)
        .output()
        .await?;
    ensure!(
        output.status.success() && output.stdout.is_empty(),
        "{}",
        said(&output)
    );
    let made = std::fs::metadata(&out)?.permissions().mode() & 0o777;
    ensure!(made == 0o600, "{made:o}");
    contains(&refused(dir.path(), &all).await?, "move it away")
}

async fn drained_by_its_token(_: Arc<Environment>) -> Result<()> {
    let dir = private_dir()?;
    let relay = Relay::start(dir.path(), &[]).await?;
    let token = std::fs::read_to_string(relay.state.join("drain.token"))?;
    let made = std::fs::metadata(relay.state.join("drain.token"))?;
    ensure!(made.permissions().mode() & 0o077 == 0);
    let bearer = format!("Authorization: Bearer {token}\r\n");
    for (headers, wanted) in [
        ("".to_owned(), 401),
        ("Authorization: Bearer guessed\r\n".to_owned(), 401),
        (
            "Origin: https://evil.example\r\nContent-Type: text/plain\r\n".to_owned(),
            403,
        ),
        (format!("Origin: null\r\n{bearer}"), 403),
        (format!("Sec-Fetch-Site: cross-site\r\n{bearer}"), 403),
    ] {
        let (status, body) = metrics::post(relay.admin, "/drain", &headers).await?;
        ensure!(status == wanted, "{headers}: {status} {body}");
        metrics::ready(relay.admin).await?;
    }
    lacks(&relay.process.log(), &token)?;
    relay.drain().await?;
    let ended = relay.process.ended(Duration::from_secs(30)).await?;
    ensure!(ended.success(), "{ended}");
    Ok(())
}

async fn held_admin(env: Arc<Environment>) -> Result<()> {
    for admin in [env.relay.admin, env.agent.admin, env.proxy.admin] {
        let mut held = Vec::new();
        for number in 0..400 {
            let mut stream = TcpStream::connect(admin).await?;
            if number % 2 == 0 {
                let _ = stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x").await;
            }
            held.push(stream);
        }
        metrics::ready(admin).await?;
        let mut oldest = held.swap_remove(0);
        let closed = tokio::time::timeout(Duration::from_secs(20), oldest.read(&mut [0])).await;
        ensure!(matches!(closed?, Ok(0) | Err(_)), "the oldest was kept");
    }
    Ok(())
}

/// With a limit that allows one, as a machine that collects cores has.
async fn no_core_dump(_: Arc<Environment>) -> Result<()> {
    use std::os::unix::process::ExitStatusExt;
    let dir = private_dir()?;
    let listen = free_address()?;
    for (flag, wanted) in [("--log=info", "0"), ("--core-dumps", "unlimited")] {
        let mut command = throwline(&dir.path().join("home"))?;
        let program = command.as_std().get_program().to_owned();
        let mut shell = tokio::process::Command::new("sh");
        shell.args(["-c", "ulimit -c unlimited 2>/dev/null; exec \"$@\"", "sh"]);
        shell
            .arg(program)
            .args(["relay", "--listen", &listen.to_string()]);
        shell.args(["--public-url", "https://localhost", flag, "--state-dir"]);
        shell
            .arg(dir.path().join("relay"))
            .env_clear()
            .current_dir(dir.path());
        command.env_remove("THROWLINE_CORE_DUMPS");
        let process = Process::start("crashing", dir.path(), shell)?;
        eventually(Duration::from_secs(30), "it listens", || async {
            process.check_running().await?;
            TcpStream::connect(listen).await?;
            Ok(())
        })
        .await?;
        let limits = std::fs::read_to_string(format!("/proc/{}/limits", process.pid()))?;
        let line = limits
            .lines()
            .find(|line| line.starts_with("Max core file size"));
        let soft = line
            .and_then(|line| line.split_whitespace().nth(4))
            .context("no limit")?;
        // Where the machine's own limit is 0, nothing raises it.
        ensure!(soft == wanted || soft == "0", "{flag}: {limits}");
        if wanted == "0" {
            // Not SIGSEGV: Rust's handler passes over one that no access to memory has caused.
            process.signal(Signal::ABORT);
            let ended = process.ended(Duration::from_secs(30)).await?;
            ensure!(ended.signal().is_some() && !ended.core_dumped(), "{ended}");
        } else {
            process.kill().await?;
        }
    }
    Ok(())
}

async fn private_demo(_: Arc<Environment>) -> Result<()> {
    let dir = private_dir()?;
    let script = "umask 0; d=$(dirname \"$KUBECONFIG\"); stat -c '%a %n' \"$d\" \"$d\"/*";
    let output = throwline(&dir.path().join("home"))?
        .args(["demo", "--", "sh", "-c", script])
        .env("TMPDIR", dir.path())
        .output()
        .await?;
    ensure!(output.status.success(), "{}", said(&output));
    let stdout = String::from_utf8(output.stdout)?;
    let mut lines = stdout
        .lines()
        .filter(|line| line.contains("throwline-demo-"));
    let first = lines.next().context("nothing was listed")?;
    ensure!(first.starts_with("700 "), "{stdout}");
    for line in lines.filter(|line| !line.ends_with("/cluster")) {
        ensure!(
            line.starts_with("600 ") || line.starts_with("700 "),
            "{stdout}"
        );
    }
    Ok(())
}

async fn database_in_the_clear(_: Arc<Environment>) -> Result<()> {
    let dir = private_dir()?;
    // An address for documentation (RFC 5737): no host answers there.
    for (mode, is_warned) in [("disable", true), ("prefer", true), ("verify-full", false)] {
        let file = dir.path().join("url");
        let url = format!("postgres://relay:hunter2@192.0.2.1/throwline?sslmode={mode}");
        write_secret(&file, &url)?;
        let file = file.display().to_string();
        let told = refused(
            dir.path(),
            &["database", "migrate", "--database-file", &file],
        )
        .await?;
        ensure!(
            told.contains("sslmode=verify-full") == is_warned,
            "{mode}: {told}"
        );
        lacks(&told, "hunter2")?;
    }
    let file = dir.path().join("url");
    mode(&file, 0o644)?;
    let file = file.display().to_string();
    let told = refused(
        dir.path(),
        &["database", "migrate", "--database-file", &file],
    )
    .await?;
    contains(&told, "chmod 600")
}

/// A disk that is full from the start.
async fn failing_audit(env: Arc<Environment>) -> Result<()> {
    let dir = private_dir()?;
    let token = env.relay.token(&["--cluster", "unaudited"]).await?;
    let arguments = ["--audit-log", "/dev/full", "--audit-required"];
    let kubeconfig = env.upstream.kubeconfig();
    let agent = Agent::start(dir.path(), "unaudited", &token, kubeconfig, &arguments).await?;
    agent.connected().await?;
    let group = env.upstream.group();
    let token = env
        .relay
        .token(&["--user", "ines", "--group", group])
        .await?;
    let user = User::login(dir.path(), "ines", &token, &[]).await?;
    let proxy = throwline_e2e::Proxy::start(&user, &["unaudited"], &[]).await?;
    let kubectl =
        throwline_e2e::Kubectl::new(&tools::newest_kubectl()?, &proxy.kubeconfig, dir.path())
            .context("throwline-unaudited");
    eventually(Duration::from_secs(60), "requests are refused", || async {
        let output = kubectl.fails(&["get", "--raw", "/version"]).await?;
        contains(&output.stderr, "audit")
    })
    .await?;
    eventually(Duration::from_secs(30), "/readyz says so", || async {
        let (status, body) = metrics::get(agent.admin, "/readyz").await?;
        ensure!(status == 503 && body.contains("audit"), "{status} {body}");
        Ok(())
    })
    .await
}

/// What a local proxy with 10,000 clusters may hold at most: while it merges them into a kubeconfig, which is read
/// by two parsers before and after. Measured: 254 MiB.
const TEN_THOUSAND_KIB: u64 = 320 * 1024;
/// Processor time that a local proxy may still use when it was asked to stop: a second, whatever else the
/// machine does.
const STOPPING_TICKS: u64 = 100;

/// SIGTERM; then the processor time that it used until its end, in clock ticks.
async fn ticks_to_stop(process: &Process) -> Result<u64> {
    let (before, _) = process.processor_ticks()?;
    process.signal(Signal::TERM);
    let ended = || async {
        let (ticks, has_ended) = process.processor_ticks()?;
        ensure!(has_ended, "it still runs:\n{}", process.log());
        Ok(ticks - before)
    };
    let ticks = eventually(Duration::from_secs(60), "it ends", ended).await?;
    let status = process.ended(Duration::from_secs(5)).await?;
    ensure!(status.success(), "{status}:\n{}", process.log());
    Ok(ticks)
}

async fn ten_thousand(_: Arc<Environment>) -> Result<()> {
    const COUNT: usize = 10_000;
    let dir = private_dir()?;
    let listen = free_address()?;
    let url = format!("http://127.0.0.1:{}", listen.port());
    let relay = Relay::at(dir.path(), listen, &url, &["--plaintext"]).await?;
    let token = relay.token(&["--user", USER]).await?;
    let user = User::login(dir.path(), USER, &token, &[]).await?;
    relay.process.stop(Duration::from_secs(30)).await?;
    let authority = Authority::open(&relay.state).await?;
    let _relay = MaliciousRelay::start(listen, &url, &authority, Attack::Lists(COUNT)).await?;

    let kubeconfig = dir.path().join("many");
    let contexts = || {
        let text = std::fs::read_to_string(&kubeconfig).unwrap_or_default();
        text.matches("tls-server-name:").count()
    };
    let start = |name: &str| {
        let mut command = throwline(&dir.path().join("home"))?;
        command.args(["proxy", "--port", "0", "--state-dir"]);
        command
            .arg(&user.state)
            .arg("--kubeconfig")
            .arg(&kubeconfig);
        Process::start(name, dir.path(), command)
    };

    // Asked to stop in the middle of it: all of them are written, or none.
    let early = start("early")?;
    let listed = || async {
        ensure!(user.state.join("proxy.json").exists(), "{}", early.log());
        Ok(())
    };
    eventually(Duration::from_secs(60), "the list", listed).await?;
    let ticks = ticks_to_stop(&early).await?;
    ensure!([0, COUNT].contains(&contexts()), "{}", contexts());
    println!(
        "asked early: {} contexts, {ticks} ticks to stop",
        contexts()
    );

    let many = start("many")?;
    let served = || async {
        ensure!(many.stdout().contains("Stop with"), "{}", many.log());
        Ok(())
    };
    eventually(Duration::from_secs(60), "it serves", served).await?;
    ensure!(contexts() == COUNT, "{}", contexts());
    let peak = many.peak_kib()?;
    let ticks = ticks_to_stop(&many).await?;
    println!("{COUNT} clusters: {peak} KiB at most, {ticks} ticks to stop");
    ensure!(peak < TEN_THOUSAND_KIB, "{peak} KiB");
    ensure!(ticks < STOPPING_TICKS, "{ticks} ticks");
    Ok(())
}

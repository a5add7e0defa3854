//! The user that the API server sees: always the certificate's, whatever a client sends (cases 18–20
//! of the abuses that the tests must hold).

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::future::{BoxFuture, FutureExt};
use throwline_e2e::backend::{Backend, Head, TOKEN};
use throwline_e2e::client::{Target, status};
use throwline_e2e::environment::{ASK_THE_CLUSTER, Builder, CLUSTER, USER, private_dir, said};
use throwline_e2e::{
    Agent, Environment, Fixture, Proxy, Relay, Suite, User, contains, eventually, lacks, unique,
};

fn main() -> ExitCode {
    Suite::new()
        .story(
            "the_api_server_sees_the_user_and_our_credentials_only",
            the_api_server_sees_the_user,
        )
        .story(
            "smuggled_identities_are_refused",
            smuggled_identities_are_refused,
        )
        .story(
            "what_a_client_may_not_say_is_removed",
            what_a_client_may_not_say_is_removed,
        )
        .story(
            "two_readings_of_one_request_are_refused",
            two_readings_are_refused,
        )
        .story(
            "crafted_paths_reach_no_other_cluster",
            crafted_paths_reach_no_other_cluster,
        )
        .story(
            "without_the_client_certificate_nobody_gets_in",
            nobody_gets_in,
        )
        .story(
            "a_refused_upgrade_takes_no_second_request_along",
            a_refused_upgrade,
        )
        .story(
            "a_user_cannot_become_system_masters",
            a_user_cannot_become_system_masters,
        )
        .story(
            "an_equal_cluster_name_needs_the_clusters_key",
            an_equal_cluster_name,
        )
        .story(
            "a_name_belongs_to_one_cluster_until_it_is_given_up",
            a_name_belongs_to_one_cluster,
        )
        .alone(
            "an_expired_identity_comes_back_by_itself",
            Duration::from_secs(240),
            an_expired_identity,
        )
        .run(fixture)
}

/// An environment whose agent stands before a recording API server.
struct Recorded {
    env: Environment,
    backend: Backend,
    _dir: tempfile::TempDir,
}

async fn fixture() -> Result<Recorded> {
    let dir = throwline_e2e::environment::private_dir()?;
    let backend = Backend::start(dir.path()).await?;
    let env = Builder::default()
        .agent_kubeconfig(&backend.kubeconfig)
        .start()
        .await?;
    Ok(Recorded {
        env,
        backend,
        _dir: dir,
    })
}

impl Fixture for Recorded {
    fn diagnostics(&self) -> String {
        self.env.diagnostics()
    }

    fn close(&self) -> BoxFuture<'_, Result<()>> {
        async { self.env.close().await }.boxed()
    }
}

impl Recorded {
    fn target(&self) -> Result<Target> {
        Target::read(&self.env.proxy.kubeconfig, &format!("throwline-{CLUSTER}"))
    }

    /// The one request that the backend saw below this path.
    async fn seen(&self, path: &str) -> Result<Head> {
        let head = || async {
            self.backend
                .heads(path)
                .pop()
                .context("the backend saw nothing")
        };
        eventually(Duration::from_secs(5), "the request arrives", head).await
    }
}

async fn the_api_server_sees_the_user(fixture: Arc<Recorded>) -> Result<()> {
    let path = format!("/test/{}", unique("who"));
    let (code, answer) = fixture.target()?.get(&path, &[]).await?;
    ensure!(code == 200, "{answer}");
    let head = fixture.seen(&path).await?;
    ensure!(head.all("impersonate-user") == [USER], "{head:?}");
    let groups = head.all("impersonate-group");
    ensure!(groups.contains(&fixture.env.upstream.group()), "{head:?}");
    ensure!(
        head.all("authorization") == [format!("Bearer {TOKEN}")],
        "{head:?}"
    );
    Ok(())
}

async fn smuggled_identities_are_refused(fixture: Arc<Recorded>) -> Result<()> {
    let target = fixture.target()?;
    for (number, headers) in [
        &["Impersonate-User: root"][..],
        &["impersonate-group: system:masters"],
        &["IMPERSONATE-EXTRA-SCOPES: all"],
        &["Impersonate-Uid: 0"],
        &["Impersonate_User: root"],
        &["Connection: Impersonate-User"],
        &["Connection: close, impersonate-group"],
        &["Connection: Authorization"],
        &["X_Remote_User: root"],
    ]
    .into_iter()
    .enumerate()
    {
        let path = format!("/test/{}-{number}", unique("smuggle"));
        let (code, answer) = target.get(&path, headers).await?;
        ensure!((400..=403).contains(&code), "{headers:?}: {answer}");
        contains(&answer, "\"kind\":\"Status\"").with_context(|| format!("{headers:?}"))?;
        ensure!(
            fixture.backend.heads(&path).is_empty(),
            "{headers:?} reached the API server"
        );
    }
    Ok(())
}

async fn what_a_client_may_not_say_is_removed(fixture: Arc<Recorded>) -> Result<()> {
    let path = format!("/test/{}", unique("strip"));
    let headers = [
        "Authorization: Bearer stolen",
        "Cookie: a=b",
        "X-Remote-User: root",
        "X-Remote-Group: system:masters",
        "X-Forwarded-Client-Cert: By=me",
        "Proxy-Authorization: Basic eDp5",
        "X-Kept: yes",
    ];
    let (code, answer) = fixture.target()?.get(&path, &headers).await?;
    ensure!(code == 200, "{answer}");
    let head = fixture.seen(&path).await?;
    ensure!(head.all("x-kept") == ["yes"], "{head:?}");
    ensure!(head.all("impersonate-user") == [USER], "{head:?}");
    for name in [
        "cookie",
        "x-remote-user",
        "x-remote-group",
        "x-forwarded-client-cert",
        "proxy-authorization",
    ] {
        ensure!(head.all(name).is_empty(), "{name} arrived: {head:?}");
    }
    lacks(&format!("{head:?}"), "stolen")
}

async fn two_readings_are_refused(fixture: Arc<Recorded>) -> Result<()> {
    let target = fixture.target()?;
    let (prefix, host) = (target.prefix.clone(), target.address.clone());
    let path = format!("/test/{}", unique("smuggled"));
    let hidden = format!("GET {prefix}{path} HTTP/1.1\r\nHost: {host}\r\n\r\n");
    let mut wrong = Vec::new();
    let post = format!("POST {prefix}/test/upload HTTP/1.1\r\nHost: {host}\r\n");
    for (what, request) in [
        (
            "Content-Length beside Transfer-Encoding",
            format!(
                "{post}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{hidden}"
            ),
        ),
        (
            "two lengths",
            format!(
                "{post}Content-Length: 0\r\nContent-Length: {}\r\n\r\n{hidden}",
                hidden.len()
            ),
        ),
        (
            "an unknown coding",
            format!("{post}Transfer-Encoding: xchunked\r\n\r\n{hidden}"),
        ),
        (
            "a folded header",
            format!("{post}X-A: b\r\n c\r\nContent-Length: 0\r\n\r\n{hidden}"),
        ),
        (
            "a space before the colon",
            format!("{post}Content-Length : 0\r\n\r\n{hidden}"),
        ),
    ] {
        let answer = target.raw(request.as_bytes()).await;
        let arrived = !fixture.backend.heads(&path).is_empty();
        let good = match &answer {
            // Closing without a word is an answer to what is no HTTP.
            Ok(answer) if answer.is_empty() => true,
            Ok(answer) => (400..=431).contains(&status(answer)?),
            Err(_) => true,
        };
        if arrived || !good {
            wrong.push(format!(
                "{what}: hidden request arrived: {arrived}, answer: {answer:?}"
            ));
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

async fn crafted_paths_reach_no_other_cluster(fixture: Arc<Recorded>) -> Result<()> {
    let target = fixture.target()?;
    let host = &target.address;
    for (what, request) in [
        (
            "no cluster",
            format!("GET /api/v1/pods HTTP/1.1\r\nHost: {host}\r\n\r\n"),
        ),
        (
            "an unknown one",
            format!("GET /clusters/beta/api/v1/pods HTTP/1.1\r\nHost: {host}\r\n\r\n"),
        ),
        (
            "a climb",
            format!("GET /clusters/{CLUSTER}/../beta/api/v1/pods HTTP/1.1\r\nHost: {host}\r\n\r\n"),
        ),
        (
            "an encoded climb",
            format!(
                "GET /clusters/{CLUSTER}%2f..%2fbeta/api/v1/pods HTTP/1.1\r\nHost: {host}\r\n\r\n"
            ),
        ),
        (
            "an upper-case name",
            format!("GET /clusters/ALPHA/api/v1/pods HTTP/1.1\r\nHost: {host}\r\n\r\n"),
        ),
        (
            "another host",
            format!("GET /clusters/{CLUSTER}/api/v1/pods HTTP/1.1\r\nHost: evil.example\r\n\r\n"),
        ),
        (
            "absolute form",
            format!("GET https://evil.example/api/v1/pods HTTP/1.1\r\nHost: {host}\r\n\r\n"),
        ),
        (
            "double slash",
            format!("GET /clusters/{CLUSTER}//test/x HTTP/1.1\r\nHost: {host}\r\n\r\n"),
        ),
        (
            "dots",
            format!("GET /clusters/{CLUSTER}/test/../secret HTTP/1.1\r\nHost: {host}\r\n\r\n"),
        ),
        (
            "encoded dots",
            format!("GET /clusters/{CLUSTER}/test/%2e%2e/secret HTTP/1.1\r\nHost: {host}\r\n\r\n"),
        ),
    ] {
        let answer = target
            .raw(request.as_bytes())
            .await
            .with_context(|| what.to_owned())?;
        let code = status(&answer).with_context(|| what.to_owned())?;
        ensure!((400..=421).contains(&code), "{what}: {answer}");
    }
    ensure!(fixture.backend.heads("/secret").is_empty());
    ensure!(fixture.backend.heads("//").is_empty());
    Ok(())
}

async fn nobody_gets_in(fixture: Arc<Recorded>) -> Result<()> {
    let path = format!("/test/{}", unique("anonymous"));
    // With TLS 1.3 a client learns of its refusal only when it reads.
    let answer = fixture.target()?.anonymous().get(&path, &[]).await;
    if let Ok((code, answer)) = answer {
        ensure!(code == 401 || code == 403, "{answer}");
    }
    ensure!(
        fixture.backend.heads(&path).is_empty(),
        "the request arrived"
    );
    let head = format!("GET /clusters/{CLUSTER}{path} HTTP/1.1\r\nHost: x\r\n\r\n");
    let mut plain = tokio::net::TcpStream::connect(&fixture.target()?.address).await?;
    tokio::io::AsyncWriteExt::write_all(&mut plain, head.as_bytes()).await?;
    let mut answer = Vec::new();
    // A reset is as good an answer.
    let _ = tokio::io::AsyncReadExt::read_to_end(&mut plain, &mut answer).await;
    ensure!(
        !answer.starts_with(b"HTTP/1.1 200"),
        "plain HTTP was served"
    );
    ensure!(
        fixture.backend.heads(&path).is_empty(),
        "the request arrived"
    );
    Ok(())
}

async fn a_refused_upgrade(fixture: Arc<Recorded>) -> Result<()> {
    let target = fixture.target()?;
    let (prefix, host) = (&target.prefix, &target.address);
    let path = format!("/test/{}", unique("behind"));
    let request = format!(
        "POST {prefix}/test/refuse-upgrade HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\n\
         Upgrade: SPDY/3.1\r\nContent-Length: 0\r\n\r\nGET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n"
    );
    let answer = target.raw(request.as_bytes()).await?;
    ensure!(
        status(&answer)? == 403,
        "the refusal must pass through: {answer}"
    );
    ensure!(
        answer.matches("HTTP/1.1").count() == 1,
        "a second answer came: {answer}"
    );
    fixture.seen("/test/refuse-upgrade").await?;
    ensure!(
        fixture.backend.heads(&path).is_empty(),
        "the request behind it arrived"
    );
    Ok(())
}

async fn a_user_cannot_become_system_masters(fixture: Arc<Recorded>) -> Result<()> {
    let env = &fixture.env;
    let name = unique("m");
    let token = env
        .relay
        .token(&["--user", &name, "--group", "system:masters"])
        .await;
    // Refusing the group when the token is made is as good as refusing the request.
    let Ok(token) = token else { return Ok(()) };
    let Ok(user) = User::login(env.dir(), &name, &token, &[]).await else {
        return Ok(());
    };
    let proxy = throwline_e2e::Proxy::start(&user, &[CLUSTER], &[]).await?;
    let target = Target::read(&proxy.kubeconfig, &format!("throwline-{CLUSTER}"))?;
    let path = format!("/test/{}", unique("master"));
    let (code, answer) = target.get(&path, &[]).await?;
    ensure!(code == 403, "{answer}");
    contains(&answer, "system:masters")?;
    ensure!(
        fixture.backend.heads(&path).is_empty(),
        "the request arrived"
    );
    Ok(())
}

/// A second agent of the same name is the same identity, enrolled by the administrator; one from
/// another authority has no identity here.
async fn an_equal_cluster_name(fixture: Arc<Recorded>) -> Result<()> {
    let env = &fixture.env;
    let dir = throwline_e2e::environment::private_dir()?;
    let other = throwline_e2e::Relay::start(dir.path(), &[]).await?;
    let token = other.token(&["--cluster", CLUSTER]).await?;
    let agent = Agent::start(
        dir.path(),
        CLUSTER,
        &token,
        &fixture.backend.kubeconfig,
        &[],
    )
    .await?;
    agent.connected().await?;
    // Its identity is good at its own relay, and carries the very same cluster name.
    agent.process.stop(Duration::from_secs(20)).await?;
    let relay_file = agent.state.join("relay.json");
    let text = std::fs::read_to_string(&relay_file).context("relay.json")?;
    let stolen = text.replace(&other.public_url, &env.relay.public_url);
    ensure!(stolen != text, "the relay's URL is not in {text}");
    std::fs::write(&relay_file, stolen)?;
    let before = env
        .relay
        .metrics()
        .await?
        .sum("throwline_relay_carriers", &[]);
    let mut agent = agent;
    ensure!(
        agent.restart().await.is_err(),
        "an agent of another authority was accepted"
    );
    let after = env
        .relay
        .metrics()
        .await?
        .sum("throwline_relay_carriers", &[]);
    ensure!(after <= before, "{before} carriers became {after}");
    let path = format!("/test/{}", unique("still"));
    ensure!(fixture.target()?.get(&path, &[]).await?.0 == 200);
    Ok(())
}

/// Two API servers and one name; then a user's token in an agent's hands.
async fn a_name_belongs_to_one_cluster(fixture: Arc<Recorded>) -> Result<()> {
    let relay = &fixture.env.relay;
    let name = unique("named");
    let ask = [ASK_THE_CLUSTER];
    let (dir, other_dir) = (private_dir()?, private_dir()?);
    let other = Backend::start(other_dir.path()).await?;
    let limit = Duration::from_secs(30);
    let token = relay.token(&["--cluster", &name]).await?;
    let here = &fixture.backend.kubeconfig;
    let mut first = Agent::start(dir.path(), &name, &token, here, &ask).await?;
    first.connected().await?;

    let token = relay.token(&["--cluster", &name]).await?;
    let second = Agent::start(other_dir.path(), &name, &token, &other.kubeconfig, &ask).await?;
    ensure!(!second.process.ended(limit).await?.success());
    contains(
        &second.process.log(),
        &format!("throwline cluster release {name}"),
    )?;
    contains(&second.process.log(), "not used up")?;
    // Nor does an agent that is enrolled serve another cluster than its own.
    first.process.stop(limit).await?;
    let moved = Agent::start(dir.path(), &name, &token, &other.kubeconfig, &ask).await?;
    ensure!(!moved.process.ended(limit).await?.success());
    contains(&moved.process.log(), "it is another cluster")?;
    first.restart().await?;
    first.process.stop(limit).await?;

    let release = ["cluster", "release", name.as_str(), "--state-dir"];
    let state = relay.state.display().to_string();
    let user = User::nobody(dir.path(), "release")?;
    let output = user
        .run(&[&release[..], &[state.as_str()]].concat())
        .await?;
    ensure!(output.status.success(), "{}", said(&output));
    // The same token: it was not used up.
    let second = Agent::start(other_dir.path(), &name, &token, &other.kubeconfig, &ask).await?;
    second.connected().await?;
    second.process.stop(limit).await?;

    let token = relay.token(&["--user", "wrong-kind"]).await?;
    let refused = Agent::start(dir.path(), "wrong-kind", &token, here, &ask).await?;
    ensure!(!refused.process.ended(limit).await?.success());
    contains(&refused.process.log(), "this is a user's token")?;
    User::login(dir.path(), "wrong-kind", &token, &[])
        .await
        .map(drop)
}

/// A weekend, shortened: both certificates end while nothing runs.
async fn an_expired_identity(fixture: Arc<Recorded>) -> Result<()> {
    let dir = private_dir()?;
    let limit = Duration::from_secs(30);
    let lives = [
        "--user-certificate-life",
        "40s",
        "--agent-certificate-life",
        "40s",
    ];
    let relay = Relay::start(dir.path(), &lives).await?;
    let token = relay.token(&["--cluster", "prod"]).await?;
    let kubeconfig = &fixture.backend.kubeconfig;
    let mut agent =
        Agent::start(dir.path(), "prod", &token, kubeconfig, &[ASK_THE_CLUSTER]).await?;
    agent.connected().await?;
    let token = relay.token(&["--user", "dana"]).await?;
    let user = User::login(dir.path(), "dana", &token, &[]).await?;
    let mut proxy = Proxy::start(&user, &["prod"], &[]).await?;
    agent.process.stop(limit).await?;
    proxy.process.stop(limit).await?;
    tokio::time::sleep(Duration::from_secs(45)).await;

    // Nothing but the renewal is to be had with it, and that is enough.
    agent.restart().await?;
    contains(&agent.process.log(), "the agent's certificate was renewed")?;
    proxy.restart().await?;
    let target = Target::read(&proxy.kubeconfig, "throwline-prod")?;
    let path = format!("/test/{}", unique("after-a-weekend"));
    let (code, answer) = target.get(&path, &[]).await?;
    ensure!(code == 200, "{answer}");
    contains(
        &proxy.process.log(),
        "certificate renewed, which had expired",
    )?;
    let issued = relay.metrics().await?;
    let issued = issued.sum("throwline_relay_renewals_total", &[r#"outcome="issued""#]);
    ensure!(issued >= 2.0, "{issued} renewals");
    Ok(())
}

//! What Kubernetes allows and a proxy easily forbids: long commands, large heads, and names of users as
//! identity providers give them.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use throwline_e2e::environment::{CLUSTER, Proxy, User};
use throwline_e2e::pod::Pod;
use throwline_e2e::{Environment, Kubectl, Suite, Version, contains, eventually, tools, unique};

fn main() -> ExitCode {
    Suite::new()
        .each(
            "a_command_with_long_arguments",
            a_command_with_long_arguments,
        )
        .each(
            "a_command_that_is_too_long_is_told",
            a_command_that_is_too_long_is_told,
        )
        .each("a_list_with_a_large_selector", a_list_with_a_large_selector)
        .story(
            "users_have_the_names_of_their_providers",
            users_have_the_names_of_their_providers,
        )
        .story("both_audits_share_an_id", both_audits_share_an_id)
        .run(Environment::start)
}

/// Of one argument of a command, as Linux bounds it: 128 KiB with its end.
const ARGUMENT: usize = 100_000;

async fn a_command_with_long_arguments(env: Arc<Environment>, version: Version) -> Result<()> {
    let pod = Pod::start(&env.upstream, &env.namespace, "sleep 600").await?;
    let argument = "x".repeat(ARGUMENT);
    for transport in version.transports() {
        let kubectl = env.kubectl(&version).over(transport);
        for count in [1, 9] {
            let mut command = vec!["exec", &pod.name, "--", "sh", "-c", "echo $# ${#1}", "sh"];
            command.extend(std::iter::repeat_n(argument.as_str(), count));
            let said = kubectl.ok(&command).await?;
            ensure!(
                said.trim() == format!("{count} {ARGUMENT}"),
                "{transport:?} {count}: {said}"
            );
        }
    }
    pod.remove().await
}

async fn a_command_that_is_too_long_is_told(env: Arc<Environment>, version: Version) -> Result<()> {
    let pod = Pod::start(&env.upstream, &env.namespace, "sleep 600").await?;
    let argument = "x".repeat(ARGUMENT);
    for transport in version.transports() {
        let kubectl = env.kubectl(&version).over(transport);
        for _ in 0..5 {
            let mut command = vec!["exec", &pod.name, "--", "echo"];
            command.extend(std::iter::repeat_n(argument.as_str(), 15));
            let output = kubectl.fails(&command).await?;
            ensure!(
                output.stderr.contains("1 MiB"),
                "{transport:?}: {}",
                output.text()
            );
        }
    }
    pod.remove().await
}

async fn a_list_with_a_large_selector(env: Arc<Environment>, version: Version) -> Result<()> {
    let kubectl = env.kubectl(&version);
    let name = unique("large-");
    kubectl
        .ok(&["create", "configmap", &name, "--from-literal=a=b"])
        .await?;
    // Below the 64 KiB that a path of HTTP/2 may have here, above what a shared session takes.
    let others: Vec<String> = (0..5_000).map(|n| format!("v{n:06}")).collect();
    let selector = format!("no-such-label notin ({})", others.join(","));
    let listed = kubectl
        .ok(&["get", "configmaps", "-l", &selector, "-o", "name"])
        .await?;
    contains(&listed, &name)?;
    kubectl.ok(&["delete", "configmap", &name]).await?;
    Ok(())
}

async fn users_have_the_names_of_their_providers(env: Arc<Environment>) -> Result<()> {
    let names = [
        "https://idp/realm#dana",
        "CORP\\dana",
        "arn:aws:sts::123456789012:assumed-role/Ops Team/dana@example.com",
        "Jörg Müller",
    ];
    let group = env.upstream.group();
    for (at, name) in names.into_iter().enumerate() {
        let token = env.relay.token(&["--user", name, "--group", group]).await?;
        let user = User::login(env.dir(), &format!("named-{at}"), &token, &[]).await?;
        let proxy = Proxy::start(&user, &[CLUSTER], &[]).await?;
        let version = tools::newest_kubectl()?;
        let kubectl = Kubectl::new(&version, &proxy.kubeconfig, env.dir())
            .context(&format!("throwline-{CLUSTER}"));
        let me = kubectl
            .json(&["auth", "whoami", "-o", "json"])
            .await
            .with_context(|| name.to_owned())?;
        ensure!(me["status"]["userInfo"]["username"] == name, "{name}: {me}");
        let audited = || async {
            let events = env.agent.audit_events()?;
            let named = events.iter().any(|event| event["user"]["username"] == name);
            ensure!(named, "no event of {name}");
            Ok(())
        };
        eventually(Duration::from_secs(10), "it is in the audit", audited).await?;
    }
    Ok(())
}

async fn both_audits_share_an_id(env: Arc<Environment>) -> Result<()> {
    let kubectl = env.newest()?;
    // The API server tells the ID that its events of a request have with the answer.
    let output = kubectl
        .run(&["get", "namespaces", "--request-timeout=30s", "-v=8"])
        .await?;
    let said = output.stderr.to_ascii_lowercase();
    let events = || async {
        let events = env.agent.audit_events()?;
        let known = events
            .iter()
            .filter_map(|event| event["auditID"].as_str())
            .any(|id| said.contains(id));
        ensure!(known, "{said}");
        Ok(())
    };
    eventually(
        Duration::from_secs(10),
        "the ID is in the agent's audit",
        events,
    )
    .await
}

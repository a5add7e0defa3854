//! The agent's account: how it may act for users, what its ceiling refuses, and the error for it.

use std::net::Ipv4Addr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use throwline_demo_cluster::{DemoCluster, Options};
use throwline_e2e::accounts::Accounts;
use throwline_e2e::environment::private_dir;
use throwline_e2e::{
    Agent, Environment, Kubectl, Proxy, Suite, User, Version, contains, eventually, lacks, metrics,
    tools, unique,
};
use tokio::net::TcpListener;

const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    Suite::new()
        .story("clusters_tell_constrained_legacy_both_and_none", modes)
        .story("an_api_server_that_does_not_know_ceilings", |env| {
            unsupported(env)
        })
        .story("a_refusal_by_the_ceiling_says_so", refusals)
        .story("names_of_kubernetes_own_are_refused", system_names)
        .run(Environment::start)
}

/// An agent of the environment's relay with another kubeconfig.
async fn agent(
    env: &Environment,
    dir: &std::path::Path,
    name: &str,
    kubeconfig: &std::path::Path,
) -> Result<Agent> {
    let token = env.relay.token(&["--cluster", name]).await?;
    let agent = Agent::start(dir, name, &token, kubeconfig, &[]).await?;
    agent.connected().await?;
    Ok(agent)
}

/// One cluster as `throwline clusters -o json` has it.
async fn listed(user: &User, name: &str) -> Result<serde_json::Value> {
    let all = user.clusters().await?;
    let mut all = all.as_array().into_iter().flatten();
    let found = all.find(|cluster| cluster["name"] == name);
    found
        .cloned()
        .with_context(|| format!("{name} is not listed"))
}

async fn impersonation(user: &User, name: &str, how: &str) -> Result<String> {
    let as_expected = || async {
        let cluster = listed(user, name).await?;
        ensure!(cluster["impersonation"] == how, "{cluster}");
        anyhow::Ok(cluster["message"].as_str().unwrap_or_default().to_owned())
    };
    eventually(
        PATIENCE,
        &format!("{name} is reported as {how}"),
        as_expected,
    )
    .await
}

async fn modes(env: Arc<Environment>) -> Result<()> {
    let accounts = Accounts::new(env.upstream.admin()?, &env.upstream.label()).await?;
    let told = tell_modes(&env, &accounts).await;
    accounts.clean().await?;
    told
}

async fn tell_modes(env: &Environment, accounts: &Accounts) -> Result<()> {
    let dir = private_dir()?;
    let mut agents = Vec::new();
    for (how, roles) in [
        ("constrained", &["who", "basics", "view"][..]),
        ("legacy", &["legacy"]),
        ("both", &["who", "basics", "view", "legacy"]),
        ("none", &[]),
    ] {
        let name = unique(how);
        let template = env.upstream.kubeconfig();
        let kubeconfig = accounts.with(dir.path(), template, &name, roles).await?;
        let agent = agent(env, dir.path(), &name, &kubeconfig).await?;
        let message = impersonation(&env.user, &name, how).await?;
        let (says, log) = match how {
            "constrained" => ("no exec, no secrets, no writes", "below a ceiling"),
            "legacy" => ("", "no ceiling"),
            "both" => ("remove that binding", "not in force"),
            _ => ("may not impersonate users, groups", "throwline-who"),
        };
        contains(&message, says)?;
        ensure!(!says.is_empty() || message.is_empty(), "{message}");
        contains(&agent.process.log(), log)?;
        // Binding the verb impersonate would void the ceiling, so nothing may recommend it.
        lacks(&agent.process.log(), "with the verb impersonate on these")?;
        agents.push((name, agent));
    }
    let table = env.user.run(&["clusters"]).await?;
    contains(&String::from_utf8_lossy(&table.stdout), "IMPERSONATION")?;

    // Without the older right the ceiling is in force.
    let (name, mut agent) = agents.remove(2);
    accounts.unbind(&name, "legacy").await?;
    agent.process.stop(Duration::from_secs(20)).await?;
    agent.restart().await?;
    impersonation(&env.user, &name, "constrained").await?;
    Ok(())
}

/// Kubernetes before 1.36: rights of the newer kind are there, and mean nothing.
async fn unsupported(env: Arc<Environment>) -> Result<()> {
    let dir = private_dir()?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let options = Options {
        hello: false,
        constrained_impersonation: false,
        version: "v1.34.1-throwline-demo".to_owned(),
        ..Options::default()
    };
    let old = DemoCluster::start(listener, dir.path(), options).await?;
    let template = dir.path().join("admin.kubeconfig");
    std::fs::write(&template, old.kubeconfig())?;
    let admin = Kubectl::new(&tools::newest_kubectl()?, &template, dir.path());
    let accounts = Accounts::new(admin, &env.upstream.label()).await?;
    let name = unique("old");
    let roles = ["who", "basics", "view"];
    let kubeconfig = accounts.with(dir.path(), &template, &name, &roles).await?;
    let _agent = agent(&env, dir.path(), &name, &kubeconfig).await?;
    let message = impersonation(&env.user, &name, "unsupported").await?;
    contains(&message, "does not know")?;
    old.stop().await;
    Ok(())
}

async fn refusals(env: Arc<Environment>) -> Result<()> {
    let accounts = Accounts::new(env.upstream.admin()?, &env.upstream.label()).await?;
    let told = tell_refusals(&env, &accounts).await;
    accounts.clean().await?;
    told
}

async fn tell_refusals(env: &Environment, accounts: &Accounts) -> Result<()> {
    let dir = private_dir()?;
    let template = env.upstream.kubeconfig();
    let (view, bare) = (unique("view"), unique("bare"));
    let roles = ["who", "basics", "view"];
    let kubeconfig = accounts.with(dir.path(), template, &view, &roles).await?;
    let viewing = agent(env, dir.path(), &view, &kubeconfig).await?;
    let kubeconfig = accounts
        .with(dir.path(), template, &bare, &["who", "view"])
        .await?;
    let _bare = agent(env, dir.path(), &bare, &kubeconfig).await?;
    let token = env
        .relay
        .token(&["--user", "erin", "--group", env.upstream.group()])
        .await?;
    let erin = User::login(dir.path(), "erin", &token, &[]).await?;
    let proxy = Proxy::start(&erin, &[&view, &bare], &[]).await?;
    let at = |cluster: &str, version: &Version| {
        Kubectl::new(version, &proxy.kubeconfig, &dir.path().join(cluster))
            .context(&format!("throwline-{cluster}"))
            .namespace(&env.namespace)
    };
    let sentence = format!("this is the ceiling of the cluster \"{view}\"");
    for which in tools::KUBECTLS {
        let version = tools::kubectl(which)?;
        let kubectl = at(&view, &version);
        kubectl.ok(&["get", "pods"]).await?;
        // Cluster-admin by the cluster's own RBAC, and refused all the same.
        for (arguments, what) in [
            (&["get", "secrets"][..], "secrets is forbidden"),
            (&["get", "secrets", "-o", "json"], "secrets is forbidden"),
            (&["get", "secret", "none", "-o", "yaml"], "is forbidden"),
            (&["create", "configmap", "x"], "configmaps is forbidden"),
            (&["exec", "no-such-pod", "--", "true"], ""),
        ] {
            let refused = kubectl.run(arguments).await?;
            ensure!(refused.code == Some(1), "{arguments:?}: {refused:?}");
            contains(&refused.stderr, what)?;
            if arguments[0] != "exec" {
                contains(&refused.stderr, &sentence)?;
                contains(&refused.stderr, "\"erin\" were not asked")?;
            }
        }
        // Discovery's refusals are "unknown" to kubectl, unless they are text.
        let refused = at(&bare, &version).run(&["version"]).await?;
        ensure!(refused.code == Some(1), "{refused:?}");
        contains(
            &refused.stderr,
            &format!("ceiling of the cluster \"{bare}\""),
        )?;
    }
    // The cluster's own words for erin's own lack of rights stay as they are.
    let audit = || async {
        let events = viewing.audit_events()?;
        let by_ceiling = events.iter().any(|event| {
            event["responseStatus"]["code"] == 403
                && event["annotations"]["throwline.dev/refused-by"] == "ceiling"
                && event["user"]["username"] == "erin"
        });
        ensure!(by_ceiling, "{events:?}");
        anyhow::Ok(())
    };
    eventually(PATIENCE, "the agent's audit names the ceiling", audit).await?;
    metrics::ready(viewing.admin).await
}

async fn system_names(env: Arc<Environment>) -> Result<()> {
    for arguments in [
        &["--user", "system:kube-controller-manager"][..],
        &["--user", "system:node:localhost"],
        &["--user", "system:serviceaccount:kube-system:x"],
        &["--user", "system:admin"],
        &["--user", "dana", "--group", "system:nodes"],
        &[
            "--user",
            "dana",
            "--group",
            "system:masters",
            "--allow-system-name",
            "system:nodes",
        ],
        &[
            "--user",
            "dana",
            "--group",
            "system:masters",
            "--allow-system-name",
            "system:masters",
        ],
    ] {
        let refused = env.relay.token(arguments).await;
        let error = refused
            .err()
            .with_context(|| format!("{arguments:?} got a token"))?;
        contains(&format!("{error:#}"), "system:")?;
    }
    // Allowed where the token is made, but not at the relay.
    let name = "system:basic-user";
    let token = env
        .relay
        .token(&["--user", name, "--allow-system-name", name])
        .await?;
    let dir = private_dir()?;
    let nobody = User::nobody(dir.path(), "basic")?;
    let output = nobody.sign_in(&token, &[]).await?;
    ensure!(!output.status.success(), "it signed in");
    contains(
        &throwline_e2e::environment::said(&output),
        "--allow-system-name",
    )?;

    // Allowed there, too, but not at the agent, whose cluster decides last.
    let arguments = ["--allow-system-name", name];
    let relay = throwline_e2e::Relay::start(dir.path(), &arguments).await?;
    let token = relay
        .token(&["--user", name, "--allow-system-name", name])
        .await?;
    let user = User::login(dir.path(), "basic-user", &token, &[]).await?;
    for (cluster, agents, passes) in [
        ("strict", &[][..], false),
        ("lenient", &arguments[..], true),
    ] {
        let token = relay.token(&["--cluster", cluster]).await?;
        let kubeconfig = env.upstream.kubeconfig();
        let agent = Agent::start(dir.path(), cluster, &token, kubeconfig, agents).await?;
        agent.connected().await?;
        let proxy = Proxy::start(&user, &[cluster], &[]).await?;
        let version = tools::newest_kubectl()?;
        let kubectl = Kubectl::new(&version, &proxy.kubeconfig, &dir.path().join(cluster))
            .context(&format!("throwline-{cluster}"));
        let asks = if passes {
            ["auth", "whoami"]
        } else {
            ["get", "pods"]
        };
        let seen = kubectl.run(&asks).await?;
        ensure!((seen.code == Some(0)) == passes, "{cluster}: {seen:?}");
        contains(&format!("{}{}", seen.text(), seen.stderr), name)?;
        proxy.process.stop(Duration::from_secs(20)).await?;
    }
    Ok(())
}

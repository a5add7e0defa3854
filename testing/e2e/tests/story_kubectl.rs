//! Everything that people do with kubectl short of exec and port-forward, with each kubectl.

use std::process::{ExitCode, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::future::try_join_all;
use throwline_e2e::environment::{CLUSTER, USER};
use throwline_e2e::pod::{self, Pod};
use throwline_e2e::{Environment, Kubectl, Suite, Version, contains, eventually, lacks, unique};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout};

fn main() -> ExitCode {
    Suite::new()
        .each("get_in_every_output_form", get_in_every_output_form)
        .each("discovery_and_explain", discovery_and_explain)
        .each("watch_delivers_each_change", watch_delivers_each_change)
        .each("apply_diff_edit_patch_delete", apply_diff_edit_patch_delete)
        .each(
            "server_side_apply_and_its_conflict",
            server_side_apply_and_its_conflict,
        )
        .each(
            "lists_come_in_chunks_and_whole",
            lists_come_in_chunks_and_whole,
        )
        .each("logs_and_logs_followed", logs_and_logs_followed)
        .each(
            "the_api_servers_errors_arrive_as_they_are",
            the_api_servers_errors_arrive_as_they_are,
        )
        .each(
            "the_cluster_sees_the_enrolled_user",
            the_cluster_sees_the_enrolled_user,
        )
        .each(
            "impersonation_is_refused_clearly",
            impersonation_is_refused_clearly,
        )
        .each("rollout_scale_label_and_wait", rollout_scale_label_and_wait)
        .alone(
            "forty_kubectl_at_once",
            Duration::from_secs(240),
            forty_kubectl_at_once,
        )
        .alone(
            "every_request_has_an_audit_event",
            Duration::from_secs(60),
            every_request_has_an_audit_event,
        )
        .run(Environment::start)
}

async fn get_in_every_output_form(env: Arc<Environment>, version: Version) -> Result<()> {
    let kubectl = env.kubectl(&version);
    let name = unique("form-");
    kubectl
        .ok(&["create", "configmap", &name, "--from-literal=colour=blue"])
        .await?;
    let get = |form: &'static str| {
        let (kubectl, name) = (kubectl.clone(), name.clone());
        async move { kubectl.ok(&["get", "configmap", &name, "-o", form]).await }
    };
    let table = kubectl.ok(&["get", "configmap", &name]).await?;
    contains(&table, "NAME")?;
    contains(&table, &name)?;
    contains(&get("wide").await?, &name)?;
    ensure!(get("name").await?.trim() == format!("configmap/{name}"));
    let json: serde_json::Value = serde_json::from_str(&get("json").await?)?;
    ensure!(json["data"]["colour"] == "blue", "{json}");
    contains(&get("yaml").await?, "colour: blue")?;
    ensure!(get("jsonpath={.data.colour}").await? == "blue");
    ensure!(get("go-template={{.data.colour}}").await? == "blue");
    let columns = get("custom-columns=C:.data.colour").await?;
    ensure!(columns.split_whitespace().eq(["C", "blue"]), "{columns:?}");
    let described = kubectl.ok(&["describe", "configmap", &name]).await?;
    contains(&described, "blue")?;
    contains(
        &kubectl.ok(&["get", "configmaps", "--show-labels"]).await?,
        "LABELS",
    )?;
    contains(&kubectl.ok(&["get", "namespaces"]).await?, &env.namespace)?;
    contains(
        &kubectl.ok(&["get", "configmaps,secrets"]).await?,
        &format!("configmap/{name}"),
    )?;
    kubectl.ok(&["delete", "configmap", &name]).await?;
    Ok(())
}

async fn discovery_and_explain(env: Arc<Environment>, version: Version) -> Result<()> {
    let kubectl = env.kubectl(&version);
    contains(&kubectl.ok(&["api-resources"]).await?, "configmaps")?;
    contains(&kubectl.ok(&["api-versions"]).await?, "apps/v1")?;
    contains(
        &kubectl
            .ok(&["explain", "pods.spec.containers.image"])
            .await?,
        "image",
    )?;
    let server: serde_json::Value =
        serde_json::from_str(&kubectl.ok(&["version", "-o", "json"]).await?)?;
    ensure!(
        server["serverVersion"]["gitVersion"].is_string(),
        "{server}"
    );
    contains(
        &kubectl.ok(&["get", "--raw", "/api/v1/namespaces"]).await?,
        "NamespaceList",
    )?;
    contains(
        &kubectl.ok(&["cluster-info"]).await?,
        &format!("/clusters/{CLUSTER}"),
    )?;
    Ok(())
}

/// A running kubectl and its lines.
struct Following {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Following {
    fn start(kubectl: &Kubectl, arguments: &[&str]) -> Result<Self> {
        let mut child = kubectl
            .command(arguments)
            .stderr(Stdio::inherit())
            .spawn()?;
        let stdout = child.stdout.take().context("no output")?;
        Ok(Self {
            child,
            lines: BufReader::new(stdout).lines(),
        })
    }

    /// Reads on to a line that holds `part`.
    async fn line_with(&mut self, part: &str) -> Result<String> {
        let search = async {
            while let Some(line) = self.lines.next_line().await? {
                if line.contains(part) {
                    return Ok(line);
                }
            }
            anyhow::bail!("kubectl ended without a line with {part:?}")
        };
        let found = tokio::time::timeout(Duration::from_secs(20), search).await;
        found.with_context(|| format!("no line with {part:?} came"))?
    }

    async fn end(mut self) -> Result<()> {
        self.child.kill().await?;
        Ok(())
    }
}

async fn watch_delivers_each_change(env: Arc<Environment>, version: Version) -> Result<()> {
    let kubectl = env.kubectl(&version);
    let admin = env.upstream.admin()?.namespace(&env.namespace);
    let (first, second) = (unique("watched-"), unique("watched-"));
    admin.ok(&["create", "configmap", &first]).await?;
    let mut watch = Following::start(
        &kubectl,
        &["get", "configmaps", "-w", "--output-watch-events"],
    )?;
    watch.line_with(&first).await?;
    admin.ok(&["create", "configmap", &second]).await?;
    contains(&watch.line_with(&second).await?, "ADDED")?;
    admin
        .ok(&["label", "configmap", &second, "seen=yes"])
        .await?;
    contains(&watch.line_with(&second).await?, "MODIFIED")?;
    admin.ok(&["delete", "configmap", &second]).await?;
    contains(&watch.line_with(&second).await?, "DELETED")?;
    watch.end().await
}

fn configmap(name: &str, colour: &str) -> String {
    format!(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: {name}}}\ndata: {{colour: {colour}}}\n"
    )
}

async fn apply_diff_edit_patch_delete(env: Arc<Environment>, version: Version) -> Result<()> {
    let kubectl = env.kubectl(&version);
    let name = unique("applied-");
    let colour = || async {
        kubectl
            .ok(&["get", "configmap", &name, "-o", "jsonpath={.data.colour}"])
            .await
    };
    contains(&kubectl.apply(&configmap(&name, "red")).await?, "created")?;
    contains(&kubectl.apply(&configmap(&name, "red")).await?, "unchanged")?;
    // diff exits with 1 when there is a difference, and changes nothing.
    let diff = kubectl
        .feed(&["diff", "-f", "-"], configmap(&name, "green").as_bytes())
        .await?;
    ensure!(
        diff.code == Some(1),
        "diff ended with {:?}: {}",
        diff.code,
        diff.stderr
    );
    contains(&diff.text(), "green")?;
    ensure!(colour().await? == "red");
    contains(
        &kubectl.apply(&configmap(&name, "green")).await?,
        "configured",
    )?;
    ensure!(colour().await? == "green");
    let editor = kubectl.clone().env("KUBE_EDITOR", "sed -i s/green/yellow/");
    contains(&editor.ok(&["edit", "configmap", &name]).await?, "edited")?;
    ensure!(colour().await? == "yellow");
    for (kind, patch, expected) in [
        ("merge", r#"{"data":{"colour":"m"}}"#, "m"),
        ("strategic", r#"{"data":{"colour":"s"}}"#, "s"),
        (
            "json",
            r#"[{"op":"replace","path":"/data/colour","value":"j"}]"#,
            "j",
        ),
    ] {
        kubectl
            .ok(&["patch", "configmap", &name, "--type", kind, "-p", patch])
            .await?;
        ensure!(
            colour().await? == expected,
            "a {kind} patch was not applied"
        );
    }
    contains(
        &kubectl.ok(&["delete", "configmap", &name]).await?,
        "deleted",
    )?;
    contains(
        &kubectl.fails(&["get", "configmap", &name]).await?.stderr,
        "not found",
    )
}

async fn server_side_apply_and_its_conflict(env: Arc<Environment>, version: Version) -> Result<()> {
    let kubectl = env.kubectl(&version);
    let name = unique("server-side-");
    let apply = |manager: &'static str, colour: &'static str| {
        let (kubectl, manifest) = (kubectl.clone(), configmap(&name, colour));
        async move {
            let manager = format!("--field-manager={manager}");
            kubectl
                .feed(
                    &["apply", "--server-side", &manager, "-f", "-"],
                    manifest.as_bytes(),
                )
                .await
        }
    };
    let first = apply("first", "red").await?;
    ensure!(first.code == Some(0), "{}", first.stderr);
    let conflict = apply("second", "green").await?;
    ensure!(conflict.code != Some(0), "no conflict: {}", conflict.text());
    contains(&conflict.stderr.to_lowercase(), "conflict")?;
    kubectl.ok(&["delete", "configmap", &name]).await?;
    Ok(())
}

async fn lists_come_in_chunks_and_whole(env: Arc<Environment>, version: Version) -> Result<()> {
    let kubectl = env.kubectl(&version);
    let label = unique("many");
    let mut manifest = String::new();
    for number in 0..60 {
        manifest.push_str(&format!(
            "---\napiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: {label}-{number}\n  labels: {{many: {label}}}\n"
        ));
    }
    kubectl
        .ok_with(&["create", "-f", "-"], manifest.as_bytes())
        .await?;
    let selector = format!("many={label}");
    for chunk in ["--chunk-size=7", "--chunk-size=0"] {
        let names = kubectl
            .ok(&["get", "configmaps", "-l", &selector, "-o", "name", chunk])
            .await?;
        ensure!(
            names.lines().count() == 60,
            "{chunk}: {} lines",
            names.lines().count()
        );
    }
    kubectl
        .ok(&["delete", "configmaps", "-l", &selector])
        .await?;
    Ok(())
}

async fn logs_and_logs_followed(env: Arc<Environment>, version: Version) -> Result<()> {
    let kubectl = env.kubectl(&version);
    let script = "i=0; while [ $i -lt 600 ]; do echo line $i; i=$((i+1)); sleep 0.2; done";
    let pod = Pod::start(&env.upstream, &env.namespace, script).await?;
    eventually(Duration::from_secs(20), "there are logs", || async {
        contains(&kubectl.ok(&["logs", &pod.name]).await?, "line 0\n")
    })
    .await?;
    let last = kubectl.ok(&["logs", &pod.name, "--tail=1"]).await?;
    ensure!(last.lines().count() == 1, "{last:?}");
    let mut follow = Following::start(&kubectl, &["logs", "-f", "--tail=1", &pod.name])?;
    let first = follow.line_with("line ").await?;
    let number: u32 = first.rsplit(' ').next().unwrap_or_default().parse()?;
    // Lines that did not exist when the request was made, each as it is written.
    for later in 1..=5 {
        let line = follow.lines.next_line().await?.context("the log ended")?;
        ensure!(
            line == format!("line {}", number + later),
            "{line:?} after {number}"
        );
    }
    follow.end().await?;
    pod.remove().await
}

async fn the_api_servers_errors_arrive_as_they_are(
    env: Arc<Environment>,
    version: Version,
) -> Result<()> {
    let kubectl = env.kubectl(&version);
    let missing = kubectl
        .fails(&["get", "configmap", "there-is-none"])
        .await?;
    contains(
        &missing.stderr,
        "Error from server (NotFound): configmaps \"there-is-none\" not found",
    )?;
    let invalid = kubectl.feed(
        &["create", "-f", "-"],
        b"apiVersion: v1\nkind: ConfigMap\nmetadata: {name: Not_A_Name}\n",
    );
    let invalid = invalid.await?;
    ensure!(invalid.code == Some(1), "{invalid:?}");
    contains(&invalid.stderr, "Invalid")?;
    let unknown = kubectl
        .fails(&["get", "--raw", "/apis/there.is.none/v1"])
        .await?;
    contains(&unknown.stderr.to_lowercase(), "not")?;
    Ok(())
}

async fn the_cluster_sees_the_enrolled_user(env: Arc<Environment>, version: Version) -> Result<()> {
    let kubectl = env.kubectl(&version);
    ensure!(
        kubectl
            .ok(&["auth", "can-i", "create", "pods"])
            .await?
            .trim()
            == "yes"
    );
    let api = if version.minor >= 28 {
        "authentication.k8s.io/v1"
    } else {
        ""
    };
    if api.is_empty() {
        return Ok(());
    }
    let whoami = kubectl.json(&["auth", "whoami"]).await?;
    let info = &whoami["status"]["userInfo"];
    ensure!(info["username"] == USER, "{whoami}");
    let groups: Vec<&str> = info["groups"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|group| group.as_str())
        .collect();
    ensure!(groups.contains(&env.upstream.group()), "{groups:?}");
    ensure!(groups.contains(&"system:authenticated"), "{groups:?}");
    ensure!(!groups.contains(&"system:masters"), "{groups:?}");
    Ok(())
}

async fn impersonation_is_refused_clearly(env: Arc<Environment>, version: Version) -> Result<()> {
    let kubectl = env.kubectl(&version);
    for flags in [
        &["--as", "root"][..],
        &["--as", "root", "--as-group", "system:masters"],
    ] {
        let refused = kubectl
            .fails(&[flags, &["get", "configmaps"]].concat())
            .await?;
        contains(&refused.stderr, "--as")?;
        contains(&refused.stderr, "throwline")?;
        ensure!(refused.text().is_empty(), "{}", refused.text());
    }
    Ok(())
}

async fn rollout_scale_label_and_wait(env: Arc<Environment>, version: Version) -> Result<()> {
    let kubectl = env.kubectl(&version);
    let pod = Pod::start(&env.upstream, &env.namespace, pod::IDLE).await?;
    kubectl
        .ok(&[
            "wait",
            "--for=condition=Ready",
            "--timeout=60s",
            &format!("pod/{}", pod.name),
        ])
        .await?;
    kubectl
        .ok(&["label", "pod", &pod.name, "tier=test"])
        .await?;
    kubectl
        .ok(&["annotate", "pod", &pod.name, "note=here"])
        .await?;
    let found = kubectl
        .ok(&["get", "pods", "-l", "tier=test", "--no-headers"])
        .await?;
    contains(&found, &pod.name)?;
    let described = kubectl.ok(&["describe", "pod", &pod.name]).await?;
    contains(&described, "Status:")?;
    kubectl
        .ok(&["delete", "pod", &pod.name, "--wait=true", "--timeout=60s"])
        .await?;
    Ok(())
}

async fn forty_kubectl_at_once(env: Arc<Environment>) -> Result<()> {
    let kubectl = env.newest()?.within(Duration::from_secs(120));
    // The discovery cache is warm afterwards: forty cold ones would measure the machine.
    kubectl.ok(&["get", "namespaces"]).await?;
    let before = env.relay.metrics().await?;
    let calls = (0..40).map(|number| {
        let kubectl = kubectl.clone();
        let name = format!("forty-{number}");
        async move {
            kubectl
                .ok(&["create", "configmap", &name, "--from-literal=n=1"])
                .await?;
            let value = kubectl
                .ok(&["get", "configmap", &name, "-o", "jsonpath={.data.n}"])
                .await?;
            ensure!(value == "1");
            kubectl.ok(&["delete", "configmap", &name]).await
        }
    });
    try_join_all(calls).await?;
    let after = env.relay.metrics().await?;
    let refusals = "throwline_relay_refusals_total";
    ensure!(
        before.sum(refusals, &[]) == after.sum(refusals, &[]),
        "{}",
        after.text()
    );
    Ok(())
}

async fn every_request_has_an_audit_event(env: Arc<Environment>) -> Result<()> {
    let kubectl = env.newest()?;
    let name = unique("audited-");
    kubectl.ok(&["create", "configmap", &name]).await?;
    kubectl.ok(&["delete", "configmap", &name]).await?;
    let group = env.upstream.group();
    eventually(
        Duration::from_secs(10),
        "the events are written",
        || async {
            let events = env.agent.audit_events()?;
            let ours: Vec<_> = events
                .iter()
                .filter(|event| {
                    event["objectRef"]["name"] == name.as_str() || event["verb"] == "create"
                })
                .filter(|event| event["objectRef"]["namespace"] == env.namespace.as_str())
                .collect();
            for verb in ["create", "delete"] {
                let event = ours.iter().find(|event| event["verb"] == verb);
                let event = event.with_context(|| format!("no event of {verb} for {name}"))?;
                ensure!(
                    event["apiVersion"] == "audit.k8s.io/v1" && event["kind"] == "Event",
                    "{event}"
                );
                ensure!(event["objectRef"]["resource"] == "configmaps", "{event}");
                contains(&event["user"].to_string(), USER)
                    .or_else(|_| contains(&event["impersonatedUser"].to_string(), USER))?;
                contains(&event.to_string(), group)?;
            }
            Ok(())
        },
    )
    .await?;
    lacks(&env.agent.process.log(), "BEGIN PRIVATE KEY")
}

//! What a person sees: the real kubectl against a proxy whose clusters cannot be reached.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use throwline_tunnel::proto::messages::{Refusal, RefusalCode};
use tokio::process::Command;

use crate::failure::{Failure, Unreachable};
use crate::kubeconfig;
use crate::loopback::tls::LoopbackTls;
use crate::testing::{Agent, Running, answer};

async fn kubectl(proxy: &Running, arguments: &[&str]) -> String {
    let home = tempfile::tempdir().unwrap();
    let config = home.path().join("config");
    let entry = LoopbackTls::entry(&proxy.store, "prod", proxy.addr.port());
    let owner = kubeconfig::Owner {
        relay: "https://relay.example/".to_owned(),
        user: "ann".to_owned(),
    };
    let files = kubeconfig::Files::one(&config);
    let go_on = AtomicBool::new(false);
    kubeconfig::write(&files, &owner, &[entry], true, &go_on).unwrap();
    let output = Command::new("kubectl")
        .args(arguments)
        .env("KUBECONFIG", &config)
        .env("HOME", home.path())
        .output()
        .await
        .expect("kubectl must be on the PATH; `cargo xtask test` installs it");
    assert!(!output.status.success(), "kubectl took it for a success");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn failing(failure: Failure) -> Arc<Agent> {
    let agent = Agent::new(|_| async { answer("") });
    *agent.failure.lock().unwrap() = Some(failure);
    agent
}

fn refused(code: RefusalCode) -> Failure {
    Failure::Refused {
        cluster: "prod".to_owned(),
        refusal: Refusal::new(code, ""),
    }
}

#[tokio::test]
async fn kubectl_shows_why_a_cluster_cannot_be_reached() {
    let unreachable = Failure::RelayUnreachable {
        relay: "https://relay.example/".to_owned(),
        source: Unreachable::Timeout {
            after: std::time::Duration::from_secs(10),
        },
    };
    let expired = Failure::CertificateExpired {
        not_after: std::time::SystemTime::UNIX_EPOCH,
    };
    for (failure, message) in [
        (
            refused(RefusalCode::UnknownCluster),
            "there is no cluster prod",
        ),
        (
            refused(RefusalCode::NeverConnected),
            "its agent has never connected",
        ),
        (refused(RefusalCode::Offline), "cluster prod is offline"),
        (
            refused(RefusalCode::NotAllowed),
            "you may not reach cluster prod",
        ),
        (refused(RefusalCode::Limit), "a limit was reached"),
        (
            unreachable,
            "the relay https://relay.example/ cannot be reached",
        ),
        (expired, "run 'throwline login' with a new token"),
    ] {
        let proxy = Running::start(&failing(failure)).await;
        // Discovery first, as nearly every command does; then a request without it.
        for arguments in [
            &["get", "pods"][..],
            &["get", "--raw", "/clusters/prod/api/v1/nodes"],
        ] {
            let seen = kubectl(&proxy, arguments).await;
            let last = seen.lines().last().unwrap_or_default();
            assert!(last.contains(message), "{arguments:?}: {seen}");
        }
    }
}

/// What Go reads from a kubeconfig, without our entries.
async fn foreign(file: &std::path::Path) -> serde_json::Value {
    let output = Command::new("kubectl")
        .args(["config", "view", "--raw", "-o", "json", "--kubeconfig"])
        .arg(file)
        .output()
        .await
        .expect("kubectl must be on the PATH; `cargo xtask test` installs it");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    let mut config: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    for list in ["clusters", "contexts", "users"] {
        let items = config[list].as_array().cloned().unwrap_or_default();
        let is_foreign = |item: &serde_json::Value| item["name"] != "throwline-prod";
        config[list] = items.into_iter().filter(is_foreign).collect();
    }
    config
}

#[tokio::test]
async fn kubectl_reads_the_same_of_others_entries_before_and_after() {
    let theirs = "apiVersion: v1\nkind: Config\n\
        clusters:\n- name: \"yes\"\n  cluster: {server: 'https://10.0.0.1', proxy-url: \"http://p\"}\n\
        contexts:\n- name: \"1:30\"\n  context:\n    cluster: \"yes\"\n    user: \"017\"\n    namespace: \"no\"\n\
        current-context: \"\"\n\
        users:\n- name: \"017\"\n  user:\n    exec:\n      apiVersion: client.authentication.k8s.io/v1\n      \
        interactiveMode: Never\n      command: aws\n      args: [\"on\", \"2001-01-01\", \"~\", \"1e3\"]\n      env:\n      \
        - name: A\n        value: \"on\"\n      - {name: B, value: 'y'}\n";
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("config");
    let owner = kubeconfig::Owner {
        relay: "https://relay.example/".to_owned(),
        user: "no".to_owned(),
    };
    let store = crate::store::Store::new(home.path().join("state of ann #1"));
    let entry = LoopbackTls::entry(&store, "prod", 47611);
    let go_on = AtomicBool::new(false);
    let files = kubeconfig::Files::one(&file);
    for text in [
        theirs.to_owned(),
        theirs.replace('\n', "\r\n"),
        format!("\u{feff}{theirs}"),
        format!("{theirs}---\nnot: [yaml\n"),
        format!("# first\n---\n{theirs}"),
    ] {
        std::fs::write(&file, &text).unwrap();
        let before = foreign(&file).await;
        kubeconfig::write(&files, &owner, std::slice::from_ref(&entry), false, &go_on).unwrap();
        assert_eq!(foreign(&file).await, before, "{text:?}");
        // kubectl rewrites the whole file; our entries are still recognised.
        let switch = ["config", "use-context", "throwline-prod", "--kubeconfig"];
        let mut switch = Command::new("kubectl")
            .args(switch)
            .arg(&file)
            .spawn()
            .unwrap();
        assert!(switch.wait().await.unwrap().success());
        let again = kubeconfig::write(&files, &owner, std::slice::from_ref(&entry), true, &go_on);
        let again = again.unwrap();
        assert_eq!(again.contexts, ["throwline-prod"]);
        assert!(
            !again.changes.iter().any(|change| matches!(
                change,
                kubeconfig::Change::Current { .. } | kubeconfig::Change::Added { .. }
            )),
            "{again:?}"
        );
    }
}

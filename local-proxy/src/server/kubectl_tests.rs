//! What a person sees: the real kubectl against a proxy whose clusters cannot be reached.

use crate::{
    error::Failure,
    kubeconfig,
    loopback::Loopback,
    testing::{Agent, Running, answer},
};
use std::sync::Arc;
use throwline_tunnel::proto::messages::{Refusal, RefusalCode};
use tokio::process::Command;

async fn kubectl(proxy: &Running, arguments: &[&str]) -> String {
    let home = tempfile::tempdir().unwrap();
    let config = home.path().join("config");
    let entry = Loopback::entry(&proxy.store, "prod", proxy.addr.port());
    kubeconfig::write(&config, &[entry], true).unwrap();
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
        why: "connection refused".to_owned(),
        transient: true,
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

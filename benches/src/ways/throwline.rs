//! Our own: relay, agent and local proxy as processes of the binary that people run.

use std::sync::Arc;

use anyhow::Context;
use throwline_e2e::environment::{MANY_LINES_AT_A_RELAY, MANY_LINES_AT_AN_AGENT};
use throwline_e2e::kubectl::Kubectl;
use throwline_e2e::{Agent, Proxy, Relay, User, free_address, tools};

use super::{Distance, Held, Route, Side, Site};
use crate::client::Target;

pub(crate) const THROWLINE: &str = "Throwline";

/// The clusters: the upstream of all measurements, and what kubectl is shown.
const BENCH: &str = "bench";
const SHOWN: &str = "shown";

pub(crate) fn version() -> anyhow::Result<String> {
    let output = std::process::Command::new(tools::throwline()?)
        .arg("--version")
        .output()?;
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

pub(super) async fn route(site: &Site, distance: Distance) -> anyhow::Result<Route> {
    let (route, _) = with_relay(site, distance).await?;
    Ok(route)
}

pub(super) async fn with_relay(
    site: &Site,
    distance: Distance,
) -> anyhow::Result<(Route, Arc<Relay>)> {
    let dir = site.room(&format!("throwline-{}", distance.label()))?;
    let mut held = Held::default();
    let listen = free_address()?;
    let public = distance.hop(listen, &mut held).await?;
    let public = format!("https://localhost:{}", public.port());
    let relay =
        Arc::new(Relay::at(&dir.join("relay"), listen, &public, &MANY_LINES_AT_A_RELAY).await?);

    let kubeconfig = dir.join("upstream.kubeconfig");
    let ca = dir.join("upstream-ca.pem");
    std::fs::write(&ca, &site.upstream.ca_pem)?;
    std::fs::write(
        &kubeconfig,
        format!(
            "{{apiVersion: v1, kind: Config, current-context: c, users: [{{name: u, user: {{token: bench}}}}], \
             clusters: [{{name: c, cluster: {{server: 'https://{}', certificate-authority: '{}'}}}}], \
             contexts: [{{name: c, context: {{cluster: c, user: u}}}}]}}",
            site.upstream.addr,
            ca.display()
        ),
    )?;
    // Peers write no audit either.
    let arguments = [&["--audit-log", "off"], &MANY_LINES_AT_AN_AGENT[..]].concat();
    let token = relay.token(&["--cluster", BENCH]).await?;
    let agent = Agent::start(&dir, BENCH, &token, &kubeconfig, &arguments).await?;
    agent.connected().await?;
    let mut clusters = vec![BENCH];
    let mut groups = vec!["--user", "bench"];
    // kubectl is measured over the wide-area network only, where its own time is the smaller part.
    let cluster = site.cluster.as_ref().filter(|_| distance == Distance::Far);
    if let Some(cluster) = cluster {
        let token = relay.token(&["--cluster", SHOWN]).await?;
        let agent = Agent::start(&dir, SHOWN, &token, cluster.kubeconfig(), &arguments).await?;
        agent.connected().await?;
        held.keep(agent);
        clusters.push(SHOWN);
        groups.extend(["--group", cluster.group()]);
    }
    let token = relay.token(&groups).await?;
    let user = User::login(&dir, "bench", &token, &[]).await?;
    let proxy = Proxy::start(&user, &clusters, &[]).await?;
    let context = throwline_e2e::client::Target::read(&proxy.kubeconfig, "throwline-bench")?;
    let kubectl = match cluster {
        Some(_) => Some(
            Kubectl::new(&tools::newest_kubectl()?, &proxy.kubeconfig, &dir)
                .context("throwline-shown"),
        ),
        None => None,
    };
    let parts = vec![
        (Side::Relay, relay.process.pid()),
        (Side::Agent, agent.process.pid()),
        (Side::Local, proxy.process.pid()),
    ];
    let target = Target::of(&context).context("the context of the local proxy")?;
    // Clients first, when they are dropped.
    held.keep((proxy, user, agent, relay.clone()));
    let route = Route {
        target,
        kubectl,
        parts,
        _held: held,
    };
    Ok((route, relay))
}

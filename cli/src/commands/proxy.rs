//! `throwline proxy`.

use anyhow::Context;
use prometheus::Registry;
use throwline_local_proxy::{Config, Ready, default_kubeconfig};
use throwline_ops::{Readiness, Shutdown, admin};
use tokio::sync::oneshot;

use crate::args;
use crate::commands::{listen_if, outbound, state_dir, until_second_signal};

pub(super) async fn run(args: args::Proxy) -> anyhow::Result<()> {
    anyhow::ensure!(
        !args.set_current_context || args.clusters.len() == 1,
        "--set-current-context needs exactly one cluster's name"
    );
    throwline_ops::limits::raise_open_files();
    let (shutdown, second) = Shutdown::from_signals().context("cannot listen for signals")?;
    let admin_listener =
        listen_if(args.admin_listen, "the admin endpoints (--admin-listen)").await?;

    let mut config = Config::new(state_dir(args.state.state_dir)?);
    config.outbound = outbound(args.outbound)?;
    config.clusters = args.clusters;
    config.port = args.port;
    config.kubeconfig = match args.kubeconfig.or_else(default_kubeconfig) {
        Some(file) => Some(file),
        None => anyhow::bail!("there is no home directory for a kubeconfig; give --kubeconfig"),
    };
    config.timing.detached = args.detached_life;
    config.timing.rotate = args.carrier_life;
    config.set_current = args.set_current_context;

    let readiness = Readiness::new();
    let serving = readiness.condition("local proxy");
    serving.not_ready("starting");
    if let Some(listener) = admin_listener {
        let registry = Registry::new();
        config.metrics.register(&registry)?;
        tokio::spawn(admin::run(listener, registry, readiness, shutdown.clone()));
    }

    let (ready, is_ready) = oneshot::channel();
    let proxy = throwline_local_proxy::run(config, ready, shutdown);
    let say = async {
        if let Ok(ready) = is_ready.await {
            serving.ready();
            print!("{}", sentence(&ready));
        }
    };
    until_second_signal(second, async { tokio::join!(proxy, say).0 }).await
}

fn sentence(ready: &Ready) -> String {
    let mut text = String::new();
    if let Some(port) = ready.instead_of {
        text.push_str(&format!(
            "Port {port} is in use; using {} instead.\n",
            ready.addr.port()
        ));
    }
    match &ready.kubeconfig {
        Some(file) => text.push_str(&format!(
            "Forwarding on {}. These contexts are now in {}:\n",
            ready.addr,
            file.display()
        )),
        None => text.push_str(&format!("Forwarding on {}:\n", ready.addr)),
    }
    for context in &ready.contexts {
        text.push_str(&format!("  kubectl --context {context} get pods\n"));
    }
    text.push_str("Stop with Ctrl-C.\n");
    text
}

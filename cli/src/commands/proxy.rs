//! `throwline proxy`.

use anyhow::Context;
use prometheus::Registry;
use throwline_local_proxy::kubeconfig::{Change, Files};
use throwline_local_proxy::{Config, Ready, default_kubeconfig};
use throwline_ops::{Readiness, Shutdown, admin};
use tokio::sync::oneshot;

use crate::args;
use crate::commands::common::{listen_if, outbound, state_dir, until_second_signal};

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
    config.kubeconfig = match args.kubeconfig.map(Files::one).or_else(default_kubeconfig) {
        Some(file) => Some(file),
        None => anyhow::bail!("there is no home directory for a kubeconfig; give --kubeconfig"),
    };
    config.timing.detached_life = args.detached_life;
    config.timing.carrier_life = args.carrier_life;
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

/// More lines than this about contexts are not read.
const SHOWN: usize = 20;

fn sentence(ready: &Ready) -> String {
    let mut lines = Vec::new();
    if let Some(port) = ready.instead_of {
        let instead = ready.addr.port();
        lines.push(format!("Port {port} is in use; using {instead} instead."));
    }
    lines.push(format!("Forwarding on {}.", ready.addr));
    let is_of_a_context = |change: &&Change| {
        matches!(
            change,
            Change::Added { .. } | Change::Updated { .. } | Change::TakenOver { .. }
        )
    };
    let contexts = ready.changes.iter().filter(is_of_a_context).count();
    let mut shown = 0;
    for change in &ready.changes {
        if is_of_a_context(&change) {
            shown += 1;
            if shown > SHOWN {
                continue;
            }
        }
        lines.push(format!("Kubeconfig: {change}"));
    }
    if let Some(more) = contexts.checked_sub(SHOWN).filter(|more| *more > 0) {
        lines.push(format!("Kubeconfig: added or updated {more} more contexts"));
    }
    for left in ready.left.iter().take(SHOWN) {
        lines.push(format!("Kubeconfig: {left}"));
    }
    if let Some(more) = ready.left.len().checked_sub(SHOWN).filter(|more| *more > 0) {
        lines.push(format!("Kubeconfig: left {more} more contexts to it"));
    }
    if ready.changes.is_empty() && ready.left.is_empty() {
        lines.push("Kubeconfig: nothing to change".to_owned());
    }
    for context in ready.contexts.iter().take(SHOWN) {
        lines.push(format!("  kubectl --context {context} get pods"));
    }
    if let Some(more) = ready
        .contexts
        .len()
        .checked_sub(SHOWN)
        .filter(|more| *more > 0)
    {
        lines.push(format!("  and {more} more: kubectl config get-contexts"));
    }
    if let Some(warning) = no_proxy(|name| std::env::var_os(name)) {
        lines.extend(warning.lines().map(str::to_owned));
    }
    lines.push("Stop with Ctrl-C.".to_owned());
    let mut text = String::new();
    for line in lines {
        text.push_str(&throwline_ops::text::escape(&line));
        text.push('\n');
    }
    text
}

/// kubectl, as all programs in Go, uses no proxy for loopback. Others send what is for
/// 127.0.0.1 to the proxy that the environment names, unless it lists the address itself.
fn no_proxy(variable: impl Fn(&str) -> Option<std::ffi::OsString>) -> Option<&'static str> {
    let text = |name: &str| {
        let value = variable(name)?.to_string_lossy().trim().to_owned();
        (!value.is_empty()).then_some(value)
    };
    let either = |names: [&str; 2]| names.into_iter().find_map(text);
    let is_set = ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"]
        .into_iter()
        .any(|name| text(name).is_some());
    let listed = either(["NO_PROXY", "no_proxy"]).unwrap_or_default();
    let covers = |entry: &str| matches!(entry.trim(), "127.0.0.1" | "127.0.0.0/8" | "*");
    (is_set && !listed.split(',').any(covers)).then_some(
        "HTTPS_PROXY is set. kubectl and other programs in Go leave 127.0.0.1 out of it; for others:\n  \
         export NO_PROXY=\"${NO_PROXY:+$NO_PROXY,}127.0.0.1\"",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use throwline_local_proxy::kubeconfig::Left;

    #[test]
    fn no_proxy_is_asked_for_only_where_it_is_needed() {
        let asked = |set: &[(&str, &str)]| {
            let find = |name: &str| set.iter().find(|(n, _)| *n == name);
            no_proxy(|name| find(name).map(|(_, value)| value.into())).is_some()
        };
        assert!(!asked(&[]));
        assert!(!asked(&[("HTTPS_PROXY", " ")]));
        assert!(!asked(&[("HTTP_PROXY", "http://p")]));
        for name in ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"] {
            assert!(asked(&[(name, "http://p")]));
            assert!(asked(&[
                (name, "http://p"),
                ("NO_PROXY", "localhost,10.0.0.0/8")
            ]));
            for list in ["127.0.0.1", "a, 127.0.0.1", "*", "127.0.0.0/8"] {
                assert!(!asked(&[(name, "http://p"), ("no_proxy", list)]), "{list}");
            }
        }
    }

    #[test]
    fn ten_thousand_contexts_are_not_ten_thousand_lines() {
        let names: Vec<String> = (0..10_000).map(|n| format!("throwline-{n}")).collect();
        let left = Left {
            cluster: "prod".to_owned(),
            context: "throwline-prod".to_owned(),
            dir: "/other".into(),
            holder: "process 1, on 127.0.0.1:2".to_owned(),
        };
        let ready = Ready {
            addr: ([127, 0, 0, 1], 1).into(),
            instead_of: None,
            clusters: names.clone(),
            changes: names
                .iter()
                .map(|context| Change::Added {
                    context: context.clone(),
                    file: "/a".into(),
                })
                .collect(),
            left: vec![left; 10_000],
            contexts: names,
        };
        let text = sentence(&ready);
        assert!(text.lines().count() < 70, "{text}");
        assert!(text.contains("left 9980 more contexts"), "{text}");
        assert!(text.contains("left context throwline-prod to"), "{text}");
        assert!(
            text.contains("added or updated 9980 more contexts"),
            "{text}"
        );
        assert!(text.contains("and 9980 more: kubectl config"), "{text}");
    }
}

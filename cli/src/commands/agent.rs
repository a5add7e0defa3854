//! `throwline agent`.

use std::path::PathBuf;

use anyhow::{Context, bail};
use throwline_agent::{Audit, ClusterAccess, Config};
use throwline_ops::Shutdown;

use crate::args;
use crate::commands::{listen_if, read_token, until_second_signal};

pub(super) async fn run(args: args::Agent) -> anyhow::Result<()> {
    throwline_ops::limits::raise_open_files();
    let proxies = args.outbound.proxies()?;
    let (shutdown, second) = Shutdown::from_signals().context("cannot listen for signals")?;
    let admin = listen_if(args.admin_listen, "the admin endpoints (--admin-listen)").await?;
    match (
        &args.token_file,
        throwline_agent::is_enrolled(&args.state_dir)?,
    ) {
        (Some(file), false) => {
            let token = read_token(file).await?;
            let ca_file = args.outbound.ca_file.as_deref();
            throwline_agent::enrol(&token, &args.state_dir, ca_file, &proxies).await?;
        }
        // A token that was redeemed stays in the unit file or the pod's spec; that is no mistake.
        (_, true) => {}
        (None, false) => bail!(
            "this agent is not enrolled: there is no identity in {}; make a token beside the relay \
             (throwline token create --cluster NAME) and give it with --token-file",
            args.state_dir.display()
        ),
    }
    let cluster = match args.kubeconfig {
        Some(file) => ClusterAccess::Kubeconfig(file),
        None => ClusterAccess::InCluster,
    };
    let mut config = Config::load(&args.state_dir, cluster)?;
    config.proxies = proxies;
    if let Some(ca_file) = args.outbound.ca_file {
        config.extra_ca = Some(ca_file);
    }
    config.audit = match args.audit_log.as_str() {
        "stdout" => Audit::Stdout,
        "off" => Audit::Off,
        file => Audit::File(PathBuf::from(file)),
    };
    config.audit_required = args.audit_required;
    config.limits.kept.detached = args.detached_life;
    config.timing.carriers.rotate = args.carrier_life;
    config.timing.carriers.count = usize::from(args.carriers);
    until_second_signal(second, throwline_agent::run(config, admin, shutdown)).await
}

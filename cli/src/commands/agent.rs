//! `throwline agent`.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use throwline_agent::{Audit, ClusterAccess, Config, StateSecret};
use throwline_certs::EnrolmentToken;
use throwline_certs::tls::Trust;
use throwline_ops::Shutdown;

use crate::args;
use crate::commands::common::{listen_if, read_token, until_second_signal};
use crate::output;

pub(super) async fn run(args: args::Agent) -> anyhow::Result<()> {
    throwline_ops::limits::raise_open_files();
    let proxies = args.outbound.proxies()?;
    let (shutdown, second) = Shutdown::from_signals().context("cannot listen for signals")?;
    let admin = listen_if(args.admin_listen, "the admin endpoints (--admin-listen)").await?;
    let cluster = match args.kubeconfig {
        Some(file) => ClusterAccess::Kubeconfig(file),
        None => ClusterAccess::InCluster,
    };
    let secret = args.state_secret.as_deref().map(StateSecret::parse);
    let secret = secret.transpose()?;
    let is_enrolled = match &secret {
        Some(secret) => secret.synchronise(&cluster, &args.state_dir).await?,
        None => throwline_agent::is_enrolled(&args.state_dir)?,
    };
    let token = match &args.token_file {
        Some(file) if is_enrolled => new_token(file, &args.state_dir).await,
        Some(file) => Some(read_token(file).await?),
        None if is_enrolled => None,
        None => bail!(
            "this agent is not enrolled: there is no identity in {}; make a token beside the relay \
             (throwline token create --cluster NAME) and give it with --token-file",
            args.state_dir.display()
        ),
    };
    if let Some(token) = token {
        let enrolling = async {
            let trust = Trust {
                ca_file: args.outbound.ca_file.as_deref(),
                system: args.outbound.system_ca,
            };
            // Before the token is sent.
            let uid = match &args.cluster_uid {
                Some(uid) => uid.clone(),
                None => (throwline_agent::cluster_uid(cluster.clone()).await)
                    .context("cannot enrol; the token was not used")?,
            };
            let enrolling = throwline_agent::enrol(&token, &args.state_dir, &uid, trust, &proxies);
            let enrolled = enrolling.await;
            match (&secret, enrolled) {
                (None, enrolled) => drop(enrolled?),
                (Some(secret), Ok(_)) => {
                    secret.synchronise(&cluster, &args.state_dir).await?;
                }
                // Another replica may have redeemed the token a moment ago.
                (Some(secret), Err(error)) => {
                    if !secret.await_other(&cluster, &args.state_dir).await? {
                        return Err(error.into());
                    }
                }
            }
            anyhow::Ok(())
        };
        match enrolling.await {
            Ok(()) => {}
            // What is there may still be good.
            Err(error) if is_enrolled => tracing::warn!(
                error = output::message(&error),
                "the new token was not redeemed; going on with the identity that is there"
            ),
            Err(error) => return Err(error),
        }
    }
    let mut config = Config::load(&args.state_dir, cluster)?;
    config.proxies = proxies;
    config.state_secret = secret;
    if args.cluster_uid.is_some() {
        // By the operator's word, here as at the enrolment.
        config.cluster_uid = None;
    }
    if let Some(ca_file) = args.outbound.ca_file {
        config.extra_ca = Some(ca_file);
    }
    config.system_ca |= args.outbound.system_ca;
    config.audit = match args.audit_log.as_str() {
        "stdout" => Audit::Stdout,
        "off" => Audit::Off,
        file => Audit::File(PathBuf::from(file)),
    };
    config.audit_required = args.audit_required;
    config.system_names = args.system_names.names()?;
    config.timing.drain = args.drain_timeout;
    let quotas = &mut config.limits.quotas;
    if let Some(bytes) = args.max_memory {
        *quotas = throwline_agent::quotas::Limits::within(bytes);
    }
    quotas.lines_per_user = args.max_lines_per_user.unwrap_or(quotas.lines_per_user);
    quotas.requests_per_user = args
        .max_requests_per_user
        .unwrap_or(quotas.requests_per_user);
    config.limits.lines.detached = args.detached_life;
    config.timing.carriers.rotate = args.carrier_life;
    config.timing.carriers.count = usize::from(args.carriers);
    until_second_signal(second, throwline_agent::run(config, admin, shutdown)).await
}

/// The token in `file`, if it is another one than that which enrolled this agent. A token that was
/// redeemed stays in the unit file or the pod's spec, or its file is emptied; that is no mistake.
async fn new_token(file: &Path, state_dir: &Path) -> Option<EnrolmentToken> {
    let token = read_token(file).await;
    let token = token
        .inspect_err(|error| tracing::debug!(error = output::message(error), "no new token"))
        .ok()?;
    let is_new = throwline_agent::is_new_token(state_dir, &token).unwrap_or_default();
    is_new.then_some(token)
}

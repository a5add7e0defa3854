//! What several commands need: the token, the state directory, listeners, the end by a signal.

use std::io::Read;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::Context;
use throwline_certs::{files, token::EnrolmentToken};
use throwline_local_proxy::Outbound;
use throwline_ops::shutdown::SecondSignal;
use tokio::net::TcpListener;
use zeroize::Zeroizing;

use crate::args;

/// A token is a few hundred bytes; anything longer is the wrong file.
const MAX_TOKEN: usize = 16 * 1024;

/// Reads an enrolment token from a file, or from standard input for `-`: never from argv, where
/// every user of the machine could read it.
pub(super) async fn read_token(path: &Path) -> anyhow::Result<EnrolmentToken> {
    let path = path.to_owned();
    let text = tokio::task::spawn_blocking(move || -> anyhow::Result<Zeroizing<String>> {
        if path != Path::new("-") {
            return files::read_secret(&path)?
                .with_context(|| format!("there is no token file {}", path.display()));
        }
        let mut text = Zeroizing::new(String::with_capacity(2 * MAX_TOKEN));
        std::io::stdin()
            .take(MAX_TOKEN as u64)
            .read_to_string(&mut text)
            .context("cannot read the token from standard input")?;
        Ok(text)
    })
    .await??;
    // The parser's own words say what is wrong with a token; they never quote it.
    Ok(EnrolmentToken::from_str(text.trim())?)
}

/// Runs a part to its end. A second signal ends it at once, without
/// a drain.
pub(super) async fn until_second_signal<E: std::error::Error + Send + Sync + 'static>(
    second: SecondSignal,
    part: impl Future<Output = Result<(), E>>,
) -> anyhow::Result<()> {
    tokio::select! {
        outcome = part => Ok(outcome?),
        () = second.received() => anyhow::bail!("stopped at once, by a second signal"),
    }
}

/// Where this user's identity is: as given, else the default.
pub(super) fn state_dir(given: Option<PathBuf>) -> anyhow::Result<PathBuf> {
    given
        .or_else(throwline_local_proxy::default_state_dir)
        .context("there is no home directory to keep your identity in; give --state-dir")
}

/// The way out to the relay, as flags and environment say.
pub(super) fn outbound(args: args::Outbound) -> anyhow::Result<Outbound> {
    Ok(Outbound {
        proxies: args.proxies()?,
        extra_ca: args.ca_file,
        system_ca: args.system_ca,
    })
}

pub(super) async fn listen(addr: SocketAddr, what: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(addr).await.with_context(|| {
        format!("cannot listen on {addr} for {what}; is the port in use, or below 1024 and this user not allowed to open it?")
    })
}

pub(super) async fn listen_if(
    addr: Option<SocketAddr>,
    what: &str,
) -> anyhow::Result<Option<TcpListener>> {
    match addr {
        Some(addr) => Ok(Some(listen(addr, what).await?)),
        None => Ok(None),
    }
}

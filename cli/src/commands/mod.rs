//! One file a command: it builds the part's typed configuration, runs it and says what happened.

mod agent;
mod clusters;
mod database;
mod demo;
mod login;
mod proxy;
mod relay;
mod token;

use std::io::Read;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;

use anyhow::Context;
use throwline_certs::token::EnrolmentToken;
use throwline_local_proxy::Outbound;
use throwline_ops::shutdown::SecondSignal;
use tokio::net::TcpListener;

use crate::args::{self, Command, Database, Token};

/// A token is a few hundred bytes; anything longer is the wrong file.
const MAX_TOKEN: u64 = 16 * 1024;

pub(crate) fn default_filter(command: &Command) -> &'static str {
    match command {
        // A person looks at these: only what they may have to act on.
        Command::Demo(_)
        | Command::Login(_)
        | Command::Clusters(_)
        | Command::Token(_)
        | Command::Database(_) => "warn",
        Command::Relay(_) | Command::Agent(_) | Command::Proxy(_) => "info",
    }
}

/// Threads of the runtime; `None` for one a processor.
///
/// What is handed from one thread to another costs a wake-up and cold caches, at each of a
/// request's dozen steps. A relay has many independent carriers to spread over its processors;
/// an agent and a local proxy have one or two, through which everything goes.
pub(crate) fn threads(command: &Command) -> Option<u16> {
    match command {
        Command::Demo(_) => None,
        Command::Relay(args) => args.threads,
        Command::Agent(args) => Some(args.threads.threads),
        Command::Proxy(args) => Some(args.threads.threads),
        Command::Token(_) | Command::Database(_) | Command::Login(_) | Command::Clusters(_) => {
            Some(1)
        }
    }
}

pub(crate) async fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Demo(args) => demo::run(args).await,
        Command::Relay(args) => relay::run(*args).await.map(|()| ExitCode::SUCCESS),
        Command::Token(Token::Create(args)) => {
            token::create(args).await.map(|()| ExitCode::SUCCESS)
        }
        Command::Database(Database::Migrate(args)) => {
            database::migrate(args).await.map(|()| ExitCode::SUCCESS)
        }
        Command::Agent(args) => agent::run(args).await.map(|()| ExitCode::SUCCESS),
        Command::Login(args) => login::run(args).await.map(|()| ExitCode::SUCCESS),
        Command::Clusters(args) => clusters::run(args).await.map(|()| ExitCode::SUCCESS),
        Command::Proxy(args) => proxy::run(args).await.map(|()| ExitCode::SUCCESS),
    }
}

/// Reads an enrolment token from a file, or from standard input for `-`: never from argv, where
/// every user of the machine could read it.
async fn read_token(path: &Path) -> anyhow::Result<EnrolmentToken> {
    let path = path.to_owned();
    let text = tokio::task::spawn_blocking(move || -> anyhow::Result<String> {
        let mut text = String::new();
        if path == Path::new("-") {
            std::io::stdin()
                .take(MAX_TOKEN)
                .read_to_string(&mut text)
                .context("cannot read the token from standard input")?;
        } else {
            std::fs::File::open(&path)
                .and_then(|file| file.take(MAX_TOKEN).read_to_string(&mut text))
                .with_context(|| format!("cannot read the token file {}", path.display()))?;
        }
        Ok(text)
    })
    .await??;
    // The parser's own words say what is wrong with a token; they never quote it.
    Ok(EnrolmentToken::from_str(text.trim())?)
}

/// Runs a part to its end. A second signal ends it at once: who asks twice does not want to wait
/// for a drain.
async fn until_second_signal<E: std::error::Error + Send + Sync + 'static>(
    second: SecondSignal,
    part: impl Future<Output = Result<(), E>>,
) -> anyhow::Result<()> {
    tokio::select! {
        outcome = part => Ok(outcome?),
        () = second.received() => anyhow::bail!("stopped at once, by a second signal"),
    }
}

/// Where this user's identity is: as given, else the default.
fn state_dir(given: Option<PathBuf>) -> anyhow::Result<PathBuf> {
    given
        .or_else(throwline_local_proxy::default_state_dir)
        .context("there is no home directory to keep your identity in; give --state-dir")
}

/// The way out to the relay, as flags and environment say.
fn outbound(args: args::Outbound) -> anyhow::Result<Outbound> {
    Ok(Outbound {
        proxies: args.proxies()?,
        extra_ca: args.ca_file,
    })
}

async fn listen(addr: SocketAddr, what: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(addr).await.with_context(|| {
        format!("cannot listen on {addr} for {what}; is the port in use, or below 1024 and this user not allowed to open it?")
    })
}

async fn listen_if(addr: Option<SocketAddr>, what: &str) -> anyhow::Result<Option<TcpListener>> {
    match addr {
        Some(addr) => Ok(Some(listen(addr, what).await?)),
        None => Ok(None),
    }
}

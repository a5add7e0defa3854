//! One file a command: it builds the part's typed configuration, runs it and prints what happened.

mod agent;
mod cluster;
mod clusters;
mod common;
mod database;
#[cfg(feature = "demo")]
mod demo;
mod login;
mod proxy;
mod relay;
mod revoke;
mod token;

use std::process::ExitCode;

use crate::args::{Cluster, Command, Database, Token};

pub(crate) fn default_filter(command: &Command) -> &'static str {
    match command {
        // A person looks at these: only what they may have to act on.
        #[cfg(feature = "demo")]
        Command::Demo(_) => "warn",
        Command::Login(_)
        | Command::Clusters(_)
        | Command::Token(_)
        | Command::Revoke(_)
        | Command::Cluster(_)
        | Command::Database(_) => "warn",
        Command::Relay(_) | Command::Agent(_) | Command::Proxy(_) => "info",
    }
}

/// The prefix of a command's failures: where several parts run beside each other, it names the one.
pub(crate) fn component(command: &Command) -> &'static str {
    match command {
        Command::Relay(_) => "throwline relay",
        Command::Agent(_) => "throwline agent",
        Command::Proxy(_) => "throwline proxy",
        #[cfg(feature = "demo")]
        Command::Demo(_) => "throwline",
        Command::Login(_)
        | Command::Clusters(_)
        | Command::Token(_)
        | Command::Revoke(_)
        | Command::Cluster(_)
        | Command::Database(_) => "throwline",
    }
}

/// Threads of the runtime; `None` for one a processor.
///
/// What is handed from one thread to another costs a wake-up and cold caches, at each of a
/// request's dozen steps. A relay has many independent carriers to spread over its processors;
/// an agent and a local proxy have one or two, through which everything goes.
pub(crate) fn threads(command: &Command) -> Option<u16> {
    match command {
        #[cfg(feature = "demo")]
        Command::Demo(_) => None,
        Command::Relay(args) => args.threads,
        Command::Agent(args) => Some(args.threads.threads),
        Command::Proxy(args) => Some(args.threads.threads),
        Command::Token(_)
        | Command::Revoke(_)
        | Command::Cluster(_)
        | Command::Database(_)
        | Command::Login(_)
        | Command::Clusters(_) => Some(1),
    }
}

pub(crate) async fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        #[cfg(feature = "demo")]
        Command::Demo(args) => demo::run(args).await,
        Command::Relay(args) => relay::run(*args).await.map(|()| ExitCode::SUCCESS),
        Command::Token(Token::Create(args)) => {
            token::create(args).await.map(|()| ExitCode::SUCCESS)
        }
        Command::Revoke(command) => revoke::run(command).await.map(|()| ExitCode::SUCCESS),
        Command::Cluster(Cluster::Release(args)) => {
            cluster::release(args).await.map(|()| ExitCode::SUCCESS)
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

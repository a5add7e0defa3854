//! Processes of this very program, each a part of the surroundings of what is measured.

use std::process::Stdio;
use std::time::Duration;

use anyhow::Context;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

/// How long one may take to start, on a machine that does something else too.
const START: Duration = Duration::from_secs(60);

/// Runs until it is dropped.
pub(crate) struct Helper {
    _child: Child,
}

impl Helper {
    /// Starts the subcommand; gives the line that it prints when it is ready.
    pub(crate) async fn start(arguments: &[&str]) -> anyhow::Result<(Self, String)> {
        Self::start_by(Command::new(std::env::current_exe()?), arguments).await
    }

    /// The same with a command that runs this program, elsewhere.
    pub(crate) async fn start_by(
        mut program: Command,
        arguments: &[&str],
    ) -> anyhow::Result<(Self, String)> {
        let mut child = program
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start {arguments:?}"))?;
        let stdout = child.stdout.take().context("no standard output")?;
        let mut lines = BufReader::new(stdout).lines();
        let line = tokio::time::timeout(START, lines.next_line()).await??;
        let line = line.with_context(|| format!("{arguments:?} ended at once"))?;
        Ok((Self { _child: child }, line))
    }
}

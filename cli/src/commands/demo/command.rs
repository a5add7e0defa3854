//! The command that `throwline demo -- COMMAND` runs.

use std::path::Path;
use std::process::{ExitCode, ExitStatus};
use std::time::Duration;

use anyhow::Context;
use throwline_ops::Shutdown;
use tokio::process::{Child, Command};

/// How long the command has to end once this process receives the signal to stop.
const GRACE: Duration = Duration::from_secs(10);

/// Runs it with `KUBECONFIG` set; the exit code that a shell would give.
pub(super) async fn run(
    command: &[String],
    kubeconfig: &Path,
    shutdown: &Shutdown,
) -> anyhow::Result<ExitCode> {
    let Some((program, args)) = command.split_first() else {
        anyhow::bail!("no command was given")
    };
    let mut child = Command::new(program)
        .args(args)
        .env("KUBECONFIG", kubeconfig)
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("cannot run {program}"))?;
    let status = tokio::select! {
        status = child.wait() => status?,
        () = shutdown.requested() => stop(&mut child).await?,
    };
    Ok(exit_code(status))
}

/// A Ctrl-C has reached the command too, as it is in the same process group, but a SIGTERM has
/// reached only us.
async fn stop(child: &mut Child) -> anyhow::Result<ExitStatus> {
    if let Some(pid) = child
        .id()
        .and_then(|pid| rustix::process::Pid::from_raw(pid.cast_signed()))
    {
        // It may have ended in the meantime, which is all we want.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
    match tokio::time::timeout(GRACE, child.wait()).await {
        Ok(status) => Ok(status?),
        Err(_) => {
            child.kill().await?;
            Ok(child.wait().await?)
        }
    }
}

fn exit_code(status: ExitStatus) -> ExitCode {
    use std::os::unix::process::ExitStatusExt;
    let code = match (status.code(), status.signal()) {
        (Some(code), _) => u8::try_from(code).unwrap_or(1),
        (None, Some(signal)) => u8::try_from(128 + signal).unwrap_or(1),
        (None, None) => 1,
    };
    ExitCode::from(code)
}

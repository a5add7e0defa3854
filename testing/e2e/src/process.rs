//! A real process of ours: its log captured, its memory and descriptors readable, dead on drop.

use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal};
use tokio::process::{Child, Command};
use tokio::sync::Mutex;

use crate::eventually;

pub struct Process {
    name: String,
    pid: u32,
    child: Mutex<Child>,
    stdout: PathBuf,
    stderr: PathBuf,
}

impl Process {
    /// Starts it with its output in files of `dir`.
    pub fn start(name: &str, dir: &Path, mut command: Command) -> Result<Self> {
        let stdout = dir.join(format!("{name}.stdout"));
        let stderr = dir.join(format!("{name}.log"));
        // Appended, so that a process that is started again keeps its first life's log.
        let open = |path: &Path| {
            std::fs::File::options()
                .create(true)
                .append(true)
                .open(path)
        };
        command
            .stdin(Stdio::null())
            .stdout(open(&stdout)?)
            .stderr(open(&stderr)?)
            .kill_on_drop(true);
        let child = command
            .spawn()
            .with_context(|| format!("could not start {name}"))?;
        let pid = child
            .id()
            .with_context(|| format!("{name} ended at once"))?;
        Ok(Self {
            name: name.to_owned(),
            pid,
            child: Mutex::new(child),
            stdout,
            stderr,
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// What it printed on standard output.
    pub fn stdout(&self) -> String {
        lossy(&self.stdout)
    }

    /// What it logged.
    pub fn log(&self) -> String {
        lossy(&self.stderr)
    }

    /// Fails with its log when it has ended.
    pub async fn check_running(&self) -> Result<()> {
        if let Some(status) = self.child.lock().await.try_wait()? {
            bail!("{} ended with {status}:\n{}", self.name, self.log());
        }
        Ok(())
    }

    /// Tries until it succeeds, as [`eventually`] does, or until the process has ended: then
    /// it cannot succeed any more, and its log has the reason.
    pub async fn until<T, F, Fut>(&self, limit: Duration, what: &str, attempt: F) -> Result<T>
    where
        F: FnMut() -> Fut,
        Fut: Future<Output = Result<T>>,
    {
        let ended = async { self.child.lock().await.wait().await };
        tokio::select! {
            outcome = eventually(limit, what, attempt) => outcome.with_context(|| self.log()),
            status = ended => bail!("{} ended with {}:\n{}", self.name, status?, self.log()),
        }
    }

    /// Waits for its own end.
    pub async fn ended(&self, limit: Duration) -> Result<ExitStatus> {
        let mut child = self.child.lock().await;
        match tokio::time::timeout(limit, child.wait()).await {
            Ok(status) => Ok(status?),
            Err(_) => bail!("{} still runs after {limit:?}:\n{}", self.name, self.log()),
        }
    }

    /// SIGTERM, and waits: for a clean stop.
    pub async fn stop(&self, limit: Duration) -> Result<ExitStatus> {
        self.signal(Signal::TERM);
        self.ended(limit).await
    }

    /// SIGKILL, and waits.
    pub async fn kill(&self) -> Result<()> {
        self.child.lock().await.kill().await?;
        Ok(())
    }

    pub fn signal(&self, signal: Signal) {
        if let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) {
            // It may have ended; then the signal has no receiver.
            let _ = rustix::process::kill_process(pid, signal);
        }
    }

    /// Resident memory now, in KiB.
    pub fn resident_kib(&self) -> Result<u64> {
        status_field(self.pid, "VmRSS:")
    }

    /// The most resident memory it ever had, in KiB.
    pub fn peak_kib(&self) -> Result<u64> {
        status_field(self.pid, "VmHWM:")
    }

    /// Forgets the peak so far, so that [`Self::peak_kib`] speaks of what follows. Needs the
    /// right to write `clear_refs`, which an owner has.
    pub fn forget_peak(&self) -> Result<()> {
        std::fs::write(format!("/proc/{}/clear_refs", self.pid), "5")
            .with_context(|| format!("clear_refs of {}", self.name))
    }

    /// Processor time that it has used, in clock ticks of 10 ms, until it is waited for; and whether it
    /// has ended.
    pub fn processor_ticks(&self) -> Result<(u64, bool)> {
        let file = format!("/proc/{}/stat", self.pid);
        let stat = std::fs::read_to_string(&file).with_context(|| file.clone())?;
        // Behind the name, which may hold anything: state, ten more, user, system.
        let (_, rest) = stat.rsplit_once(')').with_context(|| file.clone())?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let number = |at: usize| -> Result<u64> {
            Ok(fields.get(at).with_context(|| file.clone())?.parse()?)
        };
        Ok((number(11)? + number(12)?, fields.first() == Some(&"Z")))
    }

    /// Open descriptors.
    pub fn descriptors(&self) -> Result<usize> {
        let dir = format!("/proc/{}/fd", self.pid);
        Ok(std::fs::read_dir(&dir)
            .with_context(|| format!("{dir} of {}", self.name))?
            .count())
    }
}

/// A number of `/proc/PID/status`, such as `VmRSS:` in KiB.
pub fn status_field(pid: u32, field: &str) -> Result<u64> {
    proc_field(pid, "status", field)
}

/// A number of a file of `/proc/PID` whose lines are like `VmRSS:  1234 kB`.
pub fn proc_field(pid: u32, file: &str, field: &str) -> Result<u64> {
    let file = format!("/proc/{pid}/{file}");
    let text = std::fs::read_to_string(&file).with_context(|| file.clone())?;
    field_of(&text, field).with_context(|| format!("{field} in {file}"))
}

fn field_of(text: &str, field: &str) -> Option<u64> {
    text.lines()
        .find_map(|line| line.strip_prefix(field))
        .and_then(|rest| rest.split_whitespace().next())
        .and_then(|number| number.parse().ok())
}

/// For programs that do not run as root, when we are: user and group of the first of these
/// accounts that this machine has.
pub fn unprivileged(names: &[&str]) -> Result<Option<(u32, u32)>> {
    if !rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    let passwd = std::fs::read_to_string("/etc/passwd")?;
    let ids = |name: &&str| {
        let line = passwd
            .lines()
            .find(|line| line.split(':').next() == Some(name))?;
        let mut fields = line.split(':').skip(2);
        Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
    };
    let found = names.iter().find_map(ids);
    let found = found.with_context(|| format!("there is no account of {names:?} to drop to"));
    found.map(Some)
}

fn lossy(path: &Path) -> String {
    std::fs::read(path)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_found_by_its_name() {
        let text = "Rss:   20 kB\nPss:    7 kB\nPss_Dirty:  5 kB\n";
        assert_eq!(field_of(text, "Pss:"), Some(7));
        assert_eq!(field_of(text, "Swap:"), None);
    }
}

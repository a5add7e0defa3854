//! One network namespace, by `ip netns`.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, kill_process};
use throwline_e2e::tools;

/// Before the number of the process that made it, in the name of every namespace.
const PREFIX: &str = "throwline-narrow-";
/// How long processes may take to end once they were killed.
const END: Duration = Duration::from_secs(5);

/// A namespace. [`Namespace::remove`] removes it with all that runs in it.
#[derive(Debug, Clone)]
pub(super) struct Namespace {
    name: String,
}

impl Namespace {
    /// One that exists, or is about to.
    pub(super) fn named(owner: u32, part: &str) -> Self {
        Self {
            name: format!("{PREFIX}{owner}-{part}"),
        }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Makes it, with its loopback up.
    pub(super) fn add(&self) -> anyhow::Result<()> {
        if let Err(error) = run("ip", &["netns", "add", &self.name]) {
            bail!(
                "network namespaces are not permitted here, run it as root where they are: {error:#}"
            );
        }
        self.ip("link set lo up")
    }

    /// `ip` in it, with words that hold no spaces.
    pub(super) fn ip(&self, arguments: &str) -> anyhow::Result<()> {
        self.with("ip", arguments)
    }

    pub(super) fn tc(&self, arguments: &str) -> anyhow::Result<()> {
        self.with("tc", arguments)
    }

    fn with(&self, program: &str, arguments: &str) -> anyhow::Result<()> {
        let words = ["-n", &self.name].into_iter();
        let words: Vec<&str> = words.chain(arguments.split_whitespace()).collect();
        run(program, &words)
    }

    /// A program in it, with words that hold no spaces.
    pub(super) fn run(&self, program: &str, arguments: &str) -> anyhow::Result<()> {
        let program = tools::find(program)?;
        let mut command = self.command(&program)?;
        done(command.args(arguments.split_whitespace()))
    }

    /// Sets what lies below `/proc/sys/net`, in it.
    pub(super) fn set(&self, name: &str, value: &str) -> anyhow::Result<()> {
        let mut command = self.command(Path::new("sh"))?;
        command.args(["-c", "echo \"$2\" > \"/proc/sys/net/$1\"", "sh"]);
        done(command.args([name, value]))
    }

    /// A command that is the program itself, not its parent.
    pub(super) fn command(&self, program: &Path) -> anyhow::Result<Command> {
        let mut command = Command::new(tools::find("nsenter")?);
        command.arg(format!("--net=/var/run/netns/{}", self.name));
        command.arg("--").arg(program);
        Ok(command)
    }

    /// Kills what runs in it and removes it; no error where it is not there. Its interfaces go with it.
    pub(super) fn remove(&self) -> anyhow::Result<()> {
        if !names()?.contains(&self.name) {
            return Ok(());
        }
        let end = Instant::now() + END;
        loop {
            let running = self.processes()?;
            if running.is_empty() {
                break;
            }
            if Instant::now() >= end {
                bail!(
                    "processes {running:?} in namespace {} do not end",
                    self.name
                );
            }
            for pid in running {
                // It may have ended meanwhile.
                let _ = kill_process(pid, Signal::KILL);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        run("ip", &["netns", "del", &self.name])
    }

    /// All were started by a run of this program: no other has a reason to enter.
    fn processes(&self) -> anyhow::Result<Vec<Pid>> {
        let text = output("ip", &["netns", "pids", &self.name])?;
        let numbers = text.lines().filter_map(|line| line.trim().parse().ok());
        Ok(numbers.filter_map(Pid::from_raw).collect())
    }

    /// Removes the namespaces of earlier runs that were killed before they could.
    pub(super) fn remove_abandoned() -> anyhow::Result<()> {
        for name in names()? {
            let is_abandoned =
                owner(&name).is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists());
            if is_abandoned {
                Self { name }.remove()?;
            }
        }
        Ok(())
    }
}

/// The number of the process that made the namespace of this name; none where it is another's.
fn owner(name: &str) -> Option<u32> {
    let (pid, _) = name.strip_prefix(PREFIX)?.split_once('-')?;
    pid.parse().ok()
}

fn names() -> anyhow::Result<Vec<String>> {
    let text = output("ip", &["netns", "list"])?;
    // As "NAME (id: 0)".
    let first = |line: &str| line.split_whitespace().next().map(str::to_owned);
    Ok(text.lines().filter_map(first).collect())
}

fn run(program: &str, arguments: &[&str]) -> anyhow::Result<()> {
    output(program, arguments).map(drop)
}

fn output(program: &str, arguments: &[&str]) -> anyhow::Result<String> {
    captured(Command::new(tools::find(program)?).args(arguments))
}

fn done(command: &mut Command) -> anyhow::Result<()> {
    captured(command).map(drop)
}

fn captured(command: &mut Command) -> anyhow::Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("could not start {command:?}"))?;
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr);
        bail!("{command:?} failed: {}", why.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_its_owner() {
        assert_eq!(owner(&Namespace::named(17, "user").name), Some(17));
        for name in [
            "throwline-narrow-17",
            "throwline-narrow-x-user",
            "other-17-user",
        ] {
            assert_eq!(owner(name), None, "{name}");
        }
    }
}

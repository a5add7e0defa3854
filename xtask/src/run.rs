//! Running other programs: shown as they run, read as they print.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::tally::Results;

/// The checkout that this xtask was built from, or the one that cargo runs in.
pub(crate) fn root() -> Result<PathBuf> {
    let manifest = std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    let root = manifest
        .parent()
        .context("xtask lies at the file system's root")?;
    Ok(root.to_owned())
}

/// The cargo that runs us, so that the toolchain pin holds for all that follows.
pub(crate) fn cargo(root: &Path) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root);
    // Cargo's variables about xtask: ring's build script is run again where these change, and with it
    // nearly everything is built again after a cargo that ran in a shell.
    for (name, _) in std::env::vars_os() {
        if is_of_this_package(&name.to_string_lossy()) {
            command.env_remove(name);
        }
    }
    command
}

fn is_of_this_package(variable: &str) -> bool {
    variable.starts_with("CARGO_PKG_") || variable.starts_with("CARGO_MANIFEST_")
}

/// Prints what is run, runs it, and returns whether it succeeded.
pub(crate) fn shown(command: &mut Command) -> Result<bool> {
    announce(command);
    let start = Instant::now();
    let status = command
        .status()
        .with_context(|| format!("could not start {command:?}"))?;
    took(start);
    Ok(status.success())
}

/// Like [`shown`], reading test results from its standard output on the way.
pub(crate) fn tests(command: &mut Command) -> Result<(Results, bool)> {
    let mut results = Results::default();
    let good = tests_into(&mut results, command)?;
    Ok((results, good))
}

/// Like [`tests`], adding to what was counted before.
pub(crate) fn tests_into(results: &mut Results, command: &mut Command) -> Result<bool> {
    announce(command);
    let start = Instant::now();
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("could not start {command:?}"))?;
    let output = child
        .stdout
        .take()
        .context("the child has no standard output")?;
    let mut reader = BufReader::new(output);
    let mut line = Vec::new();
    // Bytes, not lines of text: a test may print what is not UTF-8.
    while reader.read_until(b'\n', &mut line)? > 0 {
        std::io::stdout().write_all(&line)?;
        results.line(String::from_utf8_lossy(&line).trim_end());
        line.clear();
    }
    let status = child.wait()?;
    took(start);
    Ok(status.success())
}

/// Like [`shown`], with its standard output as the result.
pub(crate) fn captured(command: &mut Command) -> Result<(String, bool)> {
    announce(command);
    let start = Instant::now();
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("could not start {command:?}"))?;
    took(start);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok((text, output.status.success()))
}

/// Where the minutes of a long run went.
fn took(start: Instant) {
    println!("── took {} s", start.elapsed().as_secs());
}

/// Runs quietly; the output is of interest only when it fails.
pub(crate) fn quiet(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("could not start {command:?}"))?;
    if !output.status.success() {
        bail!(
            "{:?} failed: {}",
            command.get_program(),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The file that a shell would run for this name.
pub(crate) fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    // Debian keeps servers in sbin, which is not on the path of a user.
    let extra = ["/usr/sbin", "/usr/local/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(extra)
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

fn announce(command: &Command) {
    let program = Path::new(command.get_program())
        .file_name()
        .unwrap_or_default();
    let mut text = format!("\n── {}", program.to_string_lossy());
    for argument in command.get_args() {
        text.push(' ');
        text.push_str(&argument.to_string_lossy());
    }
    println!("{text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cargo_we_run_is_not_told_of_this_package() {
        let command = cargo(Path::new("/"));
        let removed: Vec<_> = command
            .get_envs()
            .filter(|(_, value)| value.is_none())
            .map(|(name, _)| name)
            .collect();
        // Cargo, which runs this test, sets them.
        for name in ["CARGO_MANIFEST_DIR", "CARGO_PKG_VERSION_MAJOR"] {
            assert!(removed.contains(&name.as_ref()), "{name}");
        }
        assert!(!removed.contains(&"CARGO_HOME".as_ref()));
    }
}

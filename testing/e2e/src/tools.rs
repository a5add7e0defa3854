//! Where the programs lie that stories drive: as `cargo xtask install` left them, or on the path.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow};

use crate::kubectl::Version;
use crate::suite::Skipped;

/// The checkout.
pub fn root() -> &'static Path {
    let crate_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    crate_dir.ancestors().nth(2).unwrap_or(crate_dir)
}

/// The real binary: `THROWLINE_BIN`, or what the same cargo call built beside this program.
pub fn throwline() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("THROWLINE_BIN") {
        return Ok(PathBuf::from(path));
    }
    // target/debug/deps/story_x-hash and target/debug/throwline-benches → target/debug/throwline
    let program = std::env::current_exe()?;
    let places = program.ancestors().skip(1).take(2);
    let found = places
        .map(|dir| dir.join("throwline"))
        .find(|binary| binary.is_file());
    found.with_context(|| {
        format!(
            "throwline is not built beside {}: run by `cargo xtask`, or build it and set THROWLINE_BIN",
            program.display()
        )
    })
}

/// A tool by the name that `.tools/tools.json` gives it.
pub fn find(name: &str) -> Result<PathBuf> {
    let file = root().join(".tools/tools.json");
    if let Ok(text) = std::fs::read_to_string(&file) {
        let tools: serde_json::Value = serde_json::from_str(&text)
            .with_context(|| format!("{} is damaged: run cargo xtask install", file.display()))?;
        if let Some(path) = tools[name]["path"].as_str() {
            return Ok(PathBuf::from(path));
        }
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain([PathBuf::from("/usr/sbin")])
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
        .ok_or_else(|| {
            anyhow!(Skipped(format!(
                "{name} is missing: run cargo xtask install"
            )))
        })
}

/// The versions of kubectl that stories use: Debian's 1.20, the machine's own, the newest.
pub const KUBECTLS: [&str; 3] = ["old", "machine", "newest"];

/// The newest kubectl: for stories where the version does not matter.
pub fn newest_kubectl() -> Result<Version> {
    kubectl("newest")
}

/// One of [`KUBECTLS`].
pub fn kubectl(which: &str) -> Result<Version> {
    let path = find(&format!("kubectl-{which}"))?;
    let output = Command::new(&path)
        .args(["version", "--client", "-o", "json"])
        .output()?;
    let version: serde_json::Value = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("{} does not say its version", path.display()))?;
    let minor = version["clientVersion"]["minor"]
        .as_str()
        .unwrap_or_default();
    let minor = minor.trim_end_matches(|c: char| !c.is_ascii_digit());
    let minor = minor
        .parse()
        .with_context(|| format!("kubectl's minor version: {minor:?}"))?;
    Ok(Version {
        label: format!("1.{minor}"),
        path,
        minor,
    })
}

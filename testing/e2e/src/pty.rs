//! A real terminal for interactive kubectl.

use std::fs::File;
use std::io::{Read, Write};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use tokio::process::{Child, Command};

use crate::{eventually, tools};

/// A program in a new terminal.
pub struct Pty {
    master: File,
    seen: Arc<Mutex<Vec<u8>>>,
    child: Child,
}

/// The two ends of a new terminal: the side of the user, and that of the program.
pub fn pair() -> Result<(File, File)> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let name = ptsname(&master, Vec::new())?;
    let path = name.to_str().context("a terminal's name is text")?;
    let slave = File::options().read(true).write(true).open(path)?;
    Ok((File::from(master), slave))
}

impl Pty {
    /// Starts it with this many rows and columns.
    pub fn start(command: &Command, rows: u16, columns: u16) -> Result<Self> {
        let (master, slave) = pair()?;
        // `setsid --ctty` makes it the controlling terminal, so that a resize is signalled.
        let inner = command.as_std();
        let mut command = Command::new(tools::find("setsid")?);
        command
            .args(["--ctty", "--wait"])
            .arg(inner.get_program())
            .args(inner.get_args());
        for (name, value) in inner.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command
            .stdin(Stdio::from(slave.try_clone()?))
            .stdout(Stdio::from(slave.try_clone()?))
            .stderr(Stdio::from(slave))
            .kill_on_drop(true);
        let seen = Arc::new(Mutex::new(Vec::new()));
        let mut reader = master.try_clone()?;
        let sink = seen.clone();
        let this = Self {
            master,
            seen,
            child: command.spawn()?,
        };
        this.resize(rows, columns)?;
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            // The terminal reads as an error when its last program has gone.
            while let Ok(count @ 1..) = reader.read(&mut buffer) {
                if let Ok(mut seen) = sink.lock() {
                    seen.extend_from_slice(&buffer[..count]);
                }
            }
        });
        Ok(this)
    }

    pub fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&self.master, size)?;
        Ok(())
    }

    pub fn type_in(&mut self, text: &str) -> Result<()> {
        self.master.write_all(text.as_bytes())?;
        Ok(())
    }

    /// What the terminal has shown so far.
    pub fn screen(&self) -> String {
        let seen = self
            .seen
            .lock()
            .map(|seen| seen.clone())
            .unwrap_or_default();
        String::from_utf8_lossy(&seen).into_owned()
    }

    pub async fn shows(&self, text: &str) -> Result<()> {
        eventually(Duration::from_secs(20), "the terminal shows it", || async {
            let screen = self.screen();
            ensure!(
                screen.contains(text),
                "{text:?} is not on the screen: {screen:?}"
            );
            Ok(())
        })
        .await
    }

    /// Waits for the program's end.
    pub async fn ended(&mut self) -> Result<Option<i32>> {
        let status = tokio::time::timeout(Duration::from_secs(20), self.child.wait()).await;
        Ok(status
            .with_context(|| format!("still running: {:?}", self.screen()))??
            .code())
    }
}

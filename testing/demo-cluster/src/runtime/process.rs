//! One local process in a new process group, with pipes or with a terminal.

use std::{collections::BTreeMap, io, path::PathBuf, process::Stdio};

use bytes::Bytes;
use pty_process::Size;
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::{
    io::{AsyncRead, AsyncWriteExt as _},
    process::{Child, ChildStdin},
    sync::mpsc,
};

/// Pipes as large as Linux lets everyone have: fewer wake-ups in bulk output.
const PIPE: usize = 1 << 20;

/// What to run.
#[derive(Debug, Clone)]
pub(crate) struct Spec {
    pub(crate) argv: Vec<String>,
    pub(crate) env: BTreeMap<String, String>,
    pub(crate) directory: PathBuf,
    pub(crate) stdin: bool,
    pub(crate) tty: bool,
}

/// What a client sends to a process.
#[derive(Debug)]
pub(crate) enum Input {
    Data(Bytes),
    Resize { rows: u16, columns: u16 },
    End,
}

pub(crate) type Output = Box<dyn AsyncRead + Send + Unpin>;

pub(crate) struct Process {
    pub(crate) child: Child,
    pub(crate) group: Group,
    pub(crate) input: mpsc::Sender<Input>,
    pub(crate) stdout: Option<Output>,
    pub(crate) stderr: Option<Output>,
}

/// A process group, which is killed as a whole when this is dropped.
pub(crate) struct Group(Option<Pid>);

impl Group {
    pub(crate) fn signal(&self, signal: Signal) {
        if let Some(pid) = self.0 {
            // Gone already is what was wanted.
            let _ = kill_process_group(pid, signal);
        }
    }

    /// Lets what is left of the group live.
    pub(crate) fn release(&mut self) {
        self.0 = None;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
    }
}

impl Process {
    pub(crate) fn spawn(spec: &Spec) -> io::Result<Self> {
        let (program, arguments) = spec
            .argv
            .split_first()
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "no command"))?;
        std::fs::create_dir_all(&spec.directory)?;
        let mut command = tokio::process::Command::new(program);
        command
            .args(arguments)
            .env_clear()
            .envs(&spec.env)
            .current_dir(&spec.directory)
            .kill_on_drop(true);
        if spec.tty {
            Self::on_terminal(command)
        } else {
            Self::on_pipes(command, spec.stdin)
        }
    }

    fn on_pipes(mut command: tokio::process::Command, stdin: bool) -> io::Result<Self> {
        let input = if stdin { Stdio::piped() } else { Stdio::null() };
        let mut child = command
            .stdin(input)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()?;
        for pipe in [
            child.stdout.as_ref().map(std::os::fd::AsFd::as_fd),
            child.stdin.as_ref().map(std::os::fd::AsFd::as_fd),
        ] {
            // Only a matter of speed.
            let _ = pipe.map(|pipe| rustix::pipe::fcntl_setpipe_size(pipe, PIPE));
        }
        let stdout = child.stdout.take().map(|pipe| Box::new(pipe) as Output);
        let stderr = child.stderr.take().map(|pipe| Box::new(pipe) as Output);
        let (input, received) = mpsc::channel(8);
        tokio::spawn(feed_pipe(child.stdin.take(), received));
        let group = Group(pid_of(&child));
        Ok(Self {
            child,
            group,
            input,
            stdout,
            stderr,
        })
    }

    /// The terminal makes the process the leader of a session, and so of a group.
    fn on_terminal(command: tokio::process::Command) -> io::Result<Self> {
        let (pty, pts) = pty_process::open().map_err(io::Error::other)?;
        pty.resize(Size::new(24, 80)).map_err(io::Error::other)?;
        let child =
            pty_process::Command::from(command)
                .spawn(pts)
                .map_err(|error| match error {
                    pty_process::Error::Io(error) => error,
                    other => io::Error::other(other),
                })?;
        let (output, terminal) = pty.into_split();
        let (input, received) = mpsc::channel(8);
        tokio::spawn(feed_terminal(terminal, received));
        let group = Group(pid_of(&child));
        Ok(Self {
            child,
            group,
            input,
            stdout: Some(Box::new(output)),
            stderr: None,
        })
    }
}

fn pid_of(child: &Child) -> Option<Pid> {
    child
        .id()
        .and_then(|id| i32::try_from(id).ok())
        .and_then(Pid::from_raw)
}

async fn feed_pipe(mut stdin: Option<ChildStdin>, mut received: mpsc::Receiver<Input>) {
    while let Some(input) = received.recv().await {
        match input {
            Input::Data(bytes) => {
                // A process that no longer reads is no error of ours; further input is discarded.
                if let Some(pipe) = &mut stdin
                    && pipe.write_all(&bytes).await.is_err()
                {
                    stdin = None;
                }
            }
            Input::End => stdin = None,
            Input::Resize { .. } => {}
        }
    }
}

async fn feed_terminal(
    mut terminal: pty_process::OwnedWritePty,
    mut received: mpsc::Receiver<Input>,
) {
    while let Some(input) = received.recv().await {
        let done = match input {
            Input::Data(bytes) => terminal.write_all(&bytes).await,
            Input::Resize { rows, columns } => terminal
                .resize(Size::new(rows, columns))
                .map_err(io::Error::other),
            // A terminal stays open: its process ends by a typed end-of-file or by itself.
            Input::End => Ok(()),
        };
        if done.is_err() {
            return;
        }
    }
}

//! exec and attach: a process, or a share in one, and a client.

use std::{
    sync::{Arc, PoisonError},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use serde_json::{Value, json};
use tokio::{io::AsyncReadExt as _, sync::mpsc, time::Instant};

use super::remote::{Output, Remote, Streams};
use crate::{
    Cluster,
    api::Call,
    runtime::{
        self, Channel, Container, exit_code,
        process::{self, Input, Process, Spec},
    },
    status::Failure,
};

/// Bytes read at once from a process: one WebSocket message, one SPDY frame.
const READ: usize = 64 << 10;
/// When a process has ended but something that it left behind holds its output open, the output
/// counts as complete after this long without a byte. While the client takes none, there may be more.
const QUIET: Duration = Duration::from_millis(500);

pub(super) struct Command {
    streams: Streams,
    job: Job,
}

enum Job {
    Exec { spec: Spec, pod: Arc<runtime::Pod> },
    Attach { container: Arc<Container> },
}

pub(super) fn prepare(cluster: &Cluster, call: &Call) -> Result<Command, Failure> {
    let query = &call.query;
    let mut streams = Streams {
        stdin: query.flag("stdin"),
        stdout: query.flag("stdout"),
        stderr: query.flag("stderr"),
        tty: query.flag("tty"),
    };
    if !streams.stdin && !streams.stdout && !streams.stderr {
        return Err(Failure::bad_request(
            "you must specify at least 1 of stdin, stdout, stderr",
        ));
    }
    if streams.tty {
        streams.stderr = false;
    }
    let (_, pod) = runtime::find(cluster, &call.target)?;
    let container = runtime::container(
        cluster,
        &call.target,
        query.get("container").unwrap_or_default(),
    )?;
    let not_running = || {
        let message = format!(
            "unable to upgrade connection: container not found ({:?})",
            container.name
        );
        Failure::internal(message)
    };
    if !container.is_running() {
        return Err(not_running());
    }
    if call.target.subresource() == "attach" {
        return Ok(Command {
            streams,
            job: Job::Attach { container },
        });
    }
    let argv: Vec<String> = query
        .all("command")
        .into_iter()
        .map(str::to_owned)
        .collect();
    if argv.is_empty() {
        return Err(Failure::bad_request(
            "you must specify at least 1 command for the container",
        ));
    }
    let mut env = container.environment();
    if streams.tty {
        env.entry("TERM".to_owned())
            .or_insert_with(|| "xterm".to_owned());
    }
    let directory = container.directory.join("root");
    let spec = Spec {
        argv,
        env,
        directory,
        stdin: streams.stdin,
        tty: streams.tty,
    };
    Ok(Command {
        streams,
        job: Job::Exec { spec, pod },
    })
}

impl Command {
    pub(super) fn streams(&self) -> Streams {
        self.streams
    }

    pub(super) async fn run(self, remote: Remote) {
        let Remote {
            input,
            gone,
            output,
        } = remote;
        let status = match self.job {
            Job::Exec { spec, pod } => {
                let killed = pod.killed.clone();
                let ended = async {
                    killed.cancelled().await;
                    Some(failure("the pod has been deleted", 137))
                };
                // When the client goes, the process goes with it: its group is killed in the drop.
                tokio::select! {
                    status = exec(&spec, self.streams, input, &output) => status,
                    status = ended => status,
                    () = gone.cancelled() => None,
                }
            }
            Job::Attach { container } => {
                tokio::select! {
                    status = attach(&container, self.streams, input, &output) => status,
                    () = gone.cancelled() => None,
                }
            }
        };
        // Without a status the client has gone and waits for none.
        if let Some(status) = status {
            output.finish(&status).await;
        }
    }
}

async fn exec(
    spec: &Spec,
    streams: Streams,
    input: mpsc::Receiver<Input>,
    output: &Output,
) -> Option<Value> {
    let mut process = match Process::spawn(spec) {
        Ok(process) => process,
        Err(error) => {
            let code = if error.kind() == std::io::ErrorKind::PermissionDenied {
                126
            } else {
                127
            };
            let program = spec.argv.first().map_or("", String::as_str);
            let message = format!("exec: {program:?}: {error}");
            return Some(if streams.tty {
                failure(&message, code)
            } else {
                start_failure(&message, code)
            });
        }
    };
    let to_process = process.input.clone();
    let forward = forward(input, Some(to_process));
    let (stdout, stderr) = (process.stdout.take(), process.stderr.take());
    let progress = Progress::default();
    let copying = async {
        tokio::join!(
            copy(Channel::Stdout, stdout, output, &progress),
            copy(Channel::Stderr, stderr, output, &progress)
        )
    };
    tokio::pin!(forward);
    tokio::pin!(copying);
    let mut copied = false;
    let status = loop {
        tokio::select! {
            () = &mut forward => {}
            (one, other) = &mut copying, if !copied => {
                copied = true;
                if !one || !other {
                    return None;
                }
            }
            status = process.child.wait() => break status,
        }
    };
    while !copied {
        tokio::select! {
            () = &mut forward => {}
            (one, other) = &mut copying => {
                copied = true;
                if !one || !other {
                    return None;
                }
            }
            () = tokio::time::sleep(QUIET) => {
                copied = progress.is_quiet();
            }
        }
    }
    // What it left behind in its group is left to run, as in a container.
    let code = status.map_or(255, exit_code);
    process.group.release();
    Some(exit_status(code))
}

async fn attach(
    container: &Container,
    streams: Streams,
    input: mpsc::Receiver<Input>,
    output: &Output,
) -> Option<Value> {
    let Some(mut attached) = container.attach() else {
        return Some(failure(
            &format!("container {} is not running", container.name),
            1,
        ));
    };
    let forward = forward(input, attached.input.take());
    tokio::pin!(forward);
    loop {
        tokio::select! {
            () = &mut forward => {}
            piece = attached.output.recv() => {
                let Some((channel, bytes)) = piece else { break };
                let wanted = match channel { Channel::Stdout => streams.stdout, Channel::Stderr => streams.stderr };
                if wanted && !send(output, channel, &bytes).await {
                    return None;
                }
            }
        }
    }
    Some(exit_status(container.last_exit().unwrap_or(0)))
}

async fn send(output: &Output, channel: Channel, bytes: &Bytes) -> bool {
    let mut buffer = output.buffer(channel, bytes.len());
    buffer.extend_from_slice(bytes);
    output.send(channel, buffer).await
}

/// Forwards the client's input; never ends, since the end of the input ends nothing else.
async fn forward(mut input: mpsc::Receiver<Input>, mut process: Option<mpsc::Sender<Input>>) {
    while let Some(input) = input.recv().await {
        if let Some(to) = &process
            && to.send(input).await.is_err()
        {
            process = None;
        }
    }
    std::future::pending().await
}

/// Of a process' output on its way to the client.
struct Progress(std::sync::Mutex<(i32, Instant)>);

impl Default for Progress {
    fn default() -> Self {
        Self(std::sync::Mutex::new((0, Instant::now())))
    }
}

impl Progress {
    /// So many more pieces are being sent.
    fn moves(&self, pieces: i32) {
        let mut now = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *now = (now.0 + pieces, Instant::now());
    }

    fn is_quiet(&self) -> bool {
        let (sending, last) = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        sending == 0 && last.elapsed() >= QUIET
    }
}

/// False when the client has gone.
async fn copy(
    channel: Channel,
    from: Option<process::Output>,
    output: &Output,
    progress: &Progress,
) -> bool {
    let Some(mut from) = from else { return true };
    loop {
        let mut buffer: BytesMut = output.buffer(channel, READ);
        let prefix = buffer.len();
        // The end of a terminal is an error, and the end.
        match from.read_buf(&mut buffer).await {
            Ok(0) | Err(_) => return true,
            Ok(_) => {}
        }
        progress.moves(1);
        if buffer.len() > prefix && !output.send(channel, buffer).await {
            return false;
        }
        progress.moves(-1);
    }
}

fn exit_status(code: i32) -> Value {
    if code == 0 {
        return json!({"metadata": {}, "status": "Success"});
    }
    failure(&format!("command terminated with exit code {code}"), code)
}

fn failure(message: &str, code: i32) -> Value {
    json!({
        "metadata": {}, "status": "Failure", "message": message, "reason": "NonZeroExitCode",
        "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]},
    })
}

/// A process that never was: an internal error, as container runtimes report it.
fn start_failure(message: &str, code: i32) -> Value {
    failure(
        &format!("Internal error occurred: error executing command in container: {message}"),
        code,
    )
}

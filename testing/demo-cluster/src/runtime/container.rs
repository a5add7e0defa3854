//! One container: its process, started again and again, its output, and those attached to it.

use std::{
    collections::BTreeMap,
    os::unix::process::ExitStatusExt as _,
    path::PathBuf,
    process::ExitStatus,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::{io::AsyncReadExt as _, sync::mpsc, time::Instant};

use super::{
    Pod, environment,
    process::{Input, Output, Process},
    report,
};
use crate::{Cluster, json, json::text, logs::Log};

/// Bytes read at once from a process.
const READ: usize = 64 << 10;
/// The kubelet's: at once, then 10 s, doubling up to 5 min, forgotten after 10 min of running.
const FIRST_PAUSE: Duration = Duration::from_secs(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(300);
const STABLE: Duration = Duration::from_secs(600);

/// Which of the two outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Channel {
    Stdout,
    Stderr,
}

pub(crate) struct Container {
    pub(crate) name: String,
    pub(crate) spec: Value,
    pub(crate) directory: PathBuf,
    log_bytes: u64,
    inner: Mutex<Inner>,
}

struct Inner {
    state: Value,
    last: Value,
    restarts: u64,
    running: bool,
    log: Option<Arc<Log>>,
    previous: Option<Arc<Log>>,
    input: Option<mpsc::Sender<Input>>,
    attached: Vec<mpsc::Sender<(Channel, Bytes)>>,
    exit: Option<i32>,
    env: BTreeMap<String, String>,
}

/// What someone who attaches gets.
pub(crate) struct Attached {
    pub(crate) output: mpsc::Receiver<(Channel, Bytes)>,
    pub(crate) input: Option<mpsc::Sender<Input>>,
}

impl Container {
    pub(super) fn new(spec: Value, directory: PathBuf, log_bytes: u64) -> Self {
        let name = text(&spec, "/name").to_owned();
        let inner = Inner {
            state: json!({"waiting": {"reason": "ContainerCreating"}}),
            last: json!({}),
            restarts: 0,
            running: false,
            log: None,
            previous: None,
            input: None,
            attached: Vec::new(),
            exit: None,
            env: BTreeMap::new(),
        };
        Self {
            name,
            spec,
            directory,
            log_bytes,
            inner: Mutex::new(inner),
        }
    }

    pub(crate) fn log(&self) -> Option<Arc<Log>> {
        self.lock().log.clone()
    }

    pub(crate) fn previous_log(&self) -> Option<Arc<Log>> {
        self.lock().previous.clone()
    }

    pub(crate) fn is_running(&self) -> bool {
        self.lock().running
    }

    /// The environment of the process, for those that are started beside it.
    pub(crate) fn environment(&self) -> BTreeMap<String, String> {
        self.lock().env.clone()
    }

    /// Joins the running process; `None` when none runs.
    pub(crate) fn attach(&self) -> Option<Attached> {
        let mut inner = self.lock();
        if !inner.running {
            return None;
        }
        let (sender, output) = mpsc::channel(16);
        inner.attached.push(sender);
        Some(Attached {
            output,
            input: inner.input.clone(),
        })
    }

    /// The exit code of the process that ended last.
    pub(crate) fn last_exit(&self) -> Option<i32> {
        self.lock().exit
    }

    pub(super) fn status(&self) -> Value {
        let inner = self.lock();
        json!({
            "name": self.name, "image": self.spec["image"], "imageID": self.spec["image"],
            "containerID": format!("process://{}", self.name), "ready": inner.running, "started": inner.running,
            "restartCount": inner.restarts, "state": inner.state, "lastState": inner.last,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Starts the process of a container, waits for its end, and starts it again, until the pod ends.
pub(super) async fn supervise(
    cluster: Arc<Cluster>,
    pod: Arc<Pod>,
    container: Arc<Container>,
    object: Arc<Value>,
) {
    let mut pause = Duration::ZERO;
    loop {
        let began = Instant::now();
        let code = run_once(&cluster, &pod, &container, &object).await;
        if pod.terminating.is_cancelled() || pod.killed.is_cancelled() {
            return;
        }
        let again = match pod.restart_policy.as_str() {
            "Never" => false,
            "OnFailure" => code != 0,
            _ => true,
        };
        if !again {
            return;
        }
        if began.elapsed() > STABLE {
            pause = Duration::ZERO;
        }
        if !pause.is_zero() {
            let message = format!(
                "back-off {}s restarting failed container={} pod={}",
                pause.as_secs(),
                container.name,
                pod.name
            );
            {
                let mut inner = container.lock();
                inner.last = std::mem::take(&mut inner.state);
                inner.state =
                    json!({"waiting": {"reason": "CrashLoopBackOff", "message": message}});
            }
            report::status(&cluster, &pod);
            report::event(&cluster, &pod, "Warning", "BackOff", &message);
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = pod.terminating.cancelled() => return,
                () = pod.killed.cancelled() => return,
            }
        }
        pause = (pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
        container.lock().restarts += 1;
    }
}

async fn run_once(cluster: &Cluster, pod: &Pod, container: &Container, object: &Value) -> i32 {
    let spec = match environment::spec_of(cluster, pod, container, object) {
        Ok(spec) => spec,
        Err(error) => {
            return failed(
                cluster,
                pod,
                container,
                "CreateContainerConfigError",
                &error,
            );
        }
    };
    let count = container.lock().restarts;
    let log = match Log::new(
        container.directory.join(format!("log-{count}")),
        container.log_bytes,
    ) {
        Ok(log) => Arc::new(log),
        Err(error) => return failed(cluster, pod, container, "StartError", &error.to_string()),
    };
    let mut process = match Process::spawn(&spec) {
        Ok(process) => process,
        Err(error) => {
            let message = format!(
                "exec: {:?}: {error}",
                spec.argv.first().map_or("", String::as_str)
            );
            return failed(cluster, pod, container, "StartError", &message);
        }
    };
    let began = json::now();
    {
        let mut inner = container.lock();
        inner.previous = inner.log.replace(Arc::clone(&log));
        if !inner.state.get("waiting").is_some_and(|_| true) {
            inner.last = inner.state.clone();
        }
        inner.state = json!({"running": {"startedAt": began}});
        inner.running = true;
        inner.input = spec.stdin.then(|| process.input.clone());
        inner.env = spec.env;
    }
    report::event(
        cluster,
        pod,
        "Normal",
        "Started",
        &format!("Started container {}", container.name),
    );
    report::status(cluster, pod);

    let (stdout, stderr) = (process.stdout.take(), process.stderr.take());
    let output = async {
        tokio::join!(
            copy(container, &log, Channel::Stdout, stdout),
            copy(container, &log, Channel::Stderr, stderr)
        );
    };
    let wait = async {
        tokio::select! {
            status = process.child.wait() => status,
            () = pod.killed.cancelled() => {
                process.group.signal(Signal::KILL);
                process.child.wait().await
            }
            () = pod.terminating.cancelled() => {
                process.group.signal(Signal::TERM);
                tokio::select! {
                    status = process.child.wait() => status,
                    () = pod.killed.cancelled() => {
                        process.group.signal(Signal::KILL);
                        process.child.wait().await
                    }
                }
            }
        }
    };
    let ended = {
        tokio::pin!(output);
        tokio::pin!(wait);
        let mut drained = false;
        let status = loop {
            tokio::select! {
                status = &mut wait => break status,
                () = &mut output, if !drained => drained = true,
            }
        };
        // The end of a container is the end of its first process: what is left in the group goes,
        // and with it the other ends of the pipes.
        process.group.signal(Signal::KILL);
        if !drained {
            let _ = tokio::time::timeout(Duration::from_secs(2), output).await;
        }
        status
    };
    log.close();
    let (code, signal) = ended
        .as_ref()
        .map_or((255, None), |status| (exit_code(*status), status.signal()));
    {
        let mut inner = container.lock();
        inner.running = false;
        inner.exit = Some(code);
        inner.input = None;
        inner.attached.clear();
        let reason = if code == 0 { "Completed" } else { "Error" };
        let mut state = json!({"terminated": {
            "exitCode": code, "reason": reason, "startedAt": began, "finishedAt": json::now(),
            "containerID": format!("process://{}", container.name),
        }});
        if let Some(signal) = signal {
            state["terminated"]["signal"] = json!(signal);
        }
        inner.state = state;
    }
    report::status(cluster, pod);
    code
}

/// A container that could not even be started.
fn failed(cluster: &Cluster, pod: &Pod, container: &Container, reason: &str, message: &str) -> i32 {
    {
        let mut inner = container.lock();
        inner.exit = Some(128);
        inner.state = if reason == "StartError" {
            json!({"terminated": {"exitCode": 128, "reason": reason, "message": message, "finishedAt": json::now()}})
        } else {
            json!({"waiting": {"reason": reason, "message": message}})
        };
    }
    report::event(
        cluster,
        pod,
        "Warning",
        "Failed",
        &format!("Error: {message}"),
    );
    report::status(cluster, pod);
    128
}

/// Output goes to the log and to everyone attached; a slow one of those slows the process down, as
/// container runtimes have it.
async fn copy(container: &Container, log: &Log, channel: Channel, output: Option<Output>) {
    let Some(mut output) = output else { return };
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(READ);
        match output.read_buf(&mut buffer).await {
            // The other end of a terminal that closes is an error (EIO), and the end as well.
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let bytes = buffer.split().freeze();
        if let Err(error) = log.write(&bytes) {
            tracing::warn!(%error, "cannot keep the output of a container");
        }
        let attached = container.lock().attached.clone();
        for one in attached {
            if one.send((channel, bytes.clone())).await.is_err() {
                container.lock().attached.retain(|one| !one.is_closed());
            }
        }
    }
}

/// 128 and the signal's number for a process that was killed, as shells have it.
pub(crate) fn exit_code(status: ExitStatus) -> i32 {
    status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(127))
}

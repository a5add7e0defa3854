//! The demo cluster as a real, unmodified kubectl sees it.
#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

use std::{
    path::{Path, PathBuf},
    process::{Output, Stdio},
    time::Duration,
};

use throwline_demo_cluster::{DemoCluster, Options};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream},
    process::Command,
};

struct Story {
    cluster: DemoCluster,
    dir: tempfile::TempDir,
}

/// kubectl from PATH, or from the checkout's `.tools`.
fn kubectl() -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let tools = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.tools");
    let in_tools = std::fs::read_dir(&tools)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path());
    std::env::split_paths(&path)
        .chain(in_tools)
        .chain([tools.clone()])
        .map(|directory| directory.join("kubectl"))
        .find(|file| file.is_file())
        .expect("kubectl is needed for this test: put it on PATH or run `cargo xtask test`, which fetches it into .tools")
}

impl Story {
    async fn begin() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let cluster = DemoCluster::start(listener, dir.path(), Options::default())
            .await
            .unwrap();
        let story = Self { cluster, dir };
        story.write("kubeconfig", &story.cluster.kubeconfig());
        story
            .eventually(
                "hello runs",
                &["get", "pod", "hello", "-o", "jsonpath={.status.phase}"],
                "Running",
            )
            .await;
        story
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    fn command(&self, kubeconfig: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(kubectl());
        command
            .args(arguments)
            .env("KUBECONFIG", self.dir.path().join(kubeconfig))
            .env("HOME", self.dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        command
    }

    async fn output(mut command: Command, stdin: &[u8]) -> Output {
        let mut child = command.spawn().unwrap();
        let mut pipe = child.stdin.take().unwrap();
        let stdin = stdin.to_vec();
        tokio::spawn(async move {
            let _ = pipe.write_all(&stdin).await;
        });
        tokio::time::timeout(Duration::from_secs(60), child.wait_with_output())
            .await
            .expect("kubectl hangs")
            .unwrap()
    }

    async fn run(&self, arguments: &[&str]) -> Output {
        Self::output(self.command("kubeconfig", arguments), b"").await
    }

    /// What a command that must succeed prints.
    async fn ok(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments).await;
        assert!(
            output.status.success(),
            "{arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    }

    async fn eventually(&self, what: &str, arguments: &[&str], wanted: &str) {
        let mut last = String::new();
        for _ in 0..100 {
            let output = self.run(arguments).await;
            last = String::from_utf8_lossy(&output.stdout).into_owned();
            if last.contains(wanted) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("{what}: still {last:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_come_change_and_go() {
    let story = Story::begin().await;
    assert!(story.ok(&["auth", "whoami"]).await.contains("demo-admin"));
    story.ok(&["create", "namespace", "shop"]).await;
    story
        .ok(&[
            "-n",
            "shop",
            "create",
            "configmap",
            "prices",
            "--from-literal=tea=3",
        ])
        .await;
    let table = story
        .ok(&["-n", "shop", "get", "configmap", "prices"])
        .await;
    assert!(table.starts_with("NAME"), "{table}");

    let manifest = |replicas: u8| {
        format!(
            "apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: web, namespace: shop}}\nspec:\n  replicas: {replicas}\n  \
             selector: {{matchLabels: {{app: web}}}}\n  template:\n    metadata: {{labels: {{app: web}}}}\n    \
             spec: {{containers: [{{name: web, image: nginx}}]}}\n"
        )
    };
    let path = story.write("web.yaml", &manifest(2));
    let path = path.to_str().unwrap();
    story.ok(&["apply", "-f", path]).await;
    story
        .ok(&[
            "-n",
            "shop",
            "rollout",
            "status",
            "deployment/web",
            "--timeout=30s",
        ])
        .await;
    story.write("web.yaml", &manifest(1));
    let diff = story.run(&["diff", "-f", path]).await;
    assert_eq!(
        diff.status.code(),
        Some(1),
        "{}",
        String::from_utf8_lossy(&diff.stderr)
    );
    assert!(String::from_utf8_lossy(&diff.stdout).contains("+  replicas: 1"));
    story.ok(&["apply", "-f", path]).await;
    story
        .ok(&["apply", "--server-side", "--force-conflicts", "-f", path])
        .await;
    assert!(
        story
            .ok(&["explain", "deployment.spec.replicas"])
            .await
            .contains("<integer>")
    );
    story
        .ok(&["delete", "namespace", "shop", "--wait", "--timeout=60s"])
        .await;
    let gone = story.run(&["-n", "shop", "get", "deployment", "web"]).await;
    assert!(!gone.status.success());
    story.cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_run_over_both_protocols() {
    let story = Story::begin().await;
    for websockets in ["true", "false"] {
        let exec = |arguments: &[&str]| {
            let mut command = story.command("kubeconfig", arguments);
            command.env("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", websockets);
            command
        };
        let output = Story::output(
            exec(&[
                "exec",
                "hello",
                "--",
                "sh",
                "-c",
                "echo out; echo err >&2; exit 7",
            ]),
            b"",
        )
        .await;
        assert_eq!(output.status.code(), Some(7));
        assert_eq!(output.stdout, b"out\n");
        assert!(
            output.stderr.starts_with(b"err\n"),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );

        let input: Vec<u8> = (0..4_000_000_u32)
            .map(|number| (number % 251) as u8)
            .collect();
        let output = Story::output(exec(&["exec", "-i", "hello", "--", "cat"]), &input).await;
        assert!(
            output.stdout == input,
            "{} bytes of {} came back",
            output.stdout.len(),
            input.len()
        );

        let missing = Story::output(exec(&["exec", "hello", "--", "no-such-program"]), b"").await;
        assert!(!missing.status.success());
    }
    story.cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ports_are_forwarded_over_both_protocols() {
    let story = Story::begin().await;
    let backend = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = backend.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut tcp, _)) = backend.accept().await {
            tokio::spawn(async move {
                let mut line = [0; 5];
                tcp.read_exact(&mut line).await.unwrap();
                tcp.write_all(&line.repeat(100_000)).await.unwrap();
            });
        }
    });
    for websockets in ["true", "false"] {
        let mut command = story.command(
            "kubeconfig",
            &["port-forward", "hello", &format!(":{port}")],
        );
        command.env("KUBECTL_PORT_FORWARD_WEBSOCKETS", websockets);
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let said = tokio::time::timeout(Duration::from_secs(20), lines.next_line())
            .await
            .unwrap()
            .unwrap()
            .unwrap();
        let local = said
            .split_whitespace()
            .find_map(|word| word.strip_prefix("127.0.0.1:"))
            .unwrap()
            .to_owned();
        for _ in 0..10 {
            let mut tcp = TcpStream::connect(format!("127.0.0.1:{local}"))
                .await
                .unwrap();
            tcp.write_all(b"ping\n").await.unwrap();
            let mut answer = Vec::new();
            tcp.read_to_end(&mut answer).await.unwrap();
            assert_eq!(answer, b"ping\n".repeat(100_000));
        }
        child.kill().await.unwrap();
    }
    story.cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn users_may_do_what_roles_say() {
    let story = Story::begin().await;
    story.write(
        "ann",
        &story.cluster.kubeconfig_for("ann", &["readers".to_owned()]),
    );
    let ann = |arguments: &[&str]| story.command("ann", arguments);
    let refused = Story::output(ann(&["get", "pods"]), b"").await;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("User \"ann\" cannot list resource \"pods\" in API group \"\" in the namespace \"default\""), "{said}");
    story
        .ok(&[
            "create",
            "rolebinding",
            "readers",
            "--clusterrole=view",
            "--group=readers",
        ])
        .await;
    assert!(
        Story::output(ann(&["get", "pods"]), b"")
            .await
            .status
            .success()
    );
    let exec = Story::output(ann(&["exec", "hello", "--", "true"]), b"").await;
    let said = String::from_utf8_lossy(&exec.stderr).into_owned();
    assert!(said.contains("pods \"hello\" is forbidden"), "{said}");
    assert!(
        !Story::output(ann(&["get", "pods", "--as=demo-admin"]), b"")
            .await
            .status
            .success()
    );
    let as_reader = ["get", "pods", "--as=bob", "--as-group=readers"];
    assert!(story.run(&as_reader).await.status.success());
    story.cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_left_after_the_end() {
    let story = Story::begin().await;
    let script = "sleep 1000 & first=$!; sleep 1000 & echo $first $!; wait";
    story
        .ok(&[
            "run",
            "two",
            "--image=busybox",
            "--restart=Never",
            "--",
            "sh",
            "-c",
            script,
        ])
        .await;
    story
        .eventually("the pod logs its processes", &["logs", "two"], "\n")
        .await;
    let pids: Vec<i32> = story
        .ok(&["logs", "two"])
        .await
        .split_whitespace()
        .map(|pid| pid.parse().unwrap())
        .collect();
    assert_eq!(pids.len(), 2);
    let directory = story.cluster.directory().to_owned();
    let lives = |pid: i32| {
        rustix::process::test_kill_process(rustix::process::Pid::from_raw(pid).unwrap()).is_ok()
    };
    assert!(pids.iter().all(|pid| lives(*pid)));
    story.cluster.stop().await;
    // The grandchild is reaped by the process that adopts orphans here, a moment later.
    for _ in 0..100 {
        if !pids.iter().any(|pid| lives(*pid) && !is_zombie(*pid)) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(
        !pids.iter().any(|pid| lives(*pid) && !is_zombie(*pid)),
        "a process is left: {pids:?}"
    );
    assert!(!directory.exists(), "the private directory is left");
}

fn is_zombie(pid: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z "))
}

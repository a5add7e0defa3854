//! Pods of the stories. Their commands need a POSIX shell and coreutils only, so they run in
//! busybox on a real cluster and on this machine in the demo cluster.

use std::time::Duration;

use anyhow::{Result, bail, ensure};
use serde_json::json;

use crate::kubectl::Kubectl;
use crate::upstream::Upstream;
use crate::{eventually, free_address, unique};

/// Does nothing, and ends at once when asked.
pub const IDLE: &str = "trap 'exit 0' TERM INT; while :; do sleep 1; done";

/// A pod that a story made; [`Pod::remove`] takes it away.
pub struct Pod {
    pub name: String,
    admin: Kubectl,
}

impl Pod {
    /// Starts a pod that runs this script, made directly (not through the line).
    pub async fn start(upstream: &Upstream, namespace: &str, script: &str) -> Result<Self> {
        Self::start_with(upstream, namespace, script, json!({})).await
    }

    /// The same with more fields for its container.
    pub async fn start_with(
        upstream: &Upstream,
        namespace: &str,
        script: &str,
        more: serde_json::Value,
    ) -> Result<Self> {
        let name = unique("pod-");
        let mut container = json!({
            "name": "main",
            "image": upstream.image(),
            "imagePullPolicy": "IfNotPresent",
            "command": ["sh", "-c", script],
        });
        for (field, value) in more.as_object().into_iter().flatten() {
            container[field] = value.clone();
        }
        let pod = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name},
            "spec": {
                "terminationGracePeriodSeconds": 1,
                "restartPolicy": "Never",
                "containers": [container],
            },
        });
        let admin = upstream.admin()?.namespace(namespace);
        // A new namespace's service account is made a moment after it.
        eventually(Duration::from_secs(30), "the pod is accepted", || async {
            admin
                .ok_with(&["create", "-f", "-"], pod.to_string().as_bytes())
                .await
        })
        .await?;
        let this = Self { name, admin };
        // A real node may have to fetch the image first.
        eventually(Duration::from_secs(150), "the pod runs", || async {
            let pod = this.admin.json(&["get", "pod", &this.name]).await?;
            let phase = pod["status"]["phase"].as_str().unwrap_or_default();
            ensure!(
                phase == "Running",
                "pod {} is {phase}: {}",
                this.name,
                pod["status"]
            );
            Ok(())
        })
        .await?;
        Ok(this)
    }

    pub async fn remove(&self) -> Result<()> {
        let arguments = [
            "delete",
            "pod",
            &self.name,
            "--wait=false",
            "--ignore-not-found",
        ];
        self.admin.ok(&arguments).await?;
        Ok(())
    }
}

/// A pod that serves `file`, and its first 64 KiB as `small`, over HTTP.
pub struct FileServer {
    pub pod: Pod,
    pub port: u16,
    /// Their SHA-256.
    pub file: String,
    pub small: String,
}

/// For port-forwards: with busybox's httpd where the image has it, with Python on this machine.
pub async fn file_server(upstream: &Upstream, namespace: &str, mib: usize) -> Result<FileServer> {
    // In the demo cluster all pods share this machine's ports.
    let port = free_address()?.port();
    // The checksum is printed once the port is open: busybox's httpd goes to the background then.
    let script = format!(
        "mkdir -p www && head -c {} /dev/urandom > www/file || exit 1
         head -c 65536 www/file > www/small || exit 1
         sum=$(sha256sum www/file www/small)
         served() {{ echo \"$sum\"; {IDLE}; }}
         if command -v httpd >/dev/null 2>&1; then httpd -p {port} -h www && served; exit 1; fi
         if command -v busybox >/dev/null 2>&1 && busybox httpd --help >/dev/null 2>&1; then
             busybox httpd -p {port} -h www && served; exit 1
         fi
         cd www && exec python3 -c '
import http.server as h, sys
class H(h.SimpleHTTPRequestHandler):
    def log_message(self, *a): pass
class S(h.ThreadingHTTPServer):
    request_queue_size = 512
server = S((\"127.0.0.1\", {port}), H)
print(sys.argv[1], flush=True)
server.serve_forever()' \"$sum\"",
        mib * 1024 * 1024
    );
    let pod = Pod::start(upstream, namespace, &script).await?;
    // Random bytes are drawn and summed at a few MiB a second where all else runs too.
    let patience = Duration::from_secs(60 + mib as u64 / 4);
    let (file, small) = eventually(patience, "the file is made", || async {
        let log = pod.admin.ok(&["logs", &pod.name]).await?;
        let sums = log.split_whitespace().step_by(2);
        match sums.collect::<Vec<_>>()[..] {
            [file, small] if small.len() == 64 => Ok((file.to_owned(), small.to_owned())),
            _ => bail!("no checksums yet: {log:?}"),
        }
    })
    .await?;
    Ok(FileServer {
        pod,
        port,
        file,
        small,
    })
}

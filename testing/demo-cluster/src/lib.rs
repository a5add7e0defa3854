//! A small Kubernetes API server in one process, for people without a cluster and for tests.
//!
//! It is a test double: it speaks the API as kubectl uses it, keeps everything in memory and
//! runs pods as processes of the local machine. Where it and a real API server differ, the real
//! one is right.

#![warn(clippy::mod_module_files)]

mod access;
mod api;
mod controller;
mod json;
mod kinds;
mod logs;
mod patch;
mod pki;
mod rbac;
mod request;
mod runtime;
mod schema;
mod seed;
mod selectors;
mod server;
mod status;
mod store;
mod stream;
mod table;
mod validate;

use std::{
    io,
    net::SocketAddr,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::net::TcpListener;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Why the demo cluster could not be started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The listener's address cannot be read.
    #[error("the listener has no local address")]
    Listener(#[source] io::Error),
    /// The private directory cannot be made where the caller asked for it.
    #[error("cannot make a private directory in {path}")]
    Directory {
        /// The directory which the caller named.
        path: PathBuf,
        /// The error of the file system.
        source: io::Error,
    },
    /// Our own certificates cannot be made: a fault of this program.
    #[error("cannot make the cluster's certificates: {0}")]
    Certificates(String),
}

/// Knobs of the demo cluster.
#[derive(Clone, Debug)]
pub struct Options {
    /// Bytes of output kept for each container, on disk, in the private directory. Default
    /// 2 GiB, so that a gigabyte of logs can be read back; worst case that many bytes a pod.
    pub log_bytes: u64,
    /// Changes remembered for watches that resume; older ones get 410 Gone. Default 4,096;
    /// worst case as many copies of the largest object (3 MiB).
    pub history: usize,
    /// Time between bookmarks of a watch that asked for them. Default 60 s, as the API server's.
    pub bookmark_interval: Duration,
    /// Whether the pod `hello` is started. Default true.
    pub hello: bool,
    /// Whether constrained impersonation (KEP-5284) is known, as by default since 1.36. Default true.
    pub constrained_impersonation: bool,
    /// Bytes of an exec's or attach's output that wait for its client as in the sockets between container
    /// runtime, kubelet and API server, and are lost as there: once the command has ended, the first byte
    /// that its client sends is answered by a reset, which takes along what still waits. Default none: a
    /// command waits for its client, and nothing is lost. Worst case that many bytes a command.
    pub lossy_sockets: Option<usize>,
    /// The answer at `/version`.
    pub version: String,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            log_bytes: 2 << 30,
            history: 4096,
            bookmark_interval: Duration::from_secs(60),
            hello: true,
            constrained_impersonation: true,
            lossy_sockets: None,
            version: "v1.36.2-throwline-demo".to_owned(),
        }
    }
}

/// A running demo cluster. [`DemoCluster::stop`] ends it and waits for the end; a drop ends it
/// without waiting.
pub struct DemoCluster {
    cluster: Arc<Cluster>,
    address: SocketAddr,
    tasks: TaskTracker,
    admin: pki::ClientPair,
    directory: tempfile::TempDir,
}

/// What every request needs, shared by all of them.
pub(crate) struct Cluster {
    pub(crate) options: Options,
    pub(crate) store: store::Store,
    pub(crate) pki: pki::Pki,
    pub(crate) tokens: access::Tokens,
    pub(crate) older: access::Older,
    pub(crate) runtime: runtime::Runtime,
    pub(crate) stop: CancellationToken,
    pub(crate) tasks: TaskTracker,
}

impl DemoCluster {
    /// Starts the cluster on `listener`, with its files in a private directory made inside `dir`.
    pub async fn start(listener: TcpListener, dir: &Path, options: Options) -> Result<Self, Error> {
        let address = listener.local_addr().map_err(Error::Listener)?;
        let directory = tempfile::Builder::new()
            .prefix("demo-cluster-")
            .permissions(std::fs::Permissions::from_mode(0o700))
            .tempdir_in(dir)
            .map_err(|source| Error::Directory {
                path: dir.to_owned(),
                source,
            })?;
        let pki = pki::Pki::new(address.ip())?;
        let admin = pki.client(
            "demo-admin",
            &["system:masters".to_owned(), "demo:admins".to_owned()],
        )?;
        let tls = pki.server_config()?;
        let tasks = TaskTracker::new();
        let stop = CancellationToken::new();
        let cluster = Arc::new(Cluster {
            store: store::Store::new(options.history),
            pki,
            tokens: access::Tokens::default(),
            older: access::Older::default(),
            runtime: runtime::Runtime::new(directory.path().join("pods"), options.log_bytes),
            stop: stop.clone(),
            tasks: tasks.clone(),
            options,
        });
        seed::seed(&cluster, address);
        tasks.spawn(controller::run(Arc::clone(&cluster)));
        tasks.spawn(runtime::run(Arc::clone(&cluster)));
        tasks.spawn(server::run(Arc::clone(&cluster), listener, tls));
        Ok(Self {
            cluster,
            address,
            tasks,
            admin,
            directory,
        })
    }

    /// The kubeconfig of `demo-admin` (groups `system:masters`, `demo:admins`), all data embedded.
    pub fn kubeconfig(&self) -> String {
        self.render(
            "demo-admin",
            &format!(
                "    client-certificate-data: {}\n    client-key-data: {}\n",
                pki::base64(self.admin.certificate_pem.as_bytes()),
                pki::base64(self.admin.key_pem.as_bytes())
            ),
        )
    }

    /// A kubeconfig of another user, who proves itself with a bearer token.
    pub fn kubeconfig_for(&self, user: &str, groups: &[String]) -> String {
        let token = self.token_for(user, groups);
        self.render("demo-user", &format!("    token: {token}\n"))
    }

    /// A bearer token of that user and those groups, good for as long as the cluster runs.
    pub fn token_for(&self, user: &str, groups: &[String]) -> String {
        self.cluster.tokens.issue(access::User::named(user, groups))
    }

    /// Where the API server listens, as `https://IP:PORT`.
    pub fn url(&self) -> String {
        format!("https://{}", self.address)
    }

    /// The CA that signed the server's and the clients' certificates.
    pub fn ca_pem(&self) -> &str {
        self.cluster.pki.ca_pem()
    }

    /// The directory which holds everything that the cluster writes.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Ends every connection and every process, and removes the private directory.
    pub async fn stop(self) {
        self.cluster.stop.cancel();
        self.cluster.runtime.kill_all().await;
        self.tasks.close();
        self.tasks.wait().await;
        // The directory goes with `self`; its processes have been waited for.
    }

    fn render(&self, user: &str, credentials: &str) -> String {
        format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: demo\nclusters:\n- name: demo\n  cluster:\n    server: {url}\n    \
             certificate-authority-data: {ca}\nusers:\n- name: {user}\n  user:\n{credentials}contexts:\n- name: demo\n  context:\n    \
             cluster: demo\n    user: {user}\n",
            url = self.url(),
            ca = pki::base64(self.ca_pem().as_bytes()),
        )
    }
}

impl Drop for DemoCluster {
    fn drop(&mut self) {
        self.cluster.stop.cancel();
        self.cluster.runtime.kill_now();
    }
}

//! A small Kubernetes API server in one process, for people without a cluster and for tests.
use std::{io, path::{Path, PathBuf}, time::Duration};
use tokio::net::TcpListener;

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
        /// What the file system said.
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
    /// What `/version` says.
    pub version: String,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            log_bytes: 2 << 30,
            history: 4096,
            bookmark_interval: Duration::from_secs(60),
            hello: true,
            version: "v1.36.2-throwline-demo".to_owned(),
        }
    }
}


pub struct DemoCluster;
impl DemoCluster {
    pub async fn start(_l: TcpListener, _d: &Path, _o: Options) -> Result<Self, Error> { unimplemented!() }
    pub fn kubeconfig(&self) -> String { unimplemented!() }
    pub fn kubeconfig_for(&self, _user: &str, _groups: &[String]) -> String { unimplemented!() }
    pub fn token_for(&self, _user: &str, _groups: &[String]) -> String { unimplemented!() }
    pub fn url(&self) -> String { unimplemented!() }
    pub fn ca_pem(&self) -> &str { unimplemented!() }
    pub fn directory(&self) -> &Path { unimplemented!() }
    pub async fn stop(self) {}
}

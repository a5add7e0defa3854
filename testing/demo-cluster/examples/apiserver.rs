//! Starts the demo cluster, prints the path of its kubeconfig and stays until Ctrl-C.

use throwline_demo_cluster::{DemoCluster, Options};
use tokio::net::TcpListener;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let port: u16 = std::env::args().nth(1).map_or(Ok(0), |port| port.parse())?;
    let listener = TcpListener::bind(("127.0.0.1", port)).await?;
    let dir = tempfile::tempdir()?;
    let cluster = DemoCluster::start(listener, dir.path(), Options::default()).await?;
    let kubeconfig = dir.path().join("kubeconfig");
    std::fs::write(&kubeconfig, cluster.kubeconfig())?;
    println!("{}", kubeconfig.display());
    tokio::signal::ctrl_c().await?;
    cluster.stop().await;
    Ok(())
}

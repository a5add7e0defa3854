//! A request through everything: local proxy, relay, agent and the demo cluster in this process,
//! over loopback sockets. Unlike the side-by-side bench it needs no other program, so a profiler
//! sees all of the parts at once.

#![expect(
    clippy::unwrap_used,
    reason = "a bench that cannot run fails by panicking"
)]

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use http::{Request, header};
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use throwline_agent::{Audit, ClusterAccess};
use throwline_authority::{Authority, Subject};
use throwline_certs::tls::Trust;
use throwline_demo_cluster::{DemoCluster, Options};
use throwline_e2e::client::Target;
use throwline_e2e::eventually;
use throwline_local_proxy::{Outbound, Store};
use throwline_ops::{Shutdown, ShutdownTrigger};
use throwline_tunnel::carrier::Proxies;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use url::Url;

const CLUSTER: &str = "bench";
const USER: &str = "bench";
const GROUP: &str = "demo:admins";

/// What ends with it.
struct Parts {
    target: Target,
    _cluster: DemoCluster,
    _stop: Vec<ShutdownTrigger>,
    _dir: tempfile::TempDir,
}

async fn start() -> Parts {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let cluster = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let cluster = DemoCluster::start(cluster, dir.path(), Options::default());
    let cluster = cluster.await.unwrap();
    std::fs::write(at("cluster.kubeconfig"), cluster.kubeconfig()).unwrap();

    let mut stop = Vec::new();
    let mut part = || {
        let (trigger, shutdown) = Shutdown::new();
        stop.push(trigger);
        shutdown
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url: Url = format!("https://{}", listener.local_addr().unwrap())
        .parse()
        .unwrap();
    let authority = Authority::open_or_create(&at("relay"), &url).await.unwrap();
    authority.set_relay_url(&url).await.unwrap();
    let life = Duration::from_secs(600);
    let agent = Subject::Cluster(CLUSTER.to_owned());
    let agent = authority.create_token(&agent, life, &url).await.unwrap();
    let user = Subject::User {
        name: USER.to_owned(),
        groups: vec![GROUP.to_owned()],
    };
    let user = authority.create_token(&user, life, &url).await.unwrap();
    let config = throwline_relay::Config::new(url, throwline_relay::Tls::Own);
    tokio::spawn(throwline_relay::run(
        listener,
        None,
        Arc::new(authority),
        config,
        part(),
    ));

    let access = ClusterAccess::Kubeconfig(at("cluster.kubeconfig"));
    let uid = throwline_agent::cluster_uid(access.clone()).await.unwrap();
    let (trust, proxies) = (Trust::default(), Proxies::none());
    throwline_agent::enrol(&agent, &at("agent"), &uid, trust, &proxies)
        .await
        .unwrap();
    let mut config = throwline_agent::Config::load(&at("agent"), access).unwrap();
    config.audit = Audit::Off;
    tokio::spawn(throwline_agent::run(config, None, part()));

    let store = Store::new(at("user"));
    throwline_local_proxy::login(&user, &store, &Outbound::default())
        .await
        .unwrap();
    let mut config = throwline_local_proxy::Config::new(store.dir());
    config.clusters = vec![CLUSTER.to_owned()];
    config.port = Some(0);
    let kubeconfig = at("kubeconfig");
    config.kubeconfig = Some(throwline_local_proxy::kubeconfig::Files::one(&kubeconfig));
    let (ready, is_ready) = oneshot::channel();
    tokio::spawn(throwline_local_proxy::run(config, ready, part()));
    is_ready.await.unwrap();
    Parts {
        target: answering(&kubeconfig).await,
        _cluster: cluster,
        _stop: stop,
        _dir: dir,
    }
}

/// Waits until the agent is connected, too.
async fn answering(kubeconfig: &Path) -> Target {
    let target = Target::read(kubeconfig, &format!("throwline-{CLUSTER}")).unwrap();
    let answers = || async {
        let (status, text) = target.get("/version", &["Connection: close"]).await?;
        anyhow::ensure!(status == 200, "{text}");
        Ok(())
    };
    eventually(Duration::from_secs(30), "an answer", answers)
        .await
        .unwrap();
    target
}

async fn connect(target: &Target) -> SendRequest<Empty<Bytes>> {
    let tls = target.connect(&[b"http/1.1"]).await.unwrap();
    let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(tls))
        .await
        .unwrap();
    tokio::spawn(connection);
    sender
}

async fn get(target: &Target, sender: &mut SendRequest<Empty<Bytes>>, path: &str) {
    let request = Request::get(format!("{}{path}", target.prefix))
        .header(header::HOST, &target.address)
        .body(Empty::new())
        .unwrap();
    sender.ready().await.unwrap();
    let response = sender.send_request(request).await.unwrap();
    assert!(response.status().is_success(), "{}", response.status());
    response.into_body().collect().await.unwrap();
}

fn requests(criterion: &mut Criterion) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let parts = runtime.block_on(start());
    let target = &parts.target;
    let mut group = criterion.benchmark_group("request");
    group.throughput(Throughput::Elements(1));
    for (name, path) in [
        ("small GET, kept connection", "/version"),
        ("discovery of the core group", "/api/v1"),
    ] {
        group.bench_function(name, |bencher| {
            bencher.iter_custom(|iterations| {
                runtime.block_on(async {
                    let mut sender = connect(target).await;
                    get(target, &mut sender, path).await;
                    let began = Instant::now();
                    for _ in 0..iterations {
                        get(target, &mut sender, path).await;
                    }
                    began.elapsed()
                })
            });
        });
    }
    group.bench_function("small GET, new TCP and TLS each", |bencher| {
        bencher.iter_custom(|iterations| {
            runtime.block_on(async {
                let began = Instant::now();
                for _ in 0..iterations {
                    let mut sender = connect(target).await;
                    get(target, &mut sender, "/version").await;
                }
                began.elapsed()
            })
        });
    });
    group.finish();
    // Nothing is to be waited for: it all ends with the process.
    drop(parts);
    runtime.shutdown_background();
}

criterion_group!(whole, requests);
criterion_main!(whole);

//! The pieces, each on its own: what a byte and a small message cost in it, without a network.
//!
//! A figure is of both ends together, on one thread, over an in-memory pipe. Run by
//! `cargo bench --workspace --bench pieces`; behind `--`, a name such as `line` chooses one of them.

#![expect(
    clippy::unwrap_used,
    reason = "a bench that cannot run fails by panicking"
)]

use std::hint::black_box;
use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use bytes::Bytes;
use criterion::measurement::WallTime;
use criterion::{
    BatchSize, BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main,
};
use rustls::pki_types::{PrivatePkcs8KeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, NamedGroup, RootCertStore, ServerConfig};
use throwline_local_proxy::kubeconfig::{self, Entry, Files, Owner};
use throwline_tunnel::carrier::{self, AcceptConfig, Connection, DialConfig, Prover};
use throwline_tunnel::line::{self, Line, LineBudgets};
use throwline_tunnel::proto::messages::{LineHello, LineKind, Open, Role, StreamReply};
use throwline_tunnel::splice::{self, Meter};
use throwline_tunnel::{mux, ws};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio::runtime::Runtime;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tokio_util::compat::{FuturesAsyncReadCompatExt, FuturesAsyncWriteCompatExt};

/// What passes in one iteration of a bulk figure.
const BULK: usize = 1 << 20;
/// Written at once.
const PIECE: usize = 16 * 1024;
/// As a small request or a keystroke.
const SMALL: usize = 64;
/// What a pipe between two parts holds.
const PIPE: usize = 256 * 1024;

fn one_thread() -> Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

/// Times `BULK` bytes from `writer` to `reader`.
fn bulk<W, R>(
    group: &mut BenchmarkGroup<'_, WallTime>,
    name: &str,
    runtime: &Runtime,
    writer: W,
    reader: R,
) where
    W: AsyncWrite + Unpin,
    R: AsyncRead + Unpin,
{
    bulk_flushed_by(group, name, runtime, writer, reader, async |writer| {
        writer.flush().await
    });
}

/// The same where something else than the writer flushes.
fn bulk_flushed_by<W, R>(
    group: &mut BenchmarkGroup<'_, WallTime>,
    name: &str,
    runtime: &Runtime,
    mut writer: W,
    mut reader: R,
    flush: impl AsyncFn(&mut W) -> io::Result<()>,
) where
    W: AsyncWrite + Unpin,
    R: AsyncRead + Unpin,
{
    group.throughput(Throughput::Bytes(BULK as u64));
    let (piece, mut got) = (vec![7; PIECE], vec![0; BULK]);
    group.bench_function(BenchmarkId::new(name, "1 MiB"), |bencher| {
        bencher.iter_custom(|iterations| {
            runtime.block_on(async {
                let began = Instant::now();
                for _ in 0..iterations {
                    let write = async {
                        for _ in 0..BULK / PIECE {
                            writer.write_all(&piece).await.unwrap();
                        }
                        flush(&mut writer).await.unwrap();
                    };
                    let ((), read) = tokio::join!(write, reader.read_exact(&mut got));
                    read.unwrap();
                    black_box(&got);
                }
                began.elapsed()
            })
        });
    });
}

/// Times a small message there and its echo back.
fn round_trip<A, B>(
    group: &mut BenchmarkGroup<'_, WallTime>,
    name: &str,
    runtime: &Runtime,
    mut near: A,
    mut far: B,
) where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    group.throughput(Throughput::Elements(1));
    group.bench_function(BenchmarkId::new(name, "64 B round trip"), |bencher| {
        bencher.iter_custom(|iterations| {
            runtime.block_on(async {
                let began = Instant::now();
                for _ in 0..iterations {
                    let (sent, mut echoed) = ([7; SMALL], [0; SMALL]);
                    let ask = async {
                        near.write_all(&sent).await.unwrap();
                        near.flush().await.unwrap();
                        near.read_exact(&mut echoed).await.unwrap();
                    };
                    let echo = async {
                        let mut buffer = [0; SMALL];
                        far.read_exact(&mut buffer).await.unwrap();
                        far.write_all(&buffer).await.unwrap();
                        far.flush().await.unwrap();
                    };
                    tokio::join!(ask, echo);
                    black_box(echoed);
                }
                began.elapsed()
            })
        });
    });
}

fn splicing(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("splice");
    let runtime = one_thread();
    let spliced = || {
        let (near, a) = tokio::io::duplex(PIPE);
        let (b, far) = tokio::io::duplex(PIPE);
        runtime.spawn(async move {
            let (config, meter) = (splice::Config::default(), Meter::default());
            splice::splice(a, b, &config, &meter).await
        });
        (near, far)
    };
    let (near, far) = spliced();
    bulk(&mut group, "two pipes", &runtime, near, far);
    let (near, far) = spliced();
    round_trip(&mut group, "two pipes", &runtime, near, far);
}

async fn lines() -> (Line<DuplexStream>, Line<DuplexStream>) {
    let (a, b) = tokio::io::duplex(PIPE);
    let resumable = Duration::from_secs(120);
    let hello = LineHello::new([9; 16], resumable);
    let (opened, accepted) = tokio::join!(
        line::connect(a, hello, LineBudgets::default()),
        line::accept(b, resumable, LineBudgets::default())
    );
    (opened.unwrap(), accepted.unwrap().into_new().unwrap())
}

fn line(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("line");
    let runtime = one_thread();
    let (near, far) = runtime.block_on(lines());
    let ((_hears, writer), (reader, _says)) = (tokio::io::split(near), tokio::io::split(far));
    bulk(&mut group, "a pipe", &runtime, writer, reader);
    let (near, far) = runtime.block_on(lines());
    round_trip(&mut group, "a pipe", &runtime, near, far);
}

fn websocket(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("ws");
    let runtime = one_thread();
    let (a, b) = tokio::io::duplex(PIPE);
    let config = ws::Config::default();
    let ((writer, driver), (reader, _driver)) = runtime.block_on(async {
        tokio::join!(
            ws::wrap(a, Bytes::new(), ws::Side::Client, &config),
            ws::wrap(b, Bytes::new(), ws::Side::Server, &config)
        )
    });
    let (writer, reader) = (writer.compat_write(), reader.compat());
    let name = "masked, to a relay";
    bulk_flushed_by(&mut group, name, &runtime, writer, reader, async |_| {
        driver.flush().await
    });
}

/// Two ends of a carrier on which both sides believe one another.
async fn carriers() -> (Connection, Connection) {
    let prover = Prover {
        assertion: Box::new(|claims| Ok(format!("assertion-of-{}", claims.sub))),
        sign: Box::new(|transcript| Ok(transcript.to_vec())),
        sha256: |_| [7; 32],
        id: "spiffe://bench/cluster/c".to_owned(),
    };
    let relay = "http://localhost".parse().unwrap();
    let dial = DialConfig::new(relay, None, Arc::new(prover), Role::Agent, "bench");
    let (dialer, acceptor) = tokio::io::duplex(PIPE);
    let (dialled, accepted) = tokio::join!(
        carrier::dial_over(dialer, &dial),
        carrier::accept(acceptor, AcceptConfig::new("bench"), |_, _| Ok(()))
    );
    (dialled.unwrap(), accepted.unwrap().0)
}

/// A stream that the relay has opened to an agent: both ends.
async fn stream(agent: &mut Connection, relay: &Connection) -> (mux::Stream, mux::Stream) {
    let open = Open {
        version: 1,
        cluster: "c".to_owned(),
        line_id: vec![0; 16],
        kind: LineKind::Api.into(),
        ..Open::default()
    };
    let (opened, accepted) = tokio::join!(relay.carrier.open(open.into()), async {
        let incoming = agent.incoming.next().await.unwrap();
        incoming.accept(StreamReply::accepted()).await.unwrap()
    });
    (opened.unwrap().0, accepted)
}

fn multiplexer(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("mux");
    let runtime = one_thread();
    let (mut agent, relay) = runtime.block_on(carriers());
    let (near, far) = runtime.block_on(stream(&mut agent, &relay));
    bulk(&mut group, "to an agent", &runtime, near, far);
    let (near, far) = runtime.block_on(stream(&mut agent, &relay));
    bulk(&mut group, "to a relay", &runtime, far, near);
    let (near, far) = runtime.block_on(stream(&mut agent, &relay));
    round_trip(&mut group, "a stream", &runtime, near, far);
    group.throughput(Throughput::Elements(1));
    group.bench_function(BenchmarkId::new("a stream", "open"), |bencher| {
        bencher.iter_custom(|iterations| {
            runtime.block_on(async {
                let began = Instant::now();
                for _ in 0..iterations {
                    black_box(stream(&mut agent, &relay).await);
                }
                began.elapsed()
            })
        });
    });
}

/// Both ends of a handshake with certificates on both sides, as a session's, by one key exchange.
fn handshakers(group: NamedGroup) -> (TlsConnector, TlsAcceptor) {
    let mut provider = Arc::unwrap_or_clone(throwline_certs::tls::provider());
    provider.kx_groups.retain(|each| each.name() == group);
    let provider = Arc::new(provider);
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let chain = || vec![made.cert.der().clone()];
    let key = || PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()).into();
    let mut roots = RootCertStore::empty();
    roots.add(made.cert.der().clone()).unwrap();
    let roots = Arc::new(roots);
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
            .build()
            .unwrap();
    let mut server = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain(), key())
        .unwrap();
    server.send_tls13_tickets = 0;
    let mut client = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(chain(), key())
        .unwrap();
    client.resumption = rustls::client::Resumption::disabled();
    (Arc::new(client).into(), Arc::new(server).into())
}

/// What X25519MLKEM768, our key exchange, costs beside the one before it.
fn handshake(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("handshake");
    let runtime = one_thread();
    group.throughput(Throughput::Elements(1));
    for kx in [NamedGroup::X25519, NamedGroup::X25519MLKEM768] {
        let (connector, acceptor) = handshakers(kx);
        let name = ServerName::try_from("localhost").unwrap();
        group.bench_function(format!("{kx:?}"), |bencher| {
            bencher.iter_custom(|iterations| {
                runtime.block_on(async {
                    let began = Instant::now();
                    for _ in 0..iterations {
                        let (near, far) = tokio::io::duplex(PIPE);
                        let (near, far) = tokio::join!(
                            connector.connect(name.clone(), near),
                            acceptor.accept(far)
                        );
                        black_box((near.unwrap(), far.unwrap()));
                    }
                    began.elapsed()
                })
            });
        });
    }
}

/// Clusters as a relay lists them, merged into a kubeconfig: into a new file, and into one that has them all.
/// Both with the files read, locked, checked and written.
fn kubeconfig_merge(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("kubeconfig merge");
    group.sample_size(10);
    let owner = Owner {
        relay: "https://relay.example.com/".to_owned(),
        user: "dana".to_owned(),
    };
    let go_on = AtomicBool::new(false);
    for count in [100_usize, 1_000, 10_000] {
        let entries: Vec<_> = (0..count)
            .map(|at| Entry {
                name: format!("cluster-{at}"),
                server: format!("https://127.0.0.1:47611/clusters/cluster-{at}"),
                certificate_authority: "/state/loopback-ca.pem".into(),
                client_certificate: "/state/loopback-client.pem".into(),
                client_key: "/state/loopback-client-key.pem".into(),
            })
            .collect();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config");
        let files = Files::one(&path);
        let merge = || kubeconfig::write(&files, &owner, &entries, false, &go_on).unwrap();
        group.throughput(Throughput::Elements(count as u64));
        group.bench_function(BenchmarkId::new("new file", count), |bencher| {
            bencher.iter_batched(
                || drop(std::fs::remove_file(&path)),
                |()| black_box(merge()),
                BatchSize::PerIteration,
            );
        });
        merge();
        group.bench_function(BenchmarkId::new("nothing to change", count), |bencher| {
            bencher.iter(|| black_box(merge()));
        });
    }
}

criterion_group!(
    pieces,
    splicing,
    line,
    websocket,
    multiplexer,
    handshake,
    kubeconfig_merge
);
criterion_main!(pieces);

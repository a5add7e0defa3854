//! One user's requests are not an outage for the others.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use http::Response;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper_util::rt::{TokioExecutor, TokioIo};
use throwline_agent::Limits;
use throwline_agent::audit::Audit;
use throwline_agent::session::Protocol;

use super::support::{Agent, ApiServer, Body, eventually, full, get, text, within};

/// Watches that never say anything, and small answers to everything else.
async fn watched() -> ApiServer {
    ApiServer::start(&[b"h2"], |seen| {
        Box::pin(async move {
            let body: Body = match seen.path.contains("watch=true") {
                true => StreamBody::new(futures::stream::pending()).boxed_unsync(),
                false => full("small"),
            };
            Response::new(body)
        })
    })
    .await
}

fn limits(requests: usize, per_user: usize) -> Limits {
    let mut limits = Limits::default();
    limits.quotas.requests = requests;
    limits.quotas.requests_per_user = per_user;
    limits
}

#[tokio::test]
async fn a_user_with_too_many_watches_is_told_so_and_others_go_on() {
    let server = watched().await;
    let jane = Agent::with(server.kubeconfig.clone(), Audit::Off, limits(8, 4)).await;
    let ben = jane.of("ben");
    let (mut of_jane, mut of_ben) = (jane.http2().await, ben.http2().await);
    let mut watches = Vec::new();
    for _ in 0..4 {
        let watch = within(of_jane.send_request(get("/api/v1/pods?watch=true"))).await;
        watches.push(watch.unwrap());
    }
    // Another session of the same user does not help.
    let mut again = jane.http2().await;
    for session in [&mut of_jane, &mut again] {
        let refused = within(session.send_request(get("/api/v1/pods")))
            .await
            .unwrap();
        assert_eq!(refused.status(), 429);
        assert_eq!(refused.headers()["retry-after"], "1");
        let status = text(refused).await;
        assert!(status.contains("TooManyRequests"), "{status}");
        assert!(
            status.contains("4 requests and watches") && status.contains("--max-requests-per-user"),
            "{status}"
        );
    }
    let answer = within(of_ben.send_request(get("/api/v1/pods")))
        .await
        .unwrap();
    assert_eq!(answer.status(), 200);
    assert_eq!(text(answer).await, "small");
    // A watch that ends makes room.
    watches.pop();
    let mut answered = 0;
    within(async {
        while answered != 200 {
            let answer = of_jane.send_request(get("/api/v1/pods")).await.unwrap();
            answered = answer.status().as_u16();
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    drop(watches);
}

#[tokio::test]
async fn many_greedy_users_leave_the_reserve_to_others() {
    let server = watched().await;
    let agent = Agent::with(server.kubeconfig.clone(), Audit::Off, limits(16, 8)).await;
    let (mut watches, mut users) = (Vec::new(), Vec::new());
    for name in ["one", "two", "three"] {
        let user = agent.of(name);
        let mut session = user.http2().await;
        users.push(user);
        loop {
            let watch = within(session.send_request(get("/api/v1/pods?watch=true")))
                .await
                .unwrap();
            if watch.status() == 429 {
                break;
            }
            watches.push((session.clone(), watch));
        }
    }
    assert_eq!(watches.len(), 8 + 4 + 1);
    for name in ["anna", "ben", "cleo"] {
        let user = agent.of(name);
        let mut session = user.http2().await;
        users.push(user);
        let answer = within(session.send_request(get("/api/v1/pods?watch=true")))
            .await
            .unwrap();
        assert_eq!(answer.status(), 200, "{name}");
        watches.push((session, answer));
    }
}

/// An API server whose every answer has no end; how many bytes of all of them were taken.
async fn endless() -> (ApiServer, Arc<AtomicUsize>) {
    const PIECE: usize = 16 * 1024;
    let taken = Arc::<AtomicUsize>::default();
    let counted = taken.clone();
    let server = ApiServer::start(&[b"h2"], move |_| {
        let counted = counted.clone();
        Box::pin(async move {
            let pieces =
                futures::stream::repeat(Bytes::from_static(&[7; PIECE])).map(move |piece| {
                    counted.fetch_add(PIECE, Ordering::Relaxed);
                    Ok(Frame::data(piece))
                });
            Response::new(StreamBody::new(pieces).boxed_unsync())
        })
    })
    .await;
    (server, taken)
}

/// Answers without a reader, on one session whose windows are wide open.
async fn unread(agent: &Agent, count: usize) -> Vec<Response<Incoming>> {
    let io = TokioIo::new(agent.session(Protocol::Http2));
    let (mut sender, connection) = hyper::client::conn::http2::Builder::new(TokioExecutor::new())
        .initial_stream_window_size(16 << 20)
        .initial_connection_window_size(512 << 20)
        .handshake(io)
        .await
        .unwrap();
    let driving = tokio::spawn(connection);
    let mut answers = Vec::new();
    for _ in 0..count {
        answers.push(
            within(sender.send_request(get("/api/v1/pods")))
                .await
                .unwrap(),
        );
    }
    // From now on the client is stopped, as by SIGSTOP.
    driving.abort();
    answers
}

/// Waits until the API server is asked for no more.
async fn settled(taken: &AtomicUsize) -> usize {
    let mut before = usize::MAX;
    eventually(|| {
        let now = taken.load(Ordering::Relaxed);
        let is_settled = now == before && now > 0;
        before = now;
        std::thread::sleep(Duration::from_millis(20));
        is_settled
    })
    .await;
    before
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_user_gets_an_answer_beside_many_that_nobody_reads() {
    let (server, taken) = endless().await;
    let mut limits = limits(256, 64);
    limits.quotas.memory_per_user = 1 << 20;
    let jane = Agent::with(server.kubeconfig.clone(), Audit::Off, limits).await;
    let answers = unread(&jane, 32).await;
    settled(&taken).await;
    let ben = jane.of("ben");
    let mut session = ben.http2().await;
    let mut answer = within(session.send_request(get("/api/v1/pods")))
        .await
        .unwrap();
    let mut read = 0;
    while read < 8 << 20 {
        let frame = within(answer.body_mut().frame()).await.unwrap().unwrap();
        read += frame.into_data().map_or(0, |data| data.len());
    }
    drop(answers);
}

//! What the agent does about a decision: denies, and ends what a permission no longer covers.

use std::time::{Duration, SystemTime};

use http::Response;
use http_body_util::BodyExt;
use throwline_policy::{Access, Obligation, PolicySet};

use super::support::{Agent, ApiServer, fed, full, get, text, within};
use super::upgrades::{EXEC, SWITCH, scripted};

fn ending_soon() -> PolicySet {
    let mut set = PolicySet::default();
    set.until = Some(SystemTime::now() + Duration::from_millis(300));
    set
}

#[tokio::test]
async fn what_is_denied_does_not_reach_the_api_server() {
    let mut recorded = PolicySet::default();
    recorded.obligations.push(Obligation::Record);
    let mut ended = PolicySet::default();
    ended.until = Some(SystemTime::UNIX_EPOCH);
    for (set, why) in [
        (PolicySet::of(Access::Closed), "may not reach the cluster"),
        (recorded, "does not record"),
        (ended, "have ended"),
    ] {
        let server = ApiServer::start(&[b"h2"], |_| {
            Box::pin(async { Response::new(full("pods")) })
        })
        .await;
        let agent = Agent::before(server.kubeconfig.clone()).await.under(set);
        let mut user = agent.http2().await;
        let response = within(user.send_request(get("/api/v1/pods")))
            .await
            .unwrap();
        assert_eq!(response.status(), 403);
        let answer = text(response).await;
        assert!(answer.contains(why), "{answer}");
        assert!(
            agent
                .raw(EXEC.as_bytes())
                .await
                .starts_with("HTTP/1.1 403 ")
        );
        assert!(server.seen().is_empty());
    }
}

#[tokio::test]
async fn a_watch_is_cut_at_the_end_of_its_permission_and_not_before() {
    let (feed, body) = fed();
    let body = std::sync::Mutex::new(Some(body));
    let server = ApiServer::start(&[b"h2"], move |_| {
        let body = body.lock().unwrap().take().unwrap_or_else(|| full("later"));
        Box::pin(async move { Response::new(body) })
    })
    .await;
    let agent = Agent::before(server.kubeconfig.clone()).await;
    let agent = agent.under(ending_soon());
    let mut user = agent.http2().await;
    let response = within(user.send_request(get("/api/v1/pods?watch=1"))).await;
    let mut body = response.unwrap().into_body();
    feed.send(Ok("event".into())).await.unwrap();
    let frame = within(body.frame()).await.unwrap().unwrap();
    assert_eq!(frame.into_data().unwrap(), "event");
    let end = within(body.frame()).await.expect("not a clean end");
    assert!(end.is_err());
    // The session goes on, for what other rules may allow.
    let denied = within(user.send_request(get("/api"))).await.unwrap();
    assert_eq!(denied.status(), 403);
    drop(feed);
}

#[tokio::test]
async fn an_upgraded_connection_ends_with_its_permission() {
    let (agent, server) = scripted(SWITCH, false).await;
    let agent = agent.under(ending_soon());
    let answer = agent.raw(EXEC.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
    within(server).await.unwrap();
}

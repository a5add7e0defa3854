//! What was revoked ends within seconds, stays outside, and may come back by a new enrolment.

use throwline_authority::Target;
use throwline_certs::SignedRevocations;
use throwline_tunnel::carrier::{Connection, DialError};
use throwline_tunnel::message;
use throwline_tunnel::mux;
use throwline_tunnel::proto::close::CloseCode;
use throwline_tunnel::proto::messages::{
    Control, ControlKind, ControlMessage, FetchRevocations, RefusalCode, RevocationList, StreamKind,
};
use throwline_tunnel::proto::wire::{CONTROL_CAP, REVOCATIONS_CAP};
use tokio::io::AsyncReadExt;

use crate::harness::{PATIENCE, World, line, open, refused};

async fn closed(connection: &Connection) -> CloseCode {
    let closed = tokio::time::timeout(PATIENCE, connection.carrier.closed());
    closed.await.expect("closed in time").code
}

async fn told(control: &mut mux::Stream) -> u64 {
    loop {
        let read = message::read::<ControlMessage, _>(control, CONTROL_CAP);
        let told = tokio::time::timeout(PATIENCE, read).await.expect("told");
        if let Some(ControlKind::Revocations(told)) = told.unwrap().kind {
            return told.version;
        }
    }
}

#[tokio::test]
async fn a_revoked_user_is_cut_refused_and_may_enrol_again() {
    let world = World::new().await;
    let agent = world.agent(&world.cluster("prod").await).await;
    let anna = world.user("anna").await;
    let (first, bert) = (
        world.proxy(&anna).await,
        world.proxy(&world.user("bert").await).await,
    );
    let header = StreamKind::Control(Control {}).into();
    let (mut control, _) = bert.carrier.open(header).await.unwrap();
    let mut stream = line(&first, "prod").await;
    let others = line(&bert, "prod").await;

    let target = Target::User("anna".to_owned());
    let revoked = world.authority.revoke(&target).await.unwrap();
    assert_eq!(revoked.certificates, 1);
    assert_eq!(closed(&first).await, CloseCode::Revoked);
    let mut rest = Vec::new();
    let end = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut rest)).await;
    let _ = end.expect("the line ended");
    let again = world.dial(&anna).await;
    assert!(matches!(again, Err(DialError::Revoked)), "{again:?}");

    // All peers receive the version, and the fetched list is signed by the authority.
    let version = told(&mut control).await;
    let header = StreamKind::FetchRevocations(FetchRevocations {}).into();
    let (mut fetched, _) = bert.carrier.open(header).await.unwrap();
    let list: RevocationList = message::read_long(&mut fetched, REVOCATIONS_CAP)
        .await
        .unwrap();
    let signed = SignedRevocations {
        list: list.list,
        signature: list.signature,
    };
    let list = signed.verify(world.authority.roots()).unwrap();
    assert_eq!(list.version(), version);
    assert!(list.covers(anna.as_peer()));

    // Nothing of it is about others, or about a certificate that is issued later.
    assert!(!bert.carrier.is_closed());
    let anew = world.proxy(&world.user("anna").await).await;
    drop(line(&anew, "prod").await);
    let serial = Target::Certificate(anna.serial().to_owned());
    world.authority.revoke(&serial).await.unwrap();
    assert!(told(&mut control).await > version);
    assert!(!anew.carrier.is_closed());
    drop((stream, others, control, fetched));
    drop((first, anew, bert, agent));
    world.end().await;
}

#[tokio::test]
async fn a_revoked_cluster_is_cut_and_its_users_are_told() {
    let world = World::new().await;
    let prod = world.cluster("prod").await;
    let agent = world.agent(&prod).await;
    let proxy = world.proxy(&world.user("anna").await).await;
    let stream = line(&proxy, "prod").await;
    let target = Target::Cluster("prod".to_owned());
    world.authority.revoke(&target).await.unwrap();
    let reason = tokio::time::timeout(PATIENCE, agent.carrier.closed());
    assert_eq!(reason.await.expect("closed").code, CloseCode::Revoked);
    world
        .until_metric("throwline_relay_lines", |n| n == 0.0)
        .await;
    assert_eq!(
        refused(&proxy, open("prod")).await.code(),
        RefusalCode::Revoked
    );
    let again = world.dial(&prod).await;
    assert!(matches!(again, Err(DialError::Revoked)), "{again:?}");

    let enrolled = world.agent(&world.cluster("prod").await).await;
    drop(line(&proxy, "prod").await);
    assert!(!proxy.carrier.is_closed());
    drop((stream, proxy, agent, enrolled));
    world.end().await;
}

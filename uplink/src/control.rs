//! The control stream: the component's status whenever it changes, and what the relay announces.

use std::sync::Arc;

use throwline_tunnel::carrier::Carrier;
use throwline_tunnel::message;
use throwline_tunnel::mux;
use throwline_tunnel::proto::messages::{
    AgentStatus, Control, ControlKind, ControlMessage, Drain, RelaySet, RevocationsVersion,
    StreamHeader, StreamKind,
};
use throwline_tunnel::proto::wire::CONTROL_CAP;
use tokio::io::{ReadHalf, WriteHalf};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use crate::handler::UplinkHandler;

/// Streams of a carrier that has no work: the control stream stays open as long as its carrier.
pub const CONTROL_STREAMS: usize = 1;

/// The newest announcements of a relay.
#[derive(Debug, Default, Clone)]
pub(crate) struct Announced {
    pub(crate) drain: Option<Drain>,
    pub(crate) relays: Option<u32>,
}

/// Runs the control stream of a carrier until the carrier ends.
pub(crate) async fn run<H: UplinkHandler>(
    carrier: Carrier,
    handler: Arc<H>,
    announced: watch::Sender<Announced>,
) {
    let status = handler.status();
    let (newest, revocations) = watch::channel(0);
    let (follower, followed) = (handler.clone(), carrier.clone());
    // Beside the control stream, because a fetch of up to 30 s must not delay a Drain.
    let _following = AbortOnDropHandle::new(tokio::spawn(async move {
        follower.follow_revocations(followed, revocations).await;
    }));
    let header = StreamHeader {
        kind: Some(StreamKind::Control(Control::default())),
    };
    let stream = match carrier.open(header).await {
        Ok((stream, _)) => stream,
        Err(_) if carrier.is_closed() => return,
        Err(error) => return tracing::warn!(%error, "the relay accepted no control stream"),
    };
    let (read, write) = tokio::io::split(stream);
    let ended = tokio::select! {
        ended = report(write, status) => ended,
        ended = receive(read, &announced, &newest) => ended,
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "the control stream has ended");
    }
    // The senders live as long as the carrier, so that their receivers never see an end.
    carrier.closed().await;
}

/// Sends each new status; ends with an error only.
async fn report(
    mut stream: WriteHalf<mux::Stream>,
    status: Option<watch::Receiver<AgentStatus>>,
) -> std::io::Result<()> {
    let Some(mut status) = status else {
        return std::future::pending().await;
    };
    loop {
        let now = status.borrow_and_update().clone();
        // Nothing is known before the first answer of the API server.
        if now != AgentStatus::default() {
            let message = ControlMessage {
                kind: Some(ControlKind::AgentStatus(now)),
            };
            message::write(&mut stream, &message, CONTROL_CAP).await?;
        }
        if status.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}

/// Receives announcements; ends with an error only.
async fn receive(
    mut stream: ReadHalf<mux::Stream>,
    announced: &watch::Sender<Announced>,
    newest: &watch::Sender<u64>,
) -> std::io::Result<()> {
    loop {
        let message: ControlMessage = message::read(&mut stream, CONTROL_CAP).await?;
        match message.kind {
            Some(ControlKind::Drain(drain)) => {
                announced.send_modify(|announced| announced.drain = Some(drain));
            }
            Some(ControlKind::RelaySet(RelaySet { relays })) => {
                announced.send_modify(|announced| announced.relays = Some(relays));
            }
            Some(ControlKind::Revocations(RevocationsVersion { version })) => {
                newest.send_replace(version);
            }
            // A kind of a later version has no receiver here.
            Some(ControlKind::AgentStatus(_)) | None => {}
        }
    }
}

//! The control stream: our status whenever it changes, the relay's wishes as they come.

use throwline_tunnel::carrier::Carrier;
use throwline_tunnel::message;
use throwline_tunnel::proto::messages::{
    AgentStatus, Control, ControlKind, ControlMessage, Drain, RelaySet, StreamHeader, StreamKind,
};
use throwline_tunnel::proto::wire::CONTROL_CAP;
use tokio::sync::watch;

/// What a relay has told last.
#[derive(Debug, Default, Clone)]
pub(super) struct Told {
    pub(super) drain: Option<Drain>,
    pub(super) relays: Option<u32>,
}

pub(super) async fn run(
    carrier: Carrier,
    mut status: watch::Receiver<AgentStatus>,
    told: watch::Sender<Told>,
) {
    let header = StreamHeader {
        kind: Some(StreamKind::Control(Control::default())),
    };
    let stream = match carrier.open(header).await {
        Ok((stream, _)) => stream,
        Err(error) => return tracing::warn!(%error, "the relay took no control stream"),
    };
    let (mut read, mut write) = tokio::io::split(stream);
    let sending = async {
        loop {
            let now = status.borrow_and_update().clone();
            // Nothing is known before the first answer of the API server.
            if now != AgentStatus::default() {
                let news = ControlMessage {
                    kind: Some(ControlKind::AgentStatus(now)),
                };
                message::write(&mut write, &news, CONTROL_CAP).await?;
            }
            if status.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    };
    let receiving = async {
        loop {
            let heard: ControlMessage = message::read(&mut read, CONTROL_CAP).await?;
            match heard.kind {
                Some(ControlKind::Drain(asked)) => {
                    told.send_modify(|told| told.drain = Some(asked));
                }
                Some(ControlKind::RelaySet(RelaySet { relays })) => {
                    told.send_modify(|told| told.relays = Some(relays));
                }
                // Kinds of a later version are not for us.
                Some(ControlKind::AgentStatus(_)) | None => {}
            }
        }
    };
    let ended: std::io::Result<()> = tokio::select! {
        ended = sending => ended,
        ended = receiving => ended,
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "the control stream has ended");
    }
    // The sender lives as long as the carrier, so that its receiver never sees an end.
    carrier.closed().await;
}

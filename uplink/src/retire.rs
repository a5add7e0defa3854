//! The end of a carrier that has a successor.

use std::time::Duration;

use throwline_ops::ShutdownTrigger;
use throwline_tunnel::carrier::Carrier;
use throwline_tunnel::proto::close::CloseCode;

use crate::config::Config;

/// Retires an old carrier: when other ways are known, its sessions are asked to move; when they
/// have, it is closed. Without a bound the relay ends it with its certificate at the latest.
pub(crate) async fn retire(carrier: Carrier, retiring: ShutdownTrigger, config: Config) {
    // The control stream stays open to the end.
    let kept = usize::from(config.control);
    let moved = async {
        tokio::select! {
            _ = carrier.closed() => return,
            () = tokio::time::sleep(config.settle) => {}
        }
        retiring.trigger();
        carrier.idle(kept).await;
        // A stream that the relay has just opened is answered before the close.
        tokio::time::sleep(config.settle).await;
    };
    let longest = config.retire.unwrap_or(Duration::MAX);
    let _ = tokio::time::timeout(longest, moved).await;
    carrier.close(CloseCode::Normal, "replaced by another carrier");
}

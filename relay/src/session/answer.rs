//! Answers of one message.

use throwline_tunnel::carrier::IncomingStream;
use throwline_tunnel::proto::messages::StreamReply;
use tokio::io::AsyncWriteExt;
use tracing::debug;

/// Accepts `stream`, writes `message`, and ends it. `what` names the message in the log.
pub(super) async fn answer(stream: IncomingStream, message: &[u8], what: &str) {
    let sent = async {
        let mut stream = stream.accept(StreamReply::accepted()).await?;
        stream.write_all(message).await?;
        stream.shutdown().await
    };
    if let Err(error) = sent.await {
        debug!(%error, "{what} was not read to its end");
    }
}

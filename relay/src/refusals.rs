//! The one place where streams are refused, so that each refusal is counted and names its origin.

use throwline_tunnel::carrier::IncomingStream;
use throwline_tunnel::proto::messages::Refusal;
use throwline_tunnel::proto::origin;
use tracing::debug;

use crate::metrics::{Metrics, code_label};

pub(crate) async fn refuse(metrics: &Metrics, stream: IncomingStream, refusal: Refusal) {
    metrics.refusal(code_label(refusal.code()));
    debug!(code = ?refusal.code(), reason = %refusal, "refused a stream");
    stream.refuse(marked(refusal)).await;
}

/// The text of an agent, or of another relay, has its origin already.
fn marked(refusal: Refusal) -> Refusal {
    if refusal.message.starts_with(origin::AGENT) {
        return refusal;
    }
    let message = origin::mark(origin::RELAY, &refusal.message);
    with_text(refusal, message)
}

/// The same refusal with another text, which is bounded.
pub(crate) fn with_text(refusal: Refusal, message: String) -> Refusal {
    let Refusal { message, .. } = Refusal::new(refusal.code(), message);
    Refusal { message, ..refusal }
}

#[cfg(test)]
mod tests {
    use throwline_tunnel::proto::messages::RefusalCode;

    use super::*;

    #[test]
    fn each_text_names_one_origin() {
        for (text, outward) in [
            (
                "the relay is stopping",
                "throwline relay: the relay is stopping",
            ),
            ("throwline relay: full", "throwline relay: full"),
            ("throwline agent: full", "throwline agent: full"),
            ("", ""),
        ] {
            let refusal = Refusal::new(RefusalCode::Limit, text).since(7);
            let marked = marked(refusal);
            assert_eq!(marked.message, outward);
            assert_eq!(
                (marked.code(), marked.since_unix_ms),
                (RefusalCode::Limit, 7)
            );
        }
    }
}

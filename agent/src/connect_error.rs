//! Why an agent has no connection to a relay.

use std::time::Duration;

use throwline_tunnel::carrier::DialError;
use throwline_uplink::DialFailure;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum ConnectError {
    #[error(transparent)]
    Dial(#[from] DialError),
    /// A CA file that cannot be read, and the like.
    #[error(transparent)]
    Own(#[from] throwline_certs::Error),
    /// By this machine's clock. Only a renewal may be dialled for.
    #[error("the agent's certificate has expired; it is being renewed")]
    Expired,
}

impl DialFailure for ConnectError {
    fn kind(&self) -> &'static str {
        match self {
            Self::Own(_) => "own-files",
            Self::Expired => "certificate-expired",
            Self::Dial(error) => error.kind(),
        }
    }

    fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Dial(error) => error.retry_after(),
            Self::Own(_) | Self::Expired => None,
        }
    }

    fn is_unwanted(&self) -> bool {
        matches!(self, Self::Dial(error) if error.is_unwanted())
    }
}

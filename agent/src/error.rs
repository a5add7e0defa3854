//! Why an agent does not start. Failures of an agent that runs are logged and tried again.

use std::io;

use crate::state::StateError;
use crate::upstream::AccessError;
use crate::upstream::uid::UidError;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error(transparent)]
    State(#[from] StateError),
    /// TLS cannot use the identity.
    #[error(transparent)]
    Identity(#[from] throwline_certs::Error),
    #[error(transparent)]
    Access(#[from] AccessError),
    #[error(transparent)]
    Uid(#[from] UidError),
    #[error("the audit cannot be written to {target}: {source}")]
    Audit { target: String, source: io::Error },
    /// A mistake of ours: two metrics of one name.
    #[error("the metrics cannot be registered: {0}")]
    Metrics(#[from] prometheus::Error),
    #[error("the admin listener failed: {0}")]
    Admin(#[source] io::Error),
}

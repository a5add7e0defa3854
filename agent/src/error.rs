//! Why an agent does not start. Once it runs it goes on: what fails later is logged and tried again.

use std::io;
use std::path::PathBuf;

use crate::upstream::AccessError;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operator's next step is in the text.
    #[error(
        "this agent is not enrolled: there is no identity in {}; make a token beside the relay (throwline token \
         create --cluster NAME) and give it with --token-file", .0.display()
    )]
    NotEnrolled(PathBuf),
    #[error(
        "the state directory already holds the identity of {0}; use another directory, or remove it first"
    )]
    AlreadyEnrolled(String),
    /// A token made for a user was given to an agent.
    #[error(
        "the token is for {0}, not for a cluster; make one with throwline token create --cluster NAME"
    )]
    NotACluster(String),
    #[error(transparent)]
    Enrol(#[from] throwline_certs::enrol::EnrolError),
    #[error(transparent)]
    State(#[from] throwline_certs::Error),
    #[error("cannot {action} {}: {source}", path.display())]
    File {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("{} is damaged: {reason}; enrol this agent again", path.display())]
    Damaged { path: PathBuf, reason: String },
    #[error(transparent)]
    Access(#[from] AccessError),
    #[error("the audit cannot be written to {target}: {source}")]
    Audit { target: String, source: io::Error },
    /// A mistake of ours: two metrics of one name.
    #[error("the metrics cannot be registered: {0}")]
    Metrics(#[from] prometheus::Error),
    #[error("the admin listener failed: {0}")]
    Admin(#[source] io::Error),
}

use std::{io, path::PathBuf};

/// What can go wrong with identities and state that are our own (a peer's faults have types of
/// their own: [`crate::CheckError`], [`crate::jws::JwsError`], [`crate::authority::RedeemError`]).
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused; the remedy is in `hint`.
    #[error("cannot {action} {}: {source}; {hint}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
        hint: &'static str,
    },
    /// A file is there but is not what it should be.
    #[error("{} is damaged: {what}; {hint}", path.display())]
    Corrupt {
        path: PathBuf,
        what: String,
        hint: &'static str,
    },
    /// `open` was asked for an authority that nobody has made yet.
    #[error("{} holds no authority yet: start the relay with this state directory first", path.display())]
    NoAuthority { path: PathBuf },
    #[error(transparent)]
    Name(#[from] crate::spiffe::NameError),
    /// A public URL, life or other setting that we were given cannot be used.
    #[error("{0}")]
    Invalid(String),
    /// The database failed.
    #[error("the authority's database {}: {what}", path.display())]
    Database { path: PathBuf, what: String },
    /// A cryptographic operation on our own keys failed.
    #[error("{0}")]
    Crypto(String),
}

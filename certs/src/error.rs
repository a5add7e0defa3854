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
    #[error("the authority's database {at}: {what}")]
    Database {
        /// A path, or `HOST:PORT/NAME`.
        at: String,
        what: String,
    },
    /// The relays of this database have one CA, and this state directory has another or none.
    #[error(
        "{} {}, but the relays that share the database {database} have one already: copy ca.pem \
         and ca.key from the state directory of a relay that works into it, and start again",
        dir.display(), if *has_other { "holds another CA" } else { "holds no CA" }
    )]
    ForeignCa {
        dir: PathBuf,
        database: String,
        has_other: bool,
    },
    /// A cryptographic operation on our own keys failed.
    #[error("{0}")]
    Crypto(String),
}

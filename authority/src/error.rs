use std::num::ParseIntError;
use std::path::PathBuf;

use throwline_certs::directory::{CsrError, DirectoryError, RedeemError, RenewError};
use throwline_certs::{CheckError, Kind, NameError, RelayUrlError};
use throwline_policy::ReservedName;

/// What can go wrong with an authority of our own. A requester's faults have types of their own:
/// [`RedeemError`], [`RenewError`].
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Of the CA, of a file in the state directory, or of a key.
    #[error(transparent)]
    Identity(#[from] throwline_certs::Error),
    /// `open` was called for an authority that does not exist yet.
    #[error("{} holds no authority yet: start the relay with this state directory first", path.display())]
    NoAuthority {
        /// The file or directory.
        path: PathBuf,
    },
    /// A name is invalid.
    #[error(transparent)]
    Name(#[from] NameError),
    /// A user's name, or a group, is Kubernetes' own.
    #[error(transparent)]
    SystemName(#[from] ReservedName),
    /// A relay's public URL breaks a rule.
    #[error(transparent)]
    RelayUrl(#[from] RelayUrlError),
    /// The public URL was never stored.
    #[error("the relay's public URL is not known: start the relay once")]
    NoRelayUrl,
    /// A token was requested for too short or too long a time.
    #[error("a token's validity must be between 1 s and 366 days")]
    TokenValidity,
    /// The CA has no certificate.
    #[error("the authority has no CA")]
    NoCa,
    /// A relay's certificate request cannot be used.
    #[error(transparent)]
    Csr(#[from] CsrError),
    /// A name has characters that certificates cannot hold.
    #[error("{text:?} cannot stand in a certificate")]
    CertificateText {
        /// The name.
        text: String,
        /// The cause.
        #[source]
        source: rcgen::Error,
    },
    /// The clock is before 1970, or after any date that a certificate can have.
    #[error("this machine's clock is far from any real date")]
    Clock,
    /// A revocation by name covers nothing.
    #[error(
        "there is no certificate and no open token of a {kind} named {name}: nothing was revoked"
    )]
    NothingToRevoke {
        /// Of the identity.
        kind: Kind,
        /// Of the identity.
        name: String,
    },
    /// A revocation by serial number covers nothing.
    #[error("no certificate with the serial number {serial} was issued here: nothing was revoked")]
    UnknownSerial {
        /// As it was given.
        serial: String,
    },
    /// The database in the state directory cannot be opened.
    #[error(
        "the authority's database {}: {source}; restore it from a backup if it is damaged",
        path.display()
    )]
    SqliteOpen {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: BoxError,
    },
    /// The database in the state directory failed.
    #[error("the authority's database {}: {source}", path.display())]
    Sqlite {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: BoxError,
    },
    /// A database holds a value that this version did not write.
    #[error("the authority's database {database}: {source}")]
    Content {
        /// The database, without its password.
        database: String,
        /// The value.
        #[source]
        source: ContentError,
    },
    /// The database that relays share has no authority, and this command makes none.
    #[error("the database {database} holds no authority yet: start a relay with it first")]
    NoSharedAuthority {
        /// The database, without its password.
        database: String,
    },
    /// The database that relays share.
    #[error(transparent)]
    Database(#[from] throwline_database::Error),
    /// The relays of this database have one CA, and this state directory has another or none.
    #[error(
        "{} {}, but the relays that share the database {database} have one already: copy ca.pem \
         and ca.key from the state directory of a relay that works into it, and start again",
        dir.display(), if *has_other { "holds another CA" } else { "holds no CA" }
    )]
    ForeignCa {
        /// The state directory.
        dir: PathBuf,
        /// The database, without its password.
        database: String,
        /// Whether the database has another CA.
        has_other: bool,
    },
    /// A certificate could not be made.
    #[error("a certificate cannot be made: {0}")]
    Certificate(#[source] rcgen::Error),
    /// A new certificate has not the form that its subject is written into.
    #[error("the new certificate has an unexpected form")]
    CertificateForm,
    /// A new certificate would be refused by the validator.
    #[error("the new certificate would not be accepted: {0}")]
    Unacceptable(#[source] CheckError),
}

/// A value in a database that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ContentError {
    /// Of a user's token.
    #[error("the groups of a token cannot be read: {0}")]
    Groups(#[source] serde_json::Error),
    /// Of the list of revocations.
    #[error("the version of the revocations is no number: {0}")]
    RevocationsVersion(#[source] ParseIntError),
}

/// The error of a database driver.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

impl From<Error> for DirectoryError {
    fn from(error: Error) -> Self {
        Self::Unavailable(error.into())
    }
}

impl From<Error> for RedeemError {
    fn from(error: Error) -> Self {
        Self::Unavailable(error.into())
    }
}

impl From<Error> for RenewError {
    fn from(error: Error) -> Self {
        Self::Unavailable(error.into())
    }
}

//! Why a certificate is not accepted.

use crate::{Kind, NameError, SpiffeId, TrustDomain, time_text};
use std::time::SystemTime;

/// Why a certificate is not good. [`Revoked`](Self::Revoked), [`Expired`](Self::Expired) and
/// [`NotYetValid`](Self::NotYetValid) are reported only when everything else is good.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CheckError {
    /// The validity period has ended.
    #[error(
        "the certificate expired at {} ({} ago by this machine's clock)",
        time_text::show(*not_after), time_text::show_span(now.duration_since(*not_after).unwrap_or_default())
    )]
    Expired {
        /// The end of the validity period.
        not_after: SystemTime,
        /// The time by this machine's clock.
        now: SystemTime,
    },
    /// The validity period has not begun, or a clock is wrong.
    #[error(
        "the certificate is valid from {} only, and this machine's clock is {} before that: \
         one of the two clocks is wrong",
        time_text::show(*not_before), time_text::show_span(not_before.duration_since(*now).unwrap_or_default())
    )]
    NotYetValid {
        /// The beginning of the validity period.
        not_before: SystemTime,
        /// The time by this machine's clock.
        now: SystemTime,
    },
    /// The path does not lead to a trusted CA.
    #[error("the certificate was issued by another authority")]
    UnknownIssuer,
    /// An identity of a kind that is not expected.
    #[error("the certificate is a {0}'s, which is not expected here")]
    WrongKind(Kind),
    /// The name is missing, malformed or of another trust domain.
    #[error("the certificate's name is not acceptable: {0}")]
    BadName(#[source] BadName),
    /// The certificate does not allow this role.
    #[error("the certificate may not be used like this: {0}")]
    BadUsage(&'static str),
    /// The certificate, or its identity, was revoked.
    #[error("the certificate {serial} was revoked")]
    Revoked {
        /// The serial number, in lower-case hex.
        serial: String,
    },
    /// The certificate cannot be parsed, or breaks a rule of encoding.
    #[error("the certificate is malformed: {0}")]
    Malformed(#[source] MalformedCertificate),
}

impl From<NameError> for CheckError {
    fn from(error: NameError) -> Self {
        Self::BadName(error.into())
    }
}

/// What is wrong with the name in a certificate.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadName {
    /// A name or a group breaks a rule.
    #[error(transparent)]
    Rule(#[from] NameError),
    /// The name is of another trust domain.
    #[error("{id} is not of the trust domain {domain}")]
    OtherDomain {
        /// The name.
        id: Box<SpiffeId>,
        /// The trust domain that is expected.
        domain: TrustDomain,
    },
    /// No URI, or several.
    #[error("there is not exactly one URI")]
    NotOneUri,
    /// Names that this kind of identity has not.
    #[error("there are names of other kinds")]
    OtherNames,
    /// The subject cannot be decoded.
    #[error("the subject is not text")]
    NotText,
    /// No CN, or several.
    #[error("there is not exactly one CN")]
    NotOneCn,
    /// Kubernetes and Throwline would read different users.
    #[error("CN and URI differ")]
    CnDiffers,
}

/// The rule of encoding that a certificate breaks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MalformedCertificate {
    /// Larger than any of ours, or too many of them.
    #[error("it is too large")]
    TooLarge,
    /// The chain is empty.
    #[error("there is none")]
    Missing,
    /// It is not X.509.
    #[error("it cannot be parsed")]
    Syntax,
    /// Bytes follow it.
    #[error("there is something behind it")]
    Trailing,
    /// An extension is invalid, or appears twice.
    #[error("an extension is invalid or there twice")]
    Extension,
    /// Its key is of another kind.
    #[error("its key is not on P-256")]
    KeyType,
    /// The validity period is reversed.
    #[error("its life ends before it begins")]
    Reversed,
    /// The validity period cannot be represented.
    #[error("its life begins before 1970")]
    BeforeEpoch,
    /// A check of its path.
    #[error(transparent)]
    Path(#[from] webpki::Error),
}

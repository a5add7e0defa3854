use crate::check_error::CheckError;
use crate::relay_url::RelayUrlError;
use rustls::client::VerifierBuilderError;
use rustls_pki_types::pem;
use std::{io, path::PathBuf};

/// An error of a caller, or of what a caller has provided.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// What can go wrong with identities and state that are our own (a peer's faults have types of
/// their own: [`crate::CheckError`], [`crate::jws::JwsError`], [`crate::directory::RedeemError`]).
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused; the remedy is in `hint`.
    #[error("cannot {action} {}: {source}; {hint}", path.display())]
    Io {
        /// What was attempted.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The cause.
        source: io::Error,
        /// The remedy.
        hint: &'static str,
    },
    /// A file is there but is not what it should be.
    #[error("{} is damaged: {source}; {hint}", path.display())]
    Corrupt {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong.
        source: Box<Damage>,
        /// The remedy.
        hint: &'static str,
    },
    /// Other users of this machine can read or replace what must be ours alone.
    #[error("{} {what}: {remedy}", path.display())]
    Exposed {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong.
        what: String,
        /// The remedy.
        remedy: String,
    },
    /// A name is invalid.
    #[error(transparent)]
    Name(#[from] crate::spiffe::NameError),
    /// A public URL, a certificate or another input cannot be used.
    #[error(transparent)]
    Invalid(#[from] InvalidInput),
    /// A cryptographic operation on our own keys failed.
    #[error(transparent)]
    Crypto(#[from] CryptoError),
}

/// What is wrong with the content of a file.
#[derive(Debug, thiserror::Error)]
pub enum Damage {
    /// It is PEM, but not of what it should hold.
    #[error(transparent)]
    Content(Box<Error>),
    /// Larger than any file of ours.
    #[error("it has {bytes} bytes")]
    TooLarge {
        /// Its size.
        bytes: u64,
    },
    /// It is not PEM.
    #[error(transparent)]
    Pem(#[from] pem::Error),
    /// A certificate in it cannot be used as a CA's.
    #[error(transparent)]
    Ca(#[from] rustls::Error),
    /// There is no certificate.
    #[error("there is no certificate in it")]
    NoCertificate,
    /// There is no private key.
    #[error("there is no private key in it: {0}")]
    NoPrivateKey(#[source] pem::Error),
    /// The key in another file is not the certificate's.
    #[error("it does not go with {}: {source}", key.display())]
    OtherKey {
        /// The file of the key.
        key: PathBuf,
        /// The cause.
        source: rustls::Error,
    },
    /// Of a file that another crate checks.
    #[error(transparent)]
    Other(BoxError),
}

/// Why an input cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum InvalidInput {
    /// More than a change of CA needs.
    #[error("too many CA certificates")]
    TooManyCas,
    /// Several authorities in one.
    #[error("CA certificates of two trust domains")]
    SeveralDomains,
    /// There is none.
    #[error("no CA certificate")]
    NoCa,
    /// A certificate of another kind.
    #[error("not a CA certificate of Throwline: {0}")]
    NotCa(&'static str),
    /// The text is not PEM.
    #[error("the PEM text cannot be read: {0}")]
    Pem(#[source] pem::Error),
    /// The text holds no private key in PEM.
    #[error("no private key: {0}")]
    NoPrivateKey(#[source] pem::Error),
    /// There is none.
    #[error("no certificate")]
    NoCertificate,
    /// The certificate breaks a rule.
    #[error(transparent)]
    Certificate(Box<CheckError>),
    /// Certificate and key do not belong together.
    #[error("the certificate is for another key")]
    OtherKey,
    /// Keys are on P-256.
    #[error("the private key is not on P-256")]
    KeyType,
    /// A value has no form in JSON.
    #[error(transparent)]
    Json(#[from] serde_json::Error),
    /// More than a signed list may hold.
    #[error(
        "there are more revocations than one list holds: wait until certificates that were revoked \
         have expired"
    )]
    TooManyRevocations,
    /// A serial number is not hexadecimal.
    #[error("a serial number is hexadecimal digits, as the relay's log shows it")]
    Serial,
    /// A renewal's challenge has another length.
    #[error("the authority's challenge is malformed")]
    Challenge,
    /// A renewal's challenge is of another authority.
    #[error("the relay asks in the name of an authority that is not ours")]
    OtherAuthority,
    /// A relay's public URL breaks a rule.
    #[error(transparent)]
    RelayUrl(#[from] RelayUrlError),
}

/// What failed in a library for cryptography or TLS.
#[derive(Debug, thiserror::Error)]
pub enum CryptoError {
    /// A key or a request cannot be made.
    #[error(transparent)]
    Request(#[from] rcgen::Error),
    /// rustls rejects a key or a configuration.
    #[error(transparent)]
    Tls(#[from] rustls::Error),
    /// rustls rejects a set of CAs.
    #[error(transparent)]
    Verifier(#[from] VerifierBuilderError),
    /// The secret of a token gives no key.
    #[error("the token's key cannot be used")]
    TokenKey,
    /// The library gives no reason.
    #[error("signing failed")]
    Signing,
}

impl From<rustls::Error> for Error {
    fn from(error: rustls::Error) -> Self {
        CryptoError::from(error).into()
    }
}

impl From<CheckError> for InvalidInput {
    fn from(error: CheckError) -> Self {
        Self::Certificate(Box::new(error))
    }
}

impl From<Error> for Damage {
    fn from(error: Error) -> Self {
        Self::Content(Box::new(error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Identity, Roots, files};
    use std::error::Error as _;

    /// The texts of an error and of its causes.
    fn texts(error: &Error) -> Vec<String> {
        let mut texts = vec![error.to_string()];
        let mut cause = error.source();
        while let Some(error) = cause {
            texts.push(error.to_string());
            cause = error.source();
        }
        texts
    }

    #[test]
    fn the_cause_of_a_damaged_file_is_matched_by_type_and_shown_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca.pem");
        let pem = "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n";
        files::write_private(&path, pem.as_bytes()).unwrap();
        let error = Roots::load(dir.path()).unwrap_err();
        let Error::Corrupt { source, .. } = &error else {
            panic!("{error}");
        };
        let Damage::Content(content) = &**source else {
            panic!("{source}");
        };
        assert!(
            matches!(**content, Error::Invalid(InvalidInput::Pem(_))),
            "{content}"
        );
        // A text names all its causes.
        let texts = texts(&error);
        for cause in &texts[1..] {
            assert_eq!(texts[0].matches(cause.as_str()).count(), 1, "{texts:?}");
        }
        assert!(texts.len() > 1 && texts[0].contains("enrol again"));
    }

    #[test]
    fn a_broken_certificate_beside_a_key_is_matched_by_type() {
        let pem = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        let error = Identity::from_pem(pem).unwrap_err();
        assert!(
            matches!(error, Error::Invalid(InvalidInput::NoPrivateKey(_))),
            "{error}"
        );
        let key = rcgen::KeyPair::generate().unwrap().serialize_pem();
        let error = Identity::from_pem(&[pem, &key].concat()).unwrap_err();
        let Error::Invalid(InvalidInput::Certificate(cause)) = &error else {
            panic!("{error}");
        };
        let syntax = crate::MalformedCertificate::Syntax;
        assert_eq!(**cause, CheckError::Malformed(syntax));
        assert_eq!(
            error.to_string(),
            "the certificate is malformed: it cannot be parsed"
        );
    }
}

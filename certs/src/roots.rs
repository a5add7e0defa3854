//! The authority's CA certificates, which all other components trust.

use crate::{Error, InvalidInput, TrustDomain, files, sha256};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use std::path::Path;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};
use zeroize::Zeroizing;

const FILE: &str = "ca.pem";
const HINT: &str = "restore it from a backup, or enrol again";
/// During a change of CA there are two; more are a mistake.
const MAX_ROOTS: usize = 8;

/// One or more CA certificates of one trust domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Roots {
    certificates: Vec<CertificateDer<'static>>,
    domain: TrustDomain,
}

impl Roots {
    /// The trust domain is read from the certificates' URI names, `spiffe://DOMAIN`.
    ///
    /// # Errors
    /// A certificate is not a CA's, or they are of several trust domains.
    pub fn new(certificates: Vec<CertificateDer<'static>>) -> Result<Self, Error> {
        if certificates.len() > MAX_ROOTS {
            return Err(InvalidInput::TooManyCas.into());
        }
        let mut domain = None;
        for certificate in &certificates {
            let found = domain_of(certificate)?;
            // The validator compares every peer with one trust domain.
            if domain.get_or_insert_with(|| found.clone()) != &found {
                return Err(InvalidInput::SeveralDomains.into());
            }
        }
        let domain = domain.ok_or(InvalidInput::NoCa)?;
        Ok(Self {
            certificates,
            domain,
        })
    }

    /// Reads the CA certificates of a PEM text.
    ///
    /// # Errors
    /// As [`new`](Self::new), or the text is not PEM.
    pub fn from_pem(pem: &str) -> Result<Self, Error> {
        Self::new(certificates_from_pem(pem)?)
    }

    /// The certificates as PEM.
    pub fn to_pem(&self) -> String {
        certificates_to_pem(&self.certificates)
    }

    /// `Ok(None)` when there is no `ca.pem` in `dir`.
    ///
    /// # Errors
    /// The file cannot be read, is exposed to other users, or does not hold CA certificates.
    pub fn load(dir: &Path) -> Result<Option<Self>, Error> {
        files::check_dir(dir)?;
        let path = dir.join(FILE);
        let Some(pem) = files::read_text(&path)? else {
            return Ok(None);
        };
        Self::from_pem(&pem)
            .map(Some)
            .map_err(|error| Error::Corrupt {
                path,
                source: Box::new(error.into()),
                hint: HINT,
            })
    }

    /// Writes `ca.pem` in `dir`, which is made if need be.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&self, dir: &Path) -> Result<(), Error> {
        files::private_dir(dir)?;
        files::write_private(&dir.join(FILE), self.to_pem().as_bytes())
    }

    /// The CA certificates.
    pub fn certificates(&self) -> &[CertificateDer<'static>] {
        &self.certificates
    }

    /// SHA-256 of each certificate, as enrolment tokens carry it.
    pub fn pins(&self) -> Vec<[u8; 32]> {
        self.certificates.iter().map(|der| sha256(der)).collect()
    }

    /// The trust domain that all of them are of.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.domain
    }
}

pub(crate) fn certificates_from_pem(pem: &str) -> Result<Vec<CertificateDer<'static>>, Error> {
    CertificateDer::pem_slice_iter(pem.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|error| InvalidInput::Pem(error).into())
}

/// Certificates as PEM, in the given order.
pub fn certificates_to_pem(certificates: &[CertificateDer<'_>]) -> String {
    certificates
        .iter()
        .map(|der| to_pem("CERTIFICATE", der))
        .collect()
}

/// A private key in PKCS#8 as PEM.
pub fn key_to_pem(der: &[u8]) -> Zeroizing<String> {
    Zeroizing::new(to_pem("PRIVATE KEY", der))
}

/// RFC 7468: base64 in lines of 64. What is made on the way is wiped, since it may be a key.
pub(crate) fn to_pem(label: &str, der: &[u8]) -> String {
    use base64::{Engine, prelude::BASE64_STANDARD};
    let text = Zeroizing::new(BASE64_STANDARD.encode(der));
    // With room for all of it: a string that grows leaves copies behind.
    let room = text.len() + text.len() / 64 + 2 * label.len() + 40;
    let mut pem = String::with_capacity(room);
    pem.push_str(&format!("-----BEGIN {label}-----\n"));
    let mut rest = text.as_str();
    while !rest.is_empty() {
        let (line, after) = rest.split_at(rest.len().min(64));
        pem.push_str(line);
        pem.push('\n');
        rest = after;
    }
    pem.push_str(&format!("-----END {label}-----\n"));
    pem
}

fn domain_of(der: &CertificateDer<'_>) -> Result<TrustDomain, Error> {
    let invalid = |what| Error::from(InvalidInput::NotCa(what));
    let (rest, certificate) =
        X509Certificate::from_der(der).map_err(|_| invalid("it cannot be parsed"))?;
    if !rest.is_empty() || !certificate.is_ca() {
        return Err(invalid("it is not a CA's"));
    }
    let names = certificate
        .subject_alternative_name()
        .ok()
        .flatten()
        .map(|extension| extension.value.general_names.as_slice())
        .unwrap_or_default();
    match names {
        [GeneralName::URI(uri)] => uri
            .strip_prefix("spiffe://")
            .ok_or_else(|| invalid("it names no trust domain"))?
            .parse()
            .map_err(Error::Name),
        _ => Err(invalid("it names no trust domain")),
    }
}

//! The authority's CA certificates: what everybody else trusts.

use crate::{Error, TrustDomain, files, sha256};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use std::path::Path;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

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
    pub fn new(certificates: Vec<CertificateDer<'static>>) -> Result<Self, Error> {
        if certificates.len() > MAX_ROOTS {
            return Err(Error::Invalid("too many CA certificates".to_owned()));
        }
        let mut domain = None;
        for certificate in &certificates {
            let found = domain_of(certificate)?;
            if domain.get_or_insert_with(|| found.clone()) != &found {
                return Err(Error::Invalid(
                    "CA certificates of two trust domains".to_owned(),
                ));
            }
        }
        let domain = domain.ok_or_else(|| Error::Invalid("no CA certificate".to_owned()))?;
        Ok(Self {
            certificates,
            domain,
        })
    }

    pub fn from_pem(pem: &str) -> Result<Self, Error> {
        Self::new(certificates_from_pem(pem)?)
    }

    pub fn to_pem(&self) -> String {
        certificates_to_pem(&self.certificates)
    }

    /// `Ok(None)` when there is no `ca.pem` in `dir`.
    pub fn load(dir: &Path) -> Result<Option<Self>, Error> {
        let path = dir.join(FILE);
        let Some(pem) = files::read_text(&path)? else {
            return Ok(None);
        };
        Self::from_pem(&pem)
            .map(Some)
            .map_err(|error| Error::Corrupt {
                path,
                what: error.to_string(),
                hint: HINT,
            })
    }

    /// Writes `ca.pem` in `dir`, which is made if need be.
    pub fn save(&self, dir: &Path) -> Result<(), Error> {
        files::private_dir(dir)?;
        files::write_private(&dir.join(FILE), self.to_pem().as_bytes())
    }

    pub fn certificates(&self) -> &[CertificateDer<'static>] {
        &self.certificates
    }

    /// SHA-256 of each certificate, as enrolment tokens carry it.
    pub fn pins(&self) -> Vec<[u8; 32]> {
        self.certificates.iter().map(|der| sha256(der)).collect()
    }

    pub fn trust_domain(&self) -> &TrustDomain {
        &self.domain
    }
}

pub(crate) fn certificates_from_pem(pem: &str) -> Result<Vec<CertificateDer<'static>>, Error> {
    CertificateDer::pem_slice_iter(pem.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|error| Error::Invalid(format!("the PEM text cannot be read: {error}")))
}

pub(crate) fn certificates_to_pem(certificates: &[CertificateDer<'_>]) -> String {
    certificates
        .iter()
        .map(|der| to_pem("CERTIFICATE", der))
        .collect()
}

/// RFC 7468: base64 in lines of 64.
pub(crate) fn to_pem(label: &str, der: &[u8]) -> String {
    use base64::{Engine, prelude::BASE64_STANDARD};
    let text = BASE64_STANDARD.encode(der);
    let mut pem = format!("-----BEGIN {label}-----\n");
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
    let invalid = |what: &str| Error::Invalid(format!("not a CA certificate of Throwline: {what}"));
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

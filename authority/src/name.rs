//! Puts the subject into a certificate: CN, and one O for each group.
//!
//! rcgen keeps one attribute of a type, and Kubernetes reads many O, so the subject is written
//! here and the certificate signed again around it.

use crate::error::Error;
use rustls_pki_types::CertificateDer;
use x509_parser::prelude::{FromDer, TbsCertificate};

const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const BIT_STRING: u8 = 0x03;
const UTF8_STRING: u8 = 0x0c;
/// 2.5.4.3
const COMMON_NAME: [u8; 5] = [0x06, 3, 0x55, 0x04, 0x03];
/// 2.5.4.10
const ORGANIZATION: [u8; 5] = [0x06, 3, 0x55, 0x04, 0x0a];
/// ecdsa-with-SHA256, 1.2.840.10045.4.3.2, as an AlgorithmIdentifier.
const ECDSA_WITH_SHA256: [u8; 12] = [
    SEQUENCE, 10, 0x06, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02,
];

/// `certificate` with the subject CN = `name`, O = each of `groups`, signed by `sign`.
pub(crate) fn subject_name(
    certificate: &CertificateDer<'_>,
    name: &str,
    groups: &[String],
    sign: impl FnOnce(&[u8]) -> Result<Vec<u8>, Error>,
) -> Result<CertificateDer<'static>, Error> {
    let unexpected = || Error::CertificateForm;
    let tbs = contents(certificate).ok_or_else(unexpected)?;
    let (_, parsed) = TbsCertificate::from_der(tbs).map_err(|_| unexpected())?;
    let old: &[u8] = parsed.as_ref();
    let fields = contents(old).ok_or_else(unexpected)?;
    let subject = parsed.subject.as_raw();
    // Both are slices of one buffer, so the distance of their beginnings is the subject's offset.
    let start = (subject.as_ptr() as usize)
        .checked_sub(fields.as_ptr() as usize)
        .ok_or_else(unexpected)?;
    let before = fields.get(..start).ok_or_else(unexpected)?;
    let after = fields.get(start + subject.len()..).ok_or_else(unexpected)?;
    let tbs = tlv(
        SEQUENCE,
        &[before, &distinguished_name(name, groups), after],
    );
    let mut signature = vec![0];
    signature.extend(sign(&tbs)?);
    let signature = tlv(BIT_STRING, &[&signature]);
    Ok(tlv(SEQUENCE, &[&tbs, &ECDSA_WITH_SHA256, &signature]).into())
}

fn distinguished_name(name: &str, groups: &[String]) -> Vec<u8> {
    let attribute = |oid: &[u8], value: &str| {
        let value = tlv(UTF8_STRING, &[value.as_bytes()]);
        tlv(SET, &[&tlv(SEQUENCE, &[oid, &value])])
    };
    let mut attributes: Vec<u8> = groups
        .iter()
        .flat_map(|group| attribute(&ORGANIZATION, group))
        .collect();
    attributes.extend(attribute(&COMMON_NAME, name));
    tlv(SEQUENCE, &[&attributes])
}

/// DER: tag, length, value.
fn tlv(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    let mut out = vec![tag];
    match u8::try_from(length) {
        Ok(short) if short < 0x80 => out.push(short),
        _ => {
            let bytes = length.to_be_bytes();
            let significant: Vec<u8> = bytes.into_iter().skip_while(|&byte| byte == 0).collect();
            // A length of eight bytes at most.
            out.push(0x80 | significant.len() as u8);
            out.extend(significant);
        }
    }
    parts.iter().for_each(|part| out.extend(*part));
    out
}

/// What is within the outermost tag.
fn contents(der: &[u8]) -> Option<&[u8]> {
    let (&first, rest) = der.get(1..)?.split_first()?;
    let length_bytes = if first < 0x80 {
        0
    } else {
        usize::from(first & 0x7f)
    };
    rest.get(length_bytes..)
}

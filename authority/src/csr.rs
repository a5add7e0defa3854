//! Certificate signing requests. Two things are taken from one: the public key, and the proof
//! that the requester has its private half. Everything else in it is ignored.

use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use rustls_pki_types::{CertificateSigningRequestDer, pem::PemObject};
use throwline_certs::directory::CsrError;
use throwline_certs::validator::p256_point;
use x509_parser::prelude::{FromDer, X509CertificationRequest};

/// A request with a P-256 key and nothing else has about 200 bytes.
const MAX_CSR: usize = 4 * 1024;
const ECDSA_WITH_SHA256: &str = "1.2.840.10045.4.3.2";

/// A public key on P-256 whose private half the requester holds.
#[derive(Debug)]
pub(crate) struct ProvenKey {
    /// SubjectPublicKeyInfo in DER.
    pub(crate) spki: Vec<u8>,
    /// The uncompressed point.
    pub(crate) point: Vec<u8>,
}

pub(crate) fn from_pem(pem: &str) -> Result<ProvenKey, CsrError> {
    if pem.len() > MAX_CSR {
        return Err(CsrError::TooLarge);
    }
    let der = CertificateSigningRequestDer::from_pem_slice(pem.as_bytes())
        .map_err(|_| CsrError::NotPem)?;
    from_der(&der)
}

pub(crate) fn from_der(der: &[u8]) -> Result<ProvenKey, CsrError> {
    if der.len() > MAX_CSR {
        return Err(CsrError::TooLarge);
    }
    let (rest, request) =
        X509CertificationRequest::from_der(der).map_err(|_| CsrError::Malformed)?;
    if !rest.is_empty() {
        return Err(CsrError::Trailing);
    }
    let info = &request.certification_request_info;
    let point = p256_point(&info.subject_pki).ok_or(CsrError::KeyType)?;
    if request.signature_algorithm.algorithm.to_id_string() != ECDSA_WITH_SHA256 {
        return Err(CsrError::SignatureType);
    }
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, &point)
        .verify(info.raw, &request.signature_value.data)
        .map_err(|_| CsrError::Signature)?;
    Ok(ProvenKey {
        spki: info.subject_pki.raw.to_vec(),
        point,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use throwline_certs::PendingIdentity;

    #[test]
    fn takes_a_good_request_and_refuses_changed_ones() {
        let pending = PendingIdentity::generate().unwrap();
        let key = from_pem(&pending.csr_pem()).unwrap();
        assert_eq!(key.point.len(), 65);
        let good = pending.csr_der();
        let position = |part: &[u8]| good.windows(part.len()).position(|bytes| bytes == part);
        let spki = position(&key.spki).unwrap();
        for at in 0..good.len() {
            let mut bad = good.to_vec();
            bad[at] ^= 1;
            match from_der(&bad) {
                Err(_) => {}
                // Tags around the signature are not signed; the key is the same then.
                Ok(same) => {
                    assert_eq!(same.point, key.point);
                    assert!(
                        at > spki + key.spki.len() && at < good.len() - 64,
                        "byte {at}"
                    );
                }
            }
        }
        assert!(from_der(&[good, b"\0"].concat()).is_err());
        assert!(from_der(&good[..good.len() - 1]).is_err());
    }

    #[test]
    fn refuses_other_curves() {
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
        let csr = rcgen::CertificateParams::default()
            .serialize_request(&key)
            .unwrap();
        assert_eq!(from_der(csr.der()).unwrap_err(), CsrError::KeyType);
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        let csr = rcgen::CertificateParams::default()
            .serialize_request(&key)
            .unwrap();
        assert_eq!(from_der(csr.der()).unwrap_err(), CsrError::KeyType);
    }

    proptest! {
        #[test]
        fn nothing_panics(bytes in any::<Vec<u8>>(), text in any::<String>()) {
            prop_assert!(from_der(&bytes).is_err());
            prop_assert!(from_pem(&text).is_err());
        }
    }
}

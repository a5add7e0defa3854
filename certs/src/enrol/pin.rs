//! Whom to believe before there is an identity: the pinned CA, or the public ones.

use crate::{Error, Roots, sha256, tls::provider};
use rustls::{
    CertificateError, DigitallySignedStruct, Error as TlsError, OtherError, RootCertStore,
    SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use std::sync::Arc;

/// The server showed a CA of Throwline's, but not the pinned one.
#[derive(Debug, thiserror::Error)]
#[error("the certificate was issued by another authority than the token's")]
pub(super) struct OtherAuthority;

/// Accepts a chain to the CA whose hash is `pin`, if the server sends that CA along, or a chain
/// to a public CA. Either way the name must be right.
#[derive(Debug)]
pub(super) struct PinVerifier {
    pin: [u8; 32],
    public: Option<Arc<WebPkiServerVerifier>>,
}

impl PinVerifier {
    pub(super) fn new(pin: [u8; 32], public: RootCertStore) -> Result<Self, Error> {
        let public = if public.is_empty() {
            None
        } else {
            Some(chain_verifier(public).map_err(|error| Error::Crypto(error.to_string()))?)
        };
        Ok(Self { pin, public })
    }
}

fn chain_verifier(roots: RootCertStore) -> Result<Arc<WebPkiServerVerifier>, TlsError> {
    WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider())
        .build()
        .map_err(|error| TlsError::General(error.to_string()))
}

impl ServerCertVerifier for PinVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        let verify = |verifier: &WebPkiServerVerifier| {
            verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
        };
        if let Some(ca) = intermediates.iter().find(|der| sha256(der) == self.pin) {
            let mut roots = RootCertStore::empty();
            roots.add(ca.clone().into_owned())?;
            return verify(chain_verifier(roots)?.as_ref());
        }
        let refused = match &self.public {
            Some(public) => match verify(public) {
                Ok(verified) => return Ok(verified),
                Err(error) => error,
            },
            None => CertificateError::UnknownIssuer.into(),
        };
        let another = intermediates
            .iter()
            .any(|der| Roots::new(vec![der.clone().into_owned()]).is_ok());
        if another {
            let error = OtherError(Arc::new(OtherAuthority));
            return Err(CertificateError::Other(error).into());
        }
        Err(refused)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        let algorithms = provider().signature_verification_algorithms;
        verify_tls12_signature(message, cert, dss, &algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        let algorithms = provider().signature_verification_algorithms;
        verify_tls13_signature(message, cert, dss, &algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}

//! The trust before there is an identity: the pinned CA, or those that were configured.

use crate::{CryptoError, Error, Roots, sha256, tls::provider};
use rustls::{
    CertificateError, DigitallySignedStruct, Error as TlsError, OtherError, RootCertStore,
    SignatureScheme,
    client::{
        VerifierBuilderError, WebPkiServerVerifier,
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
/// to a CA that was named. Either way the name must be right.
#[derive(Debug)]
pub(super) struct PinVerifier {
    pin: [u8; 32],
    named: Option<Arc<WebPkiServerVerifier>>,
}

impl PinVerifier {
    pub(super) fn new(pin: [u8; 32], named: RootCertStore) -> Result<Self, Error> {
        let named = if named.is_empty() {
            None
        } else {
            Some(chain_verifier(named).map_err(CryptoError::from)?)
        };
        Ok(Self { pin, named })
    }
}

fn chain_verifier(roots: RootCertStore) -> Result<Arc<WebPkiServerVerifier>, VerifierBuilderError> {
    WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider()).build()
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
        // The pin takes the place of the public CAs: this certificate is the one root, and the name
        // is verified as usual.
        if let Some(ca) = intermediates.iter().find(|der| sha256(der) == self.pin) {
            let mut roots = RootCertStore::empty();
            roots.add(ca.clone().into_owned())?;
            let verifier = chain_verifier(roots)
                .map_err(|error| TlsError::Other(OtherError(Arc::new(error))))?;
            return verify(verifier.as_ref());
        }
        let refused = match &self.named {
            Some(named) => match verify(named) {
                Ok(verified) => return Ok(verified),
                Err(error) => error,
            },
            None => CertificateError::UnknownIssuer.into(),
        };
        // A CA of Throwline that is not the pinned one is more than an unknown issuer: the token is
        // another authority's.
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

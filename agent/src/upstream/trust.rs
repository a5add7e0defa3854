//! Whether the API server's certificate is one that the kubeconfig, or the service account, trusts.
//!
//! `certificate-authority` may hold the API server's own certificate instead of a CA's, or one that is
//! both. webpki refuses those (a CA is no end entity, and an end entity issues nothing), Go's verifier
//! and so kubectl accept them: a certificate that is itself among the trusted ones is a pin. It must be
//! that very certificate, in its time, for that name, and for a server; its key is proved by TLS.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_name;
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};
use x509_parser::prelude::{FromDer, X509Certificate};

/// A pod's CA file is rotated under it, as its token is.
const READ_EVERY: Duration = Duration::from_secs(60);

/// Verifies the API server by a set of certificates.
#[derive(Debug)]
pub(super) struct Trust {
    provider: Arc<CryptoProvider>,
    /// Where the set is read from again.
    file: Option<PathBuf>,
    current: Mutex<(Arc<Trusted>, Instant)>,
}

#[derive(Debug)]
struct Trusted {
    /// As issuers; `None` if none of them can be one.
    issuers: Option<Arc<WebPkiServerVerifier>>,
    /// As the server's own.
    pins: Vec<CertificateDer<'static>>,
}

impl Trust {
    /// `certificates` are DER. `file` holds the same in PEM, and later perhaps others; a file that cannot
    /// be read later changes nothing. `None`: there is no certificate among them.
    pub(super) fn new(certificates: &[Vec<u8>], file: Option<PathBuf>) -> Option<Self> {
        let provider = throwline_certs::tls::provider();
        let certificates = certificates.iter().cloned().map(CertificateDer::from);
        let trusted = Trusted::of(certificates.collect(), &provider)?;
        Some(Self {
            provider,
            file,
            current: Mutex::new((Arc::new(trusted), Instant::now())),
        })
    }

    fn current(&self) -> Arc<Trusted> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = &self.file
            && current.1.elapsed() >= READ_EVERY
        {
            current.1 = Instant::now();
            let read = CertificateDer::pem_file_iter(file).and_then(Iterator::collect);
            match read.map(|certificates| Trusted::of(certificates, &self.provider)) {
                Ok(Some(trusted)) => current.0 = Arc::new(trusted),
                Ok(None) => tracing::warn!("the API server's CA file has become empty"),
                Err(error) => {
                    tracing::warn!(%error, "the API server's CA file cannot be read again")
                }
            }
        }
        current.0.clone()
    }
}

impl Trusted {
    fn of(pins: Vec<CertificateDer<'static>>, provider: &Arc<CryptoProvider>) -> Option<Self> {
        if pins.is_empty() {
            return None;
        }
        let mut roots = RootCertStore::empty();
        // Go, too, skips those that it cannot read.
        roots.add_parsable_certificates(pins.iter().cloned());
        let issuers =
            WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone())
                .build()
                .ok();
        Some(Self { issuers, pins })
    }
}

/// What Go checks of a certificate that is itself trusted.
fn check_pinned(
    certificate: &CertificateDer<'_>,
    name: &ServerName<'_>,
    now: UnixTime,
) -> Result<(), Error> {
    // Rejects critical extensions that are not supported.
    let parsed = ParsedCertificate::try_from(certificate)?;
    let (_, fields) =
        X509Certificate::from_der(certificate).map_err(|_| CertificateError::BadEncoding)?;
    let (now, validity) = (now.as_secs(), fields.validity());
    let seconds = |at: i64| u64::try_from(at).unwrap_or_default();
    if now < seconds(validity.not_before.timestamp()) {
        return Err(CertificateError::NotValidYet.into());
    }
    if now > seconds(validity.not_after.timestamp()) {
        return Err(CertificateError::Expired.into());
    }
    let usage = fields
        .extended_key_usage()
        .map_err(|_| CertificateError::BadEncoding)?;
    if usage.is_some_and(|usage| !usage.value.server_auth && !usage.value.any) {
        return Err(CertificateError::InvalidPurpose.into());
    }
    verify_server_name(&parsed, name)
}

impl ServerCertVerifier for Trust {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let trusted = self.current();
        if trusted.pins.iter().any(|pin| pin == end_entity) {
            check_pinned(end_entity, server_name, now)?;
            return Ok(ServerCertVerified::assertion());
        }
        match &trusted.issuers {
            Some(issuers) => issuers.verify_server_cert(
                end_entity,
                intermediates,
                server_name,
                ocsp_response,
                now,
            ),
            None => Err(CertificateError::UnknownIssuer.into()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{
        BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    };

    use super::*;

    struct Made {
        der: Vec<u8>,
        params: CertificateParams,
        key: KeyPair,
    }

    /// Self-signed, for `api.example`, unless `change` makes it another.
    fn make(change: impl FnOnce(&mut CertificateParams)) -> Made {
        let mut params = CertificateParams::new(vec!["api.example".to_owned()]).unwrap();
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let der = params.self_signed(&key).unwrap().der().to_vec();
        Made { der, params, key }
    }

    fn ca(params: &mut CertificateParams) {
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    }

    fn verify(trusted: &[&[u8]], shown: &[u8], name: &str, now: UnixTime) -> Result<(), Error> {
        let trusted: Vec<Vec<u8>> = trusted.iter().map(|der| der.to_vec()).collect();
        let trust = Trust::new(&trusted, None).unwrap();
        let name = ServerName::try_from(name.to_owned()).unwrap();
        trust
            .verify_server_cert(&CertificateDer::from(shown), &[], &name, &[], now)
            .map(drop)
    }

    #[test]
    fn a_trusted_certificate_may_be_the_servers_own() {
        let now = UnixTime::now();
        let leaf = make(|_| ());
        let both = make(ca);
        verify(&[&leaf.der], &leaf.der, "api.example", now).unwrap();
        verify(&[&both.der], &both.der, "api.example", now).unwrap();
        verify(&[&both.der, &leaf.der], &leaf.der, "api.example", now).unwrap();
        // One that cannot be read is skipped, as in Go.
        verify(
            &[b"no certificate", &leaf.der],
            &leaf.der,
            "api.example",
            now,
        )
        .unwrap();
    }

    #[test]
    fn a_pin_is_that_very_certificate_for_that_name_in_its_time_for_a_server() {
        let now = UnixTime::now();
        let leaf = make(|_| ());
        let twin = make(|_| ());
        for (trusted, shown, name) in [
            (&leaf.der, &twin.der, "api.example"),
            (&leaf.der, &leaf.der, "other.example"),
            (&leaf.der, &leaf.der, "10.0.0.1"),
        ] {
            assert!(verify(&[trusted], shown, name, now).is_err(), "{name}");
        }
        let year = |year| rcgen::date_time_ymd(year, 1, 1);
        let old = make(|params| (params.not_before, params.not_after) = (year(2001), year(2002)));
        let error = verify(&[&old.der], &old.der, "api.example", now).unwrap_err();
        assert_eq!(error, CertificateError::Expired.into());
        let early = make(|params| (params.not_before, params.not_after) = (year(3001), year(3002)));
        let error = verify(&[&early.der], &early.der, "api.example", now).unwrap_err();
        assert_eq!(error, CertificateError::NotValidYet.into());
        let client = make(|params| {
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        });
        let error = verify(&[&client.der], &client.der, "api.example", now).unwrap_err();
        assert_eq!(error, CertificateError::InvalidPurpose.into());
    }

    #[test]
    fn a_ca_still_issues_and_a_pinned_leaf_does_not() {
        let now = UnixTime::now();
        let issued_by = |made: Made| {
            let issuer = Issuer::new(made.params, made.key);
            let params = CertificateParams::new(vec!["api.example".to_owned()]).unwrap();
            let key = KeyPair::generate().unwrap();
            params.signed_by(&key, &issuer).unwrap().der().to_vec()
        };
        let authority = make(ca);
        let trusted = authority.der.clone();
        let issued = issued_by(authority);
        verify(&[&trusted], &issued, "api.example", now).unwrap();
        // Without its issuer it is a pin, and issues nothing.
        verify(&[&issued], &issued, "api.example", now).unwrap();
        assert!(verify(&[&issued], &trusted, "api.example", now).is_err());
        assert!(verify(&[&trusted], &issued, "other.example", now).is_err());
        let stranger = make(ca);
        assert!(verify(&[&stranger.der], &issued, "api.example", now).is_err());
    }

    #[test]
    fn nothing_trusted_is_an_error() {
        assert!(Trust::new(&[], None).is_none());
    }
}

//! rustls verifiers that ask the [`Validator`] and then let the provider verify the handshake's
//! signature.

use super::provider::provider;
use crate::{CheckError, ExpectedPeer, Kind, PeerIdentity, SpiffeId, Validator};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::verify_tls13_signature,
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// A good certificate, but of another peer: a relay joined us to the wrong cluster, or something
/// answers at another relay's address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the other end is {found}, not {expected}: {}", why(.expected))]
pub struct UnexpectedPeer {
    /// The identity that was dialled.
    pub expected: SpiffeId,
    /// The identity that answered.
    pub found: SpiffeId,
}

fn why(expected: &SpiffeId) -> &'static str {
    match expected.kind() {
        Kind::Relay => "another relay answers at its address",
        Kind::Cluster | Kind::User => "the relay joined this line to the wrong cluster",
    }
}

/// Where one name is dialled: the server must be this very cluster, or this very relay.
#[derive(Debug)]
pub(super) struct ServerVerifier {
    pub(super) validator: Validator,
    pub(super) expected: ExpectedPeer,
    pub(super) expect: SpiffeId,
}

/// For listeners that accept all identities of a kind: users in the agent, relays among peers.
#[derive(Debug)]
pub(super) struct ClientVerifier {
    pub(super) validator: Validator,
    pub(super) expected: ExpectedPeer,
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let peer = check(
            &self.validator,
            end_entity,
            intermediates,
            self.expected,
            now,
        )?;
        if peer.id != self.expect {
            let error = UnexpectedPeer {
                expected: self.expect.clone(),
                found: peer.id,
            };
            return Err(CertificateError::Other(OtherError(Arc::new(error))).into());
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        schemes()
    }
}

impl ClientCertVerifier for ClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        check(
            &self.validator,
            end_entity,
            intermediates,
            self.expected,
            now,
        )?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        schemes()
    }
}

fn check(
    validator: &Validator,
    end_entity: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    expected: ExpectedPeer,
    now: UnixTime,
) -> Result<PeerIdentity, Error> {
    let chain: Vec<_> = std::iter::once(end_entity)
        .chain(intermediates)
        .map(|der| CertificateDer::from(der.as_ref()))
        .collect();
    let now = UNIX_EPOCH + Duration::from_secs(now.as_secs());
    validator
        .check(&chain, expected, now)
        .map_err(|error| certificate_error(error).into())
}

/// The error whose alert tells the peer as much as it may know.
fn certificate_error(error: CheckError) -> CertificateError {
    match error {
        CheckError::Expired { not_after, now } => CertificateError::ExpiredContext {
            time: unix(now),
            not_after: unix(not_after),
        },
        CheckError::NotYetValid { not_before, now } => CertificateError::NotValidYetContext {
            time: unix(now),
            not_before: unix(not_before),
        },
        CheckError::UnknownIssuer => CertificateError::UnknownIssuer,
        CheckError::Revoked { .. } => CertificateError::Revoked,
        error => CertificateError::Other(OtherError(Arc::new(error))),
    }
}

fn unix(time: SystemTime) -> UnixTime {
    UnixTime::since_unix_epoch(time.duration_since(UNIX_EPOCH).unwrap_or_default())
}

fn signature(
    message: &[u8],
    cert: &CertificateDer<'_>,
    dss: &DigitallySignedStruct,
) -> Result<HandshakeSignatureValid, Error> {
    let algorithms = provider().signature_verification_algorithms;
    verify_tls13_signature(message, cert, dss, &algorithms)
}

/// Our identities are all on P-256.
fn schemes() -> Vec<SignatureScheme> {
    vec![SignatureScheme::ECDSA_NISTP256_SHA256]
}

fn tls12() -> Error {
    Error::General("only TLS 1.3 is spoken here".to_owned())
}

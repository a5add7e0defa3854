//! The authority for a relay in the same process.

use std::time::SystemTime;

use async_trait::async_trait;
use rustls_pki_types::CertificateDer;
use throwline_certs::directory::{
    ClusterRecord, Directory, DirectoryError, HttpsChain, Issued, RedeemError, RenewError,
};
use throwline_certs::enrol::{EnrolRequest, code};
use throwline_certs::{PeerIdentity, SignedRevocations, SpiffeId, Validator, renewal};

use crate::authority::Authority;
use crate::error::Error;

#[async_trait]
impl Directory for Authority {
    fn now(&self) -> SystemTime {
        Authority::now(self)
    }

    fn validator(&self) -> &Validator {
        Authority::validator(self)
    }

    fn renewable_until(&self, peer: &PeerIdentity) -> SystemTime {
        Authority::renewable_until(self, peer)
    }

    async fn redeem(&self, request: &EnrolRequest) -> Result<Issued, RedeemError> {
        Authority::redeem(self, request).await
    }

    async fn renewal_challenge(&self) -> Result<renewal::Challenge, DirectoryError> {
        Ok(Authority::renewal_challenge(self)?)
    }

    async fn renew(
        &self,
        challenge: renewal::Challenge,
        carrier: &SpiffeId,
        request: renewal::Request<'_>,
    ) -> Result<Issued, RenewError> {
        Authority::renew(self, challenge, carrier, request).await
    }

    async fn certify_relay(
        &self,
        instance: &str,
        csr: &[u8],
    ) -> Result<Vec<CertificateDer<'static>>, DirectoryError> {
        Authority::certify_relay(self, instance, csr).map_err(certify_error)
    }

    async fn certify_https(
        &self,
        hosts: &[String],
        csr: &[u8],
    ) -> Result<HttpsChain, DirectoryError> {
        Authority::certify_https(self, hosts, csr).map_err(certify_error)
    }

    async fn clusters(&self) -> Result<Vec<ClusterRecord>, DirectoryError> {
        Ok(Authority::clusters(self).await?)
    }

    async fn cluster(&self, name: &str) -> Result<Option<ClusterRecord>, DirectoryError> {
        Ok(Authority::cluster(self, name).await?)
    }

    async fn record_connected(
        &self,
        cluster: &str,
        agent_version: &str,
    ) -> Result<(), DirectoryError> {
        Ok(Authority::record_connected(self, cluster, agent_version).await?)
    }

    async fn record_status(
        &self,
        cluster: &str,
        kubernetes_version: &str,
        agent_version: &str,
    ) -> Result<(), DirectoryError> {
        Ok(Authority::record_status(self, cluster, kubernetes_version, agent_version).await?)
    }

    async fn record_disconnected(&self, cluster: &str) -> Result<(), DirectoryError> {
        Ok(Authority::record_disconnected(self, cluster).await?)
    }

    async fn refresh_revocations(&self) -> Result<Option<SignedRevocations>, DirectoryError> {
        Ok(Authority::refresh_revocations(self).await?)
    }

    async fn signed_revocations(&self) -> Result<SignedRevocations, DirectoryError> {
        Ok(Authority::signed_revocations(self)?)
    }

    async fn revocations_changed(&self) -> Result<(), DirectoryError> {
        Ok(Authority::revocations_changed(self).await?)
    }
}

/// A name or a request that can never be certified is refused; the rest may pass.
fn certify_error(error: Error) -> DirectoryError {
    match error {
        Error::Name(_) | Error::SystemName(_) | Error::Csr(_) | Error::CertificateText { .. } => {
            DirectoryError::Refused {
                code: code::BAD_REQUEST.to_owned(),
                message: error.to_string(),
            }
        }
        error => error.into(),
    }
}

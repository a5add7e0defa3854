//! Renewal of an identity over a carrier: with a key that is made here and stays here, by the
//! signature of the key before it. The carrier only transports that.

use std::time::{Duration, SystemTime};

use throwline_certs::{
    CheckError, Error, ExpectedPeer, Identity, PendingIdentity, SpiffeId, Validator, renewal,
};
use throwline_tunnel::carrier::Carrier;
use throwline_tunnel::proto::messages::RefusalCode;
use throwline_tunnel::renewal::{self as request, RenewalError as RequestError};

/// Why an identity was not renewed. It is as good as before.
#[derive(Debug, thiserror::Error)]
pub enum RenewalError {
    /// The authority, or the relay on the way to it, gave no certificate.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The certificate is not valid, or not of our authority.
    #[error("the new certificate is not good: {0}")]
    Check(#[from] CheckError),
    /// The certificate is of another identity.
    #[error("the new certificate is not ours: it names {0}")]
    OtherIdentity(SpiffeId),
    /// No key can be made, or the certificate is for another key.
    #[error(transparent)]
    Key(#[from] Error),
}

impl RenewalError {
    /// The wait that the relay asks for.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Request(RequestError::Refused(refusal)) if refusal.retry_after_ms > 0 => {
                Some(Duration::from_millis(refusal.retry_after_ms))
            }
            _ => None,
        }
    }

    /// Whether the authority does not renew this identity, now or later.
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Request(RequestError::Refused(refusal)) if refusal.code() == RefusalCode::NotAllowed)
    }
}

/// The key that is to follow an identity's. It is kept until there is a certificate for it: when an
/// answer was lost, a second key for one certificate would look as if that had been stolen.
#[derive(Debug, Default)]
pub struct Successor(Option<(String, PendingIdentity)>);

impl Successor {
    /// Requests a certificate that follows that of `identity`, from the authority of `validator`'s
    /// roots, and checks it. Within 30 s. The caller saves the new identity and uses it.
    ///
    /// # Errors
    /// See [`RenewalError`].
    pub async fn renew(
        &mut self,
        carrier: &Carrier,
        identity: &Identity,
        validator: &Validator,
    ) -> Result<Identity, RenewalError> {
        // After a lost answer the same key is sent again: two keys for one certificate count as a
        // sign of theft.
        let pending = self.key_after(identity.serial())?;
        let csr = pending.csr_der();
        let chain = identity.chain().iter().map(|der| der.to_vec()).collect();
        let answer = request::ask(carrier, chain, csr, |challenge| {
            let (nonce, authority) = (&challenge.nonce, &challenge.authority);
            let signature = renewal::sign(identity, validator.roots(), nonce, authority, csr)?;
            Ok(signature)
        });
        let certificate = answer.await?;

        // The certificate must validate against the roots that we have. The answer's `ca` is
        // ignored: a relay must not be able to make itself an authority.
        let chain: Vec<_> = certificate.chain.into_iter().map(Into::into).collect();
        let peer = validator.check(&chain, ExpectedPeer::CARRIER, SystemTime::now())?;
        if peer.id != *identity.id() {
            return Err(RenewalError::OtherIdentity(peer.id));
        }
        // Rejects a certificate for another key than the one that was made.
        Ok(pending.again().complete(chain)?)
    }

    /// The key that is kept for the certificate of this serial number, or a new one.
    fn key_after(&mut self, serial: &str) -> Result<&PendingIdentity, Error> {
        let held = self.0.take().filter(|(of, _)| of == serial);
        let held = match held {
            Some(held) => held,
            None => (serial.to_owned(), PendingIdentity::generate()?),
        };
        Ok(&self.0.insert(held).1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_key_follows_a_certificate_however_often_it_is_requested() {
        let mut successor = Successor::default();
        let first = successor.key_after("a1").unwrap().csr_der().to_vec();
        let again = successor.key_after("a1").unwrap().csr_der().to_vec();
        assert_eq!(first, again);
        let next = successor.key_after("b2").unwrap().csr_der().to_vec();
        assert_ne!(first, next);
    }

    #[test]
    fn a_refusal_is_final_or_has_a_wait() {
        let refused = |code, retry_after| {
            let refusal = throwline_tunnel::proto::messages::Refusal::new(code, "");
            let refusal = refusal.retry_after(retry_after);
            RenewalError::from(RequestError::Refused(refusal))
        };
        let denied = refused(RefusalCode::NotAllowed, Duration::ZERO);
        assert!(denied.is_final());
        assert_eq!(denied.retry_after(), None);
        let busy = refused(RefusalCode::Limit, Duration::from_secs(7));
        assert!(!busy.is_final());
        assert_eq!(busy.retry_after(), Some(Duration::from_secs(7)));
    }
}

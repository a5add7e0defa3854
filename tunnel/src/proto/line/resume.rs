//! Authenticates the resumption of a line, by a key that both ends of its sealed session export from
//! that session (RFC 8446, 7.5). A relay never has the key, so it can neither resume a line nor alter
//! the exchange that resumes one.

use aws_lc_rs::hmac;

use super::Position;
use crate::proto::messages::{LineResume, LineResumed};

/// The exporter's label.
pub const LABEL: &[u8] = b"EXPORTER-throwline-line-resume";

/// Length of a line's id, and of a nonce.
pub const ID_LEN: usize = 16;

const RESUME: &[u8] = b"throwline line resume";
const RESUMED: &[u8] = b"throwline line resumed";
const CREDENTIAL: &[u8] = b"throwline line credential";

/// The key of one line.
#[derive(Clone)]
pub struct Key(hmac::Key);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(..)")
    }
}

impl Key {
    /// From the session's exporter with [`LABEL`], and the line's id as context.
    pub fn new(secret: &[u8; 32]) -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, secret))
    }

    /// The local proxy's RESUME.
    pub fn sign_resume(
        &self,
        line: &[u8],
        epoch: u64,
        nonce: [u8; ID_LEN],
        at: Position,
    ) -> LineResume {
        let mut resume = LineResume {
            line_id: line.to_vec(),
            nonce: nonce.to_vec(),
            received: at.received,
            consumed: at.consumed,
            ended: at.ended,
            mac: Vec::new(),
        };
        resume.mac = self.tag(&resume_parts(&resume, epoch));
        resume
    }

    /// Whether a RESUME is from the other end of the session, and of this epoch.
    pub fn verify_resume(&self, resume: &LineResume, epoch: u64) -> bool {
        resume.nonce.len() == ID_LEN && self.verify(&resume_parts(resume, epoch), &resume.mac)
    }

    /// The agent's OK to it.
    pub fn sign_resumed(
        &self,
        resume: &LineResume,
        epoch: u64,
        nonce: [u8; ID_LEN],
        at: Position,
    ) -> LineResumed {
        let mut resumed = LineResumed {
            nonce: nonce.to_vec(),
            received: at.received,
            consumed: at.consumed,
            ended: at.ended,
            mac: Vec::new(),
        };
        resumed.mac = self.tag(&resumed_parts(resume, &resumed, epoch));
        resumed
    }

    /// Whether an OK is from the other end of the session, and to this RESUME.
    pub fn verify_resumed(&self, resume: &LineResume, resumed: &LineResumed, epoch: u64) -> bool {
        resumed.nonce.len() == ID_LEN
            && self.verify(&resumed_parts(resume, resumed, epoch), &resumed.mac)
    }

    /// The local proxy's proof that it presents the certificate with this SHA-256 fingerprint for the
    /// line.
    pub fn sign_credential(&self, line: &[u8], fingerprint: &[u8; 32]) -> Vec<u8> {
        self.tag(&credential_parts(line, fingerprint))
    }

    /// Whether that proof is from the other end of the session.
    pub fn verify_credential(&self, line: &[u8], fingerprint: &[u8; 32], mac: &[u8]) -> bool {
        self.verify(&credential_parts(line, fingerprint), mac)
    }

    fn tag(&self, message: &[u8]) -> Vec<u8> {
        hmac::sign(&self.0, message).as_ref().to_vec()
    }

    /// In constant time.
    fn verify(&self, message: &[u8], tag: &[u8]) -> bool {
        hmac::verify(&self.0, message, tag).is_ok()
    }
}

impl From<&LineResume> for Position {
    fn from(resume: &LineResume) -> Self {
        Self {
            received: resume.received,
            consumed: resume.consumed,
            ended: resume.ended,
        }
    }
}

impl From<&LineResumed> for Position {
    fn from(resumed: &LineResumed) -> Self {
        Self {
            received: resumed.received,
            consumed: resumed.consumed,
            ended: resumed.ended,
        }
    }
}

fn resume_parts(resume: &LineResume, epoch: u64) -> Vec<u8> {
    let mut message = Vec::with_capacity(128);
    part(&mut message, RESUME);
    part(&mut message, &resume.line_id);
    part(&mut message, &epoch.to_be_bytes());
    part(&mut message, &resume.nonce);
    position(&mut message, resume.into());
    message
}

fn resumed_parts(resume: &LineResume, resumed: &LineResumed, epoch: u64) -> Vec<u8> {
    let mut message = Vec::with_capacity(160);
    part(&mut message, RESUMED);
    part(&mut message, &resume.line_id);
    part(&mut message, &epoch.to_be_bytes());
    part(&mut message, &resume.nonce);
    part(&mut message, &resumed.nonce);
    position(&mut message, resumed.into());
    message
}

fn credential_parts(line: &[u8], fingerprint: &[u8; 32]) -> Vec<u8> {
    let mut message = Vec::with_capacity(128);
    part(&mut message, CREDENTIAL);
    part(&mut message, line);
    part(&mut message, fingerprint);
    message
}

/// With its length before it, so that no two messages have the same encoding.
fn part(message: &mut Vec<u8>, bytes: &[u8]) {
    message.extend_from_slice(&(bytes.len() as u64).to_be_bytes());
    message.extend_from_slice(bytes);
}

fn position(message: &mut Vec<u8>, at: Position) {
    part(message, &at.received.to_be_bytes());
    part(message, &at.consumed.to_be_bytes());
    part(message, &[u8::from(at.ended)]);
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: Position = Position {
        received: 10,
        consumed: 4,
        ended: false,
    };

    #[test]
    fn only_the_same_key_epoch_line_nonces_and_positions_pass() {
        let (key, other) = (Key::new(&[1; 32]), Key::new(&[2; 32]));
        let resume = key.sign_resume(&[7; 16], 3, [5; 16], AT);
        assert!(key.verify_resume(&resume, 3));
        assert!(!key.verify_resume(&resume, 4));
        assert!(!other.verify_resume(&resume, 3));
        let changed = |how: fn(&mut LineResume)| {
            let mut changed = resume.clone();
            how(&mut changed);
            key.verify_resume(&changed, 3)
        };
        assert!(!changed(|resume| resume.line_id[0] ^= 1));
        assert!(!changed(|resume| resume.nonce[0] ^= 1));
        assert!(!changed(|resume| resume.nonce.push(0)));
        assert!(!changed(|resume| resume.received += 1));
        assert!(!changed(|resume| resume.consumed += 1));
        assert!(!changed(|resume| resume.ended = true));
        assert!(!changed(|resume| resume.mac.clear()));

        let resumed = key.sign_resumed(&resume, 3, [6; 16], AT);
        assert!(key.verify_resumed(&resume, &resumed, 3));
        assert!(!key.verify_resumed(&resume, &resumed, 4));
        assert!(!other.verify_resumed(&resume, &resumed, 3));
        let replayed = key.sign_resume(&[7; 16], 3, [9; 16], AT);
        assert!(!key.verify_resumed(&replayed, &resumed, 3));
        let mut changed = resumed.clone();
        changed.received -= 1;
        assert!(!key.verify_resumed(&resume, &changed, 3));
    }

    #[test]
    fn a_certificate_stands_for_a_line_only_by_its_key() {
        let (key, other) = (Key::new(&[1; 32]), Key::new(&[2; 32]));
        let mac = key.sign_credential(&[7; 16], &[5; 32]);
        assert!(key.verify_credential(&[7; 16], &[5; 32], &mac));
        assert!(!key.verify_credential(&[7; 16], &[6; 32], &mac));
        assert!(!key.verify_credential(&[8; 16], &[5; 32], &mac));
        assert!(!other.verify_credential(&[7; 16], &[5; 32], &mac));
        assert!(!key.verify_credential(&[7; 16], &[5; 32], &[]));
        // Nor is it what resumes one.
        let resume = key.sign_resume(&[7; 16], 1, [5; 16], AT);
        assert!(!key.verify_credential(&[7; 16], &[5; 32], &resume.mac));
    }
}

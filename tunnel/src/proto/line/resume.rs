//! Who may take a line up again: whoever holds the key that both ends of its sealed session drew
//! from that session (RFC 8446, 7.5). A relay never has it, so it can neither resume a line nor
//! change what is said when one is resumed.

use aws_lc_rs::hmac;

use super::Position;
use crate::proto::messages::{LineResume, LineResumed};

/// The exporter's label.
pub const LABEL: &[u8] = b"EXPORTER-throwline-line-resume";

/// Length of a line's id, and of a nonce.
pub const ID_LEN: usize = 16;

const ASKED: &[u8] = b"throwline line resume";
const ANSWERED: &[u8] = b"throwline line resumed";

/// The key of one line.
#[derive(Clone)]
pub struct Key(hmac::Key);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(..)")
    }
}

impl Key {
    /// From what the session's exporter gave for [`LABEL`], with the line's id as context.
    pub fn new(secret: &[u8; 32]) -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, secret))
    }

    /// The local proxy's RESUME.
    pub fn ask(&self, line: &[u8], epoch: u64, nonce: [u8; ID_LEN], at: Position) -> LineResume {
        let mut asked = LineResume {
            line_id: line.to_vec(),
            nonce: nonce.to_vec(),
            received: at.received,
            consumed: at.consumed,
            ended: at.ended,
            mac: Vec::new(),
        };
        asked.mac = self.tag(&asked_parts(&asked, epoch));
        asked
    }

    /// Whether a RESUME is from the other end of the session, and of this epoch.
    pub fn has_asked(&self, asked: &LineResume, epoch: u64) -> bool {
        asked.nonce.len() == ID_LEN && self.verify(&asked_parts(asked, epoch), &asked.mac)
    }

    /// The agent's OK to it.
    pub fn answer(
        &self,
        asked: &LineResume,
        epoch: u64,
        nonce: [u8; ID_LEN],
        at: Position,
    ) -> LineResumed {
        let mut answered = LineResumed {
            nonce: nonce.to_vec(),
            received: at.received,
            consumed: at.consumed,
            ended: at.ended,
            mac: Vec::new(),
        };
        answered.mac = self.tag(&answered_parts(asked, &answered, epoch));
        answered
    }

    /// Whether an OK is from the other end of the session, and to this RESUME.
    pub fn has_answered(&self, asked: &LineResume, answered: &LineResumed, epoch: u64) -> bool {
        answered.nonce.len() == ID_LEN
            && self.verify(&answered_parts(asked, answered, epoch), &answered.mac)
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
    fn from(asked: &LineResume) -> Self {
        Self {
            received: asked.received,
            consumed: asked.consumed,
            ended: asked.ended,
        }
    }
}

impl From<&LineResumed> for Position {
    fn from(answered: &LineResumed) -> Self {
        Self {
            received: answered.received,
            consumed: answered.consumed,
            ended: answered.ended,
        }
    }
}

fn asked_parts(asked: &LineResume, epoch: u64) -> Vec<u8> {
    let mut message = Vec::with_capacity(128);
    part(&mut message, ASKED);
    part(&mut message, &asked.line_id);
    part(&mut message, &epoch.to_be_bytes());
    part(&mut message, &asked.nonce);
    position(&mut message, asked.into());
    message
}

fn answered_parts(asked: &LineResume, answered: &LineResumed, epoch: u64) -> Vec<u8> {
    let mut message = Vec::with_capacity(160);
    part(&mut message, ANSWERED);
    part(&mut message, &asked.line_id);
    part(&mut message, &epoch.to_be_bytes());
    part(&mut message, &asked.nonce);
    part(&mut message, &answered.nonce);
    position(&mut message, answered.into());
    message
}

/// With its length before it, so that no two messages run together alike.
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
        let asked = key.ask(&[7; 16], 3, [5; 16], AT);
        assert!(key.has_asked(&asked, 3));
        assert!(!key.has_asked(&asked, 4));
        assert!(!other.has_asked(&asked, 3));
        let changed = |how: fn(&mut LineResume)| {
            let mut changed = asked.clone();
            how(&mut changed);
            key.has_asked(&changed, 3)
        };
        assert!(!changed(|asked| asked.line_id[0] ^= 1));
        assert!(!changed(|asked| asked.nonce[0] ^= 1));
        assert!(!changed(|asked| asked.nonce.push(0)));
        assert!(!changed(|asked| asked.received += 1));
        assert!(!changed(|asked| asked.consumed += 1));
        assert!(!changed(|asked| asked.ended = true));
        assert!(!changed(|asked| asked.mac.clear()));

        let answered = key.answer(&asked, 3, [6; 16], AT);
        assert!(key.has_answered(&asked, &answered, 3));
        assert!(!key.has_answered(&asked, &answered, 4));
        assert!(!other.has_answered(&asked, &answered, 3));
        let replayed = key.ask(&[7; 16], 3, [9; 16], AT);
        assert!(!key.has_answered(&replayed, &answered, 3));
        let mut changed = answered.clone();
        changed.received -= 1;
        assert!(!key.has_answered(&asked, &changed, 3));
    }
}

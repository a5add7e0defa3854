//! What a dialer signs to prove that it holds the key of the assertion's certificate.

/// Domain separation: nothing else that this key signs begins so.
const CONTEXT: &[u8] = b"throwline carrier proof\0";

/// The bytes to sign. Every part is preceded by its length, so that no two sets of parts give the
/// same bytes. The assertion goes in by its SHA-256, which the caller computes.
pub fn transcript(
    relay_nonce: &[u8],
    peer_nonce: &[u8],
    assertion_hash: &[u8; 32],
    audience: &str,
    version: u32,
) -> Vec<u8> {
    let parts: [&[u8]; 5] = [
        relay_nonce,
        peer_nonce,
        assertion_hash,
        audience.as_bytes(),
        &version.to_be_bytes(),
    ];
    let mut out = Vec::with_capacity(256);
    out.extend_from_slice(CONTEXT);
    for part in parts {
        out.extend_from_slice(&(part.len() as u64).to_be_bytes());
        out.extend_from_slice(part);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes() {
        let got = transcript(&[1, 2], &[3], &[9; 32], "https://r", 1);
        let mut want = b"throwline carrier proof\0".to_vec();
        want.extend_from_slice(b"\0\0\0\0\0\0\0\x02\x01\x02");
        want.extend_from_slice(b"\0\0\0\0\0\0\0\x01\x03");
        want.extend_from_slice(b"\0\0\0\0\0\0\0\x20");
        want.extend_from_slice(&[9; 32]);
        want.extend_from_slice(b"\0\0\0\0\0\0\0\x09https://r");
        want.extend_from_slice(b"\0\0\0\0\0\0\0\x04\0\0\0\x01");
        assert_eq!(got, want);
    }

    #[test]
    fn moving_a_byte_between_parts_changes_the_bytes() {
        let one = transcript(&[1, 2], &[3], &[0; 32], "a", 1);
        let other = transcript(&[1], &[2, 3], &[0; 32], "a", 1);
        assert_ne!(one, other);
    }
}

//! Percent-encoding (RFC 3986, section 2.1), read strictly.

use percent_encoding::percent_decode_str;

/// Decodes once; `None` for a `%` without two hexadecimal digits behind it.
#[must_use]
pub fn decode(text: &str) -> Option<Vec<u8>> {
    // `percent_encoding` leaves such a `%` as it is.
    let is_escape = |rest: &str| {
        let digits = rest.as_bytes().get(..2);
        digits.is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit))
    };
    let is_strict = text.split('%').skip(1).all(is_escape);
    is_strict.then(|| percent_decode_str(text).collect())
}

/// As a person reads it, for logs and audits only: what cannot be decoded stays as it came, and what is
/// not UTF-8 is replaced.
#[must_use]
pub fn decode_for_people(text: &str) -> String {
    match decode(text) {
        Some(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_are_read_once() {
        assert_eq!(decode("a%2Fb%2fc").unwrap(), b"a/b/c");
        assert_eq!(decode("%2525").unwrap(), b"%25");
        for broken in ["%", "%a", "%g0", "%0g", "a%+1"] {
            assert_eq!(decode(broken), None, "{broken}");
        }
        assert_eq!(decode_for_people("%ff%"), "%ff%");
        assert_eq!(decode_for_people("%ff"), "\u{fffd}");
    }
}

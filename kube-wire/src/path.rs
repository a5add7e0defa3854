//! The structure of an API path. The API server authorizes by the decoded path; so that nothing between
//! can read it differently, whatever decodes to other than itself in the structure is an error.

use crate::percent;

/// Why a path has no structure that all read alike. The client is at fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// `//`, which some servers take for `/`.
    #[error("the path has an empty segment")]
    EmptySegment,
    /// A `%` without two hexadecimal digits.
    #[error("the path has a broken percent-encoding")]
    Encoding,
    /// Some servers resolve these.
    #[error("the path has a \".\" or \"..\" segment")]
    Dots,
    /// What a second decoding, or a file system, would read differently.
    #[error("the path hides a separator, a percent sign or a control character")]
    Hidden,
}

/// The decoded segments of a path that begins with `/`. The last one may be empty, for a trailing slash.
/// `has_suffix`: the path goes on behind it.
///
/// # Errors
/// [`PathError`].
pub fn segments(path: &str, has_suffix: bool) -> Result<Vec<Vec<u8>>, PathError> {
    let mut out = Vec::new();
    let mut raw = path.split('/').skip(1).peekable();
    while let Some(segment) = raw.next() {
        let is_last = raw.peek().is_none() && !has_suffix;
        if segment.is_empty() && !is_last {
            return Err(PathError::EmptySegment);
        }
        let decoded = percent::decode(segment).ok_or(PathError::Encoding)?;
        if decoded == b"." || decoded == b".." {
            return Err(PathError::Dots);
        }
        let separator = |byte: &u8| matches!(byte, b'/' | b'\\' | b'%') || byte.is_ascii_control();
        if decoded.iter().any(separator) {
            return Err(PathError::Hidden);
        }
        out.push(decoded);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_structure_has_one_reading() {
        let read = |path: &str| segments(path, false);
        assert_eq!(
            read("/a/%62/"),
            Ok(vec![b"a".to_vec(), b"b".to_vec(), vec![]])
        );
        for (path, error) in [
            ("/a//b", PathError::EmptySegment),
            ("//", PathError::EmptySegment),
            ("/a/%", PathError::Encoding),
            ("/a/%4", PathError::Encoding),
            ("/a/%zz", PathError::Encoding),
            ("/a/..", PathError::Dots),
            ("/%2e/b", PathError::Dots),
            ("/a%2fb", PathError::Hidden),
            ("/a%5Cb", PathError::Hidden),
            ("/a%2525", PathError::Hidden),
            ("/a%00", PathError::Hidden),
        ] {
            assert_eq!(read(path), Err(error), "{path}");
        }
        assert_eq!(segments("/a/", true), Err(PathError::EmptySegment));
    }
}

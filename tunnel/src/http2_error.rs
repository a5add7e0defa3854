//! Readable texts for errors of HTTP/2: h2's own text ends with the peer's debug data as Rust prints
//! bytes.

/// Which end ended what, and the reason that HTTP/2 has for it.
pub fn describe(error: &h2::Error) -> String {
    let Some(reason) = error.reason() else {
        return error.to_string();
    };
    let end = if error.is_remote() {
        "the other end"
    } else {
        "this end"
    };
    let what = if error.is_go_away() {
        "ended the connection"
    } else {
        "reset the stream"
    };
    format!("{end} {what}: {reason}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_shown_in_words() {
        let text = describe(&h2::Reason::ENHANCE_YOUR_CALM.into());
        assert!(
            text.starts_with("this end reset the stream: detected excessive load"),
            "{text}"
        );
    }
}

//! Text of others, made fit to be shown to a person.
//!
//! Whatever another machine sends (an agent's version, a relay's refusal, a balancer's error page)
//! can hold sequences that repaint a terminal, fill its clipboard (OSC 52) or forge a line of
//! output. All that a command prints goes through [`escape`]; logs do so by themselves
//! ([`crate::telemetry`]).

pub use crate::telemetry::escape::is_unsafe;

use crate::telemetry::escape::bare;
use std::borrow::Cow;

/// The text with each character escaped, as in JSON, that could end a line, steer a terminal or
/// hide: C0 and C1 controls, DEL, line and paragraph separators, bidirectional and invisible
/// marks. What it returns is one line.
#[must_use]
pub fn escape(text: &str) -> Cow<'_, str> {
    if !text.contains(is_unsafe) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    // Writing to a string does not fail.
    let _ = bare(&mut out, format_args!("{text}"));
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_steers_a_terminal_is_left() {
        let all: String = ('\0'..='\u{2ff}').chain('\u{2000}'..='\u{206f}').collect();
        let shown = escape(&all);
        let is_left = |c: char| {
            c.is_control()
                || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}')
        };
        assert!(!shown.contains(is_left), "{shown}");
        for (text, want) in [
            (
                "\u{1b}[2J\u{1b}]52;c;eA==\u{7}",
                "\\u001b[2J\\u001b]52;c;eA==\\u0007",
            ),
            ("a\nb\r\tc", "a\\nb\\r\\tc"),
            (
                "\u{9b}31m\u{202e}\u{2028}\u{feff}",
                "\\u009b31m\\u202e\\u2028\\ufeff",
            ),
        ] {
            assert_eq!(escape(text), want);
        }
    }

    #[test]
    fn other_text_stays_as_it_is() {
        for text in ["", "plain", "größer 日本語 🚢", "C:\\x \"y\""] {
            assert!(matches!(escape(text), Cow::Borrowed(same) if same == text));
        }
    }
}

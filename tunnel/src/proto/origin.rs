//! The component that a text for people is from, as the text's beginning.
//!
//! A component puts its name in front of each text that it sends to another one, so that a text which is
//! displayed alone names its source. A receiver that inserts such a text into a sentence of its own
//! removes the name.
//!
//! ```
//! use throwline_tunnel::proto::origin;
//!
//! let text = origin::mark(origin::RELAY, "this relay is full; try again later");
//! assert_eq!(text, "throwline relay: this relay is full; try again later");
//! assert_eq!(origin::mark(origin::RELAY, &text), text);
//! assert_eq!(origin::without(&text), "this relay is full; try again later");
//! ```

/// The beginning of a relay's texts.
pub const RELAY: &str = "throwline relay: ";
/// The beginning of an agent's texts.
pub const AGENT: &str = "throwline agent: ";

/// The text with this origin in front, unless it is empty or has it already.
pub fn mark(origin: &str, text: &str) -> String {
    if text.is_empty() || text.starts_with(origin) {
        return text.to_owned();
    }
    format!("{origin}{text}")
}

/// The text without its origin, if it has one.
pub fn without(text: &str) -> &str {
    let stripped = text
        .strip_prefix(RELAY)
        .or_else(|| text.strip_prefix(AGENT));
    stripped.unwrap_or(text)
}

//! Escaping for one line of text or JSON.

use std::fmt::{self, Write};

/// Whether `c` could end a line or steer a terminal: C0, DEL, C1, the line and paragraph
/// separators, the marks that reverse the direction of text, and invisible characters, by
/// which a name can look like another.
pub fn is_unsafe(c: char) -> bool {
    c.is_control()
        || matches!(
            c,
            '\u{2028}' | '\u{2029}' | '\u{061c}' | '\u{200b}'..='\u{200f}'
        )
        || matches!(c, '\u{00ad}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
        || matches!(c, '\u{202a}'..='\u{202e}')
}

/// Writes what is written to it, escaped as in a JSON string, quotes and backslashes only if
/// `quoted`.
pub(super) struct Escaped<'a> {
    pub(super) out: &'a mut dyn Write,
    pub(super) quoted: bool,
}

impl Write for Escaped<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let quoted = self.quoted;
        let special = |c: char| is_unsafe(c) || quoted && matches!(c, '"' | '\\');
        let mut rest = text;
        while let Some(at) = rest.find(special) {
            let (plain, from) = rest.split_at(at);
            self.out.write_str(plain)?;
            let mut chars = from.chars();
            if let Some(c) = chars.next() {
                self.special(c)?;
            }
            rest = chars.as_str();
        }
        self.out.write_str(rest)
    }
}

impl Escaped<'_> {
    fn special(&mut self, c: char) -> fmt::Result {
        match c {
            '"' => self.out.write_str("\\\""),
            '\\' => self.out.write_str("\\\\"),
            '\n' => self.out.write_str("\\n"),
            '\r' => self.out.write_str("\\r"),
            '\t' => self.out.write_str("\\t"),
            // None of them lies outside the basic plane, so four digits do.
            c => write!(self.out, "\\u{:04x}", u32::from(c)),
        }
    }
}

/// Without quotes: messages, and values that need none.
pub(crate) fn bare(out: &mut dyn Write, args: fmt::Arguments<'_>) -> fmt::Result {
    Escaped { out, quoted: false }.write_fmt(args)
}

/// In quotes, which also makes it a JSON string.
pub(super) fn quoted(out: &mut dyn Write, args: fmt::Arguments<'_>) -> fmt::Result {
    out.write_char('"')?;
    Escaped { out, quoted: true }.write_fmt(args)?;
    out.write_char('"')
}

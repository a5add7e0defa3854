//! What an entry of ours is to be, apart from how the file writes it, and how we write it.
//!
//! Most readers of kubeconfigs read YAML 1.1 (client-go, Python's), in which `no`, `on`, `0o17`,
//! `1:30` and `2001-01-01` are no strings. So a string is written plain only if it cannot be
//! anything else in either version, and in double quotes otherwise.

use std::fmt::Write as _;

use granit_parser::ScalarStyle;

use super::document::{Kind, Node};

/// A value as we read or write it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Tree {
    /// A plain scalar that may be something else than a string, as the file has it.
    Raw(String),
    Text(String),
    List(Vec<Tree>),
    Map(Vec<(Tree, Tree)>),
}

impl Tree {
    pub(super) fn text(text: impl Into<String>) -> Self {
        Self::Text(text.into())
    }

    /// `None` for what only means something where it is: anchors, aliases, tags, and keys that are
    /// no scalars.
    pub(super) fn of(node: &Node<'_>) -> Option<Self> {
        if node.decorated {
            return None;
        }
        Some(match &node.kind {
            Kind::Scalar { text, style } => match style {
                // An empty one is null.
                ScalarStyle::Plain if node.is_null() => Self::Raw("null".to_owned()),
                // One of several paragraphs is a string.
                ScalarStyle::Plain if !is_plain(text) && !text.contains('\n') => {
                    Self::Raw(text.to_string())
                }
                _ => Self::Text(text.to_string()),
            },
            Kind::Sequence { items, .. } => {
                Self::List(items.iter().map(Self::of).collect::<Option<_>>()?)
            }
            Kind::Mapping { pairs, .. } => {
                let pair = |(key, value): &(Node<'_>, Node<'_>)| {
                    key.text()?;
                    Some((Self::of(key)?, Self::of(value)?))
                };
                Self::Map(pairs.iter().map(pair).collect::<Option<_>>()?)
            }
            Kind::Alias(_) => return None,
        })
    }

    pub(super) fn as_text(&self) -> Option<&str> {
        match self {
            Self::Raw(text) | Self::Text(text) => Some(text),
            Self::List(_) | Self::Map(_) => None,
        }
    }

    pub(super) fn get(&self, key: &str) -> Option<&Self> {
        let Self::Map(pairs) = self else { return None };
        let mut pairs = pairs.iter();
        pairs
            .find(|(found, _)| found.as_text() == Some(key))
            .map(|(_, value)| value)
    }

    /// The value of that key, made null if it is not there; a map is made of what is none.
    pub(super) fn entry(&mut self, key: &str) -> &mut Self {
        if !matches!(self, Self::Map(_)) {
            *self = Self::Map(Vec::new());
        }
        let Self::Map(pairs) = self else {
            unreachable!("it was made one")
        };
        let found = pairs.iter().position(|(k, _)| k.as_text() == Some(key));
        let at = found.unwrap_or_else(|| {
            pairs.push((Self::text(key), Self::Raw("null".to_owned())));
            pairs.len() - 1
        });
        &mut pairs[at].1
    }

    pub(super) fn set(&mut self, key: &str, value: Self) {
        *self.entry(key) = value;
    }

    pub(super) fn drop_keys(&mut self, keys: &[&str]) {
        if let Self::Map(pairs) = self {
            pairs.retain(|(key, _)| !key.as_text().is_some_and(|key| keys.contains(&key)));
        }
    }

    /// In block style as the item of a list, behind its `- `, whose next lines begin at `column`.
    /// No line break at its end.
    pub(super) fn block(&self, column: usize, line_break: &str) -> String {
        let mut out = String::new();
        self.write_block(&mut out, column, line_break);
        out
    }

    fn write_block(&self, out: &mut String, column: usize, line_break: &str) {
        match self {
            Self::Map(pairs) if !pairs.is_empty() => {
                for (at, (key, value)) in pairs.iter().enumerate() {
                    if at > 0 {
                        new_line(out, column, line_break);
                    }
                    key.write_scalar(out, Place::Block);
                    out.push(':');
                    value.write_value(out, column, line_break);
                }
            }
            Self::Raw(_) | Self::Text(_) => self.write_scalar(out, Place::Block),
            Self::List(_) | Self::Map(_) => self.write_flow(out),
        }
    }

    /// Behind a key and its colon at `column`.
    pub(super) fn write_value(&self, out: &mut String, column: usize, line_break: &str) {
        match self {
            Self::Map(pairs) if !pairs.is_empty() => {
                new_line(out, column + 2, line_break);
                self.write_block(out, column + 2, line_break);
            }
            Self::List(items) if !items.is_empty() => {
                for item in items {
                    new_line(out, column, line_break);
                    out.push_str("- ");
                    item.write_block(out, column + 2, line_break);
                }
            }
            _ => {
                out.push(' ');
                self.write_block(out, column, line_break);
            }
        }
    }

    /// In flow style, on one line; strings as in JSON.
    pub(super) fn flow(&self) -> String {
        let mut out = String::new();
        self.write_flow(&mut out);
        out
    }

    fn write_flow(&self, out: &mut String) {
        match self {
            Self::Raw(_) | Self::Text(_) => self.write_scalar(out, Place::Flow),
            Self::List(items) => {
                out.push('[');
                for (at, item) in items.iter().enumerate() {
                    if at > 0 {
                        out.push_str(", ");
                    }
                    item.write_flow(out);
                }
                out.push(']');
            }
            Self::Map(pairs) => {
                out.push('{');
                for (at, (key, value)) in pairs.iter().enumerate() {
                    if at > 0 {
                        out.push_str(", ");
                    }
                    key.write_scalar(out, Place::Flow);
                    out.push_str(": ");
                    value.write_flow(out);
                }
                out.push('}');
            }
        }
    }

    fn write_scalar(&self, out: &mut String, place: Place) {
        match self {
            Self::Raw(text) => out.push_str(text),
            // Old readers do not take a plain `https:` in flow style.
            Self::Text(text) if place == Place::Block && is_plain(text) => out.push_str(text),
            Self::Text(text) => write_quoted(out, text),
            Self::List(_) | Self::Map(_) => self.write_flow(out),
        }
    }

    /// Every line of a mapping's pairs at `column`, the first with its indentation.
    pub(super) fn pair_at(key: &str, value: &Tree, column: usize, line_break: &str) -> String {
        let mut out = " ".repeat(column);
        Tree::text(key).write_scalar(&mut out, Place::Block);
        out.push(':');
        value.write_value(&mut out, column, line_break);
        out
    }

    /// A scalar as it is written there.
    pub(super) fn scalar(&self, place: Place) -> String {
        let mut out = String::new();
        self.write_scalar(&mut out, place);
        out
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Block,
    Flow,
}

fn new_line(out: &mut String, column: usize, line_break: &str) {
    out.push_str(line_break);
    out.extend(std::iter::repeat_n(' ', column));
}

/// Whether it is a string and nothing else when written plain in block style, in YAML 1.1 (with
/// all that go-yaml and PyYAML resolve) and 1.2.
pub(super) fn is_plain(text: &str) -> bool {
    // A letter or a slash begins no number, time, merge key or null but these words.
    const WORDS: [&str; 12] = [
        "y", "n", "yes", "no", "on", "off", "true", "false", "null", "nan", "inf", "infinity",
    ];
    let starts = |c: char| c.is_ascii_alphabetic() || c == '/';
    let inner = |c: char| c.is_ascii_alphanumeric() || "/._-:".contains(c);
    text.starts_with(starts)
        && text.chars().all(inner)
        && !text.ends_with(':')
        && !WORDS.iter().any(|word| text.eq_ignore_ascii_case(word))
}

/// Double quotes, with the escapes that JSON and both versions of YAML have.
fn write_quoted(out: &mut String, text: &str) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            // Not printable in YAML, a line break in its version 1.1, or a mark of the order of bytes.
            '\0'..='\u{1f}'
            | '\u{7f}'..='\u{9f}'
            | '\u{2028}'
            | '\u{2029}'
            | '\u{feff}'
            | '\u{fffe}'
            | '\u{ffff}' => {
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            _ => out.push(c),
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_cannot_be_anything_else_is_plain() {
        for plain in [
            "throwline-prod-eu",
            "https://127.0.0.1:47611/clusters/a",
            "/home/ann/.throwline/loopback-ca.pem",
            "a.throwline.internal",
            "ye",
        ] {
            assert_eq!(Tree::text(plain).scalar(Place::Block), plain);
            assert_eq!(
                Tree::text(plain).scalar(Place::Flow),
                format!("\"{plain}\"")
            );
        }
        for quoted in [
            "",
            " ",
            "no",
            "NO",
            "Yes",
            "y",
            "N",
            "on",
            "Off",
            "true",
            "False",
            "null",
            "Null",
            "~",
            "0",
            "0o17",
            "017",
            "1:30",
            "1_000",
            "0x1f",
            "1e3",
            "1.5",
            ".5",
            ".inf",
            "-1",
            "+1",
            "2001-01-01",
            "<<",
            "=",
            "a b",
            "a: b",
            "a #b",
            "a:",
            "-",
            "- a",
            "?",
            "*a",
            "&a",
            "!a",
            "{",
            "[",
            "a,b",
            "@a",
            "%a",
            "|",
            ">",
            "'a'",
            "/home/ann b/x",
            "/home/ä/x",
            "nan",
        ] {
            let text = Tree::text(quoted).scalar(Place::Block);
            assert_eq!(text, format!("\"{quoted}\""));
        }
        assert_eq!(
            Tree::text("a\"\\\n\u{85}\u{2028}\u{1b}").scalar(Place::Block),
            r#""a\"\\\n\u0085\u2028\u001b""#
        );
    }
}

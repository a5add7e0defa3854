//! Fields of events and spans.

use super::escape::{bare, is_unsafe, quoted};
use std::fmt::{self, Debug, Write};
use tracing::{
    Event,
    field::{Field, Visit},
    span::Record,
};
use tracing_subscriber::{
    field::RecordFields,
    fmt::{FormatFields, FormattedFields, format::Writer},
};

/// ` key=value`, values quoted where they must be.
pub(super) struct TextFields;

/// `,"key":value`.
pub(super) struct JsonFields;

impl<'writer> FormatFields<'writer> for TextFields {
    fn format_fields<R: RecordFields>(
        &self,
        mut writer: Writer<'writer>,
        fields: R,
    ) -> fmt::Result {
        let mut visitor = TextVisitor::new(&mut writer);
        fields.record(&mut visitor);
        visitor.result
    }

    fn add_fields(
        &self,
        current: &'writer mut FormattedFields<Self>,
        fields: &Record<'_>,
    ) -> fmt::Result {
        self.format_fields(current.as_writer(), fields)
    }
}

impl<'writer> FormatFields<'writer> for JsonFields {
    fn format_fields<R: RecordFields>(
        &self,
        mut writer: Writer<'writer>,
        fields: R,
    ) -> fmt::Result {
        let mut visitor = JsonVisitor::new(&mut writer);
        fields.record(&mut visitor);
        visitor.result
    }

    fn add_fields(
        &self,
        current: &'writer mut FormattedFields<Self>,
        fields: &Record<'_>,
    ) -> fmt::Result {
        self.format_fields(current.as_writer(), fields)
    }
}

/// An event's fields but its message, as ` key=value`.
pub(super) fn text_of(event: &Event<'_>, out: &mut dyn Write) -> fmt::Result {
    let mut visitor = TextVisitor::new(out);
    visitor.message = MessageIs::Ahead;
    event.record(&mut visitor);
    visitor.result
}

/// The same as `,"key":value`.
pub(super) fn json_of(event: &Event<'_>, out: &mut dyn Write) -> fmt::Result {
    let mut visitor = JsonVisitor::new(out);
    visitor.message = MessageIs::Ahead;
    event.record(&mut visitor);
    visitor.result
}

/// Whether the next field `message` is an event's own text. tracing puts that first; a later field
/// that is called `message`, too, is a field like any other.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum MessageIs {
    #[default]
    None,
    Ahead,
}

impl MessageIs {
    fn takes(&mut self, field: &Field) -> bool {
        let is_it = *self == Self::Ahead && field.name() == "message";
        if is_it {
            *self = Self::None;
        }
        is_it
    }
}

/// Finds the message, which stands before the fields.
pub(super) struct Message {
    pub(super) text: String,
    message: MessageIs,
}

impl Default for Message {
    fn default() -> Self {
        Self {
            text: String::new(),
            message: MessageIs::Ahead,
        }
    }
}

impl Visit for Message {
    fn record_str(&mut self, field: &Field, value: &str) {
        if self.message.takes(field) {
            self.text.push_str(value);
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if self.message.takes(field) {
            // Writing to a String cannot fail, and a failing Debug leaves what it wrote.
            let _ = write!(self.text, "{value:?}");
        }
    }
}

struct TextVisitor<'a> {
    out: &'a mut dyn Write,
    message: MessageIs,
    result: fmt::Result,
}

impl<'a> TextVisitor<'a> {
    fn new(out: &'a mut dyn Write) -> Self {
        Self {
            out,
            message: MessageIs::None,
            result: Ok(()),
        }
    }

    fn write(&mut self, field: &Field, text: &str) {
        if self.message.takes(field) || self.result.is_err() {
            return;
        }
        let plain = |c: char| !is_unsafe(c) && !c.is_whitespace() && !matches!(c, '"' | '=' | '\\');
        let out = &mut *self.out;
        self.result = write!(out, " {}=", field.name()).and_then(|()| {
            if !text.is_empty() && text.chars().all(plain) {
                out.write_str(text)
            } else {
                quoted(out, format_args!("{text}"))
            }
        });
    }
}

impl Visit for TextVisitor<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.write(field, value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.write(field, &format!("{value:?}"));
    }
}

/// Keys of an event's and of a span's object that are ours.
const RESERVED: [&str; 6] = ["time", "level", "target", "message", "spans", "name"];

struct JsonVisitor<'a> {
    out: &'a mut dyn Write,
    message: MessageIs,
    result: fmt::Result,
}

impl<'a> JsonVisitor<'a> {
    fn new(out: &'a mut dyn Write) -> Self {
        Self {
            out,
            message: MessageIs::None,
            result: Ok(()),
        }
    }

    fn write(&mut self, field: &Field, value: fmt::Arguments<'_>, is_text: bool) {
        if self.message.takes(field) || self.result.is_err() {
            return;
        }
        // Of two equal keys, readers keep one.
        let prefix = if RESERVED.contains(&field.name()) {
            "field_"
        } else {
            ""
        };
        let out = &mut *self.out;
        self.result = out
            .write_char(',')
            .and_then(|()| quoted(out, format_args!("{prefix}{}", field.name())))
            .and_then(|()| out.write_char(':'))
            .and_then(|()| {
                if is_text {
                    quoted(out, value)
                } else {
                    bare(out, value)
                }
            });
    }
}

impl Visit for JsonVisitor<'_> {
    fn record_f64(&mut self, field: &Field, value: f64) {
        // JSON has no NaN and no infinity.
        self.write(field, format_args!("{value}"), !value.is_finite());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.write(field, format_args!("{value}"), false);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.write(field, format_args!("{value}"), false);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.write(field, format_args!("{value}"), false);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.write(field, format_args!("{value}"), true);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.write(field, format_args!("{value:?}"), true);
    }
}

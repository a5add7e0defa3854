//! Whole events.

use super::{
    escape::{bare, quoted},
    fields::{Message, json_of, text_of},
    rate_limit::LeftOut,
};
use std::fmt;
use time::{OffsetDateTime, format_description::BorrowedFormatItem, macros::format_description};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::{
    fmt::{FmtContext, FormatEvent, FormatFields, FormattedFields, format::Writer},
    registry::LookupSpan,
};

/// RFC 3339 in UTC with milliseconds.
const TIME: &[BorrowedFormatItem<'_>] =
    format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z");

/// The text instead of lines of a flood, before the first that is written again.
const LEFT_OUT: &str = "lines like the next one were left out";

/// `2026-01-31T12:00:00.000Z  INFO relay: carrier accepted cluster=prod-eu`
pub(super) struct TextLine;

/// `{"time":…,"level":…,"target":…,"message":…,"cluster":…,"spans":[{"name":…}]}`
pub(super) struct JsonLine;

impl<S, N> FormatEvent<S, N> for TextLine
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut out: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let metadata = event.metadata();
        let level = *metadata.level();
        if out.has_ansi_escapes() {
            write!(
                out,
                "\x1b[2m{}\x1b[0m {}{level:>5}\x1b[0m ",
                now(),
                colour(level)
            )?;
        } else {
            write!(out, "{} {level:>5} ", now())?;
        }
        write!(out, "{}: ", part(metadata.target()))?;
        let mut message = Message::default();
        event.record(&mut message);
        bare(&mut out, format_args!("{}", message.text))?;
        text_of(event, &mut out)?;
        // The innermost span stands nearest, as it is the most specific one.
        for span in context.event_scope().into_iter().flatten() {
            let extensions = span.extensions();
            if let Some(fields) = extensions.get::<FormattedFields<N>>() {
                out.write_str(fields)?;
            }
        }
        out.write_char('\n')
    }
}

impl<S, N> FormatEvent<S, N> for JsonLine
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut out: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let metadata = event.metadata();
        let mut message = Message::default();
        event.record(&mut message);
        write!(
            out,
            "{{\"time\":\"{}\",\"level\":\"{}\",\"target\":",
            now(),
            metadata.level()
        )?;
        quoted(&mut out, format_args!("{}", metadata.target()))?;
        out.write_str(",\"message\":")?;
        quoted(&mut out, format_args!("{}", message.text))?;
        json_of(event, &mut out)?;
        out.write_str(",\"spans\":[")?;
        let scope = context.event_scope();
        let spans = scope.into_iter().flat_map(|scope| scope.from_root());
        for (index, span) in spans.enumerate() {
            out.write_str(if index == 0 {
                "{\"name\":"
            } else {
                ",{\"name\":"
            })?;
            quoted(&mut out, format_args!("{}", span.name()))?;
            let extensions = span.extensions();
            if let Some(fields) = extensions.get::<FormattedFields<N>>() {
                out.write_str(fields)?;
            }
            out.write_char('}')?;
        }
        out.write_str("]}\n")
    }
}

impl LeftOut for TextLine {
    fn left_out(&self, out: &mut Writer<'_>, count: u64) -> fmt::Result {
        writeln!(
            out,
            "{} {:>5} log: {LEFT_OUT} count={count}",
            now(),
            Level::WARN
        )
    }
}

impl LeftOut for JsonLine {
    fn left_out(&self, out: &mut Writer<'_>, count: u64) -> fmt::Result {
        writeln!(
            out,
            "{{\"time\":\"{}\",\"level\":\"{}\",\"target\":\"log\",\"message\":\"{LEFT_OUT}\",\"count\":{count},\"spans\":[]}}",
            now(),
            Level::WARN,
        )
    }
}

fn now() -> String {
    OffsetDateTime::now_utc().format(TIME).unwrap_or_default()
}

/// `throwline_relay::accept` is `relay` to people.
fn part(target: &str) -> &str {
    let target = target.strip_prefix("throwline_").unwrap_or(target);
    target.split("::").next().unwrap_or(target)
}

fn colour(level: Level) -> &'static str {
    match level {
        Level::ERROR => "\x1b[31m",
        Level::WARN => "\x1b[33m",
        Level::INFO => "\x1b[32m",
        Level::DEBUG => "\x1b[34m",
        Level::TRACE => "\x1b[35m",
    }
}

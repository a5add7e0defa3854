//! Logs, on stderr: one event is one line, whatever stands in it.
//!
//! **Invariant:** no control character, no escape sequence and no Unicode line separator from a
//! field or message reaches the output; a peer cannot forge an event or repaint a terminal.
//!
//! **Invariant:** however fast peers do what is logged, a place in the code writes 100 lines a
//! second at most, in the long run, and one a second of one peer.

pub(crate) mod escape;
mod fields;
mod line;
mod rate_limit;

use fields::{JsonFields, TextFields};
use line::{JsonLine, TextLine};
use rate_limit::RateLimited;
use std::{env, fmt, io::IsTerminal, str::FromStr};
use tracing::{Dispatch, dispatcher};
use tracing_subscriber::{EnvFilter, fmt::MakeWriter, layer::SubscriberExt, registry};

pub use rate_limit::left_out;

/// The variable that overrides the filter, in the syntax of `tracing_subscriber::EnvFilter`:
/// `debug`, `info,throwline_tunnel=trace`.
pub const FILTER_VARIABLE: &str = "THROWLINE_LOG";

/// How events are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// For machines: one object a line.
    Json,
}

impl FromStr for LogFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err(format!("{text:?} is not a log format: text or json")),
        }
    }
}

impl fmt::Display for LogFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Text => "text",
            Self::Json => "json",
        })
    }
}

/// Logging cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The log filter cannot be parsed.
    #[error("the log filter {filter:?} (from {FILTER_VARIABLE}) is not understood: {reason}")]
    Filter {
        /// The filter as it was given.
        filter: String,
        /// The parser's reason.
        reason: String,
    },
    /// Logging was set up before.
    #[error("logging was set up already")]
    Twice,
}

/// Sends the process's events to stderr. `default_filter` holds unless `THROWLINE_LOG` is set.
///
/// # Errors
/// The filter is invalid, or a subscriber is installed already.
pub fn init(format: LogFormat, default_filter: &str) -> Result<(), TelemetryError> {
    let filter = env::var(FILTER_VARIABLE)
        .ok()
        .filter(|filter| !filter.trim().is_empty())
        .unwrap_or_else(|| default_filter.to_owned());
    // https://no-color.org
    let no_color = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let colour = std::io::stderr().is_terminal() && !no_color;
    let dispatch = dispatch(format, &filter, colour, std::io::stderr)?;
    dispatcher::set_global_default(dispatch).map_err(|_| TelemetryError::Twice)
}

/// The same with a writer of the caller's, for tests.
///
/// # Errors
/// The filter is invalid.
pub fn dispatch<W>(
    format: LogFormat,
    filter: &str,
    colour: bool,
    writer: W,
) -> Result<Dispatch, TelemetryError>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let filter = EnvFilter::try_new(filter).map_err(|error| TelemetryError::Filter {
        filter: filter.to_owned(),
        reason: error.to_string(),
    })?;
    let layer = tracing_subscriber::fmt::layer().with_writer(writer);
    let registry = registry().with(filter);
    Ok(match format {
        LogFormat::Text => registry
            .with(
                layer
                    .with_ansi(colour)
                    .fmt_fields(TextFields)
                    .event_format(RateLimited::new(TextLine)),
            )
            .into(),
        LogFormat::Json => registry
            .with(
                layer
                    .with_ansi(false)
                    .fmt_fields(JsonFields)
                    .event_format(RateLimited::new(JsonLine)),
            )
            .into(),
    })
}

#[cfg(test)]
mod tests;

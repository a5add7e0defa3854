use super::*;
use std::{
    io::{self, Write},
    sync::{Arc, Mutex},
};

#[derive(Clone, Default)]
struct Captured(Arc<Mutex<Vec<u8>>>);

impl Write for Captured {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn capture(format: LogFormat, filter: &str, events: impl FnOnce()) -> String {
    let captured = Captured::default();
    let writer = captured.clone();
    let dispatch = dispatch(format, filter, false, move || writer.clone()).unwrap();
    tracing::dispatcher::with_default(&dispatch, events);
    let bytes = captured.0.lock().unwrap().clone();
    String::from_utf8(bytes).unwrap()
}

/// Everything that has ever ended a line or steered a terminal.
const EVIL: &str = "a\nb\r\x1b[31mc\u{2028}d\u{2029}e\u{85}f\u{9b}g\u{7f}h\u{202e}i\0\"\\";

fn evil_event() {
    let span = tracing::info_span!("carrier", user = EVIL, late = tracing::field::Empty);
    let _entered = span.enter();
    span.record("late", EVIL);
    let error = io::Error::other(EVIL);
    tracing::info!(text = EVIL, shown = %EVIL, debugged = ?[EVIL], %error, "before {EVIL} after");
}

fn is_one_clean_line(line: &str) {
    let line = line.strip_suffix('\n').unwrap();
    assert!(!line.contains(escape::is_unsafe), "{line:?}");
}

#[test]
fn one_event_is_one_line_of_text() {
    let line = capture(LogFormat::Text, "info", evil_event);
    is_one_clean_line(&line);
    assert!(line.contains(r"before a\nb\r\u001b[31mc\u2028d"), "{line}");
    assert_eq!(line.matches(r"\u202e").count(), 6, "{line}");
}

#[test]
fn one_event_is_one_line_of_json() {
    let line = capture(LogFormat::Json, "info", evil_event);
    is_one_clean_line(&line);
    let event: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(event["text"], EVIL);
    assert_eq!(event["shown"], EVIL);
    assert_eq!(event["message"], format!("before {EVIL} after"));
    assert_eq!(event["spans"][0]["user"], EVIL);
    assert_eq!(event["spans"][0]["late"], EVIL);
    assert_eq!(event["spans"][0]["name"], "carrier");
}

#[test]
fn text_reads_well() {
    let line = capture(LogFormat::Text, "info", || {
        tracing::info!(
            target: "throwline_relay::accept",
            cluster = "prod-eu", streams = 3, empty = "", words = "two words", "carrier accepted"
        );
    });
    let (_, rest) = line.split_once(' ').unwrap();
    assert_eq!(
        rest,
        " INFO relay: carrier accepted cluster=prod-eu streams=3 empty=\"\" words=\"two words\"\n"
    );
}

#[test]
fn json_keeps_types() {
    let line = capture(LogFormat::Json, "info", || {
        tracing::warn!(a = 1, b = -1, c = true, d = 1.5, e = f64::NAN, "m");
    });
    let event: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(event["level"], "WARN");
    let values = ["a", "b", "c", "d", "e"].map(|key| event[key].to_string());
    assert_eq!(values, ["1", "-1", "true", "1.5", "\"NaN\""]);
}

#[test]
fn the_filter_filters_and_a_bad_one_is_explained() {
    let lines = capture(LogFormat::Text, "warn", || {
        tracing::info!("hidden");
        tracing::warn!("shown");
    });
    assert!(lines.ends_with("shown\n") && lines.lines().count() == 1);
    let error = dispatch(LogFormat::Text, "a=b=c", false, io::sink).unwrap_err();
    assert!(error.to_string().contains("THROWLINE_LOG"), "{error}");
    assert!("xml".parse::<LogFormat>().is_err());
}

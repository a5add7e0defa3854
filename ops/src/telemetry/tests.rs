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

#[test]
fn a_field_called_message_keeps_its_name() {
    let text = capture(LogFormat::Text, "info", || {
        tracing::info!(message = "of a peer", level = 3, "a stream was refused");
    });
    let wanted = "a stream was refused message=\"of a peer\" level=3\n";
    assert!(text.ends_with(wanted), "{text}");
    // As fields of spans do.
    let spans = || {
        let span = tracing::info_span!("s", message = "of a span", name = "n");
        let _entered = span.enter();
        tracing::info!(message = %"of a peer", time = "t", target = 1, spans = "s", "refused");
    };
    let text = capture(LogFormat::Text, "info", spans);
    assert!(text.contains("refused message=\"of a peer\""), "{text}");
    assert!(text.contains("message=\"of a span\" name=n"), "{text}");
    let line = capture(LogFormat::Json, "info", spans);
    let event: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(event["message"], "refused");
    assert_eq!(event["field_message"], "of a peer");
    assert_eq!(event["field_time"], "t");
    assert_eq!(event["field_target"], 1);
    assert_eq!(event["field_spans"], "s");
    assert_eq!(event["spans"][0]["name"], "s");
    assert_eq!(event["spans"][0]["field_name"], "n");
    assert_eq!(event["spans"][0]["field_message"], "of a span");
    for key in ["time", "level", "target", "message", "spans"] {
        assert_eq!(
            line.matches(&format!("\"{key}\":")).count(),
            1,
            "{key} {line}"
        );
    }
    // Without its own text, it is the text.
    let text = capture(LogFormat::Text, "info", || {
        tracing::info!(message = "alone", a = 1)
    });
    assert!(text.ends_with("alone a=1\n"), "{text}");
}

#[test]
fn a_flood_is_cut_short_and_said_to_be() {
    for format in [LogFormat::Text, LogFormat::Json] {
        let before = left_out();
        let lines = capture(format, "info,throwline_ops=debug", || {
            let flood = |client: &str| {
                for _ in 0..3000 {
                    // One place in the code.
                    tracing::info!(client, "a line did not become a session");
                }
            };
            flood("10.0.0.1:1111");
            flood("10.0.0.1:2222");
            flood("10.0.0.2:3333");
            for _ in 0..3000 {
                tracing::debug!(client = "10.0.0.1:1111", "in full");
            }
        });
        let count = |text: &str| lines.lines().filter(|line| line.contains(text)).count();
        // A few more where the test takes seconds.
        assert!(
            (30..200).contains(&count("10.0.0.1").saturating_sub(3000)),
            "{lines}"
        );
        assert!(count("10.0.0.2") >= 30, "{lines}");
        assert_eq!(count("in full"), 3000);
        assert!(left_out() - before > 8000);
        lines
            .lines()
            .for_each(|line| is_one_clean_line(&format!("{line}\n")));
    }
}

#[test]
fn what_was_left_out_is_one_clean_line_with_its_count() {
    use rate_limit::LeftOut;
    use tracing_subscriber::fmt::format::Writer;
    let (mut text, mut json) = (String::new(), String::new());
    TextLine
        .left_out(&mut Writer::new(&mut text), 3070)
        .unwrap();
    JsonLine
        .left_out(&mut Writer::new(&mut json), 3070)
        .unwrap();
    is_one_clean_line(&text);
    assert!(
        text.ends_with(" WARN log: lines like the next one were left out count=3070\n"),
        "{text}"
    );
    let event: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(
        (&event["count"], &event["level"]),
        (&3070.into(), &"WARN".into())
    );
}

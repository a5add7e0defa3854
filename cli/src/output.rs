//! What people read: tables, times and failures.

use std::time::{Duration, SystemTime};

use throwline_ops::text::escape;
use throwline_ops::time::rfc3339_of_millis;
use throwline_tunnel::proto::origin;

/// Prints a failure with its causes, once, as sentences a person can act on. `component` is the part
/// that failed.
pub(crate) fn failure(component: &str, error: &anyhow::Error) {
    let message = message(error);
    match message.starts_with(origin::RELAY) {
        // A relay's text names the relay.
        true => eprintln!("{}", escape(&message)),
        false => eprintln!("{component}: {}", escape(&message)),
    }
}

/// A failure with its causes, each once.
pub(crate) fn message(error: &anyhow::Error) -> String {
    let mut message = error.to_string();
    for cause in error.chain().skip(1) {
        let cause = cause.to_string();
        // Many errors already end with the words of their source.
        if !message.contains(&cause) {
            message.push_str(": ");
            message.push_str(&cause);
        }
    }
    message
}

/// Rows under headers, in columns that fit, as kubectl prints them. Cells may hold anything.
pub(crate) fn table(headers: &[&str], rows: &[Vec<String>]) -> String {
    let escaped = |row: &Vec<String>| row.iter().map(|cell| escape(cell).into_owned()).collect();
    let rows: Vec<Vec<String>> = rows.iter().map(escaped).collect();
    let mut widths: Vec<usize> = headers.iter().map(|h| h.len()).collect();
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    let mut line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut row = String::new();
        for (width, cell) in widths.iter().zip(cells) {
            row.push_str(&format!("{cell:<width$}   "));
        }
        text.push_str(row.trim_end());
        text.push('\n');
    };
    line(&mut headers.iter().copied());
    for row in &rows {
        line(&mut row.iter().map(String::as_str));
    }
    text
}

/// JSON for people and programs. serde_json escapes C0 controls only; a terminal obeys others too.
pub(crate) fn json(value: &impl serde::Serialize) -> serde_json::Result<String> {
    let text = serde_json::to_string_pretty(value)?;
    // All that there is to escape is inside strings, which have no line breaks.
    let lines: Vec<_> = text.split('\n').map(escape).collect();
    Ok(lines.join("\n"))
}

/// A time span as in kubectl's AGE column: two units at most.
pub(crate) fn age(span: Duration) -> String {
    let seconds = span.as_secs();
    match seconds {
        0..120 => format!("{seconds}s"),
        120..600 => format!("{}m{}s", seconds / 60, seconds % 60),
        600..10_800 => format!("{}m", seconds / 60),
        10_800..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// How long ago that was; nothing if it lies in the future of this machine's clock.
pub(crate) fn since(then_unix_ms: u64, now: SystemTime) -> Option<Duration> {
    let then = SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(then_unix_ms))?;
    now.duration_since(then).ok()
}

/// A time in the form of RFC 3339; nothing for zero, which stands for "never".
pub(crate) fn rfc3339(unix_ms: u64) -> Option<String> {
    (unix_ms != 0).then(|| rfc3339_of_millis(unix_ms)).flatten()
}

/// A round trip in the unit that reads best.
pub(crate) fn round_trip(micros: u64) -> String {
    match micros {
        0 => String::new(),
        1..1_000 => format!("{micros}µs"),
        1_000..10_000 => format!("{:.1}ms", micros as f64 / 1_000.0),
        10_000..10_000_000 => format!("{}ms", micros / 1_000),
        _ => format!("{}s", micros / 1_000_000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_shown_once() {
        let error = anyhow::anyhow!("reset by peer").context("broken: reset by peer; try again");
        assert_eq!(message(&error), "broken: reset by peer; try again");
        let error = anyhow::anyhow!("reset by peer").context("broken");
        assert_eq!(message(&error), "broken: reset by peer");
    }

    #[test]
    fn columns_fit_their_widest_cell() {
        let text = table(
            &["NAME", "STATE"],
            &[
                vec!["a-long-name".into(), "x".into()],
                vec!["b".into(), String::new()],
            ],
        );
        assert_eq!(text, "NAME          STATE\na-long-name   x\nb\n");
    }

    #[test]
    fn a_cell_is_one_line_and_cannot_steer_the_terminal() {
        let hostile = "v1\u{1b}]52;c;eA==\u{7}\nfake   connected\u{202e}";
        let text = table(&["AGENT", "X"], &[vec![hostile.into(), "x".into()]]);
        assert_eq!(text.lines().count(), 2, "{text}");
        assert!(!text.replace('\n', "").contains(char::is_control), "{text}");
        assert!(
            text.contains("\\u001b]52") && text.contains("\\u202e"),
            "{text}"
        );
    }

    #[test]
    fn json_means_the_same_and_cannot_steer_the_terminal() {
        let hostile = "v1\u{1b}]52;c;eA==\u{7}\n\u{9b}2J\u{202e}\"\\";
        let text = json(&[hostile]).unwrap();
        assert!(!text.replace('\n', "").contains(char::is_control), "{text}");
        assert!(!text.contains('\u{202e}'), "{text}");
        let read: Vec<String> = serde_json::from_str(&text).unwrap();
        assert_eq!(read, [hostile]);
    }

    #[test]
    fn ages_read_as_in_kubectl() {
        for (seconds, want) in [
            (5, "5s"),
            (119, "119s"),
            (125, "2m5s"),
            (3_600, "60m"),
            (90_000, "25h"),
            (400_000, "4d"),
        ] {
            assert_eq!(age(Duration::from_secs(seconds)), want);
        }
    }

    #[test]
    fn a_future_time_has_no_age() {
        assert_eq!(
            since(2_000, SystemTime::UNIX_EPOCH + Duration::from_secs(1)),
            None
        );
        assert_eq!(since(u64::MAX, SystemTime::UNIX_EPOCH), None);
    }

    #[test]
    fn round_trips_read_in_their_unit() {
        assert_eq!(round_trip(0), "");
        assert_eq!(round_trip(412), "412µs");
        assert_eq!(round_trip(1_540), "1.5ms");
        assert_eq!(round_trip(48_000), "48ms");
    }
}

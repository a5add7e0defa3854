//! Forms of texts in messages.

/// One line without quotes: client-go puts some messages through `%q`, and a terminal shows them.
pub(crate) fn one_line(message: &str) -> String {
    const MAX: usize = 1024;
    message
        .chars()
        .take(MAX)
        .map(|c| match c {
            '"' => '\'',
            '\\' => '/',
            c if throwline_ops::text::is_unsafe(c) => ' ',
            c => c,
        })
        .collect()
}

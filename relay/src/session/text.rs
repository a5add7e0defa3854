//! Texts that agents send about themselves.

/// `NAME/VERSION`, as peers name their software.
pub(super) fn version_of(software: &str) -> String {
    let version = software.rsplit_once('/').map_or("", |(_, version)| version);
    short(version.to_owned())
}

/// Bounds what an agent sends about itself, which is shown to every user.
pub(super) fn short(mut text: String) -> String {
    const MOST: usize = 256;
    if let Some(end) = (0..=MOST).rev().find(|at| text.is_char_boundary(*at))
        && text.len() > MOST
    {
        text.truncate(end);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agents_words_are_cut_at_a_character() {
        assert_eq!(short("v1.36.0".into()), "v1.36.0");
        assert_eq!(short("é".repeat(200)).len(), 256);
    }
}

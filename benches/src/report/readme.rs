//! Parts of a document that are written by a program, between two markers.

use anyhow::Context;

/// The document with what is between the markers of `name` replaced.
pub(crate) fn put(document: &str, name: &str, text: &str) -> anyhow::Result<String> {
    let (begin, end) = (
        format!("<!-- {name}: written by cargo xtask bench -->"),
        format!("<!-- end of {name} -->"),
    );
    let missing = || format!("the document has no {begin} … {end}");
    let (before, rest) = document.split_once(&begin).with_context(missing)?;
    let (_, after) = rest.split_once(&end).with_context(missing)?;
    Ok(format!(
        "{before}{begin}\n\n{}\n\n{end}{after}",
        text.trim()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_between_the_markers_is_replaced() {
        let old = "head\n<!-- x: written by cargo xtask bench -->\nold\n<!-- end of x -->\ntail\n";
        let new = put(old, "x", "new\n").unwrap();
        let expected =
            "head\n<!-- x: written by cargo xtask bench -->\n\nnew\n\n<!-- end of x -->\ntail\n";
        assert_eq!(new, expected);
        assert_eq!(put(&new, "x", "new").unwrap(), expected);
        assert!(put(old, "y", "new").is_err());
    }
}

//! docs/security.md names a test for each of its promises; a test that was renamed or removed takes
//! the promise's proof away without a word. So each name is looked for.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::structure::PRODUCT;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn sources(dir: &Path, into: &mut Vec<PathBuf>) {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return;
    };
    for entry in entries {
        let path = entry.unwrap().path();
        if path.is_dir() {
            if !path.ends_with("target") {
                sources(&path, into);
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            into.push(path);
        }
    }
}

/// What stands in backticks and reads as a test's name: `words_of_a_sentence`.
fn named(text: &str) -> BTreeSet<&str> {
    let quoted = text.split('`').skip(1).step_by(2);
    let is_word = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
    quoted
        .filter(|name| name.matches('_').count() >= 2 && name.bytes().all(is_word))
        .collect()
}

#[test]
fn every_test_that_is_named_as_a_proof_exists() {
    let root = root();
    let document = std::fs::read_to_string(root.join("docs/security.md")).unwrap();
    let (_, proofs) = document
        .split_once("## What is tested, and where")
        .expect("the section that names the tests");
    let named = named(proofs);
    assert!(named.len() > 40, "{} tests are named", named.len());
    let mut files = Vec::new();
    // The product, and what tests it.
    for each in PRODUCT.into_iter().chain(["testing"]) {
        sources(&root.join(each), &mut files);
    }
    let texts: Vec<String> = files
        .iter()
        .map(|file| std::fs::read_to_string(file).unwrap())
        .collect();
    let exists = |name: &str| {
        let (function, story) = (format!("fn {name}("), format!("\"{name}\""));
        texts
            .iter()
            .any(|text| text.contains(&function) || text.contains(&story))
    };
    let missing: Vec<_> = named.into_iter().filter(|name| !exists(name)).collect();
    assert!(missing.is_empty(), "no such test: {missing:?}");
}

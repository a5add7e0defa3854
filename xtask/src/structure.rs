//! Checks the invariants of ARCHITECTURE.md that are about imports: which crate may depend on which,
//! where a library may be named, and that no files of a crate import each other in a circle.

mod circles;
mod crates;
mod imports;
mod modules;

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::Result;

use self::circles::Graph;
use self::modules::Sources;

/// The crates of the product, by folder. Their files are read.
pub(crate) const PRODUCT: [&str; 12] = [
    "agent",
    "authority",
    "certs",
    "cli",
    "database",
    "kube-wire",
    "local-proxy",
    "ops",
    "policy",
    "relay",
    "tunnel",
    "uplink",
];

/// A library, and the only files that name it: a file, or a folder of which all do.
const NAMED_IN: [(&str, &[&str]); 4] = [
    ("yamux", &["tunnel/src/mux.rs", "tunnel/src/mux/"]),
    ("tokio_tungstenite", &["tunnel/src/ws.rs", "tunnel/src/ws/"]),
    ("tungstenite", &["tunnel/src/ws.rs", "tunnel/src/ws/"]),
    ("clap", &["cli/"]),
];

/// A file with its folder, as a prefix of paths, that imports nothing of its crate but itself.
const SELF_CONTAINED: [&str; 1] = ["tunnel/src/proto"];

/// Prints each violation; true if there is none.
pub(crate) fn check(root: &Path) -> Result<bool> {
    println!("\n── structure");
    let mut violations = crates::check(root)?;
    let mut graph = Graph::default();
    let mut files = 0;
    for name in PRODUCT {
        let sources = Sources::read(root, name)?;
        files += sources.files().len();
        violations.extend(named_outside(&sources, &NAMED_IN));
        let imports = imports::of(&sources);
        for (file, target, path) in &imports {
            if let Some(prefix) = leaves(file, target, &SELF_CONTAINED) {
                violations.push(format!(
                    "{file} imports {target} (`{path}`), which is outside {prefix}"
                ));
            }
        }
        graph.extend(imports);
    }
    violations.extend(graph.circles());
    for violation in &violations {
        println!("{violation}");
    }
    println!(
        "{} violations in {files} files of {} crates",
        violations.len(),
        PRODUCT.len()
    );
    Ok(violations.is_empty())
}

/// The prefix that an import leaves, if it leaves one.
fn leaves<'a>(file: &str, target: &str, prefixes: &[&'a str]) -> Option<&'a str> {
    let within = |path: &str, prefix: &str| {
        path.strip_prefix(prefix)
            .is_some_and(|rest| rest.starts_with('/') || rest == ".rs")
    };
    let mut prefixes = prefixes.iter().copied();
    prefixes.find(|prefix| within(file, prefix) && !within(target, prefix))
}

/// Files that name a library outside its place.
fn named_outside(sources: &Sources, rules: &[(&str, &[&str])]) -> BTreeSet<String> {
    let mut violations = BTreeSet::new();
    for (file, path) in sources.paths() {
        let first = path.first().map(String::as_str).unwrap_or_default();
        for (library, places) in rules {
            if first == *library && !places.iter().any(|place| file.starts_with(place)) {
                violations.insert(format!(
                    "{file} names {library}, which only {} may",
                    places.join(", ")
                ));
            }
        }
    }
    violations
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_import_leaves_a_prefix_only_outwards() {
        let of = |file, target| leaves(file, target, &["a/src/proto"]);
        assert_eq!(of("a/src/proto/x.rs", "a/src/ws.rs"), Some("a/src/proto"));
        assert_eq!(of("a/src/proto.rs", "a/src/lib.rs"), Some("a/src/proto"));
        assert_eq!(of("a/src/proto/x.rs", "a/src/proto.rs"), None);
        assert_eq!(of("a/src/ws.rs", "a/src/proto/x.rs"), None);
        assert_eq!(of("a/src/prototype.rs", "a/src/ws.rs"), None);
    }

    #[test]
    fn a_library_is_named_in_its_place_only() {
        let sources = Sources::of_texts(&[
            ("a/src/lib.rs", "mod mux; mod other;"),
            ("a/src/mux.rs", "use yamux::Mode;"),
            (
                "a/src/other.rs",
                "fn yamux(yamux: yamux::Mode) { yamux(yamux) }",
            ),
        ]);
        let found = named_outside(&sources, &[("yamux", &["a/src/mux.rs"])]);
        let expected = "a/src/other.rs names yamux, which only a/src/mux.rs may";
        assert_eq!(found, BTreeSet::from([expected.to_owned()]));
    }
}

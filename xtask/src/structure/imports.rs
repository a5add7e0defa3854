//! Which file of a crate imports which: each path is followed to the file that defines its item.
//!
//! A re-export is followed through, and is no import itself: a module that only declares and
//! re-exports its children depends on none of them. A path that leads to another crate is none of
//! these imports.

use std::collections::BTreeMap;

use super::modules::{Module, Sources};

/// How many re-exports of re-exports are followed.
const DEPTH: usize = 16;

/// File, file that it imports, and one path by which it does; each pair once.
pub(super) fn of(sources: &Sources) -> Vec<(String, String, String)> {
    let mut imports = BTreeMap::new();
    for (number, module) in sources.modules.iter().enumerate() {
        for path in &module.paths {
            // A word alone may be a local variable, unless an import or a re-export brings it.
            if let [word] = path.as_slice()
                && !module.names.contains_key(word)
            {
                continue;
            }
            let Some(target) = follow(sources, number, path, DEPTH) else {
                continue;
            };
            let target = &sources.modules[target].file;
            if *target != module.file {
                let pair = (module.file.clone(), target.clone());
                imports.entry(pair).or_insert_with(|| path.join("::"));
            }
        }
    }
    let imports = imports.into_iter();
    imports
        .map(|((file, target), path)| (file, target, path))
        .collect()
}

/// The module that defines what a path in module `at` leads to; `None` outside the crate.
fn follow(sources: &Sources, at: usize, path: &[String], depth: usize) -> Option<usize> {
    let (first, rest) = path.split_first()?;
    let module = &sources.modules[at];
    match first.as_str() {
        "crate" => step(sources, root(sources, at), rest, depth),
        "self" => step(sources, at, rest, depth),
        "super" => {
            let parent = module.parent?;
            match rest.first().is_some_and(|next| next == "super") {
                true => follow(sources, parent, rest, depth),
                false => step(sources, parent, rest, depth),
            }
        }
        _ if is_known(module, first) => step(sources, at, path, depth),
        _ => by_glob(sources, module, at, path, depth),
    }
}

fn root(sources: &Sources, mut at: usize) -> usize {
    while let Some(parent) = sources.modules[at].parent {
        at = parent;
    }
    at
}

fn is_known(module: &Module, name: &str) -> bool {
    module.children.contains_key(name)
        || module.items.contains(name)
        || module.names.contains_key(name)
}

/// Follows a path whose first segment is a name in module `at`.
fn step(sources: &Sources, at: usize, path: &[String], depth: usize) -> Option<usize> {
    let Some((first, rest)) = path.split_first() else {
        return Some(at);
    };
    let module = &sources.modules[at];
    if let Some(child) = module.children.get(first) {
        return step(sources, *child, rest, depth);
    }
    if module.items.contains(first) {
        return Some(at);
    }
    if let Some(path) = module.names.get(first) {
        let whole = [path.as_slice(), rest].concat();
        // An import of another crate may have that crate's own name.
        let is_itself = path.first() == Some(first);
        return match depth {
            0 => None,
            _ if is_itself => None,
            _ => follow(sources, at, &whole, depth - 1),
        };
    }
    by_glob(sources, module, at, path, depth).or(Some(at))
}

/// Follows a path whose first segment one of the module's `use …::*` brings.
fn by_glob(
    sources: &Sources,
    module: &Module,
    at: usize,
    path: &[String],
    depth: usize,
) -> Option<usize> {
    let (first, depth) = (path.first()?, depth.checked_sub(1)?);
    module.globs.iter().find_map(|glob| {
        let target = follow(sources, at, glob, depth)?;
        is_known(&sources.modules[target], first)
            .then(|| step(sources, target, path, depth))
            .flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The imports as `file → file`, without folder and ending.
    fn imports(files: &[(&str, &str)]) -> Vec<String> {
        let files: Vec<_> = files
            .iter()
            .map(|(name, text)| (format!("a/src/{name}.rs"), *text))
            .collect();
        let files: Vec<_> = files.iter().map(|(name, text)| (&**name, *text)).collect();
        let short = |file: &str| file.replace("a/src/", "").replace(".rs", "");
        let all = of(&Sources::of_texts(&files));
        let all = all.iter();
        all.map(|(file, target, _)| format!("{} → {}", short(file), short(target)))
            .collect()
    }

    #[test]
    fn crate_self_and_super_are_followed() {
        let found = imports(&[
            ("lib", "mod b; mod c;"),
            ("b", "use crate::c::C; mod d;"),
            (
                "b/d",
                "use super::super::c; use super::B; use self::e::E; mod e;",
            ),
            ("b/d/e", "pub struct E; use super::super::B;"),
            ("c", "pub struct C;"),
        ]);
        let expected = ["b → c", "b/d → b", "b/d → b/d/e", "b/d → c", "b/d/e → b"];
        assert_eq!(found, expected);
    }

    #[test]
    fn a_re_export_is_no_import_and_is_followed_through() {
        let found = imports(&[
            (
                "lib",
                "mod b; mod c; pub use b::Thing; pub(crate) use c::*;",
            ),
            ("b", "mod d; pub use d::Thing; use crate::Other;"),
            ("b/d", "pub struct Thing;"),
            ("c", "use crate::Thing; pub struct Other;"),
        ]);
        assert_eq!(found, ["b → c", "c → b/d"]);
    }

    #[test]
    fn what_a_file_re_exports_and_uses_it_imports() {
        let found = imports(&[
            ("lib", "mod b; pub use b::B; fn f() -> B { B }"),
            ("b", "pub struct B;"),
        ]);
        assert_eq!(found, ["lib → b"]);
    }

    #[test]
    fn a_child_named_in_code_is_imported_and_a_variable_is_not() {
        let found = imports(&[
            ("lib", "mod b; mod c; fn f() { b::run(); let c = 1; g(c); }"),
            ("b", "pub fn run() {}"),
            ("c", ""),
        ]);
        assert_eq!(found, ["lib → b"]);
    }

    #[test]
    fn other_crates_are_no_imports() {
        let found = imports(&[
            ("lib", "mod b; use anyhow::anyhow; use std::fmt;"),
            (
                "b",
                "use super::anyhow; fn f() { anyhow::bail!(fmt::x()); }",
            ),
        ]);
        assert_eq!(found, [""; 0]);
    }
}

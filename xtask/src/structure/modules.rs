//! The modules of one crate, as its source declares them: what each defines, imports and names.
//!
//! Code for tests is left out: what `#[cfg(test)]` or `#[test]` is on, and files named `tests.rs`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context, Result};
use proc_macro2::{TokenStream, TokenTree};
use syn::visit::{self, Visit};
use syn::{Attribute, Item, ItemMod, ItemUse, UseTree, Visibility};

/// The segments of a path: `crate::a::B`.
pub(super) type ModulePath = Vec<String>;

/// A module, by its number in [`Sources`].
#[derive(Debug, Default)]
pub(super) struct Module {
    pub(super) file: String,
    pub(super) parent: Option<usize>,
    pub(super) children: BTreeMap<String, usize>,
    /// What is defined here.
    pub(super) items: BTreeSet<String>,
    /// By name, what an import or a re-export brings here.
    pub(super) names: BTreeMap<String, ModulePath>,
    /// `use a::*`.
    pub(super) globs: Vec<ModulePath>,
    /// Every path that is imported or named in code. A re-export is none.
    pub(super) paths: BTreeSet<ModulePath>,
}

/// All modules of a crate. A library and a binary have a root each, which have no parent.
#[derive(Debug, Default)]
pub(super) struct Sources {
    pub(super) modules: Vec<Module>,
}

/// Where source is read from: the disk, or a test.
type Read<'a> = &'a dyn Fn(&str) -> Option<String>;

impl Sources {
    /// Reads `src/` of the crate in that folder.
    pub(super) fn read(root: &Path, folder: &str) -> Result<Self> {
        let read = |file: &str| std::fs::read_to_string(root.join(file)).ok();
        let mut this = Self::default();
        for name in ["lib", "main"] {
            let file = format!("{folder}/src/{name}.rs");
            if root.join(&file).is_file() {
                this.add_file(&file, None, &format!("{folder}/src"), &read)?;
            }
        }
        Ok(this)
    }

    pub(super) fn files(&self) -> BTreeSet<&str> {
        self.modules.iter().map(|module| &*module.file).collect()
    }

    /// Every path with its file.
    pub(super) fn paths(&self) -> impl Iterator<Item = (&str, &ModulePath)> {
        self.modules.iter().flat_map(|module| {
            let paths = module.paths.iter().chain(module.names.values());
            paths.map(|path| (&*module.file, path))
        })
    }

    /// Reads a file as a module; its children are in `folder`.
    fn add_file(
        &mut self,
        file: &str,
        parent: Option<usize>,
        folder: &str,
        read: Read<'_>,
    ) -> Result<usize> {
        let text = read(file).with_context(|| format!("could not read {file}"))?;
        let parsed = syn::parse_file(&text).with_context(|| format!("could not parse {file}"))?;
        self.add(file, parent, folder, &parsed.items, read)
    }

    fn add(
        &mut self,
        file: &str,
        parent: Option<usize>,
        folder: &str,
        items: &[Item],
        read: Read<'_>,
    ) -> Result<usize> {
        let number = self.modules.len();
        self.modules.push(Module {
            file: file.to_owned(),
            parent,
            ..Module::default()
        });
        let mut collector = Collector::default();
        for item in items {
            collector.visit_item(item);
        }
        for child in collector.children {
            let name = child.ident.to_string();
            let below = format!("{folder}/{name}");
            let number_of_child = match &child.content {
                Some((_, items)) => self.add(file, Some(number), &below, items, read)?,
                None if name == "tests" => continue,
                None => {
                    // As older folders have it.
                    let older = format!("{below}/mod.rs");
                    let file = match read(&older) {
                        Some(_) => older,
                        None => format!("{below}.rs"),
                    };
                    self.add_file(&file, Some(number), &below, read)?
                }
            };
            // One name twice is one module for each platform; both are read.
            let children = &mut self.modules[number].children;
            children.entry(name).or_insert(number_of_child);
        }
        let module = &mut self.modules[number];
        module.items = collector.items;
        module.names = collector.names;
        module.globs = collector.globs;
        module.paths = collector.paths;
        Ok(number)
    }

    /// A crate whose first file is its root.
    #[cfg(test)]
    pub(super) fn of_texts(files: &[(&str, &str)]) -> Self {
        let read = |file: &str| {
            let found = files.iter().find(|(name, _)| *name == file);
            found.map(|(_, text)| (*text).to_owned())
        };
        let mut this = Self::default();
        let (root, _) = files[0];
        let (folder, _) = root.rsplit_once('/').unwrap();
        this.add_file(root, None, folder, &read).unwrap();
        this
    }
}

/// What one module holds, without that of its child modules.
#[derive(Default)]
struct Collector<'ast> {
    children: Vec<&'ast ItemMod>,
    items: BTreeSet<String>,
    names: BTreeMap<String, ModulePath>,
    globs: Vec<ModulePath>,
    paths: BTreeSet<ModulePath>,
}

impl<'ast> Visit<'ast> for Collector<'ast> {
    fn visit_item(&mut self, item: &'ast Item) {
        if is_for_tests(attributes(item)) {
            return;
        }
        self.items.extend(name_of(item));
        visit::visit_item(self, item);
    }

    fn visit_item_mod(&mut self, module: &'ast ItemMod) {
        self.children.push(module);
    }

    fn visit_item_use(&mut self, item: &'ast ItemUse) {
        let mut leaves = Vec::new();
        flatten(&item.tree, &mut Vec::new(), &mut leaves);
        let is_import = matches!(item.vis, Visibility::Inherited);
        for (name, path) in leaves {
            if is_import {
                self.paths.insert(path.clone());
            }
            match name {
                Some(name) => _ = self.names.insert(name, path),
                None => self.globs.push(path),
            }
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let segments = path.segments.iter();
        self.paths
            .insert(segments.map(|segment| segment.ident.to_string()).collect());
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, mac: &'ast syn::Macro) {
        self.visit_path(&mac.path);
        self.tokens(mac.tokens.clone());
    }

    // An attribute's words are no paths of ours.
    fn visit_attribute(&mut self, _: &'ast Attribute) {}
}

impl Collector<'_> {
    /// Paths in the input of a macro, which has no fixed syntax: words joined by `::`.
    fn tokens(&mut self, tokens: TokenStream) {
        let mut path: ModulePath = Vec::new();
        // Colons since the last word.
        let mut colons = 0;
        for token in tokens {
            match token {
                TokenTree::Ident(word) => {
                    if colons != 2 {
                        self.end_of(&mut path);
                    }
                    path.push(word.to_string());
                }
                TokenTree::Punct(punct) if punct.as_char() == ':' => {
                    colons += 1;
                    continue;
                }
                TokenTree::Group(group) => {
                    self.end_of(&mut path);
                    self.tokens(group.stream());
                }
                TokenTree::Punct(_) | TokenTree::Literal(_) => self.end_of(&mut path),
            }
            colons = 0;
        }
        self.end_of(&mut path);
    }

    fn end_of(&mut self, path: &mut ModulePath) {
        let path = std::mem::take(path);
        if path.len() > 1 {
            self.paths.insert(path);
        }
    }
}

/// The names that a `use` brings, each with its path; no name for a glob.
fn flatten(tree: &UseTree, before: &mut ModulePath, into: &mut Vec<(Option<String>, ModulePath)>) {
    let with = |word: &syn::Ident| [before.as_slice(), &[word.to_string()]].concat();
    match tree {
        UseTree::Path(path) => {
            before.push(path.ident.to_string());
            flatten(&path.tree, before, into);
            before.pop();
        }
        UseTree::Group(group) => {
            for tree in &group.items {
                flatten(tree, before, into);
            }
        }
        // `use a::{self}` is `use a`.
        UseTree::Name(name) if name.ident == "self" => {
            into.push((before.last().cloned(), before.clone()));
        }
        UseTree::Rename(rename) if rename.ident == "self" => {
            into.push((Some(rename.rename.to_string()), before.clone()));
        }
        UseTree::Name(name) => into.push((Some(name.ident.to_string()), with(&name.ident))),
        UseTree::Rename(rename) => {
            into.push((Some(rename.rename.to_string()), with(&rename.ident)));
        }
        UseTree::Glob(_) => into.push((None, before.clone())),
    }
}

/// `#[test]`, `#[tokio::test]`, `#[cfg(test)]` or any other condition that asks for `test`.
fn is_for_tests(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        let path = attribute.path();
        if path.is_ident("cfg") {
            return attribute
                .meta
                .require_list()
                .is_ok_and(|list| asks_for_test(list.tokens.clone()));
        }
        path.segments
            .last()
            .is_some_and(|last| last.ident == "test")
    })
}

fn asks_for_test(condition: TokenStream) -> bool {
    let mut is_negated = false;
    for token in condition {
        match token {
            TokenTree::Ident(word) if word == "test" => return true,
            TokenTree::Ident(word) => is_negated = word == "not",
            TokenTree::Group(group) if !is_negated && asks_for_test(group.stream()) => return true,
            _ => is_negated = false,
        }
    }
    false
}

fn attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Const(item) => &item.attrs,
        Item::Enum(item) => &item.attrs,
        Item::ExternCrate(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Macro(item) => &item.attrs,
        Item::Mod(item) => &item.attrs,
        Item::Static(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Trait(item) => &item.attrs,
        Item::Type(item) => &item.attrs,
        Item::Union(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        _ => &[],
    }
}

fn name_of(item: &Item) -> Option<String> {
    let name = match item {
        Item::Const(item) => &item.ident,
        Item::Enum(item) => &item.ident,
        Item::Fn(item) => &item.sig.ident,
        Item::Macro(item) => item.ident.as_ref()?,
        Item::Static(item) => &item.ident,
        Item::Struct(item) => &item.ident,
        Item::Trait(item) => &item.ident,
        Item::Type(item) => &item.ident,
        Item::Union(item) => &item.ident,
        _ => return None,
    };
    Some(name.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn only(text: &str) -> Module {
        let mut sources = Sources::of_texts(&[("a/src/lib.rs", text)]);
        sources.modules.swap_remove(0)
    }

    fn path(text: &str) -> ModulePath {
        text.split("::").map(str::to_owned).collect()
    }

    #[test]
    fn imports_are_flattened_and_named() {
        let module = only("use crate::a::{self, B as C, d::*, e::{F}};");
        let names: Vec<_> = module.names.into_iter().collect();
        let expected = [
            ("C", "crate::a::B"),
            ("F", "crate::a::e::F"),
            ("a", "crate::a"),
        ];
        assert_eq!(
            names,
            expected.map(|(name, at)| (name.to_owned(), path(at)))
        );
        assert_eq!(module.globs, [path("crate::a::d")]);
        assert!(module.paths.contains(&path("crate::a::B")));
    }

    #[test]
    fn a_re_export_brings_a_name_and_imports_nothing() {
        let module = only("pub use a::B; pub(crate) use c::D;");
        assert_eq!(module.names["B"], path("a::B"));
        assert!(module.paths.is_empty());
    }

    #[test]
    fn paths_in_code_and_in_macros_are_found() {
        let module = only(
            "fn f() -> crate::a::B<super::C> { g!(x, [d::E { y: e::f() }], \"h::i\"); j::k(); }",
        );
        for found in ["crate::a::B", "super::C", "d::E", "e::f", "j::k"] {
            assert!(module.paths.contains(&path(found)), "{found}");
        }
        assert!(!module.paths.contains(&path("h::i")));
    }

    #[test]
    fn code_for_tests_is_left_out() {
        let module = only(
            "#[cfg(test)] mod t { use crate::A; } #[cfg(all(test, unix))] use crate::B; mod tests;\n\
             #[test] fn f() { c::d() } #[cfg(not(test))] use crate::E;",
        );
        assert_eq!(module.paths, BTreeSet::from([path("crate::E")]));
        assert!(module.children.is_empty());
    }

    #[test]
    fn a_child_module_is_read_from_its_file_or_in_line() {
        let sources = Sources::of_texts(&[
            ("a/src/lib.rs", "mod b; mod c { mod d; }"),
            ("a/src/b.rs", "mod e;"),
            ("a/src/b/e.rs", ""),
            ("a/src/c/d/mod.rs", ""),
        ]);
        let files: Vec<_> = sources.files().into_iter().collect();
        let expected = [
            "a/src/b.rs",
            "a/src/b/e.rs",
            "a/src/c/d/mod.rs",
            "a/src/lib.rs",
        ];
        assert_eq!(files, expected);
    }
}

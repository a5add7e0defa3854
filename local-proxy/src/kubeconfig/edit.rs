//! Edits of a kubeconfig's text: the places of our own entries change, no other byte does.
//!
//! What an edit did is read again and compared, by two parsers, before it is believed: libyaml's,
//! from which Go's and Python's descend, and a YAML 1.2 one.

use std::collections::HashMap;
use std::ops::Range;

use serde::Deserialize as _;
use serde_norway::{Mapping, Value};

use super::document::{Kind, Node};
use super::error::Fault;
use super::tree::{Place, Tree};

/// The lists of a kubeconfig, and what the items of each hold beside their name.
pub(super) const LISTS: [(&str, &str); 3] = [
    ("clusters", "cluster"),
    ("users", "user"),
    ("contexts", "context"),
];
const CURRENT: &str = "current-context";
const HEAD: [(&str, &str); 2] = [("apiVersion", "v1"), ("kind", "Config")];

/// What is to be in a file.
#[derive(Debug, Default)]
pub(super) struct Changes {
    /// Items of each of [`LISTS`] by name, in the order in which new ones are written.
    pub(super) items: [Vec<(String, Tree)>; 3],
    pub(super) current: Option<String>,
}

/// Ranges of the text and their replacements.
struct Edits<'a> {
    source: &'a str,
    line_break: &'static str,
    edits: Vec<(Range<usize>, String)>,
}

/// The text with the changes made, or the reason why that is not possible.
pub(super) fn apply(
    source: &str,
    root: Option<&Node<'_>>,
    changes: &Changes,
) -> Result<String, Fault> {
    // Between YAML 1.1, 1.2 and the parsers, what else is a line break differs.
    if source.replace("\r\n", "").contains('\r') {
        return Err(Fault::CarriageReturns);
    }
    let crlf = source
        .find('\n')
        .is_some_and(|at| source[..at].ends_with('\r'));
    let mut edits = Edits {
        source,
        line_break: if crlf { "\r\n" } else { "\n" },
        edits: Vec::new(),
    };
    match root {
        None => edits.fill(source.len()..source.len(), changes),
        Some(root) if root.is_null() && root.start == root.end => {
            edits.fill(source.len()..source.len(), changes);
        }
        Some(root) if is_empty(root) && root.column == 0 && !root.decorated => {
            edits.fill(root.start..root.end, changes);
        }
        Some(root) => edits.change(root, changes)?,
    }
    Ok(edits.into_text())
}

fn is_empty(node: &Node<'_>) -> bool {
    match &node.kind {
        Kind::Mapping { pairs, .. } => pairs.is_empty(),
        Kind::Sequence { items, .. } => items.is_empty(),
        _ => node.is_null(),
    }
}

impl Edits<'_> {
    /// Where nothing was.
    fn fill(&mut self, range: Range<usize>, changes: &Changes) {
        let mut lines = Vec::new();
        for (key, value) in HEAD {
            lines.push(Tree::pair_at(key, &Tree::text(value), 0, self.line_break));
        }
        for ((list, _), items) in LISTS.iter().zip(&changes.items) {
            if !items.is_empty() {
                let items = items.iter().map(|(_, item)| item.clone()).collect();
                lines.push(Tree::pair_at(list, &Tree::List(items), 0, self.line_break));
            }
        }
        if let Some(current) = &changes.current {
            let value = Tree::text(current);
            lines.push(Tree::pair_at(CURRENT, &value, 0, self.line_break));
        }
        let mut text = lines.join(self.line_break);
        if range.is_empty() {
            if !self.source.is_empty() && !self.source.ends_with(['\n', '\u{feff}']) {
                text.insert_str(0, self.line_break);
            }
            text.push_str(self.line_break);
        }
        self.edits.push((range, text));
    }

    fn change(&mut self, root: &Node<'_>, changes: &Changes) -> Result<(), Fault> {
        let Kind::Mapping { pairs, flow } = &root.kind else {
            return Err(Fault::NotAMapping);
        };
        // A merge key would make an added key shadow one from elsewhere.
        if root.get("<<").is_some() {
            return Err(Fault::Merged);
        }
        // New keys of the top level, in their order.
        let mut tail: Vec<(&str, Tree)> = Vec::new();
        for ((list, _), items) in LISTS.iter().zip(&changes.items) {
            if !items.is_empty()
                && let Some(new) = self.change_list(root, list, items)?
            {
                tail.push((list, new));
            }
        }
        if let Some(current) = &changes.current {
            match root.get(CURRENT) {
                None => tail.push((CURRENT, Tree::text(current))),
                Some(node) => {
                    self.change_scalar(node, &Tree::text(current), root.is_flow(), CURRENT)?
                }
            }
        }
        if tail.is_empty() {
            return Ok(());
        }
        if *flow {
            let mut text = String::new();
            for (at, (key, value)) in tail.iter().enumerate() {
                if at > 0 || !pairs.is_empty() {
                    text.push_str(", ");
                }
                text.push_str(&Tree::text(*key).scalar(Place::Flow));
                text.push_str(": ");
                text.push_str(&value.flow());
            }
            // Behind the last value, not before the brace: a comment may stand between them.
            let at = pairs.last().map_or(root.start + 1, |(_, value)| value.end);
            self.edits.push((at..at, text));
            return Ok(());
        }
        let (Some((first, _)), Some((key, value))) = (pairs.first(), pairs.last()) else {
            return Err(Fault::Empty);
        };
        let lines = tail.iter();
        let lines: Vec<_> = lines
            .map(|(key, value)| Tree::pair_at(key, value, first.column, self.line_break))
            .collect();
        self.add_lines(key.end.max(value.end), first.column, &lines);
        Ok(())
    }

    /// `Some`: the list is to be added.
    fn change_list(
        &mut self,
        root: &Node<'_>,
        list: &str,
        wanted: &[(String, Tree)],
    ) -> Result<Option<Tree>, Fault> {
        let all = || Tree::List(wanted.iter().map(|(_, item)| item.clone()).collect());
        let Some(node) = root.get(list) else {
            return Ok(Some(all()));
        };
        if is_empty(node) {
            if node.decorated {
                return Err(Fault::DecoratedList {
                    list: list.to_owned(),
                });
            }
            if root.is_flow() {
                let space = if node.start == node.end { " " } else { "" };
                let text = format!("{space}{}", all().flow());
                self.edits.push((node.start..node.end, text));
                return Ok(None);
            }
            // Its items go on lines of their own; a comment stays behind the key.
            self.edits.push((node.start..node.end, String::new()));
            let column = root.pairs().first().map_or(0, |(key, _)| key.column);
            self.add_lines(node.end, column, &self.items(wanted.iter(), column));
            return Ok(None);
        }
        let Kind::Sequence { items, flow } = &node.kind else {
            return Err(Fault::NotAList {
                list: list.to_owned(),
            });
        };
        let mut known: HashMap<&str, &Node<'_>> = HashMap::new();
        for item in items {
            if let Some(name) = item.get("name").and_then(Node::text) {
                // Of two, kubectl has the first, or refuses the file.
                known.entry(name).or_insert(item);
            }
        }
        let mut new = Vec::new();
        for wanted in wanted {
            match known.get(&*wanted.0) {
                Some(item) => self.change_item(item, wanted, list)?,
                None => new.push(wanted),
            }
        }
        let Some(last) = items.last().filter(|_| !new.is_empty()) else {
            return Ok(None);
        };
        if *flow {
            let new: String = new
                .iter()
                .map(|(_, item)| format!(", {}", item.flow()))
                .collect();
            self.edits.push((last.end..last.end, new));
        } else {
            let column = self.dash_column(root, list, items)?;
            self.add_lines(last.end, column, &self.items(new.into_iter(), column));
        }
        Ok(None)
    }

    fn items<'t>(
        &self,
        items: impl Iterator<Item = &'t (String, Tree)>,
        column: usize,
    ) -> Vec<String> {
        let indent = " ".repeat(column);
        items
            .map(|(_, item)| format!("{indent}- {}", item.block(column + 2, self.line_break)))
            .collect()
    }

    /// The column of a block sequence's dashes, by its first item.
    fn dash_column(&self, root: &Node<'_>, list: &str, items: &[Node<'_>]) -> Result<usize, Fault> {
        let key = root
            .pairs()
            .iter()
            .find(|(key, _)| key.text() == Some(list));
        let (Some((key, _)), Some(first)) = (key, items.first()) else {
            return Err(Fault::NotFound {
                list: list.to_owned(),
            });
        };
        let between = self.source.get(key.end..first.start).unwrap_or_default();
        // The rest of the key's own line is none of them.
        let mut lines = between.split('\n').skip(1);
        lines
            .find_map(|line| {
                let item = line.trim_start_matches(' ');
                item.starts_with('-').then(|| line.len() - item.len())
            })
            .ok_or_else(|| Fault::SharedLines {
                list: list.to_owned(),
            })
    }

    fn change_item(
        &mut self,
        node: &Node<'_>,
        (name, wanted): &(String, Tree),
        list: &str,
    ) -> Result<(), Fault> {
        let before = Tree::of(node).ok_or_else(|| decorated(list, name))?;
        if before == *wanted || self.change_scalars(node, &before, wanted, node.is_flow()) {
            return Ok(());
        }
        let text = match node.is_flow() {
            true => wanted.flow(),
            false => wanted.block(node.column, self.line_break),
        };
        self.edits.push((node.start..node.end, text));
        Ok(())
    }

    /// Changes single values, if nothing else is to be changed. False: nothing was done.
    fn change_scalars(
        &mut self,
        node: &Node<'_>,
        before: &Tree,
        wanted: &Tree,
        flow: bool,
    ) -> bool {
        let mut places = Vec::new();
        if !differing(node, before, wanted, flow, &mut places) {
            return false;
        }
        let places = places.into_iter().map(|(range, text, place)| {
            let text = text.scalar(place);
            // Behind a colon with nothing.
            let space = if range.is_empty() { " " } else { "" };
            (range, format!("{space}{text}"))
        });
        self.edits.extend(places);
        true
    }

    fn change_scalar(
        &mut self,
        node: &Node<'_>,
        wanted: &Tree,
        flow: bool,
        key: &str,
    ) -> Result<(), Fault> {
        let before = Tree::of(node).filter(|tree| tree.as_text().is_some());
        let before = before.ok_or_else(|| Fault::NotAString {
            key: key.to_owned(),
        })?;
        self.change_scalars(node, &before, wanted, flow);
        Ok(())
    }

    /// Adds lines below what ends at `end`, and below the comments under it that are further in
    /// than `column`.
    fn add_lines(&mut self, end: usize, column: usize, lines: &[String]) {
        let source = self.source;
        let next = |from: usize| source[from..].find('\n').map(|at| from + at + 1);
        let mut at = match source[..end].ends_with('\n') {
            true => Some(end),
            false => next(end),
        };
        while let Some(here) = at {
            let line = source[here..].split('\n').next().unwrap_or_default();
            let inner = line.trim_start_matches(' ');
            if !inner.starts_with('#') || line.len() - inner.len() <= column {
                break;
            }
            at = next(here);
        }
        let br = self.line_break;
        let text = lines.join(br);
        let edit = match at {
            Some(at) => (at..at, format!("{text}{br}")),
            // The last line has no end.
            None => (source.len()..source.len(), format!("{br}{text}")),
        };
        self.edits.push(edit);
    }

    fn into_text(mut self) -> String {
        // Stable: what goes to one place keeps its order.
        self.edits.sort_by_key(|(range, _)| range.start);
        let added: usize = self.edits.iter().map(|(_, text)| text.len()).sum();
        let mut out = String::with_capacity(self.source.len() + added);
        let mut done = 0;
        for (range, text) in self.edits {
            out.push_str(&self.source[done..range.start]);
            out.push_str(&text);
            done = range.end;
        }
        out.push_str(&self.source[done..]);
        out
    }
}

/// Of an item that must stay as it is.
pub(super) fn decorated(list: &str, name: &str) -> Fault {
    Fault::DecoratedItem {
        list: list.to_owned(),
        name: name.to_owned(),
    }
}

/// Collects the scalars that differ, each with its place and what it is to be. False if more differs.
fn differing<'t>(
    node: &Node<'_>,
    before: &Tree,
    wanted: &'t Tree,
    flow: bool,
    places: &mut Vec<(Range<usize>, &'t Tree, Place)>,
) -> bool {
    let flow = flow || node.is_flow();
    match (before, wanted) {
        _ if before == wanted => true,
        (Tree::Raw(_) | Tree::Text(_), Tree::Raw(_) | Tree::Text(_)) => {
            let place = if flow { Place::Flow } else { Place::Block };
            places.push((node.start..node.end, wanted, place));
            true
        }
        (Tree::Map(old), Tree::Map(new)) if old.len() == new.len() => {
            let nodes = node.pairs().iter();
            nodes
                .zip(old.iter().zip(new))
                .all(|((_, node), (old, new))| {
                    old.0 == new.0 && differing(node, &old.1, &new.1, flow, places)
                })
        }
        (Tree::List(old), Tree::List(new)) if old.len() == new.len() => {
            let nodes = node.items().iter();
            nodes
                .zip(old.iter().zip(new))
                .all(|(node, (old, new))| differing(node, old, new, flow, places))
        }
        _ => false,
    }
}

/// Checks, by both parsers, that `after` means what was there before plus the changes, and nothing
/// else. The error is the first difference.
pub(super) fn verify(
    values: &Mapping,
    root: Option<&Node<'_>>,
    after: &str,
    changes: &Changes,
) -> Result<(), Fault> {
    let unreadable = |fault| Fault::Result(Box::new(fault));
    compare_values(values, &load(after).map_err(unreadable)?, changes)?;
    let after = Node::parse(after).map_err(unreadable)?;
    compare_nodes(root, after.as_ref(), changes)
}

/// The first document, by libyaml.
pub(super) fn load(text: &str) -> Result<Mapping, Fault> {
    let Some(document) = serde_norway::Deserializer::from_str(text).next() else {
        return Ok(Mapping::new());
    };
    match Value::deserialize(document)? {
        Value::Null => Ok(Mapping::new()),
        Value::Mapping(mapping) => Ok(mapping),
        _ => Err(Fault::NotAMapping),
    }
}

/// Whether a key of the top level is one whose value the changes may touch.
fn may_change(key: &str, was_there: bool, changes: &Changes) -> bool {
    (key == CURRENT && changes.current.is_some())
        || LISTS.iter().any(|(list, _)| key == *list)
        || (!was_there && HEAD.iter().any(|(head, _)| key == *head))
}

fn compare_values(before: &Mapping, after: &Mapping, changes: &Changes) -> Result<(), Fault> {
    let stays = |(key, _): &(&Value, &Value)| {
        let was_there = before.contains_key(*key);
        !key.as_str()
            .is_some_and(|key| may_change(key, was_there, changes))
    };
    if !before.iter().filter(stays).eq(after.iter().filter(stays)) {
        return Err(Fault::ForeignChange);
    }
    for (key, value) in HEAD {
        if !before.contains_key(key) && after.get(key).is_some_and(|found| found != value) {
            return Err(Fault::WrongKey {
                key: key.to_owned(),
            });
        }
    }
    if let Some(current) = &changes.current
        && after.get(CURRENT).and_then(Value::as_str) != Some(current)
    {
        return Err(Fault::WrongKey {
            key: CURRENT.to_owned(),
        });
    }
    for ((list, _), wanted) in LISTS.iter().zip(&changes.items) {
        let wanted: HashMap<&str, &Tree> = wanted.iter().map(|(n, tree)| (&**n, tree)).collect();
        let ours = |item: &Value| wanted.get(item.get("name")?.as_str()?).copied();
        // In order: kubectl takes the first of two items with one name, so an exchange of two is a
        // change.
        let mut foreign = values_of(before, list)?
            .iter()
            .filter(|item| ours(item).is_none());
        let mut found = 0;
        for item in values_of(after, list)? {
            match ours(item) {
                Some(tree) => {
                    found += 1;
                    if !is_value(item, tree) {
                        return Err(Fault::WrongItem {
                            list: (*list).to_owned(),
                        });
                    }
                }
                None if foreign.next() == Some(item) => {}
                None => {
                    return Err(Fault::ChangedItem {
                        list: (*list).to_owned(),
                    });
                }
            }
        }
        if foreign.next().is_some() || found != wanted.len() {
            return Err(Fault::LostItem {
                list: (*list).to_owned(),
            });
        }
    }
    Ok(())
}

fn values_of<'v>(mapping: &'v Mapping, list: &str) -> Result<&'v [Value], Fault> {
    match mapping.get(list) {
        None | Some(Value::Null) => Ok(&[]),
        Some(Value::Sequence(items)) => Ok(items),
        Some(_) => Err(Fault::NotAList {
            list: list.to_owned(),
        }),
    }
}

/// Whether libyaml reads that from it.
fn is_value(value: &Value, tree: &Tree) -> bool {
    match (value, tree) {
        (Value::String(text), Tree::Text(wanted)) => text == wanted,
        (Value::Sequence(items), Tree::List(wanted)) => {
            items.len() == wanted.len()
                && items
                    .iter()
                    .zip(wanted)
                    .all(|(item, tree)| is_value(item, tree))
        }
        (Value::Mapping(pairs), Tree::Map(wanted)) => {
            pairs.len() == wanted.len()
                && pairs.iter().zip(wanted).all(|((key, value), wanted)| {
                    is_value(key, &wanted.0) && is_value(value, &wanted.1)
                })
        }
        (Value::Sequence(_) | Value::Mapping(_) | Value::Tagged(_), _) => false,
        (_, Tree::Raw(_)) => true,
        _ => false,
    }
}

fn compare_nodes(
    before: Option<&Node<'_>>,
    after: Option<&Node<'_>>,
    changes: &Changes,
) -> Result<(), Fault> {
    let after = after.ok_or(Fault::NothingLeft)?;
    let before = before.filter(|node| !node.is_null());
    let stays = |(key, _): &&(Node<'_>, Node<'_>)| {
        let Some(key) = key.text() else { return true };
        let was_there = before.is_some_and(|node| node.get(key).is_some());
        !may_change(key, was_there, changes)
    };
    let mut kept = after.pairs().iter().filter(stays);
    for pair in pairs_of(before).iter().filter(stays) {
        let same =
            |found: &(Node<'_>, Node<'_>)| pair.0.is_same(&found.0) && pair.1.is_same(&found.1);
        if !kept.next().is_some_and(same) {
            return Err(Fault::ForeignChange);
        }
    }
    if kept.next().is_some() {
        return Err(Fault::Addition);
    }
    for ((list, _), wanted) in LISTS.iter().zip(&changes.items) {
        let wanted: HashMap<&str, &Tree> = wanted.iter().map(|(n, tree)| (&**n, tree)).collect();
        let ours = |item: &Node<'_>| wanted.get(item.get("name")?.text()?).copied();
        let old = before.and_then(|node| node.get(list));
        let new = after.get(list);
        let mut foreign = items_of(old).iter().filter(|item| ours(item).is_none());
        for item in items_of(new) {
            let is_right = match ours(item) {
                Some(tree) => Tree::of(item).as_ref() == Some(tree),
                None => foreign.next().is_some_and(|was| was.is_same(item)),
            };
            if !is_right {
                return Err(Fault::WrongItem {
                    list: (*list).to_owned(),
                });
            }
        }
        if foreign.next().is_some() {
            return Err(Fault::LostItem {
                list: (*list).to_owned(),
            });
        }
    }
    Ok(())
}

fn pairs_of<'n, 'a>(node: Option<&'n Node<'a>>) -> &'n [(Node<'a>, Node<'a>)] {
    node.map(Node::pairs).unwrap_or_default()
}

fn items_of<'n, 'a>(node: Option<&'n Node<'a>>) -> &'n [Node<'a>] {
    node.map(Node::items).unwrap_or_default()
}

impl Changes {
    pub(super) fn is_empty(&self) -> bool {
        self.current.is_none() && self.items.iter().all(Vec::is_empty)
    }
}

//! Circles of imports. Pure.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// By file, the files that it imports, each with one path by which it does.
#[derive(Debug, Default)]
pub(super) struct Graph(BTreeMap<String, BTreeMap<String, String>>);

impl Extend<(String, String, String)> for Graph {
    fn extend<I: IntoIterator<Item = (String, String, String)>>(&mut self, imports: I) {
        for (file, target, path) in imports {
            self.0
                .entry(file)
                .or_default()
                .entry(target)
                .or_insert(path);
        }
    }
}

impl Graph {
    /// The shortest circle of each import that is part of one, as `a → b → a`, with the paths that
    /// close it.
    pub(super) fn circles(&self) -> Vec<String> {
        let mut circles = BTreeSet::new();
        for (file, targets) in &self.0 {
            for target in targets.keys() {
                if let Some(mut way) = self.way(target, file) {
                    // From its first file by name, so that each circle is found once.
                    let first = (0..way.len()).min_by_key(|at| way[*at]).unwrap_or_default();
                    way.rotate_left(first);
                    circles.insert(way);
                }
            }
        }
        circles.iter().map(|circle| self.shown(circle)).collect()
    }

    /// The files from one to another, both included, by the fewest imports.
    fn way<'a>(&'a self, from: &'a str, to: &str) -> Option<Vec<&'a str>> {
        let mut before: BTreeMap<&str, Option<&str>> = BTreeMap::from([(from, None)]);
        let mut queue = VecDeque::from([from]);
        while let Some(file) = queue.pop_front() {
            if file == to {
                let mut way = vec![file];
                while let Some(Some(previous)) = before.get(way[way.len() - 1]) {
                    way.push(previous);
                }
                way.reverse();
                return Some(way);
            }
            for target in self.0.get(file).into_iter().flat_map(BTreeMap::keys) {
                if !before.contains_key(target.as_str()) {
                    before.insert(target, Some(file));
                    queue.push_back(target);
                }
            }
        }
        None
    }

    fn shown(&self, circle: &[&str]) -> String {
        let mut text = format!("circle: {}", circle[0]);
        let mut reasons = String::new();
        for (at, file) in circle.iter().enumerate() {
            let next = circle[(at + 1) % circle.len()];
            text.push_str(&format!(" → {next}"));
            let path = self.0.get(*file).and_then(|targets| targets.get(next));
            let path = path.map(String::as_str).unwrap_or_default();
            reasons.push_str(&format!("\n    {file}: {path}"));
        }
        text + &reasons
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn graph(imports: &[(&str, &str)]) -> Graph {
        let mut graph = Graph::default();
        graph.extend(imports.iter().map(|(file, target)| {
            let path = format!("crate::{target}");
            ((*file).to_owned(), (*target).to_owned(), path)
        }));
        graph
    }

    fn first_lines(graph: &Graph) -> Vec<String> {
        let circles = graph.circles();
        let lines = circles.iter().map(|text| text.lines().next());
        lines
            .map(|line| line.unwrap_or_default().to_owned())
            .collect()
    }

    #[test]
    fn a_tree_and_a_diamond_have_no_circle() {
        let graph = graph(&[("a", "b"), ("a", "c"), ("b", "d"), ("c", "d")]);
        assert_eq!(first_lines(&graph), [""; 0]);
    }

    #[test]
    fn each_circle_is_found_once_from_its_first_file() {
        let graph = graph(&[
            ("c", "a"),
            ("a", "b"),
            ("b", "c"),
            ("x", "a"),
            ("d", "e"),
            ("e", "d"),
        ]);
        assert_eq!(
            first_lines(&graph),
            ["circle: a → b → c → a", "circle: d → e → d"]
        );
        assert_eq!(
            graph.circles()[1],
            "circle: d → e → d\n    d: crate::e\n    e: crate::d"
        );
    }

    #[test]
    fn a_circle_within_a_larger_one_is_found_beside_it() {
        let graph = graph(&[("a", "b"), ("b", "a"), ("b", "c"), ("c", "a")]);
        assert_eq!(
            first_lines(&graph),
            ["circle: a → b → a", "circle: a → b → c → a"]
        );
    }
}

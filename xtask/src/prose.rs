//! Counts personified words in comments and Markdown, and holds each group of files to a budget.
//!
//! A peer does not "say" or "want", and an acting part has a name, which "whoever" hides
//! (CONTRIBUTING.md, "Words"). Strings, identifiers and code blocks are not prose and are not
//! counted. Bounds: a budget is a rate, so that it holds for a group that grows; a budget only ever
//! falls.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The words and phrases that count, lower case.
const PERSONIFIED: [&str; 13] = [
    "whoever",
    "somebody",
    "nobody",
    "says",
    "said",
    "told",
    "comes",
    "anew",
    "of its own",
    "for ever",
    "he",
    "him",
    "his",
];

/// Files of one kind, and how many personified words they may have in 10,000 words.
struct Group {
    name: &'static str,
    /// Whether a file, by its path below the root, belongs here. The first group that does counts.
    holds: fn(&str) -> bool,
    budget: f64,
}

/// Every budget, in one place. Each leaves room for a quotation.
const GROUPS: [Group; 6] = [
    Group {
        name: "README, ARCHITECTURE, CONTRIBUTING and the like",
        holds: |path| path.ends_with(".md") && !path.contains('/'),
        budget: 5.0,
    },
    Group {
        name: "docs/",
        holds: |path| path.starts_with("docs/"),
        budget: 5.0,
    },
    Group {
        name: "other Markdown",
        holds: |path| path.ends_with(".md"),
        budget: 5.0,
    },
    Group {
        name: "code of the leaf crates, the authority and the fuzz targets",
        holds: |path| {
            let first = path.split('/').next().unwrap_or_default();
            path.starts_with("testing/fuzz/")
                || ["authority", "certs", "database", "ops", "tunnel"].contains(&first)
        },
        budget: 2.0,
    },
    Group {
        name: "code of harness, tests' double and tools",
        holds: |path| {
            let first = path.split('/').next().unwrap_or_default();
            ["benches", "testing", "xtask"].contains(&first)
        },
        budget: 5.0,
    },
    Group {
        name: "code of the product",
        holds: |_| true,
        budget: 5.0,
    },
];

/// How many files and words a failure lists.
const WORST: usize = 10;

/// A personified word and its line, from 1.
#[derive(Debug, PartialEq, Eq)]
struct Hit {
    line: usize,
    word: &'static str,
}

/// What was counted in one file, or in several.
#[derive(Debug, Default)]
struct Count {
    words: usize,
    hits: Vec<Hit>,
}

impl Count {
    fn rate(&self) -> f64 {
        rate(self.hits.len(), self.words)
    }
}

fn rate(hits: usize, words: usize) -> f64 {
    if words == 0 {
        return 0.0;
    }
    // Counts of words are far below 2^52.
    #[expect(clippy::cast_precision_loss)]
    let rate = hits as f64 * 10_000.0 / words as f64;
    rate
}

/// Prints a line a group; true if each is within its budget.
pub(crate) fn check(root: &Path) -> Result<bool> {
    println!("\n── prose");
    let files = count_all(root)?;
    let mut good = true;
    for (index, group) in GROUPS.iter().enumerate() {
        let mut of_group: Vec<_> = files.iter().filter(|(_, (at, _))| *at == index).collect();
        let words = of_group.iter().map(|(_, (_, count))| count.words).sum();
        let hits = of_group.iter().map(|(_, (_, count))| count.hits.len());
        let hits = hits.sum::<usize>();
        let found = rate(hits, words);
        let held = found <= group.budget;
        println!(
            "{}: {hits} personified words in {words}, {found:.1} in 10,000 (budget {})",
            group.name, group.budget
        );
        if held {
            continue;
        }
        good = false;
        of_group.sort_by_key(|(_, (_, count))| std::cmp::Reverse(count.hits.len()));
        println!("over the budget; the files with most of them:");
        for (path, (_, count)) in of_group.iter().take(WORST) {
            println!(
                "  {path}: {}, {:.0} in 10,000: {}",
                count.hits.len(),
                count.rate(),
                listed(&count.hits)
            );
        }
    }
    Ok(good)
}

/// Prints each hit in files whose path holds `filter`, as FILE:LINE: WORD.
pub(crate) fn list(root: &Path, filter: &str) -> Result<()> {
    for (path, (_, count)) in count_all(root)? {
        if path.contains(filter) {
            for hit in count.hits {
                println!("{path}:{}: {}", hit.line, hit.word);
            }
        }
    }
    Ok(())
}

fn listed(hits: &[Hit]) -> String {
    let mut text = String::new();
    for hit in hits.iter().take(WORST) {
        if !text.is_empty() {
            text.push_str(", ");
        }
        text.push_str(&format!("{} (line {})", hit.word, hit.line));
    }
    if hits.len() > WORST {
        text.push_str(", …");
    }
    text
}

/// Every file's count, with the index of its group.
fn count_all(root: &Path) -> Result<BTreeMap<String, (usize, Count)>> {
    let mut paths = Vec::new();
    find(root, &mut paths)?;
    let mut counted = BTreeMap::new();
    for path in paths {
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("could not read {}", path.display()))?;
        let is_rust = path.extension().is_some_and(|extension| extension == "rs");
        let prose = match is_rust {
            true => comments(&text),
            false => text,
        };
        let count = count(&without_code(&prose));
        let name = path.strip_prefix(root).unwrap_or(&path);
        let name = name.to_string_lossy().replace('\\', "/");
        // The last group holds all.
        let group = GROUPS.iter().position(|group| (group.holds)(&name));
        counted.insert(name, (group.unwrap_or(GROUPS.len() - 1), count));
    }
    Ok(counted)
}

/// The project's Rust and Markdown files: all but what is built, fetched or hidden.
fn find(dir: &Path, into: &mut Vec<PathBuf>) -> Result<()> {
    let entries =
        std::fs::read_dir(dir).with_context(|| format!("could not list {}", dir.display()))?;
    for entry in entries {
        let entry = entry?;
        let path = entry.path();
        let name = entry.file_name();
        let name = name.to_string_lossy();
        // A link is not followed: it may lead out of the checkout, or round in a circle.
        let kind = entry.file_type()?;
        if kind.is_dir() {
            if !name.starts_with('.') && !matches!(&*name, "target" | "corpus" | "node_modules") {
                find(&path, into)?;
            }
        } else if kind.is_file() && (name.ends_with(".rs") || name.ends_with(".md")) {
            into.push(path);
        }
    }
    Ok(())
}

/// The text of all comments of Rust source, line by line where it stood; everything else is blank.
/// So the lines of hits are those of the file.
fn comments(source: &str) -> String {
    let bytes = source.as_bytes();
    let mut out = String::with_capacity(source.len());
    let mut at = 0;
    while at < bytes.len() {
        let rest = &source[at..];
        let end = if rest.starts_with("//") {
            let end = at + rest.find('\n').unwrap_or(rest.len());
            out.push_str(source[at..end].trim_start_matches(['/', '!']));
            end
        } else if rest.starts_with("/*") {
            let end = end_of_block_comment(source, at);
            out.push_str(&source[at..end]);
            end
        } else if let Some(end) = end_of_literal(source, at) {
            // Only its lines count on.
            out.extend(source[at..end].chars().filter(|char| *char == '\n'));
            end
        } else if is_word(bytes[at]) {
            at + bytes[at..]
                .iter()
                .take_while(|byte| is_word(**byte))
                .count()
        } else {
            let char = rest.chars().next().unwrap_or(' ');
            if char == '\n' {
                out.push('\n');
            }
            at + char.len_utf8()
        };
        at = end;
    }
    out
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

/// Where the block comment at `at` ends; they nest.
fn end_of_block_comment(source: &str, at: usize) -> usize {
    let bytes = source.as_bytes();
    let mut depth = 0_usize;
    let mut here = at;
    while here < bytes.len() {
        match bytes[here..] {
            [b'/', b'*', ..] => {
                depth += 1;
                here += 2;
            }
            [b'*', b'/', ..] => {
                depth -= 1;
                here += 2;
                if depth == 0 {
                    return here;
                }
            }
            _ => here += 1,
        }
    }
    bytes.len()
}

/// Where the string, raw string or character at `at` ends; `None` if there is none, as at a lifetime.
fn end_of_literal(source: &str, at: usize) -> Option<usize> {
    let rest = &source[at..];
    let prefix = ["br", "cr", "b", "c", "r"]
        .into_iter()
        .find(|prefix| {
            rest.strip_prefix(prefix)
                .is_some_and(|rest| rest.starts_with(['"', '#', '\'']))
        })
        .unwrap_or_default();
    let body = &rest[prefix.len()..];
    if prefix.ends_with('r') {
        let hashes = body.bytes().take_while(|byte| *byte == b'#').count();
        // A raw identifier otherwise: r#type.
        let opened = body[hashes..].strip_prefix('"')?;
        let close = format!("\"{}", "#".repeat(hashes));
        let length = opened
            .find(&close)
            .map_or(opened.len(), |at| at + close.len());
        return Some(at + prefix.len() + hashes + 1 + length);
    }
    if body.starts_with('"') {
        return Some(at + prefix.len() + end_of_quoted(body, b'"')?);
    }
    if body.starts_with('\'') {
        let mut chars = body.chars().skip(1);
        let (first, second) = (chars.next(), chars.next());
        // 'a' and '\n' are characters, 'a is a lifetime.
        let is_char = first == Some('\\') || second == Some('\'');
        return match is_char {
            true => Some(at + prefix.len() + end_of_quoted(body, b'\'')?),
            false => None,
        };
    }
    None
}

/// How long the quoted text at the beginning of `text` is, with both quotes.
fn end_of_quoted(text: &str, quote: u8) -> Option<usize> {
    let mut escaped = false;
    for (at, byte) in text.bytes().enumerate().skip(1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            _ if byte == quote => return Some(at + 1),
            _ => {}
        }
    }
    Some(text.len())
}

/// Markdown without its code: fenced blocks and what stands in backticks are blank. Doc comments
/// are Markdown, too.
fn without_code(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut fence: Option<&str> = None;
    // Inline code may go on in the next line, but not beyond a paragraph.
    let mut in_code = false;
    for line in text.lines() {
        let trimmed = line.trim_start();
        let mark = ["```", "~~~"]
            .into_iter()
            .find(|mark| trimmed.starts_with(mark));
        match (fence, mark) {
            (Some(open), Some(mark)) if open == mark => fence = None,
            (Some(_), _) => {}
            (None, Some(mark)) => fence = Some(mark),
            (None, None) => {
                if trimmed.is_empty() {
                    in_code = false;
                }
                for char in line.chars() {
                    match char {
                        '`' => in_code = !in_code,
                        _ if in_code => {}
                        _ => out.push(char),
                    }
                }
            }
        }
        out.push('\n');
    }
    out
}

/// Counts words and personified words. A phrase may go on in the next line.
fn count(prose: &str) -> Count {
    let mut words: Vec<(usize, String)> = Vec::new();
    for (index, line) in prose.lines().enumerate() {
        let is_break = |char: char| !char.is_alphanumeric() && char != '\'' && char != '’';
        for word in line.split(is_break).filter(|word| !word.is_empty()) {
            words.push((index + 1, word.to_lowercase()));
        }
    }
    let mut hits = Vec::new();
    for (at, (line, _)) in words.iter().enumerate() {
        for phrase in PERSONIFIED {
            let mut following = words[at..].iter().map(|(_, word)| word.as_str());
            if phrase.split(' ').all(|part| following.next() == Some(part)) {
                hits.push(Hit {
                    line: *line,
                    word: phrase,
                });
            }
        }
    }
    Count {
        words: words.len(),
        hits,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hits_in_rust(source: &str) -> Vec<Hit> {
        count(&without_code(&comments(source))).hits
    }

    fn hits_in_markdown(text: &str) -> Vec<Hit> {
        count(&without_code(text)).hits
    }

    fn hit(line: usize, word: &'static str) -> Hit {
        Hit { line, word }
    }

    #[test]
    fn comments_of_all_kinds_count() {
        let source = "//! Whoever asks.\n/// He waits.\nfn f() { // said\n    /* told\n    /* anew */ comes */\n}\n";
        assert_eq!(
            hits_in_rust(source),
            [
                hit(1, "whoever"),
                hit(2, "he"),
                hit(3, "said"),
                hit(4, "told"),
                hit(5, "anew"),
                hit(5, "comes"),
            ]
        );
    }

    #[test]
    fn strings_and_identifiers_do_not_count() {
        let source = concat!(
            "fn said() { let told = \"// says \\\" nobody\"; }\n",
            "const A: &str = r#\"// comes \" /* said\"#;\n",
            "const B: &[u8] = b\"// says\\\\\";\n",
            "const C: char = '\"'; const D: char = '\\''; const E: u8 = b'/';\n",
            "struct Whoever<'he>(&'he str);\n",
            "let r#his = 1; // nobody\n",
        );
        assert_eq!(hits_in_rust(source), [hit(6, "nobody")]);
    }

    #[test]
    fn a_comment_after_a_string_of_several_lines_has_its_own_line() {
        assert_eq!(
            hits_in_rust("let a = \"one\n// says\ntwo\"; // said\n"),
            [hit(3, "said")]
        );
    }

    #[test]
    fn code_in_markdown_does_not_count() {
        let text =
            "It `says` so.\n\n```sh\nsaid\n```\n\n~~~\ntold ```\n~~~\nNobody, `of\nits own`.\n";
        assert_eq!(hits_in_markdown(text), [hit(10, "nobody")]);
        assert_eq!(
            hits_in_rust("/// ```\n/// // said\n/// ```\n/// told\n"),
            [hit(4, "told")]
        );
    }

    #[test]
    fn an_unclosed_backtick_ends_with_its_paragraph() {
        assert_eq!(hits_in_markdown("a ` b\n\nsaid\n"), [hit(3, "said")]);
    }

    #[test]
    fn phrases_count_once_also_over_two_lines() {
        assert_eq!(
            hits_in_rust("// a port of its\n// own, for ever, its own\n"),
            [hit(1, "of its own"), hit(2, "for ever")]
        );
    }

    #[test]
    fn only_whole_words_count() {
        assert_eq!(
            hits_in_markdown("The she shed, welcomes this; aforesaid. He's\n"),
            []
        );
    }

    #[test]
    fn words_are_counted_without_code() {
        assert_eq!(count(&without_code("Two words, `and code`.\n")).words, 2);
        assert_eq!(
            count(&comments("let x = 1; // three words here\n")).words,
            3
        );
    }

    #[test]
    fn each_file_is_in_the_first_group_that_holds_it() {
        let group = |path: &str| {
            let found = GROUPS.iter().find(|group| (group.holds)(path));
            found.map(|group| group.name)
        };
        assert_eq!(group("README.md"), Some(GROUPS[0].name));
        assert_eq!(group("docs/adr/0001-a.md"), Some(GROUPS[1].name));
        assert_eq!(group("benches/README.md"), Some(GROUPS[2].name));
        assert_eq!(group("tunnel/src/lib.rs"), Some(GROUPS[3].name));
        assert_eq!(group("testing/e2e/src/lib.rs"), Some(GROUPS[4].name));
        assert_eq!(group("relay/src/lib.rs"), Some(GROUPS[5].name));
    }
}

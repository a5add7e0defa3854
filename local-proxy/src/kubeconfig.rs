//! Our entries in the user's kubeconfig: a cluster, a user and a context, named `throwline-NAME`
//! unless that name is taken.
//!
//! No byte of anything else in the files changes: the text is edited at the places of our entries
//! alone, and the result is parsed again and compared before it replaces the file. A file that
//! cannot be edited like that stays unchanged. Files are changed under the lock that kubectl itself
//! takes, only if there is something to change, and the previous content is kept in a backup file.

mod document;
mod edit;
mod error;
mod file;
mod lock;
mod names;
mod tree;

use std::collections::{HashMap, HashSet};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use std::{fmt, fs};

use document::Node;
use edit::{Changes, LISTS};
pub use error::{Error, Fault};
use lock::LockWait;
pub use names::{Entry, Owner};
use names::{candidates, claim, is_free, mark, marked, set_mark};
use tree::Tree;

use crate::cluster_name::SERVER_NAME_SUFFIX;
use crate::instance_lock;

/// The files of a kubeconfig, in order of precedence. There is at least one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files(Vec<PathBuf>);

impl Files {
    /// One file, which is made if it is not there.
    #[must_use]
    pub fn one(path: impl Into<PathBuf>) -> Self {
        Self(vec![path.into()])
    }

    /// Several, in their order of precedence, as in `KUBECONFIG=a:b`; `None` if there is none.
    /// Empty names and repetitions are left out, as kubectl does.
    #[must_use]
    pub fn all(paths: impl IntoIterator<Item = PathBuf>) -> Option<Self> {
        let mut files: Vec<PathBuf> = Vec::new();
        for path in paths {
            if !path.as_os_str().is_empty() && !files.contains(&path) {
                files.push(path);
            }
        }
        (!files.is_empty()).then_some(Self(files))
    }

    /// Where kubectl writes what is new (`PathOptions.GetDefaultFilename`): the first that exists,
    /// else the last.
    fn default_at(&self) -> usize {
        let exists = |path: &PathBuf| path.exists();
        self.0.iter().position(exists).unwrap_or(self.0.len() - 1)
    }
}

/// What an edit did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Names of our contexts, in the order of the entries.
    pub contexts: Vec<String>,
    /// Every change, in order; empty if there was none.
    pub changes: Vec<Change>,
    /// Entries that another local proxy serves.
    pub left: Vec<Left>,
}

/// A cluster's entries that were not changed, since the local proxy that wrote them is running. It has the
/// same relay and user, and another state directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Left {
    pub cluster: String,
    pub context: String,
    /// Its state directory.
    pub dir: PathBuf,
    /// Its process and address, from its lock file.
    pub holder: String,
}

impl Left {
    /// Whether its proxy still runs. Blocks for a moment at most.
    #[must_use]
    pub fn is_served(&self) -> bool {
        instance_lock::running(&self.dir).is_some()
    }
}

impl fmt::Display for Left {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "left context {} to the local proxy that serves it ({}, state directory {}); stop that one, or \
             give this one a kubeconfig of its own by --kubeconfig",
            self.context,
            self.holder,
            self.dir.display()
        )
    }
}

/// One change of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A context that was not there, with its cluster and user.
    Added { context: String, file: PathBuf },
    /// A context of ours, or its cluster or user, with a changed value.
    Updated { context: String, file: PathBuf },
    /// The same, of a local proxy with this other state directory, which does not run.
    TakenOver {
        context: String,
        file: PathBuf,
        dir: PathBuf,
    },
    /// The usual name was taken.
    Renamed { usual: String, context: String },
    Current {
        from: Option<String>,
        to: String,
        file: PathBuf,
    },
    /// What was in a file before.
    Kept { file: PathBuf, backup: PathBuf },
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Added { context, file } => {
                write!(f, "added context {context} to {}", file.display())
            }
            Self::Updated { context, file } => {
                write!(f, "updated context {context} in {}", file.display())
            }
            Self::TakenOver { context, file, dir } => write!(
                f,
                "took over context {context} in {} from the local proxy with the state directory {}, which does not run",
                file.display(),
                dir.display()
            ),
            Self::Renamed { usual, context } => write!(
                f,
                "the name {usual} is taken by another relay, user or program; the context is called {context}"
            ),
            Self::Current { from, to, file } => {
                write!(f, "set current-context to {to} in {}", file.display())?;
                match from {
                    Some(from) => write!(f, "; it was {from}"),
                    None => Ok(()),
                }
            }
            Self::Kept { file, backup } => write!(
                f,
                "kept what was in {} before as {}",
                file.display(),
                backup.display()
            ),
        }
    }
}

/// How long to wait for another program's lock; kubectl holds it for milliseconds.
const LOCK_WAIT: Duration = Duration::from_secs(5);

const BYTE_ORDER_MARK: char = '\u{feff}';

/// The usual name of a cluster's context, cluster and user entry.
#[must_use]
pub fn entry_name(cluster: &str) -> String {
    format!("throwline-{cluster}")
}

/// Writes the entries of `owner`, and `current-context`, the first entry's, if `set_current`.
/// An entry is changed in the file that has it, and added to the one that kubectl would add it to.
/// Blocks, for another program's lock only until `stop` is set. Takes time in proportion to the
/// files and entries.
pub fn write(
    files: &Files,
    owner: &Owner,
    entries: &[Entry],
    set_current: bool,
    stop: &AtomicBool,
) -> Result<Written, Error> {
    let wait = LockWait {
        limit: LOCK_WAIT,
        stop,
    };
    write_within(files, owner, entries, set_current, &wait)
}

fn write_within(
    files: &Files,
    owner: &Owner,
    entries: &[Entry],
    set_current: bool,
    wait: &LockWait<'_>,
) -> Result<Written, Error> {
    let default = files.default_at();
    // kubectl takes the same lock files; everything from reading to replacing happens under them.
    let locked = file::lock(&files.0, default, wait)?;
    let mut texts = Vec::new();
    for path in &files.0 {
        let text = locked.read(path)?;
        // Go's reader drops a byte order mark before all else; ours would take it for a character.
        let mark = if text.starts_with(BYTE_ORDER_MARK) {
            BYTE_ORDER_MARK.len_utf8()
        } else {
            0
        };
        texts.push((text, mark));
    }
    let (mut roots, mut values) = (Vec::new(), Vec::new());
    for (path, (text, mark)) in files.0.iter().zip(&texts) {
        let broken = |fault| Error::Broken {
            path: path.clone(),
            source: Box::new(fault),
        };
        // What libyaml does not read, kubectl does not.
        values.push(edit::load(&text[*mark..]).map_err(broken)?);
        roots.push(Node::parse(&text[*mark..]).map_err(broken)?);
    }
    let plan = plan(files, default, &roots, owner, entries, set_current)?;
    let mut results = Vec::new();
    for ((at, path), changes) in files.0.iter().enumerate().zip(&plan.files) {
        if changes.is_empty() {
            continue;
        }
        let is_unsafe = |fault| Error::Unsafe {
            path: path.clone(),
            source: Box::new(fault),
        };
        let (text, mark) = &texts[at];
        let (mark, text) = text.split_at(*mark);
        let root = roots[at].as_ref();
        let after = edit::apply(text, root, changes).map_err(is_unsafe)?;
        if after != text {
            // The edit works on text: it is parsed again and compared before it replaces a user's
            // file.
            edit::verify(&values[at], root, &after, changes).map_err(is_unsafe)?;
            results.push((path, format!("{mark}{after}")));
        }
    }
    // The last moment to stop: a replacement that has begun is completed for all files.
    if wait.stop.load(Ordering::Acquire) {
        return Err(Error::Stopped);
    }
    let mut changes = plan.changes;
    for (path, after) in results {
        if let Some(backup) = locked.replace(path, &after)? {
            changes.push(Change::Kept {
                file: path.clone(),
                backup,
            });
        }
    }
    Ok(Written {
        contexts: plan.contexts,
        changes,
        left: plan.left,
    })
}

struct Plan {
    contexts: Vec<String>,
    /// For each file.
    files: Vec<Changes>,
    changes: Vec<Change>,
    left: Vec<Left>,
}

/// State directories of other local proxies, and the process that runs with each: read once for a plan.
#[derive(Default)]
struct Others(HashMap<PathBuf, Option<String>>);

impl Others {
    fn running(&mut self, dir: &Path) -> Option<String> {
        if let Some(known) = self.0.get(dir) {
            return known.clone();
        }
        let running = instance_lock::running(dir);
        self.0.insert(dir.to_owned(), running.clone());
        running
    }
}

/// The state directory whose local proxy wrote a cluster's entry, unless it is that of `entry`.
fn other_dir(item: &Node<'_>, entry: &Entry) -> Option<PathBuf> {
    let authority = item.get("cluster")?.get("certificate-authority")?.text()?;
    let authority = Path::new(authority);
    let own = &entry.certificate_authority;
    // Another name for the same directory is no other one.
    let id = |path: &Path| {
        fs::metadata(path.parent()?)
            .ok()
            .map(|dir| (dir.dev(), dir.ino()))
    };
    if authority == own
        || authority.file_name() != own.file_name()
        || id(authority).is_some_and(|dir| Some(dir) == id(own))
    {
        return None;
    }
    authority.parent().map(Path::to_owned)
}

/// The items of all files, as kubectl merges them: of those with one name, the first file's counts.
struct Merged<'r, 'a> {
    /// For each of [`LISTS`].
    lists: [HashMap<&'r str, (usize, &'r Node<'a>)>; 3],
    /// Names of the entries that are marked, by their cluster and owner's own.
    marked: HashMap<String, Vec<&'r str>>,
    current: Option<&'r str>,
}

impl<'r, 'a> Merged<'r, 'a> {
    fn new(roots: &'r [Option<Node<'a>>], owner: &Owner) -> Self {
        let mut merged = Self {
            lists: Default::default(),
            marked: HashMap::new(),
            current: None,
        };
        for (at, root) in roots.iter().enumerate() {
            let Some(root) = root else { continue };
            for (list, (key, inner)) in LISTS.iter().enumerate() {
                let items = root.get(key).map(Node::items).unwrap_or_default();
                for item in items {
                    let Some(name) = item.get("name").and_then(Node::text) else {
                        continue;
                    };
                    merged.lists[list].entry(name).or_insert((at, item));
                    let mark = item.get(inner).and_then(Tree::of);
                    if let Some((cluster, of)) = mark.as_ref().and_then(marked)
                        && of == *owner
                    {
                        merged.marked.entry(cluster).or_default().push(name);
                    }
                }
            }
            let current = root.get("current-context").filter(|node| !node.is_null());
            let current = current.and_then(Node::text);
            let current = current.filter(|current| !current.is_empty());
            merged.current = merged.current.or(current);
        }
        merged
    }

    /// The name for a cluster's entries: that which they have, else the best one that is free.
    fn name(&self, owner: &Owner, entry: &Entry, given: &HashSet<String>) -> String {
        let had = self.marked.get(&entry.name).into_iter().flatten();
        let had = had.map(|name| (*name).to_owned());
        let is_free = |name: &String| {
            let claims: Vec<_> = LISTS
                .iter()
                .zip(&self.lists)
                .filter_map(|((list, inner), items)| {
                    let (_, item) = items.get(&**name)?;
                    let inner = item.get(inner).and_then(Tree::of);
                    Some(claim(list, name, inner.as_ref(), owner, entry))
                })
                .collect();
            !given.contains(name) && is_free(&claims)
        };
        let mut names = had.chain(candidates(owner, &entry.name));
        names
            .find(is_free)
            .unwrap_or_else(|| entry_name(&entry.name))
    }
}

fn plan(
    files: &Files,
    default: usize,
    roots: &[Option<Node<'_>>],
    owner: &Owner,
    entries: &[Entry],
    set_current: bool,
) -> Result<Plan, Error> {
    let merged = Merged::new(roots, owner);
    let mut plan = Plan {
        contexts: Vec::new(),
        files: roots.iter().map(|_| Changes::default()).collect(),
        changes: Vec::new(),
        left: Vec::new(),
    };
    let mut given = HashSet::new();
    let mut others = Others::default();
    for entry in entries {
        let name = merged.name(owner, entry, &given);
        given.insert(name.clone());
        let other = merged.lists[0].get(&*name);
        let other = other.and_then(|(_, item)| other_dir(item, entry));
        // Contexts of another local proxy that is running stay with it, or the two would overwrite
        // each other.
        if let Some(dir) = &other
            && let Some(holder) = others.running(dir)
        {
            plan.left.push(Left {
                cluster: entry.name.clone(),
                context: name.clone(),
                dir: dir.clone(),
                holder,
            });
            plan.contexts.push(name);
            continue;
        }
        let usual = entry_name(&entry.name);
        let (mut changed, mut context_at) = (None, None);
        for (list, (key, inner)) in LISTS.iter().enumerate() {
            let known = merged.lists[list].get(&*name);
            let at = known.map_or(default, |(at, _)| *at);
            // An item with anchors or tags cannot be rewritten without changing what other items
            // refer to.
            let before = match known {
                None => None,
                Some((at, item)) => Some(Tree::of(item).ok_or_else(|| Error::Unsafe {
                    path: files.0[*at].clone(),
                    source: Box::new(edit::decorated(key, &name)),
                })?),
            };
            let wanted = wanted(key, inner, before.clone(), &name, owner, entry);
            if *key == "contexts" {
                context_at = known.map(|(at, _)| *at);
            }
            // An unchanged item is not written, so that neither its formatting nor the file's time
            // changes.
            if before.as_ref() != Some(&wanted) {
                changed = Some(at);
                plan.files[at].items[list].push((name.clone(), wanted));
            }
        }
        match (context_at, changed) {
            (None, _) => {
                if name != usual {
                    plan.changes.push(Change::Renamed {
                        usual,
                        context: name.clone(),
                    });
                }
                plan.changes.push(Change::Added {
                    context: name.clone(),
                    file: files.0[default].clone(),
                });
            }
            (Some(_), Some(at)) => {
                let (context, file) = (name.clone(), files.0[at].clone());
                plan.changes.push(match other {
                    Some(dir) => Change::TakenOver { context, file, dir },
                    None => Change::Updated { context, file },
                });
            }
            (Some(_), None) => {}
        }
        plan.contexts.push(name);
    }
    if let Some(first) = plan.contexts.first().filter(|_| set_current)
        && merged.current != Some(first.as_str())
    {
        plan.files[default].current = Some(first.clone());
        plan.changes.push(Change::Current {
            from: merged.current.map(str::to_owned),
            to: first.clone(),
            file: files.0[default].clone(),
        });
    }
    Ok(plan)
}

/// The new content of an item: our own keys are set, keys that a person added are kept.
fn wanted(
    list: &str,
    inner: &str,
    before: Option<Tree>,
    name: &str,
    owner: &Owner,
    entry: &Entry,
) -> Tree {
    let mut item = before.unwrap_or_else(|| {
        let name = (Tree::text("name"), Tree::text(name));
        Tree::Map(vec![name])
    });
    let text = |path: &Path| Tree::text(path.to_string_lossy());
    let inner = item.entry(inner);
    match list {
        "clusters" => {
            inner.set("server", Tree::text(&entry.server));
            inner.set("certificate-authority", text(&entry.certificate_authority));
            // So that requests which leave out the server's path still say their cluster.
            let server_name = format!("{}{SERVER_NAME_SUFFIX}", entry.name);
            inner.set("tls-server-name", Tree::text(server_name));
            inner.drop_keys(&["certificate-authority-data", "insecure-skip-tls-verify"]);
            set_mark(inner, mark(owner, &entry.name));
        }
        "users" => {
            inner.set("client-certificate", text(&entry.client_certificate));
            inner.set("client-key", text(&entry.client_key));
            // A credential of another kind would be used instead of, or sent along with, ours.
            inner.drop_keys(&[
                "client-certificate-data",
                "client-key-data",
                "token",
                "tokenFile",
                "username",
                "password",
                "exec",
                "auth-provider",
            ]);
        }
        _ => {
            inner.set("cluster", Tree::text(name));
            inner.set("user", Tree::text(name));
            set_mark(inner, mark(owner, &entry.name));
        }
    }
    item
}

#[cfg(test)]
mod tests;

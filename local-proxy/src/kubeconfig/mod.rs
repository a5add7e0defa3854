//! Our entries in the user's kubeconfig: a cluster, a user and a context named `throwline-NAME`.
//!
//! Everything else in the file is somebody else's: it keeps its values and its order, also where we
//! do not know the field. The file is changed under the lock that kubectl itself takes, replaced
//! by rename with its mode and owner kept, and only if there is something to change.

mod file;
mod lock;

use crate::route::SERVER_NAMES;
use serde_norway::{Mapping, Value};
use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

/// One cluster's entries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The cluster's name; the entries are called `throwline-NAME`.
    pub name: String,
    pub server: String,
    pub certificate_authority: PathBuf,
    pub client_certificate: PathBuf,
    pub client_key: PathBuf,
}

/// What an edit did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// Names of our contexts, in the order of the entries.
    pub contexts: Vec<String>,
    /// The context that `current-context` was set to, if it was.
    pub current: Option<String>,
}

/// Why the file was not changed. It is then as it was.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read the kubeconfig {}: {source}", path.display())]
    Unreadable { path: PathBuf, source: io::Error },
    #[error("cannot write the kubeconfig {}: {source}; choose another file with --kubeconfig", path.display())]
    Unwritable { path: PathBuf, source: io::Error },
    #[error("the kubeconfig {} is broken and was not touched: {what}", path.display())]
    Broken { path: PathBuf, what: String },
    #[error("the kubeconfig {} is being changed by another program: {} exists since {age:?}; if no such program runs, remove that file", path.display(), lock.display())]
    Locked {
        path: PathBuf,
        lock: PathBuf,
        age: Duration,
    },
}

/// How long to wait for another program's lock; kubectl holds it for milliseconds.
const LOCK_WAIT: Duration = Duration::from_secs(5);

/// The name of a cluster's context, cluster and user entry.
#[must_use]
pub fn entry_name(cluster: &str) -> String {
    format!("throwline-{cluster}")
}

/// Writes the entries, and `current-context` if `set_current` or if the file has none. Blocks.
pub fn write(path: &Path, entries: &[Entry], set_current: bool) -> Result<Written, Error> {
    write_within(path, entries, set_current, LOCK_WAIT)
}

fn write_within(
    path: &Path,
    entries: &[Entry],
    set_current: bool,
    wait: Duration,
) -> Result<Written, Error> {
    let contexts: Vec<String> = entries.iter().map(|e| entry_name(&e.name)).collect();
    let mut current = None;
    file::edit(path, wait, |config| {
        for entry in entries {
            put(config, entry)?;
        }
        current = choose_current(config, &contexts, set_current);
        Ok(())
    })?;
    Ok(Written { contexts, current })
}

/// Removes the entries of these clusters. Blocks. A `current-context` that pointed at one of them
/// is cleared, for it would name what is not there.
pub fn remove(path: &Path, clusters: &[String]) -> Result<(), Error> {
    let names: Vec<String> = clusters.iter().map(|name| entry_name(name)).collect();
    let ours = |name: Option<&str>| name.is_some_and(|name| names.iter().any(|n| n == name));
    file::edit(path, LOCK_WAIT, |config| {
        for list in ["clusters", "contexts", "users"] {
            if let Some(Value::Sequence(items)) = config.get_mut(list) {
                items.retain(|item| !ours(item.get("name").and_then(Value::as_str)));
            }
        }
        if ours(config.get("current-context").and_then(Value::as_str)) {
            config.insert("current-context".into(), "".into());
        }
        Ok(())
    })
}

fn put(config: &mut Mapping, entry: &Entry) -> Result<(), String> {
    let name = entry_name(&entry.name);
    for (key, value) in [("apiVersion", "v1"), ("kind", "Config")] {
        if config.get(key).is_none_or(Value::is_null) {
            config.insert(key.into(), value.into());
        }
    }
    let text = |path: &Path| Value::from(path.to_string_lossy().into_owned());

    let cluster = item(config, "clusters", "cluster", &name)?;
    cluster.insert("server".into(), entry.server.clone().into());
    cluster.insert(
        "certificate-authority".into(),
        text(&entry.certificate_authority),
    );
    // So that requests which leave out the server's path still say their cluster.
    let server_name = format!("{}{SERVER_NAMES}", entry.name);
    cluster.insert("tls-server-name".into(), server_name.into());
    drop_keys(
        cluster,
        &["certificate-authority-data", "insecure-skip-tls-verify"],
    );

    let user = item(config, "users", "user", &name)?;
    user.insert("client-certificate".into(), text(&entry.client_certificate));
    user.insert("client-key".into(), text(&entry.client_key));
    // A credential of another kind would be used instead of, or sent along with, ours.
    drop_keys(
        user,
        &[
            "client-certificate-data",
            "client-key-data",
            "token",
            "tokenFile",
            "username",
            "password",
            "exec",
            "auth-provider",
        ],
    );

    let context = item(config, "contexts", "context", &name)?;
    context.insert("cluster".into(), name.clone().into());
    context.insert("user".into(), name.into());
    Ok(())
}

/// The `inner` mapping of the item called `name` in `list`, made if it is not there.
fn item<'a>(
    config: &'a mut Mapping,
    list: &str,
    inner: &str,
    name: &str,
) -> Result<&'a mut Mapping, String> {
    // kubectl writes `clusters: null` for none.
    if config.get(list).is_none_or(Value::is_null) {
        config.insert(list.into(), Value::Sequence(Vec::new()));
    }
    let Some(Value::Sequence(items)) = config.get_mut(list) else {
        return Err(format!("'{list}' is not a list"));
    };
    let found = items
        .iter()
        .position(|item| item.get("name").and_then(Value::as_str) == Some(name));
    let index = found.unwrap_or_else(|| {
        items.push(Value::Mapping(Mapping::from_iter([(
            Value::from("name"),
            Value::from(name),
        )])));
        items.len() - 1
    });
    let Some(Value::Mapping(item)) = items.get_mut(index) else {
        return Err(format!("an item of '{list}' is not a mapping"));
    };
    if !matches!(item.get(inner), Some(Value::Mapping(_))) {
        item.insert(inner.into(), Value::Mapping(Mapping::new()));
    }
    match item.get_mut(inner) {
        Some(Value::Mapping(mapping)) => Ok(mapping),
        _ => Err(format!("an item of '{list}' has no '{inner}'")),
    }
}

fn drop_keys(mapping: &mut Mapping, keys: &[&str]) {
    for key in keys {
        // `shift_remove` keeps the order of the others.
        mapping.shift_remove(*key);
    }
}

fn choose_current(config: &mut Mapping, contexts: &[String], asked: bool) -> Option<String> {
    let first = contexts.first()?;
    let has_one = config
        .get("current-context")
        .and_then(Value::as_str)
        .is_some_and(|current| !current.is_empty());
    if has_one && !asked {
        return None;
    }
    config.insert("current-context".into(), first.clone().into());
    Some(first.clone())
}

#[cfg(test)]
mod tests;

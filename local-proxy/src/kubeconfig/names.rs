//! The names of our entries, and the owner of an entry.
//!
//! An entry belongs to a cluster as one user of one relay reaches it. This is recorded in an
//! extension, the place that kubeconfigs have for such notes: clusters of two relays may have the
//! same name.

use std::path::PathBuf;

use super::tree::Tree;

/// The name of our extension in a cluster's and in a context's entry.
const EXTENSION: &str = "throwline";

/// One cluster's entries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The cluster's name.
    pub name: String,
    pub server: String,
    pub certificate_authority: PathBuf,
    pub client_certificate: PathBuf,
    pub client_key: PathBuf,
}

/// The owner of entries: one user of one relay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The relay's URL.
    pub relay: String,
    pub user: String,
}

/// The content of our extension.
pub(super) fn mark(owner: &Owner, cluster: &str) -> Tree {
    let pairs = [
        ("cluster", cluster),
        ("relay", &owner.relay),
        ("user", &owner.user),
    ];
    let pairs = pairs.map(|(key, value)| (Tree::text(key), Tree::text(value)));
    Tree::Map(pairs.into())
}

/// Cluster and owner from an entry's extension; `None` without one of ours.
pub(super) fn marked(inner: &Tree) -> Option<(String, Owner)> {
    let Tree::List(extensions) = inner.get("extensions")? else {
        return None;
    };
    let of = |key| Some(extension(extensions)?.get(key)?.as_text()?.to_owned());
    let owner = Owner {
        relay: of("relay")?,
        user: of("user")?,
    };
    Some((of("cluster")?, owner))
}

fn extension(extensions: &[Tree]) -> Option<&Tree> {
    let mut extensions = extensions.iter();
    let ours = |all: &&Tree| all.get("name").and_then(Tree::as_text) == Some(EXTENSION);
    extensions.find(ours)?.get("extension")
}

/// Writes our extension into an entry, beside others.
pub(super) fn set_mark(inner: &mut Tree, mark: Tree) {
    let list = inner.entry("extensions");
    if !matches!(list, Tree::List(_)) {
        *list = Tree::List(Vec::new());
    }
    let Tree::List(extensions) = list else {
        unreachable!("it was made one")
    };
    let is_ours = |all: &Tree| all.get("name").and_then(Tree::as_text) == Some(EXTENSION);
    match extensions.iter_mut().find(|extension| is_ours(extension)) {
        // Its keys in another order are no change.
        Some(ours)
            if ours
                .get("extension")
                .is_some_and(|found| says(found, &mark)) => {}
        Some(ours) => ours.set("extension", mark),
        None => {
            let mut ours = Tree::Map(Vec::new());
            ours.set("name", Tree::text(EXTENSION));
            ours.set("extension", mark);
            extensions.push(ours);
        }
    }
}

fn says(found: &Tree, mark: &Tree) -> bool {
    ["cluster", "relay", "user"]
        .into_iter()
        .all(|key| found.get(key).and_then(Tree::as_text) == mark.get(key).and_then(Tree::as_text))
}

/// Names to try for a cluster's entries, best first; there is always another one.
pub(super) fn candidates(owner: &Owner, cluster: &str) -> impl Iterator<Item = String> {
    let plain = format!("throwline-{cluster}");
    let relay = owner
        .relay
        .split_once("://")
        .map_or(&*owner.relay, |(_, rest)| rest);
    let of_relay = format!("{plain}-{}", as_name(relay));
    let of_user = format!("{of_relay}-{}", as_name(&owner.user));
    let numbered = of_user.clone();
    [plain, of_relay, of_user]
        .into_iter()
        .chain((2..).map(move |number: u64| format!("{numbered}-{number}")))
}

/// Without characters that are special in a shell or in YAML.
fn as_name(text: &str) -> String {
    let text = text.trim_end_matches('/');
    let fits = |c: char| c.is_ascii_alphanumeric() || c == '.' || c == '_';
    text.chars()
        .map(|c| if fits(c) { c } else { '-' })
        .collect()
}

/// The relation of a list's item to our entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Claim {
    /// Its extension names this owner and this cluster.
    Marked,
    /// It has no extension, and uses a file of this state directory.
    Ours,
    /// It has no extension.
    Unknown,
    /// Its extension names another owner or another cluster.
    Others,
}

/// The relation of an item to our entry. `inner` is its content beside the name.
pub(super) fn claim(
    list: &str,
    name: &str,
    inner: Option<&Tree>,
    owner: &Owner,
    entry: &Entry,
) -> Claim {
    let Some(inner) = inner else {
        return Claim::Unknown;
    };
    match marked(inner) {
        Some((cluster, of)) if cluster == entry.name && of == *owner => return Claim::Marked,
        Some(_) => return Claim::Others,
        None => {}
    }
    let is = |key, wanted: &str| inner.get(key).and_then(Tree::as_text) == Some(wanted);
    let is_ours = match list {
        "clusters" => is(
            "certificate-authority",
            &entry.certificate_authority.to_string_lossy(),
        ),
        // A user's entry is the same for all clusters of a state directory.
        "users" => is(
            "client-certificate",
            &entry.client_certificate.to_string_lossy(),
        ),
        // Whether that cluster is ours is decided by the cluster's own entry.
        _ => is("cluster", name),
    };
    if is_ours { Claim::Ours } else { Claim::Unknown }
}

/// Whether a name may be written, by the claims of the items that have it.
pub(super) fn is_free(claims: &[Claim]) -> bool {
    let any = |wanted| claims.contains(&wanted);
    !any(Claim::Others) && (any(Claim::Marked) || !any(Claim::Unknown))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taken_name_gets_the_relays_then_the_users_then_a_number() {
        let owner = Owner {
            relay: "https://relay-b.example.com:8443/".to_owned(),
            user: "https://idp/realm#dana".to_owned(),
        };
        let names: Vec<_> = candidates(&owner, "prod").take(5).collect();
        assert_eq!(
            names,
            [
                "throwline-prod",
                "throwline-prod-relay-b.example.com-8443",
                "throwline-prod-relay-b.example.com-8443-https---idp-realm-dana",
                "throwline-prod-relay-b.example.com-8443-https---idp-realm-dana-2",
                "throwline-prod-relay-b.example.com-8443-https---idp-realm-dana-3",
            ]
        );
    }

    #[test]
    fn a_mark_is_read_as_it_was_written_and_leaves_others_extensions() {
        let owner = Owner {
            relay: "https://r/".to_owned(),
            user: "no".to_owned(),
        };
        let mut inner = Tree::Map(Vec::new());
        let mut other = Tree::Map(Vec::new());
        other.set("name", Tree::text("minikube"));
        inner.set("extensions", Tree::List(vec![other.clone()]));
        assert_eq!(marked(&inner), None);
        set_mark(&mut inner, mark(&owner, "a"));
        assert_eq!(marked(&inner), Some(("a".to_owned(), owner.clone())));
        let once = inner.clone();
        set_mark(&mut inner, mark(&owner, "a"));
        assert_eq!(inner, once);
        let Some(Tree::List(all)) = inner.get("extensions") else {
            panic!("no list")
        };
        assert_eq!((all.len(), &all[0]), (2, &other));
    }
}

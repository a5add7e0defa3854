//! Every object of the cluster, in memory, with one revision for all and a bounded history of
//! changes from which watches resume and lists continue.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde_json::{Value, json};
use tokio::sync::watch;
use uuid::Uuid;

use crate::{
    json::{self, text},
    kinds::Kind,
    status::Failure,
};

/// The namespace (empty for cluster-scoped kinds) and the name of an object.
pub(crate) type Key = (String, String);

/// One change: what was there before, and what is there now.
pub(crate) struct Change {
    pub(crate) revision: u64,
    kind: &'static Kind,
    key: Key,
    pub(crate) old: Option<Arc<Value>>,
    /// On a deletion the last state, with the deletion's revision.
    pub(crate) last: Arc<Value>,
    pub(crate) deleted: bool,
}

/// What an update wants done with the object that it was shown.
pub(crate) enum Decision {
    Put(Value),
    Remove(Value),
}

pub(crate) struct Store {
    inner: Mutex<Inner>,
    revision: watch::Sender<u64>,
    history: usize,
}

struct Inner {
    revision: u64,
    objects: HashMap<&'static str, BTreeMap<Key, Arc<Value>>>,
    changes: VecDeque<Arc<Change>>,
    /// The revision of the newest change that has been forgotten.
    forgotten: u64,
}

impl Store {
    pub(crate) fn new(history: usize) -> Self {
        Self {
            inner: Mutex::new(Inner {
                revision: 1,
                objects: HashMap::new(),
                changes: VecDeque::new(),
                forgotten: 1,
            }),
            revision: watch::Sender::new(1),
            history,
        }
    }

    /// Notifies of changes; the value is the newest revision.
    pub(crate) fn subscribe(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }

    pub(crate) fn get(&self, kind: &Kind, namespace: &str, name: &str) -> Option<Arc<Value>> {
        let inner = self.lock();
        inner
            .objects
            .get(kind.plural)?
            .get(&(namespace.to_owned(), name.to_owned()))
            .cloned()
    }

    /// The objects of a kind, of one namespace or of all, and the revision at which they were so.
    pub(crate) fn list(&self, kind: &Kind, namespace: Option<&str>) -> (u64, Vec<Arc<Value>>) {
        let inner = self.lock();
        let objects = inner.objects.get(kind.plural).into_iter().flatten();
        let objects = objects.filter(|((of, _), _)| namespace.is_none_or(|wanted| wanted == of));
        (
            inner.revision,
            objects.map(|(_, object)| Arc::clone(object)).collect(),
        )
    }

    /// The same as it was at an earlier revision, by undoing what has changed since.
    pub(crate) fn list_at(
        &self,
        kind: &Kind,
        namespace: Option<&str>,
        revision: u64,
    ) -> Result<Vec<Arc<Value>>, Failure> {
        let inner = self.lock();
        if revision < inner.forgotten {
            return Err(Failure::new(
                410,
                "Expired",
                "The provided continue parameter is too old to display a consistent list result. You can start a new \
                 list without the continue parameter.",
            ));
        }
        let mut objects = inner.objects.get(kind.plural).cloned().unwrap_or_default();
        for change in inner
            .changes
            .iter()
            .rev()
            .take_while(|change| change.revision > revision)
        {
            if change.kind.plural == kind.plural {
                match &change.old {
                    Some(old) => objects.insert(change.key.clone(), Arc::clone(old)),
                    None => objects.remove(&change.key),
                };
            }
        }
        Ok(objects
            .into_iter()
            .filter(|((of, _), _)| namespace.is_none_or(|wanted| wanted == of))
            .map(|(_, object)| object)
            .collect())
    }

    /// Keeps a new object, with uid, creation time and resource version set.
    pub(crate) fn create(
        &self,
        kind: &'static Kind,
        mut object: Value,
    ) -> Result<Arc<Value>, Failure> {
        let mut inner = self.lock();
        let key = key_of(&object);
        if inner
            .objects
            .get(kind.plural)
            .is_some_and(|objects| objects.contains_key(&key))
        {
            return Err(Failure::exists(kind, &key.1));
        }
        let metadata = json::object(&mut object, "metadata");
        metadata.insert("uid".to_owned(), json!(Uuid::new_v4().to_string()));
        metadata.insert("creationTimestamp".to_owned(), json!(json::now()));
        Ok(self.commit(&mut inner, kind, key, object, false))
    }

    /// Reads, decides and writes in one step. An update that changes nothing leaves the resource
    /// version alone.
    pub(crate) fn update(
        &self,
        kind: &'static Kind,
        namespace: &str,
        name: &str,
        decide: impl FnOnce(&Value) -> Result<Decision, Failure>,
    ) -> Result<Arc<Value>, Failure> {
        let mut inner = self.lock();
        let key = (namespace.to_owned(), name.to_owned());
        let old = inner
            .objects
            .get(kind.plural)
            .and_then(|objects| objects.get(&key))
            .cloned()
            .ok_or_else(|| Failure::not_found(kind, name))?;
        match decide(&old)? {
            Decision::Put(mut new) => {
                for field in ["uid", "creationTimestamp", "resourceVersion"] {
                    let kept = old["metadata"].get(field).cloned().unwrap_or_default();
                    json::set(&mut new, &["metadata", field], kept);
                }
                if new == *old {
                    return Ok(old);
                }
                Ok(self.commit(&mut inner, kind, key, new, false))
            }
            Decision::Remove(last) => Ok(self.commit(&mut inner, kind, key, last, true)),
        }
    }

    /// What has happened to a kind after `revision`; 410 when that is no longer known.
    pub(crate) fn changes(
        &self,
        kind: &Kind,
        revision: u64,
    ) -> Result<(u64, Vec<Arc<Change>>), Failure> {
        let inner = self.lock();
        if revision < inner.forgotten {
            return Err(Failure::new(
                410,
                "Expired",
                format!("too old resource version: {revision} ({})", inner.forgotten),
            ));
        }
        let first = inner
            .changes
            .partition_point(|change| change.revision <= revision);
        let changes = inner
            .changes
            .range(first..)
            .filter(|change| change.kind.plural == kind.plural)
            .map(Arc::clone)
            .collect();
        Ok((inner.revision, changes))
    }

    fn commit(
        &self,
        inner: &mut Inner,
        kind: &'static Kind,
        key: Key,
        mut object: Value,
        delete: bool,
    ) -> Arc<Value> {
        inner.revision += 1;
        let revision = inner.revision;
        json::set(
            &mut object,
            &["metadata", "resourceVersion"],
            json!(revision.to_string()),
        );
        let object = Arc::new(object);
        let objects = inner.objects.entry(kind.plural).or_default();
        let old = if delete {
            objects.remove(&key)
        } else {
            objects.insert(key.clone(), Arc::clone(&object))
        };
        let change = Change {
            revision,
            kind,
            key,
            old,
            last: Arc::clone(&object),
            deleted: delete,
        };
        inner.changes.push_back(Arc::new(change));
        while inner.changes.len() > self.history {
            if let Some(change) = inner.changes.pop_front() {
                inner.forgotten = change.revision;
            }
        }
        self.revision.send_replace(revision);
        object
    }

    /// A panic under the lock cannot leave half a change: each is one insert.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn key_of(object: &Value) -> Key {
    (
        text(object, "/metadata/namespace").to_owned(),
        text(object, "/metadata/name").to_owned(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(name: &str) -> Value {
        json!({"metadata": {"namespace": "default", "name": name}})
    }

    #[test]
    fn a_list_can_be_had_as_it_was() {
        let store = Store::new(10);
        let kind = Kind::named("configmaps");
        store.create(kind, map("a")).unwrap();
        let (then, _) = store.list(kind, None);
        store.create(kind, map("b")).unwrap();
        store
            .update(kind, "default", "a", |old| {
                Ok(Decision::Remove(old.clone()))
            })
            .unwrap();
        let names = |objects: Vec<Arc<Value>>| {
            objects
                .iter()
                .map(|object| text(object, "/metadata/name").to_owned())
                .collect::<Vec<_>>()
        };
        assert_eq!(names(store.list(kind, None).1), ["b"]);
        assert_eq!(names(store.list_at(kind, None, then).unwrap()), ["a"]);
    }

    #[test]
    fn what_is_forgotten_is_gone_and_said_so() {
        let store = Store::new(2);
        let kind = Kind::named("configmaps");
        for name in ["a", "b", "c", "d"] {
            store.create(kind, map(name)).unwrap();
        }
        assert_eq!(store.changes(kind, 3).unwrap().1.len(), 2);
        assert_eq!(store.changes(kind, 1).err().unwrap().code, 410);
        assert_eq!(store.list_at(kind, None, 1).err().unwrap().code, 410);
    }

    #[test]
    fn an_update_that_changes_nothing_keeps_the_version() {
        let store = Store::new(2);
        let kind = Kind::named("configmaps");
        let made = store.create(kind, map("a")).unwrap();
        let same = store
            .update(kind, "default", "a", |old| Ok(Decision::Put(old.clone())))
            .unwrap();
        assert_eq!(made, same);
        assert_eq!(store.create(kind, map("a")).unwrap_err().code, 409);
    }
}

use super::*;
use std::os::unix::fs::PermissionsExt as _;

fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::new(dir.path().join("state"));
    (dir, store)
}

fn read(store: &Store, name: &str) -> String {
    store.read(name).unwrap().unwrap()
}

#[test]
fn everything_is_made_once_and_private() {
    let (_dir, store) = store();
    Loopback::open(&store).unwrap();
    let before: Vec<_> = [CA, CA_KEY, CLIENT, CLIENT_KEY]
        .map(|n| read(&store, n))
        .into();
    for entry in fs::read_dir(store.dir()).unwrap() {
        let entry = entry.unwrap();
        let mode = entry.metadata().unwrap().permissions().mode() & 0o077;
        assert!(
            mode == 0 || entry.file_name() == LOCK,
            "{:?}",
            entry.file_name()
        );
    }
    Loopback::open(&store).unwrap();
    let after: Vec<_> = [CA, CA_KEY, CLIENT, CLIENT_KEY]
        .map(|n| read(&store, n))
        .into();
    assert_eq!(before, after);
}

#[test]
fn what_is_damaged_missing_or_near_its_end_is_made_anew() {
    for (name, content) in [
        (CA, "nonsense"),
        (CA_KEY, ""),
        (CLIENT, "-----BEGIN CERTIFICATE-----\n-----END"),
        (CLIENT_KEY, "x"),
        (LIFE_FILE, "{}"),
        (LIFE_FILE, r#"{"not_after_unix":1}"#),
        (LIFE_FILE, r#"{"not_after_unix":18446744073709551615}"#),
    ] {
        let (_dir, store) = store();
        Loopback::open(&store).unwrap();
        let old = read(&store, CLIENT_KEY);
        store.write(name, content.as_bytes()).unwrap();
        Loopback::open(&store).unwrap();
        assert_ne!(old, read(&store, CLIENT_KEY), "{name} {content:?}");
    }
}

#[test]
fn many_that_start_together_agree_on_one_authority() {
    let (_dir, store) = store();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| Loopback::open(&store).unwrap());
        }
    });
    Loopback::open(&store).unwrap();
}

#[test]
fn an_entry_names_absolute_files() {
    let entry = Loopback::entry(&Store::new("relative"), "prod", 47611);
    assert_eq!(entry.server, "https://127.0.0.1:47611/clusters/prod");
    assert!(entry.client_key.is_absolute() && entry.certificate_authority.is_absolute());
}

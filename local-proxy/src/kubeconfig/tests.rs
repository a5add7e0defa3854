use super::*;
use std::{fs, os::unix::fs::PermissionsExt as _, os::unix::fs::symlink, thread};

fn entry(name: &str) -> Entry {
    Entry {
        name: name.to_owned(),
        server: format!("https://127.0.0.1:47611/clusters/{name}"),
        certificate_authority: "/state/loopback-ca.pem".into(),
        client_certificate: "/state/loopback-client.pem".into(),
        client_key: "/state/loopback-client-key.pem".into(),
    }
}

/// A directory with a kubeconfig of this content.
fn with(content: &str) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config");
    fs::write(&path, content).unwrap();
    (dir, path)
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap()
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

fn litter(dir: &Path) -> Vec<String> {
    fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != "config")
        .collect()
}

const THEIRS: &str = "\
kind: Config
apiVersion: v1
x-unknown:
  nested: [1, 2.5, 'three', null]
preferences: {}
current-context: theirs
users:
- user:
    exec: {command: aws, args: [eks], env: null}
  name: theirs
contexts:
- context: {cluster: theirs, user: theirs, namespace: kube-system}
  name: theirs
clusters:
- name: theirs
  cluster: {server: 'https://10.0.0.1', proxy-url: 'http://p', extensions: [{name: e, extension: {a: b}}]}
";

#[test]
fn a_new_file_is_private_and_starts_with_our_context() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a/.kube/config");
    let written = write(&path, &[entry("a"), entry("b")], false).unwrap();
    assert_eq!(written.contexts, ["throwline-a", "throwline-b"]);
    assert_eq!(written.current.as_deref(), Some("throwline-a"));
    assert_eq!(mode(&path), 0o600);
    assert_eq!(mode(path.parent().unwrap()), 0o700);
    assert_eq!(
        read(&path).lines().take(10).collect::<Vec<_>>(),
        [
            "apiVersion: v1",
            "kind: Config",
            "clusters:",
            "- name: throwline-a",
            "  cluster:",
            "    server: https://127.0.0.1:47611/clusters/a",
            "    certificate-authority: /state/loopback-ca.pem",
            "    tls-server-name: a.throwline.internal",
            "- name: throwline-b",
            "  cluster:",
        ]
    );
}

#[test]
fn what_is_theirs_keeps_its_values_and_order() {
    let (dir, path) = with(THEIRS);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    let written = write(&path, &[entry("prod")], false).unwrap();
    assert_eq!(written.current, None);

    let before: Mapping = serde_norway::from_str(THEIRS).unwrap();
    let mut after: Mapping = serde_norway::from_str(&read(&path)).unwrap();
    let keys = |m: &Mapping| m.keys().cloned().collect::<Vec<_>>();
    assert_eq!(keys(&before), keys(&after), "order of the top level");
    for list in ["clusters", "contexts", "users"] {
        let Some(Value::Sequence(items)) = after.get_mut(list) else {
            panic!("{list}")
        };
        assert_eq!(items.len(), 2);
        assert_eq!(items[1].get("name").unwrap(), "throwline-prod");
        items.truncate(1);
    }
    assert_eq!(before, after);
    assert_eq!(mode(&path), 0o640);
    assert!(litter(dir.path()).is_empty());
}

#[test]
fn writing_again_changes_nothing_and_a_new_port_changes_only_the_server() {
    let (_dir, path) = with(THEIRS);
    write(&path, &[entry("prod")], false).unwrap();
    let first = read(&path);
    let inode = |path: &Path| std::os::unix::fs::MetadataExt::ino(&fs::metadata(path).unwrap());
    let before = inode(&path);
    write(&path, &[entry("prod")], false).unwrap();
    assert_eq!(before, inode(&path), "not even replaced");

    let mut moved = entry("prod");
    moved.server = "https://127.0.0.1:47612/clusters/prod".to_owned();
    write(&path, &[moved], false).unwrap();
    assert_eq!(read(&path), first.replace(":47611/", ":47612/"));
}

#[test]
fn the_users_own_changes_to_our_entries_stay_but_not_other_credentials() {
    let (_dir, path) = with(
        "\
contexts:
- name: throwline-prod
  context: {namespace: mine, cluster: wrong, user: wrong}
users:
- name: throwline-prod
  user: {token: secret, client-key-data: eA==}
clusters:
- name: throwline-prod
  cluster: {insecure-skip-tls-verify: true, disable-compression: true}
",
    );
    write(&path, &[entry("prod")], false).unwrap();
    let text = read(&path);
    assert!(text.contains("namespace: mine") && text.contains("disable-compression: true"));
    for gone in ["wrong", "token", "client-key-data", "insecure"] {
        assert!(!text.contains(gone), "{gone} in {text}");
    }
}

#[test]
fn the_current_context_is_theirs_unless_asked_for_or_empty() {
    let (_dir, path) = with(THEIRS);
    write(&path, &[entry("prod")], false).unwrap();
    assert!(read(&path).contains("current-context: theirs"));
    let written = write(&path, &[entry("prod")], true).unwrap();
    assert_eq!(written.current.as_deref(), Some("throwline-prod"));
    assert!(read(&path).contains("current-context: throwline-prod"));

    for empty in [
        "",
        "\n# nothing\n",
        "current-context: ''\nclusters: null\nusers: []\n",
    ] {
        let (_dir, path) = with(empty);
        let written = write(&path, &[entry("prod")], false).unwrap();
        assert_eq!(
            written.current.as_deref(),
            Some("throwline-prod"),
            "{empty:?}"
        );
    }
}

#[test]
fn removing_takes_only_ours() {
    let (_dir, path) = with(THEIRS);
    write(&path, &[entry("a"), entry("b")], true).unwrap();
    remove(&path, &["a".to_owned()]).unwrap();
    let text = read(&path);
    assert!(
        !text.contains("throwline-a") && text.contains("throwline-b"),
        "{text}"
    );
    assert!(text.contains("current-context: ''"), "{text}");
    remove(&path, &["b".to_owned()]).unwrap();
    let mut before: Mapping = serde_norway::from_str(THEIRS).unwrap();
    before.insert("current-context".into(), "".into());
    assert_eq!(
        serde_norway::from_str::<Mapping>(&read(&path)).unwrap(),
        before
    );
}

#[test]
fn a_broken_file_is_named_and_not_touched() {
    for bad in [
        "clusters: [",
        "- a list",
        "just text",
        "clusters: {a: b}",
        "clusters: text",
        "contexts: [7]\nusers: 3",
        "a: 1\n---\nb: 2\n",
        "a: &a [*a]",
        "key: 1\nkey: 2",
        "\u{0}",
    ] {
        let (dir, path) = with(bad);
        let error = write(&path, &[entry("prod")], false).unwrap_err();
        assert!(matches!(error, Error::Broken { .. }), "{bad:?}: {error}");
        assert!(error.to_string().contains("config is broken"), "{error}");
        assert_eq!(read(&path), bad);
        assert!(litter(dir.path()).is_empty(), "{bad:?}");
    }
    let (_dir, path) = with("");
    fs::write(&path, b"\xff\xfe").unwrap();
    assert!(matches!(
        write(&path, &[entry("a")], false),
        Err(Error::Broken { .. })
    ));
}

#[test]
fn what_cannot_be_written_is_named_and_leaves_nothing_behind() {
    let (dir, path) = with(THEIRS);
    // A directory where the lock goes fails the same way for root, who may write anywhere.
    let under_a_file = path.join("config");
    let error = write(&under_a_file, &[entry("a")], false).unwrap_err();
    assert!(matches!(error, Error::Unwritable { .. }), "{error}");
    assert!(
        error.to_string().contains(&*under_a_file.to_string_lossy()),
        "{error}"
    );

    let error = write(dir.path(), &[entry("a")], false).unwrap_err();
    assert!(matches!(error, Error::Broken { .. }), "{error}");
    assert_eq!(read(&path), THEIRS);
    assert!(litter(dir.path()).is_empty());
}

#[test]
fn a_symbolic_link_stays_one_and_the_real_file_changes() {
    let dir = tempfile::tempdir().unwrap();
    let real = dir.path().join("real/dotfiles-config");
    fs::create_dir(real.parent().unwrap()).unwrap();
    fs::write(&real, THEIRS).unwrap();
    let middle = dir.path().join("middle");
    symlink("real/dotfiles-config", &middle).unwrap();
    let path = dir.path().join("config");
    symlink(&middle, &path).unwrap();
    write(&path, &[entry("prod")], false).unwrap();
    assert!(fs::symlink_metadata(&path).unwrap().is_symlink());
    assert!(fs::symlink_metadata(&middle).unwrap().is_symlink());
    assert!(read(&real).contains("throwline-prod"));

    let around = dir.path().join("loop");
    symlink("loop", &around).unwrap();
    assert!(matches!(
        write(&around, &[entry("a")], false),
        Err(Error::Unwritable { .. })
    ));
}

#[test]
fn kubectls_lock_is_waited_for_and_then_named() {
    let (dir, path) = with(THEIRS);
    let lock = dir.path().join("config.lock");
    fs::write(&lock, "").unwrap();
    let error = write_within(&path, &[entry("a")], false, Duration::ZERO).unwrap_err();
    assert!(matches!(error, Error::Locked { .. }), "{error}");
    assert!(error.to_string().contains("config.lock"), "{error}");
    assert!(lock.exists(), "somebody else's lock is not ours to remove");
    assert_eq!(read(&path), THEIRS);

    let waiting = thread::spawn({
        let path = path.clone();
        move || write_within(&path, &[entry("a")], false, Duration::from_secs(60))
    });
    fs::remove_file(&lock).unwrap();
    waiting.join().unwrap().unwrap();
    assert!(!lock.exists());
    assert!(read(&path).contains("throwline-a"));
}

#[test]
fn many_writers_at_once_lose_nothing() {
    let (dir, path) = with("");
    let names: Vec<String> = (0..12).map(|n| format!("c{n}")).collect();
    thread::scope(|scope| {
        for name in &names {
            let path = &path;
            scope.spawn(move || {
                write_within(path, &[entry(name)], false, Duration::from_secs(60)).unwrap();
            });
        }
    });
    let text = read(&path);
    for name in &names {
        assert!(
            text.contains(&format!("name: throwline-{name}\n")),
            "{name}"
        );
    }
    assert!(litter(dir.path()).is_empty());
}

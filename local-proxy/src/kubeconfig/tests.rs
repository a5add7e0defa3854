use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::{fs, thread};

use serde_norway::{Mapping, Value};

use super::*;

static GO_ON: AtomicBool = AtomicBool::new(false);

fn entry(name: &str) -> Entry {
    Entry {
        name: name.to_owned(),
        server: format!("https://127.0.0.1:47611/clusters/{name}"),
        certificate_authority: "/state/loopback-ca.pem".into(),
        client_certificate: "/state/loopback-client.pem".into(),
        client_key: "/state/loopback-client-key.pem".into(),
    }
}

fn owner() -> Owner {
    Owner {
        relay: "https://relay.example.com/".to_owned(),
        user: "dana".to_owned(),
    }
}

fn put(path: &Path, entries: &[Entry], set_current: bool) -> Result<Written, Error> {
    write(&Files::one(path), &owner(), entries, set_current, &GO_ON)
}

fn lock_wait(limit: Duration) -> LockWait<'static> {
    LockWait {
        limit,
        stop: &GO_ON,
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

/// What lies beside the file and its backup.
fn litter(dir: &Path) -> Vec<String> {
    fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != "config" && name != "config.throwline-backup")
        .collect()
}

fn load(text: &str) -> Mapping {
    edit::load(without_mark(text)).unwrap()
}

fn without_mark(text: &str) -> &str {
    text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(text)
}

/// The item of that name.
fn item<'v>(config: &'v Mapping, list: &str, name: &str) -> &'v Value {
    let items = config[list].as_sequence().unwrap();
    let found: Vec<_> = items.iter().filter(|item| item["name"] == name).collect();
    assert_eq!(found.len(), 1, "{name} in {list}");
    found[0]
}

/// That a file has our entries for a cluster.
#[track_caller]
fn has(text: &str, name: &str, cluster: &str) {
    let config = load(text);
    let inner = &item(&config, "clusters", name)["cluster"];
    let server = format!("https://127.0.0.1:47611/clusters/{cluster}");
    assert_eq!(inner["server"], *server, "{text}");
    assert_eq!(inner["certificate-authority"], "/state/loopback-ca.pem");
    let server_name = format!("{cluster}.throwline.internal");
    assert_eq!(inner["tls-server-name"], *server_name);
    let user = &item(&config, "users", name)["user"];
    assert_eq!(user["client-certificate"], "/state/loopback-client.pem");
    assert_eq!(user["client-key"], "/state/loopback-client-key.pem");
    let context = &item(&config, "contexts", name)["context"];
    assert_eq!(
        (&context["cluster"], &context["user"]),
        (&name.into(), &name.into())
    );
}

/// That every line of `before` is in `after`, in its order.
#[track_caller]
fn keeps_lines(before: &str, after: &str) {
    let mut after_lines = after.split('\n');
    for line in before.split('\n') {
        assert!(
            after_lines.any(|found| found == line),
            "lost {line:?} of\n{before}\nin\n{after}"
        );
    }
}

const THEIRS: &str = "\
# mine
kind: Config
apiVersion: v1
x-unknown:
  nested: [1, 2.5, 'three', null]   # as it is
preferences: {}
current-context: theirs
users:
- user:
    exec: {command: aws, args: [eks], env: null}
  name: theirs
contexts:
- context: {cluster: theirs, user: theirs, namespace: \"no\"}
  name: theirs
clusters:
- name: theirs
  cluster: {server: 'https://10.0.0.1', proxy-url: 'http://p', extensions: [{name: e, extension: {a: b}}]}
";

#[test]
fn a_new_file_is_private_and_has_no_current_context() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a/.kube/config");
    let written = put(&path, &[entry("a"), entry("b")], false).unwrap();
    assert_eq!(written.contexts, ["throwline-a", "throwline-b"]);
    let added = |context: &str| Change::Added {
        context: context.to_owned(),
        file: path.clone(),
    };
    assert_eq!(
        written.changes,
        [added("throwline-a"), added("throwline-b")]
    );
    assert_eq!(mode(&path), 0o600);
    assert_eq!(mode(path.parent().unwrap()), 0o700);
    let text = read(&path);
    assert_eq!(
        text.lines().take(15).collect::<Vec<_>>(),
        [
            "apiVersion: v1",
            "kind: Config",
            "clusters:",
            "- name: throwline-a",
            "  cluster:",
            "    server: https://127.0.0.1:47611/clusters/a",
            "    certificate-authority: /state/loopback-ca.pem",
            "    tls-server-name: a.throwline.internal",
            "    extensions:",
            "    - name: throwline",
            "      extension:",
            "        cluster: a",
            "        relay: https://relay.example.com/",
            "        user: dana",
            "- name: throwline-b",
        ]
    );
    assert!(!text.contains("current-context"), "{text}");
    has(&text, "throwline-a", "a");
    has(&text, "throwline-b", "b");
}

#[test]
fn what_is_theirs_keeps_every_byte() {
    let (dir, path) = with(THEIRS);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    let written = put(&path, &[entry("prod")], false).unwrap();
    let text = read(&path);
    keeps_lines(THEIRS, &text);
    has(&text, "throwline-prod", "prod");
    assert_eq!(load(&text)["current-context"], "theirs");
    assert_eq!(mode(&path), 0o640);
    assert!(litter(dir.path()).is_empty());
    let backup = dir.path().join("config.throwline-backup");
    assert_eq!(read(&backup), THEIRS);
    assert_eq!(mode(&backup), 0o600);
    assert_eq!(
        written.changes.last(),
        Some(&Change::Kept {
            file: path.clone(),
            backup: backup.clone()
        })
    );
    // One is kept, of what was there before the last change.
    put(&path, &[entry("other")], false).unwrap();
    assert_eq!(read(&backup), text);
    assert!(litter(dir.path()).is_empty());
}

#[test]
fn writing_again_changes_nothing_and_a_new_port_changes_only_the_server() {
    let (_dir, path) = with(THEIRS);
    put(&path, &[entry("prod")], false).unwrap();
    let first = read(&path).replace("    server: https://127", "    server:  https://127");
    let first = first.replace("/clusters/prod\n", "/clusters/prod  # mine\n");
    fs::write(&path, &first).unwrap();
    let before = fs::metadata(&path).unwrap().ino();
    let written = put(&path, &[entry("prod")], false).unwrap();
    assert_eq!(
        before,
        fs::metadata(&path).unwrap().ino(),
        "not even replaced"
    );
    assert!(written.changes.is_empty());

    let mut moved = entry("prod");
    moved.server = "https://127.0.0.1:47612/clusters/prod".to_owned();
    let written = put(&path, &[moved], false).unwrap();
    assert_eq!(read(&path), first.replace(":47611/", ":47612/"));
    assert!(
        matches!(&written.changes[0], Change::Updated { context, .. } if context == "throwline-prod")
    );
}

#[test]
fn the_users_own_changes_to_our_entries_stay_but_not_other_credentials() {
    let (_dir, path) = with("");
    put(&path, &[entry("prod")], false).unwrap();
    let text = read(&path)
        .replace("  context:\n", "  context:\n    namespace: \"no\"\n")
        .replace(
            "    server:",
            "    disable-compression: true\n    insecure-skip-tls-verify: true\n    server:",
        )
        .replace(
            "  user:\n",
            "  user:\n    token: secret\n    client-key-data: eA==\n",
        );
    fs::write(&path, &text).unwrap();
    put(&path, &[entry("prod")], false).unwrap();
    let text = read(&path);
    has(&text, "throwline-prod", "prod");
    assert!(text.contains("namespace: \"no\""), "{text}");
    assert!(text.contains("disable-compression: true"), "{text}");
    for gone in ["token", "client-key-data", "insecure"] {
        assert!(!text.contains(gone), "{gone} in {text}");
    }
}

#[test]
fn the_current_context_is_theirs_unless_asked_for() {
    for content in [
        THEIRS,
        "",
        "current-context: \"\"\n",
        "current-context:\nclusters: null\n",
    ] {
        let (_dir, path) = with(content);
        let before = load(content).get("current-context").cloned();
        let written = put(&path, &[entry("prod")], false).unwrap();
        assert!(
            !written
                .changes
                .iter()
                .any(|c| matches!(c, Change::Current { .. }))
        );
        assert_eq!(load(&read(&path)).get("current-context").cloned(), before);

        let written = put(&path, &[entry("prod")], true).unwrap();
        assert_eq!(load(&read(&path))["current-context"], "throwline-prod");
        let from = (content == THEIRS).then(|| "theirs".to_owned());
        assert!(
            written.changes.contains(&Change::Current {
                from,
                to: "throwline-prod".to_owned(),
                file: path.clone(),
            }),
            "{written:?}"
        );
        assert_eq!(put(&path, &[entry("prod")], true).unwrap().changes, []);
    }
}

/// All that kubeconfigs may look like, each kept and added to.
#[test]
fn every_form_of_yaml_keeps_its_bytes() {
    let crlf = THEIRS.replace('\n', "\r\n");
    let bom = format!("\u{feff}{THEIRS}");
    let no_end = THEIRS.trim_end().to_owned();
    let second = format!("{THEIRS}---\nanother: [document\n");
    let ended = format!("%YAML 1.1\n---\n{THEIRS}...\n# behind\n");
    let indented = THEIRS
        .lines()
        .map(|line| format!("   {line}\n"))
        .collect::<String>();
    for content in [
        THEIRS,
        &crlf,
        &bom,
        &no_end,
        &second,
        &ended,
        &indented,
        "# only a comment",
        "# only a comment\n",
        "---\n# nothing\n",
        "\u{feff}",
        "clusters:\nusers:   # none\ncontexts: []   # none yet\n# the end\n",
        "clusters: null\nusers: ~\ncontexts: [ ]\ncurrent-context: x\n",
        "clusters:\n  - name: a\n    cluster: {server: x}\n    # about a\n  # about the list\nusers: []\n",
        "clusters:\n-\n  name: a\n  cluster: {server: x}\n- # odd\n  name: b\ncontexts: []\n",
        "clusters: [{name: a, cluster: {server: 'x'}}, {name: b}, # b\n ]\nusers: [\n]\n",
        "clusters: &c\n- &x {name: a, cluster: {server: x}}\nmore: *x\nusers: []\n",
        "clusters:\n- name: a\n  cluster: &c\n    server: x\n- name: b\n  cluster:\n    <<: *c\n    tls-server-name: y\n",
        "clusters:\n- name: a\n  cluster:\n    certificate-authority-data: |\n      abc\n      def\n\ncontexts: []\n",
        "clusters:\n- name: a\n  note: >+\n    abc\n\n\nusers:\n- name: a\n  user: {token: \"x\\\n    y\"}\n",
        "users:\n- name: a\n  user:\n    exec:\n      env:\n      - {name: A, value: \"on\"}\n      - {name: B, value: 'y'}\n      - name: C\n        value: \"0o17\"\n      - name: D\n        value: \"1:30\"\n",
        "clusters:\t[]\nusers:\t# tab\n- name:\ta\n",
        "\"clusters\": []\n'users':\n- 'name': \"a\"\n",
        "extensions:\n- name: \"~\"\n  extension: !!str 12\nfloat: .nan\ntime: 2001-01-01\nbig: 0x_ff\n",
    ] {
        let (dir, path) = with(content);
        let before = load(content);
        if let Err(error) = put(&path, &[entry("p1"), entry("p2")], false) {
            panic!("{content:?}: {error}");
        }
        let text = read(&path);
        has(&text, "throwline-p1", "p1");
        has(&text, "throwline-p2", "p2");
        let after = load(&text);
        for (key, value) in &before {
            match (value, key.as_str()) {
                (Value::Sequence(items), Some("clusters" | "users" | "contexts")) => {
                    let found = after[key].as_sequence().unwrap();
                    assert_eq!(&found[..items.len()], &items[..], "{content}");
                }
                (Value::Null, Some("clusters" | "users" | "contexts")) => {}
                _ => assert_eq!(&after[key], value, "{content}"),
            }
        }
        // No byte is lost but those of an empty list's own.
        let mut rest = text.bytes();
        let lost: String = content
            .replace("null", "")
            .replace("[ ]", "")
            .replace("[]", "")
            .replace("[\n]", "")
            .replace('~', "");
        assert!(
            lost.bytes().all(|byte| rest.any(|found| found == byte)),
            "{content}\n{text}"
        );
        if content.contains("\r\n") {
            assert!(!text.replace("\r\n", "").contains('\n'), "{text:?}");
        }
        assert!(litter(dir.path()).is_empty());
        // Once more with another port, then nothing more.
        let mut moved = entry("p1");
        moved.server = "https://127.0.0.1:1/clusters/p1".to_owned();
        put(&path, &[moved, entry("p2")], true).unwrap();
        put(&path, &[entry("p1")], false).unwrap();
        has(&read(&path), "throwline-p1", "p1");
        assert_eq!(
            put(&path, &[entry("p1"), entry("p2")], true)
                .unwrap()
                .changes,
            []
        );
    }
}

#[test]
fn json_stays_json() {
    let json = serde_json::json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "",
        "clusters": [{"name": "a", "cluster": {"server": "https://x", "n": "no"}}],
        "users": [], "contexts": null, "preferences": {}
    });
    for text in [
        json.to_string(),
        serde_json::to_string_pretty(&json).unwrap(),
        "{}\n".to_owned(),
    ] {
        let (_dir, path) = with(&text);
        put(&path, &[entry("p"), entry("q")], true).unwrap();
        let mut moved = entry("p");
        moved.server = "https://127.0.0.1:2/clusters/p".to_owned();
        put(&path, &[moved], false).unwrap();
        put(&path, &[entry("p")], false).unwrap();
        let after = read(&path);
        has(&after, "throwline-p", "p");
        has(&after, "throwline-q", "q");
        if text.len() > 3 {
            let after: serde_json::Value = serde_json::from_str(&after).unwrap();
            assert_eq!(after["clusters"][0], json["clusters"][0]);
            assert_eq!(after["current-context"], "throwline-p");
        }
    }
}

#[test]
fn what_cannot_be_edited_safely_is_left_alone_and_told() {
    for (content, what) in [
        ("clusters: &c []\nmore: *c\n", "anchor"),
        ("a: &a [{name: x}]\nclusters: *a\n", "not a list"),
        ("base: &b {kind: Config}\n<<: *b\n", "'<<'"),
        ("clusters: &c\n- {name: x}\nmore: *c\n", "change"),
        ("users:\r- name: a\r", "carriage returns"),
        ("? contexts\n: - {name: c}\n", "lines of their own"),
        (
            "clusters:\n- &t {name: throwline-prod, cluster: {certificate-authority: /state/loopback-ca.pem}}\n",
            "anchor",
        ),
        ("clusters: {a: b}\n", "not a list"),
        ("clusters: text\n", "not a list"),
    ] {
        let (dir, path) = with(content);
        let error = put(&path, &[entry("prod")], false).unwrap_err();
        assert!(
            matches!(error, Error::Unsafe { .. }),
            "{content:?}: {error}"
        );
        let text = error.to_string();
        assert!(
            text.contains(what) && text.contains("--kubeconfig"),
            "{text}"
        );
        assert_eq!(read(&path), content);
        assert!(litter(dir.path()).is_empty());
        assert!(!dir.path().join("config.throwline-backup").exists());
    }
}

#[test]
fn a_broken_file_is_named_and_not_touched() {
    for bad in [
        "clusters: [",
        "- a list",
        "just text",
        "a: &a [*a]",
        "a: *nowhere",
        "key: 1\nkey: 2",
        "\u{0}",
        "a:\n\t- tab\n",
    ] {
        let (dir, path) = with(bad);
        let error = put(&path, &[entry("prod")], false).unwrap_err();
        assert!(matches!(error, Error::Broken { .. }), "{bad:?}: {error}");
        assert!(error.to_string().contains("config is broken"), "{error}");
        assert_eq!(read(&path), bad);
        assert!(litter(dir.path()).is_empty(), "{bad:?}");
    }
    let (_dir, path) = with("");
    fs::write(&path, b"\xff\xfe").unwrap();
    assert!(matches!(
        put(&path, &[entry("a")], false),
        Err(Error::Broken { .. })
    ));
}

#[test]
fn what_cannot_be_written_is_named_and_leaves_nothing_behind() {
    let (dir, path) = with(THEIRS);
    // A directory where the lock goes fails the same way for root, which may write anywhere.
    let under_a_file = path.join("config");
    let error = put(&under_a_file, &[entry("a")], false).unwrap_err();
    assert!(matches!(error, Error::Unwritable { .. }), "{error}");
    assert!(
        error.to_string().contains(&*under_a_file.to_string_lossy()),
        "{error}"
    );

    let error = put(dir.path(), &[entry("a")], false).unwrap_err();
    assert!(matches!(error, Error::Broken { .. }), "{error}");
    assert_eq!(read(&path), THEIRS);
    assert!(litter(dir.path()).is_empty());
}

#[test]
fn a_symbolic_link_stays_one_and_a_hard_link_too() {
    let dir = tempfile::tempdir().unwrap();
    let real = dir.path().join("real/dotfiles-config");
    fs::create_dir(real.parent().unwrap()).unwrap();
    fs::write(&real, THEIRS).unwrap();
    let middle = dir.path().join("middle");
    symlink("real/dotfiles-config", &middle).unwrap();
    let path = dir.path().join("config");
    symlink(&middle, &path).unwrap();
    put(&path, &[entry("prod")], false).unwrap();
    assert!(fs::symlink_metadata(&path).unwrap().is_symlink());
    assert!(fs::symlink_metadata(&middle).unwrap().is_symlink());
    assert!(read(&real).contains("throwline-prod"));

    let twin = dir.path().join("twin");
    fs::hard_link(&real, &twin).unwrap();
    put(&path, &[entry("more")], false).unwrap();
    assert!(read(&twin).contains("throwline-more"));

    let around = dir.path().join("loop");
    symlink("loop", &around).unwrap();
    assert!(matches!(
        put(&around, &[entry("a")], false),
        Err(Error::Unwritable { .. })
    ));
}

#[test]
fn kubectls_lock_is_waited_for_and_then_named() {
    let (dir, path) = with(THEIRS);
    let lock = dir.path().join("config.lock");
    fs::write(&lock, "").unwrap();
    let within = |limit| {
        let files = Files::one(&path);
        write_within(&files, &owner(), &[entry("a")], false, &lock_wait(limit))
    };
    let error = within(Duration::ZERO).unwrap_err();
    assert!(matches!(error, Error::Locked { .. }), "{error}");
    assert!(error.to_string().contains("config.lock"), "{error}");
    assert!(lock.exists(), "another's lock is not ours to remove");
    assert_eq!(read(&path), THEIRS);

    thread::scope(|scope| {
        let waiting = scope.spawn(|| within(Duration::from_secs(60)));
        fs::remove_file(&lock).unwrap();
        waiting.join().unwrap().unwrap();
    });
    assert!(!lock.exists());
    assert!(read(&path).contains("throwline-a"));
}

#[test]
fn who_waits_for_a_lock_can_be_stopped() {
    let (dir, path) = with(THEIRS);
    fs::write(dir.path().join("config.lock"), "").unwrap();
    let stop = AtomicBool::new(true);
    let wait = LockWait {
        limit: Duration::from_secs(3600),
        stop: &stop,
    };
    let error = write_within(&Files::one(&path), &owner(), &[entry("a")], false, &wait);
    assert!(matches!(error, Err(Error::Stopped)), "{error:?}");
    assert_eq!(read(&path), THEIRS);
}

#[test]
fn a_lock_of_ours_that_nobody_holds_blocks_nobody() {
    let (dir, path) = with(THEIRS);
    let lock = dir.path().join("config.lock");
    // As kill -9 leaves it.
    fs::write(&lock, "throwline 4242\n").unwrap();
    let files = Files::one(&path);
    write_within(
        &files,
        &owner(),
        &[entry("a")],
        false,
        &lock_wait(Duration::ZERO),
    )
    .unwrap();
    assert!(!lock.exists());
    // One that is held is waited for.
    let held = lock::Lock::take(&path, &path, &lock_wait(Duration::ZERO)).unwrap();
    assert!(read(&lock).starts_with("throwline "));
    let error = write_within(
        &files,
        &owner(),
        &[entry("b")],
        false,
        &lock_wait(Duration::ZERO),
    );
    assert!(matches!(error, Err(Error::Locked { .. })), "{error:?}");
    drop(held);
    assert!(!lock.exists());
    // One that was removed by hand and made by another is theirs.
    let held = lock::Lock::take(&path, &path, &lock_wait(Duration::ZERO)).unwrap();
    fs::remove_file(&lock).unwrap();
    fs::write(&lock, "").unwrap();
    drop(held);
    assert!(lock.exists());
}

#[test]
fn many_writers_at_once_lose_nothing() {
    let (dir, path) = with("");
    let names: Vec<String> = (0..12).map(|n| format!("c{n}")).collect();
    thread::scope(|scope| {
        for name in &names {
            let path = &path;
            scope.spawn(move || {
                let wait = lock_wait(Duration::from_secs(60));
                write_within(&Files::one(path), &owner(), &[entry(name)], false, &wait).unwrap();
            });
        }
    });
    let text = read(&path);
    for name in &names {
        has(&text, &format!("throwline-{name}"), name);
    }
    assert!(litter(dir.path()).is_empty(), "{:?}", litter(dir.path()));
}

#[test]
fn of_several_files_each_entry_is_changed_where_it_is_as_kubectl_does() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let files = Files::all([at("a"), at("b"), at("c")]).unwrap();
    let put = |entries: &[Entry], current| write(&files, &owner(), entries, current, &GO_ON);
    fs::write(at("b"), "current-context: theirs\n").unwrap();
    fs::write(at("c"), "contexts: []\n").unwrap();
    // The first that exists, and no other.
    put(&[entry("p")], false).unwrap();
    assert!(!at("a").exists());
    has(&read(&at("b")), "throwline-p", "p");
    assert_eq!(read(&at("c")), "contexts: []\n");
    assert!(read(&at("b")).contains("current-context: theirs\n"));

    // What is new goes to the first now, what is known is changed where it is.
    fs::write(at("a"), "").unwrap();
    let mut moved = entry("p");
    moved.server = "https://127.0.0.1:1/clusters/p".to_owned();
    let written = put(&[moved, entry("q")], false).unwrap();
    assert!(read(&at("b")).contains("127.0.0.1:1/clusters/p"));
    assert!(!read(&at("a")).contains("throwline-p"));
    has(&read(&at("a")), "throwline-q", "q");
    assert!(written.changes.contains(&Change::Updated {
        context: "throwline-p".to_owned(),
        file: at("b")
    }));
    assert!(written.changes.contains(&Change::Added {
        context: "throwline-q".to_owned(),
        file: at("a")
    }));
    // The current context is written to the default file, where it wins.
    let written = put(&[entry("q")], true).unwrap();
    assert_eq!(load(&read(&at("a")))["current-context"], "throwline-q");
    assert_eq!(load(&read(&at("b")))["current-context"], "theirs");
    assert!(written.changes.contains(&Change::Current {
        from: Some("theirs".to_owned()),
        to: "throwline-q".to_owned(),
        file: at("a")
    }));

    // None exists: the last is made.
    let files = Files::all([at("x"), at("y")]).unwrap();
    write(&files, &owner(), &[entry("p")], false, &GO_ON).unwrap();
    assert!(!at("x").exists() && at("y").exists());

    // A broken file that is not to be written is an error all the same, since kubectl fails too.
    fs::write(at("x"), "a: [").unwrap();
    let error = write(&files, &owner(), &[entry("p")], false, &GO_ON).unwrap_err();
    assert!(
        matches!(&error, Error::Broken { path, .. } if *path == at("x")),
        "{error}"
    );
}

#[test]
fn a_name_that_another_relay_or_user_has_is_left_to_it() {
    let (_dir, path) = with("");
    let files = Files::one(&path);
    put(&path, &[entry("prod")], false).unwrap();
    let first = read(&path);
    let other = Owner {
        relay: "https://relay-b.example.com:8443/".to_owned(),
        ..owner()
    };
    // The same state directory, too: its user has signed in at another relay.
    let written = write(&files, &other, &[entry("prod")], false, &GO_ON).unwrap();
    let name = "throwline-prod-relay-b.example.com-8443";
    assert_eq!(written.contexts, [name]);
    assert_eq!(
        written.changes[0],
        Change::Renamed {
            usual: "throwline-prod".to_owned(),
            context: name.to_owned()
        }
    );
    let text = read(&path);
    keeps_lines(&first, &text);
    has(&text, name, "prod");
    // Another user of the first relay.
    let eve = Owner {
        user: "eve".to_owned(),
        ..owner()
    };
    let written = write(&files, &eve, &[entry("prod")], false, &GO_ON).unwrap();
    assert_eq!(written.contexts, ["throwline-prod-relay.example.com"]);
    // Each keeps its own, also when the usual name becomes free.
    for (owner, name) in [(owner(), "throwline-prod"), (other.clone(), name)] {
        let written = write(&files, &owner, &[entry("prod")], false, &GO_ON).unwrap();
        assert_eq!(
            (written.contexts, written.changes),
            (vec![name.to_owned()], vec![])
        );
    }
    fs::write(
        &path,
        read(&path).replace("name: throwline-prod\n", "name: gone\n"),
    )
    .unwrap();
    let written = write(&files, &other, &[entry("prod")], false, &GO_ON).unwrap();
    assert_eq!(written.contexts, [name]);
}

#[test]
fn a_name_that_a_person_uses_is_left_to_them() {
    let theirs = "users:\n- name: throwline-prod\n  user: {token: abc}\n";
    let (_dir, path) = with(theirs);
    let written = put(&path, &[entry("prod")], false).unwrap();
    assert_eq!(written.contexts, ["throwline-prod-relay.example.com"]);
    keeps_lines(theirs, &read(&path));
    // An entry that has lost its mark is known by what only this state directory has.
    let unmarked = "clusters:\n- name: throwline-prod\n  cluster:\n    certificate-authority: /state/loopback-ca.pem\n    server: https://127.0.0.1:9\n";
    let (_dir, path) = with(unmarked);
    let written = put(&path, &[entry("prod")], false).unwrap();
    assert_eq!(written.contexts, ["throwline-prod"]);
    has(&read(&path), "throwline-prod", "prod");
}

#[test]
fn paths_and_names_that_yaml_reads_in_its_own_way_are_quoted() {
    for dir in [
        "/home/ann b",
        "/home/ä",
        "/a#b",
        "/a: b",
        "/x\u{85}y",
        "/\u{1f6a2}",
        "/a\"b\\c",
    ] {
        let (_dir, path) = with("");
        let mut odd = entry("no");
        odd.certificate_authority = format!("{dir}/ca.pem").into();
        let owner = Owner {
            relay: "https://r/".to_owned(),
            user: "yes".to_owned(),
        };
        write(&Files::one(&path), &owner, &[odd.clone()], false, &GO_ON).unwrap();
        let text = read(&path);
        let config = load(&text);
        let inner = &item(&config, "clusters", "throwline-no")["cluster"];
        assert_eq!(inner["certificate-authority"], *format!("{dir}/ca.pem"));
        assert!(
            text.contains("user: \"yes\"") && text.contains("cluster: \"no\""),
            "{text}"
        );
        let again = write(&Files::one(&path), &owner, &[odd], false, &GO_ON).unwrap();
        assert!(again.changes.is_empty(), "{again:?}");
    }
}

#[test]
fn ten_thousand_clusters_are_no_quadratic_work() {
    let entries: Vec<_> = (0..10_000)
        .map(|n| entry(&format!("cluster-{n}")))
        .collect();
    let (_dir, path) = with(THEIRS);
    let time = |entries: &[Entry]| {
        let began = std::time::Instant::now();
        let written = put(&path, entries, false).unwrap();
        assert_eq!(written.contexts.len(), entries.len());
        began.elapsed()
    };
    let small = time(&entries[..1_000]);
    let large = time(&entries);
    let again = time(&entries);
    println!("1,000: {small:?}; 10,000: {large:?}; nothing to change: {again:?}");
    // Quadratic work takes 100 times as long; a busy machine does not.
    assert!(large < small * 60, "{small:?} {large:?}");
    has(&read(&path), "throwline-cluster-9999", "cluster-9999");
}

mod properties {
    use proptest::prelude::*;

    use super::*;

    /// Scalars as people and programs write them, in block context.
    fn scalar() -> impl Strategy<Value = String> {
        prop_oneof![
            prop::sample::select(vec![
                "no",
                "\"no\"",
                "'on'",
                "~",
                "null",
                "017",
                "\"017\"",
                "1:30",
                "0x1f",
                "1e3",
                ".inf",
                "2001-01-01",
                "'~'",
                "\"\"",
                "y",
                "'y'",
                "true",
                "a b",
                "https://x:1/y",
                "\"\\u00e9\\n\"",
                "!!str 1",
                "'it''s'",
                "\"a\\\"b\"",
                "-1",
                "+1",
                "<<",
                "=",
                "|\n          text\n           more",
                ">-\n          folded\n          text",
                "[a, 'b', {c: \"no\"}]",
                "{a: no, 'b': \"on\"}",
                "",
            ])
            .prop_map(str::to_owned),
            "[a-z]{1,8}",
            "'[ -&(-~]{0,12}'",
        ]
    }

    fn item(list: usize, at: usize) -> impl Strategy<Value = String> {
        let (_, inner) = LISTS[list];
        let pairs = prop::collection::vec((scalar(), any::<bool>()), 0..4);
        (pairs, any::<bool>(), 0..4usize).prop_map(move |(pairs, first, comment)| {
            let mut body = String::new();
            for (key, (value, spaced)) in pairs.into_iter().enumerate() {
                let space = if spaced { "  " } else { " " };
                body += &format!("    k{key}:{space}{value}\n");
            }
            let inner = match body.is_empty() {
                true => format!("{inner}: {{}}\n"),
                false => format!("{inner}:\n{body}"),
            };
            let comment = ["", "  # inside\n", "# outside\n", "\n"][comment];
            match first {
                true => format!("- name: n{at}\n  {inner}{comment}"),
                false => format!("- {inner}  name: \"n{at}\"\n{comment}"),
            }
        })
    }

    fn list(list: usize) -> impl Strategy<Value = String> {
        let key = LISTS[list].0;
        prop_oneof![
            Just(String::new()),
            Just(format!("{key}: []\n")),
            Just(format!("{key}: null # none\n")),
            Just(format!("{key}:\n")),
            prop::collection::vec(any::<()>(), 1..4).prop_flat_map(move |items| {
                let items: Vec<_> = (0..items.len()).map(|at| item(list, at)).collect();
                items.prop_map(move |items| format!("{key}:\n{}", items.concat()))
            }),
        ]
    }

    fn config() -> impl Strategy<Value = String> {
        let other = scalar().prop_map(|value| format!("other: {value}\n"));
        let current =
            prop::sample::select(vec!["", "current-context: \"\"\n", "current-context: n0\n"]);
        let parts = (list(0), list(1), list(2), other, current);
        let style = (any::<bool>(), any::<bool>(), any::<bool>());
        (parts, style, 0..24usize).prop_map(|((a, b, c, d, e), (crlf, bom, end), order)| {
            let mut parts = [a, b, c, d, e.to_owned()];
            parts.rotate_left(order % 5);
            parts.swap(order % 4, 4);
            let mut text = parts.concat();
            if !end && text.ends_with('\n') {
                text.pop();
            }
            if crlf {
                text = text.replace('\n', "\r\n");
            }
            if bom {
                text.insert(0, '\u{feff}');
            }
            text
        })
    }

    /// Each item's bytes, from its dash to the next line that is not a part of it.
    fn chunks(text: &str) -> Vec<&str> {
        text.split("\n- ")
            .skip(1)
            .map(|chunk| {
                let end = chunk
                    .match_indices('\n')
                    .find(|(at, _)| !chunk[at + 1..].starts_with([' ', '\r', '\n']))
                    .map_or(chunk.len(), |(at, _)| at);
                chunk[..end].trim_end()
            })
            .collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

        #[test]
        fn foreign_entries_are_unchanged(text in config(), current in any::<bool>()) {
            // Not all that is drawn is YAML.
            let body = without_mark(&text);
            prop_assume!(edit::load(body).is_ok() && Node::parse(body).is_ok());
            let (_dir, path) = with(&text);
            let written = put(&path, &[entry("a"), entry("b")], current);
            let after = read(&path);
            if written.is_err() {
                prop_assert_eq!(&after, &text);
            } else {
                has(&after, "throwline-a", "a");
                has(&after, "throwline-b", "b");
                for chunk in chunks(&text) {
                    prop_assert!(after.contains(chunk), "{chunk:?} of\n{text}\nin\n{after}");
                }
                let mut rest = after.bytes();
                let kept = text.replace("[]", "").replace("null #", "#");
                let kept = if current { kept.replace("current-context: \"\"", "").replace("current-context: n0", "") } else { kept };
                prop_assert!(kept.bytes().all(|byte| rest.any(|found| found == byte)), "{text}\n{after}");
                // And again: nothing.
                prop_assert_eq!(put(&path, &[entry("a"), entry("b")], current).unwrap().changes, vec![]);
            }
        }

        #[test]
        fn any_text_is_refused_or_kept(text in "[ -~\n\t:\\[\\]{},&*!|>'\"%@`#-]{0,200}") {
            let (_dir, path) = with(&text);
            if put(&path, &[entry("a")], true).is_err() {
                prop_assert_eq!(read(&path), text);
            } else {
                has(&read(&path), "throwline-a", "a");
            }
        }
    }
}

//! Any file where kubeconfig should be: it is refused and left as it is, or keeps all its entries.
#![no_main]

// As files of the crate that they are part of, with its paths.
#[allow(dead_code, reason = "the crate uses more of it than this target")]
#[path = "../../../local-proxy/src"]
mod local_proxy {
    pub mod cluster_name;
    pub mod instance_lock;
    pub mod kubeconfig;
}
use local_proxy::{cluster_name, instance_lock, kubeconfig};

use std::sync::{LazyLock, atomic::AtomicBool};

use libfuzzer_sys::fuzz_target;
use serde_norway::Value;

static DIR: LazyLock<tempfile::TempDir> =
    LazyLock::new(|| tempfile::tempdir().expect("a directory"));

fuzz_target!(|data: &[u8]| {
    let file = DIR.path().join("config");
    std::fs::write(&file, data).expect("written");
    let entry = kubeconfig::Entry {
        name: "alpha".to_owned(),
        server: "https://127.0.0.1:1/clusters/alpha".to_owned(),
        certificate_authority: DIR.path().join("ca.pem"),
        client_certificate: DIR.path().join("cert.pem"),
        client_key: DIR.path().join("key.pem"),
    };
    let owner = kubeconfig::Owner {
        relay: "https://relay.example/".to_owned(),
        user: "ann".to_owned(),
    };
    let files = kubeconfig::Files::one(&file);
    let written = kubeconfig::write(&files, &owner, &[entry], false, &AtomicBool::new(false));
    let after = std::fs::read(&file).expect("still there");
    if written.is_err() {
        assert_eq!(after, data, "refused, and yet changed");
        return;
    }
    let after = first(&after).expect("what we wrote is YAML");
    let name = &written.expect("checked above").contexts[0];
    assert!(
        after["contexts"]
            .as_sequence()
            .is_some_and(|all| { all.iter().any(|context| context["name"] == **name) })
    );
    let Some(Value::Mapping(before)) = first(data) else {
        return;
    };
    for (key, value) in &before {
        let ours = [
            "clusters",
            "contexts",
            "users",
            "current-context",
            "apiVersion",
            "kind",
        ];
        if !key.as_str().is_some_and(|key| ours.contains(&key)) {
            assert_eq!(after.get(key), Some(value), "{key:?} was changed");
        }
    }
});

/// The first document, as kubectl reads it.
fn first(data: &[u8]) -> Option<Value> {
    let data = data.strip_prefix("\u{feff}".as_bytes()).unwrap_or(data);
    let document = serde_norway::Deserializer::from_slice(data).next()?;
    serde::Deserialize::deserialize(document).ok()
}

//! Any file where kubeconfig should be: it is refused and left as it is, or keeps all it said.
#![no_main]

#[allow(dead_code, reason = "route's own helper")]
#[path = "../../local-proxy/src/headers.rs"]
mod headers;
#[allow(dead_code, reason = "the crate uses more of it than this target")]
#[path = "../../local-proxy/src/kubeconfig/mod.rs"]
mod kubeconfig;
#[allow(dead_code, reason = "kubeconfig takes one constant from it")]
#[path = "../../local-proxy/src/route.rs"]
mod route;

use std::sync::LazyLock;

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
    let written = kubeconfig::write(&file, &[entry], false);
    let after = std::fs::read(&file).expect("still there");
    if written.is_err() {
        assert_eq!(after, data, "refused, and yet changed");
        return;
    }
    let after: Value = serde_norway::from_slice(&after).expect("what we wrote is YAML");
    assert!(after["contexts"].as_sequence().is_some_and(|all| {
        all.iter()
            .any(|context| context["name"] == "throwline-alpha")
    }));
    let Ok(Value::Mapping(before)) = serde_norway::from_slice::<Value>(data) else {
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

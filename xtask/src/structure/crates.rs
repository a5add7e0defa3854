//! Which crate of the workspace may depend on which, by `cargo metadata`.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::run;

/// A crate and those of ours that it may depend on. A crate that is not here may have none.
///
/// `?` after a name: as an optional dependency only.
const ALLOWED: [(&str, &[&str]); 9] = [
    ("throwline-policy", &["throwline-kube-wire"]),
    (
        "throwline-uplink",
        &["throwline-certs", "throwline-ops", "throwline-tunnel"],
    ),
    (
        "throwline-authority",
        &[
            "throwline-certs",
            "throwline-database",
            "throwline-kube-wire",
            "throwline-ops",
            "throwline-policy",
            "throwline-tunnel",
            "throwline-uplink",
        ],
    ),
    // Not kube-wire: a relay reads no request.
    (
        "throwline-relay",
        &[
            "throwline-certs",
            "throwline-database",
            "throwline-ops",
            "throwline-policy",
            "throwline-tunnel",
            "throwline-uplink",
        ],
    ),
    (
        "throwline-agent",
        &[
            "throwline-certs",
            "throwline-kube-wire",
            "throwline-ops",
            "throwline-policy",
            "throwline-tunnel",
            "throwline-uplink",
        ],
    ),
    (
        "throwline-local-proxy",
        &[
            "throwline-certs",
            "throwline-kube-wire",
            "throwline-ops",
            "throwline-policy",
            "throwline-tunnel",
            "throwline-uplink",
        ],
    ),
    (
        "throwline",
        &[
            "throwline-agent",
            "throwline-authority",
            "throwline-certs",
            "throwline-database",
            "throwline-demo-cluster?",
            "throwline-kube-wire",
            "throwline-local-proxy",
            "throwline-ops",
            "throwline-policy",
            "throwline-relay",
            "throwline-tunnel",
            "throwline-uplink",
        ],
    ),
    ("throwline-demo-cluster", &["throwline-kube-wire"]),
    // Nothing in the product depends on these, so they may use all of it.
    ("throwline-e2e", &["*"]),
];

/// Measures by the harness, and is the only crate that does.
const BENCHES: &str = "throwline-benches";
const HARNESS: &str = "throwline-e2e";

/// A dependency on another crate of the workspace.
#[derive(Debug, PartialEq, Eq)]
struct Dependency {
    from: String,
    on: String,
    is_dev: bool,
    is_optional: bool,
}

/// The violations, a line each.
pub(super) fn check(root: &Path) -> Result<Vec<String>> {
    let text = run::quiet(run::cargo(root).args([
        "metadata",
        "--no-deps",
        "--locked",
        "--format-version",
        "1",
    ]))?;
    let dependencies = read(&text)?;
    Ok(dependencies.iter().filter_map(violation).collect())
}

/// Reads the answer of `cargo metadata`.
fn read(text: &str) -> Result<Vec<Dependency>> {
    let metadata: Value = serde_json::from_str(text).context("cargo metadata is not JSON")?;
    let packages = metadata["packages"].as_array();
    let packages = packages.context("cargo metadata has no packages")?;
    let mut dependencies = Vec::new();
    for package in packages {
        let from = package["name"].as_str().context("a package has no name")?;
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            // Those of the workspace have a path.
            if dependency["path"].is_string() {
                dependencies.push(Dependency {
                    from: from.to_owned(),
                    on: dependency["name"].as_str().unwrap_or_default().to_owned(),
                    is_dev: dependency["kind"] == "dev",
                    is_optional: dependency["optional"] == true,
                });
            }
        }
    }
    Ok(dependencies)
}

fn violation(dependency: &Dependency) -> Option<String> {
    let Dependency { from, on, .. } = dependency;
    if from == BENCHES {
        return None;
    }
    // Tests may use any crate but the harness, which runs the real binary of all of them.
    let is_allowed = match dependency.is_dev {
        true => on != HARNESS && on != BENCHES,
        false => is_allowed(dependency),
    };
    (!is_allowed).then(|| {
        let kind = match (dependency.is_dev, dependency.is_optional) {
            (true, _) => "a test of it",
            (_, true) => "an optional part of it",
            _ => "it",
        };
        format!("{from} must not depend on {on}, but {kind} does (ARCHITECTURE.md, Invariants)")
    })
}

fn is_allowed(dependency: &Dependency) -> bool {
    let mut rules = ALLOWED.iter();
    let Some((_, allowed)) = rules.find(|(name, _)| *name == dependency.from) else {
        return false;
    };
    allowed
        .iter()
        .any(|allowed| match allowed.strip_suffix('?') {
            Some(optional) => optional == dependency.on && dependency.is_optional,
            None => *allowed == dependency.on || (*allowed == "*" && dependency.on != BENCHES),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(from: &str, on: &str, kind: &str, optional: bool) -> Option<String> {
        let text = format!(
            r#"{{"packages": [{{"name": "{from}", "dependencies": [
                {{"name": "anyhow", "kind": null, "optional": false}},
                {{"name": "{on}", "kind": {kind}, "optional": {optional}, "path": "/x"}}
            ]}}]}}"#
        );
        let dependencies = read(&text).unwrap();
        assert_eq!(dependencies.len(), 1);
        violation(&dependencies[0])
    }

    #[test]
    fn leaves_import_no_crate_of_ours() {
        for leaf in ["certs", "database", "kube-wire", "ops", "tunnel"] {
            let leaf = format!("throwline-{leaf}");
            let text = found(&leaf, "throwline-policy", "null", false);
            assert!(text.unwrap().starts_with(&format!("{leaf} must not")));
        }
    }

    #[test]
    fn the_four_parts_import_one_another_in_tests_only() {
        let parts = ["agent", "authority", "local-proxy", "relay"];
        for from in parts {
            for on in parts.iter().filter(|on| **on != from) {
                let (from, on) = (format!("throwline-{from}"), format!("throwline-{on}"));
                assert!(found(&from, &on, "null", false).is_some());
                assert!(found(&from, &on, "\"build\"", false).is_some());
                assert_eq!(found(&from, &on, "\"dev\"", false), None);
            }
        }
    }

    #[test]
    fn only_benches_import_the_harness() {
        assert_eq!(found(BENCHES, HARNESS, "null", false), None);
        assert!(found("throwline", HARNESS, "\"dev\"", false).is_some());
        assert!(found(HARNESS, BENCHES, "null", false).is_some());
        assert_eq!(found(HARNESS, "throwline-relay", "null", false), None);
    }

    #[test]
    fn the_demo_cluster_is_optional() {
        assert_eq!(
            found("throwline", "throwline-demo-cluster", "null", true),
            None
        );
        assert!(found("throwline", "throwline-demo-cluster", "null", false).is_some());
        assert!(found("throwline-relay", "throwline-demo-cluster", "null", true).is_some());
    }

    #[test]
    fn a_new_crate_begins_without_dependencies() {
        assert!(found("throwline-new", "throwline-ops", "null", false).is_some());
    }
}

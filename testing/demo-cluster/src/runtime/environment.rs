//! What a process gets to see: its environment, its command, its directory.

use std::{collections::BTreeMap, path::Path};

use base64::Engine as _;
use serde_json::Value;

use super::{Container, Pod, process::Spec};
use crate::{
    Cluster,
    json::{flag, items, members, strings, text},
    kinds::Kind,
};

/// What a container without a command runs: images are ignored, and a sleep is what most
/// of them amount to. It ends at once when asked.
const DEFAULT: &str = "trap 'exit 0' TERM INT; while :; do sleep 3600 & wait $!; done";

/// The process of a container, or why it cannot be made.
pub(super) fn spec_of(
    cluster: &Cluster,
    pod: &Pod,
    container: &Container,
    object: &Value,
) -> Result<Spec, String> {
    let spec = &container.spec;
    let env = environment(cluster, pod, container, object)?;
    let mut argv: Vec<String> = strings(spec, "/command")
        .into_iter()
        .chain(strings(spec, "/args"))
        .map(|word| expand(word, &env))
        .collect();
    let (stdin, tty) = (flag(spec, "/stdin"), flag(spec, "/tty"));
    if argv.is_empty() {
        argv = if stdin && tty {
            vec!["sh".to_owned()]
        } else {
            vec!["sh".to_owned(), "-c".to_owned(), DEFAULT.to_owned()]
        };
    }
    Ok(Spec {
        argv,
        env,
        directory: container.directory.join("root"),
        stdin,
        tty,
    })
}

pub(super) fn environment(
    cluster: &Cluster,
    pod: &Pod,
    container: &Container,
    object: &Value,
) -> Result<BTreeMap<String, String>, String> {
    let spec = &container.spec;
    let root = container.directory.join("root");
    let mut env = BTreeMap::new();
    let mut put = |key: &str, value: String| env.insert(key.to_owned(), value);
    put(
        "PATH",
        std::env::var("PATH").unwrap_or_else(|_| "/usr/local/bin:/usr/bin:/bin".to_owned()),
    );
    put("HOME", path(&root));
    put("HOSTNAME", pod.name.clone());
    put("POD_NAME", pod.name.clone());
    put("POD_NAMESPACE", pod.namespace.clone());
    put("POD_IP", "127.0.0.1".to_owned());
    put("NODE_NAME", crate::seed::NODE.to_owned());
    put("KUBERNETES_SERVICE_HOST", "10.96.0.1".to_owned());
    put("KUBERNETES_SERVICE_PORT", "443".to_owned());
    if flag(spec, "/tty") {
        put("TERM", "xterm".to_owned());
    }
    for from in items(spec, "/envFrom") {
        let prefix = text(from, "/prefix");
        for (plural, field) in [("configmaps", "configMapRef"), ("secrets", "secretRef")] {
            let name = text(from, &format!("/{field}/name"));
            if name.is_empty() {
                continue;
            }
            match cluster.store.get(Kind::named(plural), &pod.namespace, name) {
                Some(source) => {
                    for key in members(&source, "/data")
                        .into_iter()
                        .flatten()
                        .map(|(key, _)| key)
                    {
                        if let Some(value) = value_of(&source, key) {
                            env.insert(format!("{prefix}{key}"), value);
                        }
                    }
                }
                None if flag(from, &format!("/{field}/optional")) => {}
                None => {
                    return Err(format!(
                        "{} {name:?} not found",
                        Kind::named(plural).singular
                    ));
                }
            }
        }
    }
    for one in items(spec, "/env") {
        let name = text(one, "/name").to_owned();
        if name.is_empty() || name.contains(['=', '\0']) {
            return Err(format!("{name:?} is not a name of an environment variable"));
        }
        if let Some(value) = one.get("value").and_then(Value::as_str) {
            let value = expand(value, &env);
            env.insert(name, value);
            continue;
        }
        let field = text(one, "/valueFrom/fieldRef/fieldPath");
        if !field.is_empty() {
            let value = match field {
                "status.podIP" | "status.hostIP" => "127.0.0.1".to_owned(),
                "spec.nodeName" => crate::seed::NODE.to_owned(),
                _ => text(object, &format!("/{}", field.replace('.', "/"))).to_owned(),
            };
            env.insert(name, value);
            continue;
        }
        for (plural, source) in [
            ("configmaps", "configMapKeyRef"),
            ("secrets", "secretKeyRef"),
        ] {
            let Some(from) = one.pointer(&format!("/valueFrom/{source}")) else {
                continue;
            };
            let (of, key) = (text(from, "/name"), text(from, "/key"));
            let kind = Kind::named(plural);
            let found = cluster.store.get(kind, &pod.namespace, of);
            match found.as_ref().and_then(|source| value_of(source, key)) {
                Some(value) => {
                    env.insert(name.clone(), value);
                }
                None if flag(from, "/optional") => {}
                None if found.is_none() => {
                    return Err(format!("{} {of:?} not found", kind.singular));
                }
                None => {
                    return Err(format!(
                        "couldn't find key {key} in {} {}/{of}",
                        kind.kind, pod.namespace
                    ));
                }
            }
        }
    }
    env.retain(|_, value| !value.contains('\0'));
    Ok(env)
}

fn value_of(source: &Value, key: &str) -> Option<String> {
    let value = source.get("data")?.get(key)?.as_str()?;
    if text(source, "/kind") != "Secret" {
        return Some(value.to_owned());
    }
    let bytes = base64::engine::general_purpose::STANDARD
        .decode(value)
        .ok()?;
    String::from_utf8(bytes).ok()
}

/// `$(NAME)` becomes the variable, `$$(NAME)` stays `$(NAME)`, unknown ones stay as they are.
fn expand(text: &str, env: &BTreeMap<String, String>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        if let Some(after) = rest.strip_prefix("$$") {
            out.push('$');
            rest = after;
            continue;
        }
        let name = rest
            .strip_prefix("$(")
            .and_then(|inner| inner.split_once(')'));
        match name.and_then(|(name, after)| Some((env.get(name)?, after))) {
            Some((value, after)) => {
                out.push_str(value);
                rest = after;
            }
            None => {
                out.push('$');
                rest = &rest[1..];
            }
        }
    }
    out.push_str(rest);
    out
}

fn path(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_expand_as_kubernetes_does_it() {
        let env = BTreeMap::from([("A".to_owned(), "1".to_owned())]);
        for (text, said) in [
            ("x$(A)y", "x1y"),
            ("$$(A)", "$(A)"),
            ("$(B) $A $(", "$(B) $A $("),
            ("$", "$"),
        ] {
            assert_eq!(expand(text, &env), said);
        }
    }
}

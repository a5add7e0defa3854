//! Discovery, one document a group version (legacy) or all in one (aggregated).

use http::Response;
use serde_json::{Value, json};

use super::negotiate::Accept;
use crate::{
    kinds::{self, Kind, group_version, groups, in_group},
    status::{Body, Failure, answer, bytes_response},
};

pub(super) fn serve(path: &str, accept: &Accept) -> Result<Response<Body>, Failure> {
    let parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
    match parts.as_slice() {
        [""] => {
            let mut paths = vec!["/api".to_owned(), "/api/v1".to_owned(), "/apis".to_owned()];
            for group in groups() {
                paths.push(format!("/apis/{group}"));
                paths.push(format!("/apis/{group}/v1"));
            }
            paths.extend(
                [
                    "/healthz",
                    "/livez",
                    "/openapi/v2",
                    "/openapi/v3",
                    "/readyz",
                    "/version",
                ]
                .map(str::to_owned),
            );
            Ok(answer(200, &json!({"paths": paths})))
        }
        ["api" | "apis"] if accept.aggregated().is_some() => {
            let version = accept.aggregated().unwrap_or("v2");
            let groups = if parts == ["api"] { vec![""] } else { groups() };
            let items: Vec<Value> = groups.into_iter().map(aggregated_group).collect();
            let document = json!({
                "kind": "APIGroupDiscoveryList", "apiVersion": format!("apidiscovery.k8s.io/{version}"),
                "metadata": {}, "items": items,
            });
            let media = format!(
                "application/json;g=apidiscovery.k8s.io;v={version};as=APIGroupDiscoveryList"
            );
            let mut response = bytes_response(200, &media, document.to_string().into());
            response
                .headers_mut()
                .insert(http::header::VARY, http::HeaderValue::from_static("Accept"));
            Ok(response)
        }
        ["api"] => Ok(answer(
            200,
            &json!({"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}),
        )),
        ["apis"] => {
            let groups: Vec<Value> = groups().into_iter().map(group).collect();
            Ok(answer(
                200,
                &json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}),
            ))
        }
        ["api", "v1"] => Ok(answer(200, &resources(""))),
        ["apis", name] if groups().contains(name) => {
            let mut document = group(name);
            document["kind"] = json!("APIGroup");
            document["apiVersion"] = json!("v1");
            Ok(answer(200, &document))
        }
        ["apis", name, "v1"] if groups().contains(name) => Ok(answer(200, &resources(name))),
        _ => Err(Failure::no_such_path()),
    }
}

fn group(name: &str) -> Value {
    let version = json!({"groupVersion": format!("{name}/v1"), "version": "v1"});
    json!({"name": name, "versions": [version], "preferredVersion": version})
}

fn resources(group: &str) -> Value {
    let mut list = Vec::new();
    for kind in in_group(group) {
        let mut entry = json!({
            "name": kind.plural, "singularName": kind.singular, "namespaced": kind.namespaced, "kind": kind.kind,
            "verbs": kind.verbs(),
        });
        if !kind.short.is_empty() {
            entry["shortNames"] = json!(kind.short);
        }
        if !kind.categories.is_empty() {
            entry["categories"] = json!(kind.categories);
        }
        list.push(entry);
        for sub in kind.subresources {
            let mut entry = json!({
                "name": format!("{}/{}", kind.plural, sub.name), "singularName": "", "namespaced": kind.namespaced,
                "kind": sub.kind, "verbs": sub.verbs,
            });
            if !sub.version.is_empty() {
                entry["group"] = json!(sub.group);
                entry["version"] = json!(sub.version);
            }
            list.push(entry);
        }
    }
    json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version(group, "v1"), "resources": list})
}

fn aggregated_group(name: &str) -> Value {
    let resources: Vec<Value> = in_group(name).map(aggregated_resource).collect();
    json!({
        "metadata": {"name": name, "creationTimestamp": null},
        "versions": [{"version": "v1", "freshness": "Current", "resources": resources}],
    })
}

fn aggregated_resource(kind: &'static kinds::Kind) -> Value {
    let mut entry = json!({
        "resource": kind.plural, "singularResource": kind.singular, "scope": scope(kind), "verbs": kind.verbs(),
        "responseKind": {"group": kind.group, "version": kind.version, "kind": kind.kind},
    });
    if !kind.short.is_empty() {
        entry["shortNames"] = json!(kind.short);
    }
    if !kind.categories.is_empty() {
        entry["categories"] = json!(kind.categories);
    }
    let subresources: Vec<Value> = kind
        .subresources
        .iter()
        .map(|sub| {
            let (group, version) = if sub.version.is_empty() {
                (kind.group, kind.version)
            } else {
                (sub.group, sub.version)
            };
            json!({
                "subresource": sub.name, "verbs": sub.verbs,
                "responseKind": {"group": group, "version": version, "kind": sub.kind},
            })
        })
        .collect();
    if !subresources.is_empty() {
        entry["subresources"] = json!(subresources);
    }
    entry
}

fn scope(kind: &Kind) -> &'static str {
    if kind.namespaced {
        "Namespaced"
    } else {
        "Cluster"
    }
}

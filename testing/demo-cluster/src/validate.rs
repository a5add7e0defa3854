//! Defaults, validation and immutable fields: those that people meet, in the API server's words.

use serde_json::{Value, json};

use crate::{
    json,
    json::{items, members, number, text},
    kinds::Kind,
    status::Failure,
};

type Causes = Vec<(String, &'static str, String)>;

/// Fills in what the API server would.
pub(crate) fn defaults(kind: &Kind, object: &mut Value) {
    match kind.plural {
        "namespaces" => {
            let name = text(object, "/metadata/name").to_owned();
            json::default(
                object,
                &["metadata", "labels", "kubernetes.io/metadata.name"],
                name,
            );
            json::default(object, &["spec", "finalizers"], json!(["kubernetes"]));
            json::default(object, &["status", "phase"], "Active");
        }
        "pods" => {
            if let Some(spec) = object.get_mut("spec") {
                pod_spec(spec);
            }
            json::default(object, &["spec", "nodeName"], crate::seed::NODE);
            json::default(object, &["spec", "serviceAccountName"], "default");
            json::default(object, &["spec", "enableServiceLinks"], true);
            json::default(object, &["status", "phase"], "Pending");
            json::default(object, &["status", "qosClass"], "BestEffort");
            json::default(object, &["metadata", "generation"], 1);
        }
        "secrets" => {
            json::default(object, &["type"], "Opaque");
            if let Some(Value::Object(plain)) = json::remove(object, &["stringData"]) {
                for (key, value) in plain {
                    let encoded = crate::pki::base64(value.as_str().unwrap_or_default().as_bytes());
                    json::set(object, &["data", &key], json!(encoded));
                }
            }
        }
        "services" => {
            json::default(object, &["spec", "type"], "ClusterIP");
            json::default(object, &["spec", "sessionAffinity"], "None");
            json::default(object, &["spec", "internalTrafficPolicy"], "Cluster");
            json::default(object, &["spec", "ipFamilies"], json!(["IPv4"]));
            json::default(object, &["spec", "ipFamilyPolicy"], "SingleStack");
            if text(object, "/spec/type") != "ExternalName" {
                let address: [u8; 2] = rand::random();
                json::default(
                    object,
                    &["spec", "clusterIP"],
                    format!("10.96.{}.{}", address[0], address[1].max(1)),
                );
                let ip = object["spec"]["clusterIP"].clone();
                json::default(object, &["spec", "clusterIPs"], json!([ip]));
            }
            json::default(object, &["status", "loadBalancer"], json!({}));
            if let Some(ports) = object
                .pointer_mut("/spec/ports")
                .and_then(Value::as_array_mut)
            {
                for port in ports {
                    json::default(port, &["protocol"], "TCP");
                    let target = port["port"].clone();
                    json::default(port, &["targetPort"], target);
                }
            }
        }
        "deployments" | "replicasets" => {
            json::default(object, &["spec", "replicas"], 1);
            json::default(object, &["metadata", "generation"], 1);
            if kind.plural == "deployments" {
                json::default(object, &["spec", "strategy", "type"], "RollingUpdate");
                if text(object, "/spec/strategy/type") == "RollingUpdate" {
                    json::default(
                        object,
                        &["spec", "strategy", "rollingUpdate", "maxSurge"],
                        "25%",
                    );
                    json::default(
                        object,
                        &["spec", "strategy", "rollingUpdate", "maxUnavailable"],
                        "25%",
                    );
                }
                json::default(object, &["spec", "revisionHistoryLimit"], 10);
                json::default(object, &["spec", "progressDeadlineSeconds"], 600);
            }
            if let Some(spec) = object.pointer_mut("/spec/template/spec") {
                pod_spec(spec);
            }
        }
        "clusterrolebindings" | "rolebindings" => {
            if let Some(subjects) = object.get_mut("subjects").and_then(Value::as_array_mut) {
                for subject in subjects {
                    if matches!(text(subject, "/kind"), "User" | "Group") {
                        json::default(subject, &["apiGroup"], "rbac.authorization.k8s.io");
                    }
                }
            }
            json::default(
                object,
                &["roleRef", "apiGroup"],
                "rbac.authorization.k8s.io",
            );
        }
        _ => {}
    }
}

fn pod_spec(spec: &mut Value) {
    json::default(spec, &["restartPolicy"], "Always");
    json::default(spec, &["dnsPolicy"], "ClusterFirst");
    json::default(spec, &["schedulerName"], "default-scheduler");
    json::default(spec, &["terminationGracePeriodSeconds"], 30);
    json::default(spec, &["securityContext"], json!({}));
    if let Some(containers) = spec.get_mut("containers").and_then(Value::as_array_mut) {
        for container in containers
            .iter_mut()
            .filter(|container| container.is_object())
        {
            let image = text(container, "/image");
            let latest = image
                .rsplit('/')
                .next()
                .is_none_or(|last| !last.contains(':') || last.ends_with(":latest"));
            json::default(
                container,
                &["imagePullPolicy"],
                if latest { "Always" } else { "IfNotPresent" },
            );
            json::default(
                container,
                &["terminationMessagePath"],
                "/dev/termination-log",
            );
            json::default(container, &["terminationMessagePolicy"], "File");
            json::default(container, &["resources"], json!({}));
            for quantities in ["limits", "requests"] {
                let values = container
                    .pointer_mut(&format!("/resources/{quantities}"))
                    .and_then(Value::as_object_mut);
                for (_, value) in values
                    .into_iter()
                    .flatten()
                    .filter(|(_, value)| value.is_number())
                {
                    *value = json!(value.to_string());
                }
            }
            if let Some(ports) = container.get_mut("ports").and_then(Value::as_array_mut) {
                for port in ports {
                    json::default(port, &["protocol"], "TCP");
                }
            }
        }
    }
}

/// Checks a new object, or an update against what it was.
pub(crate) fn check(kind: &Kind, object: &Value, old: Option<&Value>) -> Result<(), Failure> {
    let mut causes = Causes::new();
    let name = text(object, "/metadata/name");
    if name.is_empty() {
        required(
            &mut causes,
            "metadata.name",
            "name or generateName is required",
        );
    } else if !name_fits(kind, name) {
        invalid(
            &mut causes,
            "metadata.name",
            name,
            "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start \
             and end with an alphanumeric character (e.g. 'example.com', regex used for validation is \
             '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')",
        );
    }
    for field in ["labels", "annotations"] {
        for (key, value) in members(object, &format!("/metadata/{field}"))
            .into_iter()
            .flatten()
        {
            if !value.is_string() {
                return Err(Failure::bad_request(format!(
                    "{} in version {:?} cannot be handled as a {}: metadata.{field}.{key}: expected a string",
                    kind.kind, kind.version, kind.kind
                )));
            }
            let label = value.as_str().unwrap_or_default();
            let letters = label
                .chars()
                .all(|one| one.is_ascii_alphanumeric() || "-_.".contains(one));
            if field == "labels" && (label.len() > 63 || !letters) {
                invalid(
                    &mut causes,
                    "metadata.labels",
                    label,
                    "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.'",
                );
            }
        }
    }
    match kind.plural {
        "pods" => check_pod_spec(&mut causes, object, "spec"),
        "deployments" | "replicasets" => check_workload(&mut causes, object),
        "services" => {
            let headless = matches!(text(object, "/spec/type"), "ExternalName")
                || text(object, "/spec/clusterIP") == "None";
            if items(object, "/spec/ports").is_empty() && !headless {
                required(&mut causes, "spec.ports", "");
            }
            for (index, port) in items(object, "/spec/ports").iter().enumerate() {
                if number(port, "/port").is_none_or(|port| !(1..=65535).contains(&port)) {
                    let value = port["port"].to_string();
                    causes.push((
                        format!("spec.ports[{index}].port"),
                        "FieldValueInvalid",
                        format!("Invalid value: {value}: must be between 1 and 65535, inclusive"),
                    ));
                }
            }
        }
        "clusterrolebindings" | "rolebindings" if text(object, "/roleRef/name").is_empty() => {
            required(&mut causes, "roleRef.name", "");
        }
        "configmaps" | "secrets" => {
            for (key, value) in members(object, "/data").into_iter().flatten() {
                if !value.is_string() {
                    return Err(Failure::bad_request(format!(
                        "{} in version \"v1\" cannot be handled as a {}: json: cannot unmarshal data.{key} into Go struct field of type string",
                        kind.kind, kind.kind
                    )));
                }
            }
        }
        _ => {}
    }
    if let Some(old) = old {
        immutable(kind, &mut causes, old, object);
    }
    if causes.is_empty() {
        Ok(())
    } else {
        Err(Failure::invalid(kind, name, &causes))
    }
}

fn check_workload(causes: &mut Causes, object: &Value) {
    if let Some(replicas) = number(object, "/spec/replicas")
        && replicas < 0
    {
        invalid(
            causes,
            "spec.replicas",
            &replicas.to_string(),
            "must be greater than or equal to 0",
        );
    }
    let selector = members(object, "/spec/selector/matchLabels");
    if selector.is_none_or(serde_json::Map::is_empty)
        && items(object, "/spec/selector/matchExpressions").is_empty()
    {
        required(causes, "spec.selector", "");
    }
    let labels = object.pointer("/spec/template/metadata/labels");
    let fits = selector
        .into_iter()
        .flatten()
        .all(|(key, value)| labels.and_then(|labels| labels.get(key)) == Some(value));
    if !fits {
        let said = labels.map(Value::to_string).unwrap_or_default();
        causes.push((
            "spec.template.metadata.labels".to_owned(),
            "FieldValueInvalid",
            format!("Invalid value: {said}: `selector` does not match template `labels`"),
        ));
    }
    if let Some(template) = object.pointer("/spec/template") {
        check_pod_spec(causes, template, "spec.template.spec");
    } else {
        required(causes, "spec.template", "");
    }
}

fn check_pod_spec(causes: &mut Causes, pod: &Value, path: &str) {
    let containers = items(pod, "/spec/containers");
    if containers.is_empty() {
        required(causes, &format!("{path}.containers"), "");
    }
    let mut names = Vec::new();
    for (index, container) in containers.iter().enumerate() {
        let at = format!("{path}.containers[{index}]");
        let name = text(container, "/name");
        if name.is_empty() {
            required(causes, &format!("{at}.name"), "");
        } else if names.contains(&name) {
            causes.push((
                format!("{at}.name"),
                "FieldValueDuplicate",
                format!("Duplicate value: {name:?}"),
            ));
        }
        names.push(name);
        if text(container, "/image").is_empty() {
            required(causes, &format!("{at}.image"), "");
        }
    }
    let policy = text(pod, "/spec/restartPolicy");
    if !matches!(policy, "" | "Always" | "OnFailure" | "Never") {
        causes.push((
            format!("{path}.restartPolicy"),
            "FieldValueNotSupported",
            format!("Unsupported value: {policy:?}: supported values: \"Always\", \"OnFailure\", \"Never\""),
        ));
    }
}

fn immutable(kind: &Kind, causes: &mut Causes, old: &Value, new: &Value) {
    let mut fixed = |pointer: &str, field: &str| {
        if old.pointer(pointer) != new.pointer(pointer) {
            let value = new
                .pointer(pointer)
                .map(Value::to_string)
                .unwrap_or_default();
            causes.push((
                field.to_owned(),
                "FieldValueInvalid",
                format!("Invalid value: {value}: field is immutable"),
            ));
        }
    };
    match kind.plural {
        "deployments" | "replicasets" => fixed("/spec/selector", "spec.selector"),
        "services" if text(new, "/spec/type") != "ExternalName" => {
            fixed("/spec/clusterIP", "spec.clusterIP")
        }
        "clusterrolebindings" | "rolebindings" => fixed("/roleRef", "roleRef"),
        "secrets" => fixed("/type", "type"),
        "pods" => {
            // Only the images and little else of a pod's spec may change.
            let frozen = |pod: &Value| {
                let mut spec = pod["spec"].clone();
                for field in [
                    "activeDeadlineSeconds",
                    "tolerations",
                    "terminationGracePeriodSeconds",
                ] {
                    json::remove(&mut spec, &[field]);
                }
                for container in spec
                    .get_mut("containers")
                    .and_then(Value::as_array_mut)
                    .into_iter()
                    .flatten()
                {
                    json::remove(container, &["image"]);
                }
                spec
            };
            if frozen(old) != frozen(new) {
                causes.push((
                    "spec".to_owned(),
                    "FieldValueForbidden",
                    "Forbidden: pod updates may not change fields other than `spec.containers[*].image`,\
                     `spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to \
                     existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)"
                        .to_owned(),
                ));
            }
        }
        _ => {}
    }
    if matches!(kind.plural, "configmaps" | "secrets") && json::flag(old, "/immutable") {
        for field in ["data", "binaryData", "immutable"] {
            if old.get(field) != new.get(field) {
                causes.push((
                    field.to_owned(),
                    "FieldValueForbidden",
                    "Forbidden: field is immutable when `immutable` is set".to_owned(),
                ));
            }
        }
    }
}

fn name_fits(kind: &Kind, name: &str) -> bool {
    if name.len() > 253 || matches!(name, "." | "..") {
        return false;
    }
    if kind.group == "rbac.authorization.k8s.io" {
        return !name.contains(['/', '%']);
    }
    let label = |label: &str| {
        !label.is_empty()
            && label
                .bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let dots = !matches!(kind.plural, "namespaces" | "services");
    name.split('.').all(label) && (dots || (!name.contains('.') && name.len() <= 63))
}

fn required(causes: &mut Causes, field: &str, why: &str) {
    let message = if why.is_empty() {
        "Required value".to_owned()
    } else {
        format!("Required value: {why}")
    };
    causes.push((field.to_owned(), "FieldValueRequired", message));
}

fn invalid(causes: &mut Causes, field: &str, value: &str, why: &str) {
    causes.push((
        field.to_owned(),
        "FieldValueInvalid",
        format!("Invalid value: {value:?}: {why}"),
    ));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_without_containers_is_refused_by_field() {
        let pod =
            json!({"metadata": {"name": "Bad_Name"}, "spec": {"containers": [{"name": "a"}]}});
        let said = check(Kind::named("pods"), &pod, None)
            .unwrap_err()
            .to_json();
        assert_eq!(said["code"], 422);
        let fields: Vec<&str> = items(&said, "/details/causes")
            .iter()
            .map(|cause| text(cause, "/field"))
            .collect();
        assert_eq!(fields, ["metadata.name", "spec.containers[0].image"]);
    }

    #[test]
    fn secrets_take_plain_strings() {
        let mut secret = json!({"stringData": {"a": "b"}});
        defaults(Kind::named("secrets"), &mut secret);
        assert_eq!(secret, json!({"type": "Opaque", "data": {"a": "Yg=="}}));
    }
}

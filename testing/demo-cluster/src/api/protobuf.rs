//! Request bodies in Kubernetes' protobuf form, which kubectl from 1.32 on sends for what it makes
//! itself (`create`, `auth`). Answers are always JSON, which the same requests accept.
//!
//! Only what those commands say is known here; anything more is refused rather than dropped.

use std::{collections::HashMap, sync::LazyLock};

use serde_json::{Map, Value, json};

use crate::{json, status::Failure};

const MAGIC: &[u8] = b"k8s\0";

/// Field numbers are those of Kubernetes' `generated.proto`. A `*` repeats, a `!` keeps zero
/// (a pointer in Go), `inline` merges into the parent, `skip` is written by servers only.
const MESSAGES: &str = "
ObjectMeta: 1 name string, 2 generateName string, 3 namespace string, 4 selfLink skip, 5 uid string, 6 resourceVersion string,
  7 generation skip, 8 creationTimestamp skip, 11 labels map, 12 annotations map, 14* finalizers string
Namespace: 1 metadata ObjectMeta, 2 spec NamespaceSpec, 3 status skip
NamespaceSpec: 1* finalizers string
ConfigMap: 1 metadata ObjectMeta, 2 data map, 3 binaryData bytesmap, 4 immutable bool
Secret: 1 metadata ObjectMeta, 2 data bytesmap, 3 type string, 4 stringData map, 5 immutable bool
ServiceAccount: 1 metadata ObjectMeta, 4 automountServiceAccountToken bool!
Service: 1 metadata ObjectMeta, 2 spec ServiceSpec, 3 status skip
ServiceSpec: 1* ports ServicePort, 2 selector map, 3 clusterIP string, 4 type string, 7 sessionAffinity string, 10 externalName string
ServicePort: 1 name string, 2 protocol string, 3 port int, 4 targetPort IntOrString, 5 nodePort int, 6 appProtocol string
Pod: 1 metadata ObjectMeta, 2 spec PodSpec, 3 status skip
PodSpec: 2* containers Container, 3 restartPolicy string, 4 terminationGracePeriodSeconds int!, 6 dnsPolicy string, 7 nodeSelector map,
  8 serviceAccountName string, 9 serviceAccount string, 10 nodeName string, 14 securityContext skip, 19 schedulerName string
Container: 1 name string, 2 image string, 3* command string, 4* args string, 5 workingDir string, 6* ports ContainerPort, 7* env EnvVar,
  8 resources ResourceRequirements, 13 terminationMessagePath string, 14 imagePullPolicy string, 16 stdin bool, 17 stdinOnce bool,
  18 tty bool, 19* envFrom EnvFromSource, 20 terminationMessagePolicy string
ContainerPort: 1 name string, 2 hostPort int, 3 containerPort int, 4 protocol string, 5 hostIP string
EnvVar: 1 name string, 2 value string
EnvFromSource: 1 prefix string, 2 configMapRef Ref, 3 secretRef Ref
Ref: 1 localObjectReference inline, 2 optional bool
ResourceRequirements: 1 limits quantitymap, 2 requests quantitymap
PodTemplateSpec: 1 metadata ObjectMeta, 2 spec PodSpec
LabelSelector: 1 matchLabels map
Deployment: 1 metadata ObjectMeta, 2 spec DeploymentSpec, 3 status skip
DeploymentSpec: 1 replicas int!, 2 selector LabelSelector, 3 template PodTemplateSpec, 4 strategy DeploymentStrategy, 5 minReadySeconds int,
  6 revisionHistoryLimit int!, 7 paused bool, 9 progressDeadlineSeconds int!
DeploymentStrategy: 1 type string, 2 rollingUpdate RollingUpdateDeployment
RollingUpdateDeployment: 1 maxUnavailable IntOrString, 2 maxSurge IntOrString
Role: 1 metadata ObjectMeta, 2* rules PolicyRule
ClusterRole: 1 metadata ObjectMeta, 2* rules PolicyRule
PolicyRule: 1* verbs string, 2* apiGroups string, 3* resources string, 4* resourceNames string, 5* nonResourceURLs string
RoleBinding: 1 metadata ObjectMeta, 2* subjects Subject, 3 roleRef RoleRef
ClusterRoleBinding: 1 metadata ObjectMeta, 2* subjects Subject, 3 roleRef RoleRef
Subject: 1 kind string, 2 apiGroup string, 3 name string, 4 namespace string
RoleRef: 1 apiGroup string, 2 kind string, 3 name string
SelfSubjectReview: 1 metadata ObjectMeta, 2 status skip
TokenRequest: 1 metadata ObjectMeta, 2 spec TokenRequestSpec, 3 status skip
TokenRequestSpec: 1* audiences string, 4 expirationSeconds int!
SelfSubjectAccessReview: 1 metadata ObjectMeta, 2 spec SubjectAccessReviewSpec, 3 status skip
SubjectAccessReview: 1 metadata ObjectMeta, 2 spec SubjectAccessReviewSpec, 3 status skip
LocalSubjectAccessReview: 1 metadata ObjectMeta, 2 spec SubjectAccessReviewSpec, 3 status skip
SubjectAccessReviewSpec: 1 resourceAttributes ResourceAttributes, 2 nonResourceAttributes NonResourceAttributes, 3 user string,
  4* groups string, 6 uid string
ResourceAttributes: 1 namespace string, 2 verb string, 3 group string, 4 version string, 5 resource string, 6 subresource string, 7 name string
NonResourceAttributes: 1 path string, 2 verb string
SelfSubjectRulesReview: 1 metadata ObjectMeta, 2 spec SelfSubjectRulesReviewSpec, 3 status skip
SelfSubjectRulesReviewSpec: 1 namespace string
Eviction: 1 metadata ObjectMeta, 2 deleteOptions DeleteOptions
DeleteOptions: 1 gracePeriodSeconds int!, 2 preconditions Preconditions, 3 orphanDependents skip, 4 propagationPolicy string, 5* dryRun string
Preconditions: 1 uid string, 2 resourceVersion string
Unknown: 1 typeMeta TypeMeta, 2 raw raw, 3 contentEncoding string, 4 contentType string
TypeMeta: 1 apiVersion string, 2 kind string
";

struct Field {
    name: &'static str,
    of: &'static str,
    repeated: bool,
}

static TABLE: LazyLock<HashMap<&'static str, HashMap<u64, Field>>> = LazyLock::new(|| {
    let mut table: HashMap<&str, HashMap<u64, Field>> = HashMap::new();
    let mut message = "";
    for line in MESSAGES.lines() {
        let fields = match line.split_once(": ") {
            Some((name, fields)) => {
                message = name;
                fields
            }
            None => line,
        };
        for field in fields.split(',').map(str::trim) {
            let mut words = field.split(' ');
            let (Some(number), Some(name), Some(of)) = (words.next(), words.next(), words.next())
            else {
                continue;
            };
            let repeated = number.ends_with('*');
            if let Ok(number) = number.trim_end_matches('*').parse() {
                table
                    .entry(message)
                    .or_default()
                    .insert(number, Field { name, of, repeated });
            }
        }
    }
    table
});

/// One field as it stands on the wire.
enum Wire<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// Reads a body in the envelope that starts with `k8s\0`.
pub(super) fn decode(body: &[u8]) -> Result<Value, Failure> {
    let broken = || Failure::bad_request("the body is not a protobuf object");
    let envelope = body.strip_prefix(MAGIC).ok_or_else(broken)?;
    let (mut kind, mut version, mut raw) = (String::new(), String::new(), &[][..]);
    each(envelope, |number, wire| {
        match (number, wire) {
            (1, Wire::Bytes(bytes)) => {
                let meta = message("TypeMeta", bytes)?;
                json::text(&meta, "/kind").clone_into(&mut kind);
                json::text(&meta, "/apiVersion").clone_into(&mut version);
            }
            (2, Wire::Bytes(bytes)) => raw = bytes,
            _ => {}
        }
        Ok(())
    })?;
    if kind == "Unknown" || kind == "TypeMeta" || !TABLE.contains_key(kind.as_str()) {
        return Err(unsupported(&kind, 0));
    }
    let mut object = message(&kind, raw)?;
    json::set(&mut object, &["kind"], json!(kind));
    json::set(&mut object, &["apiVersion"], json!(version));
    Ok(object)
}

fn unsupported(message: &str, field: u64) -> Failure {
    Failure::new(
        415,
        "UnsupportedMediaType",
        format!(
            "the body was sent as protobuf with {message} (field {field}), which is understood here as application/json only"
        ),
    )
}

/// No message of the table holds itself, so the depth is bounded by the table.
fn message(name: &str, bytes: &[u8]) -> Result<Value, Failure> {
    let fields = TABLE.get(name).ok_or_else(|| unsupported(name, 0))?;
    let mut out = Map::new();
    each(bytes, |number, wire| {
        let Some(field) = fields.get(&number) else {
            // Go writes empty fields as well; only fields with content are missed.
            return match wire {
                Wire::Number(0) | Wire::Bytes([]) => Ok(()),
                _ => Err(unsupported(name, number)),
            };
        };
        put(&mut out, field, wire)
    })?;
    Ok(Value::Object(out))
}

fn put(out: &mut Map<String, Value>, field: &Field, wire: Wire<'_>) -> Result<(), Failure> {
    let broken = || Failure::bad_request(format!("the field {} is malformed", field.name));
    let value = match (field.of, wire) {
        ("skip", _) => return Ok(()),
        ("int" | "int!", Wire::Number(number)) if number != 0 || field.of == "int!" => {
            json!(number.cast_signed())
        }
        ("bool" | "bool!", Wire::Number(number)) if number != 0 || field.of == "bool!" => {
            json!(number != 0)
        }
        (_, Wire::Number(_)) => return Ok(()),
        ("string", Wire::Bytes(bytes)) => {
            let text = std::str::from_utf8(bytes).map_err(|_| broken())?;
            if text.is_empty() && !field.repeated {
                return Ok(());
            }
            json!(text)
        }
        ("inline", Wire::Bytes(bytes)) => {
            return each(bytes, |_, wire| {
                if let Wire::Bytes(bytes) = wire {
                    out.insert("name".to_owned(), json!(String::from_utf8_lossy(bytes)));
                }
                Ok(())
            });
        }
        ("map" | "bytesmap" | "quantitymap", Wire::Bytes(bytes)) => {
            let (key, value) = entry(bytes, field.of)?;
            let map = out.entry(field.name).or_insert_with(|| json!({}));
            json::as_map(map).insert(key, json!(value));
            return Ok(());
        }
        ("IntOrString", Wire::Bytes(bytes)) => int_or_string(bytes)?,
        (of, Wire::Bytes(bytes)) => {
            let inner = message(of, bytes)?;
            if !field.repeated && inner.as_object().is_some_and(Map::is_empty) {
                return Ok(());
            }
            inner
        }
    };
    if field.repeated {
        let list = out.entry(field.name).or_insert_with(|| json!([]));
        if let Some(list) = list.as_array_mut() {
            list.push(value);
        }
    } else {
        out.insert(field.name.to_owned(), value);
    }
    Ok(())
}

fn entry(bytes: &[u8], of: &str) -> Result<(String, String), Failure> {
    let (mut key, mut value) = (String::new(), String::new());
    each(bytes, |number, wire| {
        let Wire::Bytes(bytes) = wire else {
            return Ok(());
        };
        match (number, of) {
            (1, _) => key = String::from_utf8_lossy(bytes).into_owned(),
            (2, "bytesmap") => value = crate::pki::base64(bytes),
            (2, "quantitymap") => {
                return each(bytes, |_, wire| {
                    if let Wire::Bytes(bytes) = wire {
                        value = String::from_utf8_lossy(bytes).into_owned();
                    }
                    Ok(())
                });
            }
            (2, _) => value = String::from_utf8_lossy(bytes).into_owned(),
            _ => {}
        }
        Ok(())
    })?;
    Ok((key, value))
}

fn int_or_string(bytes: &[u8]) -> Result<Value, Failure> {
    let (mut is_text, mut number, mut text) = (false, 0, String::new());
    each(bytes, |field, wire| {
        match (field, wire) {
            (1, Wire::Number(kind)) => is_text = kind == 1,
            (2, Wire::Number(value)) => number = value.cast_signed(),
            (3, Wire::Bytes(bytes)) => text = String::from_utf8_lossy(bytes).into_owned(),
            _ => {}
        }
        Ok(())
    })?;
    Ok(if is_text { json!(text) } else { json!(number) })
}

/// Calls `tell` for each field of a message.
fn each<'a>(
    mut bytes: &'a [u8],
    mut tell: impl FnMut(u64, Wire<'a>) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let broken = || Failure::bad_request("the protobuf is malformed");
    while !bytes.is_empty() {
        let key = varint(&mut bytes).ok_or_else(broken)?;
        let wire = match key & 7 {
            0 => Wire::Number(varint(&mut bytes).ok_or_else(broken)?),
            2 => {
                let length = varint(&mut bytes)
                    .and_then(|length| usize::try_from(length).ok())
                    .ok_or_else(broken)?;
                let (value, rest) = bytes.split_at_checked(length).ok_or_else(broken)?;
                bytes = rest;
                Wire::Bytes(value)
            }
            kind @ (1 | 5) => {
                let length = if kind == 1 { 8 } else { 4 };
                let (value, rest) = bytes.split_at_checked(length).ok_or_else(broken)?;
                bytes = rest;
                Wire::Bytes(value)
            }
            _ => return Err(broken()),
        };
        tell(key >> 3, wire)?;
    }
    Ok(())
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let (first, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `kubectl create configmap x --from-literal=a=b`, in the main.
    const CONFIG_MAP: &[u8] = b"k8s\0\x0a\x0f\x0a\x02v1\x12\x09ConfigMap\x12\x0f\x0a\x05\x0a\x01x\x12\0\x12\x06\x0a\x01a\x12\x01b";

    #[test]
    fn a_config_map_as_kubectl_sends_it() {
        let object = decode(CONFIG_MAP).unwrap();
        assert_eq!(
            object,
            json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}, "data": {"a": "b"}})
        );
    }

    #[test]
    fn every_prefix_and_rubbish_is_refused_or_read_without_harm() {
        for end in 0..CONFIG_MAP.len() {
            let _ = decode(&CONFIG_MAP[..end]);
        }
        assert_eq!(decode(b"{}").unwrap_err().code, 400);
        assert_eq!(
            decode(b"k8s\0\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")
                .unwrap_err()
                .code,
            400
        );
        assert_eq!(
            decode(b"k8s\0\x0a\x08\x12\x06Widget").unwrap_err().code,
            415
        );
    }

    #[test]
    fn what_is_not_known_is_not_dropped() {
        let pod = b"k8s\0\x0a\x09\x0a\x02v1\x12\x03Pod\x12\x07\x12\x05\x0a\x03\x0a\x01v";
        assert_eq!(decode(pod).unwrap_err().code, 415);
    }

    #[test]
    fn every_type_of_the_table_is_in_the_table() {
        const SCALARS: &[&str] = &[
            "string",
            "int",
            "int!",
            "bool",
            "bool!",
            "map",
            "bytesmap",
            "quantitymap",
            "inline",
            "skip",
            "raw",
            "IntOrString",
        ];
        for field in TABLE.values().flat_map(HashMap::values) {
            assert!(
                SCALARS.contains(&field.of) || TABLE.contains_key(field.of),
                "{}",
                field.of
            );
        }
    }
}

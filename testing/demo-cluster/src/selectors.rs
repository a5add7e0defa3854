//! Label and field selectors.

use serde_json::Value;

use crate::{json::text, kinds::Kind, request::Query, status::Failure};

#[derive(Debug, Clone, Default)]
pub(crate) struct Selectors {
    labels: Vec<Requirement>,
    fields: Vec<(String, bool, String)>,
    name: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Requirement {
    key: String,
    test: Test,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Test {
    Exists,
    Absent,
    In(Vec<String>),
    NotIn(Vec<String>),
    Greater(i64),
    Less(i64),
}

impl Selectors {
    pub(crate) fn parse(kind: &Kind, query: &Query) -> Result<Self, Failure> {
        Ok(Self {
            labels: labels(query.get("labelSelector").unwrap_or_default())?,
            fields: fields(kind, query.get("fieldSelector").unwrap_or_default())?,
            name: String::new(),
        })
    }

    /// A watch of one object by its path.
    pub(crate) fn and_name(mut self, name: &str) -> Self {
        name.clone_into(&mut self.name);
        self
    }

    pub(crate) fn match_object(&self, object: &Value) -> bool {
        let labels = object.pointer("/metadata/labels").unwrap_or(&Value::Null);
        (self.name.is_empty() || text(object, "/metadata/name") == self.name)
            && self
                .labels
                .iter()
                .all(|one| one.fits(labels.get(&one.key).and_then(Value::as_str)))
            && self
                .fields
                .iter()
                .all(|(path, equal, value)| (field(object, path) == *value) == *equal)
    }
}

impl Requirement {
    fn fits(&self, label: Option<&str>) -> bool {
        let number = || label.and_then(|label| label.parse::<i64>().ok());
        match &self.test {
            Test::Exists => label.is_some(),
            Test::Absent => label.is_none(),
            Test::In(values) => {
                label.is_some_and(|label| values.iter().any(|value| value == label))
            }
            Test::NotIn(values) => {
                label.is_none_or(|label| values.iter().all(|value| value != label))
            }
            Test::Greater(than) => number().is_some_and(|number| number > *than),
            Test::Less(than) => number().is_some_and(|number| number < *than),
        }
    }
}

fn labels(selector: &str) -> Result<Vec<Requirement>, Failure> {
    // A comma inside the brackets of a set does not part two requirements.
    let mut depth = 0_usize;
    let parts = selector.split(|letter| {
        match letter {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            _ => {}
        }
        letter == ',' && depth == 0
    });
    parts
        .map(str::trim)
        .filter(|part| !part.is_empty())
        .map(requirement)
        .collect()
}

fn requirement(part: &str) -> Result<Requirement, Failure> {
    let bad = || Failure::bad_request(format!("unable to parse requirement: {part:?}"));
    let make = |key: &str, test| {
        let key = key.trim();
        let fine = !key.is_empty()
            && key
                .chars()
                .all(|one| one.is_ascii_alphanumeric() || "-_./".contains(one));
        if fine {
            Ok(Requirement {
                key: key.to_owned(),
                test,
            })
        } else {
            Err(bad())
        }
    };
    let one = |value: &str| vec![value.trim().to_owned()];
    if let Some((key, value)) = part.split_once("!=") {
        return make(key, Test::NotIn(one(value)));
    }
    if let Some((key, value)) = part.split_once("==").or_else(|| part.split_once('=')) {
        return make(key, Test::In(one(value)));
    }
    if let Some((key, value)) = part.split_once('>') {
        return make(key, Test::Greater(value.trim().parse().map_err(|_| bad())?));
    }
    if let Some((key, value)) = part.split_once('<') {
        return make(key, Test::Less(value.trim().parse().map_err(|_| bad())?));
    }
    if let Some(key) = part.strip_prefix('!') {
        return make(key, Test::Absent);
    }
    if let Some((head, values)) = part.split_once('(') {
        let values = values.trim().strip_suffix(')').ok_or_else(bad)?;
        let values: Vec<String> = values
            .split(',')
            .map(|value| value.trim().to_owned())
            .collect();
        let mut words = head.split_whitespace();
        return match (words.next(), words.next(), words.next()) {
            (Some(key), Some("in"), None) => make(key, Test::In(values)),
            (Some(key), Some("notin"), None) => make(key, Test::NotIn(values)),
            _ => Err(bad()),
        };
    }
    make(part, Test::Exists)
}

fn fields(kind: &Kind, selector: &str) -> Result<Vec<(String, bool, String)>, Failure> {
    let parts = selector
        .split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty());
    parts
        .map(|part| {
            let (key, equal, value) = if let Some((key, value)) = part.split_once("!=") {
                (key, false, value)
            } else if let Some((key, value)) =
                part.split_once("==").or_else(|| part.split_once('='))
            {
                (key, true, value)
            } else {
                return Err(Failure::bad_request(format!(
                    "invalid field selector: {part:?}"
                )));
            };
            if !supported(kind, key) {
                return Err(Failure::bad_request(format!(
                    "field label not supported: {key}"
                )));
            }
            Ok((key.to_owned(), equal, value.to_owned()))
        })
        .collect()
}

fn supported(kind: &Kind, key: &str) -> bool {
    let more: &[&str] = match kind.plural {
        "pods" => &[
            "spec.nodeName",
            "spec.restartPolicy",
            "spec.schedulerName",
            "spec.serviceAccountName",
            "spec.hostNetwork",
            "status.phase",
            "status.podIP",
            "status.nominatedNodeName",
        ],
        "events" => &[
            "involvedObject.kind",
            "involvedObject.namespace",
            "involvedObject.name",
            "involvedObject.uid",
            "involvedObject.apiVersion",
            "involvedObject.resourceVersion",
            "involvedObject.fieldPath",
            "reason",
            "reportingComponent",
            "source",
            "type",
        ],
        "secrets" => &["type"],
        "namespaces" => &["status.phase"],
        "nodes" => &["spec.unschedulable"],
        "replicasets" => &["status.replicas"],
        "services" => &["spec.clusterIP", "spec.type"],
        _ => &[],
    };
    matches!(key, "metadata.name" | "metadata.namespace") || more.contains(&key)
}

fn field(object: &Value, path: &str) -> String {
    let path = if path == "source" {
        "source.component"
    } else {
        path
    };
    match object.pointer(&format!("/{}", path.replace('.', "/"))) {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Null) | None => String::new(),
        Some(other) => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn fits(selector: &str, labels: &Value) -> bool {
        let encoded = selector.replace('=', "%3D");
        let query = Query::parse(&format!("labelSelector={encoded}"));
        let selectors = Selectors::parse(Kind::named("pods"), &query).unwrap();
        selectors.match_object(&json!({"metadata": {"labels": labels}}))
    }

    #[test]
    fn label_selectors_in_each_form() {
        let labels = json!({"app": "web", "tier": "front", "n": "7"});
        for selector in [
            "app=web",
            "app==web",
            "app!=db",
            "app in (db, web),tier",
            "!gone",
            "gone notin (x)",
            "n>6",
            "n<8",
        ] {
            assert!(fits(selector, &labels), "{selector}");
        }
        for selector in [
            "app=db",
            "app notin (web)",
            "!app",
            "gone",
            "app=web,tier=back",
            "n>7",
            "app>1",
        ] {
            assert!(!fits(selector, &labels), "{selector}");
        }
    }

    #[test]
    fn nonsense_is_a_bad_request() {
        for selector in ["a in (x", "a b", "=x", "n>x", "a within (x)"] {
            assert_eq!(labels(selector).unwrap_err().code, 400, "{selector}");
        }
        assert_eq!(
            fields(Kind::named("pods"), "spec.colour=red")
                .unwrap_err()
                .code,
            400
        );
        assert_eq!(
            fields(Kind::named("pods"), "status.phase")
                .unwrap_err()
                .code,
            400
        );
    }

    #[test]
    fn field_selectors_see_what_is_missing_as_empty() {
        let query = Query::parse("fieldSelector=status.phase!%3DRunning,metadata.name%3Da");
        let selectors = Selectors::parse(Kind::named("pods"), &query).unwrap();
        assert!(selectors.match_object(&json!({"metadata": {"name": "a"}})));
        assert!(
            !selectors
                .match_object(&json!({"metadata": {"name": "a"}, "status": {"phase": "Running"}}))
        );
    }
}

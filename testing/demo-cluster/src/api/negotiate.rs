//! Content negotiation: JSON, in the form (object, table, metadata alone) that the client prefers.

use http::{HeaderMap, header};

use crate::status::Failure;

/// One clause of an Accept header.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Clause {
    media: String,
    kind: String,
    group: String,
    version: String,
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Accept(Vec<Clause>);

/// How objects are to be shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    Object,
    Table,
    Metadata,
}

impl Accept {
    pub(crate) fn of(headers: &HeaderMap) -> Self {
        let values = headers
            .get_all(header::ACCEPT)
            .iter()
            .filter_map(|value| value.to_str().ok());
        let clauses = values.flat_map(|value| value.split(',')).map(|clause| {
            let mut parts = clause.split(';').map(str::trim);
            let mut parsed = Clause {
                media: parts.next().unwrap_or_default().to_ascii_lowercase(),
                ..Clause::default()
            };
            for (name, value) in parts.filter_map(|part| part.split_once('=')) {
                match name {
                    "as" => parsed.kind = value.to_owned(),
                    "g" => parsed.group = value.to_owned(),
                    "v" => parsed.version = value.to_owned(),
                    _ => {}
                }
            }
            parsed
        });
        Self(clauses.filter(|clause| !clause.media.is_empty()).collect())
    }

    /// The first form that we can serve, in the client's order. Protobuf we cannot.
    pub(crate) fn form(&self) -> Result<Form, Failure> {
        if self.0.is_empty() {
            return Ok(Form::Object);
        }
        for clause in self.0.iter().filter(|clause| is_json(&clause.media)) {
            let known = clause.group == "meta.k8s.io"
                && matches!(clause.version.as_str(), "v1" | "v1beta1");
            match clause.kind.as_str() {
                "" => return Ok(Form::Object),
                "Table" if known => return Ok(Form::Table),
                "PartialObjectMetadata" | "PartialObjectMetadataList" if known => {
                    return Ok(Form::Metadata);
                }
                _ => {}
            }
        }
        Err(not_acceptable())
    }

    /// The version of aggregated discovery which the client prefers to the legacy one, if any.
    pub(crate) fn aggregated(&self) -> Option<&str> {
        let clause = self.0.iter().find(|clause| {
            is_json(&clause.media)
                && (clause.kind.is_empty() || clause.kind == "APIGroupDiscoveryList")
        })?;
        (clause.kind == "APIGroupDiscoveryList"
            && matches!(clause.version.as_str(), "v2" | "v2beta1"))
        .then_some(clause.version.as_str())
    }

    pub(crate) fn first_type(&self) -> &str {
        self.0.first().map_or("", |clause| clause.media.as_str())
    }
}

fn is_json(media: &str) -> bool {
    matches!(media, "application/json" | "application/*" | "*/*")
}

fn not_acceptable() -> Failure {
    Failure::new(
        406,
        "NotAcceptable",
        "only the following media types are accepted: application/json",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accept(value: &str) -> Accept {
        let mut headers = HeaderMap::new();
        headers.insert(header::ACCEPT, value.parse().unwrap());
        Accept::of(&headers)
    }

    #[test]
    fn the_clients_order_decides() {
        let kubectl = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json;as=Table;v=v1beta1;g=meta.k8s.io,application/json";
        assert_eq!(accept(kubectl).form().unwrap(), Form::Table);
        assert_eq!(
            accept("application/vnd.kubernetes.protobuf,application/json")
                .form()
                .unwrap(),
            Form::Object
        );
        assert_eq!(
            accept("application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1")
                .form()
                .unwrap(),
            Form::Metadata
        );
        assert_eq!(accept("*/*").form().unwrap(), Form::Object);
        assert_eq!(
            accept("application/vnd.kubernetes.protobuf")
                .form()
                .unwrap_err()
                .code,
            406
        );
    }

    #[test]
    fn discovery_is_aggregated_on_request() {
        let newer =
            "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList,application/json";
        assert_eq!(accept(newer).aggregated(), Some("v2"));
        assert_eq!(accept("application/json, */*").aggregated(), None);
    }
}

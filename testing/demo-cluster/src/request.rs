//! What a request asks for, read from its method, path and query, as the API server reads it.

use http::Method;

use crate::{
    kinds::{Kind, Sub},
    status::Failure,
};

/// The query, decoded, in order.
#[derive(Debug, Default, Clone)]
pub(crate) struct Query(Vec<(String, String)>);

impl Query {
    pub(crate) fn parse(query: &str) -> Self {
        let pairs = query.split('&').filter(|pair| !pair.is_empty());
        Self(
            pairs
                .map(|pair| {
                    let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
                    (decode(key, true), decode(value, true))
                })
                .collect(),
        )
    }

    pub(crate) fn get(&self, key: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(name, _)| name == key)
            .map(|(_, value)| value.as_str())
    }

    pub(crate) fn all(&self, key: &str) -> Vec<&str> {
        self.0
            .iter()
            .filter(|(name, _)| name == key)
            .map(|(_, value)| value.as_str())
            .collect()
    }

    /// `true`, `1` and the bare name are true, as Kubernetes' query conversion has it.
    pub(crate) fn flag(&self, key: &str) -> bool {
        self.get(key)
            .is_some_and(|value| !matches!(value, "false" | "0"))
    }

    pub(crate) fn number<T: std::str::FromStr>(&self, key: &str) -> Result<Option<T>, Failure> {
        match self.get(key) {
            None | Some("") => Ok(None),
            Some(value) => value.parse().map(Some).map_err(|_| {
                Failure::bad_request(format!("invalid value {value:?} for the parameter {key:?}"))
            }),
        }
    }
}

/// A request for a resource.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    pub(crate) kind: &'static Kind,
    pub(crate) sub: Option<&'static Sub>,
    /// Empty for cluster-scoped kinds, and for a list over all namespaces.
    pub(crate) namespace: String,
    pub(crate) name: String,
}

/// What is authorised: a resource or a path, and the verb.
#[derive(Debug, Clone)]
pub(crate) struct Attributes {
    pub(crate) verb: String,
    pub(crate) group: String,
    pub(crate) resource: String,
    pub(crate) subresource: String,
    pub(crate) namespace: String,
    pub(crate) name: String,
    /// Set for requests that are not for a resource.
    pub(crate) path: Option<String>,
}

impl Attributes {
    pub(crate) fn resource(
        verb: &str,
        group: &str,
        resource: &str,
        namespace: &str,
        name: &str,
    ) -> Self {
        Self {
            verb: verb.to_owned(),
            group: group.to_owned(),
            resource: resource.to_owned(),
            subresource: String::new(),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            path: None,
        }
    }

    /// The attributes of a request, whether or not what it names exists: authorisation is first.
    pub(crate) fn of(method: &Method, path: &str, query: &Query) -> Self {
        let parts: Vec<String> = path
            .split('/')
            .filter(|part| !part.is_empty())
            .map(|part| decode(part, false))
            .collect();
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        let (group, rest) = match parts.as_slice() {
            ["api", _version, rest @ ..] if !rest.is_empty() => ("", rest),
            ["apis", group, _version, rest @ ..] if !rest.is_empty() => (*group, rest),
            _ => {
                return Self {
                    path: Some(path.to_owned()),
                    ..Self::resource(path_verb(method), "", "", "", "")
                };
            }
        };
        let (namespace, rest) = match rest {
            ["namespaces", namespace, inner @ ..]
                if !inner.is_empty() && !matches!(inner, ["status"] | ["finalize"]) =>
            {
                (*namespace, inner)
            }
            // A namespace is, for authorisation, inside itself.
            ["namespaces", namespace, ..] => (*namespace, rest),
            _ => ("", rest),
        };
        let resource = rest.first().copied().unwrap_or_default();
        let name = rest.get(1).copied().unwrap_or_default();
        let subresource = rest.get(2).copied().unwrap_or_default();
        let verb = match *method {
            Method::POST => "create",
            Method::PUT => "update",
            Method::PATCH => "patch",
            Method::DELETE if name.is_empty() => "deletecollection",
            Method::DELETE => "delete",
            _ if query.flag("watch") && subresource.is_empty() => "watch",
            _ if name.is_empty() => "list",
            _ => "get",
        };
        Self {
            subresource: subresource.to_owned(),
            ..Self::resource(verb, group, resource, namespace, name)
        }
    }
}

impl Target {
    /// The served resource that a path names; `None` for other paths.
    pub(crate) fn parse(path: &str) -> Result<Option<Self>, Failure> {
        let parts: Vec<String> = path
            .trim_start_matches('/')
            .split('/')
            .map(|part| decode(part, false))
            .collect();
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        let (group, version, rest) = match parts.as_slice() {
            ["api", version, rest @ ..] if !rest.is_empty() && rest != [""] => ("", *version, rest),
            ["apis", group, version, rest @ ..] if !rest.is_empty() && rest != [""] => {
                (*group, *version, rest)
            }
            _ => return Ok(None),
        };
        let (namespace, rest) = match rest {
            ["namespaces", namespace, inner @ ..]
                if !inner.is_empty() && !matches!(inner, ["status"] | ["finalize"]) =>
            {
                (*namespace, inner)
            }
            _ => ("", rest),
        };
        let (plural, name, sub) = match rest {
            [plural] => (*plural, "", ""),
            [plural, name] => (*plural, *name, ""),
            [plural, name, sub] => (*plural, *name, *sub),
            _ => return Err(Failure::no_such_path()),
        };
        let kind = Kind::find(group, version, plural).ok_or_else(Failure::no_such_path)?;
        if !kind.namespaced && !namespace.is_empty() {
            return Err(Failure::no_such_path());
        }
        if kind.namespaced && namespace.is_empty() && !name.is_empty() {
            return Err(Failure::no_such_path());
        }
        let sub = match sub {
            "" => None,
            sub => Some(kind.subresource(sub).ok_or_else(Failure::no_such_path)?),
        };
        Ok(Some(Self {
            kind,
            sub,
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        }))
    }

    pub(crate) fn subresource(&self) -> &'static str {
        self.sub.map_or("", |sub| sub.name)
    }
}

fn path_verb(method: &Method) -> &'static str {
    match *method {
        Method::POST => "post",
        Method::PUT => "put",
        Method::PATCH => "patch",
        Method::DELETE => "delete",
        Method::HEAD => "head",
        Method::OPTIONS => "options",
        _ => "get",
    }
}

/// Percent-decoding; broken escapes and bytes that are not UTF-8 are kept as good as they can be.
pub(crate) fn decode(text: &str, plus_is_space: bool) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        let escaped = bytes
            .get(at + 1..at + 3)
            .filter(|_| byte == b'%')
            .and_then(|hex| {
                let digit = |byte: u8| char::from(byte).to_digit(16);
                u8::try_from(digit(hex[0])? * 16 + digit(hex[1])?).ok()
            });
        match escaped {
            Some(value) => {
                out.push(value);
                at += 3;
            }
            None => {
                out.push(if byte == b'+' && plus_is_space {
                    b' '
                } else {
                    byte
                });
                at += 1;
            }
        }
    }
    String::from_utf8(out)
        .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attributes(method: Method, uri: &str) -> Attributes {
        let (path, query) = uri.split_once('?').unwrap_or((uri, ""));
        Attributes::of(&method, path, &Query::parse(query))
    }

    #[test]
    fn verbs_follow_method_name_and_watch() {
        let list = attributes(Method::GET, "/api/v1/namespaces/default/pods");
        assert_eq!(
            (
                list.verb.as_str(),
                list.resource.as_str(),
                list.namespace.as_str()
            ),
            ("list", "pods", "default")
        );
        assert_eq!(
            attributes(Method::GET, "/api/v1/pods?watch=1").verb,
            "watch"
        );
        assert_eq!(
            attributes(Method::DELETE, "/api/v1/namespaces/a/pods").verb,
            "deletecollection"
        );
        let exec = attributes(Method::POST, "/api/v1/namespaces/a/pods/p/exec?command=ls");
        assert_eq!(
            (exec.verb.as_str(), exec.subresource.as_str()),
            ("create", "exec")
        );
        let namespace = attributes(Method::GET, "/api/v1/namespaces/a");
        assert_eq!(
            (namespace.resource.as_str(), namespace.name.as_str()),
            ("namespaces", "a")
        );
        assert_eq!(
            attributes(Method::GET, "/version").path.as_deref(),
            Some("/version")
        );
    }

    #[test]
    fn targets_are_what_is_served() {
        let target = Target::parse("/apis/apps/v1/namespaces/x/deployments/web/scale")
            .unwrap()
            .unwrap();
        assert_eq!(
            (target.kind.kind, target.subresource()),
            ("Deployment", "scale")
        );
        assert!(Target::parse("/api/v1").unwrap().is_none());
        for path in [
            "/api/v1/widgets",
            "/api/v1/pods/p",
            "/api/v1/namespaces/a/pods/p/nope",
            "/api/v1/namespaces/a/nodes",
        ] {
            assert_eq!(Target::parse(path).unwrap_err().code, 404, "{path}");
        }
    }

    #[test]
    fn broken_escapes_are_kept() {
        assert_eq!(decode("a%2Fb+c%", true), "a/b c%");
        assert_eq!(decode("%zz%2", false), "%zz%2");
        assert_eq!(
            Query::parse("command=sh&command=-c").all("command"),
            ["sh", "-c"]
        );
    }
}

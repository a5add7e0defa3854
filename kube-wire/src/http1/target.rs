//! A request's target in origin form (RFC 9112, section 3.2.1): path and query.
//!
//! [`http::Uri`] holds at most 64 KiB and refuses some bytes that Go's parser accepts. The API server is
//! written in Go and takes about 1 MiB, so a target has its own type here, and the bytes that
//! clients send unencoded to a workload behind the `proxy` subresource are percent-encoded, as the API
//! server encodes them on its way to the workload.

use std::fmt::Write as _;
use std::sync::Arc;

use http::uri::PathAndQuery;

/// The longest target that is kept as a [`PathAndQuery`], bytes. `http` holds 65,534, and a prefix may
/// still be put before it.
pub const SHORT: usize = 60 * 1024;

/// Path and query of a request; begins with `/` and holds graphic ASCII only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target(Form);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Form {
    Short(PathAndQuery),
    /// More than [`SHORT`] bytes, which `http` cannot hold.
    Long(Arc<str>),
}

/// Why a target is refused. The client is at fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// Not a path.
    #[error("the request target must be a path")]
    Form,
    /// A byte that has no place in a target.
    #[error("the request target holds bytes that must be percent-encoded")]
    Bytes,
}

impl Target {
    /// Reads the bytes between method and version.
    ///
    /// ```
    /// use throwline_kube_wire::http1::target::Target;
    ///
    /// let target = Target::read(b"/api/v1/pods?limit=500", 0).unwrap();
    /// assert_eq!((target.path(), target.query()), ("/api/v1/pods", Some("limit=500")));
    /// assert!(Target::read(b"*", 0).is_err());
    /// ```
    ///
    /// `prefix` is how many of its first bytes are not the API server's, such as `/clusters/NAME`.
    ///
    /// # Errors
    /// [`TargetError`]: it is no path, or holds bytes that have no place in one. Behind the `proxy`
    /// subresource only control characters and spaces are errors, as they are for the API server.
    pub fn read(raw: &[u8], prefix: usize) -> Result<Self, TargetError> {
        if raw.first() != Some(&b'/') {
            return Err(TargetError::Form);
        }
        let path = raw.split(|byte| *byte == b'?').next().unwrap_or_default();
        if raw.iter().any(|byte| *byte <= b' ' || *byte == 0x7f) {
            return Err(TargetError::Bytes);
        }
        let query = path.len();
        let odd = |at: usize| needs_encoding(raw[at], at > query);
        if !(0..raw.len()).any(odd) {
            // Graphic ASCII throughout.
            let text = std::str::from_utf8(raw).map_err(|_| TargetError::Bytes)?;
            return Self::of(text);
        }
        let workload = path.get(prefix..).and_then(workload_part);
        let Some(free) = workload.map(|at| at + prefix) else {
            return Err(TargetError::Bytes);
        };
        if (0..free).any(odd) {
            return Err(TargetError::Bytes);
        }
        let mut text = String::with_capacity(raw.len() + 64);
        for (at, byte) in raw.iter().enumerate() {
            if odd(at) {
                let _ = write!(text, "%{byte:02X}");
            } else {
                text.push(char::from(*byte))
            }
        }
        Self::of(&text)
    }

    fn of(text: &str) -> Result<Self, TargetError> {
        if text.len() <= SHORT {
            let short = PathAndQuery::try_from(text).map_err(|_| TargetError::Bytes)?;
            return Ok(Self(Form::Short(short)));
        }
        Ok(Self(Form::Long(text.into())))
    }

    /// Path and query.
    pub fn as_str(&self) -> &str {
        match &self.0 {
            Form::Short(short) => short.as_str(),
            Form::Long(long) => long,
        }
    }

    /// Everything before the first `?`.
    pub fn path(&self) -> &str {
        let all = self.as_str();
        all.split_once('?').map_or(all, |(path, _)| path)
    }

    /// What is behind the first `?`.
    pub fn query(&self) -> Option<&str> {
        self.as_str().split_once('?').map(|(_, query)| query)
    }

    /// As `http` holds it; `None` where it cannot.
    pub fn short(&self) -> Option<&PathAndQuery> {
        match &self.0 {
            Form::Short(short) => Some(short),
            Form::Long(_) => None,
        }
    }

    /// Whether a workload and not the API server reads the end of it.
    pub fn is_workload(&self) -> bool {
        workload_part(self.path()).is_some()
    }

    /// With `prefix`, which begins with `/` and does not end with one, before it.
    pub fn prefixed(&self, prefix: &str) -> Self {
        if prefix.is_empty() {
            return self.clone();
        }
        Self::of(&format!("{prefix}{}", self.as_str())).unwrap_or_else(|_| self.clone())
    }
}

impl std::str::FromStr for Target {
    type Err = TargetError;

    fn from_str(text: &str) -> Result<Self, TargetError> {
        Self::read(text.as_bytes(), 0)
    }
}

impl From<PathAndQuery> for Target {
    fn from(short: PathAndQuery) -> Self {
        Self(Form::Short(short))
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Where the workload's part of an API server's path begins: behind the `proxy` subresource of a pod,
/// a service or a node, or in the old form `/api/v1/proxy/…`. `None` where all of it is the API server's.
pub fn workload_part<P: AsRef<[u8]> + ?Sized>(path: &P) -> Option<usize> {
    let path = path.as_ref();
    let segments: Vec<&[u8]> = path.split(|byte| *byte == b'/').skip(1).take(7).collect();
    let before = match segments.as_slice() {
        [
            b"api",
            b"v1",
            b"namespaces",
            _,
            b"pods" | b"services",
            _,
            b"proxy",
            ..,
        ]
        | [
            b"api",
            b"v1",
            b"proxy",
            b"namespaces",
            _,
            b"pods" | b"services",
            _,
            ..,
        ] => 7,
        [b"api", b"v1", b"nodes", _, b"proxy", ..] | [b"api", b"v1", b"proxy", b"nodes", _, ..] => {
            5
        }
        _ => return None,
    };
    let part = segments[..before]
        .iter()
        .map(|segment| segment.len() + 1)
        .sum();
    Some(part)
}

/// What `http` refuses, or what is not ASCII; a raw `#` would begin a fragment, which `http` drops.
fn needs_encoding(byte: u8, is_query: bool) -> bool {
    match byte {
        b'<' | b'>' | b'#' | 0x80.. => true,
        b'`' => !is_query,
        b'"' => is_query,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PROXY: &str = "/api/v1/namespaces/a/services/http:web:80/proxy";

    fn read(raw: &str) -> Result<String, TargetError> {
        Target::read(raw.as_bytes(), 0).map(|target| target.to_string())
    }

    #[test]
    fn behind_the_proxy_subresource_odd_bytes_are_encoded() {
        for (raw, encoded) in [
            ("/<a>?q=\"<b>\"", "/%3Ca%3E?q=%22%3Cb%3E%22"),
            ("/é#x`y`", "/%C3%A9%23x%60y%60"),
            ("?q=é&z={}|^", "?q=%C3%A9&z={}|^"),
            ("//x/../%2f\"", "//x/../%2f\""),
        ] {
            assert_eq!(
                read(&format!("{PROXY}{raw}")).unwrap(),
                format!("{PROXY}{encoded}"),
                "{raw}"
            );
        }
        for form in [
            "/api/v1/namespaces/a/pods/b/proxy",
            "/api/v1/nodes/n/proxy",
            "/api/v1/proxy/namespaces/a/pods/b",
            "/api/v1/proxy/nodes/n",
        ] {
            assert_eq!(
                read(&format!("{form}/<")).unwrap(),
                format!("{form}/%3C"),
                "{form}"
            );
        }
    }

    #[test]
    fn elsewhere_odd_bytes_are_refused() {
        for raw in [
            "/api/v1/pods?labelSelector=\"a\"",
            "/api/v1/namespaces/<a>/pods",
            "/api/v1/namespaces/é/services/b/proxy/x",
            "/apis/x/v1/namespaces/a/pods/b/proxy/<",
            "/api/v1/pods#fragment",
            "/é",
        ] {
            assert_eq!(read(raw), Err(TargetError::Bytes), "{raw}");
        }
        for raw in ["", "*", "http://elsewhere/", "?x", "api"] {
            assert_eq!(read(raw), Err(TargetError::Form), "{raw}");
        }
        for raw in [
            format!("{PROXY}/a b"),
            format!("{PROXY}/\u{1}"),
            format!("{PROXY}/\u{7f}"),
        ] {
            assert_eq!(read(&raw), Err(TargetError::Bytes), "{raw:?}");
        }
    }

    #[test]
    fn the_prefix_of_a_local_proxy_is_stepped_over() {
        let raw = format!("/clusters/prod{PROXY}/<");
        let target = Target::read(raw.as_bytes(), "/clusters/prod".len()).unwrap();
        assert_eq!(target.as_str(), format!("/clusters/prod{PROXY}/%3C"));
        assert_eq!(Target::read(raw.as_bytes(), 0), Err(TargetError::Bytes));
    }

    #[test]
    fn a_long_target_has_path_and_query_too() {
        let raw = format!("/api/v1/x?command={}", "a".repeat(1 << 20));
        let target = Target::read(raw.as_bytes(), 0).unwrap();
        assert!(target.short().is_none());
        assert_eq!(target.path(), "/api/v1/x");
        assert_eq!(target.query().unwrap().len(), "command=".len() + (1 << 20));
        assert_eq!(target.prefixed("/base").as_str(), format!("/base{raw}"));
    }

    proptest! {
        #[test]
        fn what_is_read_is_graphic_and_reads_again_the_same(raw in proptest::collection::vec(any::<u8>(), 0..40), behind: bool) {
            let mut bytes = if behind { format!("{PROXY}/").into_bytes() } else { Vec::new() };
            bytes.extend(raw);
            if let Ok(target) = Target::read(&bytes, 0) {
                prop_assert!(target.as_str().bytes().all(|byte| byte.is_ascii_graphic()));
                prop_assert_eq!(Target::read(target.as_str().as_bytes(), 0), Ok(target.clone()));
                prop_assert_eq!(target.short().unwrap().as_str(), target.as_str());
                prop_assert!(!behind || target.is_workload());
            }
        }
    }
}

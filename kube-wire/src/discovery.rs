//! What client-go's discovery keeps of an error.

use http::HeaderMap;
use http::header::ACCEPT;

/// Whether the client reads an error's text only. Discovery, the first thing every kubectl does,
/// reads a failed answer raw and keeps of it only the text of a `text/plain` body under a code of
/// 500 or more other than 503 and 504 (client-go, `NewGenericServerResponse`). Everything else
/// decodes a `Status`. `path` is the one inside the cluster, with or without a query.
pub fn keeps_text_only(path: &str, headers: &HeaderMap) -> bool {
    let aggregated = headers.get_all(ACCEPT).iter().any(|accept| {
        accept
            .to_str()
            .is_ok_and(|accept| accept.contains("g=apidiscovery.k8s.io"))
    });
    let path = path.split('?').next().unwrap_or_default();
    aggregated || matches!(path, "/version" | "/api" | "/apis") || path.starts_with("/openapi/")
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[test]
    fn discovery_is_recognized_by_its_paths_and_by_what_it_accepts() {
        let none = HeaderMap::new();
        for path in [
            "/api",
            "/apis",
            "/version",
            "/openapi/v2",
            "/api?timeout=32s",
        ] {
            assert!(keeps_text_only(path, &none), "{path}");
        }
        for path in ["/api/v1/pods", "/apis/apps/v1", "/", "/versions"] {
            assert!(!keeps_text_only(path, &none), "{path}");
        }
        let mut aggregated = HeaderMap::new();
        aggregated.insert(
            ACCEPT,
            HeaderValue::from_static(
                "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList",
            ),
        );
        assert!(keeps_text_only("/anything", &aggregated));
    }
}

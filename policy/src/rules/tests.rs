use crate::SystemNames;
use http::header::HOST;
use http::{HeaderName, Request, StatusCode};
use proptest::prelude::*;

use super::*;

fn jane() -> User {
    User {
        name: "jane@example.com".into(),
        groups: vec!["dev".into(), "ops, night".into()],
        credential: Some("X509SHA256=ab".into()),
        ..User::default()
    }
}

fn head(method: &str, uri: &str, headers: &[(&str, &str)]) -> Parts {
    let mut request = Request::builder().method(method).uri(uri);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(()).unwrap().into_parts().0
}

fn get(headers: &[(&str, &str)]) -> Result<Forward, Status> {
    apply(&head("GET", "/api/v1/pods", headers), &jane())
}

fn code(result: Result<Forward, Status>) -> u16 {
    result.map_or_else(|refusal| refusal.code.as_u16(), |_| 200)
}

fn all<'a>(headers: &'a HeaderMap, name: &str) -> Vec<&'a str> {
    headers
        .get_all(name)
        .iter()
        .map(|value| value.to_str().unwrap())
        .collect()
}

#[test]
fn the_identity_is_that_of_the_certificate() {
    let forward = get(&[("accept", "application/json"), ("user-agent", "kubectl")]).unwrap();
    assert_eq!(forward.kind, Kind::Plain);
    assert_eq!(
        all(&forward.headers, "impersonate-user"),
        ["jane@example.com"]
    );
    assert_eq!(
        all(&forward.headers, "impersonate-group"),
        ["dev", "ops, night"]
    );
    assert_eq!(
        all(
            &forward.headers,
            "impersonate-extra-throwline.dev%2fcredential-id"
        ),
        ["X509SHA256=ab"]
    );
    assert_eq!(all(&forward.headers, "accept"), ["application/json"]);
    assert_eq!(all(&forward.headers, "user-agent"), ["kubectl"]);
    assert_eq!(forward.headers.len(), 6);
}

#[test]
fn a_request_without_an_identity_or_with_a_dangerous_one_is_refused() {
    for (name, groups) in [
        ("", vec![]),
        ("jane", vec!["dev", "system:masters"]),
        ("jane", vec!["system:nodes"]),
        ("system:kube-controller-manager", vec![]),
        ("system:serviceaccount:kube-system:x", vec!["dev"]),
        ("jane\r\nImpersonate-Group: system:masters", vec![]),
        ("jane", vec!["dev\r\nImpersonate-Group: system:masters"]),
        ("jane", vec!["dev\nx"]),
        ("jane", vec!["dev\u{85}x"]),
        ("jane", vec![""]),
        ("jane", vec![" dev"]),
        ("jane", vec!["dev\t"]),
    ] {
        let user = User {
            name: name.into(),
            groups: groups.into_iter().map(Into::into).collect(),
            ..User::default()
        };
        let refused = apply(&head("GET", "/api", &[]), &user).unwrap_err();
        assert_eq!(refused.code, StatusCode::FORBIDDEN, "{user:?}");
    }
}

#[test]
fn names_of_kubernetes_own_pass_as_they_are_allowed_and_what_is_implied_is_left_out() {
    let names = ["system:admin", "system:monitoring"].map(str::to_owned);
    let user = User {
        name: "system:admin".into(),
        groups: ["system:monitoring", "dev", "system:authenticated"]
            .map(str::to_owned)
            .to_vec(),
        credential: None,
        system_names: SystemNames::allowing(names.to_vec()).unwrap(),
    };
    let forward = apply(&head("GET", "/api", &[]), &user).unwrap();
    let all = |name: &str| all(&forward.headers, name);
    assert_eq!(all("impersonate-user"), ["system:admin"]);
    assert_eq!(all("impersonate-group"), ["system:monitoring", "dev"]);
}

#[test]
fn a_clients_impersonation_is_refused_with_the_reason() {
    for name in [
        "Impersonate-User",
        "impersonate-group",
        "IMPERSONATE-UID",
        "Impersonate-Extra-x",
        "Impersonate-",
    ] {
        let refused = get(&[(name, "admin")]).unwrap_err();
        assert_eq!(refused.code, StatusCode::FORBIDDEN, "{name}");
        assert!(
            refused.message.contains("--as") && refused.message.contains("throwline"),
            "{}",
            refused.message
        );
    }
}

#[test]
fn connection_cannot_take_away_what_a_request_means() {
    for token in [
        "Impersonate-User",
        "x, impersonate-group",
        "Authorization",
        "HOST",
        "close, Content-Length",
        "Transfer-Encoding",
        "X-Remote-User",
        "impersonate_user",
        "not a token",
    ] {
        assert_eq!(code(get(&[("connection", token)])), 400, "{token}");
        assert_eq!(
            code(get(&[("connection", "close"), ("connection", token)])),
            400,
            "{token}"
        );
    }
}

#[test]
fn what_connection_names_goes_with_it() {
    let forward = get(&[
        ("connection", "X-One, keep-alive"),
        ("x-one", "1"),
        ("x-two", "2"),
    ])
    .unwrap();
    assert!(forward.headers.get("x-one").is_none() && forward.headers.get("connection").is_none());
    assert_eq!(all(&forward.headers, "x-two"), ["2"]);
}

#[test]
fn underscores_are_refused() {
    for name in ["Impersonate_User", "X_Remote_User", "content_length", "a_b"] {
        assert_eq!(code(get(&[(name, "x")])), 400, "{name}");
    }
}

#[test]
fn credentials_and_proxies_words_are_dropped() {
    let dropped = [
        ("authorization", "Bearer x"),
        ("cookie", "a=b"),
        ("proxy-authorization", "x"),
        ("proxy-connection", "close"),
        ("x-remote-user", "root"),
        ("x-remote-group", "system:masters"),
        ("x-remote-extra-a", "b"),
        ("x-forwarded-for", "10.0.0.1"),
        ("x-forwarded-client-cert", "x"),
        ("forwarded", "for=x"),
        ("x-real-ip", "10.0.0.1"),
        ("te", "trailers"),
        ("trailer", "Impersonate-User"),
        ("keep-alive", "x"),
        ("expect", "100-continue"),
        ("host", "elsewhere"),
    ];
    let forward = get(&dropped).unwrap();
    for (name, _) in dropped {
        assert!(forward.headers.get(name).is_none(), "{name}");
    }
}

const WORKLOAD: &str = "/api/v1/namespaces/a/services/http:web:80/proxy/";

fn to_workload(headers: &[(&str, &str)]) -> Result<Forward, Status> {
    apply(&head("GET", WORKLOAD, headers), &jane())
}

#[test]
fn a_front_proxys_words_about_who_asks_are_dropped_everywhere() {
    for name in [
        "Remote-User",
        "Remote-Groups",
        "X-Remote-Extra-scopes",
        "X-Auth-Request-Email",
        "X-WEBAUTH-USER",
        "X-Authenticated-Groups",
        "X-Forwarded-User",
        "X-Forwarded-Access-Token",
        "X-Forwarded-Client-Cert",
        "X-Forwarded-Tls-Client-Cert",
        "Client-Cert",
        "Client-Cert-Chain",
        "X-Client-Cert",
        "X-Client-Cert-Dn",
        "X-SSL-Client-S-DN",
        "SSL-Client-Verify",
        "X-Amzn-Mtls-Clientcert-Leaf",
        "X-Amzn-Oidc-Data",
        "X-Goog-Authenticated-User-Email",
        "X-Goog-Iap-Jwt-Assertion",
        "Cf-Access-Jwt-Assertion",
        "X-Ms-Client-Principal-Name",
        "Tailscale-User-Login",
        "OIDC_CLAIM_sub",
        "X-Remote-Uid",
        "X-Credential-Username",
        "Teleport-Jwt-Assertion",
        "Shib-Identity-Provider",
        "SM_SERVERSESSIONID",
        "IV-Creds",
        "OAM_REMOTE_USER",
        "L5d-Client-Id",
        "X-Envoy-Peer-Metadata",
        "X-Arr-ClientCert",
        "X-Appengine-User-Email",
        "Cf-Connecting-Ip",
        "True-Client-Ip",
        "X-Userinfo",
        "X-Spiffe-Id",
        "X-Auth-User",
        "X-Forwarded-For",
        "X-Real-Ip",
        "Forwarded",
        "Authorization",
        "Audit-ID",
        "Throwline-Target",
    ] {
        let lower = name.to_ascii_lowercase();
        if !name.contains('_') {
            let forward = get(&[(name, "root")]).unwrap();
            assert!(forward.headers.get(&lower).is_none(), "{name}");
        }
        for spelling in [lower.clone(), lower.replace('-', "_")] {
            let forward = to_workload(&[(&spelling, "root")]).unwrap();
            assert!(forward.headers.get(&spelling).is_none(), "{spelling}");
        }
        if !matches!(name, "Audit-ID" | "Throwline-Target") && !name.starts_with("X-Forwarded-") {
            assert_eq!(code(get(&[("connection", name)])), 400, "{name}");
        }
    }
}

#[test]
fn no_header_with_a_word_of_identity_reaches_the_api_server() {
    // Names that an operator may have chosen for the request-header authenticator, and no list has.
    for name in [
        "X-Corp-User",
        "Acme-Groups",
        "X-Proxy-Uid",
        "My-Principal-Name",
        "X-Verified-Email",
        "Gateway-Jwt",
        "X-Auth-Token",
        "X-Peer-Cert",
    ] {
        let forward = get(&[(name, "root")]).unwrap();
        let lower = name.to_ascii_lowercase();
        assert!(forward.headers.get(&lower).is_none(), "{name}");
    }
    // What clients of Kubernetes send.
    let sent = [
        ("user-agent", "kubectl/v1.36.0"),
        ("accept", "application/json"),
        ("accept-encoding", "gzip"),
        ("content-type", "application/json"),
        ("if-none-match", "x"),
        ("kubectl-command", "kubectl get"),
        ("kubectl-session", "1"),
        ("x-stream-protocol-version", "v4.channel.k8s.io"),
        ("x-requested-with", "XMLHttpRequest"),
        ("x-request-id", "1"),
        ("traceparent", "00-1-2-01"),
        ("x-b3-traceid", "1"),
    ];
    let forward = get(&sent).unwrap();
    for (name, value) in sent {
        assert_eq!(all(&forward.headers, name), [value], "{name}");
    }
}

#[test]
fn behind_the_proxy_subresource_passes_what_kubernetes_passes() {
    let sent = [
        ("cookie", "session=1"),
        ("x_csrf_token", "t"),
        ("x-forwarded-host", "grafana.example"),
        ("x-forwarded-proto", "https"),
        ("x-vault-token", "t"),
        ("x-auth-token", "t"),
        ("x-csrf-token", "t"),
        ("x-csrftoken", "t"),
        ("x-xsrf-token", "t"),
        ("x-api-key", "t"),
        ("x-access-token", "t"),
        ("x-user-id", "rocket"),
        ("x-user-agent", "grpc-web"),
        ("x-gitlab-token", "t"),
        ("x-hub-signature-256", "t"),
        ("x-goog-api-key", "t"),
        ("x-ms-date", "t"),
        ("x-amz-date", "t"),
        ("x-scope-orgid", "tenant"),
        ("x-requested-with", "XMLHttpRequest"),
        ("x-grafana-org-id", "1"),
        ("if-none-match", "x"),
        ("origin", "https://a"),
        ("sec-websocket-key", "x"),
        ("range", "bytes=0-1"),
    ];
    let forward = to_workload(&sent).unwrap();
    for (name, value) in sent {
        assert_eq!(all(&forward.headers, name), [value], "{name}");
    }
    // Framing in the spelling that only a CGI-like workload reads, and our own names.
    for name in [
        "content_length",
        "transfer_encoding",
        "host_",
        "keep_alive",
        "proxy_authorization",
    ] {
        let forward = to_workload(&[(name, "1")]).unwrap();
        assert_eq!(
            forward.headers.contains_key(name),
            name == "host_",
            "{name}"
        );
    }
    for name in ["Impersonate-User", "impersonate_user", "Impersonate_Group"] {
        let refused = to_workload(&[(name, "admin")]).unwrap_err();
        assert_eq!(refused.code, StatusCode::FORBIDDEN, "{name}");
    }
    let forward = to_workload(&sent).unwrap();
    assert_eq!(
        all(&forward.headers, "impersonate-user"),
        ["jane@example.com"]
    );
}

#[test]
fn a_target_to_a_workload_may_hold_what_go_accepts() {
    let mut parts = head("GET", "/", &[]);
    parts.uri = http::Uri::from_maybe_shared(format!("{WORKLOAD}é\"?q=é")).unwrap();
    let forward = apply(&parts, &jane()).unwrap();
    assert_eq!(
        forward.target.as_str(),
        format!("{WORKLOAD}%C3%A9\"?q=%C3%A9")
    );
    parts.uri = http::Uri::from_maybe_shared("/api/v1/pods?q=é").unwrap();
    assert_eq!(code(apply(&parts, &jane())), 400);
}

#[test]
fn a_long_target_is_judged_like_any_other() {
    let mut parts = head("POST", "/", &[]);
    for (path, expected) in [
        ("/api/v1/namespaces/a/pods/b/exec", 200),
        ("/api/v1/namespaces/a/../b/pods/b/exec", 400),
    ] {
        let long = format!("{path}?command={}", "a".repeat(1 << 20));
        let target: Target = long.parse().unwrap();
        parts.extensions.insert(target);
        assert_eq!(code(apply(&parts, &jane())), expected);
        if let Ok(forward) = apply(&parts, &jane()) {
            assert!(forward.target.as_str() == long);
        }
    }
}

#[test]
fn bearer_subprotocols_are_taken_out_and_others_stay_verbatim() {
    let protocols = |values: &[&str]| {
        let headers: Vec<_> = values
            .iter()
            .map(|value| ("sec-websocket-protocol", *value))
            .collect();
        let forward = get(&headers).unwrap();
        all(&forward.headers, "sec-websocket-protocol")
            .into_iter()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let bearer = "base64url.bearer.authorization.k8s.io.dG9rZW4";
    assert_eq!(
        protocols(&["v5.channel.k8s.io,  v4.channel.k8s.io"]),
        ["v5.channel.k8s.io,  v4.channel.k8s.io"]
    );
    assert_eq!(
        protocols(&[&format!("v5.channel.k8s.io, {bearer}")]),
        ["v5.channel.k8s.io"]
    );
    assert_eq!(
        protocols(&[&format!("{bearer},v4.channel.k8s.io"), "binary.k8s.io"]),
        ["v4.channel.k8s.io", "binary.k8s.io"]
    );
    assert!(protocols(&[bearer]).is_empty());
    assert!(protocols(&[&bearer.to_uppercase()]).is_empty());
}

#[test]
fn framing_with_two_readings_is_refused() {
    for headers in [
        &[("content-length", "5"), ("transfer-encoding", "chunked")][..],
        &[("content-length", "5"), ("content-length", "5")],
        &[("content-length", "5"), ("content-length", "6")],
        &[("content-length", "+5")],
        &[("content-length", "5, 5")],
        &[("content-length", "")],
        &[("content-length", "0x5")],
        &[("transfer-encoding", "gzip, chunked")],
        &[
            ("transfer-encoding", "chunked"),
            ("transfer-encoding", "chunked"),
        ],
        &[("transfer-encoding", "xchunked")],
        &[("transfer-encoding", "identity")],
        &[("host", "a"), ("host", "b")],
    ] {
        assert_eq!(
            code(apply(&head("POST", "/api/v1/pods", headers), &jane())),
            400,
            "{headers:?}"
        );
    }
    assert_eq!(
        code(apply(
            &head("POST", "/api", &[("transfer-encoding", "chunked")]),
            &jane()
        )),
        200
    );
    assert_eq!(
        code(apply(
            &head("POST", "/api", &[("content-length", "5")]),
            &jane()
        )),
        200
    );
    let mut old = head("POST", "/api", &[("transfer-encoding", "chunked")]);
    old.version = Version::HTTP_10;
    assert_eq!(code(apply(&old, &jane())), 400);
}

#[test]
fn methods_about_connections_do_not_pass() {
    for method in ["CONNECT", "TRACE"] {
        assert_eq!(code(apply(&head(method, "/api", &[]), &jane())), 405);
    }
    for method in ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"] {
        assert_eq!(code(apply(&head(method, "/api", &[]), &jane())), 200);
    }
}

#[test]
fn paths_with_two_readings_are_refused() {
    for path in [
        "//api/v1",
        "/api//v1/pods",
        "/api/v1/namespaces/a/../b/pods",
        "/api/v1/./pods",
        "/api/v1/%2e%2e/pods",
        "/api/v1/.%2E/pods",
        "/api/v1/namespaces/a%2fpods/b",
        "/api/v1/namespaces/a%5cb",
        "/api/v1/namespaces/a\\b",
        "/api/v1/%252e%252e/pods",
        "/api/v1/pods%00",
        "/api/v1/pods%0d%0aX:y",
        "/api/v1/pods%7f",
        "/api/v1/pods%",
        "/api/v1/pods%g0",
        "/api/v1/namespaces/a/pods/../proxy/x",
        "/api/v1/namespaces/../pods/b/proxy/x",
        "/apis/x/v1/namespaces/a/pods/b/proxy/../c",
        "/api/v1/namespaces/a/secrets/b/proxy/../c",
        "/proxy/../api",
        "/.",
        "/..",
        "http://elsewhere/api",
        "*",
    ] {
        assert_eq!(code(apply(&head("GET", path, &[]), &jane())), 400, "{path}");
    }
}

#[test]
fn the_bytes_of_a_good_path_are_forwarded_as_they_came() {
    for path in [
        "/",
        "/api",
        "/apis/",
        "/api/v1/namespaces/a/pods?limit=500&labelSelector=a%2Fb%3Dc%252e",
        "/apis/rbac.authorization.k8s.io/v1/clusterroles/system%3Anode",
        "/api/v1/nodes/n:1",
        "/openapi/v3/apis/apps/v1?hash=AB%2F..",
        "/api/v1/namespaces/a/pods/b/proxy",
        "/api/v1/namespaces/a/pods/b/proxy/",
        "/api/v1/namespaces/a/services/https:b:http/proxy//x/../%2e%2e/%2f?y=../z",
        "/api/v1/nodes/n/proxy/../x",
        "/api/v1/namespaces/a/pods/b/exec?command=sh&command=-c&command=echo%20..%2F",
    ] {
        let forward = apply(&head("GET", path, &[]), &jane()).unwrap();
        assert_eq!(forward.target.as_str(), path);
    }
}

#[test]
fn http2_has_its_authority_apart() {
    let mut parts = head("GET", "https://ignored.example/api/v1/pods?x=1", &[]);
    parts.version = Version::HTTP_2;
    let forward = apply(&parts, &jane()).unwrap();
    assert_eq!(forward.target.as_str(), "/api/v1/pods?x=1");
    assert!(forward.headers.get(HOST).is_none());
}

#[test]
fn http2_has_a_path_even_where_a_query_follows() {
    for target in ["https://cluster.example?x=1", "https://cluster.example?"] {
        let mut parts = head("GET", target, &[]);
        parts.version = Version::HTTP_2;
        assert_eq!(code(apply(&parts, &jane())), 400, "{target}");
    }
    // Without either the target is "/", which is what `http` makes of it and HTTP/2 asks for.
    let mut parts = head("GET", "https://cluster.example", &[]);
    parts.version = Version::HTTP_2;
    assert_eq!(apply(&parts, &jane()).unwrap().target.as_str(), "/");
}

#[test]
fn an_upgrade_is_one_only_if_both_headers_say_so() {
    let kind =
        |headers: &[(&str, &str)]| get(headers).map(|forward| (forward.kind, forward.headers));
    for protocol in ["websocket", "SPDY/3.1", "WebSocket", "spdy/3.1"] {
        let (kind, headers) = kind(&[
            ("connection", "keep-alive, Upgrade"),
            ("upgrade", protocol),
            ("x-stream-protocol-version", "v5.channel.k8s.io"),
            ("x-stream-protocol-version", "v4.channel.k8s.io"),
        ])
        .unwrap();
        assert_eq!(
            kind,
            Kind::Upgrade(HeaderValue::from_str(protocol).unwrap())
        );
        assert_eq!(all(&headers, "upgrade"), [protocol]);
        assert_eq!(all(&headers, "connection"), ["Upgrade"]);
        assert_eq!(
            all(&headers, "x-stream-protocol-version"),
            ["v5.channel.k8s.io", "v4.channel.k8s.io"]
        );
    }
    for headers in [
        &[("upgrade", "websocket")][..],
        &[("connection", "upgrade")],
        &[("connection", "upgrade"), ("upgrade", "h2c")],
        &[("connection", "upgrade"), ("upgrade", "websocket, h2c")],
        &[
            ("connection", "upgrade"),
            ("upgrade", "websocket"),
            ("upgrade", "h2c"),
        ],
        &[
            ("connection", "upgrade, http2-settings"),
            ("upgrade", "h2c"),
            ("http2-settings", "x"),
        ],
    ] {
        let (kind, kept) = kind(headers).unwrap();
        assert_eq!(kind, Kind::Plain, "{headers:?}");
        assert!(kept.get("upgrade").is_none() && kept.get("http2-settings").is_none());
    }
    let with_body = [
        ("connection", "upgrade"),
        ("upgrade", "SPDY/3.1"),
        ("content-length", "10"),
    ];
    assert_eq!(code(get(&with_body)), 400);
    let empty = [
        ("connection", "upgrade"),
        ("upgrade", "SPDY/3.1"),
        ("content-length", "0"),
    ];
    assert_eq!(code(get(&empty)), 200);
}

/// Names that matter, in any case, and names that do not.
fn any_name() -> impl Strategy<Value = String> {
    prop_oneof![
        "(?i)(remote[-_]user|x[-_]client[-_]cert|audit-id|impersonate-(user|group|uid|extra-[a-z%]{1,6})|x-remote-(user|group|extra-a)|authorization|cookie)",
        "(?i)(connection|upgrade|te|trailer|transfer-encoding|content-length|host|proxy-[a-z]{1,5})",
        "(?i)(x-forwarded-[a-z]{1,5}|forwarded|sec-websocket-protocol|impersonate_user|x_a)",
        "[a-zA-Z][a-zA-Z0-9_%-]{0,12}",
    ]
}

fn any_value() -> impl Strategy<Value = String> {
    prop_oneof![
        "[ -~]{0,24}",
        "(?i)(upgrade|close|keep-alive|impersonate-user|content-length)(, ?(x-a|host|te))?",
        Just("base64url.bearer.authorization.k8s.io.x, v4.channel.k8s.io".to_owned()),
    ]
}

proptest! {
    /// For any request of a client: the forwarded head has exactly the certificate's identity, and no header
    /// of a connection but those of an upgrade that was decided on.
    #[test]
    fn no_request_speaks_for_another(
        sent in proptest::collection::vec((any_name(), any_value()), 0..8),
        path in "/[ -~]{0,40}",
    ) {
        let mut parts = head("GET", "/api", &[]);
        if let Ok(uri) = path.parse() { parts.uri = uri; }
        for (name, value) in &sent {
            if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(name.as_bytes()), HeaderValue::from_str(value)) {
                parts.headers.append(name, value);
            }
        }
        let Ok(forward) = apply(&parts, &jane()) else { return Ok(()) };
        prop_assert_eq!(all(&forward.headers, "impersonate-user"), ["jane@example.com"]);
        prop_assert_eq!(all(&forward.headers, "impersonate-group"), ["dev", "ops, night"]);
        for name in forward.headers.keys() {
            let name = name.as_str();
            prop_assert!(!name.contains('_'), "{}", name);
            prop_assert!(!name.starts_with("x-remote-") && !name.starts_with("proxy-"), "{}", name);
            prop_assert!(!["authorization", "cookie", "host", "te", "trailer", "transfer-encoding"].contains(&name));
            prop_assert!(!name.starts_with("remote-") && !name.starts_with("x-client-cert"), "{}", name);
            if name.starts_with("impersonate-") {
                let ours = ["impersonate-user", "impersonate-group", "impersonate-extra-throwline.dev%2fcredential-id"];
                prop_assert!(ours.contains(&name), "{}", name);
            }
        }
        prop_assert_eq!(forward.headers.contains_key("upgrade"), forward.kind != Kind::Plain);
        for value in forward.headers.get_all("sec-websocket-protocol") {
            // Not always ASCII: a Kelvin sign, say, is a letter k to the generator.
            prop_assert!(!String::from_utf8_lossy(value.as_bytes()).contains("bearer.authorization"));
        }
        prop_assert_eq!(forward.target.as_str(), parts.uri.path_and_query().unwrap().as_str());
        // Decided once, it is decided the same again.
        prop_assert!(apply(&parts, &jane()).is_ok());
    }

    #[test]
    fn no_path_panics_or_climbs(path in "/([a-z]{0,3}|api|v1|namespaces|pods|nodes|proxy|\\.|\\.\\.|%2[ef]|%[0-9a-f]{0,2}|/){0,12}") {
        let Ok(uri) = path.parse::<http::Uri>() else { return Ok(()) };
        let mut parts = head("GET", "/", &[]);
        parts.uri = uri;
        if apply(&parts, &jane()).is_ok() && !path.contains("/proxy") {
            prop_assert!(!path.split('/').any(|segment| matches!(segment, "." | "..")));
            prop_assert!(!path.contains("//") && !path.contains("%2f"));
        }
    }
}

//! The agent's rules on any request head: what is forwarded bears our identity and no other.
#![no_main]

use http::{HeaderName, HeaderValue, Method, Request, Version};
use libfuzzer_sys::fuzz_target;
use throwline_policy::rules::{User, apply};

fuzz_target!(|data: &[u8]| {
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let mut parsed = httparse::Request::new(&mut headers);
    // Lenient on purpose: the rules must not lean on their parser.
    if !matches!(parsed.parse(data), Ok(httparse::Status::Complete(_))) {
        return;
    }
    let (Some(method), Some(path)) = (parsed.method, parsed.path) else {
        return;
    };
    let Ok(method) = Method::from_bytes(method.as_bytes()) else {
        return;
    };
    let version = if parsed.version == Some(0) {
        Version::HTTP_2
    } else {
        Version::HTTP_11
    };
    let Ok(mut request) = Request::builder()
        .method(method)
        .uri(path)
        .version(version)
        .body(())
    else {
        return;
    };
    for header in parsed.headers.iter() {
        let (Ok(name), Ok(value)) = (
            HeaderName::from_bytes(header.name.as_bytes()),
            HeaderValue::from_bytes(header.value),
        ) else {
            return;
        };
        request.headers_mut().append(name, value);
    }
    let user = User {
        name: "dana".to_owned(),
        groups: vec!["devs".to_owned(), "masters-not".to_owned()],
        ..User::default()
    };
    let Ok(forward) = apply(&request.into_parts().0, &user) else {
        return;
    };
    let all = |name: &str| -> Vec<_> {
        forward
            .headers
            .get_all(name)
            .iter()
            .map(|value| value.as_bytes())
            .collect()
    };
    assert_eq!(all("impersonate-user"), [b"dana".as_slice()]);
    assert_eq!(
        all("impersonate-group"),
        [b"devs".as_slice(), b"masters-not"]
    );
    // Behind the proxy subresource a workload reads what the API server may not.
    let for_workload = forward.target.is_workload();
    for name in forward.headers.keys() {
        let name = name.as_str();
        let ours = matches!(name, "impersonate-user" | "impersonate-group");
        assert!(
            ours || !name.starts_with("impersonate-"),
            "{name} is forwarded"
        );
        assert!(
            for_workload || !name.contains('_') && name != "cookie",
            "{name} is forwarded"
        );
        let dashed = name.replace('_', "-");
        assert!(
            ours || !dashed.starts_with("impersonate-"),
            "{name} is forwarded"
        );
        assert!(!dashed.starts_with("x-remote-"), "{name} is forwarded");
        assert!(
            !matches!(&*dashed, "authorization" | "proxy-authorization"),
            "{name} is forwarded"
        );
    }
    let target = forward.target.as_str();
    assert!(
        target.starts_with('/') && !target.starts_with("//"),
        "{target} is forwarded"
    );
});

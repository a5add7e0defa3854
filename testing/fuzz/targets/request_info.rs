//! Both readings of a request: neither panics, and where the strict one accepts, the tolerant one agrees.
#![no_main]

use http::Method;
use libfuzzer_sys::fuzz_target;
use throwline_kube_wire::RequestInfo;
use throwline_kube_wire::audit::AuditAttributes;

fuzz_target!(|data: &[u8]| {
    let mut parts = data.splitn(2, |byte| *byte == b' ');
    let (Some(method), Some(target)) = (parts.next(), parts.next()) else {
        return;
    };
    let (Ok(method), Ok(target)) = (Method::from_bytes(method), std::str::from_utf8(target)) else {
        return;
    };
    let (path, query) = match target.split_once('?') {
        Some((path, query)) => (path, Some(query)),
        None => (target, None),
    };
    let tolerant = AuditAttributes::of(&method, target);
    let Ok(strict) = RequestInfo::parse(&method, path, query) else {
        return;
    };
    assert_eq!(strict.verb, tolerant.verb, "{method} {target}");
    assert_eq!(strict.object, tolerant.object, "{method} {target}");
    assert_eq!(
        strict.effective_verb(),
        tolerant.effective_verb(),
        "{method} {target}"
    );
    // What is read once more means the same.
    let Some(object) = strict.object else {
        assert!(strict.path.starts_with('/') && !strict.path.contains("//"));
        return;
    };
    assert!(!object.resource.is_empty() && !object.api_version.is_empty());
    for part in [&object.resource, &object.namespace, &object.subresource] {
        assert!(!part.contains(['/', '%', '\\']), "{part:?} of {target}");
    }
});

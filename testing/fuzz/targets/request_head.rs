//! The head of an HTTP/1.1 request: whatever passes has one reading.
#![no_main]

use libfuzzer_sys::fuzz_target;
use throwline_kube_wire::http1::head::{Head, end_of_head};
use throwline_kube_wire::http1::target::Target;

fuzz_target!(|data: &[u8]| {
    let Some(end) = end_of_head(data, 0) else {
        return;
    };
    let bytes = &data[..end];
    let Ok(head) = Head::read(bytes, |raw| raw.len().min(9)) else {
        return;
    };
    // There is no bare line feed, which the next parser might read as an end.
    for at in 0..end {
        assert!(
            bytes[at] != b'\n' || bytes[at - 1] == b'\r',
            "a bare line feed passed"
        );
    }
    let (from, to) = head.target_at;
    assert_eq!(bytes[from - 1], b' ');
    assert!(bytes[to..].starts_with(b" HTTP/1."));
    let target = head.target.as_str();
    assert!(target.starts_with('/') && target.bytes().all(|byte| byte.is_ascii_graphic()));
    assert!(Target::read(target.as_bytes(), to - from).is_ok() || target.len() > to - from);
});

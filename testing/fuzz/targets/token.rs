//! Enrolment tokens, as people paste them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use throwline_certs::EnrolmentToken;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    if let Ok(token) = text.parse::<EnrolmentToken>() {
        let printed = token.to_string();
        let again: EnrolmentToken = printed.parse().expect("our own token");
        assert_eq!(again.to_string(), printed);
        assert!(
            !format!("{token:?}").contains(printed.trim_start_matches("tl1.")),
            "a secret is shown"
        );
    }
});

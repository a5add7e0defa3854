//! Identity rules: the API server sees the user of the verified certificate, and only that.

use http::{HeaderMap, HeaderName, HeaderValue};

use super::Refusal;
use super::headers::is_identity;

/// Who asks, as read from the certificate of the sealed session.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct User {
    pub name: String,
    pub groups: Vec<String>,
    /// The fingerprint of the certificate, which goes into the cluster's own audit as an extra;
    /// `None` sends no extra (the agent's account then needs no right on `userextras`).
    pub credential: Option<String>,
}

const USER: HeaderName = HeaderName::from_static("impersonate-user");
const GROUP: HeaderName = HeaderName::from_static("impersonate-group");
const CREDENTIAL: HeaderName =
    HeaderName::from_static("impersonate-extra-throwline.dev%2fcredential-id");

/// The name of the extra, as it appears in audits and in RBAC (`userextras/…`).
pub(crate) const CREDENTIAL_EXTRA: &str = "throwline.dev/credential-id";

/// Refuses a client's own impersonation: it would be checked against the agent's rights, which are
/// those of everyone together.
pub(super) fn refuse_impersonation(headers: &HeaderMap, user: &User) -> Result<(), Refusal> {
    if headers
        .keys()
        .any(|name| name.as_str().starts_with("impersonate-"))
    {
        return Err(Refusal::forbidden(format!(
            "--as, --as-group and --as-uid are not available through throwline yet: the agent itself acts as \"{}\" \
             and cannot check whether that user may act as someone else",
            user.name
        )));
    }
    Ok(())
}

/// Sets the identity; nothing of an earlier one remains.
pub(super) fn set(headers: &mut HeaderMap, user: &User) -> Result<(), Refusal> {
    let stale: Vec<HeaderName> = headers
        .keys()
        .filter(|name| is_identity(name.as_str()))
        .cloned()
        .collect();
    for name in stale {
        headers.remove(name);
    }
    if user.name.is_empty() {
        return Err(Refusal::forbidden(
            "the session's certificate names no user",
        ));
    }
    if user.groups.iter().any(|group| group == "system:masters") {
        return Err(Refusal::forbidden(
            "the group \"system:masters\" does not pass through throwline, because it is above the cluster's RBAC; \
             enrol the user with a group of your own and bind that one",
        ));
    }
    headers.insert(USER, value("name", &user.name)?);
    for group in &user.groups {
        headers.append(GROUP, value("group", group)?);
    }
    if let Some(credential) = &user.credential {
        headers.insert(CREDENTIAL, value("credential", credential)?);
    }
    Ok(())
}

/// A header value that reads back as the same text: no controls, no white space that is trimmed.
fn value(what: &str, text: &str) -> Result<HeaderValue, Refusal> {
    let clean = !text.is_empty() && text.trim() == text && !text.chars().any(char::is_control);
    clean
        .then(|| HeaderValue::from_bytes(text.as_bytes()).ok())
        .flatten()
        .ok_or_else(|| {
            Refusal::forbidden(format!(
                "the session's certificate has a {what} that cannot be passed on"
            ))
        })
}

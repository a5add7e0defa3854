//! Identity rules: the API server sees the user of the verified certificate, and only that.

use http::{HeaderMap, HeaderName, HeaderValue};
use throwline_kube_wire::Status;

use crate::system_names::{AUTHENTICATED, SystemNames};

use super::headers::{is_identity, is_impersonation};

/// The user of a request, as read from the certificate of the sealed session.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct User {
    /// The name of the certificate.
    pub name: String,
    /// The groups of the certificate.
    pub groups: Vec<String>,
    /// The fingerprint of the certificate, which goes into the cluster's own audit as an extra;
    /// `None` sends no extra (the agent's account then needs no right on `userextras`).
    pub credential: Option<String>,
    /// Of Kubernetes' own names, those that may pass. By default none.
    pub system_names: SystemNames,
}

const USER: HeaderName = HeaderName::from_static("impersonate-user");
const GROUP: HeaderName = HeaderName::from_static("impersonate-group");
const CREDENTIAL: HeaderName =
    HeaderName::from_static("impersonate-extra-throwline.dev%2fcredential-id");

/// The name of the extra, as it appears in audits and in RBAC (`userextras/…`).
pub const CREDENTIAL_EXTRA: &str = "throwline.dev/credential-id";

/// Refuses a client's own impersonation: it would be checked against the agent's rights, which are
/// those of everyone together.
pub(super) fn refuse_impersonation(headers: &HeaderMap, user: &User) -> Result<(), Status> {
    if headers.keys().any(|name| is_impersonation(name.as_str())) {
        return Err(Status::forbidden(format!(
            "--as, --as-group and --as-uid are not available through throwline yet: the agent itself acts as \"{}\" \
             and cannot check whether that user may act as someone else",
            user.name
        )));
    }
    Ok(())
}

/// Sets the identity; nothing of an earlier one remains.
pub(super) fn set(headers: &mut HeaderMap, user: &User) -> Result<(), Status> {
    let stale: Vec<HeaderName> = headers
        .keys()
        .filter(|name| is_identity(name.as_str()))
        .cloned()
        .collect();
    for name in stale {
        headers.remove(name);
    }
    if user.name.is_empty() {
        return Err(Status::forbidden("the session's certificate names no user"));
    }
    // Asked again although the authority does: the agent's cluster must not depend on it.
    user.system_names
        .check(&user.name, &user.groups)
        .map_err(|error| Status::forbidden(error.to_string()))?;
    headers.insert(USER, value("name", &user.name)?);
    // The API server adds this one itself, and would otherwise ask for a right to it.
    for group in user.groups.iter().filter(|group| *group != AUTHENTICATED) {
        headers.append(GROUP, value("group", group)?);
    }
    if let Some(credential) = &user.credential {
        headers.insert(CREDENTIAL, value("credential", credential)?);
    }
    Ok(())
}

/// A header value that reads back as the same text: no controls, no white space that is trimmed.
fn value(what: &str, text: &str) -> Result<HeaderValue, Status> {
    let clean = !text.is_empty() && text.trim() == text && !text.chars().any(char::is_control);
    clean
        .then(|| HeaderValue::from_bytes(text.as_bytes()).ok())
        .flatten()
        .ok_or_else(|| {
            Status::forbidden(format!(
                "the session's certificate has a {what} that cannot be passed on"
            ))
        })
}

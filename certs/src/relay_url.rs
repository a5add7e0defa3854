//! The rules for a relay's public URL.

use url::Url;

/// Why a URL is not a relay's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RelayUrlError {
    /// The text is not a URL.
    #[error(transparent)]
    Malformed(#[from] url::ParseError),
    /// Another scheme, or no host.
    #[error("{0} is not an https:// address with a host")]
    NotHttps(Box<Url>),
    /// It would be in every token.
    #[error("it holds a user name or password")]
    Credentials,
    /// Paths are appended to it.
    #[error("{0} has a query or fragment")]
    Query(Box<Url>),
}

/// A public URL of a relay is `https://` (or `http://`), a host, perhaps a port and a path.
///
/// # Errors
/// The rule that the URL breaks.
pub fn check_relay_url(url: &Url) -> Result<(), RelayUrlError> {
    if !matches!(url.scheme(), "https" | "http") || url.host().is_none() {
        return Err(RelayUrlError::NotHttps(Box::new(url.clone())));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(RelayUrlError::Credentials);
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(RelayUrlError::Query(Box::new(url.clone())));
    }
    Ok(())
}

//! Names: `spiffe://DOMAIN/cluster/NAME`, `/user/NAME`, `/relay/INSTANCE`.
//!
//! Parsing is strict and printing is its inverse: a name has exactly one spelling, so that names
//! can be compared as strings in routes, grants and logs.

use std::{fmt, str::FromStr};
use url::{Host, Url};

/// RFC 1123, and what a Kubernetes label holds.
const MAX_CLUSTER: usize = 63;
/// Long enough for an e-mail address of a large organisation.
const MAX_USER: usize = 128;
/// The SPIFFE specification's limit.
const MAX_DOMAIN: usize = 255;
/// Both bounds keep a user's certificate small enough for an HTTP header: 1 KiB of names in 64
/// attributes costs about 2 KiB of DER.
const MAX_GROUPS: usize = 64;
const MAX_GROUPS_BYTES: usize = 1024;

/// A name that may not be used, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct NameError(pub String);

/// Whom a certificate names: one domain is one authority.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(String);

/// What kind of part a name belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    Cluster,
    User,
    Relay,
}

/// A part's name, unique in its trust domain.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    domain: TrustDomain,
    kind: Kind,
    name: String,
}

impl TrustDomain {
    /// The host of the relay's public URL, in the characters that SPIFFE allows.
    pub fn from_url(url: &Url) -> Result<Self, NameError> {
        match url.host() {
            Some(Host::Domain(name)) => name.trim_end_matches('.').parse(),
            Some(Host::Ipv4(address)) => address.to_string().parse(),
            Some(Host::Ipv6(address)) => {
                let groups = address.segments().map(|group| format!("{group:x}"));
                format!("ip6-{}", groups.join("-")).parse()
            }
            None => Err(NameError(format!("the URL {url} has no host"))),
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for TrustDomain {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let allowed = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'_');
        if text.is_empty() || text.len() > MAX_DOMAIN || !text.bytes().all(allowed) {
            return Err(NameError(format!(
                "{text:?} is not a trust domain: 1 to {MAX_DOMAIN} of a-z, 0-9, '.', '-' and '_'"
            )));
        }
        Ok(Self(text.to_owned()))
    }
}

impl Kind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cluster => "cluster",
            Self::User => "user",
            Self::Relay => "relay",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Kind {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        match text {
            "cluster" => Ok(Self::Cluster),
            "user" => Ok(Self::User),
            "relay" => Ok(Self::Relay),
            _ => Err(NameError(format!("{text:?} is not a kind of identity"))),
        }
    }
}

impl SpiffeId {
    pub fn new(domain: TrustDomain, kind: Kind, name: &str) -> Result<Self, NameError> {
        match kind {
            Kind::User => check_user_name(name)?,
            Kind::Cluster | Kind::Relay => check_label(kind, name)?,
        }
        Ok(Self {
            domain,
            kind,
            name: name.to_owned(),
        })
    }

    pub fn domain(&self) -> &TrustDomain {
        &self.domain
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    pub fn name(&self) -> &str {
        &self.name
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/{}/{}", self.domain, self.kind, self.name)
    }
}

impl FromStr for SpiffeId {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let parts = text.strip_prefix("spiffe://").and_then(|rest| {
            let (domain, rest) = rest.split_once('/')?;
            let (kind, name) = rest.split_once('/')?;
            Some((domain, kind, name))
        });
        let Some((domain, kind, name)) = parts else {
            return Err(NameError(format!(
                "{text:?} is not of the form spiffe://DOMAIN/KIND/NAME"
            )));
        };
        Self::new(domain.parse()?, kind.parse()?, name)
    }
}

/// A DNS label of RFC 1123: 1 to 63 of a-z, 0-9 and '-', beginning and ending without '-'.
pub fn check_cluster_name(name: &str) -> Result<(), NameError> {
    check_label(Kind::Cluster, name)
}

/// The same for a relay's instance.
pub fn check_relay_instance(name: &str) -> Result<(), NameError> {
    check_label(Kind::Relay, name)
}

/// 1 to 128 of A-Z, a-z, 0-9, '.', '_', '-', '@' and ':', beginning with a letter or digit.
///
/// The colon is there because the user of a cluster may be called `system:admin`.
pub fn check_user_name(name: &str) -> Result<(), NameError> {
    let allowed =
        |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-' | b'@' | b':');
    let begins_well = name
        .bytes()
        .next()
        .is_some_and(|byte| byte.is_ascii_alphanumeric());
    if begins_well && name.len() <= MAX_USER && name.bytes().all(allowed) {
        return Ok(());
    }
    Err(NameError(format!(
        "{name:?} is not a user's name: 1 to {MAX_USER} of letters, digits and . _ - @ : \
         that begin with a letter or digit"
    )))
}

/// At most 64 groups, 1024 bytes in all, without control characters or commas.
pub fn check_groups(groups: &[String]) -> Result<(), NameError> {
    if groups.len() > MAX_GROUPS {
        return Err(NameError(format!(
            "{} groups are more than the {MAX_GROUPS} that a certificate may hold",
            groups.len()
        )));
    }
    if groups.iter().map(String::len).sum::<usize>() > MAX_GROUPS_BYTES {
        return Err(NameError(format!(
            "the names of the groups have more than {MAX_GROUPS_BYTES} bytes in all"
        )));
    }
    for group in groups {
        let bad = |c: char| c.is_control() || matches!(c, ',' | '\u{2028}' | '\u{2029}');
        if group.is_empty() || group.trim() != group || group.contains(bad) {
            return Err(NameError(format!(
                "{group:?} is not a group's name: it may not be empty, begin or end with a space, \
                 or hold commas or control characters"
            )));
        }
    }
    Ok(())
}

fn check_label(kind: Kind, name: &str) -> Result<(), NameError> {
    let allowed = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-');
    let inner = !name.starts_with('-') && !name.ends_with('-');
    if !name.is_empty() && name.len() <= MAX_CLUSTER && inner && name.bytes().all(allowed) {
        return Ok(());
    }
    Err(NameError(format!(
        "{name:?} is not a {kind}'s name: 1 to {MAX_CLUSTER} of a-z, 0-9 and '-', \
         not beginning or ending with '-'"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn printing_is_the_inverse_of_parsing(
            domain in "[a-z0-9._-]{1,40}",
            user in "[A-Za-z0-9][A-Za-z0-9._@:-]{0,60}",
            cluster in "[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?",
        ) {
            let domain: TrustDomain = domain.parse().unwrap();
            for (kind, name) in [(Kind::User, &user), (Kind::Cluster, &cluster), (Kind::Relay, &cluster)] {
                let id = SpiffeId::new(domain.clone(), kind, name).unwrap();
                prop_assert_eq!(id.to_string().parse::<SpiffeId>().unwrap(), id);
            }
        }

        #[test]
        fn what_parses_has_one_spelling(text in "(spiffe://)?[ -~]{0,20}/(cluster|user|Cluster)/[ -~]{0,20}") {
            if let Ok(id) = text.parse::<SpiffeId>() {
                prop_assert_eq!(id.to_string(), text);
            }
        }

        #[test]
        fn nothing_panics(text in any::<String>()) {
            let _ = text.parse::<SpiffeId>();
            let _ = check_groups(&[text]);
        }
    }

    #[test]
    fn refuses_what_could_be_read_in_two_ways() {
        for bad in [
            "",
            "spiffe://",
            "spiffe://d/cluster",
            "spiffe://d/cluster/",
            "spiffe://D/cluster/a",
            "SPIFFE://d/cluster/a",
            "spiffe://d/cluster/a/b",
            "spiffe://d/cluster/a?x",
            "spiffe://d/cluster/A",
            "spiffe://d/cluster/-a",
            "spiffe://d/user/..",
            "spiffe://d/user/a%2fb",
            "spiffe://d/user/a b",
            "spiffe://d/user/a\n",
            "spiffe://d:1/user/a",
            "spiffe://u@d/user/a",
            "spiffe://d/admin/a",
        ] {
            assert!(bad.parse::<SpiffeId>().is_err(), "{bad}");
        }
        assert!(check_cluster_name(&"a".repeat(63)).is_ok());
        assert!(check_cluster_name(&"a".repeat(64)).is_err());
        assert!(check_user_name(&"a".repeat(129)).is_err());
    }

    #[test]
    fn groups_are_bounded() {
        let groups = |names: &[&str]| {
            names
                .iter()
                .map(|&name| name.to_owned())
                .collect::<Vec<_>>()
        };
        check_groups(&groups(&["system:authenticated", "oidc:team/a b"])).unwrap();
        for bad in ["", " a", "a\r\nb", "a,b", "a\u{2028}", "a\u{1b}[0m"] {
            assert!(check_groups(&groups(&[bad])).is_err(), "{bad:?}");
        }
        assert!(check_groups(&vec!["g".to_owned(); 65]).is_err());
        assert!(check_groups(&["g".repeat(1025)]).is_err());
    }

    #[test]
    fn the_domain_comes_from_the_host() {
        for (url, domain) in [
            ("https://Relay.Example.com:8443/x", "relay.example.com"),
            ("https://127.0.0.1:1", "127.0.0.1"),
            ("https://[::1]:1", "ip6-0-0-0-0-0-0-0-1"),
        ] {
            assert_eq!(
                TrustDomain::from_url(&Url::parse(url).unwrap())
                    .unwrap()
                    .as_str(),
                domain
            );
        }
    }
}

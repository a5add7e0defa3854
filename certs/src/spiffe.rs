//! Names: `spiffe://DOMAIN/cluster/NAME`, `/user/NAME`, `/relay/INSTANCE`.
//!
//! Parsing is strict and printing is its inverse: a name has exactly one spelling, so that names
//! can be compared as strings in routes, grants and logs. A user's name may hold what identity providers
//! put into names (`https://idp/realm#dana`, `CORP\dana`); in the URI it is one segment, in which every byte
//! but letters, digits and `. _ - @ :` is percent-encoded with upper-case digits (RFC 3986, section 2.1).

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use std::{borrow::Cow, fmt, str::FromStr};
use url::{Host, Url};

/// RFC 1123, and what a Kubernetes label holds.
const MAX_CLUSTER: usize = 63;
/// Bytes of UTF-8: long enough for an ARN of a role's session.
const MAX_USER: usize = 192;
/// The same in the URI, whose length counts against the headers of a carrier.
const MAX_USER_ENCODED: usize = 384;
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
    /// The agent of a cluster.
    Cluster,
    /// A user of the local proxy.
    User,
    /// One instance of a relay.
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
    ///
    /// # Errors
    /// The host is not a valid trust domain.
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

    /// The domain as text.
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
    /// The word in the path of the id.
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
    /// The id `spiffe://DOMAIN/KIND/NAME`.
    ///
    /// # Errors
    /// The name is not valid for this kind.
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

    /// The trust domain.
    pub fn domain(&self) -> &TrustDomain {
        &self.domain
    }

    /// The kind.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The name, decoded.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = utf8_percent_encode(&self.name, ENCODED);
        write!(f, "spiffe://{}/{}/{name}", self.domain, self.kind)
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
        let kind = kind.parse()?;
        // Only users' names are percent-encoded; for the others the check of the name rejects the
        // `%`.
        let id = match (kind, decode(name)) {
            (Kind::User, Some(name)) => Self::new(domain.parse()?, kind, &name)?,
            _ => Self::new(domain.parse()?, kind, name)?,
        };
        // Claims, logs and tables compare identities as text, so each has one spelling.
        if id.to_string() != text {
            return Err(NameError(format!(
                "{text:?} is not spelled as it would be printed, which is {:?}",
                id.to_string()
            )));
        }
        Ok(id)
    }
}

/// What of a name does not stand for itself in the URI.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'.')
    .remove(b'_')
    .remove(b'-')
    .remove(b'@')
    .remove(b':');

/// `None` for what is not UTF-8. A broken escape stays as it is, and is then spelled in another way.
fn decode(segment: &str) -> Option<Cow<'_, str>> {
    percent_decode_str(segment).decode_utf8().ok()
}

/// A DNS label of RFC 1123: 1 to 63 of a-z, 0-9 and '-', beginning and ending without '-'.
///
/// # Errors
/// The rule that `name` breaks.
pub fn check_cluster_name(name: &str) -> Result<(), NameError> {
    check_label(Kind::Cluster, name)
}

/// The same for a relay's instance.
///
/// # Errors
/// The rule that `name` breaks.
pub fn check_relay_instance(name: &str) -> Result<(), NameError> {
    check_label(Kind::Relay, name)
}

/// 1 to 192 bytes of UTF-8, at most 384 once percent-encoded, without control characters, characters that
/// cannot be seen or that change the direction of what follows, and white space but single spaces within.
/// It does not begin with `-`, and is not `.` or `..`.
///
/// Names are compared byte by byte, as Kubernetes compares them: `é` has two spellings in Unicode, which
/// are two names.
///
/// # Errors
/// The rule that `name` breaks.
pub fn check_user_name(name: &str) -> Result<(), NameError> {
    let bad = |why: &str| Err(NameError(format!("{name:?} is not a user's name: {why}")));
    if name.is_empty() {
        return bad("it is empty");
    }
    let encoded = utf8_percent_encode(name, ENCODED);
    let encoded: usize = encoded.map(str::len).sum();
    if name.len() > MAX_USER || encoded > MAX_USER_ENCODED {
        return Err(NameError(format!(
            "a user's name may have {MAX_USER} bytes, or {MAX_USER_ENCODED} percent-encoded; \
             this one has {} and {encoded}",
            name.len()
        )));
    }
    // It would be an option on a command line, or a relative segment of the URI's path.
    if name.starts_with('-') || name.bytes().all(|byte| byte == b'.') {
        return bad("it begins with '-', or is all dots");
    }
    let is_hidden = |c: char| c.is_control() || is_invisible(c) || (c.is_whitespace() && c != ' ');
    if name.contains(is_hidden) {
        return bad("it holds control characters, or some that cannot be seen");
    }
    if name.trim() != name || name.contains("  ") {
        return bad("it begins or ends with a space, or has two in a row");
    }
    Ok(())
}

/// Characters without a glyph of their own (Unicode's default-ignorable ones and the controls of writing
/// direction), by which two names could look the same, or a line of a log be read otherwise.
fn is_invisible(c: char) -> bool {
    matches!(
        c,
        '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}'..='\u{1160}' | '\u{17b4}'..='\u{17b5}'
            | '\u{180b}'..='\u{180f}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{3164}' | '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{ffa0}'
            | '\u{fff0}'..='\u{ffff}' | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}'
            | '\u{e0000}'..='\u{e0fff}'
    )
}

/// At most 64 groups, 1024 bytes in all, without control characters or commas.
///
/// # Errors
/// The rule that a group breaks.
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
            user in "[A-Za-z0-9](.?[A-Za-z0-9/\\\\#%?@é漢]){0,20}",
            cluster in "[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?",
        ) {
            let domain: TrustDomain = domain.parse().unwrap();
            for (kind, name) in [(Kind::User, &user), (Kind::Cluster, &cluster), (Kind::Relay, &cluster)] {
                let Ok(id) = SpiffeId::new(domain.clone(), kind, name) else {
                    prop_assert!(kind == Kind::User && check_user_name(name).is_err());
                    continue;
                };
                let text = id.to_string();
                prop_assert!(text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-@:/%".contains(&byte)), "{}", text);
                prop_assert_eq!(text.parse::<SpiffeId>().unwrap(), id);
            }
        }

        #[test]
        fn what_parses_has_one_spelling(text in "(spiffe://)?[ -~]{0,20}/(cluster|user|Cluster)/([ -~]|%[0-9A-Fa-f]{2}){0,20}") {
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
            "spiffe://d/user/a%61",
            "spiffe://d/user/%2E%2E",
            "spiffe://d/user/a%2",
            "spiffe://d/user/a%FF",
            "spiffe://d/user/a%00",
            "spiffe://d/user/a/b",
            "spiffe://d/user/é",
            "spiffe://d/cluster/%61",
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
    }

    #[test]
    fn users_have_the_names_that_their_providers_give_them() {
        for (name, segment) in [
            ("dana@example.com", "dana@example.com"),
            ("system:admin", "system:admin"),
            ("https://idp/realm#dana", "https:%2F%2Fidp%2Frealm%23dana"),
            ("CORP\\dana", "CORP%5Cdana"),
            (
                "arn:aws:sts::123456789012:assumed-role/Ops Team/dana",
                "arn:aws:sts::123456789012:assumed-role%2FOps%20Team%2Fdana",
            ),
            ("Jörg Müller", "J%C3%B6rg%20M%C3%BCller"),
            ("100%", "100%25"),
            ("CN=Dana,OU=Ops", "CN%3DDana%2COU%3DOps"),
        ] {
            let id = SpiffeId::new("d".parse().unwrap(), Kind::User, name).unwrap();
            assert_eq!(id.to_string(), format!("spiffe://d/user/{segment}"));
            let back: SpiffeId = id.to_string().parse().unwrap();
            assert_eq!(back.name(), name);
        }
        for bad in [
            "",
            " a",
            "a ",
            "a  b",
            "a\tb",
            "a\nb",
            "a\u{a0}b",
            "a\u{200b}",
            "a\u{202e}b",
            "a\u{7f}",
            "\u{feff}a",
            "-a",
            ".",
            "..",
            "a\u{85}b",
            "a\u{e0041}",
        ] {
            assert!(check_user_name(bad).is_err(), "{bad:?}");
        }
        assert!(check_user_name(&"a".repeat(192)).is_ok());
        assert!(check_user_name(&"a".repeat(193)).is_err());
        assert!(check_user_name(&"/".repeat(128)).is_ok());
        assert!(check_user_name(&"/".repeat(129)).is_err());
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

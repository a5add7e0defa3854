//! Who is asking: client certificates, bearer tokens, and impersonation on top of either.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Mutex, MutexGuard, PoisonError},
};

use http::{HeaderMap, header};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::{
    Cluster,
    rbac::{self, Review},
    request::{Attributes, decode},
    status::Failure,
};

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) name: String,
    pub(crate) uid: String,
    pub(crate) groups: Vec<String>,
    pub(crate) extra: BTreeMap<String, Vec<String>>,
}

impl User {
    pub(crate) fn named(name: &str, groups: &[String]) -> Self {
        let mut user = Self {
            name: name.to_owned(),
            groups: groups.to_vec(),
            ..Self::default()
        };
        user.join("system:authenticated");
        user
    }

    pub(crate) fn anonymous() -> Self {
        Self {
            name: "system:anonymous".to_owned(),
            groups: vec!["system:unauthenticated".to_owned()],
            ..Self::default()
        }
    }

    pub(crate) fn service_account(namespace: &str, name: &str) -> Self {
        Self::named(
            &format!("system:serviceaccount:{namespace}:{name}"),
            &[
                "system:serviceaccounts".to_owned(),
                format!("system:serviceaccounts:{namespace}"),
            ],
        )
    }

    pub(crate) fn to_json(&self) -> Value {
        let mut info = json!({"username": self.name, "groups": self.groups});
        if !self.uid.is_empty() {
            info["uid"] = json!(self.uid);
        }
        if !self.extra.is_empty() {
            info["extra"] = json!(self.extra);
        }
        info
    }

    fn join(&mut self, group: &str) {
        if !self.groups.iter().any(|one| one == group) {
            self.groups.push(group.to_owned());
        }
    }
}

/// The bearer tokens that are good, each with its user.
#[derive(Default)]
pub(crate) struct Tokens(Mutex<HashMap<String, User>>);

impl Tokens {
    pub(crate) fn issue(&self, user: User) -> String {
        let token = format!(
            "demo-{}{}",
            Uuid::new_v4().simple(),
            Uuid::new_v4().simple()
        );
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(token.clone(), user);
        token
    }

    fn find(&self, token: &str) -> Option<User> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(token)
            .cloned()
    }
}

/// The user of a request: the certificate's or the token's, or whom that user may impersonate.
pub(crate) fn authenticate(
    cluster: &Cluster,
    certificate: Option<&User>,
    headers: &HeaderMap,
    target: &Attributes,
) -> Result<User, Failure> {
    let user = match bearer(headers)? {
        // A certificate that was proven wins over a token, as in the API server's order.
        _ if certificate.is_some() => certificate.cloned().unwrap_or_default(),
        Some(token) => cluster
            .tokens
            .find(&token)
            .ok_or_else(Failure::unauthorized)?,
        None => User::anonymous(),
    };
    impersonate(cluster, user, headers, target)
}

fn bearer(headers: &HeaderMap) -> Result<Option<String>, Failure> {
    let Some(value) = headers.get(header::AUTHORIZATION) else {
        return Ok(None);
    };
    let value = value.to_str().map_err(|_| Failure::unauthorized())?;
    match value.split_once(' ') {
        Some((scheme, token))
            if scheme.eq_ignore_ascii_case("bearer") && !token.trim().is_empty() =>
        {
            Ok(Some(token.trim().to_owned()))
        }
        _ => Ok(None),
    }
}

const USER: &str = "impersonate-user";
const GROUP: &str = "impersonate-group";
const UID: &str = "impersonate-uid";
const EXTRA: &str = "impersonate-extra-";
const ACCOUNT: &str = "system:serviceaccount:";

/// What an identity in the headers consists of.
struct Wanted {
    name: String,
    groups: Vec<String>,
    uid: String,
    extra: BTreeMap<String, Vec<String>>,
}

/// The accounts that the verb `impersonate` let pass: for them it is asked first from then on, as a
/// real 1.36 does. (The real one also remembers for 10 s what the newer kind let pass; here each
/// request is asked about.)
#[derive(Default)]
pub(crate) struct Older(Mutex<HashSet<String>>);

impl Older {
    fn set(&self) -> MutexGuard<'_, HashSet<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn impersonate(
    cluster: &Cluster,
    user: User,
    headers: &HeaderMap,
    target: &Attributes,
) -> Result<User, Failure> {
    let values = |name: &str| -> Vec<String> {
        headers
            .get_all(name)
            .iter()
            .map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
            .collect()
    };
    let name = values(USER).into_iter().next().unwrap_or_default();
    let groups = values(GROUP);
    let uid = values(UID).into_iter().next().unwrap_or_default();
    let mut extra: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for header in headers
        .keys()
        .filter(|header| header.as_str().starts_with(EXTRA))
    {
        let key = decode(&header.as_str()[EXTRA.len()..], false).to_lowercase();
        extra
            .entry(key)
            .or_default()
            .extend(values(header.as_str()));
    }
    if name.is_empty() {
        if groups.is_empty() && uid.is_empty() && extra.is_empty() {
            return Ok(user);
        }
        return Err(Failure::internal(format!(
            "requested {groups:?} without impersonating a user"
        )));
    }

    let wanted = Wanted {
        name,
        groups,
        uid,
        extra,
    };
    let review = Review::new(cluster, &user);
    if !cluster.options.constrained_impersonation {
        older(&review, &user, &wanted)?;
        return Ok(impersonated(wanted));
    }
    let mut passed = cluster.older.set();
    if passed.contains(&user.name) && older(&review, &user, &wanted).is_ok() {
        return Ok(impersonated(wanted));
    }
    if let Err(refusal) = constrained(&review, &user, &wanted, target) {
        // Where neither lets it pass, the words are those of the newer kind.
        older(&review, &user, &wanted).map_err(|_| refusal)?;
        passed.insert(user.name);
    }
    Ok(impersonated(wanted))
}

/// KEP-5284, for users that are neither nodes nor service accounts (which need other verbs, which
/// no role grants here): first what is asked for, then who.
fn constrained(
    review: &Review,
    user: &User,
    wanted: &Wanted,
    target: &Attributes,
) -> Result<(), Failure> {
    let may = |wanted: Attributes| match review.allows(&wanted) {
        true => Ok(()),
        false => Err(rbac::refusal(user, &wanted)),
    };
    let verb = match (target.path.is_some(), target.verb.as_str()) {
        // HEAD and GET are one.
        (true, "head") => "get",
        (_, verb) => verb,
    };
    let kind = match wanted.name.as_str() {
        name if name.starts_with(ACCOUNT) => "serviceaccount",
        name if name.starts_with("system:node:") => "arbitrary-node",
        _ => "user-info",
    };
    may(Attributes {
        verb: format!("impersonate-on:{kind}:{verb}"),
        ..target.clone()
    })?;
    let who = |resource: &str, subresource: &str, name: &str| {
        let verb = format!("impersonate:{kind}");
        may(Attributes {
            subresource: subresource.to_owned(),
            ..Attributes::resource(&verb, "authentication.k8s.io", resource, "", name)
        })
    };
    who("users", "", &wanted.name)?;
    if wanted.groups.iter().any(|group| group == "system:masters") {
        return Err(Failure::forbidden(
            "impersonating the system:masters group is not allowed",
        ));
    }
    // Many are asked about at once, before each is.
    if wanted.groups.len() < 4 || who("groups", "", "*").is_err() {
        for group in &wanted.groups {
            who("groups", "", group)?;
        }
    }
    if !wanted.uid.is_empty() {
        who("uids", "", &wanted.uid)?;
    }
    for (key, values) in &wanted.extra {
        for value in values {
            who("userextras", key, value)?;
        }
    }
    Ok(())
}

/// By the verb `impersonate` on each part of the identity.
fn older(review: &Review, user: &User, wanted: &Wanted) -> Result<(), Failure> {
    let Wanted {
        name,
        groups,
        uid,
        extra,
    } = wanted;
    let may = |group: &str, resource: &str, subresource: &str, namespace: &str, name: &str| {
        let mut wanted = Attributes::resource("impersonate", group, resource, namespace, name);
        wanted.subresource = subresource.to_owned();
        if review.allows(&wanted) {
            Ok(())
        } else {
            Err(rbac::refusal(user, &wanted))
        }
    };
    let account = name
        .strip_prefix(ACCOUNT)
        .and_then(|rest| rest.split_once(':'));
    match account {
        Some((namespace, account)) => may("", "serviceaccounts", "", namespace, account)?,
        None => may("", "users", "", "", name)?,
    }
    for group in groups {
        may("", "groups", "", "", group)?;
    }
    if !uid.is_empty() {
        may("authentication.k8s.io", "uids", "", "", uid)?;
    }
    for (key, values) in extra {
        for value in values {
            may("authentication.k8s.io", "userextras", key, "", value)?;
        }
    }
    Ok(())
}

/// Whom the API server sees then.
fn impersonated(wanted: Wanted) -> User {
    let Wanted {
        name,
        groups,
        uid,
        extra,
    } = wanted;
    let account = name
        .strip_prefix(ACCOUNT)
        .and_then(|rest| rest.split_once(':'));
    let mut impersonated = match account {
        Some((namespace, account)) if groups.is_empty() => {
            User::service_account(namespace, account)
        }
        _ => User {
            name: name.clone(),
            groups,
            ..User::default()
        },
    };
    if name == "system:anonymous" {
        impersonated.join("system:unauthenticated");
    } else {
        impersonated.join("system:authenticated");
    }
    impersonated.uid = uid;
    impersonated.extra = extra;
    impersonated
}

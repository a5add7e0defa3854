//! The agent's state in a Secret of its cluster, so that a pod which is replaced is the same agent again. The state directory is then a working copy: read from the Secret at the start, written
//! to it after enrolment and after each renewal.
//!
//! Replicas share the Secret, hence the identity. Whichever of them renews first claims the turn in an
//! annotation; the others take over what it saved. Each write names the `resourceVersion` that was
//! read, so that of two at once one is refused and reads again.
//!
//! **Invariant:** the private key goes to the API server of this cluster and nowhere else.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use http::{Method, StatusCode};
use serde_json::{Map, Value, json};
use throwline_certs::{Identity, Roots, files};
use url::Url;
use zeroize::{Zeroize, Zeroizing};

use crate::metrics::Metrics;
use crate::state::{self, Remembered, StateError};
use crate::upstream::wiped::{self, Wiped};
use crate::upstream::{self, AccessError, ClusterAccess, Upstream, api};

const NAMESPACE_FILE: &str = "/var/run/secrets/kubernetes.io/serviceaccount/namespace";
const IDENTITY: &str = "identity.pem";
const ROOTS: &str = "ca.pem";
const RELAY: &str = "relay-url";
/// Which replica renews, until when (seconds since 1970).
const CLAIM: &str = "throwline.dev/renewing";
/// A claim counts for so long; its holder may have died.
const CLAIM_LIFE: Duration = Duration::from_secs(90);
/// Attempts of a write, which another replica may precede.
const ATTEMPTS: u32 = 8;
/// Between them, and between reads of what another replica saves.
const PAUSE: Duration = Duration::from_millis(500);
/// How long a replica waits for the identity that another one enrolled before it.
const SECOND: Duration = Duration::from_secs(30);

/// Which Secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateSecret {
    namespace: String,
    name: String,
}

/// What went wrong with the Secret; the operator's to mend.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    #[error(
        "the Secret of the agent's state is named NAME or NAMESPACE/NAME, in lower-case letters, digits, '-' and '.', not {0:?}"
    )]
    Name(String),
    #[error("outside a pod, --state-secret needs the namespace: NAMESPACE/NAME")]
    NoNamespace,
    #[error("the Secret {secret} cannot be {action}: {source}")]
    Unreachable {
        secret: String,
        action: &'static str,
        source: upstream::Error,
    },
    #[error(
        "the API server refuses that the Secret {secret} is {action} ({status}: {message}); the agent's account needs \
         the verbs get and update on it, and create on secrets where it is not there yet"
    )]
    Refused {
        secret: String,
        action: &'static str,
        status: StatusCode,
        message: String,
    },
    #[error("the Secret {secret} is damaged: {source}; delete its data and enrol this agent again")]
    Damaged {
        secret: String,
        source: DamagedSecret,
    },
    #[error("the Secret {0} was changed by others again and again; it was not written")]
    Busy(String),
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Access(#[from] AccessError),
    /// A mistake of ours: two metrics of one name.
    #[error("the metrics cannot be registered: {0}")]
    Metrics(#[from] prometheus::Error),
}

/// What is wrong with the data of a Secret.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DamagedSecret {
    #[error("it has no {0}")]
    Missing(&'static str),
    #[error("{key}: {source}")]
    Base64 {
        key: String,
        source: base64::DecodeError,
    },
    #[error("{0} is not text")]
    NotText(String),
    #[error(transparent)]
    Identity(#[from] throwline_certs::Error),
    #[error("{RELAY}: {0}")]
    Relay(#[from] url::ParseError),
}

/// A Secret as it was read. `version` is empty where there is none yet. Its values are wiped when it is
/// dropped.
#[derive(Debug, Clone, Default, PartialEq)]
struct Found {
    version: String,
    object: Map<String, Value>,
}

impl Drop for Found {
    fn drop(&mut self) {
        wiped::wipe_object(&mut self.object);
    }
}

/// What makes an agent an enrolled one.
#[derive(Clone)]
struct State {
    identity: Identity,
    roots: Roots,
    relay: Url,
}

/// Whose turn it is to renew.
pub(crate) enum Turn {
    Ours,
    /// Another replica has renewed.
    Renewed(Box<Identity>),
    /// Another replica is about to.
    Wait(Duration),
}

impl StateSecret {
    /// # Errors
    /// A name that no Secret can have.
    pub fn parse(text: &str) -> Result<Self, SecretError> {
        let (namespace, name) = match text.split_once('/') {
            Some((namespace, name)) => (Some(namespace), name),
            None => (None, text),
        };
        let is_name = |name: &str| {
            let allowed = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.');
            (1..=253).contains(&name.len())
                && name.bytes().all(allowed)
                && !name.starts_with(['-', '.'])
                && !name.ends_with(['-', '.'])
        };
        if !is_name(name) || !namespace.is_none_or(is_name) {
            return Err(SecretError::Name(text.to_owned()));
        }
        let namespace = match namespace {
            Some(namespace) => namespace.to_owned(),
            None => std::fs::read_to_string(NAMESPACE_FILE)
                .ok()
                .map(|text| text.trim().to_owned())
                .filter(|text| is_name(text))
                .ok_or(SecretError::NoNamespace)?,
        };
        Ok(Self {
            namespace,
            name: name.to_owned(),
        })
    }

    /// Brings state directory and Secret to the same state, whichever of them is ahead. True: the agent
    /// is enrolled.
    ///
    /// # Errors
    /// The API server does not let the agent read or write the Secret, or what it holds is damaged.
    pub async fn synchronise(
        &self,
        access: &ClusterAccess,
        state_dir: &Path,
    ) -> Result<bool, SecretError> {
        let upstream = alone(access).await?;
        for _ in 0..ATTEMPTS {
            let found = self.read(&upstream).await?;
            let there = self.state_of(&found)?;
            let here = local(state_dir)?;
            match (here, there) {
                (None, None) => return Ok(false),
                (None, Some(there)) => {
                    there.save(state_dir)?;
                    tracing::info!(secret = %self, "the agent's state was read from its Secret");
                    return Ok(true);
                }
                // Another replica has renewed meanwhile; a renewed certificate replaces its
                // predecessor everywhere.
                (Some(here), Some(there)) if !is_ahead(&here.identity, &there.identity) => {
                    there.save(state_dir)?;
                    return Ok(true);
                }
                // Enrolled, or renewed, and not saved: its process may have died in between.
                (Some(here), _) => {
                    if self.write(&upstream, found, Some(&here), None).await? {
                        tracing::info!(secret = %self, "the agent's state was saved in its Secret");
                        return Ok(true);
                    }
                }
            }
            tokio::time::sleep(PAUSE).await;
        }
        Err(SecretError::Busy(self.to_string()))
    }

    /// Waits for the state of another replica, which redeemed the token first. False: there is none in time.
    ///
    /// # Errors
    /// As [`StateSecret::synchronise`].
    pub async fn await_other(
        &self,
        access: &ClusterAccess,
        state_dir: &Path,
    ) -> Result<bool, SecretError> {
        let deadline = tokio::time::Instant::now() + SECOND;
        while tokio::time::Instant::now() < deadline {
            if self.synchronise(access, state_dir).await? {
                return Ok(true);
            }
            tokio::time::sleep(PAUSE).await;
        }
        Ok(false)
    }

    /// Before a renewal: whether this replica renews.
    pub(crate) async fn turn(
        &self,
        upstream: &Upstream,
        own: &Identity,
        instance: &str,
    ) -> Result<Turn, SecretError> {
        let found = self.read(upstream).await?;
        if let Some(there) = self.state_of(&found)?
            && is_ahead(&there.identity, own)
        {
            return Ok(Turn::Renewed(Box::new(there.identity)));
        }
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        if let Some((holder, until)) = found.claim()
            && holder != instance
            // The claim of a clock that is ahead must not block the others without end.
            && (now..=now + CLAIM_LIFE * 2).contains(&until)
        {
            return Ok(Turn::Wait(PAUSE * 4));
        }
        // Written with the Secret's resourceVersion: of two replicas, one gets a conflict.
        let claim = format!("{instance} {}", (now + CLAIM_LIFE).as_secs());
        match self.write(upstream, found, None, Some(claim)).await? {
            true => Ok(Turn::Ours),
            false => Ok(Turn::Wait(PAUSE)),
        }
    }

    /// After a renewal: what the state directory holds now.
    pub(crate) async fn save(
        &self,
        upstream: &Upstream,
        state_dir: &Path,
    ) -> Result<(), SecretError> {
        let Some(here) = local(state_dir)? else {
            return Err(StateError::NotEnrolled(state_dir.to_owned()).into());
        };
        for _ in 0..ATTEMPTS {
            let found = self.read(upstream).await?;
            let there = self.state_of(&found)?;
            if there.is_some_and(|there| is_ahead(&there.identity, &here.identity))
                || self.write(upstream, found, Some(&here), None).await?
            {
                return Ok(());
            }
            tokio::time::sleep(PAUSE).await;
        }
        Err(SecretError::Busy(self.to_string()))
    }

    async fn read(&self, upstream: &Upstream) -> Result<Found, SecretError> {
        let (status, answer) = self
            .ask(upstream, Method::GET, &self.path(), None, "read")
            .await?;
        match (status, answer.take()) {
            // Not an error: the first replica creates it.
            (StatusCode::NOT_FOUND, _) => Ok(Found::default()),
            (status, Value::Object(object)) if status.is_success() => {
                let version = object
                    .get("metadata")
                    .and_then(|it| it["resourceVersion"].as_str());
                let version = version.unwrap_or_default().to_owned();
                Ok(Found { version, object })
            }
            (status, answer) => Err(self.refused("read", status, &answer)),
        }
    }

    /// False: it was changed since it was read.
    async fn write(
        &self,
        upstream: &Upstream,
        found: Found,
        state: Option<&State>,
        claim: Option<String>,
    ) -> Result<bool, SecretError> {
        let is_new = found.version.is_empty();
        let body = self.composed(found, state, claim);
        let (method, path) = match is_new {
            true => (
                Method::POST,
                format!("/api/v1/namespaces/{}/secrets", self.namespace),
            ),
            false => (Method::PUT, self.path()),
        };
        let (status, answer) = self
            .ask(upstream, method, &path, Some(body), "written")
            .await?;
        match status {
            StatusCode::CONFLICT => Ok(false),
            // It was deleted since it was read.
            StatusCode::NOT_FOUND if !is_new => Ok(false),
            status if status.is_success() => Ok(true),
            status => Err(self.refused("written", status, &answer)),
        }
    }

    fn composed(&self, mut found: Found, state: Option<&State>, claim: Option<String>) -> Wiped {
        let mut object = std::mem::take(&mut found.object);
        if found.version.is_empty() {
            let whole = json!({
                "apiVersion": "v1", "kind": "Secret", "type": "Opaque",
                "metadata": {"name": self.name, "namespace": self.namespace},
            });
            object = match whole {
                Value::Object(object) => object,
                _ => Map::new(),
            };
        }
        if let Some(state) = state {
            let data = entry(&mut object, "data");
            for (key, text) in state.texts() {
                let text = BASE64_STANDARD.encode(&*text);
                drop(data.insert(key.to_owned(), text.into()).map(Wiped::from));
            }
        }
        let annotations = entry(entry(&mut object, "metadata"), "annotations");
        match claim {
            Some(claim) => annotations.insert(CLAIM.to_owned(), claim.into()),
            None => annotations.remove(CLAIM),
        };
        Value::Object(object).into()
    }

    fn state_of(&self, found: &Found) -> Result<Option<State>, SecretError> {
        found.state().map_err(|source| SecretError::Damaged {
            secret: self.to_string(),
            source,
        })
    }

    async fn ask(
        &self,
        upstream: &Upstream,
        method: Method,
        path: &str,
        body: Option<Wiped>,
        action: &'static str,
    ) -> Result<(StatusCode, Wiped), SecretError> {
        let asked = api::object(upstream, method, path, body).await;
        let asked = asked.map(|(status, answer)| (status, Wiped::from(answer)));
        asked.map_err(|source| SecretError::Unreachable {
            secret: self.to_string(),
            action,
            source,
        })
    }

    fn refused(&self, action: &'static str, status: StatusCode, answer: &Value) -> SecretError {
        SecretError::Refused {
            secret: self.to_string(),
            action,
            status,
            message: answer["message"]
                .as_str()
                .unwrap_or("no reason given")
                .to_owned(),
        }
    }

    fn path(&self) -> String {
        format!(
            "/api/v1/namespaces/{}/secrets/{}",
            self.namespace, self.name
        )
    }
}

impl std::fmt::Display for StateSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl Found {
    fn state(&self) -> Result<Option<State>, DamagedSecret> {
        let texts = self.texts()?;
        // The identity makes it an enrolled one; a Secret is often made empty, for its permissions.
        let Some(identity) = texts.get(IDENTITY).filter(|text| !text.is_empty()) else {
            return Ok(None);
        };
        let text = |key| texts.get(key).ok_or(DamagedSecret::Missing(key));
        Ok(Some(State {
            identity: Identity::from_pem(identity)?,
            roots: Roots::from_pem(text(ROOTS)?)?,
            relay: text(RELAY)?.trim().parse()?,
        }))
    }

    fn texts(&self) -> Result<BTreeMap<String, Zeroizing<String>>, DamagedSecret> {
        let data = self.object.get("data").and_then(Value::as_object);
        let decode = |(key, value): (&String, &Value)| {
            let bytes = BASE64_STANDARD
                .decode(value.as_str().unwrap_or_default())
                .map_err(|source| DamagedSecret::Base64 {
                    key: key.clone(),
                    source,
                })?;
            let text = String::from_utf8(bytes).map_err(|error| {
                error.into_bytes().zeroize();
                DamagedSecret::NotText(key.clone())
            })?;
            Ok((key.clone(), Zeroizing::new(text)))
        };
        let own = |(key, _): &(&String, &Value)| [IDENTITY, ROOTS, RELAY].contains(&key.as_str());
        data.into_iter().flatten().filter(own).map(decode).collect()
    }

    /// The replica that renews, and until when since 1970.
    fn claim(&self) -> Option<(&str, Duration)> {
        let claim = self
            .object
            .get("metadata")?
            .get("annotations")?
            .get(CLAIM)?;
        let (holder, until) = claim.as_str()?.rsplit_once(' ')?;
        Some((holder, Duration::from_secs(until.parse().ok()?)))
    }
}

impl State {
    fn texts(&self) -> [(&'static str, Zeroizing<String>); 3] {
        let identity = [&*self.identity.chain_pem(), &*self.identity.key_pem()].concat();
        [
            (IDENTITY, identity),
            (ROOTS, self.roots.to_pem()),
            (RELAY, self.relay.to_string()),
        ]
        .map(|(key, text)| (key, Zeroizing::new(text)))
    }

    fn save(&self, state_dir: &Path) -> Result<(), StateError> {
        // What this machine trusts beside the authority is not in the Secret; a pod has its CA by a flag.
        let held = state::load(state_dir).ok();
        let system_ca = held.as_ref().is_some_and(|held| held.system_ca);
        let cluster_uid = held.as_ref().and_then(|held| held.cluster_uid.clone());
        let ca_file = held.and_then(|held| held.ca_file);
        let relay = self.relay.clone();
        files::private_dir(state_dir)?;
        let remembered = Remembered {
            relay,
            ca_file,
            system_ca,
            cluster_uid,
            // Another pod may have redeemed another one.
            token: None,
        };
        state::save(state_dir, &remembered)?;
        self.roots.save(state_dir)?;
        self.identity.save(state_dir)?;
        Ok(())
    }
}

/// The content of the state directory, if it is enrolled.
fn local(state_dir: &Path) -> Result<Option<State>, StateError> {
    if !state::is_enrolled(state_dir)? {
        return Ok(None);
    }
    let (identity, roots) = state::identity(state_dir)?;
    let relay = state::load(state_dir)?.relay;
    Ok(Some(State {
        identity,
        roots,
        relay,
    }))
}

/// Whether `one` is a later certificate of the same agent. Of two agents, the Secret's counts.
fn is_ahead(one: &Identity, other: &Identity) -> bool {
    one.id() == other.id() && one.serial() != other.serial() && one.not_after() > other.not_after()
}

/// The object below `key`, made if need be.
fn entry<'a>(object: &'a mut Map<String, Value>, key: &str) -> &'a mut Map<String, Value> {
    let value = object.entry(key).or_insert(Value::Null);
    if !value.is_object() {
        *value = json!({});
    }
    match value {
        Value::Object(below) => below,
        _ => unreachable!("it was made an object above"),
    }
}

/// Access to the API server before the agent runs.
async fn alone(access: &ClusterAccess) -> Result<Upstream, SecretError> {
    let metrics = Metrics::register(&prometheus::Registry::new())?;
    let limits = upstream::Limits::default();
    Ok(Upstream::load(access.clone(), limits, metrics).await?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret() -> StateSecret {
        StateSecret::parse("throwline/agent-state").unwrap()
    }

    #[test]
    fn a_secret_is_named_with_or_without_its_namespace() {
        assert_eq!(secret().to_string(), "throwline/agent-state");
        assert_eq!(
            secret().path(),
            "/api/v1/namespaces/throwline/secrets/agent-state"
        );
        for bad in [
            "", "/", "a/", "/a", "a/b/c", "A", "a/../b", "-a", "a?x=1", "a/b%2f",
        ] {
            assert!(
                matches!(StateSecret::parse(bad), Err(SecretError::Name(_))),
                "{bad}"
            );
        }
    }

    #[test]
    fn what_others_put_into_the_secret_stays() {
        let object = json!({
            "kind": "Secret", "metadata": {"name": "agent-state", "labels": {"app": "x"}, "resourceVersion": "7"},
            "data": {"other": "eA=="},
        });
        let Value::Object(object) = object else {
            unreachable!()
        };
        let found = Found {
            version: "7".into(),
            object,
        };
        assert!(secret().state_of(&found).unwrap().is_none());
        let claimed = secret().composed(found, None, Some("me 1234".into()));
        assert_eq!(claimed["metadata"]["labels"]["app"], "x");
        assert_eq!(claimed["metadata"]["resourceVersion"], "7");
        assert_eq!(claimed["data"]["other"], "eA==");
        let Value::Object(object) = claimed.take() else {
            unreachable!()
        };
        let found = Found {
            version: "8".into(),
            object,
        };
        assert_eq!(found.claim(), Some(("me", Duration::from_secs(1234))));
        let released = secret().composed(found, None, None);
        assert_eq!(released["metadata"]["annotations"], json!({}));
    }

    #[test]
    fn what_is_damaged_is_said_and_not_taken_for_empty() {
        let found = |data: Value| {
            let Value::Object(object) = json!({"metadata": {}, "data": data}) else {
                unreachable!()
            };
            Found {
                version: "1".into(),
                object,
            }
        };
        let pem = BASE64_STANDARD.encode("-----BEGIN");
        for data in [
            json!({"identity.pem": "!"}),
            json!({"identity.pem": pem}),
            json!({"identity.pem": pem, "ca.pem": "", "relay-url": ""}),
            json!({"identity.pem": "/w=="}),
        ] {
            let read = secret().state_of(&found(data.clone()));
            assert!(matches!(read, Err(SecretError::Damaged { .. })), "{data}");
        }
        for data in [json!({}), json!({"identity.pem": ""}), Value::Null] {
            assert!(secret().state_of(&found(data)).unwrap().is_none());
        }
    }
}

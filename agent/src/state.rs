//! The agent's state directory: `identity.pem` and `ca.pem` of `certs`, and `relay.json`.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use throwline_certs::tls::{self, Trust};
use throwline_certs::{EnrolmentToken, Identity, Kind, Roots, SpiffeId, enrol as redeeming, files};
use throwline_tunnel::carrier::{self, Proxies};
use url::Url;

pub mod secret;

const RELAY: &str = "relay.json";

/// Why the state directory cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// The operator's next step is in the text.
    #[error(
        "this agent is not enrolled: there is no identity in {}; make a token beside the relay (throwline token \
         create --cluster NAME) and give it with --token-file", .0.display()
    )]
    NotEnrolled(PathBuf),
    #[error(
        "the state directory already holds the identity of {0}; use another directory, or remove it first"
    )]
    AlreadyEnrolled(SpiffeId),
    /// A token made for a user was given to an agent.
    #[error(
        "the token is for {0}, not for a cluster; make one with throwline token create --cluster NAME"
    )]
    NotACluster(SpiffeId),
    #[error(transparent)]
    Enrol(#[from] redeeming::EnrolError),
    #[error(transparent)]
    Files(#[from] throwline_certs::Error),
    #[error("{} is damaged: {source}; enrol this agent again", path.display())]
    Damaged { path: PathBuf, source: DamagedFile },
    #[error("{} cannot be written: {source}", path.display())]
    Encode {
        path: PathBuf,
        source: serde_json::Error,
    },
}

/// What is wrong with `relay.json`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DamagedFile {
    #[error(transparent)]
    Json(#[from] serde_json::Error),
    #[error("the relay's address: {0}")]
    Relay(#[from] url::ParseError),
}

/// The content of `relay.json`: what enrolment found out that a later start needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Remembered {
    pub(crate) relay: Url,
    pub(crate) ca_file: Option<PathBuf>,
    pub(crate) system_ca: bool,
    pub(crate) cluster_uid: Option<String>,
    /// The hash of the token that enrolled this directory, which distinguishes a new one.
    pub(crate) token: Option<String>,
}

/// `relay.json` on the disk.
#[derive(Serialize, Deserialize)]
struct Stored {
    relay: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ca_file: Option<PathBuf>,
    #[serde(default)]
    system_ca: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cluster_uid: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    token: Option<String>,
}

/// Whether `state_dir` holds an identity already.
///
/// # Errors
/// There is one, but it cannot be read.
pub fn is_enrolled(state_dir: &Path) -> Result<bool, StateError> {
    Ok(Identity::load(state_dir)?.is_some())
}

/// Whether `state_dir` was enrolled by another token than this one, as far as that is known: then this
/// is a new one, and [`enrol()`] replaces the identity that is there.
///
/// # Errors
/// The directory cannot be read.
pub fn is_new_token(state_dir: &Path, token: &EnrolmentToken) -> Result<bool, StateError> {
    let redeemed = load(state_dir)?.token;
    let hash = hash(token)?;
    Ok(redeemed.is_some_and(|redeemed| redeemed != hash))
}

fn hash(token: &EnrolmentToken) -> Result<String, StateError> {
    let hash = token.secret.hash()?;
    Ok(hash.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Redeems a token, through `proxies`, and saves the result: the new identity, the CA and the relay's
/// address. `cluster_uid`, of [`crate::cluster_uid()`], is what the relay binds the
/// cluster's name to.
///
/// # Errors
/// The directory has an identity, and not by another token; the relay refuses, or the identity is not a
/// cluster's.
pub async fn enrol(
    token: &EnrolmentToken,
    state_dir: &Path,
    cluster_uid: &str,
    trust: Trust<'_>,
    proxies: &Proxies,
) -> Result<SpiffeId, StateError> {
    // First, since a token can be redeemed only once.
    if let Some(there) = Identity::load(state_dir)?
        && !is_new_token(state_dir, token)?
    {
        return Err(StateError::AlreadyEnrolled(there.id().clone()));
    }
    // Before the token is used up, so that a directory that cannot be written costs no token.
    files::private_dir(state_dir)?;
    let proxies = proxies.trusting(&token.relay, || tls::proxy_client(trust.ca_file))?;
    let connecting = carrier::reach(&token.relay, &proxies);
    let asker = redeeming::Asker::Cluster {
        uid: cluster_uid.to_owned(),
    };
    let enrolled = redeeming::redeem_over(token, &asker, trust, connecting).await?;
    let id = enrolled.identity.id().clone();
    if id.kind() != Kind::Cluster {
        return Err(StateError::NotACluster(id));
    }
    let remembered = Remembered {
        relay: token.relay.clone(),
        ca_file: trust.ca_file.map(absolute),
        system_ca: trust.system,
        cluster_uid: Some(cluster_uid.to_owned()),
        token: Some(hash(token)?),
    };
    save(state_dir, &remembered)?;
    enrolled.roots.save(state_dir)?;
    // Last, because it is what makes this directory an enrolled one.
    enrolled.identity.save(state_dir)?;
    tracing::info!(identity = %id, relay = %token.relay, "enrolled");
    Ok(id)
}

pub(crate) fn load(state_dir: &Path) -> Result<Remembered, StateError> {
    files::check_dir(state_dir)?;
    let path = state_dir.join(RELAY);
    let Some(text) = files::read_text(&path)? else {
        return Err(StateError::NotEnrolled(state_dir.to_owned()));
    };
    decode(&text).map_err(|source| StateError::Damaged { path, source })
}

fn decode(text: &str) -> Result<Remembered, DamagedFile> {
    let stored: Stored = serde_json::from_str(text)?;
    Ok(Remembered {
        relay: stored.relay.parse()?,
        ca_file: stored.ca_file,
        system_ca: stored.system_ca,
        cluster_uid: stored.cluster_uid,
        token: stored.token,
    })
}

/// Identity and CA of an enrolled agent.
pub(crate) fn identity(state_dir: &Path) -> Result<(Identity, Roots), StateError> {
    match (Identity::load(state_dir)?, Roots::load(state_dir)?) {
        (Some(identity), Some(roots)) if identity.id().kind() == Kind::Cluster => {
            Ok((identity, roots))
        }
        (Some(identity), Some(_)) => Err(StateError::NotACluster(identity.id().clone())),
        _ => Err(StateError::NotEnrolled(state_dir.to_owned())),
    }
}

pub(crate) fn save(state_dir: &Path, remembered: &Remembered) -> Result<(), StateError> {
    let path = state_dir.join(RELAY);
    let stored = Stored {
        relay: remembered.relay.to_string(),
        ca_file: remembered.ca_file.clone(),
        system_ca: remembered.system_ca,
        cluster_uid: remembered.cluster_uid.clone(),
        token: remembered.token.clone(),
    };
    let text = serde_json::to_vec_pretty(&stored).map_err(|source| StateError::Encode {
        path: path.clone(),
        source,
    })?;
    Ok(files::write_private(&path, &text)?)
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn what_is_saved_is_loaded() {
        let dir = tempfile::tempdir().unwrap();
        let remembered = Remembered {
            relay: "https://relay.example:8443/x".parse().unwrap(),
            ca_file: None,
            system_ca: true,
            cluster_uid: Some("1f".to_owned()),
            token: Some("0a".to_owned()),
        };
        save(dir.path(), &remembered).unwrap();
        assert_eq!(load(dir.path()).unwrap(), remembered);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_token_is_new_if_another_one_enrolled_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let token = || EnrolmentToken {
            relay: "https://a".parse().unwrap(),
            secret: throwline_certs::Secret::generate(),
            pin: [0; 32],
        };
        let (first, second) = (token(), token());
        let mut remembered = Remembered {
            relay: first.relay.clone(),
            ca_file: None,
            system_ca: false,
            cluster_uid: None,
            token: Some(hash(&first).unwrap()),
        };
        save(dir.path(), &remembered).unwrap();
        assert!(!is_new_token(dir.path(), &first).unwrap());
        assert!(is_new_token(dir.path(), &second).unwrap());
        // It is not known which token that was: the identity may be good.
        remembered.token = None;
        save(dir.path(), &remembered).unwrap();
        assert!(!is_new_token(dir.path(), &second).unwrap());
    }

    #[test]
    fn an_empty_and_a_damaged_directory_are_different_errors() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(load(dir.path()), Err(StateError::NotEnrolled(_))));
        fs::write(dir.path().join(RELAY), "{").unwrap();
        assert!(matches!(load(dir.path()), Err(StateError::Damaged { .. })));
        assert!(matches!(
            save(
                &dir.path().join("missing"),
                &Remembered {
                    relay: "https://a".parse().unwrap(),
                    ca_file: None,
                    system_ca: false,
                    cluster_uid: None,
                    token: None,
                }
            ),
            Err(StateError::Files(_))
        ));
    }
}

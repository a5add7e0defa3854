//! The agent's state directory: `identity.pem` and `ca.pem` by `certs`, `relay.json` by us.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use throwline_certs::{EnrolmentToken, Identity, Kind, Roots, SpiffeId, enrol as redeeming, tls};
use throwline_tunnel::carrier::{self, Proxies};

use crate::config::Remembered;
use crate::error::Error;

const RELAY: &str = "relay.json";

/// `relay.json` as it lies on the disk.
#[derive(Serialize, Deserialize)]
struct Stored {
    relay: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ca_file: Option<PathBuf>,
}

/// Whether `state_dir` holds an identity already.
///
/// # Errors
/// There is one, but it cannot be read.
pub fn is_enrolled(state_dir: &Path) -> Result<bool, Error> {
    Ok(Identity::load(state_dir)?.is_some())
}

/// Redeems a token, on the way that `proxies` gives, and saves what it brings: the new identity,
/// the CA and where the relay is.
///
/// # Errors
/// The directory is taken, the relay refuses, or the identity is not a cluster's.
pub async fn enrol(
    token: &EnrolmentToken,
    state_dir: &Path,
    extra_ca: Option<&Path>,
    proxies: &Proxies,
) -> Result<SpiffeId, Error> {
    // Asked first: a token can be redeemed once only.
    if let Some(there) = Identity::load(state_dir)? {
        return Err(Error::AlreadyEnrolled(there.id().to_string()));
    }
    make_private(state_dir)?;
    let proxies = proxies.trusting(&token.relay, || tls::proxy_client(extra_ca))?;
    let connecting = carrier::reach(&token.relay, &proxies);
    let enrolled = redeeming::redeem_over(token, extra_ca, connecting).await?;
    let id = enrolled.identity.id().clone();
    if id.kind() != Kind::Cluster {
        return Err(Error::NotACluster(id.to_string()));
    }
    let remembered = Remembered {
        relay: token.relay.clone(),
        ca_file: extra_ca.map(absolute),
    };
    save(state_dir, &remembered)?;
    enrolled.roots.save(state_dir)?;
    // Last, because it is what makes this directory an enrolled one.
    enrolled.identity.save(state_dir)?;
    tracing::info!(identity = %id, relay = %token.relay, "enrolled");
    Ok(id)
}

pub(crate) fn load(state_dir: &Path) -> Result<Remembered, Error> {
    let path = state_dir.join(RELAY);
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(Error::NotEnrolled(state_dir.to_owned()));
        }
        Err(source) => {
            return Err(Error::File {
                action: "read",
                path,
                source,
            });
        }
    };
    let damaged = |reason: String| Error::Damaged {
        path: path.clone(),
        reason,
    };
    let stored: Stored =
        serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
    let relay = stored
        .relay
        .parse()
        .map_err(|error: url::ParseError| damaged(error.to_string()))?;
    Ok(Remembered {
        relay,
        ca_file: stored.ca_file,
    })
}

/// Identity and CA of an enrolled agent.
pub(crate) fn identity(state_dir: &Path) -> Result<(Identity, Roots), Error> {
    match (Identity::load(state_dir)?, Roots::load(state_dir)?) {
        (Some(identity), Some(roots)) if identity.id().kind() == Kind::Cluster => {
            Ok((identity, roots))
        }
        (Some(identity), Some(_)) => Err(Error::NotACluster(identity.id().to_string())),
        _ => Err(Error::NotEnrolled(state_dir.to_owned())),
    }
}

fn save(state_dir: &Path, remembered: &Remembered) -> Result<(), Error> {
    let path = state_dir.join(RELAY);
    let failed = |source| Error::File {
        action: "write",
        path: path.clone(),
        source,
    };
    let stored = Stored {
        relay: remembered.relay.to_string(),
        ca_file: remembered.ca_file.clone(),
    };
    let text = serde_json::to_vec_pretty(&stored).map_err(|error| failed(error.into()))?;
    // Beside the target, so that the rename is atomic and a crash leaves the old file or the new.
    let beside = state_dir.join(format!(".{RELAY}.{}", std::process::id()));
    let written = fs::File::create(&beside).and_then(|mut file| {
        file.write_all(&text)?;
        file.sync_all()
    });
    written
        .and_then(|()| fs::rename(&beside, &path))
        .map_err(failed)
}

fn make_private(state_dir: &Path) -> Result<(), Error> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(state_dir).map_err(|source| Error::File {
        action: "make",
        path: state_dir.to_owned(),
        source,
    })
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_remembered_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let remembered = Remembered {
            relay: "https://relay.example:8443/x".parse().unwrap(),
            ca_file: None,
        };
        save(dir.path(), &remembered).unwrap();
        assert_eq!(load(dir.path()).unwrap(), remembered);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn an_empty_and_a_damaged_directory_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(load(dir.path()), Err(Error::NotEnrolled(_))));
        fs::write(dir.path().join(RELAY), "{").unwrap();
        assert!(matches!(load(dir.path()), Err(Error::Damaged { .. })));
        assert!(matches!(
            save(
                &dir.path().join("missing"),
                &Remembered {
                    relay: "https://a".parse().unwrap(),
                    ca_file: None
                }
            ),
            Err(Error::File { .. })
        ));
    }
}

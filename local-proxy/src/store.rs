//! The state directory: the user's identity, the relay's address and the loopback certificates.
//!
//! The directory is 0700, its files 0600. A file is replaced by rename, so a reader sees the old
//! one or the new one, and a crash leaves no half of either.

use serde::{Deserialize, Serialize};
use std::{
    fs, io,
    io::Write as _,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    time::SystemTime,
};
use throwline_certs::{Identity, Roots};
use url::Url;

use crate::error::rfc3339;

const RELAY_FILE: &str = "relay.json";
const PROXY_FILE: &str = "proxy.json";
/// Larger than any file we write; a bound for those somebody else may have put there.
const MAX_FILE: u64 = 1024 * 1024;

/// The state directory of one user. Making one touches nothing on disk.
#[derive(Clone, Debug)]
pub struct Store {
    dir: PathBuf,
}

/// What an enrolled user has.
#[derive(Clone, Debug)]
pub struct Credentials {
    pub identity: Identity,
    pub roots: Roots,
    pub relay: RelayFile,
}

/// `relay.json`: where to dial.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelayFile {
    pub url: Url,
    /// Further certificate authorities for the relay's TLS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
}

/// `proxy.json`: what the last run found, so that the next one starts the same way.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProxyFile {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// The clusters that the user could reach, for a start while the relay is away.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub clusters: Vec<String>,
}

/// What is wrong with the state directory, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("there is no identity in {}: run 'throwline login --token-file FILE' with the token from your administrator", dir.display())]
    NotEnrolled { dir: PathBuf },
    #[error("your certificate in {} expired on {}: run 'throwline login' with a new token", dir.display(), rfc3339(*not_after))]
    Expired { dir: PathBuf, not_after: SystemTime },
    #[error("cannot read {}: {source}", path.display())]
    Unreadable { path: PathBuf, source: io::Error },
    #[error("cannot write {}: {source}", path.display())]
    Unwritable { path: PathBuf, source: io::Error },
    #[error("{} is damaged: {what}; remove it and run 'throwline login' with a new token", path.display())]
    Corrupt { path: PathBuf, what: String },
    #[error("{} belongs to another user, and secrets must not go there; choose another with --state-dir", dir.display())]
    NotOurs { dir: PathBuf },
    #[error(transparent)]
    Certs(#[from] throwline_certs::Error),
}

impl Store {
    #[must_use]
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The full path of one of the store's files.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The user's credentials, still valid.
    pub fn load(&self) -> Result<Credentials, StoreError> {
        let credentials = self.load_even_expired()?;
        let not_after = credentials.identity.not_after();
        if not_after <= SystemTime::now() {
            return Err(StoreError::Expired {
                dir: self.dir.clone(),
                not_after,
            });
        }
        Ok(credentials)
    }

    /// The user's credentials, whatever their age.
    pub fn load_even_expired(&self) -> Result<Credentials, StoreError> {
        let not_enrolled = || StoreError::NotEnrolled {
            dir: self.dir.clone(),
        };
        // Asked first: a directory that we may not enter must not look like one that is empty.
        match fs::metadata(&self.dir) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(not_enrolled()),
            Err(source) => {
                let path = self.dir.clone();
                return Err(StoreError::Unreadable { path, source });
            }
        }
        let relay = self.read_json::<RelayFile>(RELAY_FILE)?;
        let identity = Identity::load(&self.dir).map_err(certs_error)?;
        let roots = Roots::load(&self.dir).map_err(certs_error)?;
        match (identity, roots, relay) {
            (Some(identity), Some(roots), Some(relay)) => Ok(Credentials {
                identity,
                roots,
                relay,
            }),
            _ => Err(not_enrolled()),
        }
    }

    /// Keeps what a login gave, the identity last: a login that fails half-way is no login.
    pub fn save(&self, credentials: &Credentials) -> Result<(), StoreError> {
        self.prepare()?;
        self.write_json(RELAY_FILE, &credentials.relay)?;
        credentials.roots.save(&self.dir).map_err(certs_error)?;
        self.save_identity(&credentials.identity)
    }

    /// Replaces the identity, after a renewal.
    pub fn save_identity(&self, identity: &Identity) -> Result<(), StoreError> {
        identity.save(&self.dir).map_err(certs_error)
    }

    /// What the last run found; a missing or damaged file is no fault, only a default.
    #[must_use]
    pub fn proxy_file(&self) -> ProxyFile {
        self.read_json(PROXY_FILE)
            .ok()
            .flatten()
            .unwrap_or_default()
    }

    pub fn save_proxy_file(&self, file: &ProxyFile) -> Result<(), StoreError> {
        self.write_json(PROXY_FILE, file)
    }

    /// Makes the directory 0700, if need be, and refuses one that belongs to somebody else.
    pub fn prepare(&self) -> Result<(), StoreError> {
        let unwritable = |source| StoreError::Unwritable {
            path: self.dir.clone(),
            source,
        };
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.dir)
            .map_err(unwritable)?;
        let metadata = fs::metadata(&self.dir).map_err(unwritable)?;
        if metadata.uid() != rustix::process::geteuid().as_raw() {
            let dir = self.dir.clone();
            return Err(StoreError::NotOurs { dir });
        }
        if metadata.permissions().mode() & 0o077 != 0 {
            fs::set_permissions(&self.dir, fs::Permissions::from_mode(0o700))
                .map_err(unwritable)?;
        }
        Ok(())
    }

    /// A file's text; `None` if it is not there.
    pub(crate) fn read(&self, name: &str) -> Result<Option<String>, StoreError> {
        let path = self.path(name);
        let unreadable = |source| StoreError::Unreadable {
            path: path.clone(),
            source,
        };
        match fs::metadata(&path) {
            Ok(metadata) if metadata.len() > MAX_FILE => {
                let what = format!("it is larger than {MAX_FILE} bytes");
                return Err(StoreError::Corrupt { path, what });
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(unreadable(error)),
        }
        let bytes = fs::read(&path).map_err(unreadable)?;
        let text = String::from_utf8(bytes).map_err(|_| StoreError::Corrupt {
            path: path.clone(),
            what: "it is not text".to_owned(),
        })?;
        Ok(Some(text))
    }

    /// Replaces a file, 0600, by rename.
    pub(crate) fn write(&self, name: &str, content: &[u8]) -> Result<(), StoreError> {
        let path = self.path(name);
        let write = || -> io::Result<()> {
            // tempfile makes its files 0600.
            let mut file = tempfile::NamedTempFile::new_in(&self.dir)?;
            file.write_all(content)?;
            file.as_file().sync_all()?;
            file.persist(&path)?;
            Ok(())
        };
        write().map_err(|source| StoreError::Unwritable { path, source })
    }

    fn read_json<T: serde::de::DeserializeOwned>(
        &self,
        name: &str,
    ) -> Result<Option<T>, StoreError> {
        let Some(text) = self.read(name)? else {
            return Ok(None);
        };
        serde_json::from_str(&text)
            .map(Some)
            .map_err(|error| StoreError::Corrupt {
                path: self.path(name),
                what: error.to_string(),
            })
    }

    fn write_json<T: Serialize>(&self, name: &str, value: &T) -> Result<(), StoreError> {
        let mut text = serde_json::to_vec_pretty(value).map_err(|error| StoreError::Corrupt {
            path: self.path(name),
            what: error.to_string(),
        })?;
        text.push(b'\n');
        self.write(name, &text)
    }
}

/// Says a fault of an identity file in this module's words, where there are some.
fn certs_error(error: throwline_certs::Error) -> StoreError {
    match error {
        throwline_certs::Error::Corrupt { path, what, .. } => StoreError::Corrupt { path, what },
        other => StoreError::Certs(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn a_missing_or_empty_directory_is_told_as_not_enrolled() {
        let root = tempfile::tempdir().unwrap();
        for dir in [root.path().join("absent"), root.path().to_owned()] {
            let error = Store::new(&dir).load().unwrap_err();
            assert!(matches!(error, StoreError::NotEnrolled { .. }), "{error}");
            assert!(error.to_string().contains("throwline login"), "{error}");
        }
    }

    #[test]
    fn files_are_private_and_so_is_the_directory() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::new(root.path().join("a/b"));
        store.prepare().unwrap();
        let file = ProxyFile {
            port: Some(47611),
            clusters: vec!["prod".to_owned()],
        };
        store.save_proxy_file(&file).unwrap();
        assert_eq!(mode(store.dir()), 0o700);
        assert_eq!(mode(&store.path(PROXY_FILE)), 0o600);
        assert_eq!(store.proxy_file(), file);
        assert_eq!(fs::read_dir(store.dir()).unwrap().count(), 1, "no litter");
    }

    #[test]
    fn an_open_directory_is_closed_to_others() {
        let root = tempfile::tempdir().unwrap();
        fs::set_permissions(root.path(), fs::Permissions::from_mode(0o755)).unwrap();
        Store::new(root.path()).prepare().unwrap();
        assert_eq!(mode(root.path()), 0o700);
    }

    #[test]
    fn damage_names_the_file_and_the_way_out() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::new(root.path());
        for bad in [&b"{"[..], b"\xff\xfe", b"[]", b"{\"url\":\"no url\"}"] {
            fs::write(store.path(RELAY_FILE), bad).unwrap();
            let error = store.load().unwrap_err();
            assert!(matches!(error, StoreError::Corrupt { .. }), "{error}");
            let text = error.to_string();
            assert!(
                text.contains("relay.json") && text.contains("throwline login"),
                "{text}"
            );
        }
    }

    #[test]
    fn a_huge_file_is_refused_before_it_is_read() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::new(root.path());
        let file = fs::File::create(store.path(RELAY_FILE)).unwrap();
        file.set_len(MAX_FILE + 1).unwrap();
        let error = store.read(RELAY_FILE).unwrap_err();
        assert!(matches!(error, StoreError::Corrupt { .. }), "{error}");
    }

    #[test]
    fn what_is_no_file_is_unreadable_and_not_a_panic() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::new(root.path());
        fs::create_dir(store.path(RELAY_FILE)).unwrap();
        let error = store.load().unwrap_err();
        assert!(matches!(error, StoreError::Unreadable { .. }), "{error}");
        let error = store.write(RELAY_FILE, b"x").unwrap_err();
        assert!(matches!(error, StoreError::Unwritable { .. }), "{error}");
    }

    #[test]
    fn a_damaged_memory_of_the_last_run_is_only_forgotten() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::new(root.path());
        fs::write(store.path(PROXY_FILE), "nonsense").unwrap();
        assert_eq!(store.proxy_file(), ProxyFile::default());
    }
}

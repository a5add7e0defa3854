//! The state directory: the user's identity, the relay's address and the loopback certificates.
//!
//! The directory is 0700, its files 0600; [`throwline_certs::files`] sees to both, and refuses what
//! other users of the machine could have written.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;
use std::{fs, io};

use serde::{Deserialize, Serialize};
use throwline_certs::{Identity, Roots, files};
use throwline_ops::time::rfc3339;
use url::Url;
use zeroize::Zeroizing;

const RELAY_FILE: &str = "relay.json";
const PROXY_FILE: &str = "proxy.json";

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
    /// Whether the system's certificate authorities are trusted for the relay, too.
    #[serde(default)]
    pub system_ca: bool,
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
    #[error("{} is damaged: {source}; remove it and run 'throwline login' with a new token", path.display())]
    Corrupt { path: PathBuf, source: Damage },
    #[error(transparent)]
    Certs(#[from] throwline_certs::Error),
}

/// What is wrong with a file's content.
#[derive(Debug, thiserror::Error)]
pub enum Damage {
    #[error(transparent)]
    Json(#[from] serde_json::Error),
    #[error("it is not text")]
    NotText,
    /// Of an identity file.
    #[error(transparent)]
    Identity(Box<throwline_certs::Damage>),
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
        // Checked first: a directory that we may not enter must not be taken for an empty one.
        match fs::metadata(&self.dir) {
            Ok(_) => files::check_dir(&self.dir)?,
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

    /// Makes the directory, if need be, and closes it to others who could only read it.
    ///
    /// # Errors
    /// It belongs to another user, or others can write into it.
    pub fn prepare(&self) -> Result<(), StoreError> {
        files::private_dir(&self.dir)?;
        let unwritable = |source| StoreError::Unwritable {
            path: self.dir.clone(),
            source,
        };
        let mode = fs::metadata(&self.dir).map_err(unwritable)?.permissions();
        if mode.mode() & 0o077 != 0 {
            fs::set_permissions(&self.dir, fs::Permissions::from_mode(0o700))
                .map_err(unwritable)?;
        }
        Ok(())
    }

    /// A file's text; `None` if it is not there.
    pub(crate) fn read(&self, name: &str) -> Result<Option<String>, StoreError> {
        files::read_text(&self.path(name)).map_err(certs_error)
    }

    /// The same of a file with a secret.
    pub(crate) fn read_secret(&self, name: &str) -> Result<Option<Zeroizing<String>>, StoreError> {
        files::read_secret(&self.path(name)).map_err(certs_error)
    }

    /// Replaces a file, 0600, by rename.
    pub(crate) fn write(&self, name: &str, content: &[u8]) -> Result<(), StoreError> {
        files::write_private(&self.path(name), content).map_err(certs_error)
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
                source: error.into(),
            })
    }

    pub(crate) fn write_json<T: Serialize>(&self, name: &str, value: &T) -> Result<(), StoreError> {
        let mut text = serde_json::to_vec_pretty(value).map_err(|error| StoreError::Corrupt {
            path: self.path(name),
            source: error.into(),
        })?;
        text.push(b'\n');
        self.write(name, &text)
    }
}

/// Maps errors of files to this module's variants, where one fits.
fn certs_error(error: throwline_certs::Error) -> StoreError {
    match error {
        throwline_certs::Error::Corrupt { path, source, .. } => StoreError::Corrupt {
            path,
            source: Damage::Identity(source),
        },
        throwline_certs::Error::Io {
            action,
            path,
            source,
            ..
        } => match (action, source.kind()) {
            // Its error for a file that is not UTF-8.
            (_, io::ErrorKind::InvalidData) => StoreError::Corrupt {
                path,
                source: Damage::NotText,
            },
            ("write", _) => StoreError::Unwritable { path, source },
            _ => StoreError::Unreadable { path, source },
        },
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
    fn what_others_could_have_written_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::new(root.path());
        let set = |path: &Path, mode| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        };
        set(root.path(), 0o777);
        for refused in [store.prepare(), store.load().map(drop)] {
            let error = refused.unwrap_err().to_string();
            assert!(error.contains("chmod 700"), "{error}");
        }
        assert_eq!(mode(root.path()), 0o777, "nothing is mended in silence");
        set(root.path(), 0o700);
        store.write(RELAY_FILE, b"{}").unwrap();
        set(&store.path(RELAY_FILE), 0o666);
        let error = store.load().unwrap_err().to_string();
        assert!(error.contains("chmod 600"), "{error}");
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
        file.set_len(4 * 1024 * 1024 + 1).unwrap();
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

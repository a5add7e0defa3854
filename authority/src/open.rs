//! How an authority is opened or made: under the lock of its state directory and, where relays
//! share a database, by agreement with them on one CA.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use throwline_certs::check_relay_url;
use throwline_certs::{TrustDomain, Validator, files};
use throwline_database::Database;
use throwline_policy::SystemNames;
use url::Url;

use crate::authority::{Authority, Clock, Inner, RELAY_URL};
use crate::ca::Ca;
use crate::error::Error;
use crate::model::Validity;
use crate::store::{self, Store};

const LOCK: &str = "authority.lock";

impl Authority {
    /// Opens an authority that exists, with its tables in the state directory;
    /// [`Error::NoAuthority`] when there is none.
    ///
    /// # Errors
    /// There is no authority in `state_dir`, or its files or database cannot be used.
    pub async fn open(state_dir: &Path) -> Result<Self, Error> {
        Self::builder(state_dir).open().await
    }

    /// Opens the authority, or makes it: then the URL's host becomes its permanent trust domain. Stores
    /// the URL for [`relay_url`](Self::relay_url).
    ///
    /// # Errors
    /// The state directory or the database cannot be used, or belongs to another CA.
    pub async fn open_or_create(state_dir: &Path, relay_url: &Url) -> Result<Self, Error> {
        Self::builder(state_dir).open_or_create(relay_url).await
    }

    /// For all other ways to open one. The CA is always in the state directory.
    pub fn builder(state_dir: &Path) -> Builder {
        Builder::new(state_dir)
    }

    /// Makes the tables of a shared database, or brings them up to date; `false` when there was
    /// nothing to do. The database's owner calls this where the relays' role may not.
    ///
    /// # Errors
    /// The database fails, or was migrated by a newer version.
    pub async fn migrate(database: &Database) -> Result<bool, Error> {
        store::migrate(database).await
    }
}

/// Where an authority is, before it is opened.
#[derive(Clone)]
pub struct Builder {
    state_dir: PathBuf,
    database: Option<Database>,
    clock: Clock,
}

impl Builder {
    fn new(state_dir: &Path) -> Self {
        Self {
            state_dir: state_dir.to_owned(),
            database: None,
            clock: Arc::new(SystemTime::now),
        }
    }

    /// Keeps the tables in this database instead of the state directory. The CA stays in the
    /// state directory, and must be the one of all relays that share the database.
    #[must_use]
    pub fn database(mut self, database: Option<Database>) -> Self {
        self.database = database;
        self
    }

    /// Takes the time from here.
    #[must_use]
    pub fn clock(mut self, clock: Clock) -> Self {
        self.clock = clock;
        self
    }

    /// Opens an authority that exists.
    ///
    /// # Errors
    /// [`Error::NoAuthority`] when there is none, [`Error::ForeignCa`] when the database belongs
    /// to another.
    pub async fn open(self) -> Result<Authority, Error> {
        if !self.state_dir.is_dir() {
            return Err(Error::NoAuthority {
                path: self.state_dir,
            });
        }
        files::check_dir(&self.state_dir)?;
        self.open_at(None).await
    }

    /// Opens the authority, or makes it: then the URL's host becomes its permanent trust domain. Stores
    /// the URL for [`Authority::relay_url`].
    ///
    /// # Errors
    /// [`Error::ForeignCa`] when the database belongs to relays with another CA than the one in
    /// the state directory, or the state directory has none.
    pub async fn open_or_create(self, relay_url: &Url) -> Result<Authority, Error> {
        check_relay_url(relay_url)?;
        files::private_dir(&self.state_dir)?;
        self.open_at(Some(relay_url)).await
    }

    async fn open_at(self, relay_url: Option<&Url>) -> Result<Authority, Error> {
        // Held until everything is there and migrated, no longer.
        let lock = lock(self.state_dir.join(LOCK)).await?;
        let (store, ca, was_created) = match &self.database {
            None => {
                let (ca, was_created) = self.ca(relay_url)?;
                (store::open_sqlite(&self.state_dir).await?, ca, was_created)
            }
            Some(database) => {
                // Damaged files are reported before the database is asked.
                Ca::load(&self.state_dir)?;
                let store = store::open_postgres(database).await?;
                let (ca, was_created) = self.agree(&store, relay_url).await?;
                (store, ca, was_created)
            }
        };
        if let Some(url) = relay_url {
            store.set_setting(RELAY_URL, url.as_str()).await?;
        }
        drop(lock);
        let roots = ca.roots().clone();
        let domain = roots.trust_domain().clone();
        let validator = Validator::new(roots, domain);
        Ok(Authority {
            inner: Arc::new(Inner { ca, validator }),
            store,
            validity: Validity::default(),
            clock: self.clock,
            system_names: SystemNames::default(),
            was_created,
        })
    }

    /// The CA of the state directory, and whether it was made now.
    fn ca(&self, relay_url: Option<&Url>) -> Result<(Ca, bool), Error> {
        match (Ca::load(&self.state_dir)?, relay_url) {
            (Some(ca), _) => Ok((ca, false)),
            (None, Some(url)) => {
                let domain = TrustDomain::from_url(url)?;
                let ca = Ca::create(&self.state_dir, &domain, (self.clock)())?;
                Ok((ca, true))
            }
            (None, None) => Err(Error::NoAuthority {
                path: self.state_dir.clone(),
            }),
        }
    }

    /// The same, where the database must have this CA's pin, or none yet. Relays that start
    /// together on an empty database go through here one by one, so that one makes the CA and
    /// the others are asked to copy it. A crash between the files and the commit leaves a CA that
    /// the next start makes known.
    async fn agree(&self, store: &Store, relay_url: Option<&Url>) -> Result<(Ca, bool), Error> {
        let at = store.shared().map(Database::to_string).unwrap_or_default();
        let foreign = |has_other| Error::ForeignCa {
            dir: self.state_dir.clone(),
            database: at.clone(),
            has_other,
        };
        let mut tx = store.begin().await?;
        match (store.ca_pin(&mut tx).await?, relay_url) {
            (Some(pin), _) => {
                let ca = Ca::load(&self.state_dir)?.ok_or_else(|| foreign(false))?;
                if pin_of(&ca)? == pin {
                    Ok((ca, false))
                } else {
                    Err(foreign(true))
                }
            }
            (None, Some(_)) => {
                let (ca, was_created) = self.ca(relay_url)?;
                store.set_ca_pin(&mut tx, &pin_of(&ca)?).await?;
                store.commit(tx).await?;
                Ok((ca, was_created))
            }
            (None, None) => Err(Error::NoSharedAuthority { database: at }),
        }
    }
}

/// As the database keeps it: SHA-256 of the CA's certificate, in hexadecimal.
fn pin_of(ca: &Ca) -> Result<String, Error> {
    let pins = ca.roots().pins();
    let [pin, ..] = &pins[..] else {
        return Err(Error::NoCa);
    };
    Ok(pin.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Released when dropped.
async fn lock(path: PathBuf) -> Result<File, Error> {
    let locked = {
        let path = path.clone();
        tokio::task::spawn_blocking(move || {
            let file = files::open_private(&path)?;
            file.lock().map_err(|source| {
                files::failed("lock", &path, source, "use a file system that has locks")
            })?;
            Ok::<_, Error>(file)
        })
        .await
    };
    locked.unwrap_or_else(|error| {
        let source = std::io::Error::other(error);
        Err(files::failed("lock", &path, source, "try again").into())
    })
}

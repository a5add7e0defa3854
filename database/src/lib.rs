//! The PostgreSQL that relays share: where it is, and what a connection to it must be like.
//!
//! Each component that keeps tables in it migrates its own: see [`migrations`].
//!
//! **Invariant:** the password is in no error, no log and no `Debug`; nothing but `sqlx` gets it.
//!
//! A connection over TLS takes rustls' default provider of the process: the binary sets it first.

#![warn(missing_docs)]
#![warn(clippy::mod_module_files)]

mod error;
pub mod migrations;

pub use error::Error;

use sqlx::{
    ConnectOptions, Connection, Executor, PgConnection,
    postgres::{PgConnectOptions, PgPool, PgPoolOptions, PgSslMode},
};
use std::{fmt, io, net::IpAddr, str::FromStr, time::Duration};
use tokio::net::UdpSocket;
use url::Url;

/// How long a connection may take to be made, name resolution and TLS included; and how long a
/// query waits for a free one.
pub const CONNECT: Duration = Duration::from_secs(3);
/// How long a query may take before its connection is given up.
pub const QUERY: Duration = Duration::from_secs(5);
/// A connection of a pool is replaced after this long, so that a database that has moved is
/// followed even if its old address still answers.
const CONNECTION_LIFE: Duration = Duration::from_secs(300);
/// A connection without a query for so long is closed. An idle connection has no reader, so this is
/// also how soon those to a database that was restarted give their descriptors back.
const IDLE: Duration = Duration::from_secs(30);

/// Parameters of the URL that mean something. Others are refused: a mistyped one could hold a
/// password, and would be logged.
const PARAMETERS: [&str; 16] = [
    "sslmode",
    "ssl-mode",
    "sslrootcert",
    "ssl-root-cert",
    "ssl-ca",
    "sslcert",
    "ssl-cert",
    "sslkey",
    "ssl-key",
    "host",
    "hostaddr",
    "port",
    "dbname",
    "user",
    "password",
    "application_name",
];

/// The parameters of each session. The server's own limits end the sessions of a relay that has
/// vanished; `search_path` is the role's own.
const SESSION: &str = "SET statement_timeout = '5s'; SET lock_timeout = '4s'; \
                       SET idle_in_transaction_session_timeout = '5s'";

/// A PostgreSQL database, by its URL. Its name is resolved again for each connection.
#[derive(Clone)]
pub struct Database {
    options: Box<PgConnectOptions>,
    has_password: bool,
}

impl Database {
    /// Reads `postgres://USER[:PASSWORD]@HOST[:PORT]/NAME[?sslmode=…&sslrootcert=…]`. What it
    /// leaves out is taken from libpq's variables (`PGPASSWORD`, `PGPASSFILE`, `PGSSLMODE` and so
    /// on).
    ///
    /// `sslmode` is as in libpq: `disable`; `prefer` (the default) and `require` encrypt but ask
    /// the server for no proof; `verify-ca` checks its chain, `verify-full` its name too, against
    /// the public CAs and those in `sslrootcert`.
    ///
    /// # Errors
    /// [`Error::Invalid`], which never repeats the URL.
    pub fn from_url(url: &str) -> Result<Self, Error> {
        let url = Url::parse(url.trim()).map_err(|error| {
            invalid(&format!(
                "{error}; write postgres://USER@HOST:PORT/NAME, with special characters \
                 percent-encoded"
            ))
        })?;
        if !matches!(url.scheme(), "postgres" | "postgresql") {
            return Err(invalid("it does not begin with postgres://"));
        }
        // sqlx ignores parameters that it does not support: with a mistyped `sslmode` it would
        // connect without verifying the server.
        for (key, _) in url.query_pairs() {
            // The key is not repeated either: in `?pass&word` the secret is in it.
            if !PARAMETERS.contains(&key.as_ref()) {
                return Err(invalid(&format!(
                    "it has a parameter that is not one of {}",
                    PARAMETERS.join(", ")
                )));
            }
        }
        let has_password =
            url.password().is_some() || url.query_pairs().any(|(key, _)| key == "password");
        // The cause is dropped, since it may quote a value, and with it a password.
        let mut options = PgConnectOptions::from_str(url.as_str())
            .map_err(|_| invalid("one of its parameters has a value that cannot be"))?
            // Ours are short and known; the callers report their failures.
            .disable_statement_logging();
        if options.get_application_name().is_none() {
            options = options.application_name("throwline");
        }
        Ok(Self {
            options: Box::new(options),
            has_password,
        })
    }

    /// Whether the URL itself holds a password, and must therefore be kept as one.
    pub fn url_has_password(&self) -> bool {
        self.has_password
    }

    /// What an attacker on the way to a server on another machine could do, if `sslmode` lets it.
    pub fn exposure(&self) -> Option<&'static str> {
        let host = self.options.get_host();
        let is_local = self.options.get_socket().is_some()
            || host.starts_with('/')
            || host.eq_ignore_ascii_case("localhost")
            || host
                .trim_matches(['[', ']'])
                .parse::<IpAddr>()
                .is_ok_and(|address| address.is_loopback());
        if is_local {
            return None;
        }
        match self.options.get_ssl_mode() {
            PgSslMode::Disable => Some("an attacker on the path can read and change the traffic"),
            PgSslMode::Allow | PgSslMode::Prefer => Some(
                "an attacker on the path can turn the encryption off, then read and change the traffic",
            ),
            PgSslMode::Require => Some(
                "an attacker on the path can impersonate the server, then read and change the traffic",
            ),
            PgSslMode::VerifyCa => {
                Some("a holder of another certificate of the same CA can impersonate the server")
            }
            PgSslMode::VerifyFull => None,
        }
    }

    /// The role that this connects as.
    pub fn role(&self) -> &str {
        self.options.get_username()
    }

    /// One connection, fit for writing.
    ///
    /// # Errors
    /// [`Error::Failed`], after [`CONNECT`] at the latest.
    pub async fn connect(&self) -> Result<PgConnection, Error> {
        let connecting = async {
            let mut connection = self.options.connect().await?;
            prepare(&mut connection).await?;
            Ok(connection)
        };
        match tokio::time::timeout(CONNECT, connecting).await {
            Ok(connected) => connected.map_err(|error| self.failed(&error)),
            Err(_) => Err(self.failed_because(format!("it did not answer within {CONNECT:?}"))),
        }
    }

    /// A pool of at most `connections`, which makes the first when it is needed.
    pub fn pool(&self, connections: u32) -> PgPool {
        PgPoolOptions::new()
            .max_connections(connections)
            .acquire_timeout(CONNECT)
            .max_lifetime(CONNECTION_LIFE)
            .idle_timeout(IDLE)
            .after_connect(|connection, _| Box::pin(prepare(connection)))
            .connect_lazy_with((*self.options).clone())
    }

    /// The address by which this machine reaches the database's: one by which the other relays,
    /// which reach the database too, most likely reach this machine. Sends nothing.
    ///
    /// # Errors
    /// When the name cannot be resolved or there is no route.
    pub async fn local_address(&self) -> io::Result<IpAddr> {
        let socket_file = self.options.get_socket().is_some();
        if socket_file || self.options.get_host().starts_with('/') {
            return Ok(IpAddr::from([127, 0, 0, 1]));
        }
        let target = (self.options.get_host(), self.options.get_port());
        let mut last = io::Error::from(io::ErrorKind::NotFound);
        for address in tokio::net::lookup_host(target).await? {
            let any: IpAddr = if address.is_ipv4() {
                [0; 4].into()
            } else {
                [0; 16].into()
            };
            let socket = UdpSocket::bind((any, 0)).await?;
            // On a UDP socket, connect only selects route and source address.
            match socket.connect(address).await {
                Ok(()) => return Ok(socket.local_addr()?.ip()),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// An error of this database in our words.
    pub fn failed(&self, error: &sqlx::Error) -> Error {
        self.failed_because(match error {
            sqlx::Error::PoolTimedOut => format!("it did not answer within {CONNECT:?}"),
            error => error.to_string(),
        })
    }

    /// The same for what is no error of `sqlx`.
    pub fn failed_because(&self, what: String) -> Error {
        Error::Failed {
            at: self.to_string(),
            what,
        }
    }
}

/// `HOST:PORT/NAME`.
impl fmt::Display for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.options.get_socket() {
            Some(socket) => write!(f, "{}", socket.display())?,
            None => f.write_str(self.options.get_host())?,
        }
        let name = self.options.get_database().unwrap_or(self.role());
        write!(f, ":{}/{name}", self.options.get_port())
    }
}

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Database({self})")
    }
}

/// Sets the session up, and refuses a server that cannot write: one that was the primary until
/// a moment ago, or a name that still points to a standby.
async fn prepare(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    connection.execute(SESSION).await?;
    let standby: bool = sqlx::query_scalar("SELECT pg_is_in_recovery()")
        .fetch_one(&mut *connection)
        .await?;
    if standby {
        let error = io::Error::other("this server is a standby, which cannot be written to");
        return Err(sqlx::Error::Io(error));
    }
    Ok(())
}

/// Closes a connection gracefully, within [`QUERY`].
pub async fn close(connection: PgConnection) {
    // The server notices either way.
    let _ = tokio::time::timeout(QUERY, connection.close()).await;
}

fn invalid(what: &str) -> Error {
    Error::Invalid(format!("the database's URL cannot be used: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECRET: &str = "hunter2";

    #[test]
    fn a_url_is_shown_without_its_password() {
        for url in [
            "postgres://relay:hunter2@db.example.com:5433/throwline?sslmode=verify-full",
            "postgresql://relay@db.example.com:5433/throwline?password=hunter2",
        ] {
            let database = Database::from_url(url).unwrap();
            assert!(database.url_has_password());
            assert_eq!(database.to_string(), "db.example.com:5433/throwline");
            assert_eq!(database.role(), "relay");
            assert!(!format!("{database:?}").contains(SECRET));
            let error = database.failed(&sqlx::Error::PoolTimedOut).to_string();
            assert!(error.contains("db.example.com:5433/throwline"), "{error}");
        }
        let without = Database::from_url("postgres://relay@db/throwline").unwrap();
        assert!(!without.url_has_password());
    }

    #[test]
    fn only_a_proved_server_on_another_machine_is_without_exposure() {
        let exposure = |rest: &str| {
            let url = format!("postgres://relay@{rest}");
            Database::from_url(&url).unwrap().exposure()
        };
        for mode in ["disable", "allow", "prefer", "require", "verify-ca"] {
            for local in ["127.0.0.1", "[::1]", "localhost", "%2Frun%2Fpostgresql"] {
                assert_eq!(
                    exposure(&format!("{local}/t?sslmode={mode}")),
                    None,
                    "{local}"
                );
            }
            for far in ["db", "10.0.0.1", "[2001:db8::1]", "localhost.example.com"] {
                assert!(
                    exposure(&format!("{far}/t?sslmode={mode}")).is_some(),
                    "{far} {mode}"
                );
            }
        }
        assert_eq!(exposure("db/t?sslmode=verify-full"), None);
    }

    #[test]
    fn what_cannot_be_used_is_refused_without_being_repeated() {
        for bad in [
            "hunter2",
            "mysql://relay:hunter2@db/throwline",
            "postgres://relay:hunter2@db:99999/throwline",
            "postgres://relay:hunter2@db/throwline?sslmode=hunter2",
            "postgres://relay@db/throwline?pasword=hunter2",
            "postgres://relay@db/throwline?hunter2",
            "postgres://relay:hunter2@[db/throwline",
        ] {
            let error = Database::from_url(bad).unwrap_err();
            let shown = format!("{error} {error:?}");
            assert!(!shown.contains(SECRET), "{bad}: {shown}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics_or_is_repeated(text in "\\PC{0,40}") {
            let url = format!("postgres://relay:{SECRET}@{text}");
            if let Err(error) = Database::from_url(&url) {
                prop_assert!(!error.to_string().contains(SECRET));
            }
            let _ = Database::from_url(&text);
        }
    }

    #[tokio::test]
    async fn a_database_that_is_not_there_is_named() {
        let port = std::net::TcpListener::bind("127.0.0.1:0")
            .and_then(|listener| listener.local_addr())
            .unwrap()
            .port();
        let url = format!("postgres://relay:{SECRET}@127.0.0.1:{port}/throwline?sslmode=disable");
        let database = Database::from_url(&url).unwrap();
        let error = database.connect().await.unwrap_err();
        let shown = format!("{error} {error:?}");
        assert!(
            shown.contains(&format!("127.0.0.1:{port}/throwline")),
            "{shown}"
        );
        assert!(!shown.contains(SECRET), "{shown}");
        let local = database.local_address().await.unwrap();
        assert!(local.is_loopback(), "{local}");
    }
}

//! The files of `migrations/`, in the binary. One that databases have seen never changes: they keep
//! its checksum.

use std::sync::LazyLock;

use sqlx::migrate::Migrator;
use throwline_database::migrations::{File, Set, migrator};

const SQLITE_FILES: &[File] = &[
    (
        1,
        "authority",
        include_str!("../../migrations/sqlite/0001_authority.sql"),
    ),
    (
        2,
        "renewals",
        include_str!("../../migrations/sqlite/0002_renewals.sql"),
    ),
    (
        3,
        "revocations",
        include_str!("../../migrations/sqlite/0003_revocations.sql"),
    ),
];

const POSTGRES_FILES: &[File] = &[
    (
        1,
        "authority",
        include_str!("../../migrations/postgres/0001_authority.sql"),
    ),
    (
        2,
        "renewals",
        include_str!("../../migrations/postgres/0002_renewals.sql"),
    ),
    (
        3,
        "revocations",
        include_str!("../../migrations/postgres/0003_revocations.sql"),
    ),
];

pub(crate) static SQLITE: LazyLock<Migrator> = LazyLock::new(|| migrator(SQLITE_FILES));
pub(crate) static POSTGRES: LazyLock<Set> =
    LazyLock::new(|| Set::new("authority_migrations", POSTGRES_FILES));

#[cfg(test)]
mod tests {
    use std::path::Path;

    use sqlx::migrate::MigrationType;

    use super::*;

    type Applied = (i64, String, MigrationType, String, Vec<u8>, bool);

    fn applied(migrator: &Migrator) -> Vec<Applied> {
        let each = migrator.iter().map(|one| {
            let (description, sql) = (one.description.to_string(), one.sql.as_str().to_owned());
            let checksum = one.checksum.to_vec();
            (
                one.version,
                description,
                one.migration_type,
                sql,
                checksum,
                one.no_tx,
            )
        });
        each.collect()
    }

    /// What sqlx itself reads in the directory.
    async fn read(dir: &str) -> Vec<Applied> {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join(dir);
        applied(&Migrator::new(dir).await.unwrap())
    }

    #[tokio::test]
    async fn no_file_is_left_out() {
        assert_eq!(applied(&SQLITE), read("migrations/sqlite").await);
        assert_eq!(
            applied(POSTGRES.migrator()),
            read("migrations/postgres").await
        );
    }
}

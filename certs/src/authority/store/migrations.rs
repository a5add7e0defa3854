//! The files of `migrations/`, in the binary. One that databases have seen never changes: they keep
//! its checksum.

use sqlx::{
    SqlSafeStr,
    migrate::{Migration, MigrationType, Migrator},
};
use std::sync::LazyLock;

/// A file `NNNN_what_it_does.sql`: its number, its words, its text.
type File = (i64, &'static str, &'static str);

const SQLITE_FILES: [File; 1] = [(
    1,
    "authority",
    include_str!("../../../migrations/sqlite/0001_authority.sql"),
)];

const POSTGRES_FILES: [File; 1] = [(
    1,
    "shared",
    include_str!("../../../migrations/postgres/0001_shared.sql"),
)];

pub(super) static SQLITE: LazyLock<Migrator> = LazyLock::new(|| migrator(&SQLITE_FILES));
pub(super) static POSTGRES: LazyLock<Migrator> = LazyLock::new(|| migrator(&POSTGRES_FILES));

fn migrator(files: &[File]) -> Migrator {
    let migrations = files.iter().map(|(version, description, sql)| {
        let sql = (*sql).into_sql_str();
        let simple = MigrationType::Simple;
        Migration::new(*version, (*description).into(), simple, sql, false)
    });
    Migrator::with_migrations(migrations.collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    type Told = (i64, String, MigrationType, String, Vec<u8>, bool);

    fn told(migrator: &Migrator) -> Vec<Told> {
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
    async fn read(dir: &str) -> Vec<Told> {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join(dir);
        told(&Migrator::new(dir).await.unwrap())
    }

    #[tokio::test]
    async fn no_file_is_left_out() {
        assert_eq!(told(&SQLITE), read("migrations/sqlite").await);
        assert_eq!(told(&POSTGRES), read("migrations/postgres").await);
    }
}

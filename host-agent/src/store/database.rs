//! The database file: opened by one process at a time, checked, and brought to this
//! program's schema.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use rusqlite::{Connection, OpenFlags};

/// Marks the file as ours in its header (`PRAGMA application_id`): "HAgt".
const APPLICATION_ID: i64 = 0x4841_6774;

/// Name of the file in its directory.
const FILE: &str = "host-agent.db";
/// Held with `flock` by the process that has the database.
const LOCK: &str = "lock";

/// Why the store cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process has it.
    #[error("another host-agent serve uses {}", path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// A newer program has written it.
    #[error(
        "{} has schema {found}, and this program, host-agent {}, knows schemas up to {known}",
        path.display(), env!("CARGO_PKG_VERSION")
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its schema.
        found: usize,
        /// The newest schema of this program.
        known: usize,
    },
    /// The file is not one of ours, or is damaged.
    #[error("{} is damaged: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was found.
        what: String,
    },
    /// A file or directory.
    #[error("cannot {what} {}", path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// SQLite.
    #[error("store of services")]
    Sqlite(#[from] rusqlite::Error),
}

impl StoreError {
    fn file(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::File { what, path, source }
    }
}

/// An open database. A transaction that is committed is on disk.
#[derive(Debug)]
pub struct Database {
    /// The connection.
    pub connection: Connection,
    _lock: Flock<File>,
}

impl Database {
    /// Opens or creates the database in `directory`, and applies those of `migrations`, each
    /// the SQL from one schema to the next, that it lacks. A database that has data is copied
    /// first. Blocking.
    pub fn open(directory: &Path, migrations: &[&str]) -> Result<Self, StoreError> {
        let made = DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory);
        made.map_err(StoreError::file("make", directory))?;
        let lock = lock(directory)?;
        let path = directory.join(FILE);
        // SQLite gives its other files the mode of this one.
        OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(StoreError::file("open", &path))?;
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let mut connection = Connection::open_with_flags(&path, flags)?;
        // Acknowledged means synced: with FULL each commit syncs the log.
        let settings = "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; \
                        PRAGMA foreign_keys = ON; PRAGMA trusted_schema = OFF;";
        connection
            .execute_batch(settings)
            .map_err(|error| damaged(&path, error))?;
        check(&connection, &path)?;
        migrate(&mut connection, &path, migrations)?;
        Ok(Self {
            connection,
            _lock: lock,
        })
    }
}

fn lock(directory: &Path) -> Result<Flock<File>, StoreError> {
    let path = directory.join(LOCK);
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .map_err(StoreError::file("open", &path))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|_| StoreError::InUse {
        path: directory.to_owned(),
    })
}

/// Refuses a file whose pages or indices are inconsistent, or that another program made.
fn check(connection: &Connection, path: &Path) -> Result<(), StoreError> {
    let found: String = connection
        .query_row("PRAGMA quick_check(1)", [], |row| row.get(0))
        .map_err(|error| damaged(path, error))?;
    let application: i64 = connection.query_row("PRAGMA application_id", [], |row| row.get(0))?;
    let what = match (found.as_str(), application) {
        ("ok", 0 | APPLICATION_ID) => return Ok(()),
        ("ok", other) => format!("it belongs to another application ({other:#x})"),
        (text, _) => text.to_owned(),
    };
    Err(StoreError::Damaged {
        path: path.to_owned(),
        what,
    })
}

/// The error of SQLite for a file that is damaged or no database is named as that.
fn damaged(path: &Path, error: rusqlite::Error) -> StoreError {
    use rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase};
    match error.sqlite_error_code() {
        Some(DatabaseCorrupt | NotADatabase) => StoreError::Damaged {
            path: path.to_owned(),
            what: error.to_string(),
        },
        _ => error.into(),
    }
}

fn migrate(
    connection: &mut Connection,
    path: &Path,
    migrations: &[&str],
) -> Result<(), StoreError> {
    let found: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    let found = usize::try_from(found).unwrap_or(usize::MAX);
    let Some(missing) = migrations.get(found..) else {
        return Err(StoreError::Newer {
            path: path.to_owned(),
            found,
            known: migrations.len(),
        });
    };
    if missing.is_empty() {
        return Ok(());
    }
    if found > 0 {
        copy(
            connection,
            &path.with_extension(format!("schema-{found}.db")),
        )?;
    }
    let transaction = connection.transaction()?;
    for step in missing {
        transaction.execute_batch(step)?;
    }
    let known = migrations.len();
    transaction.execute_batch(&format!(
        "PRAGMA user_version = {known}; PRAGMA application_id = {APPLICATION_ID};"
    ))?;
    Ok(transaction.commit()?)
}

/// Copies the whole database to `to`, which is complete once it has its name.
fn copy(connection: &Connection, to: &Path) -> Result<(), StoreError> {
    let partial = to.with_extension("partial");
    match fs::remove_file(&partial) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(StoreError::file("remove", &partial)(error));
        }
        _ => {}
    }
    connection.execute("VACUUM INTO ?1", [partial.to_string_lossy()])?;
    let synced = File::open(&partial).and_then(|file| file.sync_all());
    synced.map_err(StoreError::file("sync", &partial))?;
    fs::rename(&partial, to).map_err(StoreError::file("name", to))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: &str = "CREATE TABLE a (x INTEGER) STRICT; INSERT INTO a VALUES (7);";
    const SECOND: &str = "ALTER TABLE a ADD y INTEGER;";

    #[test]
    fn a_database_is_copied_before_its_schema_changes() {
        let dir = tempfile::tempdir().unwrap();
        drop(Database::open(dir.path(), &[FIRST]).unwrap());
        assert_eq!(
            fs::read_dir(dir.path()).unwrap().count(),
            2,
            "file and lock"
        );
        let database = Database::open(dir.path(), &[FIRST, SECOND]).unwrap();
        let sum = "SELECT x + coalesce(y, 1) FROM a";
        let sum: i64 = database
            .connection
            .query_row(sum, [], |row| row.get(0))
            .unwrap();
        assert_eq!(sum, 8);
        let copy = Connection::open(dir.path().join("host-agent.schema-1.db")).unwrap();
        let x: i64 = copy
            .query_row("SELECT x FROM a", [], |row| row.get(0))
            .unwrap();
        assert_eq!(x, 7);
        assert!(copy.prepare("SELECT y FROM a").is_err());
    }

    #[test]
    fn a_migration_that_fails_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        drop(Database::open(dir.path(), &[FIRST]).unwrap());
        let bad = [FIRST, SECOND, "no SQL"];
        assert!(Database::open(dir.path(), &bad).is_err());
        let database = Database::open(dir.path(), &[FIRST]).unwrap();
        assert!(database.connection.prepare("SELECT y FROM a").is_err());
    }

    #[test]
    fn an_older_program_refuses_a_newer_database_by_name() {
        let dir = tempfile::tempdir().unwrap();
        drop(Database::open(dir.path(), &[FIRST, SECOND]).unwrap());
        let error = Database::open(dir.path(), &[FIRST])
            .unwrap_err()
            .to_string();
        assert!(error.contains("has schema 2"), "{error}");
        assert!(error.contains("knows schemas up to 1"), "{error}");
    }

    #[test]
    fn one_process_has_the_database() {
        let dir = tempfile::tempdir().unwrap();
        let first = Database::open(dir.path(), &[FIRST]).unwrap();
        let refused = Database::open(dir.path(), &[FIRST]).unwrap_err();
        assert!(matches!(refused, StoreError::InUse { .. }), "{refused}");
        drop(first);
        Database::open(dir.path(), &[FIRST]).unwrap();
    }

    #[test]
    fn a_damaged_file_is_refused_and_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        drop(Database::open(dir.path(), &[FIRST]).unwrap());
        let path = dir.path().join(FILE);
        let whole = fs::read(&path).unwrap();
        let mut flipped = whole.clone();
        flipped[100] ^= 0xff;
        for bad in [&whole[..whole.len() / 2], b"no database at all", &flipped] {
            fs::write(&path, bad).unwrap();
            let refused = Database::open(dir.path(), &[FIRST]).unwrap_err();
            assert!(matches!(refused, StoreError::Damaged { .. }), "{refused:?}");
            assert_eq!(fs::read(&path).unwrap(), bad);
        }
        fs::write(&path, whole).unwrap();
        Database::open(dir.path(), &[FIRST]).unwrap();
    }

    #[test]
    fn only_the_owner_can_read_the_file() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let _database = Database::open(dir.path(), &[FIRST]).unwrap();
        for entry in fs::read_dir(dir.path()).unwrap() {
            let entry = entry.unwrap();
            let mode = entry.metadata().unwrap().permissions().mode();
            assert_eq!(mode & 0o077, 0, "{}", entry.path().display());
        }
    }
}

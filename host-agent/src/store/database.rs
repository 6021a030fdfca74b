//! The database file: opened by one process at a time, checked, and brought to this
//! program's schema.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use rusqlite::{Connection, OpenFlags};

use super::good_copy::{self, Copier, Restored};

/// Marks the file as ours in its header (`PRAGMA application_id`): "HAgt".
const APPLICATION_ID: i64 = 0x4841_6774;

/// Name of the file in its directory.
const FILE: &str = "host-agent.db";
/// The table of the events.
pub(super) const EVENTS: &str = "event";
/// Longest wait for the connection that makes a copy, which writes one row.
const BUSY: Duration = Duration::from_secs(10);
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
    pub(super) fn file(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::File { what, path, source }
    }
}

/// An open database. A transaction that is committed is on disk.
#[derive(Debug)]
pub struct Database {
    /// The connection.
    pub connection: Connection,
    /// Whether another table than that of the events changed since this was last taken.
    changed: Arc<AtomicBool>,
    copier: Copier,
    restored: Option<Restored>,
    _lock: Flock<File>,
}

impl Database {
    /// Opens or creates the database in `directory`, and applies those of `migrations`, each
    /// the SQL from one schema to the next, that it lacks. A database that has data is copied
    /// first. A database that is damaged, gone, older than its good copy, or not `readable` is
    /// put aside and replaced by that. Blocking.
    pub fn open(
        directory: &Path,
        migrations: &[&str],
        readable: impl Fn(&Connection) -> rusqlite::Result<()>,
    ) -> Result<Self, StoreError> {
        let made = DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory);
        made.map_err(StoreError::file("make", directory))?;
        let lock = lock(directory)?;
        let path = directory.join(FILE);
        let open = || -> Result<Connection, StoreError> {
            let mut connection = open_checked(&path)?;
            migrate(&mut connection, &path, migrations)?;
            readable(&connection).map_err(|error| damaged(&path, error))?;
            Ok(connection)
        };
        let (mut connection, restored) = match open() {
            Err(StoreError::Damaged { what, .. }) if good_copy::exists(&path) => {
                let restored = good_copy::restore(&path, &what)?;
                (open()?, Some(restored))
            }
            opened => (opened?, None),
        };
        let changed = Arc::new(AtomicBool::new(false));
        let of_hook = Arc::clone(&changed);
        connection.update_hook(Some(move |_, _: &str, table: &str, _| {
            if table != EVENTS {
                of_hook.store(true, Ordering::Relaxed);
            }
        }))?;
        let copier = Copier::new(&path);
        copier.copy()?;
        Ok(Self {
            connection,
            changed,
            copier,
            restored,
            _lock: lock,
        })
    }

    /// Whether a table other than that of the events changed since the last call.
    pub fn take_changed(&self) -> bool {
        self.changed.swap(false, Ordering::Relaxed)
    }

    /// What makes good copies of it.
    pub fn copier(&self) -> &Copier {
        &self.copier
    }

    /// That its good copy was put in its place when it was opened.
    pub fn restored(&self) -> Option<&Restored> {
        self.restored.as_ref()
    }
}

/// Opens the database, which is created if there is neither a file nor a good copy.
fn open_checked(path: &Path) -> Result<Connection, StoreError> {
    let length = fs::metadata(path).map_or(0, |metadata| metadata.len());
    // SQLite takes an empty file for a new database.
    if length == 0 && good_copy::exists(path) {
        let what = "it is empty or gone".to_owned();
        let path = path.to_owned();
        return Err(StoreError::Damaged { path, what });
    }
    // SQLite gives its other files the mode of this one.
    OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(path)
        .map_err(StoreError::file("open", path))?;
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    // Acknowledged means synced: with FULL each commit syncs the log.
    let settings = "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; \
                    PRAGMA foreign_keys = ON; PRAGMA trusted_schema = OFF;";
    connection
        .execute_batch(settings)
        .map_err(|error| damaged(path, error))?;
    connection.busy_timeout(BUSY)?;
    check(&connection, path)?;
    match good_copy::contradiction(&connection, path) {
        Some(what) => Err(StoreError::Damaged {
            path: path.to_owned(),
            what,
        }),
        None => Ok(connection),
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
    let answer = |pragma: &str| -> Result<String, StoreError> {
        let found = connection.query_row(pragma, [], |row| row.get(0));
        found.map_err(|error| damaged(path, error))
    };
    let mut found = answer("PRAGMA quick_check(1)")?;
    if found == "ok" {
        // The thorough check reads each row by each index. The events are too many for it.
        for table in tables(connection).map_err(|error| damaged(path, error))? {
            found = answer(&format!("PRAGMA integrity_check(\"{table}\")"))?;
            if found != "ok" {
                break;
            }
        }
    }
    let header = |name: &str| -> rusqlite::Result<i64> {
        connection.query_row(&format!("PRAGMA {name}"), [], |row| row.get(0))
    };
    let what = match (
        found.as_str(),
        header("application_id")?,
        header("user_version")?,
    ) {
        ("ok", 0, 0) | ("ok", APPLICATION_ID, 1..) => return Ok(()),
        ("ok", 0 | APPLICATION_ID, version) => format!("it has no schema {version}"),
        ("ok", other, _) => format!("it belongs to another application ({other:#x})"),
        (text, ..) => text.to_owned(),
    };
    Err(StoreError::Damaged {
        path: path.to_owned(),
        what,
    })
}

/// Every table but that of the events.
fn tables(connection: &Connection) -> rusqlite::Result<Vec<String>> {
    let sql = "SELECT name FROM sqlite_schema WHERE type = 'table' AND name <> ?1";
    let mut statement = connection.prepare(sql)?;
    let names = statement.query_map([EVENTS], |row| row.get(0))?;
    names.collect()
}

/// The error of SQLite for a file that is damaged or no database is named as that.
fn damaged(path: &Path, error: rusqlite::Error) -> StoreError {
    use rusqlite::Error::{FromSqlConversionFailure, IntegralValueOutOfRange, InvalidColumnType};
    use rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase};
    let is_damage = match &error {
        FromSqlConversionFailure(..) | IntegralValueOutOfRange(..) | InvalidColumnType(..) => true,
        error => matches!(
            error.sqlite_error_code(),
            Some(DatabaseCorrupt | NotADatabase)
        ),
    };
    if !is_damage {
        return error.into();
    }
    StoreError::Damaged {
        path: path.to_owned(),
        what: error.to_string(),
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
    connection.execute_batch(
        "CREATE TABLE IF NOT EXISTS good_copy (serial INTEGER NOT NULL) STRICT; \
         INSERT INTO good_copy SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM good_copy);",
    )?;
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
    good_copy::remove(&partial)?;
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
        drop(Database::open(dir.path(), &[FIRST], |_| Ok(())).unwrap());
        let files = fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(files, 3, "database, good copy and lock");
        let database = Database::open(dir.path(), &[FIRST, SECOND], |_| Ok(())).unwrap();
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
        drop(Database::open(dir.path(), &[FIRST], |_| Ok(())).unwrap());
        let bad = [FIRST, SECOND, "no SQL"];
        assert!(Database::open(dir.path(), &bad, |_| Ok(())).is_err());
        let database = Database::open(dir.path(), &[FIRST], |_| Ok(())).unwrap();
        assert!(database.connection.prepare("SELECT y FROM a").is_err());
    }

    #[test]
    fn an_older_program_refuses_a_newer_database_by_name() {
        let dir = tempfile::tempdir().unwrap();
        drop(Database::open(dir.path(), &[FIRST, SECOND], |_| Ok(())).unwrap());
        let error = Database::open(dir.path(), &[FIRST], |_| Ok(()))
            .unwrap_err()
            .to_string();
        assert!(error.contains("has schema 2"), "{error}");
        assert!(error.contains("knows schemas up to 1"), "{error}");
    }

    #[test]
    fn one_process_has_the_database() {
        let dir = tempfile::tempdir().unwrap();
        let first = Database::open(dir.path(), &[FIRST], |_| Ok(())).unwrap();
        let refused = Database::open(dir.path(), &[FIRST], |_| Ok(())).unwrap_err();
        assert!(matches!(refused, StoreError::InUse { .. }), "{refused}");
        drop(first);
        Database::open(dir.path(), &[FIRST], |_| Ok(())).unwrap();
    }

    #[test]
    fn a_damaged_file_without_a_copy_is_refused_and_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        drop(Database::open(dir.path(), &[FIRST], |_| Ok(())).unwrap());
        fs::remove_file(dir.path().join("host-agent.copy.db")).unwrap();
        let path = dir.path().join(FILE);
        let whole = fs::read(&path).unwrap();
        let mut flipped = whole.clone();
        flipped[100] ^= 0xff;
        for bad in [&whole[..whole.len() / 2], b"no database at all", &flipped] {
            fs::write(&path, bad).unwrap();
            let refused = Database::open(dir.path(), &[FIRST], |_| Ok(())).unwrap_err();
            assert!(matches!(refused, StoreError::Damaged { .. }), "{refused:?}");
            assert_eq!(fs::read(&path).unwrap(), bad);
        }
        fs::write(&path, whole).unwrap();
        Database::open(dir.path(), &[FIRST], |_| Ok(())).unwrap();
    }

    #[test]
    fn only_the_owner_can_read_the_file() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let _database = Database::open(dir.path(), &[FIRST], |_| Ok(())).unwrap();
        for entry in fs::read_dir(dir.path()).unwrap() {
            let entry = entry.unwrap();
            let mode = entry.metadata().unwrap().permissions().mode();
            assert_eq!(mode & 0o077, 0, "{}", entry.path().display());
        }
    }
}

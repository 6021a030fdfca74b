//! A good copy of the database beside it: made after changes, put in the place of a database
//! that is damaged. It has every table but the events, which are many and replaceable.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rusqlite::{Connection, OpenFlags};

use super::database::{EVENTS, StoreError};

/// Added to the number of the newest event when a copy is restored, so that no number is used
/// twice: more events than a host reports between two copies.
const SKIPPED_NUMBERS: i64 = 10_000_000;

/// Makes copies of an open database. It has a connection of its own for each, so that a copy
/// delays no change.
#[derive(Debug, Clone)]
pub struct Copier {
    database: PathBuf,
}

/// What was done about a database that is damaged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restored {
    /// What was wrong.
    pub what: String,
    /// Where the damaged file is now; `None` if there was no file.
    pub aside: Option<PathBuf>,
}

impl Copier {
    /// For the database at `database`.
    pub(super) fn new(database: &Path) -> Self {
        Self {
            database: database.to_owned(),
        }
    }

    /// Replaces the copy by one of the present state. Blocking.
    pub fn copy(&self) -> Result<(), StoreError> {
        let partial = self.database.with_extension("copy.partial");
        remove(&partial)?;
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let source = Connection::open_with_flags(&self.database, flags)?;
        // The copy never has a newer number than the database, unless that has lost a commit.
        source.execute("UPDATE good_copy SET serial = serial + 1", [])?;
        write_copy(&source, &partial)?;
        drop(source);
        let synced = File::open(&partial).and_then(|file| file.sync_all());
        synced.map_err(StoreError::file("sync", &partial))?;
        let copy = path(&self.database);
        fs::rename(&partial, &copy).map_err(StoreError::file("name", &copy))?;
        sync_directory(&copy)
    }
}

/// Where the copy of `database` is.
fn path(database: &Path) -> PathBuf {
    database.with_extension("copy.db")
}

/// Whether `database` has a copy.
pub(super) fn exists(database: &Path) -> bool {
    path(database).exists()
}

/// Why the copy has to replace a database whose pages are whole: it lacks what the copy has.
pub(super) fn contradiction(connection: &Connection, database: &Path) -> Option<String> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let copy = Connection::open_with_flags(path(database), flags).ok()?;
    let (of_copy, of_database) = (version(&copy)?, version(connection)?);
    if of_copy.0 == of_database.0 && of_copy.1 != of_database.1 {
        return Some("its tables are not those of its copy".into());
    }
    let (of_copy, of_database) = (serial(&copy)?, serial(connection)?);
    (of_copy > of_database).then(|| {
        format!("it has lost changes: it is number {of_database}, its copy number {of_copy}")
    })
}

fn serial(connection: &Connection) -> Option<i64> {
    let serial = connection.query_row("SELECT serial FROM good_copy", [], |row| row.get(0));
    serial.ok()
}

/// Number of the schema, and its text.
fn version(connection: &Connection) -> Option<(i64, String)> {
    let number = connection.query_row("PRAGMA user_version", [], |row| row.get(0));
    let sql = "SELECT group_concat(sql, ';') FROM \
               (SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL ORDER BY sql)";
    let text = connection.query_row(sql, [], |row| row.get(0));
    Some((number.ok()?, text.ok()?))
}

/// Puts the damaged `database` aside and its copy in its place.
pub(super) fn restore(database: &Path, what: &str) -> Result<Restored, StoreError> {
    let aside = aside(database);
    // The database first: without its file the next start comes here again. With its file and
    // without its log it could look whole and lack the changes of the log.
    let moved = rename(database, &aside)?;
    for suffix in ["-wal", "-shm"] {
        rename(&with_suffix(database, suffix), &with_suffix(&aside, suffix))?;
    }
    let partial = database.with_extension("restore.partial");
    remove(&partial)?;
    let copy = path(database);
    fs::copy(&copy, &partial).map_err(StoreError::file("copy", &copy))?;
    let connection = Connection::open(&partial)?;
    connection.execute(
        "UPDATE sqlite_sequence SET seq = seq + ?1 WHERE name = ?2",
        (SKIPPED_NUMBERS, EVENTS),
    )?;
    drop(connection);
    let synced = File::open(&partial).and_then(|file| file.sync_all());
    synced.map_err(StoreError::file("sync", &partial))?;
    fs::rename(&partial, database).map_err(StoreError::file("name", database))?;
    sync_directory(database)?;
    Ok(Restored {
        what: what.to_owned(),
        aside: moved.then_some(aside),
    })
}

/// Writes the tables of `source` to the new file `to`, as of one moment.
fn write_copy(source: &Connection, to: &Path) -> Result<(), StoreError> {
    // SQLite gives its journal the mode of this file.
    OpenOptions::new()
        .create_new(true)
        .write(true)
        .mode(0o600)
        .open(to)
        .map_err(StoreError::file("make", to))?;
    let mut copy = Connection::open(to)?;
    let transaction = copy.transaction()?;
    source.execute_batch("BEGIN")?;
    let number = |name: &str| -> rusqlite::Result<i64> {
        source.query_row(&format!("PRAGMA {name}"), [], |row| row.get(0))
    };
    for pragma in ["user_version", "application_id"] {
        let set = format!("PRAGMA {pragma} = {}", number(pragma)?);
        transaction.execute_batch(&set)?;
    }
    // Tables in the order in which they were made, then indices.
    let mut schema = source.prepare(
        "SELECT type, name, sql FROM sqlite_schema WHERE sql IS NOT NULL \
         AND name NOT LIKE 'sqlite~_%' ESCAPE '~' ORDER BY type = 'index', rowid",
    )?;
    let mut entries = schema.query([])?;
    let mut tables = vec!["sqlite_sequence".to_owned()];
    while let Some(entry) = entries.next()? {
        let (kind, name): (String, String) = (entry.get(0)?, entry.get(1)?);
        transaction.execute_batch(&entry.get::<_, String>(2)?)?;
        if kind == "table" && name != EVENTS {
            tables.push(name);
        }
    }
    for table in tables {
        copy_rows(source, &transaction, &table)?;
    }
    source.execute_batch("COMMIT")?;
    transaction.commit()?;
    Ok(())
}

fn copy_rows(source: &Connection, to: &Connection, table: &str) -> rusqlite::Result<()> {
    let mut read = match source.prepare(&format!("SELECT * FROM \"{table}\" ORDER BY rowid")) {
        // Only a database with numbered rows has the table of their numbers.
        Err(_) if table == "sqlite_sequence" => return Ok(()),
        read => read?,
    };
    let columns = read.column_count();
    let values = vec!["?"; columns].join(", ");
    let mut insert = to.prepare(&format!("INSERT INTO \"{table}\" VALUES ({values})"))?;
    let mut rows = read.query([])?;
    while let Some(row) = rows.next()? {
        let values = (0..columns).map(|column| row.get::<_, rusqlite::types::Value>(column));
        let values = values.collect::<rusqlite::Result<Vec<_>>>()?;
        insert.execute(rusqlite::params_from_iter(values))?;
    }
    Ok(())
}

/// A name beside `database` that is free: with the time in seconds.
fn aside(database: &Path) -> PathBuf {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.unwrap_or_default().as_secs();
    let names = (now..).map(|number| database.with_extension(format!("damaged-{number}.db")));
    let mut free = names.filter(|path| !path.exists());
    free.next()
        .expect("a directory has fewer files than u64 has numbers")
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut text = path.as_os_str().to_owned();
    text.push(suffix);
    text.into()
}

/// Whether there was a file to rename.
fn rename(from: &Path, to: &Path) -> Result<bool, StoreError> {
    match fs::rename(from, to) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(StoreError::file("put aside", from)(error)),
    }
}

/// Removes a file that a process which died has left.
pub(super) fn remove(path: &Path) -> Result<(), StoreError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(StoreError::file("remove", path)(error))
        }
        _ => Ok(()),
    }
}

fn sync_directory(of: &Path) -> Result<(), StoreError> {
    let directory = of.parent().unwrap_or(Path::new("."));
    let synced = File::open(directory).and_then(|directory| directory.sync_all());
    synced.map_err(StoreError::file("sync", directory))
}

#[cfg(test)]
mod tests;

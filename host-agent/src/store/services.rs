//! What was asked for and decided about services, in the database: services, their
//! revisions, operations. Every change is one transaction, which is on disk when the call
//! returns. All calls block.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use rusqlite::types::{FromSql, FromSqlError, FromSqlResult, ToSql, ToSqlOutput, ValueRef};
use rusqlite::{Connection, OptionalExtension as _, Row, params};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::database::{Database, StoreError};
use super::deployment::random_id;
use crate::digest::Digest;
use crate::service::PublishedPort;

/// The SQL from each schema to the next. A released entry never changes.
const MIGRATIONS: &[&str] = &[
    "
CREATE TABLE service (
  name TEXT PRIMARY KEY,
  expected TEXT NOT NULL,
  generation INTEGER NOT NULL,
  deployment TEXT
) STRICT;
CREATE TABLE revision (
  service TEXT NOT NULL REFERENCES service ON DELETE CASCADE,
  generation INTEGER NOT NULL,
  package TEXT NOT NULL,
  configuration TEXT NOT NULL,
  publish TEXT NOT NULL,
  user INTEGER NOT NULL,
  at_ms INTEGER NOT NULL,
  PRIMARY KEY (service, generation)
) STRICT;
CREATE TABLE operation (
  id TEXT PRIMARY KEY,
  service TEXT NOT NULL,
  kind TEXT NOT NULL,
  generation INTEGER NOT NULL,
  user INTEGER NOT NULL,
  state TEXT NOT NULL,
  error TEXT,
  started_ms INTEGER NOT NULL,
  ended_ms INTEGER
) STRICT;
CREATE INDEX operation_of_service ON operation (service, started_ms);
CREATE TABLE event (
  number INTEGER PRIMARY KEY AUTOINCREMENT,
  at_ms INTEGER NOT NULL,
  service TEXT,
  deployment TEXT,
  instance TEXT,
  text TEXT NOT NULL,
  event TEXT NOT NULL
) STRICT;
CREATE INDEX event_of_deployment ON event (deployment);
",
    "
CREATE TABLE agent (
  number INTEGER PRIMARY KEY AUTOINCREMENT,
  digest TEXT NOT NULL UNIQUE,
  version TEXT NOT NULL,
  withdrawn INTEGER NOT NULL,
  allow_downgrade INTEGER NOT NULL,
  user INTEGER NOT NULL,
  at_ms INTEGER NOT NULL,
  signature TEXT NOT NULL
) STRICT;
CREATE TABLE agent_failure (
  deployment TEXT NOT NULL,
  instance TEXT NOT NULL,
  digest TEXT NOT NULL,
  reason TEXT NOT NULL,
  at_ms INTEGER NOT NULL,
  PRIMARY KEY (deployment, instance, digest)
) STRICT;
",
    super::rollouts::MIGRATION,
];

/// Operations that are kept of one service; older ones are removed.
const MAX_OPERATIONS: u32 = 100;

/// The services of a host.
#[derive(Debug)]
pub struct ServiceStore(pub(super) Database);

/// What is wanted of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Expected {
    /// Its newest revision runs.
    Started,
    /// Nothing of it runs; its disks and logs stay.
    Stopped,
    /// Nothing of it is left.
    Deleted,
}

/// A service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceRecord {
    /// Name that the user gave.
    pub name: String,
    /// What is wanted.
    pub expected: Expected,
    /// Number of the revision that is wanted, from 1.
    pub generation: u64,
    /// Its deployment: chosen before it is created.
    pub deployment: Option<String>,
}

/// What is wanted of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// SHA-256 of its package.
    pub package: Digest,
    /// Text of its configuration.
    pub configuration: String,
    /// Public ports in place of those of its definition.
    pub publish: Vec<PublishedPort>,
}

/// One revision of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revision {
    /// Its number.
    pub generation: u64,
    /// What was applied.
    pub wanted: Wanted,
    /// Id of the user who applied it.
    pub user: u32,
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
}

/// Kind of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OperationKind {
    /// Create a service.
    Apply,
    /// Delete it.
    Delete,
    /// Stop it.
    Stop,
    /// Start it again.
    Start,
    /// Take it to a new revision.
    Update,
    /// Take it to an earlier revision.
    Rollback,
    /// Go on with an update.
    Resume,
}

/// State of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OperationState {
    /// The host is at it.
    Running,
    /// Done.
    Succeeded,
    /// It failed, or another operation has replaced it.
    Failed,
    /// The rollout is paused between two upgrade domains, as was asked for.
    Paused,
    /// An instance failed, and the rollout waits for a decision.
    Halted,
    /// An instance failed, and every instance is back at the revision before.
    RolledBack,
}

/// Something asked for that takes time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Operation {
    /// 32 hexadecimal digits.
    pub id: String,
    /// The service.
    pub service: String,
    /// What.
    pub kind: OperationKind,
    /// The revision that it is about.
    pub generation: u64,
    /// Id of the user who asked.
    pub user: u32,
    /// How far it is.
    pub state: OperationState,
    /// Why it failed.
    pub error: Option<String>,
    /// When it was accepted, in milliseconds since 1970.
    pub started_ms: u64,
    /// When it ended.
    pub ended_ms: Option<u64>,
}

/// What an apply did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Applied {
    /// The service is to be created.
    Begun(Operation),
    /// The service is the same already.
    Unchanged(ServiceRecord),
    /// It exists with another package or configuration.
    Differs(ServiceRecord),
    /// It is being deleted.
    Deleting,
}

impl ServiceStore {
    /// Opens the store in `data_dir`.
    pub fn open(data_dir: &Path) -> Result<Self, StoreError> {
        let opened = Database::open(&data_dir.join("state"), MIGRATIONS, readable);
        opened.map(Self)
    }

    /// The database.
    pub fn database(&self) -> &Database {
        &self.0
    }

    /// Every service, by name.
    pub fn services(&self) -> Result<Vec<ServiceRecord>, StoreError> {
        let sql = format!("{SELECT_SERVICES} ORDER BY name");
        let mut statement = self.0.connection.prepare(&sql)?;
        let found = statement.query_map([], service)?;
        Ok(found.collect::<Result<_, _>>()?)
    }

    /// The service called `name`.
    pub fn service(&self, name: &str) -> Result<Option<ServiceRecord>, StoreError> {
        Ok(find(&self.0.connection, name)?)
    }

    /// A revision of a service.
    pub fn revision(&self, name: &str, generation: u64) -> Result<Option<Revision>, StoreError> {
        Ok(revision_of(&self.0.connection, name, generation)?)
    }

    /// Every revision of a service, the oldest first.
    pub fn history(&self, name: &str) -> Result<Vec<Revision>, StoreError> {
        let sql = format!("{SELECT_REVISION} FROM revision WHERE service = ?1 ORDER BY generation");
        let mut statement = self.0.connection.prepare(&sql)?;
        let found = statement.query_map([name], revision)?;
        Ok(found.collect::<Result<_, _>>()?)
    }

    /// An operation.
    pub fn operation(&self, id: &str) -> Result<Option<Operation>, StoreError> {
        let sql = format!("{SELECT_OPERATION} WHERE id = ?1");
        let found = self.0.connection.query_row(&sql, [id], operation);
        Ok(found.optional()?)
    }

    /// Operations of a service, the newest first.
    pub fn operations(&self, name: &str) -> Result<Vec<Operation>, StoreError> {
        let sql = format!("{SELECT_OPERATION} WHERE service = ?1 ORDER BY rowid DESC");
        let mut statement = self.0.connection.prepare(&sql)?;
        let found = statement.query_map([name], operation)?;
        Ok(found.collect::<Result<_, _>>()?)
    }

    /// How many operations are kept in each state.
    pub fn operation_counts(&self) -> Result<Vec<(OperationState, u64)>, StoreError> {
        let sql = "SELECT state, count(*) FROM operation GROUP BY state";
        let mut statement = self.0.connection.prepare(sql)?;
        let found = statement.query_map([], |row| Ok((row.get(0)?, unsigned(row, 1)?)))?;
        Ok(found.collect::<Result<_, _>>()?)
    }

    /// Creates service `name` unless it exists.
    pub fn apply(&mut self, name: &str, wanted: &Wanted, user: u32) -> Result<Applied, StoreError> {
        let transaction = self.0.connection.transaction()?;
        if let Some(found) = find(&transaction, name)? {
            if found.expected == Expected::Deleted {
                return Ok(Applied::Deleting);
            }
            let newest = revision_of(&transaction, name, found.generation)?;
            let same = newest.is_some_and(|newest| newest.wanted == *wanted);
            return Ok(if same {
                Applied::Unchanged(found)
            } else {
                Applied::Differs(found)
            });
        }
        let now = now_ms();
        let generation = 1;
        transaction.execute(
            "INSERT INTO service (name, expected, generation) VALUES (?1, ?2, ?3)",
            params![name, Expected::Started, signed(generation)],
        )?;
        insert_revision(&transaction, name, generation, wanted, user, now)?;
        let begun = begin(&transaction, name, OperationKind::Apply, 1, user, now)?;
        transaction.commit()?;
        Ok(Applied::Begun(begun))
    }

    /// Wants service `name` deleted. An operation of it that runs has failed. `None` if there is
    /// no such service.
    pub fn delete(&mut self, name: &str, user: u32) -> Result<Option<Operation>, StoreError> {
        let transaction = self.0.connection.transaction()?;
        let Some(found) = find(&transaction, name)? else {
            return Ok(None);
        };
        if found.expected == Expected::Deleted {
            let sql = format!("{SELECT_OPERATION} WHERE service = ?1 AND state = ?2");
            let running = params![name, OperationState::Running];
            if let Some(running) = transaction.query_row(&sql, running, operation).optional()? {
                return Ok(Some(running));
            }
        }
        let now = now_ms();
        end(&transaction, name, Some("the service was deleted"), now)?;
        transaction.execute(
            "UPDATE service SET expected = ?2 WHERE name = ?1",
            params![name, Expected::Deleted],
        )?;
        let kind = OperationKind::Delete;
        let begun = begin(&transaction, name, kind, found.generation, user, now)?;
        transaction.commit()?;
        Ok(Some(begun))
    }

    /// Notes the deployment that is going to be created for service `name`.
    pub fn deploying(&mut self, name: &str, deployment: &str) -> Result<(), StoreError> {
        self.0.connection.execute(
            "UPDATE service SET deployment = ?2 WHERE name = ?1",
            params![name, deployment],
        )?;
        Ok(())
    }

    /// Ends the operation of service `name` that runs, if one does: it has succeeded unless
    /// there is an `error`.
    pub fn end(&mut self, name: &str, error: Option<&str>) -> Result<(), StoreError> {
        Ok(end(&self.0.connection, name, error, now_ms())?)
    }

    /// The service is deleted: forgets it, and ends its operation.
    pub fn forget(&mut self, name: &str) -> Result<(), StoreError> {
        let transaction = self.0.connection.transaction()?;
        end(&transaction, name, None, now_ms())?;
        transaction.execute("DELETE FROM service WHERE name = ?1", [name])?;
        Ok(transaction.commit()?)
    }

    /// Packages that revisions name.
    pub fn packages(&self) -> Result<Vec<Digest>, StoreError> {
        let sql = "SELECT DISTINCT package FROM revision";
        let mut statement = self.0.connection.prepare(sql)?;
        let found = statement.query_map([], |row| digest(row, 0))?;
        Ok(found.collect::<Result<_, _>>()?)
    }
}

/// Whether every row can be read.
fn readable(connection: &Connection) -> rusqlite::Result<()> {
    fn all<T>(
        connection: &Connection,
        sql: &str,
        parse: impl Fn(&Row<'_>) -> rusqlite::Result<T>,
    ) -> rusqlite::Result<()> {
        let mut statement = connection.prepare(sql)?;
        let mut found = statement.query_map([], parse)?;
        found.try_for_each(|row| row.map(drop))
    }
    all(connection, SELECT_SERVICES, service)?;
    all(
        connection,
        &format!("{SELECT_REVISION} FROM revision"),
        revision,
    )?;
    all(connection, SELECT_OPERATION, operation)
}

const SELECT_SERVICES: &str = "SELECT name, expected, generation, deployment FROM service";

const SELECT_REVISION: &str = "SELECT generation, package, configuration, publish, user, at_ms";

pub(super) const SELECT_OPERATION: &str = "SELECT id, service, kind, generation, user, state, error, \
                                started_ms, ended_ms FROM operation";

pub(super) fn find(connection: &Connection, name: &str) -> rusqlite::Result<Option<ServiceRecord>> {
    let sql = format!("{SELECT_SERVICES} WHERE name = ?1");
    connection.query_row(&sql, [name], service).optional()
}

pub(super) fn revision_of(
    connection: &Connection,
    name: &str,
    generation: u64,
) -> rusqlite::Result<Option<Revision>> {
    let sql = format!("{SELECT_REVISION} FROM revision WHERE service = ?1 AND generation = ?2");
    let found = connection.query_row(&sql, params![name, signed(generation)], revision);
    found.optional()
}

pub(super) fn insert_revision(
    connection: &Connection,
    name: &str,
    generation: u64,
    wanted: &Wanted,
    user: u32,
    now: u64,
) -> rusqlite::Result<()> {
    connection.execute(
        "INSERT INTO revision VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        params![
            name,
            signed(generation),
            wanted.package.hex(),
            wanted.configuration,
            ports(&wanted.publish),
            user,
            signed(now)
        ],
    )?;
    Ok(())
}

pub(super) fn begin(
    connection: &Connection,
    name: &str,
    kind: OperationKind,
    generation: u64,
    user: u32,
    now: u64,
) -> Result<Operation, StoreError> {
    let id = random_id().map_err(|source| StoreError::File {
        what: "read",
        path: "/dev/urandom".into(),
        source,
    })?;
    let begun = Operation {
        id,
        service: name.to_owned(),
        kind,
        generation,
        user,
        state: OperationState::Running,
        error: None,
        started_ms: now,
        ended_ms: None,
    };
    connection.execute(
        "INSERT INTO operation VALUES (?1, ?2, ?3, ?4, ?5, ?6, NULL, ?7, NULL)",
        params![
            begun.id,
            begun.service,
            begun.kind,
            signed(generation),
            user,
            begun.state,
            signed(now)
        ],
    )?;
    connection.execute(
        "DELETE FROM operation WHERE service = ?1 AND rowid NOT IN \
         (SELECT rowid FROM operation WHERE service = ?1 ORDER BY rowid DESC LIMIT ?2)",
        params![name, MAX_OPERATIONS],
    )?;
    Ok(begun)
}

pub(super) fn end(
    connection: &Connection,
    name: &str,
    error: Option<&str>,
    now: u64,
) -> rusqlite::Result<()> {
    let state = match error {
        None => OperationState::Succeeded,
        Some(_) => OperationState::Failed,
    };
    connection.execute(
        "UPDATE operation SET state = ?2, error = ?3, ended_ms = ?4 \
         WHERE service = ?1 AND state = ?5",
        params![name, state, error, signed(now), OperationState::Running],
    )?;
    Ok(())
}

fn service(row: &Row<'_>) -> rusqlite::Result<ServiceRecord> {
    Ok(ServiceRecord {
        name: row.get(0)?,
        expected: row.get(1)?,
        generation: unsigned(row, 2)?,
        deployment: row.get(3)?,
    })
}

fn revision(row: &Row<'_>) -> rusqlite::Result<Revision> {
    Ok(Revision {
        generation: unsigned(row, 0)?,
        wanted: Wanted {
            package: digest(row, 1)?,
            configuration: row.get(2)?,
            publish: published(row, 3)?,
        },
        user: row.get(4)?,
        at_ms: unsigned(row, 5)?,
    })
}

pub(super) fn operation(row: &Row<'_>) -> rusqlite::Result<Operation> {
    let ended: Option<i64> = row.get(8)?;
    Ok(Operation {
        id: row.get(0)?,
        service: row.get(1)?,
        kind: row.get(2)?,
        generation: unsigned(row, 3)?,
        user: row.get(4)?,
        state: row.get(5)?,
        error: row.get(6)?,
        started_ms: unsigned(row, 7)?,
        ended_ms: ended.map(i64::unsigned_abs),
    })
}

pub(super) fn digest(row: &Row<'_>, column: usize) -> rusqlite::Result<Digest> {
    let text: String = row.get(column)?;
    Digest::from_hex(&text).ok_or_else(|| {
        let error = format!("{text} is no SHA-256").into();
        rusqlite::Error::FromSqlConversionFailure(column, rusqlite::types::Type::Text, error)
    })
}

fn ports(publish: &[PublishedPort]) -> String {
    serde_json::to_string(publish).expect("numbers and strings are JSON")
}

fn published(row: &Row<'_>, column: usize) -> rusqlite::Result<Vec<PublishedPort>> {
    let text: String = row.get(column)?;
    serde_json::from_str(&text).map_err(|error| {
        let kind = rusqlite::types::Type::Text;
        rusqlite::Error::FromSqlConversionFailure(column, kind, error.into())
    })
}

pub(super) fn unsigned(row: &Row<'_>, column: usize) -> rusqlite::Result<u64> {
    row.get(column).map(i64::unsigned_abs)
}

/// SQLite's integers are signed. Neither a counter nor a time reaches 2^63.
pub(super) fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

pub(super) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| {
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    })
}

/// Names the variants of a type, in the store and for people.
macro_rules! named {
    ($type:ident: $($variant:ident = $name:literal),*) => {
        impl $type {
            /// The name of the variant.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name),*
                }
            }
        }

        impl ToSql for $type {
            fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
                Ok(self.name().into())
            }
        }

        impl FromSql for $type {
            fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
                match value.as_str()? {
                    $($name => Ok(Self::$variant),)*
                    other => Err(FromSqlError::Other(format!("no state is {other}").into())),
                }
            }
        }
    };
}
named!(Expected: Started = "started", Stopped = "stopped", Deleted = "deleted");
named!(OperationKind: Apply = "apply", Delete = "delete", Stop = "stop", Start = "start",
    Update = "update", Rollback = "rollback", Resume = "resume");
named!(OperationState: Running = "running", Succeeded = "succeeded", Failed = "failed",
    Paused = "paused", Halted = "halted", RolledBack = "rolled-back");

#[cfg(test)]
mod tests;

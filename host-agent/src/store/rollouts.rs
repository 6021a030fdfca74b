//! Updates of services in the database: the revision that is wanted, and how far the rollout
//! to it is. A host agent that dies goes on from there.

use rusqlite::{Connection, OptionalExtension as _, params};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::changes::Asked;
use super::database::StoreError;
use super::services::{
    Expected, OperationKind, OperationState, ServiceStore, Wanted, begin, end, find,
    insert_revision, now_ms, revision_of, signed,
};

/// The table of rollouts, and the number of a service's newest goal state.
pub(super) const MIGRATION: &str = "
ALTER TABLE service ADD COLUMN incarnation INTEGER NOT NULL DEFAULT 1;
CREATE TABLE rollout (
  service TEXT PRIMARY KEY REFERENCES service ON DELETE CASCADE,
  state TEXT NOT NULL
) STRICT;
";

/// Most time for the instances of an upgrade domain to become Ready (role model, section
/// 4.4: 30 minutes), in milliseconds.
const READY_LIMIT_MS: u64 = 30 * 60 * 1000;

/// What happens when an instance of the new revision is not Ready in time or fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OnFailure {
    /// Every instance stays as it is until an operator decides.
    #[default]
    Halt,
    /// Every instance is taken back to the revision before.
    Rollback,
}

/// How a rollout goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RolloutPolicy {
    /// What happens when an instance fails.
    pub on_failure: OnFailure,
    /// Pause each time that this many upgrade domains are done; null or 0 does not pause.
    pub pause_after: Option<u32>,
    /// Most time for the instances of an upgrade domain to become Ready, in milliseconds.
    pub limit_ms: u64,
    /// Time that an instance is to be Ready before the next domain, in milliseconds.
    pub stable_ms: u64,
}

impl Default for RolloutPolicy {
    fn default() -> Self {
        Self {
            on_failure: OnFailure::Halt,
            pause_after: None,
            limit_ms: READY_LIMIT_MS,
            stable_ms: 0,
        }
    }
}

/// Where a rollout is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// Instances that do not exist or are not Ready: no Ready one is taken down for them.
    First,
    /// The instances of this upgrade domain.
    Domain(u32),
    /// Instances that the revision does not have.
    Last,
}

/// A rollout that is not over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rollout {
    /// The revision to which a rollback leads.
    pub from: u64,
    /// The revision to which instances are taken.
    pub to: u64,
    /// Number of the goal state of that revision.
    pub incarnation: u64,
    /// How it goes.
    pub policy: RolloutPolicy,
    /// Where it is.
    pub stage: Stage,
    /// Upgrade domains that are done.
    pub done: u32,
    /// Waits for the operator, between two domains.
    pub paused: bool,
    /// Why it waits for the operator's decision, if it does.
    pub halted: Option<String>,
    /// Why instances are taken back, if they are.
    pub rolling_back: Option<String>,
}

/// What an update leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A new revision.
    New(Wanted),
    /// An earlier revision; the one before if it is not named.
    Earlier(Option<u64>),
}

/// What a request for an update did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Updated {
    /// As for other requests.
    Asked(Asked),
    /// The service is stopped.
    Stopped,
    /// It has no such revision, or none before.
    NoRevision,
    /// No rollout waits for the operator.
    NotWaiting,
}

impl ServiceStore {
    /// Number of the newest goal state of service `name`.
    pub fn incarnation(&self, name: &str) -> Result<u64, StoreError> {
        let sql = "SELECT incarnation FROM service WHERE name = ?1";
        let number: i64 = self.0.connection.query_row(sql, [name], |row| row.get(0))?;
        Ok(number.unsigned_abs())
    }

    /// The rollout of service `name`.
    pub fn rollout(&self, name: &str) -> Result<Option<Rollout>, StoreError> {
        Ok(rollout(&self.0.connection, name)?)
    }

    /// Begins an update. One that is not over is replaced.
    pub fn update(
        &mut self,
        name: &str,
        target: &Target,
        policy: &RolloutPolicy,
        user: u32,
    ) -> Result<Updated, StoreError> {
        let transaction = self.0.connection.transaction()?;
        let Some(found) = find(&transaction, name)? else {
            return Ok(Updated::Asked(Asked::NoService));
        };
        match found.expected {
            Expected::Deleted => return Ok(Updated::Asked(Asked::Deleting)),
            Expected::Stopped => return Ok(Updated::Stopped),
            Expected::Started => {}
        }
        let now = now_ms();
        let earlier = rollout(&transaction, name)?;
        let (to, kind) = match target {
            Target::New(wanted) => {
                let newest = revision_of(&transaction, name, found.generation)?;
                if newest.is_some_and(|newest| newest.wanted == *wanted) {
                    return Ok(Updated::Asked(Asked::Unchanged));
                }
                let sql = "SELECT max(generation) FROM revision WHERE service = ?1";
                let last: i64 = transaction.query_row(sql, [name], |row| row.get(0))?;
                let generation = last.unsigned_abs() + 1;
                insert_revision(&transaction, name, generation, wanted, user, now)?;
                (generation, OperationKind::Update)
            }
            Target::Earlier(number) => {
                let sql = "SELECT max(generation) FROM revision \
                           WHERE service = ?1 AND generation < ?2";
                let before = params![name, signed(found.generation)];
                let before: Option<i64> = transaction.query_row(sql, before, |row| row.get(0))?;
                // A rollout that is not over leads back to where it came from.
                let default = earlier.as_ref().map(|it| it.from);
                let default = default.or(before.map(i64::unsigned_abs));
                let Some(number) = number.or(default) else {
                    return Ok(Updated::NoRevision);
                };
                if number == found.generation {
                    return Ok(Updated::Asked(Asked::Unchanged));
                }
                if revision_of(&transaction, name, number)?.is_none() {
                    return Ok(Updated::NoRevision);
                }
                (number, OperationKind::Rollback)
            }
        };
        let sql = "SELECT incarnation FROM service WHERE name = ?1";
        let incarnation: i64 = transaction.query_row(sql, [name], |row| row.get(0))?;
        let rollout = Rollout {
            from: earlier.map_or(found.generation, |it| it.from),
            to,
            incarnation: incarnation.unsigned_abs() + 1,
            policy: policy.clone(),
            stage: Stage::First,
            done: 0,
            paused: false,
            halted: None,
            rolling_back: None,
        };
        write(&transaction, name, &rollout)?;
        end(&transaction, name, Some("another update replaced it"), now)?;
        let begun = begin(&transaction, name, kind, to, user, now)?;
        transaction.commit()?;
        Ok(Updated::Asked(Asked::Begun(begun)))
    }

    /// Lets a rollout go on that waits for the operator.
    pub fn resume(&mut self, name: &str, user: u32) -> Result<Updated, StoreError> {
        let transaction = self.0.connection.transaction()?;
        let Some(found) = find(&transaction, name)? else {
            return Ok(Updated::Asked(Asked::NoService));
        };
        match found.expected {
            Expected::Deleted => return Ok(Updated::Asked(Asked::Deleting)),
            Expected::Stopped => return Ok(Updated::Stopped),
            Expected::Started => {}
        }
        let Some(mut rollout) = rollout(&transaction, name)? else {
            return Ok(Updated::NotWaiting);
        };
        if !rollout.paused && rollout.halted.is_none() {
            return Ok(Updated::Asked(Asked::Unchanged));
        }
        (rollout.paused, rollout.halted) = (false, None);
        write(&transaction, name, &rollout)?;
        let kind = OperationKind::Resume;
        let begun = begin(&transaction, name, kind, rollout.to, user, now_ms())?;
        transaction.commit()?;
        Ok(Updated::Asked(Asked::Begun(begun)))
    }

    /// Notes how far the rollout of service `name` is, unless another one has replaced it;
    /// false if it has. With a `result`, its operation ends.
    pub fn advance(
        &mut self,
        name: &str,
        rollout: &Rollout,
        from: &Rollout,
        result: Option<(OperationState, Option<&str>)>,
    ) -> Result<bool, StoreError> {
        let transaction = self.0.connection.transaction()?;
        if self::rollout(&transaction, name)?.as_ref() != Some(from) {
            return Ok(false);
        }
        let over = matches!(
            result,
            Some((OperationState::Succeeded | OperationState::RolledBack, _))
        );
        write(&transaction, name, rollout)?;
        if over {
            transaction.execute("DELETE FROM rollout WHERE service = ?1", [name])?;
        }
        if let Some((state, error)) = result {
            transaction.execute(
                "UPDATE operation SET state = ?2, error = ?3, ended_ms = ?4 \
                 WHERE service = ?1 AND state = ?5",
                params![
                    name,
                    state,
                    error,
                    signed(now_ms()),
                    OperationState::Running
                ],
            )?;
        }
        transaction.commit()?;
        Ok(true)
    }
}

fn rollout(connection: &Connection, name: &str) -> rusqlite::Result<Option<Rollout>> {
    let sql = "SELECT state FROM rollout WHERE service = ?1";
    let found = connection.query_row(sql, [name], |row| {
        let text: String = row.get(0)?;
        serde_json::from_str(&text).map_err(|error| {
            let kind = rusqlite::types::Type::Text;
            rusqlite::Error::FromSqlConversionFailure(0, kind, error.into())
        })
    });
    found.optional()
}

fn write(connection: &Connection, name: &str, rollout: &Rollout) -> rusqlite::Result<()> {
    let state = serde_json::to_string(rollout).expect("numbers and strings are JSON");
    connection.execute(
        "INSERT OR REPLACE INTO rollout VALUES (?1, ?2)",
        params![name, state],
    )?;
    connection.execute(
        "UPDATE service SET generation = ?2, incarnation = max(incarnation, ?3) WHERE name = ?1",
        params![name, signed(rollout.to), signed(rollout.incarnation)],
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Digest;

    fn wanted(package: &str) -> Wanted {
        Wanted {
            package: Digest::of(package.as_bytes()).unwrap().0,
            configuration: "<c/>".into(),
            publish: Vec::new(),
        }
    }

    fn update(store: &mut ServiceStore, package: &str) -> Updated {
        let target = Target::New(wanted(package));
        store
            .update("shop", &target, &RolloutPolicy::default(), 7)
            .unwrap()
    }

    #[test]
    fn an_update_is_there_after_a_restart_and_another_one_replaces_it() {
        use OperationState::{Failed, Halted};
        let dir = tempfile::tempdir().unwrap();
        let mut store = ServiceStore::open(dir.path()).unwrap();
        store.apply("shop", &wanted("1"), 7).unwrap();
        assert_eq!(update(&mut store, "1"), Updated::Asked(Asked::Unchanged));
        assert!(matches!(
            update(&mut store, "2"),
            Updated::Asked(Asked::Begun(_))
        ));
        drop(store);
        let mut store = ServiceStore::open(dir.path()).unwrap();
        let first = store.rollout("shop").unwrap().unwrap();
        assert_eq!((first.from, first.to, first.incarnation), (1, 2, 2));
        assert_eq!(store.service("shop").unwrap().unwrap().generation, 2);
        update(&mut store, "3");
        let second = store.rollout("shop").unwrap().unwrap();
        assert_eq!((second.from, second.to, second.incarnation), (1, 3, 3));
        // The one that was replaced does not write over its successor.
        assert!(!store.advance("shop", &first, &first, None).unwrap());
        let halted = Rollout {
            halted: Some("no".into()),
            ..second.clone()
        };
        let result = Some((OperationState::Halted, Some("no")));
        assert!(store.advance("shop", &halted, &second, result).unwrap());
        let states: Vec<_> = store.operations("shop").unwrap();
        let states: Vec<_> = states.iter().map(|it| (it.kind, it.state)).collect();
        assert_eq!(
            states,
            [
                (OperationKind::Update, Halted),
                (OperationKind::Update, Failed),
                (OperationKind::Apply, Failed),
            ]
        );
        assert!(matches!(
            store.resume("shop", 7).unwrap(),
            Updated::Asked(Asked::Begun(_))
        ));
        assert_eq!(store.rollout("shop").unwrap(), Some(second.clone()));
        let back = Rollout {
            to: 1,
            incarnation: 4,
            ..second.clone()
        };
        let result = Some((OperationState::RolledBack, Some("no")));
        assert!(store.advance("shop", &back, &second, result).unwrap());
        assert_eq!(store.rollout("shop").unwrap(), None);
        assert_eq!(store.service("shop").unwrap().unwrap().generation, 1);
        assert_eq!(store.incarnation("shop").unwrap(), 4);
        assert_eq!(store.resume("shop", 7).unwrap(), Updated::NotWaiting);
    }

    #[test]
    fn a_rollback_leads_to_an_earlier_revision() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = ServiceStore::open(dir.path()).unwrap();
        store.apply("shop", &wanted("1"), 7).unwrap();
        let back = |store: &mut ServiceStore, to| {
            store
                .update("shop", &Target::Earlier(to), &RolloutPolicy::default(), 7)
                .unwrap()
        };
        assert_eq!(back(&mut store, None), Updated::NoRevision);
        update(&mut store, "2");
        assert_eq!(back(&mut store, Some(3)), Updated::NoRevision);
        assert!(matches!(
            back(&mut store, None),
            Updated::Asked(Asked::Begun(_))
        ));
        assert_eq!(store.service("shop").unwrap().unwrap().generation, 1);
        store.stop("shop", 7).unwrap();
        assert_eq!(back(&mut store, Some(2)), Updated::Stopped);
    }
}

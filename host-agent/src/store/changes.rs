//! What is asked of a service that exists: to stop, to start.

use rusqlite::{Connection, OptionalExtension as _, params};

use super::database::StoreError;
use super::services::{
    Expected, Operation, OperationKind, OperationState, SELECT_OPERATION, ServiceStore, begin, end,
    find, now_ms, operation, signed,
};

/// What a request to a service that exists did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Asked {
    /// An operation was begun, or the same one runs already.
    Begun(Operation),
    /// It is as asked already.
    Unchanged,
    /// It is being deleted.
    Deleting,
    /// There is no such service.
    NoService,
}

impl ServiceStore {
    /// Wants service `name` stopped. Another operation of it that runs has failed.
    pub fn stop(&mut self, name: &str, user: u32) -> Result<Asked, StoreError> {
        let because = "the service was stopped";
        self.expect(name, Expected::Stopped, OperationKind::Stop, because, user)
    }

    /// Wants service `name` started. Another operation of it that runs has failed.
    pub fn start(&mut self, name: &str, user: u32) -> Result<Asked, StoreError> {
        let because = "the service was started";
        self.expect(name, Expected::Started, OperationKind::Start, because, user)
    }

    /// The operation of service `name` that runs.
    pub fn running(&self, name: &str) -> Result<Option<Operation>, StoreError> {
        Ok(running(&self.0.connection, name)?)
    }

    /// Ends operation `id` if it runs: another one may have replaced it.
    pub fn end_operation(
        &mut self,
        id: &str,
        state: OperationState,
        error: Option<&str>,
    ) -> Result<(), StoreError> {
        self.0.connection.execute(
            "UPDATE operation SET state = ?2, error = ?3, ended_ms = ?4 \
             WHERE id = ?1 AND state = ?5",
            params![id, state, error, signed(now_ms()), OperationState::Running],
        )?;
        Ok(())
    }

    fn expect(
        &mut self,
        name: &str,
        expected: Expected,
        kind: OperationKind,
        because: &str,
        user: u32,
    ) -> Result<Asked, StoreError> {
        let transaction = self.0.connection.transaction()?;
        let Some(found) = find(&transaction, name)? else {
            return Ok(Asked::NoService);
        };
        if found.expected == Expected::Deleted {
            return Ok(Asked::Deleting);
        }
        if found.expected == expected {
            let running = running(&transaction, name)?.filter(|it| it.kind == kind);
            return Ok(running.map_or(Asked::Unchanged, Asked::Begun));
        }
        let now = now_ms();
        end(&transaction, name, Some(because), now)?;
        set_expected(&transaction, name, expected)?;
        let begun = begin(&transaction, name, kind, found.generation, user, now)?;
        transaction.commit()?;
        Ok(Asked::Begun(begun))
    }
}

/// The operation of service `name` that runs.
pub(super) fn running(connection: &Connection, name: &str) -> rusqlite::Result<Option<Operation>> {
    let sql = format!("{SELECT_OPERATION} WHERE service = ?1 AND state = ?2");
    let running = params![name, OperationState::Running];
    connection.query_row(&sql, running, operation).optional()
}

fn set_expected(connection: &Connection, name: &str, expected: Expected) -> rusqlite::Result<()> {
    let sql = "UPDATE service SET expected = ?2 WHERE name = ?1";
    connection.execute(sql, params![name, expected]).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Digest;
    use crate::store::services::{Applied, Wanted};

    #[test]
    fn a_stop_replaces_the_apply_and_is_begun_once() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = ServiceStore::open(dir.path()).unwrap();
        assert_eq!(store.stop("shop", 7).unwrap(), Asked::NoService);
        let wanted = Wanted {
            package: Digest::of(&b"p"[..]).unwrap().0,
            configuration: "<c/>".into(),
            publish: Vec::new(),
        };
        let Applied::Begun(applied) = store.apply("shop", &wanted, 7).unwrap() else {
            panic!("not begun");
        };
        assert_eq!(store.start("shop", 7).unwrap(), Asked::Unchanged);
        let Asked::Begun(stopping) = store.stop("shop", 7).unwrap() else {
            panic!("not begun");
        };
        assert_eq!(
            store.stop("shop", 8).unwrap(),
            Asked::Begun(stopping.clone())
        );
        // What belongs to the apply, which another operation has replaced, changes nothing.
        let succeeded = OperationState::Succeeded;
        store.end_operation(&applied.id, succeeded, None).unwrap();
        let applied = store.operation(&applied.id).unwrap().unwrap();
        assert_eq!(applied.error.as_deref(), Some("the service was stopped"));
        assert_eq!(store.running("shop").unwrap(), Some(stopping.clone()));
        store.end_operation(&stopping.id, succeeded, None).unwrap();
        assert_eq!(store.stop("shop", 7).unwrap(), Asked::Unchanged);
        let found = store.service("shop").unwrap().unwrap();
        assert_eq!(found.expected, Expected::Stopped);
        assert!(matches!(store.start("shop", 7).unwrap(), Asked::Begun(_)));
        store.delete("shop", 7).unwrap();
        assert_eq!(store.start("shop", 7).unwrap(), Asked::Deleting);
    }
}

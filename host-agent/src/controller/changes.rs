//! What is asked of a service that exists.

use super::{Controller, ControllerError};
use crate::store::changes::Asked;
use crate::store::services::Operation;

impl Controller {
    /// Stops service `name`: its guests end and its endpoints close; its disks and logs stay.
    /// Nothing if it is stopped already. Durable when it returns.
    pub async fn stop(&self, name: &str, user: u32) -> Result<Option<Operation>, ControllerError> {
        let of_store = name.to_owned();
        let asked = self.with_store(move |store| store.stop(&of_store, user));
        self.asked(name, asked.await?)
    }

    /// Starts service `name` again, on the disks that it has. Nothing if it is started
    /// already. Durable when it returns.
    pub async fn start_again(
        &self,
        name: &str,
        user: u32,
    ) -> Result<Option<Operation>, ControllerError> {
        if let Some(why) = &self.0.unable {
            return Err(ControllerError::Unable(why.clone()));
        }
        let of_store = name.to_owned();
        let asked = self.with_store(move |store| store.start(&of_store, user));
        self.asked(name, asked.await?)
    }

    fn asked(&self, name: &str, asked: Asked) -> Result<Option<Operation>, ControllerError> {
        match asked {
            Asked::Begun(operation) => {
                self.changed();
                self.wake(name);
                Ok(Some(operation))
            }
            Asked::Unchanged => Ok(None),
            Asked::Deleting => Err(ControllerError::Deleting(name.into())),
            Asked::NoService => Err(ControllerError::NoService(name.into())),
        }
    }
}

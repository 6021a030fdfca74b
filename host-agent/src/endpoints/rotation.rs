//! The instances of a role that take connections, in rotation.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::mpsc::{self, error::TrySendError};
use tokio::sync::watch;

use super::Incoming;

/// The instances of a role that take connections.
#[derive(Debug, Clone, Default)]
pub struct Rotation(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    members: Mutex<Members>,
    /// Whether an instance was ever in rotation.
    began: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct Members {
    ready: Vec<(String, mpsc::Sender<Incoming>)>,
    next: usize,
}

impl Rotation {
    /// Adds or removes an instance.
    pub fn set(&self, instance: &str, sender: Option<mpsc::Sender<Incoming>>) {
        let mut members = self.members();
        members.ready.retain(|(name, _)| name != instance);
        if let Some(sender) = sender {
            members.ready.push((instance.to_owned(), sender));
            drop(members);
            self.0.began.send_replace(true);
        }
    }

    /// Waits until an instance has been in rotation.
    pub(super) async fn began(&self) {
        // The sender lives as long as this value.
        let _ = self.0.began.subscribe().wait_for(|began| *began).await;
    }

    /// Gives `incoming` to the next instance whose queue is not full. If there
    /// is none, the socket closes.
    pub(super) fn dispatch(&self, mut incoming: Incoming) {
        let mut members = self.members();
        for _ in 0..members.ready.len() {
            members.next = (members.next + 1) % members.ready.len();
            match members.ready[members.next].1.try_send(incoming) {
                Ok(()) => return,
                Err(TrySendError::Full(returned) | TrySendError::Closed(returned)) => {
                    incoming = returned;
                }
            }
        }
    }

    fn members(&self) -> MutexGuard<'_, Members> {
        let members = self.0.members.lock();
        members.unwrap_or_else(PoisonError::into_inner)
    }
}

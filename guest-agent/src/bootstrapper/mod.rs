//! Starts the role, watches it, and starts it again when it ends.
//!
//! A process of its own: its socket to the guest agent is its standard input,
//! and when that closes it takes the role down.

pub mod recycle;
pub mod role;

use serde::{Deserialize, Serialize};
use vmbus::message::{ExitCause, RoleState};

use crate::setup::Prepared;

/// Guest agent to bootstrapper.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Order {
    /// Run this role; the first order.
    Run(Prepared),
    /// Stop the role and end.
    Stop,
}

/// Bootstrapper to guest agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Said {
    /// The role's state changed.
    State {
        /// New state.
        state: RoleState,
        /// For people.
        detail: String,
        /// Times the role ended by itself.
        recycles: u32,
        /// How it last ended.
        last_exit: Option<ExitCause>,
        /// Milliseconds until the next start.
        retry_in_ms: Option<u64>,
    },
    /// The role wrote a line.
    Line {
        /// `out` or `err`.
        stream: String,
        /// The line.
        text: String,
    },
}

//! Starts the role, watches it, and starts it again when it ends.
//!
//! A process of its own, so that the role outlives the guest agent: it serves one guest
//! agent after the other on a Unix socket. The guest agent that starts it binds the socket
//! and passes it as standard input, listening already. So a connection succeeds only while
//! a bootstrapper runs: the socket file of one that ended refuses.

pub mod client;
pub mod outbox;
pub mod recycle;
pub mod role;
pub mod serve;

use serde::{Deserialize, Serialize};
use vmbus::frame::Message;
use vmbus::message::{ExitCause, Goal, RoleState};

/// Where the bootstrapper listens; only root can connect.
pub const SOCKET: &str = "/run/host-agent/bootstrapper.sock";

/// Guest agent to bootstrapper.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Order {
    /// Run this goal's role; the first order.
    Run(Box<Goal>),
    /// Stop the role and exit.
    Stop,
}

/// Bootstrapper to guest agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum BootstrapperEvent {
    /// The first on every connection: what is running, if an order came yet.
    Hello {
        /// The goal of the order.
        goal: Option<Box<Goal>>,
        /// The role now.
        role: Role,
    },
    /// The role's state changed.
    State(Role),
    /// The role wrote a line.
    Line {
        /// `out` or `err`.
        stream: String,
        /// Milliseconds since the guest booted.
        uptime_ms: u64,
        /// Lines lost before this one.
        dropped: u64,
        /// The line.
        text: String,
    },
}

impl Message for Order {}
impl Message for BootstrapperEvent {}

/// State of the role.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Role {
    /// The state.
    pub state: RoleState,
    /// For people.
    pub detail: String,
    /// Times the role ended by itself.
    pub recycles: u32,
    /// How it last ended by itself.
    pub last_exit: Option<ExitCause>,
    /// Milliseconds until the next start.
    pub retry_in_ms: Option<u64>,
    /// It did not stop in its time and was killed.
    pub killed: bool,
}

impl Role {
    /// Before the first order.
    pub const fn unknown() -> Self {
        Self {
            state: RoleState::Unknown,
            detail: String::new(),
            recycles: 0,
            last_exit: None,
            retry_in_ms: None,
            killed: false,
        }
    }
}

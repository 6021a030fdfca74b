//! What the guest agent tells the app agent, for its heartbeats: frames on a
//! socket that only root can reach.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use vmbus::frame::Message;
use vmbus::message::RoleState;

/// Path of the app agent's socket.
pub const SOCKET: &str = "/run/host-agent/app-agent.sock";

/// How often a guest agent that has nothing new repeats its report: so its age
/// tells how long the guest agent has been silent.
pub const EVERY: Duration = Duration::from_secs(5);

/// Sent at every change of state, and every [`EVERY`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Highest goal incarnation applied.
    pub incarnation: u64,
    /// State of the role.
    pub role: RoleState,
}

impl Message for Report {}

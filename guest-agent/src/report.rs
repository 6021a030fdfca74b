//! What the guest agent tells the app agent, for its heartbeats: frames on a
//! socket that only root can reach.

use serde::{Deserialize, Serialize};
use vmbus::message::RoleState;

/// Path of the app agent's socket.
pub const SOCKET: &str = "/run/host-agent/app-agent.sock";

/// Sent at every change of state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Highest goal incarnation applied.
    pub incarnation: u64,
    /// State of the role.
    pub role: RoleState,
}

//! Reports of the guest agent to the app agent: frames on a socket that only root can
//! reach. They show the app agent that the guest agent works.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use vmbus::frame::Message;
use vmbus::message::RoleState;

/// Path of the app agent's socket.
pub const SOCKET: &str = "/run/host-agent/app-agent.sock";

/// A report is sent at every change of state, and repeated this often.
pub const EVERY: Duration = Duration::from_secs(5);

/// One report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// State of the role.
    pub role: RoleState,
}

impl Message for Report {}

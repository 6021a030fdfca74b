//! Resource limits of VMM processes: one cgroup (version 2) per process.
//!
//! ```text
//! <parent>/host-agent-<host>.<pid of the host agent>/
//!     <deployment>.<instance>/  the VMM process of one boot, with its limits
//!     supervisor/               this process, if the parent must have no processes
//! ```

mod group;
mod parent;

pub use group::{GroupError, GuestGroup, GuestLimits, HostGroup, guests, kill, remove};
pub use parent::{NotEnforced, ParentCgroup, find_parent};

/// Controllers that the limits need.
const NEEDED: [&str; 2] = ["memory", "pids"];
/// Controllers that are used if available.
const WANTED: [&str; 1] = ["cpu"];

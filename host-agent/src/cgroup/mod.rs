//! GuestLimits of what the process of one guest can use: a cgroup (version 2) per
//! VMM process, made where this process may make any.
//!
//! ```text
//! <where we may>/host-agent-<deployment>.<our pid>/    one per deployment
//!     <instance>/       the VMM process of one boot, with its limits
//!     supervisor/       this process, where the kernel wants it in a leaf
//! ```

mod group;
mod parent;

pub use group::{DeploymentGroup, GroupError, GuestGroup, GuestLimits, kill, remove};
pub use parent::{NotEnforced, ParentCgroup, find_parent};

/// Controllers without which a limit means nothing.
const NEEDED: [&str; 2] = ["memory", "pids"];
/// Controllers that are used where they are to be had.
const WANTED: [&str; 1] = ["cpu"];

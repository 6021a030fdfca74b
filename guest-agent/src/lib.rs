//! What runs inside a guest: the app agent (PID 1), the guest agent and the
//! bootstrapper.

pub mod agent;
pub mod agent_monitor;
pub mod backoff;
pub mod bootstrapper;
pub mod bus;
pub mod clock;
pub mod delivery;
pub mod environment;
pub mod exec;
pub mod failure;
pub mod log;
pub mod names;
pub mod os;
pub mod planner;
pub mod report;
pub mod setup;
pub mod tunnel;
pub mod update;

/// Name and version of a program of this package, for hellos.
pub fn name(program: &str) -> String {
    format!("{program} {}", env!("CARGO_PKG_VERSION"))
}

/// Directory of the agents' own files, in memory.
pub const RUN_DIR: &str = "/run/host-agent";

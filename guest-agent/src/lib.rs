//! What runs inside a guest: the app agent (PID 1), the guest agent and the
//! bootstrapper.

pub mod bootstrapper;
pub mod bus;
pub mod delivery;
pub mod exec;
pub mod log;
pub mod os;
pub mod report;
pub mod setup;
pub mod tunnel;

/// Name and version of a program of this package, for hellos.
pub fn name(program: &str) -> String {
    format!("{program} {}", env!("CARGO_PKG_VERSION"))
}

/// Directory of the agents' own files, in memory.
pub const RUN_DIR: &str = "/run/host-agent";

/// An error and its sources in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

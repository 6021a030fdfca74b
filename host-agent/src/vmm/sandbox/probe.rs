//! Enters the sandbox in a process of its own, to learn what this host allows.

use std::io::Write as _;
use std::process::{Command, ExitCode, Stdio};

use super::{Layer, SandboxReport, ThreadClass, enter, filter_this, leave_session};

/// The verb of the process.
pub const VERB: &str = "sandbox-probe";

/// The whole process, after [`crate::child::begin`]: does what a VMM process does and
/// prints the report.
pub fn main() -> ExitCode {
    leave_session();
    let mut report = enter();
    if let Err(error) = filter_this(ThreadClass::Main) {
        report.fail(Layer::Filters, &vmbus::text::chain(&error));
    }
    let printed = serde_json::to_vec(&report)
        .map_err(std::io::Error::from)
        .and_then(|json| std::io::stdout().write_all(&json));
    printed.map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS)
}

/// The sandbox of a process that this program starts.
///
/// # Errors
/// Why it is not known.
pub fn probe() -> Result<SandboxReport, String> {
    let output = Command::new("/proc/self/exe")
        .arg(VERB)
        .env_clear()
        .stdin(Stdio::null())
        .output()
        .map_err(|error| error.to_string())?;
    if !output.status.success() {
        return Err(format!("the process {}", output.status));
    }
    serde_json::from_slice(&output.stdout).map_err(|error| error.to_string())
}

//! `host-agent doctor`: prints whether this machine can run guests.

use super::error::{CliError, Code};
use super::exit::Exit;
use super::output::Output;
use crate::doctor::{self, Scope, Verdict};
use crate::store::paths;

/// Prints the report. Exit codes: 0 usable, 6 not usable, 11 no permission.
pub fn run(output: &Output) -> Result<Exit, CliError> {
    let report = doctor::check(&paths::data_dir(), Scope::GuestsAndSandbox);
    let exit = match report.verdict {
        Verdict::Usable => Exit::Success,
        Verdict::NoPermission => Exit::Permission,
        Verdict::NoDevice | Verdict::CannotRunKernel | Verdict::NoMemory | Verdict::NoDisk => {
            Exit::Host
        }
    };
    let text = format!("{report} (exit {})", exit.code());
    let json = serde_json::to_value(&report)
        .map_err(|error| CliError::chain(Code::Unclassified, &error))?;
    output.answer(&text, || json)?;
    Ok(exit)
}

//! `host-agent config`: every value of the configuration in effect, and where it comes from.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;

use super::args::Verb;
use super::error::{CliError, Code};
use super::exit::Exit;
use super::instances::columns;
use super::output::Output;
use crate::config::Config;
use crate::service::ServiceError;

/// A file of the configuration.
#[derive(Debug, Clone, Args)]
pub struct ConfigFileArg {
    /// Configuration file in place of that of HOST_AGENT_CONFIG
    #[arg(long = "config", value_name = "F.toml")]
    pub file: Option<PathBuf>,
}

/// Prints the configuration.
pub fn print(args: &ConfigFileArg, output: &Output) -> Result<Exit, CliError> {
    let entries = load(args.file.as_deref())?.entries();
    let rows = entries.iter().map(|entry| {
        let value = if entry.value.is_null() {
            "no limit".to_owned()
        } else {
            entry.value.to_string()
        };
        [entry.key.clone(), value, entry.origin.to_string()]
    });
    let header = ["KEY", "VALUE", "ORIGIN"].map(str::to_owned);
    let rows: Vec<_> = std::iter::once(header).chain(rows).collect();
    output.answer(&columns(&rows), || {
        let values = entries.iter().map(|entry| {
            let origin = entry.origin.to_string();
            json!({"key": entry.key, "value": entry.value, "origin": origin})
        });
        json!({"schema": "host-agent.config/1", "values": values.collect::<Vec<_>>()})
    })?;
    Ok(Exit::Success)
}

/// The configuration, with the values of the file `named`.
pub fn load(named: Option<&Path>) -> Result<Config, CliError> {
    Config::load(named).map_err(refused)
}

/// Refuses a verb whose configuration cannot be read.
pub fn check(verb: &Verb) -> Result<(), CliError> {
    match verb {
        // They need none, or read it with a file of their own.
        Verb::Completion(_) | Verb::Version | Verb::Explain(_) => Ok(()),
        Verb::Config(_) | Verb::Serve(_) => Ok(()),
        _ => load(None).map(|_| ()),
    }
}

fn refused(error: ServiceError) -> CliError {
    let this = CliError::from(error.or_hint("host-agent config   (prints every key)"));
    let exit = this.exit();
    this.coded(Code::Configuration).exit_with(exit)
}

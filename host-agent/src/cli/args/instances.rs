//! Arguments of the verbs for one instance.

use clap::Args;

use crate::api::types::LogFile;

/// `exec`.
#[derive(Debug, Clone, Args)]
pub struct ExecArgs {
    /// Forward standard input [default: on a terminal]
    #[arg(short, long)]
    pub interactive: bool,
    /// Give the command a terminal [default: on a terminal]
    #[arg(short, long)]
    pub tty: bool,
    /// Instance, or DEPLOYMENT/INSTANCE
    pub instance: String,
    /// Command and its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    pub command: Vec<String>,
}

/// `logs`.
#[derive(Debug, Clone, Args)]
pub struct LogsArgs {
    /// Instance, or DEPLOYMENT/INSTANCE
    pub instance: String,
    /// Keep printing what is appended
    #[arg(short, long)]
    pub follow: bool,
    /// Which log
    #[arg(long, default_value = "role")]
    pub source: LogFile,
}

/// An instance.
#[derive(Debug, Clone, Args)]
pub struct InstanceArg {
    /// Instance, or DEPLOYMENT/INSTANCE
    pub instance: String,
}

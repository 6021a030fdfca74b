//! Arguments of the verbs for one instance.

use std::time::Duration;

use clap::{Args, Subcommand};

use super::time::duration;
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

/// `instance`.
#[derive(Debug, Clone, Args)]
#[command(disable_help_subcommand = true)]
pub struct InstanceCommand {
    /// What to do.
    #[command(subcommand)]
    pub verb: InstanceVerb,
}

/// What to do with one instance.
#[derive(Debug, Clone, Subcommand)]
pub enum InstanceVerb {
    /// List the instances of this user
    #[command(after_help = "\
Examples:
  host-agent instance list
  host-agent instance list --json | jq '.deployments[].instances[].name'")]
    List,
    /// Show an instance
    #[command(after_help = "\
Examples:
  host-agent instance show Web_IN_0
  host-agent instance show Web_IN_0 --json | jq .instance.status")]
    Show(InstanceArg),
    /// Reboot the guest; all its files stay
    #[command(after_help = "\
Examples:
  host-agent instance restart Web_IN_0
  host-agent instance restart Web_IN_0 --yes --wait --timeout 2m")]
    Restart(InstanceChangeArgs),
    /// Stop the role and start it again in its guest
    #[command(after_help = "\
Examples:
  host-agent instance recycle Web_IN_0
  host-agent instance recycle Web_IN_0 --yes --wait --timeout 2m")]
    Recycle(InstanceChangeArgs),
    /// Reboot with a new OS disk; local storage stays
    #[command(after_help = "\
Examples:
  host-agent instance reimage Web_IN_0
  host-agent instance reimage Web_IN_0 --yes --wait --timeout 2m")]
    Reimage(InstanceChangeArgs),
    /// Reboot with new disks; local storage is lost
    #[command(after_help = "\
Examples:
  host-agent instance rebuild Web_IN_0
  host-agent instance rebuild Web_IN_0 --yes --wait --timeout 2m")]
    Rebuild(InstanceChangeArgs),
}

/// `instance restart`, `recycle`, `reimage` and `rebuild`.
#[derive(Debug, Clone, Args)]
pub struct InstanceChangeArgs {
    /// Instance, or DEPLOYMENT/INSTANCE
    pub instance: String,
    /// Do not ask on a terminal
    #[arg(short, long)]
    pub yes: bool,
    /// Wait until the instance is Ready again
    #[arg(long)]
    pub wait: bool,
    /// With --wait: give up waiting after this time, not the change
    #[arg(long, value_name = "S", value_parser = duration, requires = "wait")]
    pub timeout: Option<Duration>,
}

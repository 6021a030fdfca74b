//! Arguments of `agent`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use vmbus::agent_package::Version;

/// `agent`.
#[derive(Debug, Clone, Args)]
#[command(disable_help_subcommand = true)]
pub struct AgentCommand {
    /// What to do.
    #[command(subcommand)]
    pub verb: AgentVerb,
}

/// What to do with guest agents.
#[derive(Debug, Clone, Subcommand)]
pub enum AgentVerb {
    /// Make a package from a static guest-agent program; sign it with minisign
    #[command(after_help = "\
Examples:
  host-agent agent pack ./guest-agent --set-version 0.2.0 -o guest-agent-0.2.0.agent
  minisign -Sm guest-agent-0.2.0.agent && host-agent agent publish guest-agent-0.2.0.agent")]
    Pack(AgentPackArgs),
    /// Offer a signed package to all guests, which replace their guest agent while roles run on
    #[command(after_help = "\
The signature is FILE.minisig, by a key of agent-keys/*.pub in the data directory.

Examples:
  host-agent agent publish guest-agent-0.2.0.agent
  host-agent agent publish guest-agent-0.1.9.agent --allow-downgrade")]
    Publish(PublishArgs),
    /// List the guest agents that were published, and what guests run
    #[command(after_help = "\
Examples:
  host-agent agent list
  host-agent agent list --json | jq '.agents[] | select(.offered)'")]
    List,
    /// Show a guest agent, and the guests in which it failed
    #[command(after_help = "\
Examples:
  host-agent agent show 0.2.0
  host-agent agent show 0.2.0 --json | jq .agent.failures")]
    Show(AgentArg),
    /// Stop offering a guest agent; guests that run it do so on
    #[command(after_help = "\
Examples:
  host-agent agent withdraw 0.2.0
  host-agent agent withdraw 0.2.0 --json")]
    Withdraw(AgentArg),
}

/// `agent pack`.
#[derive(Debug, Clone, Args)]
pub struct AgentPackArgs {
    /// A static x86-64 program
    pub program: PathBuf,
    /// Its version: three numbers
    #[arg(long, value_name = "VERSION")]
    pub set_version: Version,
    /// The package
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,
}

/// `agent publish`.
#[derive(Debug, Clone, Args)]
pub struct PublishArgs {
    /// A package, with its signature in FILE.minisig
    pub file: PathBuf,
    /// Offer it though it is older than what is offered or runs
    #[arg(long)]
    pub allow_downgrade: bool,
}

/// A guest agent.
#[derive(Debug, Clone, Args)]
pub struct AgentArg {
    /// Version, or the first digits of its package's SHA-256
    pub agent: String,
}

//! Arguments of `serve` and `service`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};

use super::time::duration;
use crate::cli::config::ConfigFileArg;
use crate::service::PublishedPort;
use crate::store::rollouts::OnFailure;

/// `serve`.
#[derive(Debug, Clone, Args)]
pub struct ServeArgs {
    /// Its configuration.
    #[command(flatten)]
    pub config: ConfigFileArg,
    /// Refuse to run guests whose VMM process lacks a layer of the sandbox
    #[arg(long)]
    pub require_sandbox: bool,
    /// Restart a guest that is silent this long [default: 10m]
    #[arg(long, value_name = "S", value_parser = duration)]
    pub heartbeat_limit: Option<Duration>,
    /// Serve the status page on this loopback address too; port 0 chooses one
    #[arg(long, value_name = "IP:PORT", value_parser = loopback)]
    pub page: Option<SocketAddr>,
}

/// An address that only this machine can reach.
fn loopback(text: &str) -> Result<SocketAddr, String> {
    let address: SocketAddr = text
        .parse()
        .map_err(|_| "write an address and a port, such as 127.0.0.1:8080")?;
    if address.ip().is_loopback() {
        return Ok(address);
    }
    Err("the page has no encryption: only 127.0.0.1 and ::1 are allowed".into())
}

/// `service`.
#[derive(Debug, Clone, Args)]
#[command(disable_help_subcommand = true)]
pub struct ServiceCommand {
    /// What to do.
    #[command(subcommand)]
    pub verb: ServiceVerb,
}

/// What to do with services.
#[derive(Debug, Clone, Subcommand)]
pub enum ServiceVerb {
    /// Create a service, or update it to this package and configuration
    #[command(after_help = "\
Examples:
  host-agent service apply shop --package shop.cspkg --config shop.cscfg --wait
  host-agent service apply shop --package ./shop --dry-run")]
    Apply(ApplyArgs),
    /// List the services
    #[command(after_help = "\
Examples:
  host-agent service list
  host-agent service list --json | jq '.services[].name'")]
    List,
    /// Show a service with its instances and endpoints
    #[command(after_help = "\
Examples:
  host-agent service show shop
  host-agent service show shop --json | jq .operation")]
    Show(ServiceName),
    /// Show the revisions and operations of a service
    #[command(after_help = "\
Examples:
  host-agent service history shop
  host-agent service history shop --json | jq '.operations[0]'")]
    History(ServiceName),
    /// Update a service, one upgrade domain after the other
    #[command(after_help = "\
Examples:
  host-agent service update shop --package shop-2.cspkg --wait --on-failure rollback
  host-agent service update shop --config shop.cscfg --dry-run")]
    Update(UpdateArgs),
    /// Take a service back to an earlier generation
    #[command(after_help = "\
Examples:
  host-agent service rollback shop --wait
  host-agent service rollback shop --to 1 --yes")]
    Rollback(RollbackArgs),
    /// Go on with an update that is paused or halted
    #[command(after_help = "\
Examples:
  host-agent service resume shop
  host-agent service resume shop --wait --timeout 10m")]
    Resume(ResumeArgs),
    /// Stop a service; its disks and logs stay
    #[command(after_help = "\
Examples:
  host-agent service stop shop
  host-agent service stop shop --yes --wait --timeout 2m")]
    Stop(ChangeArgs),
    /// Start a service that was stopped
    #[command(after_help = "\
Examples:
  host-agent service start shop
  host-agent service start shop --wait --timeout 2m")]
    Start(ChangeArgs),
    /// Stop a service and remove everything of it
    #[command(after_help = "\
Examples:
  host-agent service delete shop
  host-agent service delete shop --yes --wait")]
    Delete(DeleteArgs),
}

/// A service.
#[derive(Debug, Clone, Args)]
pub struct ServiceName {
    /// Name of the service
    pub service: String,
}

/// `service apply`.
#[derive(Debug, Clone, Args)]
pub struct ApplyArgs {
    /// Name of the service
    pub service: String,
    /// A .cspkg, or a directory with a .csdef
    #[arg(long, value_name = "F")]
    pub package: PathBuf,
    /// Configuration, when it is not beside the package
    #[arg(long, value_name = "F.cscfg")]
    pub config: Option<PathBuf>,
    /// Publish an endpoint on this port; may be repeated
    #[arg(short, long, value_name = "PORT:ENDPOINT")]
    pub publish: Vec<PublishedPort>,
    /// Only show what would be done
    #[arg(long)]
    pub dry_run: bool,
    /// How an update goes.
    #[command(flatten)]
    pub policy: PolicyArgs,
    /// How the operation is begun.
    #[command(flatten)]
    pub begin: BeginArgs,
}

/// How an update goes.
#[derive(Debug, Clone, Args)]
pub struct PolicyArgs {
    /// When an instance is not Ready in time or fails [default: halt]
    #[arg(long, value_name = "WHAT")]
    pub on_failure: Option<OnFailure>,
    /// Pause after each N upgrade domains, until `service resume`
    #[arg(long, value_name = "N")]
    pub pause_after: Option<u32>,
    /// Pause after each upgrade domain
    #[arg(long, conflicts_with = "pause_after")]
    pub manual: bool,
    /// Most time for a domain to become Ready [default: 30m]
    #[arg(long, value_name = "S", value_parser = duration)]
    pub ready_limit: Option<Duration>,
    /// Time that an instance is to stay Ready before the next domain
    #[arg(long, value_name = "S", value_parser = duration)]
    pub stable_for: Option<Duration>,
}

/// `service update`.
#[derive(Debug, Clone, Args)]
pub struct UpdateArgs {
    /// Name of the service
    pub service: String,
    /// A .cspkg, or a directory with a .csdef; else the package stays
    #[arg(long, value_name = "F")]
    pub package: Option<PathBuf>,
    /// Configuration; else it stays
    #[arg(long, value_name = "F.cscfg")]
    pub config: Option<PathBuf>,
    /// Only show what would be done
    #[arg(long)]
    pub dry_run: bool,
    /// How it goes.
    #[command(flatten)]
    pub policy: PolicyArgs,
    /// How the operation is begun.
    #[command(flatten)]
    pub begin: BeginArgs,
}

/// `service rollback`.
#[derive(Debug, Clone, Args)]
pub struct RollbackArgs {
    /// Name of the service
    pub service: String,
    /// The generation [default: the one before]
    #[arg(long, value_name = "N")]
    pub to: Option<u64>,
    /// How it goes.
    #[command(flatten)]
    pub policy: PolicyArgs,
    /// How the operation is begun.
    #[command(flatten)]
    pub begin: BeginArgs,
}

/// `service resume`.
#[derive(Debug, Clone, Args)]
pub struct ResumeArgs {
    /// Name of the service
    pub service: String,
    /// How the operation is begun.
    #[command(flatten)]
    pub begin: BeginArgs,
}

/// `service stop` and `service start`.
#[derive(Debug, Clone, Args)]
pub struct ChangeArgs {
    /// Name of the service
    pub service: String,
    /// How the operation is begun.
    #[command(flatten)]
    pub begin: BeginArgs,
}

/// `service delete`.
#[derive(Debug, Clone, Args)]
pub struct DeleteArgs {
    /// Name of the service
    pub service: String,
    /// How the operation is begun.
    #[command(flatten)]
    pub begin: BeginArgs,
}

/// How an operation is begun.
#[derive(Debug, Clone, Args)]
pub struct BeginArgs {
    /// Do not ask on a terminal
    #[arg(short, long)]
    pub yes: bool,
    /// Wait until it is done
    #[arg(long)]
    pub wait: bool,
    /// With --wait: give up waiting after this time, not the operation
    #[arg(long, value_name = "S", value_parser = duration, requires = "wait")]
    pub timeout: Option<Duration>,
}

//! Arguments of `run` and `test`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};

use super::time::duration;
use crate::cli::endpoint_probe::EndpointProbe;
use crate::cli::report::ReportFile;
use crate::service::PublishedPort;

/// The service to deploy.
#[derive(Debug, Clone, Args)]
pub struct ServiceArgs {
    /// Directory with a .csdef, or a .cspkg
    pub service: PathBuf,
    /// Configuration, when it is not beside the service
    #[arg(long, value_name = "F.cscfg")]
    pub config: Option<PathBuf>,
    /// Publish an endpoint on this port; may be repeated
    #[arg(short, long, value_name = "PORT:ENDPOINT")]
    pub publish: Vec<PublishedPort>,
}

/// `run`.
#[derive(Debug, Clone, Args)]
pub struct RunArgs {
    /// The service.
    #[command(flatten)]
    pub service: ServiceArgs,
    /// Run until the service is stopped, or stop it when it is Ready
    #[arg(long, default_value = "stopped")]
    pub until: Until,
    /// Keep disks and logs at the end
    #[arg(long, env = "HOST_AGENT_KEEP", hide_env = true, value_parser = clap::builder::FalseyValueParser::new())]
    pub keep: bool,
    /// Refuse to run guests whose VMM process lacks a layer of the sandbox
    #[arg(long)]
    pub require_sandbox: bool,
    /// Restart a guest that is silent this long [default: 10m]
    #[arg(long, value_name = "S", value_parser = duration)]
    pub heartbeat_limit: Option<Duration>,
    /// Give up if not Ready after this time, times the timeout scale
    #[arg(long, value_name = "S", value_parser = duration)]
    pub timeout: Option<Duration>,
}

/// When `run` ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Until {
    /// When a signal stops it, or it fails.
    Stopped,
    /// When every instance is Ready.
    Ready,
}

/// `test`.
#[derive(Debug, Clone, Args)]
pub struct TestArgs {
    /// The service.
    #[command(flatten)]
    pub service: ServiceArgs,
    /// tcp://ENDPOINT or http://ENDPOINT/PATH[=CODE]; may be repeated
    #[arg(long = "probe", value_name = "URL")]
    pub probes: Vec<EndpointProbe>,
    /// Give up after this time, times the timeout scale
    #[arg(long, value_name = "S", value_parser = duration, default_value = "3m")]
    pub timeout: Duration,
    /// json=FILE or junit=FILE; may be repeated
    #[arg(long = "report", value_name = "KIND=FILE")]
    pub reports: Vec<ReportFile>,
    /// Copy logs of every instance here
    #[arg(long, value_name = "DIR")]
    pub artifacts: Option<PathBuf>,
    /// On a machine that cannot run guests [default: fail]
    #[arg(long)]
    pub on_no_kvm: Option<OnNoKvm>,
}

/// The result of a test on a machine that cannot run guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OnNoKvm {
    /// A failure, exit 6 or 11.
    Fail,
    /// Skipped, exit 77.
    Skip,
}

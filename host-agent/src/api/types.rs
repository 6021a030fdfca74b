//! The resources of the API as JSON: what [`super::server`] answers and
//! [`super::client`] reads. They only grow by new fields.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::{IntoParams, ToSchema};

use crate::controller::plan::UpdatePlan;
use crate::digest::Digest;
use crate::service::PublishedPort;
use crate::store::rollouts::RolloutPolicy;
use crate::store::services::{Expected, Operation};
use crate::supervisor::status::InstanceStatus;

/// First segment of every path: a change that older programs cannot read gets a new one.
pub const VERSION: &str = "v1";

/// Version of this program, for messages.
pub const PROGRAM: &str = env!("CARGO_PKG_VERSION");

/// Protocol of the `Upgrade` of a connection to exec: [`vmbus::message::ExecInput`] frames
/// to the host and [`vmbus::message::ExecOutput`] frames back.
pub const EXEC_PROTOCOL: &str = "host-agent-exec";

/// Header of every answer with the version of the program that answers.
pub const PROGRAM_HEADER: &str = "host-agent-version";

/// Most bytes of the JSON in a request.
pub const MAX_BODY: usize = 1 << 20;

/// A log of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum LogFile {
    /// Standard output and error of the role.
    Role,
    /// The agents in the guest.
    Agent,
    /// The guest's serial console.
    Serial,
}

impl LogFile {
    /// Name of the file in the instance's directory.
    pub const fn file_name(self) -> &'static str {
        match self {
            Self::Role => "role.log",
            Self::Agent => "agent.log",
            Self::Serial => "serial.log",
        }
    }

    /// Its name in a query.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Role => "role",
            Self::Agent => "agent",
            Self::Serial => "serial",
        }
    }
}

/// Query of `GET …/logs`, whose answer is the log from its beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct LogQuery {
    /// Which log.
    #[param(inline)]
    pub source: LogFile,
    /// Continue with what is appended, until the deployment ends.
    #[serde(default)]
    pub follow: bool,
}

/// Body of `POST …/pause`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PauseRequest {
    /// Stop the vCPUs, or let them run again.
    pub paused: bool,
}

/// Body of every answer that is not a success.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// Class of the error.
    pub kind: RefusalKind,
    /// The error chain.
    pub message: String,
    /// Id of the request, as in the header `x-request-id` and in the logs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request: Option<String>,
}

impl Problem {
    /// A problem of this class.
    pub fn new(kind: RefusalKind, message: impl Into<String>) -> Self {
        let message = message.into();
        Self {
            kind,
            message,
            request: None,
        }
    }
}

/// Classes of errors. Each has one HTTP status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RefusalKind {
    /// No such resource on this host: 404.
    NotFound,
    /// This program has no such path; another version may: 404.
    NoSuchPath,
    /// This program has the path, but not with this method: 405.
    NoSuchMethod,
    /// The request is invalid: 400.
    Invalid,
    /// The client may not do it: 403.
    Forbidden,
    /// It contradicts what exists: 409.
    Conflict,
    /// The instance or its agent cannot be reached now: 503.
    Unreachable,
    /// What is asked for does not fit into the host: 409.
    NoRoom,
    /// The host cannot run guests: 503.
    Unable,
    /// The host agent has too many clients: 503.
    Busy,
    /// The disk of the host agent's state is full: 507.
    NoSpace,
    /// Anything else: 500.
    Internal,
}

/// Answer to `GET /healthz`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Health {
    /// `ok`: the host agent answers.
    pub status: String,
    /// Version of the program.
    pub version: String,
}

/// Answer to `GET /v1/deployments`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Deployments {
    /// Every deployment of this host.
    pub deployments: Vec<DeploymentInfo>,
}

/// A deployment that runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DeploymentInfo {
    /// 32 hexadecimal digits.
    pub deployment: String,
    /// Name of the service.
    pub service: String,
    /// Process id of the host agent.
    pub pid: u32,
    /// Its instances.
    pub instances: Vec<InstanceInfo>,
}

/// An instance of a running deployment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct InstanceInfo {
    /// `<Role>_IN_<n>`.
    pub name: String,
    /// [`InstanceStatus::word`].
    pub state: String,
    /// The whole state.
    pub status: InstanceStatus,
    /// Number of the guest's boot.
    pub generation: u64,
    /// Incarnation of the newest goal; `status.applied` is the one that the guest has applied.
    #[serde(default)]
    pub incarnation: u64,
    /// Milliseconds since the deployment was accepted.
    pub uptime_ms: u64,
    /// Process id of the VMM, while there is one.
    pub vmm_pid: Option<u32>,
    /// Published endpoints.
    pub endpoints: Vec<EndpointInfo>,
}

/// A published endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct EndpointInfo {
    /// Endpoint name.
    pub name: String,
    /// Address on the host.
    #[schema(value_type = String)]
    pub address: SocketAddr,
    /// Port in the guest.
    pub local_port: u16,
}

/// Body of `PUT /v1/services/{name}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ApplyRequest {
    /// SHA-256 of a package that was uploaded.
    pub package: Digest,
    /// Text of the configuration.
    pub configuration: String,
    /// Public ports in place of those of the definition.
    #[serde(default)]
    pub publish: Vec<PublishedPort>,
    /// How the rollout goes, if the service exists.
    #[serde(default)]
    pub policy: RolloutPolicy,
    /// Only check and plan.
    #[serde(default)]
    pub dry_run: bool,
}

/// Answer to an [`ApplyRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ApplyAnswer {
    /// Instances that are created.
    pub create: Vec<PlannedInstance>,
    /// Endpoints that are published.
    pub endpoints: Vec<PlannedEndpoint>,
    /// What is changed, if the service exists.
    pub update: Option<UpdatePlan>,
    /// What was begun; none of a dry run, or if the service is as wanted already.
    pub operation: Option<Operation>,
}

/// An instance that is created.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PlannedInstance {
    /// `<Role>_IN_<n>`.
    pub name: String,
    /// Virtual processors.
    pub vcpus: u8,
    /// Guest RAM in MiB.
    pub memory_mib: u32,
}

/// An endpoint that is published.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PlannedEndpoint {
    /// Endpoint name.
    pub name: String,
    /// Port on the host.
    pub port: u16,
    /// Number of instances behind it.
    pub instances: u32,
}

/// Answer to `GET /v1/services`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Services {
    /// Every service of the host.
    pub services: Vec<ServiceInfo>,
}

/// A service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ServiceInfo {
    /// Its name.
    pub name: String,
    /// What is wanted.
    pub expected: Expected,
    /// Number of its newest revision.
    pub generation: u64,
    /// Instances that are Ready.
    pub ready: usize,
    /// Its deployment, if it runs.
    pub deployment: Option<DeploymentInfo>,
    /// Its newest operation.
    pub operation: Option<Operation>,
}

/// Answer to `GET /v1/services/{name}/history`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct History {
    /// Revisions, the oldest first; none of a service that was deleted.
    pub revisions: Vec<RevisionInfo>,
    /// Operations, the newest first.
    pub operations: Vec<Operation>,
}

/// A revision of a service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RevisionInfo {
    /// Its number.
    pub generation: u64,
    /// SHA-256 of the package.
    pub package: Digest,
    /// Id of the user who applied it.
    pub user: u32,
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
}

/// Query of `GET /v1/operations/{id}`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct OperationQuery {
    /// Answer only when the operation has ended, but after this many milliseconds at the
    /// latest. At most a minute.
    #[serde(default)]
    pub wait_ms: u64,
}

/// Query of `GET /v1/events`. The header `Last-Event-ID` replaces `after`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct EventQuery {
    /// Only events with larger numbers; else from the oldest that is kept.
    #[serde(default)]
    pub after: Option<u64>,
    /// Go on with new events; else end after the newest.
    #[serde(default = "yes")]
    pub follow: bool,
    /// Only events of this service.
    #[serde(default)]
    pub service: Option<String>,
    /// Only events of deployments whose ids begin with this.
    #[serde(default)]
    pub deployment: Option<String>,
    /// Only events of instances with this name.
    #[serde(default)]
    pub instance: Option<String>,
}

const fn yes() -> bool {
    true
}

/// An event in the answer to `GET /v1/events`, whose id is the number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventInfo {
    /// Its number: each event has the next one.
    pub number: u64,
    /// When it was reported, in milliseconds since 1970.
    pub at_ms: u64,
    /// The same as RFC 3339.
    pub at: String,
    /// The service, if the event is about one that is known.
    pub service: Option<String>,
    /// Id of the deployment, if the event is about one.
    pub deployment: Option<String>,
    /// The instance, if the event is about one.
    pub instance: Option<String>,
    /// The event for people.
    pub text: String,
    /// The event: its kind in `event`, and the fields of that kind.
    pub event: Value,
}

/// Answer to `GET` and `PUT /v1/packages/{digest}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PackageInfo {
    /// SHA-256.
    pub package: Digest,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wire_format_does_not_change() {
        let problem = Problem::new(RefusalKind::NoSuchPath, "no");
        assert_eq!(
            serde_json::to_string(&problem).unwrap(),
            r#"{"kind":"no-such-path","message":"no"}"#
        );
        for source in [LogFile::Role, LogFile::Agent, LogFile::Serial] {
            let name = serde_json::to_value(source).unwrap();
            assert_eq!(name, source.name());
        }
    }
}

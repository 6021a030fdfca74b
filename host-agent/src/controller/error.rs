//! Errors of the controller.

use tokio::task::JoinError;

use crate::service::{PublishError, ServiceError};
use crate::store::agents::AgentError;
use crate::store::database::StoreError;
use crate::store::packages::AddError;
use crate::supervisor::host::HostError;

/// Why a request about services fails.
#[derive(Debug, thiserror::Error)]
pub enum ControllerError {
    /// There is no such service.
    #[error("no service {0} on this host")]
    NoService(String),
    /// There is no such operation, or it is long over.
    #[error("no operation {0} on this host")]
    NoOperation(String),
    /// The name cannot be that of a service.
    #[error("\"{0}\" is not a name for a service: write 1 to 63 letters, digits, '-' or '_'")]
    Name(String),
    /// The package has not been uploaded.
    #[error("package {0} is not on this host: upload it first")]
    NoPackage(String),
    /// The service cannot be taken from what runs to what is wanted.
    #[error("{0}")]
    NotPossible(String),
    /// The service is stopped.
    #[error("service {0} is stopped: start it first")]
    Stopped(String),
    /// There is no such revision.
    #[error("service {0} has no such generation: its history lists them")]
    NoRevision(String),
    /// There is nothing to resume.
    #[error("no update of service {0} is paused or halted")]
    NotWaiting(String),
    /// The host cannot run guests.
    #[error("this host cannot run guests: {0}")]
    Unable(String),
    /// The quota of services is used up.
    #[error("this host keeps at most {0} services (quotas.services of its configuration)")]
    Quota(u32),
    /// The service is being deleted.
    #[error("service {0} is being deleted")]
    Deleting(String),
    /// Package and configuration are no service.
    #[error("package or configuration")]
    Service(#[source] Box<ServiceError>),
    /// The ports that were given.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// The package that was uploaded.
    #[error(transparent)]
    Package(#[from] AddError),
    /// A guest agent.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The host.
    #[error(transparent)]
    Host(#[from] HostError),
    /// What is not needed could not be listed or removed.
    #[error("cannot remove what is not needed")]
    Garbage(#[source] std::io::Error),
    /// A panic in a blocking step.
    #[error("internal error")]
    Blocking(#[from] JoinError),
}

impl From<ServiceError> for ControllerError {
    fn from(error: ServiceError) -> Self {
        Self::Service(Box::new(error))
    }
}

//! What all handlers share: reading a request, and the answer to one that fails.

use std::io;

use axum::Json;
use axum::extract::rejection::{JsonRejection, PathRejection, QueryRejection};
use axum::extract::{FromRequestParts, Path};
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use serde::de::DeserializeOwned;
use vmbus::text::chain;

use super::types::{Problem, RefusalKind};
use crate::controller::ControllerError;
use crate::store::agents::AgentError;
use crate::store::packages::AddError;
use crate::supervisor::host::HostError;

/// The answer to a request that fails.
#[derive(Debug)]
pub(crate) struct Failure(Problem);

impl Failure {
    pub(crate) fn new(kind: RefusalKind, message: impl Into<String>) -> Self {
        Self(Problem::new(kind, message))
    }

    /// Its HTTP status, and the text for people.
    pub(crate) fn into_parts(self) -> (StatusCode, String) {
        (self.0.kind.status(), self.0.message)
    }
}

/// The parts of a path. Unlike that of axum, its error is a [`Problem`].
#[derive(Debug)]
pub(super) struct Named<T>(pub(super) T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Named<T> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failure> {
        let Path(named) = Path::from_request_parts(parts, state).await?;
        Ok(Self(named))
    }
}

impl RefusalKind {
    /// Its HTTP status.
    pub(super) const fn status(self) -> StatusCode {
        match self {
            Self::NotFound | Self::NoSuchPath => StatusCode::NOT_FOUND,
            Self::NoSuchMethod => StatusCode::METHOD_NOT_ALLOWED,
            Self::Invalid => StatusCode::BAD_REQUEST,
            Self::Conflict | Self::NoRoom => StatusCode::CONFLICT,
            Self::Unreachable | Self::Unable | Self::Busy => StatusCode::SERVICE_UNAVAILABLE,
            Self::Forbidden => StatusCode::FORBIDDEN,
            Self::NoSpace => StatusCode::INSUFFICIENT_STORAGE,
            Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (self.0.kind.status(), Json(self.0)).into_response()
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::new(RefusalKind::Internal, chain(&error))
    }
}

impl From<ControllerError> for Failure {
    fn from(error: ControllerError) -> Self {
        let kind = match &error {
            ControllerError::NoService(_)
            | ControllerError::NoOperation(_)
            | ControllerError::NoRevision(_)
            | ControllerError::NoPackage(_) => RefusalKind::NotFound,
            ControllerError::Name(_)
            | ControllerError::Service(_)
            | ControllerError::Publish(_)
            | ControllerError::Package(AddError::Digest { .. }) => RefusalKind::Invalid,
            ControllerError::Agent(error) => match error {
                AgentError::Missing(_) => RefusalKind::NotFound,
                AgentError::Downgrade { .. } | AgentError::NoKeys(_) => RefusalKind::Conflict,
                AgentError::Digest { .. } | AgentError::Refused(_) => RefusalKind::Invalid,
                AgentError::Key { .. } | AgentError::Io { .. } => RefusalKind::Internal,
            },
            ControllerError::Unable(_) => RefusalKind::Unable,
            ControllerError::Host(HostError::NoRoom(_)) | ControllerError::Quota(_) => {
                RefusalKind::NoRoom
            }
            ControllerError::NotPossible(_)
            | ControllerError::Stopped(_)
            | ControllerError::NotWaiting(_)
            | ControllerError::Deleting(_) => RefusalKind::Conflict,
            ControllerError::Package(AddError::Io(_))
            | ControllerError::Store(_)
            | ControllerError::Host(_)
            | ControllerError::Garbage(_)
            | ControllerError::Blocking(_) => RefusalKind::Internal,
        };
        Self::new(kind, chain(&error))
    }
}

impl From<JsonRejection> for Failure {
    fn from(error: JsonRejection) -> Self {
        Self::new(RefusalKind::Invalid, error.body_text())
    }
}

impl From<PathRejection> for Failure {
    fn from(error: PathRejection) -> Self {
        Self::new(RefusalKind::Invalid, error.body_text())
    }
}

impl From<QueryRejection> for Failure {
    fn from(error: QueryRejection) -> Self {
        Self::new(RefusalKind::Invalid, error.body_text())
    }
}

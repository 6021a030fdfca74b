//! The errors of other layers as they are printed.

use std::io::ErrorKind;

use super::{CliError, Code, sources};
use crate::api::client::ClientError;
use crate::api::types::RefusalKind;
use crate::cli::exit::Exit;
use crate::service::{Blame, ServiceError};

impl From<ServiceError> for CliError {
    fn from(error: ServiceError) -> Self {
        let system = std::error::Error::source(&error)
            .and_then(|source| source.downcast_ref::<std::io::Error>())
            .map(std::io::Error::kind);
        let code = match (error.blame(), system) {
            (Blame::Usage, _) => Code::Usage,
            (_, Some(ErrorKind::StorageFull | ErrorKind::QuotaExceeded)) => Code::HostFull,
            (Blame::Output, _) => Code::Output,
            (Blame::Service, None) => Code::Service,
            (Blame::Service, Some(_)) => Code::ServiceFile,
        };
        let exit = match (code, system) {
            // Without an I/O error: another file has that name.
            (Code::Output, None) => Exit::Conflict,
            (Code::ServiceFile | Code::Output, Some(kind)) => match kind {
                ErrorKind::NotFound | ErrorKind::NotADirectory => Exit::NotFound,
                ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => Exit::Permission,
                // Bad content; the deflate decoder reports `InvalidInput`.
                ErrorKind::InvalidData | ErrorKind::UnexpectedEof | ErrorKind::InvalidInput => {
                    Exit::Invalid
                }
                _ => Exit::Unclassified,
            },
            (code, _) => code.row().1,
        };
        let mut this = Self::new(code, error.what()).exit_with(exit);
        this.0.place = Some((error.file().display().to_string(), error.position()));
        this.0.snippet = error.snippet().map(Into::into);
        this.0.hint = error.hint().map(Into::into);
        if code == Code::HostFull && this.0.hint.is_none() {
            this.0.hint = Some("free space there, or name a file on another disk".into());
        }
        this.0.causes = sources(&error);
        this
    }
}

impl From<ClientError> for CliError {
    fn from(error: ClientError) -> Self {
        let code = match &error {
            ClientError::NotFound { .. }
            | ClientError::Refused {
                kind: RefusalKind::NotFound,
                ..
            } => Code::NoInstance,
            ClientError::Ambiguous { .. } => Code::Ambiguous,
            ClientError::Unreachable { .. }
            | ClientError::Version { .. }
            | ClientError::Refused {
                kind: RefusalKind::Unreachable | RefusalKind::Busy,
                ..
            } => Code::Unreachable,
            ClientError::Invalid(_)
            | ClientError::Refused {
                kind: RefusalKind::Invalid,
                ..
            } => Code::Usage,
            ClientError::Refused {
                kind: RefusalKind::NoRoom | RefusalKind::NoSpace,
                ..
            } => Code::HostFull,
            ClientError::Refused {
                kind: RefusalKind::Unable,
                ..
            } => Code::KvmUnusable,
            ClientError::Refused {
                kind: RefusalKind::Conflict,
                ..
            } => Code::Conflict,
            ClientError::Refused {
                kind: RefusalKind::Forbidden,
                ..
            } => Code::Forbidden,
            ClientError::List { .. } => Code::RuntimeDirectory,
            ClientError::Refused { .. } => Code::Unclassified,
        };
        let this = Self::chain(code, &error);
        match error {
            ClientError::NotFound { running, .. } if running.is_empty() => this
                .cause("no instance is running")
                .hint("host-agent run SERVICE   (in another terminal)"),
            ClientError::NotFound { running, .. } => this
                .cause(format!("running: {}", running.join(", ")))
                .hint("host-agent ps"),
            ClientError::Ambiguous { matches, .. } => {
                this.hint(format!("name one of: {}", matches.join(", ")))
            }
            ClientError::List { source, .. } if source.kind() == ErrorKind::PermissionDenied => {
                this.hint("export XDG_RUNTIME_DIR=/directory/of/your/own")
            }
            ClientError::List { .. } => this.exit_with(Exit::Unclassified),
            _ => this,
        }
    }
}

//! Errors of a host.

use std::io;
use std::path::{Path, PathBuf};

use tokio::task::JoinError;

use super::super::admission::NoRoom;
use super::super::guest::GuestError;
use crate::endpoints::ListenError;
use crate::store::image::ImageError;

/// An error of a host.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The guest image.
    #[error("guest image")]
    Image(#[source] ImageError),
    /// The image has changed since the spec was made.
    #[error("image {name} has changed: its manifest has SHA-256 {found}, not {wanted}")]
    ImageChanged {
        /// Image name.
        name: String,
        /// Digest of the manifest that the spec names.
        wanted: String,
        /// Digest of the manifest that exists.
        found: String,
    },
    /// A public port.
    #[error("public endpoint of role {role}")]
    Listen {
        /// Role name.
        role: String,
        /// Endpoint name.
        name: String,
        /// Why.
        source: ListenError,
    },
    /// The instances do not fit.
    #[error("the host has no room")]
    NoRoom(#[from] NoRoom),
    /// The application disk of a role.
    #[error(transparent)]
    Application(GuestError),
    /// Disks of an instance.
    #[error("instance {instance}")]
    Guest {
        /// The instance.
        instance: String,
        /// Why.
        #[source]
        source: GuestError,
    },
    /// A file or directory of the host.
    #[error("cannot {what} {}", path.display())]
    Directory {
        /// What was tried.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The deployment runs here already.
    #[error("deployment {0} runs on this host")]
    Exists(String),
    /// A deployment whose files are here was not adopted.
    #[error(
        "the deployment in {} was not adopted: the events of the host agent say why",
        path.display()
    )]
    NotAdopted {
        /// Its directory.
        path: PathBuf,
    },
    /// No such instance runs here.
    #[error("no instance {name} of deployment {deployment} runs on this host")]
    NotFound {
        /// Deployment id.
        deployment: String,
        /// Instance name.
        name: String,
    },
    /// Files could not be removed.
    #[error("cannot remove {}", path.display())]
    Remove {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A panic in a blocking step.
    #[error("internal error")]
    Blocking(#[from] JoinError),
}

impl HostError {
    /// A failed step on a file or directory, for `map_err`.
    pub(in super::super) fn directory(
        what: &'static str,
        path: &Path,
    ) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Directory { what, path, source }
    }

    /// Files that could not be removed, for `map_err`.
    pub(super) fn removal(path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Remove { path, source }
    }

    /// Disks of `instance` that could not be made, for `map_err`.
    pub(super) fn guest(instance: &str) -> impl FnOnce(GuestError) -> Self + use<> {
        let instance = instance.to_owned();
        move |source| Self::Guest { instance, source }
    }
}

//! Why a host cannot do what it is asked.

use std::io;
use std::path::{Path, PathBuf};

use super::super::guest::GuestError;
use crate::endpoints::ListenError;
use crate::store::image::ImageError;

/// Why a host cannot do what is asked.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The guest image.
    #[error("guest image")]
    Image(#[source] ImageError),
    /// The image has changed since the spec was made.
    #[error("image {name} is another one now: its manifest has SHA-256 {found}, not {wanted}")]
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
    /// Disks or logs of an instance.
    #[error("instance {instance}")]
    Guest {
        /// The instance.
        instance: String,
        /// Why.
        #[source]
        source: GuestError,
    },
    /// A file or directory of the host.
    #[error("cannot make {what} in {}", path.display())]
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
    /// A blocking step panicked.
    #[error("internal: {0}")]
    Internal(String),
}

impl HostError {
    /// A file or directory that could not be made, for `map_err`.
    pub(in super::super) fn directory(
        what: &'static str,
        path: &Path,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Directory { what, path, source }
    }

    /// Files that could not be removed, for `map_err`.
    pub(super) fn removal(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Remove { path, source }
    }

    /// Disks or logs of `instance` that could not be made, for `map_err`.
    pub(super) fn guest(instance: &str) -> impl FnOnce(GuestError) -> Self {
        let instance = instance.to_owned();
        move |source| Self::Guest { instance, source }
    }
}

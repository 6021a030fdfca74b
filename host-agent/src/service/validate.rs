//! Checks service files one at a time, as far as each can be judged alone.

use std::path::Path;

use super::error::ServiceError;
use super::load::{directory_of, find_configuration, load, load_package, verified, with_extension};
use super::package::Package;
use super::{configuration, definition};
use crate::progress::Progress;

/// What was found to be right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Validated {
    /// A directory: definition, configuration and files agree.
    Service,
    /// A definition by itself.
    Definition,
    /// A configuration and the definition beside it.
    Configuration,
    /// A package and the configuration beside it.
    PackagedService,
    /// A package by itself: there is no configuration beside it.
    Package,
}

/// Checks `path`: a service directory, `.csdef`, `.cscfg` or `.cspkg`.
///
/// # Errors
/// The first thing that is wrong with it.
pub fn validate(path: &Path, progress: &Progress) -> Result<Validated, ServiceError> {
    let metadata = std::fs::metadata(path)
        .map_err(|source| ServiceError::io(path, "cannot open the file", source))?;
    if metadata.is_dir() {
        return load(path, None, progress).map(|_| Validated::Service);
    }
    let extension = path.extension().and_then(|extension| extension.to_str());
    match extension.map(str::to_ascii_lowercase).as_deref() {
        Some("csdef") => definition::read(path).map(|_| Validated::Definition),
        Some("cscfg") => {
            let definition = super::load::find_definition(directory_of(path))?;
            configuration::read(path, &definition::read(&definition)?)
                .map(|_| Validated::Configuration)
        }
        Some("cspkg") => {
            let package = Package::open(path)?;
            let directory = directory_of(path);
            if with_extension(directory, "cscfg")?.is_empty() {
                return verified(package, progress).map(|_| Validated::Package);
            }
            load_package(package, &find_configuration(directory)?, progress)
                .map(|_| Validated::PackagedService)
        }
        _ => Err(ServiceError::new(path, "is not a file of a service")
            .with_hint("give a directory, or a file named .csdef, .cscfg or .cspkg")),
    }
}

//! Checks the files of a service one at a time.

use std::path::Path;

use super::configuration;
use super::definition::{self, Definition};
use super::error::ServiceError;
use super::load::{
    directory_of, find_configuration, find_definition, load_by, load_package, verified,
    with_extension,
};
use super::package::Package;
use super::rules::ServiceRules;
use crate::progress::Progress;

/// What was checked and is valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Validated {
    /// A directory: definition, configuration and files agree.
    Service,
    /// A definition by itself.
    Definition,
    /// A configuration and its definition.
    Configuration,
    /// A package and its configuration.
    PackagedService,
    /// A package by itself: no configuration was named, and its directory does
    /// not hold exactly one.
    Package,
}

/// [`ServiceRules::validate`] by the rules of no operator.
///
/// # Errors
/// The first thing that is wrong with it.
pub fn validate(
    path: &Path,
    config: Option<&Path>,
    progress: &Progress,
) -> Result<Validated, ServiceError> {
    validate_by(&ServiceRules::default(), path, config, progress)
}

pub(super) fn validate_by(
    rules: &ServiceRules,
    path: &Path,
    config: Option<&Path>,
    progress: &Progress,
) -> Result<Validated, ServiceError> {
    let metadata = std::fs::metadata(path)
        .map_err(|source| ServiceError::io(path, "cannot open the file", source))?;
    if metadata.is_dir() {
        return load_by(rules, path, config, progress).map(|_| Validated::Service);
    }
    let extension = path.extension().and_then(|extension| extension.to_str());
    match (extension.map(str::to_ascii_lowercase).as_deref(), config) {
        (Some("csdef"), None) => {
            definition::read(path, &rules.sizes).map(|_| Validated::Definition)
        }
        (Some("csdef"), Some(config)) => {
            configuration::read(config, &definition::read(path, &rules.sizes)?)
                .map(|_| Validated::Configuration)
        }
        (Some("cscfg"), None) => {
            let definition = definition_beside(rules, directory_of(path))?;
            configuration::read(path, &definition).map(|_| Validated::Configuration)
        }
        (Some("cscfg"), Some(_)) => Err(ServiceError::new(path, "is already a configuration")
            .with_hint("use --config with a directory, .csdef or .cspkg")),
        (Some("cspkg"), config) => {
            let package = Package::open(path, &rules.sizes)?;
            let config = match config {
                Some(config) => Some(config.to_owned()),
                // Without a clear choice of configuration check the package alone.
                None => find_configuration(directory_of(path)).ok(),
            };
            match config {
                Some(config) => load_package(rules, package, &config, progress)
                    .map(|_| Validated::PackagedService),
                None => verified(package, progress).map(|_| Validated::Package),
            }
        }
        _ => Err(ServiceError::new(
            path,
            "is not a service directory, definition, configuration or package",
        )
        .with_hint("give a directory, or a file named .csdef, .cscfg or .cspkg")),
    }
}

/// The definition in `directory`, or that of its only package.
fn definition_beside(rules: &ServiceRules, directory: &Path) -> Result<Definition, ServiceError> {
    if let ([], [package]) = (
        with_extension(directory, "csdef")?.as_slice(),
        with_extension(directory, "cspkg")?.as_slice(),
    ) {
        return Ok(Package::open(package, &rules.sizes)?.definition().clone());
    }
    definition::read(&find_definition(directory)?, &rules.sizes)
}

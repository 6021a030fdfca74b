//! Loads a service: a directory with its definition, configuration and one
//! directory of files per role.
//!
//! ```text
//! redis/
//!   ServiceDefinition.csdef        the only .csdef
//!   ServiceConfiguration.cscfg     or the only .cscfg
//!   Cache/                         approot of the role "Cache"
//!     run.sh
//! ```

use std::path::{Path, PathBuf};

use super::configuration::{self, Configuration};
use super::definition::{self, Definition, RoleDefinition};
use super::error::{ServiceError, nearest};
use super::model::{Payload, Role, ServiceModel};
use super::payload::Files;

/// The configuration taken when a directory holds several.
const DEFAULT_CONFIGURATION: &str = "ServiceConfiguration.cscfg";

/// Loads the service in the directory `service`, with the configuration
/// `config` or the one found beside the definition.
///
/// # Errors
/// The first thing that is wrong with it.
pub fn load(service: &Path, config: Option<&Path>) -> Result<ServiceModel, ServiceError> {
    let metadata = std::fs::metadata(service)
        .map_err(|source| ServiceError::io(service, "cannot open the service", source))?;
    if metadata.is_dir() {
        return load_directory(service, config);
    }
    Err(
        ServiceError::new(service, "is neither a directory nor a .cspkg package")
            .with_hint("name the directory that holds the .csdef"),
    )
}

fn load_directory(service: &Path, config: Option<&Path>) -> Result<ServiceModel, ServiceError> {
    let definition = definition::read(&find_definition(service)?)?;
    let config = match config {
        Some(config) => config.to_owned(),
        None => find_configuration(service)?,
    };
    let configuration = configuration::read(&config, &definition)?;
    let payload = |role: &RoleDefinition| Payload::Directory(service.join(&role.name));
    join(&definition, configuration, payload)
}

/// The only `.csdef` in `directory`.
pub(super) fn find_definition(directory: &Path) -> Result<PathBuf, ServiceError> {
    let mut found = with_extension(directory, "csdef")?;
    match (found.pop(), found.pop()) {
        (Some(only), None) => Ok(only),
        (None, _) => Err(
            ServiceError::new(directory, "holds no service definition (.csdef)")
                .with_hint("name the directory that holds ServiceDefinition.csdef"),
        ),
        (Some(last), Some(other)) => Err(ServiceError::new(
            directory,
            format!(
                "holds more than one definition: {} and {}",
                file_name(&other),
                file_name(&last)
            ),
        )
        .with_hint("keep one .csdef in a directory")),
    }
}

/// The configuration of the service in `directory`.
fn find_configuration(directory: &Path) -> Result<PathBuf, ServiceError> {
    let mut found = with_extension(directory, "cscfg")?;
    let default = directory.join(DEFAULT_CONFIGURATION);
    if found.contains(&default) {
        return Ok(default);
    }
    match (found.pop(), found.pop()) {
        (Some(only), None) => Ok(only),
        (None, _) => Err(
            ServiceError::new(directory, "holds no service configuration (.cscfg)")
                .with_hint(format!("add {DEFAULT_CONFIGURATION} or give --config FILE")),
        ),
        (Some(last), Some(other)) => Err(ServiceError::new(
            directory,
            format!(
                "holds more than one configuration: {} and {}",
                file_name(&other),
                file_name(&last)
            ),
        )
        .with_hint("choose one by --config FILE")),
    }
}

/// Files of `directory` whose name ends in `.extension`, sorted.
fn with_extension(directory: &Path, extension: &str) -> Result<Vec<PathBuf>, ServiceError> {
    let cannot = |source| ServiceError::io(directory, "cannot list the directory", source);
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(cannot)? {
        let path = entry.map_err(cannot)?.path();
        if path
            .extension()
            .is_some_and(|e| e.eq_ignore_ascii_case(extension))
        {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

/// Joins what the definition and the configuration say, after a look at the
/// files of every role.
fn join(
    definition: &Definition,
    configuration: Configuration,
    payload: impl Fn(&RoleDefinition) -> Payload,
) -> Result<ServiceModel, ServiceError> {
    let mut roles = Vec::new();
    for (role, configured) in definition.roles.iter().zip(configuration.roles) {
        let payload = payload(role);
        check_entry_point(definition, role, &payload)?;
        roles.push(Role {
            name: role.name.clone(),
            instances: configured.instances,
            size: role.size,
            command: role.command.clone(),
            ready_on_start: role.ready_on_start,
            elevated: role.elevated,
            endpoints: role.endpoints.clone(),
            local_storage: role.local_storage.clone(),
            settings: configured.settings,
            environment: role.environment.clone(),
            payload,
        });
    }
    Ok(ServiceModel {
        name: definition.name.clone(),
        image: configuration.image,
        roles,
    })
}

/// Checks the files of `role` and that its program is one of them.
pub(super) fn check_entry_point(
    definition: &Definition,
    role: &RoleDefinition,
    payload: &Payload,
) -> Result<(), ServiceError> {
    if let Payload::Directory(path) = payload
        && !path.is_dir()
    {
        let what = format!("role \"{}\" has no directory {}", role.name, path.display());
        return Err(definition
            .refuse_role(role, what)
            .with_hint("make it: its content is the role's approot"));
    }
    let files = Files::open(payload)?;
    let program = role.command[0].as_str();
    let place = files.locate(program);
    let place = place.display();
    let Some(entry) = files.find(program) else {
        if files.directories().contains(program) {
            let what = format!("entry point \"{program}\" is a directory: {place}");
            return Err(definition
                .refuse_command(role, what)
                .with_hint("name a file in it"));
        }
        let known = files.entries().iter().map(|entry| entry.path.as_str());
        let hint = match nearest(program, known) {
            Some(near) => format!("did you mean \"{near}\"?"),
            None => "add the file, or correct commandLine".into(),
        };
        let what = format!("entry point \"{program}\" does not exist: {place}");
        return Err(definition.refuse_command(role, what).with_hint(hint));
    };
    if !entry.executable {
        let what = format!("entry point \"{program}\" is not executable: {place}");
        let hint = match payload {
            Payload::Directory(_) => format!("chmod +x {place}"),
            Payload::Package { .. } => {
                format!("chmod +x {program} in the role's directory and pack again")
            }
        };
        return Err(definition.refuse_command(role, what).with_hint(hint));
    }
    Ok(())
}

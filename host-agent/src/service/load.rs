//! Loads a service: a package, or a directory with its definition,
//! configuration and one directory of files per role.
//!
//! ```text
//! redis/
//!   ServiceDefinition.csdef        the only .csdef
//!   ServiceConfiguration.cscfg     or the only .cscfg
//!   Cache/                         approot of the role "Cache"
//!     run.sh
//! ```

use std::path::{Path, PathBuf};
use std::sync::Arc;

use vmbus::launch::{self, LaunchError};
use vmbus::role::RoleDefinition;

use super::configuration::{self, Configuration};
use super::definition::{self, DefinedRole, Definition};
use super::error::{ServiceError, nearest};
use super::model::{Payload, Role, ServiceModel, VerifiedPackage};
use super::package::Package;
use super::payload::{Files, Total};
use super::rules::ServiceRules;
use super::xml;
use crate::progress::Progress;
use crate::shell::quoted;

/// The configuration taken when a directory holds several.
const DEFAULT_CONFIGURATION: &str = "ServiceConfiguration.cscfg";

/// Most bytes that the definitions of all instances take in their goals: 64 MiB. The
/// supervisor keeps one goal for each instance.
const MAX_MODEL: usize = 64 << 20;

/// [`ServiceRules::load`] by the rules of no operator.
///
/// # Errors
/// The first error of the service.
pub fn load(
    service: &Path,
    config: Option<&Path>,
    progress: &Progress,
) -> Result<ServiceModel, ServiceError> {
    load_by(&ServiceRules::default(), service, config, progress)
}

pub(super) fn load_by(
    rules: &ServiceRules,
    service: &Path,
    config: Option<&Path>,
    progress: &Progress,
) -> Result<ServiceModel, ServiceError> {
    let step = progress.step(format!("reading {}", service.display()), None);
    let metadata = std::fs::metadata(service)
        .map_err(|source| ServiceError::io(service, "cannot open the service", source))?;
    if metadata.is_dir() {
        return load_directory(rules, service, config);
    }
    if service.extension().is_some_and(|name| name == "csdef") {
        let directory = quoted(directory_of(service));
        return Err(ServiceError::new(service, "is the definition of a service")
            .with_hint(format!("name its directory: {directory}")));
    }
    let package = Package::open(service, &rules.sizes)?;
    let config = match config {
        Some(config) => config.to_owned(),
        None => find_configuration(directory_of(service))?,
    };
    drop(step);
    load_package(rules, package, &config, progress)
}

/// The text of the configuration that [`load`] takes for the same arguments.
///
/// # Errors
/// There is no such file, several may be meant, or it cannot be read.
pub fn configuration_text(service: &Path, config: Option<&Path>) -> Result<String, ServiceError> {
    let found = match config {
        Some(config) => config.to_owned(),
        None if service.is_dir() => find_configuration(service)?,
        None => find_configuration(directory_of(service))?,
    };
    xml::read_text(&found)
}

pub(super) fn load_text(
    rules: &ServiceRules,
    package: &Path,
    configuration: &str,
    progress: &Progress,
) -> Result<ServiceModel, ServiceError> {
    let package = Package::open(package, &rules.sizes)?;
    let name = Path::new(DEFAULT_CONFIGURATION);
    let configuration = configuration::parse(name, configuration, package.definition())?;
    load_configured(rules, package, configuration, progress)
}

/// Loads `package` with the configuration `config`.
pub(super) fn load_package(
    rules: &ServiceRules,
    package: Package,
    config: &Path,
    progress: &Progress,
) -> Result<ServiceModel, ServiceError> {
    let configuration = configuration::read(config, package.definition())?;
    load_configured(rules, package, configuration, progress)
}

fn load_configured(
    rules: &ServiceRules,
    package: Package,
    configuration: Configuration,
    progress: &Progress,
) -> Result<ServiceModel, ServiceError> {
    let package = verified(package, progress)?;
    let payload = |role: &DefinedRole| Payload::Package {
        package: VerifiedPackage(Arc::clone(&package)),
        role: role.definition.name.clone(),
    };
    join(rules, package.definition(), configuration, payload)
}

/// Checks the contents of `package` and the entry point of each role.
pub(super) fn verified(
    package: Package,
    progress: &Progress,
) -> Result<Arc<Package>, ServiceError> {
    package.verify(progress)?;
    let package = Arc::new(package);
    let definition = package.definition();
    for role in &definition.roles {
        let files = Files::of_package(Arc::clone(&package), &role.definition.name)?;
        find_entry_point(definition, role, &files, |_| {
            format!(
                "chmod +x {} in the role's directory and pack again",
                quoted(role.program())
            )
        })?;
    }
    Ok(package)
}

/// The directory of `file`.
pub(super) fn directory_of(file: &Path) -> &Path {
    match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn load_directory(
    rules: &ServiceRules,
    service: &Path,
    config: Option<&Path>,
) -> Result<ServiceModel, ServiceError> {
    let definition = definition::read(&find_definition(service)?, &rules.sizes)?;
    let config = match config {
        Some(config) => config.to_owned(),
        None => find_configuration(service)?,
    };
    let configuration = configuration::read(&config, &definition)?;
    let mut total = Total::default();
    for role in &definition.roles {
        let directory = service.join(&role.definition.name);
        check_directory(&definition, role, &directory, &mut total)?;
    }
    let payload = |role: &DefinedRole| Payload::Directory(service.join(&role.definition.name));
    join(rules, &definition, configuration, payload)
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
pub(super) fn find_configuration(directory: &Path) -> Result<PathBuf, ServiceError> {
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
pub(super) fn with_extension(
    directory: &Path,
    extension: &str,
) -> Result<Vec<PathBuf>, ServiceError> {
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

/// Joins the definition with its configuration.
fn join(
    rules: &ServiceRules,
    definition: &Definition,
    configuration: Configuration,
    payload: impl Fn(&DefinedRole) -> Payload,
) -> Result<ServiceModel, ServiceError> {
    let mut roles = Vec::new();
    let mut total = 0;
    for (role, configured) in definition.roles.iter().zip(configuration.roles) {
        let joined = RoleDefinition {
            settings: configured.settings,
            ..role.definition.clone()
        };
        total +=
            check_limits(definition, role, &joined)?.saturating_mul(configured.instances as usize);
        if total > MAX_MODEL {
            let what = format!(
                "the definitions of all instances have {total} bytes, the limit is {MAX_MODEL}"
            );
            return Err(definition
                .refuse_role(role, what)
                .with_hint("configure fewer instances or shorter values"));
        }
        roles.push(Role {
            definition: joined,
            instances: configured.instances,
            size: role.size.clone(),
            public_ports: role.public_ports.clone(),
            payload: payload(role),
        });
    }
    let mut model = ServiceModel {
        name: definition.name.clone(),
        image: rules.image(configuration.image.as_deref()),
        image_place: configuration.image_place,
        roles,
    };
    rules.publish(&mut model)?;
    Ok(model)
}

/// Refuses a role that no guest could be sent or start; `joined` is `role` with its
/// values. Returns its length in a goal in bytes.
fn check_limits(
    definition: &Definition,
    role: &DefinedRole,
    joined: &RoleDefinition,
) -> Result<usize, ServiceError> {
    const HINT: &str = "put long values of settings and variables into files of the role";
    let name = &joined.name;
    let length = joined.check_length().map_err(|error| {
        let what = format!("role \"{name}\" is too long for a goal: {error}");
        definition.refuse_role(role, what).with_hint(HINT)
    })?;
    launch::check(joined).map_err(|error| {
        let what = format!("role \"{name}\" cannot be started: {error}");
        match error {
            LaunchError::Argument { .. } => definition
                .refuse_command(role, what)
                .with_hint("put long arguments into files of the role"),
            _ => definition.refuse_role(role, what).with_hint(HINT),
        }
    })?;
    Ok(length)
}

/// Lists and checks the files of `role` in `directory`, its program among them, and adds
/// them to `total`.
pub(super) fn check_directory(
    definition: &Definition,
    role: &DefinedRole,
    directory: &Path,
    total: &mut Total,
) -> Result<Files, ServiceError> {
    if !directory.is_dir() {
        let what = format!(
            "role \"{}\" has no directory {}",
            role.definition.name,
            directory.display()
        );
        return Err(definition
            .refuse_role(role, what)
            .with_hint("make it: its content is the role's approot"));
    }
    let files = Files::of_directory(directory, total)?;
    find_entry_point(definition, role, &files, |place| {
        format!("chmod +x {}", quoted(place))
    })?;
    Ok(files)
}

/// Checks that the program of `role` is one of `files`; `executable` says how
/// to make it executable.
fn find_entry_point(
    definition: &Definition,
    role: &DefinedRole,
    files: &Files,
    executable: impl Fn(&str) -> String,
) -> Result<(), ServiceError> {
    let program = role.program();
    let place = files.locate(program).display().to_string();
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
    if entry.executable {
        return Ok(());
    }
    let what = format!("entry point \"{program}\" is not executable: {place}");
    Err(definition
        .refuse_command(role, what)
        .with_hint(executable(&place)))
}

//! Reads a service definition (`.csdef`), without its configuration and files.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use vmbus::role::{
    Endpoint, EntryPoint, InstanceValue, LocalStorage, RoleDefinition, VariableValue,
};

use super::error::{ServiceError, nearest};
use super::model::{PublicPort, VmSize};
use super::size::Sizes;
use super::xml::{self, EMPTY, Element, Names, Schema, Value};
use super::{command, size, xpath};

/// Namespace of definitions.
pub const NAMESPACE: &str = "http://schemas.microsoft.com/ServiceHosting/2008/10/ServiceDefinition";

/// Most roles of a service (classic limit).
pub const MAX_ROLES: usize = 25;

/// Most endpoints of a service (classic limit).
pub const MAX_ENDPOINTS: usize = 25;

/// `LocalStorage` without `sizeInMB`.
const DEFAULT_STORAGE_MIB: u64 = 100;

/// A definition without errors of its own.
#[derive(Debug, Clone)]
pub struct Definition {
    /// `ServiceDefinition@name`.
    pub name: String,
    /// Roles, in document order.
    pub roles: Vec<DefinedRole>,
    file: PathBuf,
    text: String,
}

/// A worker role as defined.
#[derive(Debug, Clone)]
pub struct DefinedRole {
    /// What the guest is given; each setting still has an empty value.
    pub definition: RoleDefinition,
    /// Resources of a guest.
    pub size: VmSize,
    /// Public port of each endpoint, in document order.
    pub public_ports: Vec<PublicPort>,
    role_at: usize,
    command_at: usize,
}

impl DefinedRole {
    /// Path of the role's program below approot.
    pub(super) fn program(&self) -> &str {
        let EntryPoint::Program { command, .. } = &self.definition.entry_point;
        command
            .first()
            .expect("the parser refuses an empty command line")
    }
}

const SERVICE: Schema = Schema {
    attributes: &["name", "schemaVersion"],
    later_attributes: &["topologyChangeDiscovery", "upgradeDomainCount"],
    children: &["WorkerRole"],
    later_children: &[
        "WebRole",
        "VirtualMachineRole",
        "LoadBalancerProbes",
        "NetworkTrafficRules",
    ],
};

const WORKER_ROLE: Schema = Schema {
    attributes: &["name", "vmsize", "enableNativeCodeExecution"],
    later_attributes: &[],
    children: &[
        "ConfigurationSettings",
        "LocalResources",
        "LocalStorage",
        "Endpoints",
        "Runtime",
    ],
    later_children: &["Startup", "Certificates", "Imports", "Contents", "Sites"],
};

const ENDPOINTS: Schema = Schema {
    children: &["InputEndpoint"],
    later_children: &["InternalEndpoint", "InstanceInputEndpoint"],
    ..EMPTY
};

const INPUT_ENDPOINT: Schema = Schema {
    attributes: &["name", "protocol", "port", "localPort"],
    later_attributes: &[
        "certificate",
        "ignoreRoleInstanceStatus",
        "loadBalancerProbe",
    ],
    ..EMPTY
};

const RUNTIME: Schema = Schema {
    attributes: &["executionContext"],
    children: &["Environment", "EntryPoint"],
    ..EMPTY
};

const ENTRY_POINT: Schema = Schema {
    children: &["ProgramEntryPoint"],
    later_children: &["NetFxEntryPoint"],
    ..EMPTY
};

const PROGRAM_ENTRY_POINT: Schema = Schema {
    attributes: &["commandLine", "setReadyOnProcessStart"],
    ..EMPTY
};

const LOCAL_STORAGE: Schema = Schema {
    attributes: &["name", "sizeInMB", "cleanOnRoleRecycle"],
    ..EMPTY
};

/// An element that only holds children named `children`.
const fn list(children: &'static [&'static str]) -> Schema {
    Schema { children, ..EMPTY }
}

/// Reads the definition in `file`, whose roles have sizes of `sizes`.
pub fn read(file: &Path, sizes: &Sizes) -> Result<Definition, ServiceError> {
    xml::read_text(file)
        .and_then(|text| parse(file, text, sizes))
        .map_err(|error| error.or_hint("correct the definition; host-agent validate checks it"))
}

/// Reads the definition `text`, naming it `file` in errors.
pub fn parse(file: &Path, text: String, sizes: &Sizes) -> Result<Definition, ServiceError> {
    let document = xml::parse_written(file, &text)?;
    let root = xml::root(file, &text, &document, "ServiceDefinition", NAMESPACE)?;
    root.check(&SERVICE)?;
    let name = root.required("name")?.identifier()?.to_owned();

    let mut names = Names::of("role");
    let mut ports = HashMap::new();
    let mut roles = Vec::new();
    for element in root.children("WorkerRole") {
        if roles.len() == MAX_ROLES {
            return Err(element.refuse(format!("more than {MAX_ROLES} roles")));
        }
        names.take(element.required("name")?)?;
        roles.push(worker_role(element, &mut ports, sizes)?);
    }
    if roles.is_empty() {
        return Err(root
            .refuse("the service has no role")
            .with_hint("add <WorkerRole name=\"…\">"));
    }
    Ok(Definition {
        name,
        roles,
        file: file.to_owned(),
        text,
    })
}

impl Definition {
    /// The file it was read from.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// The definition as written.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// An error at the element of `role`.
    pub(super) fn refuse_role(&self, role: &DefinedRole, what: String) -> ServiceError {
        ServiceError::at(&self.file, &self.text, role.role_at, what)
    }

    /// An error at the command line of `role`.
    pub(super) fn refuse_command(&self, role: &DefinedRole, what: String) -> ServiceError {
        ServiceError::at(&self.file, &self.text, role.command_at, what)
    }
}

/// `ports` holds every public port so far, with its endpoint and role.
fn worker_role(
    element: Element<'_>,
    ports: &mut HashMap<u16, String>,
    sizes: &Sizes,
) -> Result<DefinedRole, ServiceError> {
    element.check(&WORKER_ROLE)?;
    let name = element.required("name")?.identifier()?.to_owned();
    if let Some(native) = element.attribute("enableNativeCodeExecution")
        && !native.boolean()?
    {
        return Err(native
            .refuse("partial trust is not supported yet")
            .with_hint("remove enableNativeCodeExecution"));
    }
    let size = vm_size(element, sizes)?;
    let settings = settings(element)?;
    let local_storage = local_storage(element, &size)?;
    let (endpoints, public_ports) = endpoints(element, &name, ports)?.into_iter().unzip();

    let missing = || {
        element
            .refuse(format!("role \"{name}\" has no entry point"))
            .with_hint(
                "add <Runtime><EntryPoint><ProgramEntryPoint commandLine=\"…\" \
                 setReadyOnProcessStart=\"true\"/></EntryPoint></Runtime>",
            )
    };
    let runtime = element.child("Runtime")?.ok_or_else(missing)?;
    runtime.check(&RUNTIME)?;
    let elevated = match runtime.attribute("executionContext") {
        None => false,
        Some(value) => match value.text {
            "limited" => false,
            "elevated" => true,
            _ => {
                return Err(value
                    .refuse(format!("unknown {}", value.quoted()))
                    .with_hint("write \"limited\" or \"elevated\""));
            }
        },
    };
    let entry_point = runtime.child("EntryPoint")?.ok_or_else(missing)?;
    entry_point.check(&ENTRY_POINT)?;
    let program = entry_point
        .child("ProgramEntryPoint")?
        .ok_or_else(missing)?;
    program.check(&PROGRAM_ENTRY_POINT)?;
    let ready_on_start = match program.attribute("setReadyOnProcessStart") {
        Some(value) => value.boolean()?,
        None => true,
    };
    let (command, command_at) = command_line(program)?;
    let mut definition = RoleDefinition {
        name,
        entry_point: EntryPoint::Program {
            command,
            ready_on_start,
        },
        elevated,
        settings,
        environment: Vec::new(),
        local_storage,
        endpoints,
    };
    definition.environment = environment(runtime, &definition)?;
    Ok(DefinedRole {
        definition,
        size,
        public_ports,
        role_at: element.start(),
        command_at,
    })
}

fn vm_size(role: Element<'_>, sizes: &Sizes) -> Result<VmSize, ServiceError> {
    let Some(value) = role.attribute("vmsize") else {
        return Ok(sizes.default_size().clone());
    };
    sizes.find(value.text).cloned().ok_or_else(|| {
        if size::is_later(value.text) {
            return value
                .refuse(format!("{} is not supported yet", value.quoted()))
                .with_hint("use ExtraSmall, Small, Medium, Large or ExtraLarge");
        }
        let hint = match nearest(value.text, sizes.names()) {
            Some(near) => format!("did you mean \"{near}\"?"),
            None => "use ExtraSmall, Small, Medium, Large or ExtraLarge".into(),
        };
        value
            .refuse(format!("unknown size {}", value.quoted()))
            .with_hint(hint)
    })
}

/// Names of settings; a definition has no values.
fn settings(role: Element<'_>) -> Result<BTreeMap<String, String>, ServiceError> {
    let Some(list_element) = role.child("ConfigurationSettings")? else {
        return Ok(BTreeMap::new());
    };
    list_element.check(&list(&["Setting"]))?;
    let mut names = Names::of("setting");
    let mut settings = BTreeMap::new();
    for element in list_element.children("Setting") {
        element.check(&Schema {
            attributes: &["name"],
            ..EMPTY
        })?;
        let name = element.required("name")?;
        names.take(name)?;
        settings.insert(name.identifier_of(256)?.to_owned(), String::new());
    }
    Ok(settings)
}

fn local_storage(role: Element<'_>, size: &VmSize) -> Result<Vec<LocalStorage>, ServiceError> {
    let available = size.resource_mib.saturating_sub(size::RESERVED_MIB);
    let mut elements: Vec<Element<'_>> = role.children("LocalStorage").collect();
    if let Some(resources) = role.child("LocalResources")? {
        resources.check(&list(&["LocalStorage"]))?;
        elements.extend(resources.children("LocalStorage"));
    }
    elements.sort_by_key(|element| element.start());
    let mut names = Names::of("local storage");
    let mut total = 0_u64;
    let mut storage = Vec::new();
    for element in elements {
        element.check(&LOCAL_STORAGE)?;
        let name = element.required("name")?;
        names.take(name)?;
        not_reserved(name)?;
        let size_mib = match element.attribute("sizeInMB") {
            Some(value) => value.number(1..=u64::from(u32::MAX))?,
            None => DEFAULT_STORAGE_MIB,
        };
        total = total.saturating_add(size_mib);
        if total > available {
            return Err(element
                .refuse(format!(
                    "local storage adds up to {total} MB, size {} has {available} MB",
                    size.name
                ))
                .with_hint("make sizeInMB smaller or vmsize larger"));
        }
        storage.push(LocalStorage {
            name: name.identifier()?.to_owned(),
            size_mib,
            clean_on_role_recycle: match element.attribute("cleanOnRoleRecycle") {
                Some(value) => value.boolean()?,
                None => true,
            },
        });
    }
    Ok(storage)
}

fn endpoints(
    role: Element<'_>,
    role_name: &str,
    ports: &mut HashMap<u16, String>,
) -> Result<Vec<(Endpoint, PublicPort)>, ServiceError> {
    let Some(list_element) = role.child("Endpoints")? else {
        return Ok(Vec::new());
    };
    list_element.check(&ENDPOINTS)?;
    let mut names = Names::of("endpoint");
    let mut local_ports = HashMap::new();
    let mut endpoints = Vec::new();
    for element in list_element.children("InputEndpoint") {
        element.check(&INPUT_ENDPOINT)?;
        if ports.len() == MAX_ENDPOINTS {
            return Err(element.refuse(format!(
                "more than {MAX_ENDPOINTS} endpoints in the service"
            )));
        }
        let name_value = element.required("name")?;
        names.take(name_value)?;
        let name = name_value.identifier()?.to_owned();
        let protocol = element.required("protocol")?;
        match protocol.text {
            "tcp" => {}
            "http" | "https" | "udp" => {
                return Err(protocol
                    .refuse(format!("{} is not supported yet", protocol.quoted()))
                    .with_hint("write protocol=\"tcp\""));
            }
            _ => {
                return Err(protocol
                    .refuse(format!("unknown {}", protocol.quoted()))
                    .with_hint("write protocol=\"tcp\""));
            }
        }
        let port_value = element.required("port")?;
        let port = port_value.number(1..=65535)? as u16;
        let owner = format!("endpoint \"{name}\" of role \"{role_name}\"");
        if let Some(other) = ports.insert(port, owner) {
            return Err(port_value
                .refuse(format!("port {port} is already taken by {other}"))
                .with_hint("ports are unique over the service; choose another"));
        }
        let local_value = element.attribute("localPort");
        let local_port = match local_value {
            None => port,
            Some(value) if value.text == "*" => port,
            Some(value) => value.number(1..=65535).map_err(|error| {
                error.with_hint("write a port, or \"*\" to let the platform choose")
            })? as u16,
        };
        if let Some(other) = local_ports.insert(local_port, name.clone()) {
            return Err(local_value
                .unwrap_or(port_value)
                .refuse(format!(
                    "local port {local_port} is already taken by endpoint \"{other}\" of the role"
                ))
                .with_hint("two endpoints on one local port are not supported yet"));
        }
        let endpoint = Endpoint {
            name,
            protocol: protocol.text.to_owned(),
            local_port,
        };
        let place = port_value.location();
        endpoints.push((endpoint, PublicPort { port, place }));
    }
    Ok(endpoints)
}

/// The command and the place of its attribute.
fn command_line(element: Element<'_>) -> Result<(Vec<String>, usize), ServiceError> {
    let line = element.required("commandLine")?;
    let mut words = command::words(line.text).map_err(|what| {
        line.refuse(what)
            .with_hint("write one line, with double quotes in pairs around words with spaces")
    })?;
    let Some(first) = words.first_mut() else {
        return Err(line
            .refuse("the command line is empty")
            .with_hint("write the program's path under the role's directory"));
    };
    *first = command::program(first).map_err(|what| {
        line.refuse(what).with_hint(
            "the program is a file under the role's directory; to start one of the \
             guest image, add a script that does: exec /usr/bin/…",
        )
    })?;
    Ok((words, line.start()))
}

fn environment(
    runtime: Element<'_>,
    role: &RoleDefinition,
) -> Result<Vec<(String, VariableValue)>, ServiceError> {
    let Some(list_element) = runtime.child("Environment")? else {
        return Ok(Vec::new());
    };
    list_element.check(&list(&["Variable"]))?;
    let mut names = Names::of("variable");
    let mut environment = Vec::new();
    for element in list_element.children("Variable") {
        element.check(&Schema {
            attributes: &["name", "value"],
            children: &["RoleInstanceValue"],
            ..EMPTY
        })?;
        let name_value = element.required("name")?;
        names.take(name_value)?;
        let name = name_value.text;
        let usable = !name.is_empty()
            && name.len() <= 256
            && !name.as_bytes()[0].is_ascii_digit()
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        if !usable {
            return Err(name_value
                .refuse(format!(
                    "{} is not a usable variable name",
                    name_value.quoted()
                ))
                .with_hint("use letters, digits and \"_\", not a digit first"));
        }
        not_reserved(name_value)?;
        let literal = element.attribute("value");
        let instance = element.child("RoleInstanceValue")?;
        let value = match (literal, instance) {
            (Some(value), None) => VariableValue::Literal(value.text.to_owned()),
            (None, Some(instance)) => VariableValue::Instance(instance_value(instance, role)?),
            (Some(_), Some(instance)) => {
                return Err(instance
                    .refuse(format!(
                        "variable \"{name}\" has both a value and <RoleInstanceValue>"
                    ))
                    .with_hint("keep one of the two"));
            }
            (None, None) => {
                return Err(element
                    .refuse(format!("variable \"{name}\" has no value"))
                    .with_hint("add value=\"…\" or <RoleInstanceValue xpath=\"…\"/>"));
            }
        };
        environment.push((name.to_owned(), value));
    }
    Ok(environment)
}

/// Refuses a name whose environment variable the platform sets.
fn not_reserved(name: Value<'_>) -> Result<(), ServiceError> {
    if !vmbus::environment::is_reserved(name.text) {
        return Ok(());
    }
    Err(name
        .refuse(format!(
            "{} is the name of a variable that the platform sets",
            name.quoted()
        ))
        .with_hint("choose another name; a script can set the variable for what it starts"))
}

fn instance_value(
    element: Element<'_>,
    role: &RoleDefinition,
) -> Result<InstanceValue, ServiceError> {
    element.check(&Schema {
        attributes: &["xpath"],
        ..EMPTY
    })?;
    let path = element.required("xpath")?;
    let value = xpath::parse(path.text).ok_or_else(|| {
        path.refuse(format!("unknown {}", path.quoted()))
            .with_hint(format!("the paths are, {}", xpath::ALLOWED))
    })?;
    let (what, name, known): (_, _, Vec<&str>) = match &value {
        InstanceValue::Setting(name) => {
            let known = role.settings.keys().map(String::as_str);
            ("setting", name, known.collect())
        }
        InstanceValue::LocalStoragePath(name) | InstanceValue::LocalStorageSize(name) => {
            let known = role
                .local_storage
                .iter()
                .map(|storage| storage.name.as_str());
            ("local storage", name, known.collect())
        }
        InstanceValue::EndpointProtocol(name)
        | InstanceValue::EndpointAddress(name)
        | InstanceValue::EndpointPort(name) => {
            let known = role.endpoints.iter().map(|endpoint| endpoint.name.as_str());
            ("endpoint", name, known.collect())
        }
        _ => return Ok(value),
    };
    if known.contains(&name.as_str()) {
        return Ok(value);
    }
    let hint = match nearest(name, known) {
        Some(near) => format!("did you mean \"{near}\"?"),
        None => format!("define the {what} in role \"{}\"", role.name),
    };
    Err(path
        .refuse(format!("role \"{}\" has no {what} \"{name}\"", role.name))
        .with_hint(hint))
}

//! A service that passed every check: what the supervisor works from.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::error::Place;

/// A definition and a configuration that agree, with the payload of each role.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceModel {
    /// `ServiceDefinition@name`.
    pub name: String,
    /// `ServiceConfiguration@osFamily`: the name of the guest image.
    pub image: String,
    /// Where it is named, or should be.
    pub image_place: Place,
    /// Roles, in document order.
    pub roles: Vec<Role>,
}

impl ServiceModel {
    /// Every endpoint with its role.
    pub fn endpoints(&self) -> impl Iterator<Item = (&Role, &InputEndpoint)> {
        self.roles
            .iter()
            .flat_map(|role| role.endpoints.iter().map(move |endpoint| (role, endpoint)))
    }

    /// The shortest name that tells `endpoint` of `role` from all others:
    /// names are unique only within a role.
    pub fn endpoint_name(&self, role: &Role, endpoint: &InputEndpoint) -> String {
        let namesakes = self
            .endpoints()
            .filter(|(_, other)| other.name == endpoint.name);
        if namesakes.count() == 1 {
            return endpoint.name.clone();
        }
        full_name(&role.name, &endpoint.name)
    }
}

/// `ROLE.ENDPOINT`.
pub fn full_name(role: &str, endpoint: &str) -> String {
    format!("{role}.{endpoint}")
}

/// A worker role.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Role {
    /// Role name.
    pub name: String,
    /// Number of instances, at least 1.
    pub instances: u32,
    /// Resources of each instance's guest.
    pub size: VmSize,
    /// Program and arguments; the program is a path under `approot`.
    pub command: Vec<String>,
    /// Ready when the process runs; else when it says `READY=1`.
    pub ready_on_start: bool,
    /// Runs as root in the guest.
    pub elevated: bool,
    /// Input endpoints, in document order.
    pub endpoints: Vec<InputEndpoint>,
    /// Local storage, in document order.
    pub local_storage: Vec<LocalStorage>,
    /// Configuration settings with their values.
    pub settings: BTreeMap<String, String>,
    /// Runtime environment, in document order.
    pub environment: Vec<(String, Value)>,
    /// The role's files.
    pub payload: Payload,
}

/// Where a role's `approot` comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Payload {
    /// A directory on the host.
    Directory(PathBuf),
    /// Layout `Roles/<role>` of a package.
    Package {
        /// The `.cspkg`.
        file: PathBuf,
        /// Name of the role's layout.
        role: String,
    },
}

/// A size of the classic table (role model, section 2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmSize {
    /// Name as written in definitions.
    pub name: &'static str,
    /// Virtual processors, 1 to 8.
    pub vcpus: u8,
    /// Guest RAM in MiB.
    pub memory_mib: u32,
    /// Size of the resource disk in MiB.
    pub resource_mib: u64,
}

/// An `InputEndpoint` with protocol `tcp`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InputEndpoint {
    /// Endpoint name.
    pub name: String,
    /// Public port on the host.
    pub port: u16,
    /// Port on which the role listens in the guest.
    pub local_port: u16,
    /// Where the public port is written.
    pub place: Place,
}

/// A `LocalStorage` element.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalStorage {
    /// Name, which is also the directory's.
    pub name: String,
    /// Quota in MiB.
    pub size_mib: u64,
    /// Emptied at every recycle.
    pub clean_on_role_recycle: bool,
}

/// Value of an environment variable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// As written.
    Literal(String),
    /// One of the paths of `RoleInstanceValue` that differ per instance.
    Instance(InstanceValue),
}

/// What a `RoleInstanceValue@xpath` names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InstanceValue {
    /// `/RoleEnvironment/Deployment/@id`
    DeploymentId,
    /// `/RoleEnvironment/Deployment/@emulated`
    Emulated,
    /// `/RoleEnvironment/CurrentInstance/@id`
    InstanceId,
    /// `/RoleEnvironment/CurrentInstance/@roleName`
    RoleName,
    /// `/RoleEnvironment/CurrentInstance/@updateDomain`
    UpdateDomain,
    /// `/RoleEnvironment/CurrentInstance/@faultDomain`
    FaultDomain,
    /// `…/ConfigurationSetting[@name='X']/@value`
    Setting(String),
    /// `…/LocalResource[@name='X']/@path`
    LocalStoragePath(String),
    /// `…/LocalResource[@name='X']/@sizeInMB`
    LocalStorageSize(String),
    /// `…/Endpoint[@name='X']/@protocol`
    EndpointProtocol(String),
    /// `…/Endpoint[@name='X']/@address`
    EndpointAddress(String),
    /// `…/Endpoint[@name='X']/@port`
    EndpointPort(String),
}

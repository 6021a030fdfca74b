//! A service that passed every check: what the supervisor works from.

use std::borrow::Cow;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use vmbus::role::{Endpoint, RoleDefinition};

use super::error::SourceLocation;
use super::package::Package;

/// A definition and a configuration that agree, with the payload of each role.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceModel {
    /// `ServiceDefinition@name`.
    pub name: String,
    /// Name of the guest image, by `ServiceConfiguration@osFamily` and the rules of the host.
    pub image: String,
    /// Where it is named, or should be.
    pub image_place: SourceLocation,
    /// Roles, in document order.
    pub roles: Vec<Role>,
}

impl ServiceModel {
    /// Every endpoint with its role and its public port.
    pub fn endpoints(&self) -> impl Iterator<Item = (&Role, &Endpoint, &PublicPort)> {
        self.roles.iter().flat_map(|role| {
            role.endpoints()
                .map(move |(endpoint, public)| (role, endpoint, public))
        })
    }

    /// The shortest name that tells `endpoint` of `role` from all others:
    /// names are unique only within a role.
    pub fn endpoint_name(&self, role: &Role, endpoint: &Endpoint) -> String {
        let namesakes = self
            .endpoints()
            .filter(|(_, other, _)| other.name == endpoint.name);
        if namesakes.count() == 1 {
            return endpoint.name.clone();
        }
        full_name(&role.definition.name, &endpoint.name)
    }
}

/// `ROLE.ENDPOINT`.
pub fn full_name(role: &str, endpoint: &str) -> String {
    format!("{role}.{endpoint}")
}

/// A worker role: what the guest is given, and what only the host needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Role {
    /// What each instance's guest is given.
    pub definition: RoleDefinition,
    /// Number of instances, at least 1.
    pub instances: u32,
    /// Resources of each instance's guest.
    pub size: VmSize,
    /// Public port of each endpoint of the definition, in its order.
    pub public_ports: Vec<PublicPort>,
    /// The role's files.
    pub payload: Payload,
}

impl Role {
    /// Each endpoint with its public port.
    pub fn endpoints(&self) -> impl Iterator<Item = (&Endpoint, &PublicPort)> {
        self.definition.endpoints.iter().zip(&self.public_ports)
    }
}

/// Public port of an input endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicPort {
    /// Port on the host.
    pub port: u16,
    /// Where it is written.
    pub place: SourceLocation,
}

/// Where a role's `approot` comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Payload {
    /// A directory on the host.
    Directory(PathBuf),
    /// Layout `Roles/<role>` of a package.
    Package {
        /// The `.cspkg`.
        package: VerifiedPackage,
        /// Name of the role's layout.
        role: String,
    },
}

/// A package whose contents were checked, with its open file: its name may be given to
/// another file before a role's application disk is built.
#[derive(Clone)]
pub struct VerifiedPackage(pub(super) Arc<Package>);

impl fmt::Debug for VerifiedPackage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("VerifiedPackage")
            .field(&self.0.path())
            .finish()
    }
}

impl PartialEq for VerifiedPackage {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for VerifiedPackage {}

/// A virtual machine size: of the classic table (role model, section 2), or of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmSize {
    /// Name as written in definitions.
    pub name: Cow<'static, str>,
    /// Virtual processors, 1 to 8.
    pub vcpus: u8,
    /// Guest RAM in MiB.
    pub memory_mib: u32,
    /// Size of the resource disk in MiB.
    pub resource_mib: u64,
}

//! The definition of one instance, which can be stored and sent.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};
use vmbus::message::Goal;

use crate::digest::Digest;
use crate::service::model::VmSize;

/// Everything that a host needs to run an instance, except the content that it names by
/// digest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceSpec {
    /// Name of the service.
    pub service: String,
    /// The guest image.
    pub image: ImageRef,
    /// Application disk (squashfs) in the content store.
    pub application: Digest,
    /// Resources of the guest.
    pub size: GuestSize,
    /// Public endpoints of the role, which all its instances share.
    pub endpoints: Vec<PublicEndpoint>,
    /// Goal state of the guest: deployment, names, domains, incarnation and role.
    pub goal: Goal,
}

impl InstanceSpec {
    /// `<Role>_IN_<n>`.
    pub fn name(&self) -> &str {
        &self.goal.instance
    }

    /// Name of its role.
    pub fn role(&self) -> &str {
        &self.goal.role.name
    }

    /// The deployment's id: 32 hexadecimal digits.
    pub fn deployment(&self) -> &str {
        &self.goal.deployment_id
    }
}

/// A guest image by its name and its content.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ImageRef {
    /// Name below the data directory's `images`.
    pub name: String,
    /// SHA-256 of its `manifest.json`, which has the SHA-256 of each file.
    pub manifest: Digest,
}

/// Resources of a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestSize {
    /// Name as written in the definition.
    pub name: String,
    /// Virtual processors, 1 to 8.
    pub vcpus: u8,
    /// Guest RAM in MiB.
    pub memory_mib: u32,
    /// Size of the resource disk in MiB.
    pub resource_mib: u64,
}

impl From<&VmSize> for GuestSize {
    fn from(size: &VmSize) -> Self {
        Self {
            name: size.name.to_string(),
            vcpus: size.vcpus,
            memory_mib: size.memory_mib,
            resource_mib: size.resource_mib,
        }
    }
}

/// A TCP port on the host that leads to a port of the role.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublicEndpoint {
    /// Endpoint name, unique within the role.
    pub name: String,
    /// The shortest name that is unique within the service, for output.
    pub label: String,
    /// Address on the host.
    pub address: SocketAddr,
    /// Port on which the role listens in the guest.
    pub local_port: u16,
}

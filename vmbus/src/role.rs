//! The definition of a role: one type from the service definition to the guest.
//!
//! The host's parser fills it, a goal carries it whole, and the guest reads it. A new
//! element of service definitions is a field here, its parser and its one consumer.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::frame::{self, FrameError, MAX_BODY};

/// The longest JSON encoding of a [`RoleDefinition`], in bytes. The rest of a frame is
/// for what a goal adds to the definition: names, disks, limits.
pub const MAX_ENCODED: usize = MAX_BODY - 64 * 1024;

/// A worker role as defined, with the values of its configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoleDefinition {
    /// Role name.
    pub name: String,
    /// What runs in the role.
    pub entry_point: EntryPoint,
    /// `executionContext="elevated"`: runs as root in the guest.
    pub elevated: bool,
    /// Configuration settings by name.
    pub settings: BTreeMap<String, String>,
    /// Runtime environment variables, in document order.
    pub environment: Vec<(String, VariableValue)>,
    /// Local storage, in document order.
    pub local_storage: Vec<LocalStorage>,
    /// Endpoints, in document order. The guest serves a tunnel for each.
    pub endpoints: Vec<Endpoint>,
}

impl RoleDefinition {
    /// Length of the JSON encoding in bytes; fails if a goal with this definition may not
    /// fit into a frame.
    pub fn check_length(&self) -> Result<usize, FrameError> {
        let length = frame::encoded_length(self)?;
        if length > MAX_ENCODED {
            return Err(FrameError::TooLong {
                length,
                limit: MAX_ENCODED,
            });
        }
        Ok(length)
    }

    /// The local storage called `name`.
    pub fn storage(&self, name: &str) -> Option<&LocalStorage> {
        self.local_storage.iter().find(|it| it.name == name)
    }

    /// The endpoint called `name`.
    pub fn endpoint(&self, name: &str) -> Option<&Endpoint> {
        self.endpoints.iter().find(|it| it.name == name)
    }
}

/// What the bootstrapper starts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EntryPoint {
    /// `ProgramEntryPoint`.
    Program {
        /// Program and arguments, already split; the program is a path under
        /// the role's `approot`, with `/` between its parts.
        command: Vec<String>,
        /// Ready as soon as the process runs; else on `READY=1` by `sd_notify`.
        ready_on_start: bool,
    },
}

/// Value of an environment variable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VariableValue {
    /// As written.
    Literal(String),
    /// `RoleInstanceValue`: the guest looks it up when it starts the role.
    Instance(InstanceValue),
}

/// What a `RoleInstanceValue@xpath` names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
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

/// A `LocalStorage` element.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalStorage {
    /// Name, which is also the directory's.
    pub name: String,
    /// Quota in MiB.
    pub size_mib: u64,
    /// Emptied at every recycle of the role.
    pub clean_on_role_recycle: bool,
}

/// An endpoint of the role.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Endpoint name.
    pub name: String,
    /// `tcp`.
    pub protocol: String,
    /// TCP port on which the role listens in the guest.
    pub local_port: u16,
}

//! The configuration of a host: files, environment and defaults, and where each value comes
//! from.

mod file;
mod value;

use std::collections::BTreeMap;
use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::{Uid, User};
use serde::{Deserialize, Serialize};
use tracing_subscriber::filter::Targets;

use crate::service::model::VmSize;
use crate::service::size::Sizes;
use crate::service::{DEFAULT_IMAGE, ServiceError, ServiceRules};
use crate::store::paths;
use crate::supervisor::admission::{AdmissionLimits, OVERCOMMIT};
use crate::supervisor::liveness::heartbeat::HeartbeatRule;
use file::Layer;
pub use value::{Entry, Origin, Setting};

/// Variable with the path of a file that replaces values of the other files.
pub const FILE_VARIABLE: &str = "HOST_AGENT_CONFIG";

/// Variable with what is logged.
pub const LOG_VARIABLE: &str = "HOST_AGENT_LOG";

/// Variable with the format of the log of `serve`.
const LOG_FORMAT_VARIABLE: &str = "HOST_AGENT_LOG_FORMAT";

/// The file of the machine.
const SYSTEM_FILE: &str = "/etc/host-agent/config.toml";

/// Path of the user's file below that of the user's configuration.
const USER_FILE: &str = "host-agent/config.toml";

/// How `serve` logs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    /// Lines of text.
    #[default]
    Human,
    /// One JSON document for each line.
    Json,
}

/// A group of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiGroup {
    /// Its name.
    pub name: String,
    /// Its id.
    pub id: u32,
}

/// Every value that is in effect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Images, deployments and state.
    pub data_dir: Setting<PathBuf>,
    /// Sockets.
    pub runtime_dir: Setting<PathBuf>,
    /// Image of a configuration without `osFamily`.
    pub default_image: Setting<String>,
    /// Image by `osFamily`.
    pub images: BTreeMap<String, Setting<String>>,
    /// Sizes of guests, by name.
    pub sizes: BTreeMap<String, Setting<VmSize>>,
    /// Virtual processors for each processor of the host.
    pub overcommit: Setting<u32>,
    /// Port on the host by public port of a definition.
    pub ports: BTreeMap<u16, Setting<u16>>,
    /// Most services.
    pub max_services: Setting<Option<u32>>,
    /// Most instances of all services.
    pub max_instances: Setting<Option<u32>>,
    /// Most memory of all instances, in MiB.
    pub max_memory_mib: Setting<Option<u64>>,
    /// A guest that is silent this long is restarted.
    pub heartbeat_limit: Setting<Duration>,
    /// Group whose members may use the socket.
    pub api_group: Setting<Option<ApiGroup>>,
    /// How `serve` logs.
    pub log_format: Setting<LogFormat>,
    /// What `serve` logs: a filter of `tracing`.
    pub log_level: Setting<String>,
}

/// Where values are looked for.
#[derive(Debug, Clone, Default)]
struct Places {
    /// Files that may be absent, the least important first.
    usual: Vec<PathBuf>,
    /// A file that must exist.
    named: Option<PathBuf>,
    /// `HOST_AGENT_DATA_DIR`.
    data_dir: Option<PathBuf>,
    /// `HOST_AGENT_LOG`.
    log: Option<OsString>,
    /// `HOST_AGENT_LOG_FORMAT`.
    log_format: Option<OsString>,
}

impl Config {
    /// Reads the files and the environment. `named` is a file that must exist, in place of
    /// that of [`FILE_VARIABLE`]. Blocking.
    ///
    /// # Errors
    /// A file cannot be read, or has an unknown key or a value that cannot be.
    pub fn load(named: Option<&Path>) -> Result<Self, ServiceError> {
        Self::of(&Places::of_environment(named, |name| env::var_os(name)))
    }

    fn of(places: &Places) -> Result<Self, ServiceError> {
        let mut config = Self::default();
        for path in &places.usual {
            if let Some(layer) = Layer::read(path)? {
                layer.apply(&mut config)?;
            }
        }
        if let Some(path) = &places.named {
            let layer = Layer::read(path)?;
            let missing = || {
                let source = std::io::Error::from(std::io::ErrorKind::NotFound);
                ServiceError::io(path, "cannot read the configuration", source)
            };
            layer.ok_or_else(missing)?.apply(&mut config)?;
        }
        if let Some(path) = &places.data_dir {
            let path = std::path::absolute(path).unwrap_or_else(|_| path.clone());
            config.data_dir = Setting::new(path, Origin::Variable(paths::DATA_VARIABLE));
        }
        // The log of the command warns of a filter that is none.
        let log = places.log.as_ref().and_then(|log| log.to_str());
        if let Some(log) = log.filter(|log| log.parse::<Targets>().is_ok()) {
            config.log_level = Setting::new(log.to_owned(), Origin::Variable(LOG_VARIABLE));
        }
        if let Some(format) = &places.log_format {
            let format = match format.to_str() {
                Some("human") => LogFormat::Human,
                Some("json") => LogFormat::Json,
                _ => {
                    let what = "is not a valid value: write human or json";
                    return Err(ServiceError::new(Path::new(LOG_FORMAT_VARIABLE), what));
                }
            };
            config.log_format = Setting::new(format, Origin::Variable(LOG_FORMAT_VARIABLE));
        }
        Ok(config)
    }

    /// What an operator decides about services.
    pub fn rules(&self) -> ServiceRules {
        let mut sizes = Sizes::default();
        for size in self.sizes.values() {
            sizes.set(size.value.clone());
        }
        let images = self.images.iter();
        let ports = self.ports.iter();
        ServiceRules {
            sizes,
            default_image: self.default_image.value.clone(),
            images: images
                .map(|(family, image)| (family.clone(), image.value.clone()))
                .collect(),
            ports: ports.map(|(from, to)| (*from, to.value)).collect(),
        }
    }

    /// What all instances of the host together may take.
    pub fn admission(&self) -> AdmissionLimits {
        AdmissionLimits {
            overcommit: self.overcommit.value,
            instances: self.max_instances.value,
            memory_mib: self.max_memory_mib.value,
        }
    }
}

impl Default for Config {
    /// Of a host without files and without our variables.
    fn default() -> Self {
        let sizes = Sizes::default();
        let sizes = sizes.iter().map(|size| {
            let name = size.name.to_string();
            (name, Setting::default_value(size.clone()))
        });
        Self {
            data_dir: Setting::default_value(paths::default_data_dir()),
            runtime_dir: Setting::default_value(paths::default_runtime_dir()),
            default_image: Setting::default_value(DEFAULT_IMAGE.to_owned()),
            images: BTreeMap::new(),
            sizes: sizes.collect(),
            overcommit: Setting::default_value(OVERCOMMIT),
            ports: BTreeMap::new(),
            max_services: Setting::default_value(None),
            max_instances: Setting::default_value(None),
            max_memory_mib: Setting::default_value(None),
            heartbeat_limit: Setting::default_value(HeartbeatRule::DEFAULT.limit()),
            api_group: Setting::default_value(None),
            log_format: Setting::default_value(LogFormat::Human),
            log_level: Setting::default_value("warn".to_owned()),
        }
    }
}

impl Places {
    fn of_environment(named: Option<&Path>, variable: impl Fn(&str) -> Option<OsString>) -> Self {
        let set = |name: &str| {
            let value = variable(name).filter(|value| !value.is_empty());
            value.map(PathBuf::from)
        };
        let home = || set("HOME").or_else(|| Some(User::from_uid(Uid::effective()).ok()??.dir));
        let user = set("XDG_CONFIG_HOME").filter(|path| path.is_absolute());
        let user = user.or_else(|| Some(home()?.join(".config")));
        let mut usual = vec![PathBuf::from(SYSTEM_FILE)];
        usual.extend(user.map(|directory| directory.join(USER_FILE)));
        Self {
            usual,
            named: named.map(Path::to_owned).or_else(|| set(FILE_VARIABLE)),
            data_dir: set(paths::DATA_VARIABLE),
            log: variable(LOG_VARIABLE).filter(|value| !value.is_empty()),
            log_format: variable(LOG_FORMAT_VARIABLE).filter(|value| !value.is_empty()),
        }
    }
}

#[cfg(test)]
mod tests;

//! A value and where it comes from.

use std::fmt;
use std::path::PathBuf;

use serde_json::{Value, json};

use super::Config;

/// Where a value comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Of the program.
    Default,
    /// A line of a file.
    File {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
    },
    /// An environment variable.
    Variable(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File { path, line } => write!(f, "{}:{line}", path.display()),
            Self::Variable(name) => f.write_str(name),
        }
    }
}

/// A value in effect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting<T> {
    /// The value.
    pub value: T,
    /// Where it comes from.
    pub origin: Origin,
}

impl<T> Setting<T> {
    pub(super) const fn new(value: T, origin: Origin) -> Self {
        Self { value, origin }
    }

    pub(super) const fn default_value(value: T) -> Self {
        Self::new(value, Origin::Default)
    }

    fn entry(&self, key: impl Into<String>, value: Value) -> Entry {
        Entry {
            key: key.into(),
            value,
            origin: self.origin.clone(),
        }
    }
}

/// A value in effect, for output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its key in a file.
    pub key: String,
    /// `null` is no limit.
    pub value: Value,
    /// Where it comes from.
    pub origin: Origin,
}

impl Config {
    /// Every value, in the order of the manual.
    pub fn entries(&self) -> Vec<Entry> {
        let mut entries = vec![
            self.data_dir
                .entry("directories.data", json!(self.data_dir.value)),
            self.runtime_dir
                .entry("directories.runtime", json!(self.runtime_dir.value)),
            self.default_image
                .entry("images.default", json!(self.default_image.value)),
        ];
        for (family, image) in &self.images {
            entries.push(image.entry(key("images.families", family), json!(image.value)));
        }
        let mut sizes: Vec<_> = self.sizes.iter().collect();
        sizes.sort_by_key(|(_, size)| size.value.memory_mib);
        for (name, size) in sizes {
            let value = json!({
                "vcpus": size.value.vcpus,
                "memory_mib": size.value.memory_mib,
                "resource_mib": size.value.resource_mib,
            });
            entries.push(size.entry(key("sizes", name), value));
        }
        entries.push(
            self.overcommit
                .entry("admission.overcommit", json!(self.overcommit.value)),
        );
        for (from, to) in &self.ports {
            entries.push(to.entry(format!("ports.{from}"), json!(to.value)));
        }
        entries.extend([
            self.max_services
                .entry("quotas.services", json!(self.max_services.value)),
            self.max_instances
                .entry("quotas.instances", json!(self.max_instances.value)),
            self.max_memory_mib
                .entry("quotas.memory_mib", json!(self.max_memory_mib.value)),
            self.heartbeat_limit.entry(
                "guests.heartbeat_limit",
                json!(format!("{}s", self.heartbeat_limit.value.as_secs_f64())),
            ),
            self.api_group.entry(
                "api.group",
                json!(self.api_group.value.as_ref().map(|group| &group.name)),
            ),
            self.log_format
                .entry("log.format", json!(self.log_format.value)),
            self.log_level
                .entry("log.level", json!(self.log_level.value)),
        ]);
        entries
    }
}

/// The key `name` of `table`, quoted where TOML needs it.
fn key(table: &str, name: &str) -> String {
    let bare = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
    if name.bytes().all(bare) {
        format!("{table}.{name}")
    } else {
        format!("{table}.{}", json!(name))
    }
}

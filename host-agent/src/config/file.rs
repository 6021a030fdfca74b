//! A configuration file: TOML whose keys are all known, read into checked values.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::Group;
use serde::Deserialize;
use toml::Spanned;
use tracing_subscriber::filter::Targets;

use super::{ApiGroup, Config, LogFormat, Origin, Setting};
use crate::duration::parse_duration;
use crate::service::model::VmSize;
use crate::service::{ServiceError, is_image_name, nearest};
use crate::supervisor::liveness::heartbeat::HeartbeatRule;

/// Longest file: the largest sensible one, with every size and port, has some kilobytes.
const MAX_BYTES: u64 = 1 << 20;

/// Most virtual processors of a guest: what the VMM can make.
const MAX_VCPUS: u8 = 8;

/// Least RAM of a guest in MiB: kernel and agents take some 100 MiB.
const MIN_MEMORY_MIB: u32 = 256;

/// Most RAM of a guest in MiB: 1 TiB. A larger number is a mistake.
const MAX_MEMORY_MIB: u32 = 1 << 20;

/// Most MiB of a resource disk: 16 TiB, the largest file of ext4.
const MAX_RESOURCE_MIB: u64 = 16 << 20;

/// Most virtual processors for each processor: beyond it guests miss their heartbeats.
const MAX_OVERCOMMIT: u32 = 1024;

/// A file as it was written.
pub(super) struct Layer {
    path: PathBuf,
    text: String,
    written: Written,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Written {
    directories: Directories,
    images: Images,
    sizes: BTreeMap<Spanned<String>, Spanned<Size>>,
    admission: Admission,
    ports: BTreeMap<Spanned<String>, Spanned<u16>>,
    quotas: Quotas,
    guests: Guests,
    api: Api,
    log: Log,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Directories {
    data: Option<Spanned<PathBuf>>,
    runtime: Option<Spanned<PathBuf>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Images {
    default: Option<Spanned<String>>,
    families: BTreeMap<Spanned<String>, Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Size {
    vcpus: Spanned<u8>,
    memory_mib: Spanned<u32>,
    resource_mib: Spanned<u64>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Admission {
    overcommit: Option<Spanned<u32>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Quotas {
    services: Option<Spanned<u32>>,
    instances: Option<Spanned<u32>>,
    memory_mib: Option<Spanned<u64>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Guests {
    heartbeat_limit: Option<Spanned<String>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Api {
    group: Option<Spanned<String>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Log {
    format: Option<Spanned<LogFormat>>,
    level: Option<Spanned<String>>,
}

impl Layer {
    /// Reads `path`; `None` if there is no such file.
    pub(super) fn read(path: &Path) -> Result<Option<Self>, ServiceError> {
        let cannot = |source| ServiceError::io(path, "cannot read the configuration", source);
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) => {
                return match error.kind() {
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Ok(None),
                    _ => Err(cannot(error)),
                };
            }
        };
        let mut text = String::new();
        let length = file.take(MAX_BYTES + 1).read_to_string(&mut text);
        if length.map_err(cannot)? as u64 > MAX_BYTES {
            let what = format!("the configuration has over {MAX_BYTES} bytes");
            return Err(ServiceError::new(path, what));
        }
        let written = toml::from_str(&text).map_err(|error| refused(path, &text, &error))?;
        Ok(Some(Self {
            path: path.to_owned(),
            text,
            written,
        }))
    }

    /// Puts the values of the file into `config`.
    pub(super) fn apply(mut self, config: &mut Config) -> Result<(), ServiceError> {
        let written = std::mem::take(&mut self.written);
        let Written {
            directories,
            images,
            sizes,
            admission,
            ports,
            quotas,
            guests,
            api,
            log,
        } = written;
        self.set(directories.data, &mut config.data_dir, absolute)?;
        self.set(directories.runtime, &mut config.runtime_dir, absolute)?;
        self.set(images.default, &mut config.default_image, image)?;
        for (family, name) in images.families {
            self.check(&family, |family| image(family.clone()))?;
            let value = self.setting(name, image)?;
            config.images.insert(family.into_inner(), value);
        }
        for (name, size) in sizes {
            let value = self.size(&name, size)?;
            config.sizes.insert(name.into_inner(), value);
        }
        self.set(admission.overcommit, &mut config.overcommit, |factor| {
            within(factor, 1, MAX_OVERCOMMIT)
        })?;
        for (from, to) in ports {
            let port: Result<u16, _> = from.get_ref().parse();
            let Ok(port @ 1..) = port else {
                return Err(self.refuse(from.span(), "is no port: write 1 to 65535"));
            };
            let value = self.setting(to, |port| within(port, 1, u16::MAX))?;
            config.ports.insert(port, value);
        }
        self.set(quotas.services, &mut config.max_services, |most| {
            Ok(Some(most))
        })?;
        self.set(quotas.instances, &mut config.max_instances, |most| {
            Ok(Some(most))
        })?;
        self.set(quotas.memory_mib, &mut config.max_memory_mib, |most| {
            Ok(Some(most))
        })?;
        self.set(guests.heartbeat_limit, &mut config.heartbeat_limit, limit)?;
        self.set(api.group, &mut config.api_group, group)?;
        self.set(log.format, &mut config.log_format, Ok)?;
        self.set(log.level, &mut config.log_level, |level| {
            let parsed = level.parse::<Targets>();
            parsed.map_err(|why| format!("is no filter: {why}"))?;
            Ok(level)
        })
    }

    fn size(
        &self,
        name: &Spanned<String>,
        size: Spanned<Size>,
    ) -> Result<Setting<VmSize>, ServiceError> {
        self.check(name, |name| {
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
            let fits = (1..=64).contains(&name.len());
            if fits && name.bytes().all(plain) {
                return Ok(());
            }
            Err("is no name for a size: write 1 to 64 letters, digits, '-' or '_'".to_owned())
        })?;
        let line = self.line(&name.span());
        let Size {
            vcpus,
            memory_mib,
            resource_mib,
        } = size.into_inner();
        let resource = |mib| within(mib, 1, MAX_RESOURCE_MIB);
        let size = VmSize {
            name: Cow::Owned(name.get_ref().clone()),
            vcpus: self
                .setting(vcpus, |number| within(number, 1, MAX_VCPUS))?
                .value,
            memory_mib: self
                .setting(memory_mib, |mib| {
                    within(mib, MIN_MEMORY_MIB, MAX_MEMORY_MIB)
                })?
                .value,
            resource_mib: self.setting(resource_mib, resource)?.value,
        };
        Ok(Setting::new(size, self.origin(line)))
    }

    fn set<T, U>(
        &self,
        written: Option<Spanned<T>>,
        to: &mut Setting<U>,
        parse: impl FnOnce(T) -> Result<U, String>,
    ) -> Result<(), ServiceError> {
        if let Some(written) = written {
            *to = self.setting(written, parse)?;
        }
        Ok(())
    }

    fn setting<T, U>(
        &self,
        written: Spanned<T>,
        parse: impl FnOnce(T) -> Result<U, String>,
    ) -> Result<Setting<U>, ServiceError> {
        let span = written.span();
        let value = parse(written.into_inner());
        let value = value.map_err(|why| self.refuse(span.clone(), &why))?;
        Ok(Setting::new(value, self.origin(self.line(&span))))
    }

    fn check<T, U>(
        &self,
        written: &Spanned<T>,
        parse: impl FnOnce(&T) -> Result<U, String>,
    ) -> Result<(), ServiceError> {
        let parsed = parse(written.get_ref());
        parsed.map_err(|why| self.refuse(written.span(), &why))?;
        Ok(())
    }

    fn origin(&self, line: usize) -> Origin {
        let path = self.path.clone();
        Origin::File { path, line }
    }

    fn line(&self, span: &Range<usize>) -> usize {
        let before = self.text.get(..span.start).unwrap_or(&self.text);
        before.matches('\n').count() + 1
    }

    /// The text at `span` is refused; `why` continues it.
    fn refuse(&self, span: Range<usize>, why: &str) -> ServiceError {
        let written = self.text.get(span.clone()).unwrap_or_default();
        ServiceError::at(
            &self.path,
            &self.text,
            span.start,
            format!("{written} {why}"),
        )
    }
}

/// The error of the parser, whose message names an unknown key and the known ones.
fn refused(path: &Path, text: &str, error: &toml::de::Error) -> ServiceError {
    let message = error.message().trim().replace('\n', "; ");
    let offset = error.span().map_or(0, |span| span.start);
    let this = ServiceError::at(path, text, offset, message.clone());
    let Some(rest) = message.strip_prefix("unknown field ") else {
        return this;
    };
    // Names are in backquotes, the unknown one first.
    let mut names = rest.split('`').skip(1).step_by(2);
    let unknown = names.next().unwrap_or_default();
    match nearest(unknown, names) {
        Some(near) => this.with_hint(format!("did you mean \"{near}\"?")),
        None => this,
    }
}

fn absolute(path: PathBuf) -> Result<PathBuf, String> {
    if path.is_absolute() {
        return Ok(path);
    }
    Err("is not an absolute path".to_owned())
}

fn image(name: String) -> Result<String, String> {
    if is_image_name(&name) {
        return Ok(name);
    }
    let what = "is no name of an image: write 1 to 64 lower-case letters, digits, '_', '-', '.'";
    Err(what.to_owned())
}

fn within<T: PartialOrd + std::fmt::Display>(number: T, least: T, most: T) -> Result<T, String> {
    if number >= least && number <= most {
        return Ok(number);
    }
    Err(format!("is not from {least} to {most}"))
}

fn group(name: String) -> Result<Option<ApiGroup>, String> {
    match Group::from_name(&name) {
        Ok(Some(group)) => Ok(Some(ApiGroup {
            name,
            id: group.gid.as_raw(),
        })),
        Ok(None) => Err("is no group of this machine".to_owned()),
        Err(error) => Err(format!("cannot be looked up: {error}")),
    }
}

fn limit(text: String) -> Result<Duration, String> {
    let limit = parse_duration(&text).map_err(|why| format!("is no time: {why}"))?;
    // The limit of the first contact stays, because it depends on the boot.
    let boot_limit = HeartbeatRule::DEFAULT.limit();
    let rule = HeartbeatRule::with_limit(limit, boot_limit);
    rule.map_err(|why| format!("is refused: {why}"))?;
    Ok(limit)
}

//! What `run` and `test` share: the service, the host, the options, and the
//! errors of a deployment that cannot begin.

use std::env;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::args::ServiceArgs;
use super::error::{CliError, Code, sources};
use super::exit::Exit;
use super::meter::Meter;
use super::output::Output;
use crate::config::Config;
use crate::doctor::{self, HostReport, Scope};
use crate::endpoints::ListenError;
use crate::printable::printable;
use crate::service::model::ServiceModel;
use crate::service::{self, ServiceRules};
use crate::shell::quoted;
use crate::store::image::ImageError;
use crate::supervisor::event::TimelineEvent;
use crate::supervisor::host::{HostError, HostOptions};
use crate::supervisor::liveness::heartbeat::HeartbeatRule;

/// Longest manifest of an image that a hint is made of, in bytes.
const MAX_MANIFEST: u64 = 4 << 20;

/// Name under which `scripts/install` installs the script that builds images.
const INSTALLED_BUILDER: &str = "host-agent-image";

/// Hint for a full disk.
pub const MORE_SPACE: &str = "export HOST_AGENT_DATA_DIR=/directory/with/more/space";

/// Reads and checks the service.
pub fn load(
    args: &ServiceArgs,
    rules: &ServiceRules,
    output: &Output,
) -> Result<ServiceModel, CliError> {
    let meter = Meter::start(output);
    let config = args.config.as_deref();
    let mut model = rules.load(&args.service, config, meter.progress())?;
    service::publish(&mut model, &args.publish)
        .map_err(|error| CliError::chain(Code::Usage, &error).hint("-p PORT:ENDPOINT"))?;
    Ok(model)
}

/// Checks the host.
pub fn host(config: &Config, scope: Scope) -> Result<HostReport, CliError> {
    let report = doctor::check(&config.data_dir.value, scope);
    match &report.scale_refused {
        Some(why) => Err(CliError::new(Code::Usage, why).hint("unset HOST_AGENT_TIMEOUT_SCALE")),
        None => Ok(report),
    }
}

/// How instances are run on the machine that `host` describes.
pub fn options(
    host: &HostReport,
    config: &Config,
    heartbeat_limit: Option<Duration>,
) -> Result<HostOptions, CliError> {
    let limit = heartbeat_limit.unwrap_or(config.heartbeat_limit.value);
    // The limit of the first contact stays, because it depends on the boot.
    let boot_limit = HeartbeatRule::DEFAULT.limit();
    let rule = HeartbeatRule::with_limit(limit, boot_limit)
        .map_err(|error| CliError::chain(Code::Usage, &error))?;
    Ok(HostOptions {
        data_dir: config.data_dir.value.clone(),
        runtime_dir: config.runtime_dir.value.clone(),
        socket: None,
        rule,
        admission: config.admission(),
        timeout_scale: f64::from(host.timeout_scale()),
        require_sandbox: false,
    })
}

/// Why `model` could not be deployed, and what helps.
pub fn refused(error: &HostError, model: &ServiceModel) -> CliError {
    match error {
        HostError::NoRoom(_) => CliError::chain(Code::HostFull, error)
            .hint("configure fewer instances or smaller sizes, or stop other services"),
        HostError::Image(source) => image(source).at(&model.image_place),
        HostError::Listen { role, name, source } => {
            let found = model
                .endpoints()
                .find(|(of, endpoint, _)| of.definition.name == *role && endpoint.name == *name);
            match found {
                Some((_, _, public)) => listen(source).at(&public.place),
                None => listen(source),
            }
        }
        _ => {
            let this = CliError::chain(Code::Start, error);
            match system_error(error) {
                Some(io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => {
                    CliError::chain(Code::HostFull, error).hint(MORE_SPACE)
                }
                Some(io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem) => this
                    .exit_with(Exit::Permission)
                    .hint("export HOST_AGENT_DATA_DIR=/directory/you/can/write"),
                _ => this,
            }
        }
    }
}

pub(super) fn image(error: &ImageError) -> CliError {
    match error {
        ImageError::Missing { path, .. } => {
            CliError::chain(Code::ImageMissing, error).hint(build_hint(path))
        }
        ImageError::Read { path, source } => {
            let this = CliError::chain(Code::ImageDamaged, error);
            match source.kind() {
                io::ErrorKind::PermissionDenied => this.exit_with(Exit::Permission),
                _ => this.hint(build_hint(path)),
            }
        }
        ImageError::Manifest { path, .. }
        | ImageError::Incomplete { path, .. }
        | ImageError::Digest { path, .. } => {
            CliError::chain(Code::ImageDamaged, error).hint(build_hint(path))
        }
    }
}

/// How to build the image that has the file at `path`, where this command looks for it,
/// and with the packages that it had.
fn build_hint(path: &Path) -> String {
    let directory = path.parent().unwrap_or(path);
    let name = directory.file_name().unwrap_or_default();
    let options = built_with(&directory.join("manifest.json"));
    if let Some([.., imported, file]) = options.as_deref()
        && imported == "--imported"
    {
        return format!("host-agent image import {} {}", quoted(name), quoted(file));
    }
    let mut hint = format!("{} {}", builder(), quoted(name));
    for option in options.iter().flatten() {
        hint.push_str(&format!(" {}", quoted(option)));
    }
    if let Some(images) = directory.parent() {
        hint.push_str(&format!(" --out {}", quoted(images)));
    }
    if options.is_none() {
        hint.push_str("   (and --include PACKAGE for each Debian package that the role needs)");
    }
    hint
}

/// The options of the build that wrote `manifest`, if it can still be read.
fn built_with(manifest: &Path) -> Option<Vec<String>> {
    let mut text = String::new();
    let file = File::open(manifest).ok()?;
    file.take(MAX_MANIFEST).read_to_string(&mut text).ok()?;
    let manifest: serde_json::Value = serde_json::from_str(&text).ok()?;
    serde_json::from_value(manifest["options"].clone()).ok()
}

/// The program that builds images: `host-agent-image` where `scripts/install` has
/// installed it beside this program, else the script of the checkout that this program
/// was built in.
fn builder() -> String {
    let here = env::current_dir().unwrap_or_default();
    match builder_program() {
        None => "images/build".into(),
        Some(program) if program.ends_with(INSTALLED_BUILDER) => INSTALLED_BUILDER.into(),
        Some(script) => quoted(script.strip_prefix(&here).unwrap_or(&script)),
    }
}

/// The program of [`builder`], if there is one.
pub(super) fn builder_program() -> Option<PathBuf> {
    let program = env::current_exe().unwrap_or_default();
    let installed = program.with_file_name(INSTALLED_BUILDER);
    if installed.exists() {
        return Some(installed);
    }
    let mut scripts = program.ancestors().map(|dir| dir.join("images/build"));
    scripts.find(|script| script.exists())
}

fn listen(error: &ListenError) -> CliError {
    let ListenError {
        endpoint,
        address,
        source,
    } = error;
    let what = format!("endpoint {endpoint} cannot be published at {address}");
    let port = address.port();
    match source.kind() {
        io::ErrorKind::AddrInUse => CliError::new(Code::PortInUse, what)
            .cause(format!("port {port} is in use"))
            .hint(format!(
                "ss -ltnp 'sport = :{port}'   (shows who has it), or another port in the definition"
            )),
        io::ErrorKind::PermissionDenied => CliError::new(Code::Start, what)
            .cause(source.to_string())
            .exit_with(Exit::Permission)
            .hint("use a port from 1024 up in the definition, or give CAP_NET_BIND_SERVICE"),
        _ => CliError::new(Code::Start, what).cause(source.to_string()),
    }
}

/// The kind of the I/O error at the root of `error`.
fn system_error(error: &HostError) -> Option<io::ErrorKind> {
    let mut last: &dyn std::error::Error = error;
    let mut kind = None;
    while let Some(source) = last.source() {
        kind = source
            .downcast_ref::<io::Error>()
            .map(io::Error::kind)
            .or(kind);
        last = source;
    }
    kind
}

/// A line of the timeline.
pub fn timeline_line(event: &TimelineEvent, width: usize) -> String {
    let seconds = event.at.as_secs();
    let instance = event.instance.as_deref().unwrap_or("");
    // Text of a guest must not reach the terminal as control sequences.
    printable(&format!(
        "[{:02}:{:02}.{}] {instance:<width$} {}",
        seconds / 60,
        seconds % 60,
        event.at.subsec_millis() / 100,
        event.kind
    ))
}

/// A file could not be written.
pub fn cannot_write(path: &Path, error: &io::Error) -> CliError {
    let mut this = CliError::new(Code::Output, format!("cannot write {}", path.display()))
        .cause(error.to_string());
    for cause in sources(error) {
        this = this.cause(cause);
    }
    this
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Progress;
    use crate::supervisor::event::EventKind;

    fn model() -> ServiceModel {
        service::load(Path::new(service::SAMPLE), None, &Progress::default()).unwrap()
    }

    #[test]
    fn a_port_in_use_is_a_conflict_with_its_line() {
        let model = model();
        let role = &model.roles[0];
        let error = HostError::Listen {
            role: role.definition.name.clone(),
            name: role.definition.endpoints[0].name.clone(),
            source: ListenError {
                endpoint: "redis".into(),
                address: ([127, 0, 0, 1], 6379).into(),
                source: io::Error::from(io::ErrorKind::AddrInUse),
            },
        };
        let error = refused(&error, &model);
        assert_eq!(error.exit(), Exit::Conflict);
        let text = error.human(false);
        assert!(
            text.contains(".csdef:") && text.contains("endpoint redis"),
            "{text}"
        );
        assert!(text.contains("sport = :6379"));
    }

    #[test]
    fn a_full_disk_at_the_root_of_the_chain_is_found() {
        let error = HostError::Directory {
            what: "make a deployment in",
            path: "/data".into(),
            source: io::Error::from(io::ErrorKind::StorageFull),
        };
        let error = refused(&error, &model());
        assert_eq!(error.exit(), Exit::Host);
        assert!(error.hint_text().unwrap().contains("HOST_AGENT_DATA_DIR"));
    }

    #[test]
    fn the_hint_of_an_image_builds_the_same_one_in_its_place() {
        let data = tempfile::tempdir().unwrap();
        let images = data.path().join("images");
        let manifest = images.join("web/manifest.json");
        let hint = |error| {
            let error = refused(&HostError::Image(error), &model());
            assert!(error.json()["line"].as_u64().unwrap() > 0);
            (error.exit(), error.hint_text().unwrap().to_owned())
        };
        let (exit, missing) = hint(ImageError::Missing {
            name: "web".into(),
            path: manifest.clone(),
        });
        assert_eq!(exit, Exit::NotFound);
        // The tests run in a directory of the checkout.
        let checkout = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let build = checkout.join("images/build").display().to_string();
        let out = format!("--out {}", images.display());
        assert!(
            missing.starts_with(&format!("{build} web {out}   (and --include PACKAGE")),
            "{missing}"
        );
        std::fs::create_dir_all(images.join("web")).unwrap();
        let options = r#"{"options": ["--suite", "bookworm", "--include", "a b"]}"#;
        std::fs::write(&manifest, options).unwrap();
        let (_, damaged) = hint(ImageError::Digest {
            path: images.join("web/kernel"),
            actual: "1".into(),
            expected: "2".into(),
        });
        let wanted = format!("{build} web --suite bookworm --include 'a b' {out}");
        assert_eq!(damaged, wanted);
    }

    #[test]
    fn a_line_of_the_timeline_has_time_instance_and_change() {
        let event = TimelineEvent {
            at: Duration::from_millis(83_960),
            deployment: None,
            instance: Some("A_IN_0".into()),
            kind: EventKind::Warning {
                text: "odd \u{1b}[2J".into(),
            },
        };
        assert_eq!(
            timeline_line(&event, 8),
            "[01:23.9] A_IN_0   warning: odd \u{fffd}[2J"
        );
    }
}

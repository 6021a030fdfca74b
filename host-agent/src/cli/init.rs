//! `host-agent init`: a commented service that runs as it is.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use serde_json::json;

use super::error::{CliError, Code};
use super::exit::Exit;
use super::output::Output;
use crate::shell::quoted;

/// Stands for the name of the service in the files of a template.
const NAME: &str = "@NAME@";
/// Name of a service whose directory's name has no letter or digit.
const DEFAULT_NAME: &str = "Service";

/// `init`.
#[derive(Debug, Clone, Args)]
pub struct InitArgs {
    /// Directory to write to; its name becomes that of the service
    pub dir: PathBuf,
    /// What kind of service
    #[arg(long, default_value = "worker")]
    pub template: Template,
}

/// Services to begin with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Template {
    /// A role that works in the background, with a setting and local storage.
    Worker,
    /// A role that answers HTTP on a public endpoint.
    Web,
}

/// Path, permissions and content of a file.
type TemplateFile = (&'static str, u32, &'static str);

impl Template {
    const fn name(self) -> &'static str {
        match self {
            Self::Worker => "worker",
            Self::Web => "web",
        }
    }

    const fn files(self) -> [TemplateFile; 3] {
        match self {
            Self::Worker => [
                (
                    "ServiceDefinition.csdef",
                    0o666,
                    include_str!("init/worker/ServiceDefinition.csdef"),
                ),
                (
                    "ServiceConfiguration.cscfg",
                    0o666,
                    include_str!("init/worker/ServiceConfiguration.cscfg"),
                ),
                (
                    "Worker/start",
                    0o777,
                    include_str!("init/worker/Worker/start"),
                ),
            ],
            Self::Web => [
                (
                    "ServiceDefinition.csdef",
                    0o666,
                    include_str!("init/web/ServiceDefinition.csdef"),
                ),
                (
                    "ServiceConfiguration.cscfg",
                    0o666,
                    include_str!("init/web/ServiceConfiguration.cscfg"),
                ),
                ("Web/start", 0o777, include_str!("init/web/Web/start")),
            ],
        }
    }

    /// What to type next.
    fn next(self, dir: &Path) -> String {
        let dir = quoted(dir);
        match self {
            Self::Worker => format!("host-agent run {dir}"),
            Self::Web => format!("host-agent test {dir} --probe http://Http/health=200"),
        }
    }
}

/// Writes the files of the template.
pub fn run(args: &InitArgs, output: &Output) -> Result<Exit, CliError> {
    let name = service_name(&args.dir);
    let mut missing = Vec::new();
    for (path, mode, text) in args.template.files() {
        let (file, text) = (args.dir.join(path), text.replace(NAME, &name));
        match fs::read(&file) {
            Ok(found) if found == text.as_bytes() => {}
            Ok(_) => {
                let what = format!("{} exists with other content", file.display());
                return Err(CliError::new(Code::Conflict, what)
                    .cause("nothing was written")
                    .hint("name another directory"));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                missing.push((file, mode, text));
            }
            Err(error) => return Err(cannot_write(&file, &error)),
        }
    }
    for (file, mode, text) in &missing {
        write(file, *mode, text).map_err(|error| cannot_write(file, &error))?;
    }
    let shown = args.dir.display();
    let text = match missing.len() {
        0 => format!("{shown}: nothing to do"),
        _ => format!(
            "wrote service {name} to {shown}\nnext: {}",
            args.template.next(&args.dir)
        ),
    };
    output.answer(&text, || {
        let written: Vec<_> = missing
            .iter()
            .map(|(file, _, _)| file.display().to_string())
            .collect();
        json!({
            "schema": "host-agent.init/1",
            "service": name,
            "template": args.template.name(),
            "directory": shown.to_string(),
            "written": written,
        })
    })?;
    Ok(Exit::Success)
}

/// Writes a file that did not exist; its directories are created.
fn write(file: &Path, mode: u32, text: &str) -> io::Result<()> {
    if let Some(parent) = file.parent() {
        fs::create_dir_all(parent)?;
    }
    let mut new = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(file)?;
    new.write_all(text.as_bytes())
}

fn cannot_write(file: &Path, error: &io::Error) -> CliError {
    let exit = match error.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Exit::Permission,
        io::ErrorKind::NotADirectory | io::ErrorKind::IsADirectory => Exit::Conflict,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Exit::Host,
        _ => Exit::Unclassified,
    };
    CliError::new(Code::Output, format!("cannot write {}", file.display()))
        .cause(error.to_string())
        .exit_with(exit)
}

/// The last name of the directory, in the characters that a service may have.
fn service_name(dir: &Path) -> String {
    let absolute = std::path::absolute(dir).unwrap_or_else(|_| dir.to_owned());
    let last = absolute.file_name().unwrap_or_default().to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let name: String = last.chars().filter(|c| plain(*c)).collect();
    let name = name.trim_start_matches(|c: char| !c.is_ascii_alphabetic());
    match name {
        "" => DEFAULT_NAME.to_owned(),
        name => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Progress;
    use crate::service;

    fn init(dir: &Path, template: Template) -> Result<Exit, CliError> {
        let dir = dir.to_owned();
        run(&InitArgs { dir, template }, &Output::before_flags(false))
    }

    #[test]
    fn every_template_is_a_valid_service_and_a_package() {
        for template in [Template::Worker, Template::Web] {
            let dir = tempfile::tempdir().unwrap();
            let service = dir.path().join("my-shop.1");
            init(&service, template).unwrap();
            let progress = Progress::default();
            let model = service::load(&service, None, &progress).unwrap();
            assert_eq!(model.name, "myshop1");
            let package = dir.path().join("s.cspkg");
            assert_eq!(
                service::pack(&service, &package, &progress).unwrap().roles,
                1
            );
            // Again: nothing to do; what is missing is written again.
            init(&service, template).unwrap();
            fs::remove_file(service.join("ServiceConfiguration.cscfg")).unwrap();
            init(&service, template).unwrap();
            service::load(&service, None, &progress).unwrap();
        }
    }

    #[test]
    fn files_of_the_user_are_never_replaced() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("ServiceConfiguration.cscfg"), "mine").unwrap();
        let error = init(dir.path(), Template::Worker).unwrap_err();
        assert_eq!(error.exit(), Exit::Conflict);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_name_is_made_of_any_directory() {
        assert_eq!(service_name(Path::new("/a/shop")), "shop");
        assert_eq!(service_name(Path::new("/a/9-shop v2/")), "shopv2");
        assert_eq!(service_name(Path::new("/")), DEFAULT_NAME);
    }
}

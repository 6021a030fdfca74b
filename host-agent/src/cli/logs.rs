//! `host-agent logs`: from a running deployment, else from the files of one that
//! ended and was kept. A terminal gets printable characters only; a file or a pipe gets
//! the bytes of the log.

use std::io::{self, IsTerminal as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::args::{InstanceArg, LogsArgs};
use super::error::{CliError, Code};
use super::exit::Exit;
use super::instances;
use super::interrupt::Interrupts;
use super::lossless_output::LosslessOutput;
use super::{output, runtime};
use crate::api::client::{BodyBytes, Client, InstanceTarget};
use crate::api::types::{LogFile, LogQuery};
use crate::printable::PrintableStream;
use crate::queued_writer::previous;
use crate::store::paths;

/// Prints the log.
pub fn run(args: &LogsArgs) -> Result<Exit, CliError> {
    runtime()?.block_on(async {
        match instances::find(&args.instance).await {
            Ok(target) => stream(&target, args).await,
            Err(error) if error.code() == Code::NoInstance => kept(args).ok_or(error)?,
            Err(error) => Err(error),
        }
    })
}

/// Prints the serial console from its beginning, as the guest writes it.
pub fn console(args: &InstanceArg) -> Result<Exit, CliError> {
    run(&LogsArgs {
        instance: args.instance.clone(),
        follow: true,
        source: LogFile::Serial,
    })
}

async fn stream(target: &InstanceTarget, args: &LogsArgs) -> Result<Exit, CliError> {
    let mut interrupts = Interrupts::listen()?;
    let query = LogQuery {
        source: args.source,
        follow: args.follow,
    };
    let client = Client::connect(&target.socket).await?;
    let mut log = client.logs(target, query).await?;
    let stdout = LosslessOutput::to(io::stdout());
    let stdout = stdout.map_err(|error| CliError::chain(Code::Unclassified, &error))?;
    tokio::select! {
        copied = copy(&mut log, stdout, Filter::of_stdout()) => copied,
        // A signal is the normal end of `-f`.
        number = interrupts.next() => {
            Ok(if args.follow { Exit::Success } else { Exit::Signal(number) })
        }
    }
}

/// Copies the log to `stdout` until the log ends or the reader closes the pipe.
async fn copy(
    log: &mut BodyBytes,
    stdout: LosslessOutput,
    mut filter: Filter,
) -> Result<Exit, CliError> {
    let ended = loop {
        let bytes = tokio::select! {
            bytes = log.next() => bytes,
            // A log that gets no more lines would never show the broken pipe.
            () = stdout.reader_gone() => break Ok(Exit::Success),
        };
        match bytes {
            Ok(Some(bytes)) => {
                let Some(slot) = stdout.reserve().await else {
                    break Ok(Exit::Success);
                };
                slot.send(filter.next(bytes.into()));
            }
            Ok(None) => break Ok(Exit::Success),
            Err(error) => break Err(error.into()),
        }
    };
    if let Some(slot) = stdout.reserve().await {
        slot.send(filter.end());
    }
    stdout.finish().await?;
    ended
}

/// What standard output gets of a log.
enum Filter {
    /// A terminal.
    Printable(PrintableStream),
    /// Anything else.
    Bytes,
}

impl Filter {
    fn of_stdout() -> Self {
        if io::stdout().is_terminal() {
            Self::Printable(PrintableStream::default())
        } else {
            Self::Bytes
        }
    }

    fn next(&mut self, bytes: Vec<u8>) -> Vec<u8> {
        match self {
            Self::Printable(stream) => stream.next(&bytes).into_bytes(),
            Self::Bytes => bytes,
        }
    }

    fn end(self) -> Vec<u8> {
        match self {
            Self::Printable(stream) => stream.end().into_bytes(),
            Self::Bytes => Vec::new(),
        }
    }
}

/// Prints the log of the newest kept deployment that has it, if there is one.
fn kept(args: &LogsArgs) -> Option<Result<Exit, CliError>> {
    let deployments = paths::data_dir().join("deployments");
    let file = newest(&deployments, &args.instance, args.source.file_name())?;
    Some(print(&file))
}

fn newest(deployments: &Path, name: &str, log: &str) -> Option<PathBuf> {
    let (prefix, instance) = name.split_once('/').unwrap_or(("", name));
    // The name becomes part of a path: it must stay below the deployment.
    if instance.is_empty() || instance.contains('/') || instance.starts_with('.') {
        return None;
    }
    let candidates = std::fs::read_dir(deployments).ok()?.flatten();
    candidates
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .filter_map(|entry| {
            let file = entry.path().join(instance).join(log);
            let modified: SystemTime = file.metadata().ok()?.modified().ok()?;
            Some((modified, file))
        })
        .max()
        .map(|(_, file)| file)
}

/// Prints a log after its rotated part. The size of both is bounded.
fn print(log: &Path) -> Result<Exit, CliError> {
    let mut filter = Filter::of_stdout();
    for part in [previous(log).as_path(), log] {
        let failed = |error: io::Error| {
            let what = format!("cannot read {}", part.display());
            CliError::new(Code::Unclassified, what).cause(error.to_string())
        };
        match std::fs::read(part) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            read => output::write(&filter.next(read.map_err(failed)?))?,
        }
    }
    output::write(&filter.end())?;
    Ok(Exit::Success)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn a_kept_log_is_found_in_the_newest_deployment_only() {
        let data = tempfile::tempdir().unwrap();
        for id in ["aaaa", "bbbb"] {
            let instance = data.path().join(id).join("A_IN_0");
            std::fs::create_dir_all(&instance).unwrap();
            let file = File::create(instance.join("role.log")).unwrap();
            let age = if id == "aaaa" { 10 } else { 1000 };
            let time = SystemTime::now() - std::time::Duration::from_secs(age);
            file.set_modified(time).unwrap();
        }
        let found = |name| newest(data.path(), name, "role.log");
        let path = |id| Some(data.path().join(id).join("A_IN_0/role.log"));
        assert_eq!(found("A_IN_0"), path("aaaa"));
        assert_eq!(found("bb/A_IN_0"), path("bbbb"));
        assert_eq!(found("B_IN_0"), None);
        for name in ["../aaaa/A_IN_0", "..", "", "aaaa/", "a/../A_IN_0"] {
            assert_eq!(found(name), None, "{name}");
        }
    }
}

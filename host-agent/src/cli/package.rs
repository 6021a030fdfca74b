//! `host-agent pack` and `host-agent validate`.

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::Instant;

use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinError;

use super::args::{PackArgs, ValidateArgs};
use super::config;
use super::error::{CliError, Code};
use super::exit::Exit;
use super::interrupt::Interrupts;
use super::meter::Meter;
use super::output::Output;
use super::running::interrupted;
use super::runtime;
use crate::digest::Digest;
use crate::doctor::iec;
use crate::printable::printable;
use crate::progress::Progress;
use crate::service::Validated;

/// Packs a directory into a package file.
pub fn pack(args: &PackArgs, output: &Output) -> Result<Exit, CliError> {
    let started = Instant::now();
    let meter = Meter::start(output);
    let rules = config::load(None)?.rules();
    let PackArgs { dir, output: out } = args.clone();
    let (packed, digest) = interruptible(meter.progress(), move |progress| {
        let packed = rules.pack(&dir, &out, progress)?;
        let digest = digest_of(&out, progress).map_err(|error| {
            let what = format!("cannot read {} again", out.display());
            CliError::new(Code::Output, what).cause(error.to_string())
        })?;
        Ok((packed, digest))
    })?;
    drop(meter);
    let text = format!(
        "packed {}  {} role{}  {} file{}  {}  sha256:{digest}  in {:.1} s",
        args.output.display(),
        packed.roles,
        plural(packed.roles),
        packed.files,
        plural(packed.files),
        iec(packed.bytes),
        started.elapsed().as_secs_f64(),
    );
    output.answer(&text, || {
        json!({
            "schema": "host-agent.pack/1",
            "file": args.output.display().to_string(),
            "service": packed.service,
            "roles": packed.roles,
            "files": packed.files,
            "bytes": packed.bytes,
            "digest": format!("sha256:{digest}"),
        })
    })?;
    Ok(Exit::Success)
}

/// Runs `work` on another thread. The first signal cancels it and waits until it
/// has removed its files; the second one does not wait.
pub(super) fn interruptible<T: Send + 'static>(
    progress: &Progress,
    work: impl FnOnce(&Progress) -> Result<T, CliError> + Send + 'static,
) -> Result<T, CliError> {
    let runtime = runtime()?;
    let result = runtime.block_on(async {
        let mut interrupts = Interrupts::listen()?;
        // Its default action would end the process at `RLIMIT_FSIZE` with a temporary file
        // left and no message. With a handler write(2) fails with EFBIG.
        let _file_size = signal(SignalKind::from_raw(libc::SIGXFSZ))
            .map_err(|error| CliError::chain(Code::Unclassified, &error))?;
        let of_work = progress.clone();
        let mut working = tokio::task::spawn_blocking(move || work(&of_work));
        let number = tokio::select! {
            done = &mut working => return joined(done),
            number = interrupts.next() => number,
        };
        progress.cancel();
        tokio::select! {
            // It may have finished before the cancellation.
            done = working => joined(done).map_err(|_| interrupted(number)),
            number = interrupts.next() => Err(interrupted(number)),
        }
    });
    runtime.shutdown_background();
    result
}

fn joined<T>(done: Result<Result<T, CliError>, JoinError>) -> Result<T, CliError> {
    done.unwrap_or_else(|error| Err(CliError::chain(Code::Unclassified, &error)))
}

/// Checks each file: the result lists all, standard error has the errors, and the
/// exit code is that of the first error.
pub fn validate(args: &ValidateArgs, output: &Output) -> Result<Exit, CliError> {
    let mut lines = Vec::new();
    let mut results = Vec::new();
    let mut exit = Exit::Success;
    let rules = config::load(None)?.rules();
    let meter = Meter::start(output);
    for file in &args.files {
        // Names that are not UTF-8 are shown with replacement characters.
        let name = file.display().to_string();
        let shown = printable(&name);
        match rules.validate(file, args.config.as_deref(), meter.progress()) {
            Ok(found) => {
                lines.push(format!("ok    {shown}  {}", describe(found)));
                results.push(json!({"file": name, "valid": true, "what": describe(found)}));
            }
            Err(error) => {
                let error = CliError::from(error);
                output.error(&error);
                lines.push(format!("fail  {shown}  {}", error.code().name()));
                results.push(json!({"file": name, "valid": false, "error": error.json()}));
                if exit == Exit::Success {
                    exit = error.exit();
                }
            }
        }
    }
    drop(meter);
    output.answer(&lines.join("\n"), || {
        json!({
            "schema": "host-agent.validate/1",
            "valid": exit == Exit::Success,
            "files": results,
        })
    })?;
    Ok(exit)
}

fn describe(found: Validated) -> &'static str {
    match found {
        Validated::Service => "definition, configuration and files agree",
        Validated::Definition => "definition",
        Validated::Configuration => "configuration and definition agree",
        Validated::PackagedService => "package and configuration agree",
        Validated::Package => "package; no one configuration beside it (see --config)",
    }
}

fn plural(count: usize) -> &'static str {
    if count == 1 { "" } else { "s" }
}

fn digest_of(path: &Path, progress: &Progress) -> io::Result<String> {
    let file = File::open(path)?;
    let what = format!("hashing {}", path.display());
    let _step = progress.step(what, Some(file.metadata()?.len()));
    Ok(Digest::of(progress.watch(file))?.0.hex())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::args::CommandLine;
    use clap::Parser as _;
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    #[test]
    fn paths_that_are_not_utf8_work() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &[u8]| directory.path().join(OsStr::from_bytes(name));
        let line = ["host-agent", "version", "--json"];
        let output = Output::new(&CommandLine::try_parse_from(line).unwrap().global).unwrap();
        let file = path(b"\xff.csdef");
        let text = "<ServiceDefinition/>";
        std::fs::write(&file, text).unwrap();
        let args = ValidateArgs {
            files: vec![file, path(b"\xff.cspkg")],
            config: None,
        };
        assert_eq!(validate(&args, &output).unwrap(), Exit::Invalid);
        let args = PackArgs {
            dir: crate::service::SAMPLE.into(),
            output: path(b"\xff.cspkg"),
        };
        assert_eq!(pack(&args, &output).unwrap(), Exit::Success);
    }
}

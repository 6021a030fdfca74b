//! `host-agent cp`: files and directories into a guest and out of it, as a tar stream of the
//! guest's own `tar` over a connection of `exec`.

mod pack;
mod place;
mod session;
mod unpack;

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use serde_json::json;
use tokio::sync::mpsc;
use tokio::task::JoinError;
use vmbus::message::ExitCause;

use self::pack::Chunks;
use self::place::Place;
use self::session::{Ended, Outcome};
use self::unpack::{Received, Rename};
use super::error::{CliError, Code};
use super::exit::Exit;
use super::instances;
use super::interrupt::Interrupts;
use super::meter::Meter;
use super::output::Output;
use super::running::interrupted;
use super::runtime;
use crate::api::client::InstanceTarget;
use crate::doctor::iec;
use crate::progress::Progress;

/// Pieces of the stream that wait for the slower side.
const BACKLOG: usize = 16;

/// `cp`.
#[derive(Debug, Clone, Args)]
pub struct CpArgs {
    /// File or directory: a path here, or INSTANCE:PATH
    #[arg(value_name = "SRC")]
    pub source: Place,
    /// Where to: a path here, or INSTANCE:PATH; into it, if it is a directory
    #[arg(value_name = "DST")]
    pub target: Place,
}

/// What was copied.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Copied {
    /// Files, directories and links.
    entries: u64,
    /// Bytes of the files.
    bytes: u64,
    /// Devices, pipes and sockets, which are not copied.
    skipped: u64,
}

/// Copies.
pub fn run(args: &CpArgs, output: &Output) -> Result<Exit, CliError> {
    let started = Instant::now();
    let runtime = runtime()?;
    let meter = Meter::start(output);
    let copied = runtime.block_on(async {
        let mut interrupts = Interrupts::listen()?;
        tokio::select! {
            copied = copy(args, meter.progress(), output) => copied,
            number = interrupts.next() => Err(interrupted(number)),
        }
    });
    meter.progress().cancel();
    drop(meter);
    // A thread may still wait for a disk: it ends with the process.
    runtime.shutdown_background();
    let copied = copied?;
    if copied.skipped > 0 {
        output.warn(&format!(
            "{} not copied: only files, directories and links are",
            count(copied.skipped, "special file")
        ));
    }
    let text = format!(
        "copied {} -> {}  {}  {}  in {:.1} s",
        args.source,
        args.target,
        count(copied.entries, "file"),
        iec(copied.bytes),
        started.elapsed().as_secs_f64()
    );
    output.answer(&text, || {
        json!({
            "schema": "host-agent.cp/1",
            "from": args.source.to_string(),
            "to": args.target.to_string(),
            "files": copied.entries,
            "bytes": copied.bytes,
            "skipped": copied.skipped,
        })
    })?;
    Ok(Exit::Success)
}

fn count(number: u64, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

async fn copy(args: &CpArgs, progress: &Progress, output: &Output) -> Result<Copied, CliError> {
    match (&args.source, &args.target) {
        (Place::Here(from), Place::Guest { instance, path }) => {
            let target = instances::find(instance).await?;
            into_guest(from, &target, path, progress).await
        }
        (Place::Guest { instance, path }, Place::Here(to)) => {
            let target = instances::find(instance).await?;
            out_of_guest(&target, path, to, progress, output).await
        }
        _ => Err(CliError::new(
            Code::Usage,
            "one of SRC and DST is in a guest: INSTANCE:PATH",
        )
        .hint("host-agent cp Cache_IN_0:/etc/hostname .")),
    }
}

async fn into_guest(
    from: &Path,
    guest: &InstanceTarget,
    to: &str,
    progress: &Progress,
) -> Result<Copied, CliError> {
    let cannot = |error: &io::Error| here_failed("read", from, error);
    from.symlink_metadata().map_err(|error| cannot(&error))?;
    let test = session::run(guest, &["test", "-d", to], None, None).await?;
    let is_directory = test.outcome == Outcome::Exited(ExitCause::Code(0));
    let (parent, name) = if is_directory {
        let name = from.canonicalize().map_err(|error| cannot(&error))?;
        // Of a link its own name, of `.` the name of the directory.
        let name = from.file_name().or_else(|| name.file_name());
        (to.to_owned(), name.map(OsStr::to_owned))
    } else {
        let (parent, name) = place::split(to);
        if to.ends_with('/') || name.is_empty() || name == ".." {
            let what = format!("{to} in {} is not a directory", guest.instance);
            return Err(CliError::new(Code::Copy, what).exit_with(Exit::NotFound));
        }
        (parent.to_owned(), Some(name.into()))
    };
    let name = name.unwrap_or_else(|| ".".into());
    let (sender, pieces) = mpsc::channel(BACKLOG);
    let (source, counting) = (from.to_owned(), progress.clone());
    let packing = tokio::task::spawn_blocking(move || {
        let _step = counting.step(format!("copying {}", source.display()), None);
        pack::pack(&source, Path::new(&name), Chunks::to(sender), &counting)
    });
    // Without the owners of this machine; with its permissions.
    let tar = ["tar", "-C", &parent, "-xof", "-"];
    let ended = session::run(guest, &tar, Some(pieces), None).await?;
    match (joined(packing.await), ended.is_success()) {
        (Ok(copied), true) => Ok(copied),
        // The guest's tar ended first.
        (Err(error), false) if error.kind() == io::ErrorKind::BrokenPipe => {
            Err(guest_failed(guest, to, &ended))
        }
        (Ok(_), false) => Err(guest_failed(guest, to, &ended)),
        (Err(error), _) => Err(cannot(&error)),
    }
}

async fn out_of_guest(
    guest: &InstanceTarget,
    from: &str,
    to: &Path,
    progress: &Progress,
    output: &Output,
) -> Result<Copied, CliError> {
    let cannot = |error: &io::Error| here_failed("write", to, error);
    // Of a directory whose name says nothing, what is in it.
    let (parent, name) = place::split(from);
    let whole = matches!(name, "" | "." | "..");
    let (parent, name) = if whole { (from, ".") } else { (parent, name) };
    let (root, rename) = match to.metadata() {
        Ok(found) if found.is_dir() && whole => (to.to_owned(), Rename::Contents),
        Ok(found) if found.is_dir() => (to.to_owned(), Rename::as_is(name)),
        _ => {
            let (root, new) = new_name(to).map_err(|error| cannot(&error))?;
            let rename = if whole {
                Rename::ContentsInto(new)
            } else {
                Rename::To(name.into(), new)
            };
            (root, rename)
        }
    };
    let root = File::open(&root).map_err(|error| cannot(&error))?;
    let (sender, pieces) = mpsc::channel(BACKLOG);
    let (counting, what) = (progress.clone(), format!("copying {from}"));
    let unpacking = tokio::task::spawn_blocking(move || {
        let _step = counting.step(what, None);
        unpack::unpack(Received::from(pieces), &root, &rename, &counting)
    });
    let member = format!("./{name}");
    let tar = ["tar", "-C", parent, "-cf", "-", &member];
    let ended = session::run(guest, &tar, None, Some(sender)).await?;
    match (joined(unpacking.await), ended.is_success()) {
        (Ok(copied), true) => {
            for line in ended.stderr.lines() {
                output.warn(line);
            }
            Ok(copied)
        }
        // The stream of a tar that failed ends early.
        (Err(error), false) if error.kind() == io::ErrorKind::UnexpectedEof => {
            Err(guest_failed(guest, from, &ended))
        }
        (Ok(_), false) => Err(guest_failed(guest, from, &ended)),
        (Err(error), _) => Err(cannot(&error)),
    }
}

/// The directory of a new file, and its name.
fn new_name(to: &Path) -> io::Result<(PathBuf, OsString)> {
    let shown = to.to_string_lossy();
    let name = to.file_name().filter(|_| !shown.ends_with('/'));
    let Some(name) = name else {
        return Err(io::ErrorKind::NotADirectory.into());
    };
    let parent = to.parent().filter(|it| !it.as_os_str().is_empty());
    Ok((parent.unwrap_or(Path::new(".")).to_owned(), name.to_owned()))
}

fn joined<T>(done: Result<io::Result<T>, JoinError>) -> io::Result<T> {
    done.map_err(io::Error::other)?
}

/// A file of this machine could not be read or written.
fn here_failed(action: &str, path: &Path, error: &io::Error) -> CliError {
    let exit = match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Exit::NotFound,
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Exit::Permission,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Exit::Host,
        io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof => Exit::Invalid,
        _ => Exit::Unclassified,
    };
    CliError::new(Code::Copy, format!("cannot {action} {}", path.display()))
        .cause(error.to_string())
        .exit_with(exit)
}

/// The guest's `tar` failed: its messages are the cause.
fn guest_failed(guest: &InstanceTarget, path: &str, ended: &Ended) -> CliError {
    let what = format!("cannot copy {path} of {}", guest.instance);
    let text = ended.stderr.as_str();
    let has = |words: &[&str]| words.iter().any(|word| text.contains(word));
    let exit = if has(&["No such file", "Not a directory"]) {
        Exit::NotFound
    } else if has(&["No space left", "quota exceeded"]) {
        Exit::Host
    } else if has(&["Permission denied", "Read-only file system"]) {
        Exit::Permission
    } else {
        Exit::Unclassified
    };
    let mut error = CliError::new(Code::Copy, what).exit_with(exit);
    for line in text.lines() {
        error = error.cause(line);
    }
    match &ended.outcome {
        Outcome::NotStarted(reason) => error
            .cause(reason.clone())
            .hint("add tar to the image of the role"),
        Outcome::Exited(ExitCause::Signal(number)) => {
            error.cause(format!("tar in the guest ended by signal {number}"))
        }
        Outcome::Exited(ExitCause::Code(_)) | Outcome::Cut => error,
    }
}

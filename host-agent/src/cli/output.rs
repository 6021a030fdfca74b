//! Prints: the result of a command to standard output, everything else to standard
//! error. Whatever text a caller gives, only printable characters reach the streams.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, IsTerminal as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use serde_json::Value;

use super::args::{Color, ErrorFormat, Format, Global, Progress};
use super::environment;
use super::error::{CliError, Code};
use super::exit::Exit;
use super::terminal::window_size;
use crate::printable::{printable, printable_json, printable_lines};
use crate::queued_writer::QueuedWriter;

/// The signal of a program whose reader closed the pipe.
const SIGPIPE: u8 = 13;

/// The environment variable in place of `--format`.
pub const FORMAT: &str = "HOST_AGENT_FORMAT";

/// How long the end of a command waits for a slow reader.
const FLUSH_LIMIT: Duration = Duration::from_secs(2);

/// How this command prints.
#[derive(Debug, Clone)]
pub struct Output {
    format: Format,
    error_format: ErrorFormat,
    progress: ProgressStyle,
    warnings: bool,
    color: bool,
    screen: Arc<Screen>,
}

/// How progress is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProgressStyle {
    /// One line that changes.
    Live,
    /// A line now and then.
    Plain,
    /// No progress.
    None,
}

/// The state that all clones of an [`Output`] share.
#[derive(Debug, Default)]
struct Screen {
    /// Whether the last line on standard error is a changing one.
    live: Mutex<bool>,
    /// Standard output and error, each written by a thread.
    threads: OnceLock<(QueuedWriter, QueuedWriter)>,
}

impl Output {
    /// By the flags, the environment and the terminal.
    ///
    /// # Errors
    /// The value of an environment variable is not valid.
    pub fn new(global: &Global) -> Result<Self, CliError> {
        let format = match global.format {
            _ if global.json => Format::Json,
            Some(format) => format,
            None => environment::choice(FORMAT)?.unwrap_or(Format::Table),
        };
        let default_error_format = match format {
            Format::Table => ErrorFormat::Human,
            Format::Json | Format::Jsonl => ErrorFormat::Json,
        };
        Ok(Self {
            format,
            error_format: global.error_format.unwrap_or(default_error_format),
            progress: match global.progress {
                _ if global.quiet => ProgressStyle::None,
                Progress::None => ProgressStyle::None,
                Progress::Auto if is_screen() => ProgressStyle::Live,
                Progress::Auto | Progress::Plain => ProgressStyle::Plain,
            },
            warnings: !global.quiet,
            color: colored(global.color),
            screen: Arc::default(),
        })
    }

    /// For errors of a command line that does not parse.
    pub fn before_flags(json: bool) -> Self {
        Self {
            format: Format::Table,
            error_format: if json {
                ErrorFormat::Json
            } else {
                ErrorFormat::Human
            },
            progress: ProgressStyle::Plain,
            warnings: true,
            color: colored(Color::Auto),
            screen: Arc::default(),
        }
    }

    /// Prints the whole result: `text`, or `json` with `--format json`.
    pub fn answer(&self, text: &str, json: impl FnOnce() -> Value) -> Result<(), CliError> {
        match self.format {
            Format::Table => write(format!("{}\n", printable_lines(text)).as_bytes()),
            Format::Json => write(printable_json(&format!("{:#}\n", json())).as_bytes()),
            Format::Jsonl => write(json_line(&json()).as_bytes()),
        }
    }

    /// Prints one line of a result that grows: `text`, or `json` as one line.
    /// `missed` makes the JSON line for a number of dropped lines.
    pub fn line(
        &self,
        text: &str,
        json: impl FnOnce() -> Value,
        missed: impl FnOnce(u64) -> Value,
    ) -> Result<(), CliError> {
        let line = self.rendered(text, json);
        self.clear();
        let Some((stdout, _)) = self.screen.threads.get() else {
            return write(line.as_bytes());
        };
        let queued = stdout.push(line.as_bytes(), |count| match self.format {
            Format::Table => lines_dropped(count),
            Format::Json | Format::Jsonl => json_line(&missed(count)),
        });
        queued.map_err(|error| cannot_write(&error))
    }

    /// One line of a result that grows: `text`, or `json`.
    pub fn rendered(&self, text: &str, json: impl FnOnce() -> Value) -> String {
        match self.format {
            Format::Table => format!("{}\n", printable(text)),
            Format::Json | Format::Jsonl => json_line(&json()),
        }
    }

    /// From now on threads write the lines of [`Output::line`] and standard error,
    /// so that a reader that pauses does not block the command.
    ///
    /// # Errors
    /// `dup` or the start of a thread failed.
    pub fn never_block(&self) -> io::Result<()> {
        let start = |stream: BorrowedFd<'_>| {
            let file = File::from(stream.try_clone_to_owned()?);
            QueuedWriter::start("output", file)
        };
        let streams = (start(io::stdout().as_fd())?, start(io::stderr().as_fd())?);
        // Fails if it is already set.
        let _ = self.screen.threads.set(streams);
        Ok(())
    }

    /// Waits a moment for slow readers to take the queued lines.
    pub fn finish(&self) {
        let Some((stdout, stderr)) = self.screen.threads.get() else {
            return;
        };
        let left = stdout.finish(FLUSH_LIMIT);
        if left > 0 {
            self.warn(&format!(
                "{left} lines were not written: the reader of standard output is too slow"
            ));
        }
        stderr.finish(FLUSH_LIMIT);
    }

    /// Prints that a step is done.
    pub fn progress(&self, text: &str) {
        if self.progress != ProgressStyle::None {
            self.line_to_stderr(&printable(text));
        }
    }

    /// Whether the answer is for people.
    pub fn is_table(&self) -> bool {
        self.format == Format::Table
    }

    /// How to show a long step.
    pub const fn style(&self) -> ProgressStyle {
        self.progress
    }

    /// Shows `text` until the next line is printed.
    pub fn show_live(&self, text: &str) {
        // A carriage return cannot erase a line that wraps.
        let width = usize::from(window_size().1).saturating_sub(1);
        let text: String = printable(text).chars().take(width).collect();
        self.to_stderr(&format!("\r{text}\u{1b}[K"));
        *self.live_line() = true;
    }

    /// Erases the changing line, if there is one.
    pub fn clear(&self) {
        if std::mem::take(&mut *self.live_line()) {
            self.to_stderr("\r\u{1b}[K");
        }
    }

    fn live_line(&self) -> MutexGuard<'_, bool> {
        let live = self.screen.live.lock();
        live.unwrap_or_else(PoisonError::into_inner)
    }

    /// A line of text on standard error.
    fn line_to_stderr(&self, text: &str) {
        self.clear();
        self.to_stderr(&format!("{text}\n"));
    }

    /// An error is ignored: there is no stream left to report it on.
    fn to_stderr(&self, text: &str) {
        let _ = match self.screen.threads.get() {
            None => io::stderr().lock().write_all(text.as_bytes()),
            Some((_, stderr)) => stderr.push(text.as_bytes(), lines_dropped),
        };
    }

    /// Prints a warning.
    pub fn warn(&self, text: &str) {
        if self.warnings {
            let (on, off) = if self.color {
                ("\u{1b}[33m", "\u{1b}[0m")
            } else {
                ("", "")
            };
            self.line_to_stderr(&format!("{on}warning{off}: {}", printable(text)));
        }
    }

    /// Prints the error that ends the command.
    pub fn error(&self, error: &CliError) {
        match self.error_format {
            ErrorFormat::Human => self.line_to_stderr(&error.human(self.color)),
            ErrorFormat::Json => self.line_to_stderr(&printable_json(&error.json().to_string())),
        }
    }
}

fn lines_dropped(count: u64) -> String {
    format!("[{count} lines dropped: the reader is too slow]\n")
}

fn json_line(value: &Value) -> String {
    printable_json(&format!("{value}\n"))
}

/// Writes bytes of the result and flushes them.
pub fn write(bytes: &[u8]) -> Result<(), CliError> {
    let mut stdout = io::stdout().lock();
    let written = stdout.write_all(bytes).and_then(|()| stdout.flush());
    written.map_err(|error| cannot_write(&error))
}

/// The error of standard output. A closed pipe ends the command as `SIGPIPE` would.
pub fn cannot_write(error: &io::Error) -> CliError {
    let failure = CliError::new(Code::Output, "cannot write to standard output");
    let failure = failure.cause(error.to_string());
    if error.kind() == io::ErrorKind::BrokenPipe {
        failure.exit_with(Exit::Signal(SIGPIPE))
    } else {
        failure
    }
}

/// Whether standard error is a terminal where a line can change.
fn is_screen() -> bool {
    let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
    io::stderr().is_terminal() && !dumb && !set("NO_COLOR") && !set("CI")
}

fn colored(choice: Color) -> bool {
    match choice {
        Color::Always => true,
        Color::Never => false,
        Color::Auto => suits_color(|name| std::env::var_os(name), io::stderr().is_terminal()),
    }
}

fn suits_color(variable: impl Fn(&str) -> Option<OsString>, terminal: bool) -> bool {
    let value = |name| variable(name).filter(|value| !value.is_empty());
    if value("NO_COLOR").is_some() {
        return false;
    }
    let forced = value("CLICOLOR_FORCE").is_some_and(|value| value != "0");
    forced || (terminal && value("TERM").is_none_or(|term| term != "dumb"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_json_line_is_printable_and_keeps_its_text() {
        let value = Value::from("a\u{202e}b\u{2028}c\u{9b}d\n");
        let line = json_line(&value);
        assert!(
            line.trim_end().chars().all(|c| c.is_ascii_graphic()),
            "{line}"
        );
        assert_eq!(serde_json::from_str::<Value>(&line).unwrap(), value);
    }

    #[test]
    fn colors_follow_the_terminal_no_color_and_clicolor_force() {
        let suits = |terminal, set: &[(&str, &str)]| {
            let variable = |name: &str| {
                let found = set.iter().find(|(known, _)| *known == name);
                found.map(|(_, value)| OsString::from(value))
            };
            suits_color(variable, terminal)
        };
        assert!(suits(true, &[]) && suits(true, &[("TERM", "xterm"), ("NO_COLOR", "")]));
        assert!(!suits(false, &[]) && !suits(true, &[("TERM", "dumb")]));
        assert!(suits(false, &[("CLICOLOR_FORCE", "1"), ("TERM", "dumb")]));
        assert!(!suits(false, &[("CLICOLOR_FORCE", "0")]));
        assert!(!suits(true, &[("CLICOLOR_FORCE", "1"), ("NO_COLOR", "1")]));
    }
}

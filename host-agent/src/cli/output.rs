//! What is printed where: the answer to standard output, everything else to
//! standard error.

use std::ffi::OsString;
use std::io::{self, IsTerminal as _, Write as _};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use serde_json::Value;

use super::args::{Color, ErrorFormat, Format, Global, Progress};
use super::environment;
use super::error::{CliError, Code};
use super::exit::Exit;
use super::stream::Stream;
use super::terminal::window_size;

/// `SIGPIPE`: the end of a program whose reader went away.
const SIGPIPE: u8 = 13;

/// The variable that stands in for `--format`.
pub const FORMAT: &str = "HOST_AGENT_FORMAT";

/// Most time for a slow reader to take what is left when the command ends.
const FAREWELL: Duration = Duration::from_secs(2);

/// How this command prints.
#[derive(Debug, Clone)]
pub struct Output {
    format: Format,
    error_format: ErrorFormat,
    progress: Style,
    warnings: bool,
    color: bool,
    screen: Arc<Screen>,
}

/// How a long step is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// One line that changes.
    Live,
    /// A line now and then.
    Plain,
    /// Not at all.
    None,
}

/// What the parts of a command that print share.
#[derive(Debug, Default)]
struct Screen {
    /// Whether the last line on standard error is one that will change.
    live: Mutex<bool>,
    /// Standard output and error with threads of their own.
    behind: OnceLock<(Stream, Stream)>,
}

impl Output {
    /// From the flags, the environment and the terminal.
    ///
    /// # Errors
    /// A variable of the environment makes no sense.
    pub fn new(global: &Global) -> Result<Self, CliError> {
        let format = match global.format {
            _ if global.json => Format::Json,
            Some(format) => format,
            None => environment::choice(FORMAT)?.unwrap_or(Format::Table),
        };
        let derived = match format {
            Format::Table => ErrorFormat::Human,
            Format::Json | Format::Jsonl => ErrorFormat::Json,
        };
        Ok(Self {
            format,
            error_format: global.error_format.unwrap_or(derived),
            progress: match global.progress {
                _ if global.quiet => Style::None,
                Progress::None => Style::None,
                Progress::Auto if is_screen() => Style::Live,
                Progress::Auto | Progress::Plain => Style::Plain,
            },
            warnings: !global.quiet,
            color: colored(global.color),
            screen: Arc::default(),
        })
    }

    /// For errors before the flags are known.
    pub fn before_flags(json: bool) -> Self {
        Self {
            format: Format::Table,
            error_format: if json {
                ErrorFormat::Json
            } else {
                ErrorFormat::Human
            },
            progress: Style::Plain,
            warnings: true,
            color: colored(Color::Auto),
            screen: Arc::default(),
        }
    }

    /// The whole answer: `text` for people, `json` for machines.
    pub fn answer(&self, text: &str, json: impl FnOnce() -> Value) -> Result<(), CliError> {
        match self.format {
            Format::Table => write(format!("{text}\n").as_bytes()),
            Format::Json => write(format!("{:#}\n", json()).as_bytes()),
            Format::Jsonl => write(format!("{}\n", json()).as_bytes()),
        }
    }

    /// One piece of an answer that grows: a line for people, a JSON line for
    /// machines. `missed` makes the JSON line of lines that were dropped.
    pub fn line(
        &self,
        text: &str,
        json: impl FnOnce() -> Value,
        missed: impl FnOnce(u64) -> Value,
    ) -> Result<(), CliError> {
        let line = match self.format {
            Format::Table => format!("{text}\n"),
            Format::Json | Format::Jsonl => format!("{}\n", json()),
        };
        self.clear();
        let Some((stdout, _)) = self.screen.behind.get() else {
            return write(line.as_bytes());
        };
        let gap = |count| match self.format {
            Format::Table => format!("[{count} lines dropped: the reader is too slow]\n"),
            Format::Json | Format::Jsonl => format!("{}\n", missed(count)),
        };
        let queued = stdout.push(line.into_bytes(), |count| gap(count).into_bytes());
        queued.map_err(|error| cannot_write(&error))
    }

    /// From here on [`Output::line`] and everything on standard error is
    /// written by threads: a reader that pauses holds up nobody.
    ///
    /// # Errors
    /// No thread is to be had.
    pub fn never_block(&self) -> io::Result<()> {
        let streams = (Stream::to(io::stdout())?, Stream::to(io::stderr())?);
        // Once is enough.
        let _ = self.screen.behind.set(streams);
        Ok(())
    }

    /// Gives slow readers a moment to take what is left.
    pub fn finish(&self) {
        let Some((stdout, stderr)) = self.screen.behind.get() else {
            return;
        };
        let left = stdout.flush(FAREWELL);
        if left > 0 {
            self.warn(&format!(
                "{left} lines were not written: the reader of standard output is too slow"
            ));
        }
        stderr.flush(FAREWELL);
    }

    /// A step was taken.
    pub fn progress(&self, text: &str) {
        if self.progress != Style::None {
            self.say(text);
        }
    }

    /// How a long step is to be shown.
    pub const fn style(&self) -> Style {
        self.progress
    }

    /// Shows `text` until the next line of any kind.
    pub fn live(&self, text: &str) {
        // A line that wraps cannot be taken back.
        let width = usize::from(window_size().1).saturating_sub(1);
        let text: String = text.chars().take(width).collect();
        self.to_stderr(&format!("\r{text}\u{1b}[K"));
        *self.live_line() = true;
    }

    /// Takes the changing line away, if there is one.
    pub fn clear(&self) {
        if std::mem::take(&mut *self.live_line()) {
            self.to_stderr("\r\u{1b}[K");
        }
    }

    fn live_line(&self) -> MutexGuard<'_, bool> {
        let live = self.screen.live.lock();
        live.unwrap_or_else(PoisonError::into_inner)
    }

    /// A line for people on standard error.
    fn say(&self, text: &str) {
        self.clear();
        self.to_stderr(&format!("{text}\n"));
    }

    /// Nothing can be done if standard error is gone.
    fn to_stderr(&self, text: &str) {
        let _ = match self.screen.behind.get() {
            None => io::stderr().lock().write_all(text.as_bytes()),
            Some((_, stderr)) => stderr.push(text.into(), |count| {
                format!("[{count} lines dropped: the reader is too slow]\n").into_bytes()
            }),
        };
    }

    /// Something the user should know.
    pub fn warn(&self, text: &str) {
        if self.warnings {
            let (on, off) = if self.color {
                ("\u{1b}[33m", "\u{1b}[0m")
            } else {
                ("", "")
            };
            self.say(&format!("{on}warning{off}: {text}"));
        }
    }

    /// The error that ends the command.
    pub fn error(&self, error: &CliError) {
        match self.error_format {
            ErrorFormat::Human => self.say(&error.human(self.color)),
            ErrorFormat::Json => self.say(&error.json().to_string()),
        }
    }
}

/// Raw bytes of the answer, at once.
pub fn write(bytes: &[u8]) -> Result<(), CliError> {
    let mut stdout = io::stdout().lock();
    let written = stdout.write_all(bytes).and_then(|()| stdout.flush());
    written.map_err(|error| cannot_write(&error))
}

/// Standard output cannot be written; a reader that went away ends us silently.
pub fn cannot_write(error: &io::Error) -> CliError {
    let failure = CliError::new(Code::Output, "cannot write to standard output");
    let failure = failure.cause(error.to_string());
    if error.kind() == io::ErrorKind::BrokenPipe {
        failure.exit_with(Exit::Signal(SIGPIPE))
    } else {
        failure
    }
}

/// Whether standard error is a terminal that can change a line.
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
    fn colors_suit_a_terminal_that_has_them_and_whoever_insists() {
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

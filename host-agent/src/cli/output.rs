//! What is printed where: the answer to standard output, everything else to
//! standard error.

use std::io::{self, IsTerminal as _, Write as _};

use serde_json::Value;

use super::args::{Color, ErrorFormat, Format, Global, Progress};
use super::error::{CliError, Code};
use super::exit::Exit;

/// `SIGPIPE`: the end of a program whose reader went away.
const SIGPIPE: u8 = 13;

/// How this command prints.
#[derive(Debug, Clone)]
pub struct Output {
    format: Format,
    error_format: ErrorFormat,
    progress: bool,
    warnings: bool,
    color: bool,
}

impl Output {
    /// From the flags and the terminal.
    pub fn new(global: &Global) -> Self {
        let format = if global.json {
            Format::Json
        } else {
            global.format
        };
        let derived = match format {
            Format::Table => ErrorFormat::Human,
            Format::Json | Format::Jsonl => ErrorFormat::Json,
        };
        Self {
            format,
            error_format: global.error_format.unwrap_or(derived),
            progress: !global.quiet && global.progress != Progress::None,
            warnings: !global.quiet,
            color: colored(global.color),
        }
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
            progress: true,
            warnings: true,
            color: colored(Color::Auto),
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
    /// machines.
    pub fn line(&self, text: &str, json: impl FnOnce() -> Value) -> Result<(), CliError> {
        match self.format {
            Format::Table => write(format!("{text}\n").as_bytes()),
            Format::Json | Format::Jsonl => write(format!("{}\n", json()).as_bytes()),
        }
    }

    /// A step was taken.
    pub fn progress(&self, text: &str) {
        if self.progress {
            say(text);
        }
    }

    /// Something the user should know.
    pub fn warn(&self, text: &str) {
        if self.warnings {
            let (on, off) = if self.color {
                ("\u{1b}[33m", "\u{1b}[0m")
            } else {
                ("", "")
            };
            say(&format!("{on}warning{off}: {text}"));
        }
    }

    /// The error that ends the command.
    pub fn error(&self, error: &CliError) {
        match self.error_format {
            ErrorFormat::Human => say(&error.human(self.color)),
            ErrorFormat::Json => say(&error.json().to_string()),
        }
    }
}

/// Raw bytes of the answer, at once.
pub fn write(bytes: &[u8]) -> Result<(), CliError> {
    let mut stdout = io::stdout().lock();
    let written = stdout.write_all(bytes).and_then(|()| stdout.flush());
    written.map_err(|error| {
        let gone = error.kind() == io::ErrorKind::BrokenPipe;
        let failure = CliError::new(Code::Output, "cannot write to standard output");
        let failure = failure.cause(error.to_string());
        if gone {
            failure.exit_with(Exit::Signal(SIGPIPE))
        } else {
            failure
        }
    })
}

/// A line for people on standard error. Nothing can be done if it is gone.
fn say(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

fn colored(choice: Color) -> bool {
    let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    match choice {
        Color::Always => true,
        Color::Never => false,
        Color::Auto if set("NO_COLOR") => false,
        Color::Auto if set("CLICOLOR_FORCE") => true,
        Color::Auto => io::stderr().is_terminal(),
    }
}

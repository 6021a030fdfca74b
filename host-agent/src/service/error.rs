//! The one error of reading a service: which file, where, what, and the way out.

use std::fmt;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// Longest source line quoted in an error, in characters.
const SNIPPET_MAX: usize = 160;

/// A service that was refused. Display prints `file:line:column: what`; the
/// remedy and the quoted source line are for whoever prints the error.
#[derive(Debug)]
pub struct ServiceError(Box<Inner>);

#[derive(Debug)]
struct Inner {
    file: PathBuf,
    blame: Blame,
    position: Option<Position>,
    what: String,
    hint: Option<String>,
    snippet: Option<String>,
    source: Option<std::io::Error>,
}

/// What was to be done with the file that an error names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blame {
    /// It is part of a service, and was to be read.
    Service,
    /// It was to be written.
    Output,
    /// It is none: the command was asked for something that makes no sense.
    Usage,
}

/// A place in a text file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// Line, counted from 1.
    pub line: usize,
    /// Column in characters, counted from 1.
    pub column: usize,
}

/// Where in which file something is written: what turns out to be wrong with
/// it later is told there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The file.
    pub file: PathBuf,
    /// Where in it.
    pub position: Position,
}

impl Place {
    /// The byte at `offset` of `text`, which is the content of `file`.
    pub(super) fn of(file: &Path, text: &str, offset: usize) -> Self {
        Self {
            file: file.to_owned(),
            position: locate(text, offset).0,
        }
    }
}

impl ServiceError {
    /// `file` as a whole is refused because of `what`.
    pub fn new(file: &Path, what: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            file: file.to_owned(),
            blame: Blame::Service,
            position: None,
            what: what.into(),
            hint: None,
            snippet: None,
            source: None,
        }))
    }

    /// The byte at `offset` of `text`, which is the content of `file`, is refused.
    pub fn at(file: &Path, text: &str, offset: usize, what: impl Into<String>) -> Self {
        let (position, line) = locate(text, offset);
        let mut error = Self::new(file, what);
        error.0.position = Some(position);
        error.0.snippet = Some(line);
        error
    }

    /// A place in the text of `file`, which is not at hand, is refused.
    pub(super) fn place(file: &Path, position: Position, what: impl Into<String>) -> Self {
        let mut error = Self::new(file, what);
        error.0.position = Some(position);
        error
    }

    /// The error where `to` says that its place is.
    pub(super) fn moved(mut self, to: impl FnOnce(Position) -> Position) -> Self {
        self.0.position = self.0.position.map(to);
        self
    }

    /// The system did not let `file` be read.
    pub fn io(file: &Path, what: impl Into<String>, source: std::io::Error) -> Self {
        let hint = match source.kind() {
            ErrorKind::NotFound | ErrorKind::NotADirectory => Some("correct the path"),
            ErrorKind::PermissionDenied => {
                Some("give this user the right to read it (chmod), or be one who has it")
            }
            _ => None,
        };
        let mut error = Self::new(file, what);
        error.0.hint = hint.map(Into::into);
        error.0.source = Some(source);
        error
    }

    /// The system did not let `file`, which is to be made, be written.
    pub fn output(file: &Path, what: impl Into<String>, source: std::io::Error) -> Self {
        let hint = match source.kind() {
            ErrorKind::NotFound => Some("make its directory first (mkdir -p)"),
            ErrorKind::NotADirectory => Some("correct the path"),
            ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
                Some("name a file where this user can write")
            }
            _ => None,
        };
        let mut error = Self::new(file, what).blaming(Blame::Output);
        error.0.hint = hint.map(Into::into);
        error.0.source = Some(source);
        error
    }

    /// Says what was to be done with the file.
    #[must_use]
    pub(super) fn blaming(mut self, blame: Blame) -> Self {
        self.0.blame = blame;
        self
    }

    /// Adds what to do about it.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint = Some(hint.into());
        self
    }

    /// Adds what to do about it where nothing more precise was said.
    #[must_use]
    pub fn or_hint(mut self, hint: &str) -> Self {
        self.0.hint.get_or_insert_with(|| hint.into());
        self
    }

    /// The file that was refused.
    pub fn file(&self) -> &Path {
        &self.0.file
    }

    /// What was to be done with it.
    pub fn blame(&self) -> Blame {
        self.0.blame
    }

    /// Where in the file, when the error is about a place in a text.
    pub fn position(&self) -> Option<Position> {
        self.0.position
    }

    /// What is wrong, without the place.
    pub fn what(&self) -> &str {
        &self.0.what
    }

    /// What to do about it.
    pub fn hint(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }

    /// The source line at [`Self::position`], shortened if it is very long.
    pub fn snippet(&self) -> Option<&str> {
        self.0.snippet.as_deref()
    }
}

impl fmt::Display for ServiceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.0.file.display())?;
        if let Some(Position { line, column }) = self.0.position {
            write!(f, "{line}:{column}:")?;
        }
        write!(f, " {}", self.0.what)
    }
}

impl std::error::Error for ServiceError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0
            .source
            .as_ref()
            .map(|source| source as &(dyn std::error::Error + 'static))
    }
}

/// Line and column of `offset`, and the text of the line.
fn locate(text: &str, offset: usize) -> (Position, String) {
    let mut offset = offset.min(text.len());
    while !text.is_char_boundary(offset) {
        offset -= 1;
    }
    let (before, after) = text.split_at(offset);
    let start = before.rfind('\n').map_or(0, |newline| newline + 1);
    let end = after
        .find(['\n', '\r'])
        .map_or(text.len(), |newline| offset + newline);
    let position = Position {
        line: before.matches('\n').count() + 1,
        column: before[start..].chars().count() + 1,
    };
    let line = text[start..end].trim_end();
    let mut snippet: String = line.chars().take(SNIPPET_MAX).collect();
    if snippet.len() < line.len() {
        snippet.push('…');
    }
    (position, snippet)
}

/// The candidate nearest to `word`, when it is near enough to be what was meant.
pub(super) fn nearest<'a>(
    word: &str,
    candidates: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    let limit = (word.chars().count() / 3).max(1);
    candidates
        .into_iter()
        .map(|candidate| (distance(word, candidate), candidate))
        .filter(|(distance, _)| *distance <= limit)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// Edit distance without regard to case, on words short enough to be names.
fn distance(a: &str, b: &str) -> usize {
    const LONGEST: usize = 64;
    let a: Vec<char> = a.to_lowercase().chars().take(LONGEST).collect();
    let b: Vec<char> = b.to_lowercase().chars().take(LONGEST).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_counted_in_lines_and_characters() {
        let text = "one\r\n  zwei äö x\nthree";
        let offset = text.find('x').unwrap();
        let error = ServiceError::at(Path::new("f.xml"), text, offset, "bad");
        assert_eq!(error.to_string(), "f.xml:2:11: bad");
        assert_eq!(error.snippet(), Some("  zwei äö x"));
        let end = ServiceError::at(Path::new("f.xml"), text, 10_000, "bad");
        assert_eq!(end.to_string(), "f.xml:3:6: bad");
    }

    #[test]
    fn the_nearest_name_is_offered_only_when_it_is_near() {
        let names = ["WorkerRole", "WebRole"];
        assert_eq!(nearest("Workerrole", names), Some("WorkerRole"));
        assert_eq!(nearest("WrokerRole", names), Some("WorkerRole"));
        assert_eq!(nearest("Banana", names), None);
    }
}

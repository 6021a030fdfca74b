//! The error of reading or packing a service: file, position, cause and hint.

use std::fmt;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// Longest source line quoted in an error, in characters.
const SNIPPET_MAX: usize = 160;

/// A service that is refused. Display writes `file:line:column: what`; the hint
/// and the source line are separate, for the caller to print.
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

/// Role of the file that an error names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blame {
    /// Part of a service, being read.
    Service,
    /// Output file, being written.
    Output,
    /// None: the command line or an environment variable is invalid.
    Usage,
}

/// A position in a text file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// Line, counted from 1.
    pub line: usize,
    /// Column in characters, counted from 1.
    pub column: usize,
}

/// File and position of a value, kept so that later errors can name them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceLocation {
    /// The file.
    pub file: PathBuf,
    /// Position in the file.
    pub position: Position,
}

impl SourceLocation {
    /// Location of the byte at `offset` of `text`, the content of `file`.
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

    /// The byte at `offset` of `text`, the content of `file`, is refused.
    pub fn at(file: &Path, text: &str, offset: usize, what: impl Into<String>) -> Self {
        let (position, line) = locate(text, offset);
        let mut error = Self::new(file, what);
        error.0.position = Some(position);
        error.0.snippet = Some(line);
        error
    }

    /// The text at `position` of `file` is refused; there is no source line.
    pub(super) fn at_position(file: &Path, position: Position, what: impl Into<String>) -> Self {
        let mut error = Self::new(file, what);
        error.0.position = Some(position);
        error
    }

    /// Changes the position by `map`.
    pub(super) fn map_position(mut self, map: impl FnOnce(Position) -> Position) -> Self {
        self.0.position = self.0.position.map(map);
        self
    }

    /// A system call failed to read `file`.
    pub fn io(file: &Path, what: impl Into<String>, source: std::io::Error) -> Self {
        let hint = match source.kind() {
            ErrorKind::NotFound | ErrorKind::NotADirectory => Some("correct the path"),
            ErrorKind::PermissionDenied => {
                Some("make it readable for this user (chmod), or run as a user who may read it")
            }
            _ => None,
        };
        let mut error = Self::new(file, what);
        error.0.hint = hint.map(Into::into);
        error.0.source = Some(source);
        error
    }

    /// A system call failed to write the output `file`.
    pub fn output(file: &Path, what: impl Into<String>, source: std::io::Error) -> Self {
        let hint = match source.kind() {
            ErrorKind::NotFound => Some("create its directory first (mkdir -p)"),
            ErrorKind::NotADirectory => Some("correct the path"),
            ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
                Some("name a file where this user can write")
            }
            ErrorKind::FileTooLarge => Some(
                "choose a file system for larger files, or raise the limit of this process \
                 (ulimit -f)",
            ),
            _ => None,
        };
        let mut error = Self::new(file, what).blaming(Blame::Output);
        error.0.hint = hint.map(Into::into);
        error.0.source = Some(source);
        error
    }

    /// Sets the role of the file.
    #[must_use]
    pub(super) fn blaming(mut self, blame: Blame) -> Self {
        self.0.blame = blame;
        self
    }

    /// Sets the hint.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint = Some(hint.into());
        self
    }

    /// Sets the hint unless there is a more precise one.
    #[must_use]
    pub fn or_hint(mut self, hint: &str) -> Self {
        self.0.hint.get_or_insert_with(|| hint.into());
        self
    }

    /// The file that was refused.
    pub fn file(&self) -> &Path {
        &self.0.file
    }

    /// Role of the file.
    pub fn blame(&self) -> Blame {
        self.0.blame
    }

    /// Position in the file, if the error has one.
    pub fn position(&self) -> Option<Position> {
        self.0.position
    }

    /// What is wrong, without file and position.
    pub fn what(&self) -> &str {
        &self.0.what
    }

    /// What the user can do.
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
        let source = self.0.source.as_ref()?;
        Some(source)
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

/// The candidate nearest to `word`, if it is near enough to be a suggestion.
pub(crate) fn nearest<'a>(
    word: &str,
    candidates: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    let word = cut(word);
    let limit = (word.chars().count() / 3).max(1);
    candidates
        .into_iter()
        .map(|candidate| (distance(word, candidate), candidate))
        .filter(|(distance, _)| *distance <= limit)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// The first 64 characters of `word`: names are short, and the time to compare two words
/// is the product of their lengths.
fn cut(word: &str) -> &str {
    let end = word.char_indices().nth(64);
    end.map_or(word, |(end, _)| &word[..end])
}

/// Edit distance of the beginnings of two words, ignoring case.
fn distance(a: &str, b: &str) -> usize {
    let a: Vec<char> = cut(a).to_lowercase().chars().collect();
    let b: Vec<char> = cut(b).to_lowercase().chars().collect();
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
    fn positions_count_lines_and_characters() {
        let text = "one\r\n  zwei äö x\nthree";
        let offset = text.find('x').unwrap();
        let error = ServiceError::at(Path::new("f.xml"), text, offset, "bad");
        assert_eq!(error.to_string(), "f.xml:2:11: bad");
        assert_eq!(error.snippet(), Some("  zwei äö x"));
        let end = ServiceError::at(Path::new("f.xml"), text, 10_000, "bad");
        assert_eq!(end.to_string(), "f.xml:3:6: bad");
    }

    #[test]
    fn only_a_near_name_is_suggested() {
        let names = ["WorkerRole", "WebRole"];
        assert_eq!(nearest("Workerrole", names), Some("WorkerRole"));
        assert_eq!(nearest("WrokerRole", names), Some("WorkerRole"));
        assert_eq!(nearest("Banana", names), None);
    }
}

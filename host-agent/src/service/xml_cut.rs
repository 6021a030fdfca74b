//! Cuts a large XML file, as it is read, into pieces small enough to be parsed:
//! the records of its long lists, some at a time, and what is left without them.
//!
//! Where a record begins and ends is seen from tags alone. What is well-formed
//! is judged by the parser, which gets every record between the tags around it,
//! and the rest in one piece; together they are well-formed only if the file is.

use std::io::Read;
use std::path::Path;

use super::error::{Position, ServiceError};
use super::xml::{self, Element, MAX_DEPTH};

/// Records are collected until they have this many bytes. Tests cut small
/// texts.
const ENOUGH: usize = if cfg!(test) { 200 } else { 64 << 10 };
/// Most bytes of collected records. One has 350 or so; the longest path, with
/// every character escaped, makes it 50,000.
const MOST_COLLECTED: usize = 256 << 10;
/// Most bytes beside the records: those of a definition or configuration.
const MOST_REST: usize = 2 << 20;
/// Most XML nodes beside the records: some 20 for each of 100 roles.
const MOST_REST_NODES: u32 = 10_000;
/// Longest tag, comment or the like.
const MOST_TOKEN: usize = 64 << 10;
/// Bytes read at once.
const READ_SIZE: usize = 32 << 10;

/// An XML file that can be read any number of times.
pub(super) struct LargeXml<'a, O> {
    /// Its name in errors.
    pub file: &'a Path,
    /// Opens it.
    pub open: O,
    /// Name and namespace of its root.
    pub root: (&'static str, &'static str),
    /// For each kind of records the local names from the root to a record.
    pub records: &'static [&'static [&'static str]],
}

impl<R: Read, O: Fn() -> R> LargeXml<'_, O> {
    /// The file without its records. Lines are where they are in the file; of
    /// columns only those before the first record of a line.
    pub fn rest(&self) -> Result<String, ServiceError> {
        let mut text = Vec::new();
        self.cut(|piece| {
            match piece {
                Piece::Rest(bytes) => text.extend_from_slice(bytes),
                Piece::Records(records) => {
                    // What was apart in the file must not become one: `&` and `amp;`.
                    text.push(b' ');
                    // All but the one between the tags around and the records.
                    text.resize(text.len() + newlines(&records.text) - 1, b'\n');
                }
            }
            if text.len() > MOST_REST {
                let what = format!("holds more than {MOST_REST} bytes beside its lists");
                return Err(ServiceError::new(self.file, what));
            }
            Ok(())
        })?;
        xml::text_of(self.file, text, MOST_REST as u64)
    }

    /// Parses what [`Self::rest`] gave and passes the root to `read`.
    pub fn read_rest<T>(
        &self,
        rest: &str,
        read: impl FnOnce(Element<'_>) -> Result<T, ServiceError>,
    ) -> Result<T, ServiceError> {
        let document = xml::parse(self.file, rest, MOST_REST_NODES)?;
        let (name, namespace) = self.root;
        read(xml::root(self.file, rest, &document, name, namespace)?)
    }

    /// Passes all records of `kind` to `read`, in order and some at a time: the
    /// element that holds them, and the how manieth of its path it is.
    pub fn read_records(
        &self,
        kind: usize,
        mut read: impl FnMut(Element<'_>, usize) -> Result<(), ServiceError>,
    ) -> Result<(), ServiceError> {
        self.cut(|piece| match piece {
            Piece::Records(records) if records.kind == kind => self.parse(records, &mut read),
            _ => Ok(()),
        })
    }

    fn parse(
        &self,
        records: Records,
        read: impl FnOnce(Element<'_>, usize) -> Result<(), ServiceError>,
    ) -> Result<(), ServiceError> {
        let Records { at, list, kind, .. } = records;
        let result = (|| {
            let text = xml::text_of(self.file, records.text, MOST_COLLECTED as u64)?;
            // A node has a byte of its own at least.
            let document = xml::parse(self.file, &text, text.len() as u32)?;
            let (name, namespace) = self.root;
            let mut element = xml::root(self.file, &text, &document, name, namespace)?;
            let path = self.records[kind];
            for &name in &path[1..path.len() - 1] {
                element = element.required_child(name)?;
            }
            read(element, list)
        })();
        result.map_err(|error: ServiceError| {
            error.moved(|place| match place.line {
                // In the tags around, which stand somewhere before.
                0 | 1 => at,
                2 => Position {
                    line: at.line,
                    column: at.column + place.column - 1,
                },
                line => Position {
                    line: at.line + line - 2,
                    ..place
                },
            })
        })
    }

    fn cut(
        &self,
        mut take: impl FnMut(Piece<'_>) -> Result<(), ServiceError>,
    ) -> Result<(), ServiceError> {
        let mut lexer = Lexer {
            file: self.file,
            stream: (self.open)(),
            buffer: Vec::new(),
            start: 0,
            length: 0,
            ended: false,
            position: Position { line: 1, column: 1 },
        };
        let mut open: Vec<Open> = Vec::new();
        let mut lists = vec![0; self.records.len()];
        let mut records: Option<Records> = None;
        // Elements open inside of a record, the record among them.
        let mut within = 0;
        while let Some(next) = lexer.next()? {
            let Lexed {
                token,
                position,
                bytes,
            } = next;
            let refuse = |what| ServiceError::place(self.file, position, what);
            let starts = matches!(token, Token::Start | Token::Empty);
            if token == Token::Start && open.len() + within >= MAX_DEPTH {
                let what = format!("elements nested deeper than {MAX_DEPTH}");
                return Err(refuse(what));
            }
            let kind = match &records {
                _ if within > 0 => None,
                _ if starts => self.records.iter().position(|path| {
                    let (last, around) = path.split_last().expect("a path is not empty");
                    is_at(&open, around) && local(qualified(bytes)) == last.as_bytes()
                }),
                // Space between two records.
                Some(records) if token == Token::Text && bytes.trim_ascii().is_empty() => {
                    Some(records.kind)
                }
                _ => None,
            };
            if within == 0 && kind.is_none() {
                if let Some(done) = records.take() {
                    take(Piece::Records(done.closed(&open)))?;
                }
                take(Piece::Rest(bytes))?;
                if starts {
                    open.push(Open(bytes.to_vec()));
                    for (path, count) in self.records.iter().zip(&mut lists) {
                        *count += usize::from(is_at(&open, &path[..path.len() - 1]));
                    }
                }
                if matches!(token, Token::Empty | Token::End) {
                    open.pop();
                }
                continue;
            }
            let collected = records.get_or_insert_with(|| {
                let kind = kind.expect("nothing is collected before a record begins");
                Records::new(kind, lists[kind] - 1, position, &open)
            });
            collected.text.extend_from_slice(bytes);
            if collected.text.len() > MOST_COLLECTED / 2 + ENOUGH {
                return Err(refuse("an element of a list is too large".into()));
            }
            match token {
                Token::Start => within += 1,
                Token::End => within -= 1,
                _ => {}
            }
            if within == 0
                && collected.text.len() >= ENOUGH
                && let Some(done) = records.take()
            {
                take(Piece::Records(done.closed(&open)))?;
            }
        }
        match records {
            Some(unfinished) => take(Piece::Records(unfinished.closed(&open))),
            None => Ok(()),
        }
    }
}

enum Piece<'a> {
    Rest(&'a [u8]),
    Records(Records),
}

/// Records of one list, one after another, between the tags around them. The
/// tags before them are the first line.
struct Records {
    kind: usize,
    list: usize,
    /// Where the first record is.
    at: Position,
    text: Vec<u8>,
}

impl Records {
    fn new(kind: usize, list: usize, at: Position, open: &[Open]) -> Self {
        let around = open.iter().flat_map(|Open(tag)| tag);
        // Between attributes and in their values a line's end is a space.
        let mut text: Vec<u8> = around
            .map(|byte| if *byte < b' ' { b' ' } else { *byte })
            .collect();
        text.push(b'\n');
        Self {
            kind,
            list,
            at,
            text,
        }
    }

    fn closed(mut self, open: &[Open]) -> Self {
        for Open(tag) in open.iter().rev() {
            self.text.extend_from_slice(b"</");
            self.text.extend_from_slice(qualified(tag));
            self.text.push(b'>');
        }
        self
    }
}

/// The tag of an open element.
struct Open(Vec<u8>);

/// Whether the open elements are those of `path`.
fn is_at(open: &[Open], path: &[&str]) -> bool {
    open.len() == path.len()
        && std::iter::zip(open, path)
            .all(|(Open(tag), name)| local(qualified(tag)) == name.as_bytes())
}

/// The name in a start tag, with its prefix.
fn qualified(tag: &[u8]) -> &[u8] {
    let name = &tag[1..];
    let end = name
        .iter()
        .position(|byte| byte.is_ascii_whitespace() || matches!(byte, b'/' | b'>'));
    &name[..end.unwrap_or(name.len())]
}

fn local(name: &[u8]) -> &[u8] {
    let colon = name.iter().rposition(|byte| *byte == b':');
    &name[colon.map_or(0, |colon| colon + 1)..]
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Token {
    /// Characters, or some of them.
    Text,
    Start,
    /// Start and end in one.
    Empty,
    End,
    /// Comment, CDATA section or processing instruction.
    Other,
    /// Document type declaration.
    Dtd,
}

/// A token and where it is.
struct Lexed<'a> {
    token: Token,
    position: Position,
    bytes: &'a [u8],
}

/// Cuts a stream into tokens.
struct Lexer<'a, R> {
    file: &'a Path,
    stream: R,
    buffer: Vec<u8>,
    /// The last token is this part of the buffer.
    start: usize,
    length: usize,
    ended: bool,
    position: Position,
}

impl<R: Read> Lexer<'_, R> {
    fn next(&mut self) -> Result<Option<Lexed<'_>>, ServiceError> {
        let last = &self.buffer[self.start..][..self.length];
        advance(&mut self.position, last);
        self.start += self.length;
        self.length = 0;
        let token = loop {
            let rest = &self.buffer[self.start..];
            if let Some((token, length)) = first_token(rest) {
                self.length = length;
                break token;
            }
            if self.ended {
                if rest.is_empty() {
                    return Ok(None);
                }
                // Cut short: the parser will say so.
                self.length = rest.len();
                break Token::Other;
            }
            if rest.len() > MOST_TOKEN {
                let what = "a tag or comment is too long";
                return Err(ServiceError::place(self.file, self.position, what));
            }
            self.fill()?;
        };
        if token == Token::Dtd {
            let error = ServiceError::place(self.file, self.position, xml::DTD);
            return Err(error.with_hint(xml::DTD_HINT));
        }
        let bytes = &self.buffer[self.start..][..self.length];
        Ok(Some(Lexed {
            token,
            position: self.position,
            bytes,
        }))
    }

    fn fill(&mut self) -> Result<(), ServiceError> {
        let first = self.buffer.is_empty();
        self.buffer.drain(..self.start);
        self.start = 0;
        let mut chunk = (&mut self.stream).take(READ_SIZE as u64);
        let read = chunk
            .read_to_end(&mut self.buffer)
            .map_err(|source| ServiceError::io(self.file, "cannot unpack the part", source))?;
        self.ended = read == 0;
        if first {
            xml::check_encoding(self.file, &self.buffer)?;
        }
        Ok(())
    }
}

fn newlines(bytes: &[u8]) -> usize {
    bytes.split(|byte| *byte == b'\n').count() - 1
}

fn advance(position: &mut Position, over: &[u8]) {
    let after = match over.iter().rposition(|byte| *byte == b'\n') {
        Some(newline) => {
            position.line += newlines(over);
            position.column = 1;
            &over[newline + 1..]
        }
        None => over,
    };
    // Bytes that continue a character are not counted.
    position.column += after.iter().filter(|byte| **byte & 0xC0 != 0x80).count();
}

/// The token that `bytes` begin with, and its length; none if it goes on
/// beyond them.
fn first_token(bytes: &[u8]) -> Option<(Token, usize)> {
    const CDATA: &[u8] = b"<![CDATA[";
    let ends = |from: usize, end: &[u8]| {
        let found = bytes.get(from..)?.windows(end.len()).position(|w| w == end);
        found.map(|at| from + at + end.len())
    };
    let next = |at: usize| bytes.get(at).copied();
    if next(0)? != b'<' {
        let end = bytes.iter().position(|byte| *byte == b'<');
        return Some((Token::Text, end.unwrap_or(bytes.len())));
    }
    match next(1)? {
        b'?' => Some((Token::Other, ends(2, b"?>")?)),
        b'/' => Some((Token::End, ends(2, b">")?)),
        b'!' if bytes.starts_with(b"<!--") => Some((Token::Other, ends(4, b"-->")?)),
        b'!' if bytes.starts_with(CDATA) => Some((Token::Other, ends(CDATA.len(), b"]]>")?)),
        b'!' if b"<!--".starts_with(bytes) || CDATA.starts_with(bytes) => None,
        b'!' => Some((Token::Dtd, bytes.len())),
        _ => {
            let mut quote = None;
            let end = bytes.iter().position(|byte| {
                match (quote, byte) {
                    (None, b'"' | b'\'') => quote = Some(*byte),
                    (Some(open), byte) if open == *byte => quote = None,
                    (None, b'>') => return true,
                    _ => {}
                }
                false
            })?;
            let empty = bytes[..end].ends_with(b"/");
            let token = if empty { Token::Empty } else { Token::Start };
            Some((token, end + 1))
        }
    }
}

#[cfg(test)]
mod tests;

//! Reads a large XML file in chunks that are small enough to parse: some records
//! of its long lists at a time, and once the rest of the file without them.
//!
//! Tags alone show where a record begins and ends. The parser judges whether the
//! file is well-formed: it gets each record inside copies of the start tags that
//! enclose it, and the rest as one text. The file is well-formed only if all of
//! these are.

use std::io::Read;
use std::path::Path;

use super::error::{Position, ServiceError};
use super::xml::{self, Element, MAX_DEPTH};
use super::xml_tokens::{Token, first_token};

/// A chunk is complete when it has this many bytes. Small in tests, whose texts
/// are short.
const CHUNK_SIZE: usize = if cfg!(test) { 200 } else { 64 << 10 };
/// Most bytes of a record, which has some 350; the longest path, with every character
/// escaped, makes it 50,000.
const MAX_RECORD: usize = 128 << 10;
/// Most bytes of the start tags that enclose records, which have some 200. Every chunk
/// gets a copy of them.
const MAX_ENCLOSING: usize = 2 << 10;
/// Most bytes of a chunk: all but its last record are less than [`CHUNK_SIZE`].
const MAX_CHUNK: usize = 256 << 10;
/// Most bytes outside the records: those of a definition or configuration.
const MAX_REST: usize = 2 << 20;
/// Most XML nodes outside the records: some 20 for each of 100 roles.
const MAX_REST_NODES: u32 = 10_000;
/// Longest tag, comment or other token.
const MAX_TOKEN: usize = 64 << 10;
/// Bytes per read.
const READ_SIZE: usize = 32 << 10;

/// An XML file that can be read any number of times.
pub(super) struct LargeXml<'a, O> {
    /// Its name in errors.
    pub file: &'a Path,
    /// Opens it.
    pub open: O,
    /// Name and namespace of its root.
    pub root: (&'static str, &'static str),
    /// For each kind of record the local names from the root to a record.
    pub records: &'static [&'static [&'static str]],
}

impl<R: Read, O: Fn() -> R> LargeXml<'_, O> {
    /// The file without its records. Lines keep their numbers; columns are exact
    /// only before the first record of a line.
    pub fn rest(&self) -> Result<String, ServiceError> {
        let mut text = Vec::new();
        self.split(|chunk| {
            match chunk {
                Chunk::Rest(bytes) => text.extend_from_slice(bytes),
                Chunk::Records(records) => {
                    // A space keeps the two sides apart: `&` and `amp;` must not join.
                    text.push(b' ');
                    // The first newline of a chunk is not from the file.
                    text.resize(text.len() + newlines(&records.text) - 1, b'\n');
                }
            }
            if text.len() > MAX_REST {
                let what = format!("holds more than {MAX_REST} bytes outside its lists");
                return Err(ServiceError::new(self.file, what));
            }
            Ok(())
        })?;
        xml::text_of(self.file, text, MAX_REST as u64)
    }

    /// Parses the text from [`Self::rest`] and passes the root to `read`.
    pub fn read_rest<T>(
        &self,
        rest: &str,
        read: impl FnOnce(Element<'_>) -> Result<T, ServiceError>,
    ) -> Result<T, ServiceError> {
        let document = xml::parse(self.file, rest, MAX_REST_NODES)?;
        let (name, namespace) = self.root;
        read(xml::root(self.file, rest, &document, name, namespace)?)
    }

    /// Passes all records of `kind` to `read`, in order and some at a time: the
    /// element that holds them, and its index among elements with the same path.
    pub fn read_records(
        &self,
        kind: usize,
        mut read: impl FnMut(Element<'_>, usize) -> Result<(), ServiceError>,
    ) -> Result<(), ServiceError> {
        self.split(|chunk| match chunk {
            Chunk::Records(records) if records.kind == kind => self.parse(records, &mut read),
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
            let text = xml::text_of(self.file, records.text, MAX_CHUNK as u64)?;
            let document = xml::parse(self.file, &text, xml::MAX_NODES)?;
            let (name, namespace) = self.root;
            let mut element = xml::root(self.file, &text, &document, name, namespace)?;
            let path = self.records[kind];
            for &name in &path[1..path.len() - 1] {
                element = element.required_child(name)?;
            }
            read(element, list)
        })();
        result.map_err(|error: ServiceError| {
            error.map_position(|found| match found.line {
                // In the copied start tags: their own position is not known.
                0 | 1 => at,
                2 => Position {
                    line: at.line,
                    column: at.column + found.column - 1,
                },
                line => Position {
                    line: at.line + line - 2,
                    ..found
                },
            })
        })
    }

    /// Splits the file into chunks and passes them to `take` in order.
    fn split(
        &self,
        mut take: impl FnMut(Chunk<'_>) -> Result<(), ServiceError>,
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
        // Start tags of the open elements outside records.
        let mut open: Vec<Vec<u8>> = Vec::new();
        let mut lists = vec![0; self.records.len()];
        let mut records: Option<Records> = None;
        // Open elements from the record inwards.
        let mut within = 0;
        while let Some((token, position, bytes)) = lexer.next()? {
            let refuse = |what| ServiceError::at_position(self.file, position, what);
            let starts = matches!(token, Token::Start | Token::Empty);
            if token == Token::Start && open.len() + within >= MAX_DEPTH {
                return Err(refuse(xml::too_deep()));
            }
            let kind = match &records {
                _ if within > 0 => None,
                _ if starts => self.records.iter().position(|path| {
                    let (last, parents) = path.split_last().expect("a path is not empty");
                    is_at(&open, parents) && local_name(bytes) == last.as_bytes()
                }),
                // White space between two records.
                Some(records) if token == Token::Text && bytes.trim_ascii().is_empty() => {
                    Some(records.kind)
                }
                _ => None,
            };
            if within == 0 && kind.is_none() {
                if let Some(complete) = records.take() {
                    take(complete.closed(&open))?;
                }
                take(Chunk::Rest(bytes))?;
                if starts {
                    open.push(bytes.to_vec());
                    for (path, count) in self.records.iter().zip(&mut lists) {
                        *count += usize::from(is_at(&open, &path[..path.len() - 1]));
                    }
                }
                if matches!(token, Token::Empty | Token::End) {
                    open.pop();
                }
                continue;
            }
            if records.is_none() && open.iter().map(Vec::len).sum::<usize>() > MAX_ENCLOSING {
                return Err(refuse(format!(
                    "the start tags around a list are longer than {MAX_ENCLOSING} bytes"
                )));
            }
            let collected = records.get_or_insert_with(|| {
                let kind = kind.expect("a chunk begins with a record");
                Records::new(kind, lists[kind] - 1, position, &open)
            });
            collected.text.extend_from_slice(bytes);
            if collected.text.len() > CHUNK_SIZE + MAX_RECORD {
                return Err(refuse(format!(
                    "an element of a list is larger than {MAX_RECORD} bytes"
                )));
            }
            match token {
                Token::Start => within += 1,
                Token::End => within -= 1,
                _ => {}
            }
            if within == 0
                && collected.text.len() >= CHUNK_SIZE
                && let Some(complete) = records.take()
            {
                take(complete.closed(&open))?;
            }
        }
        match records {
            Some(unfinished) => take(unfinished.closed(&open)),
            None => Ok(()),
        }
    }
}

enum Chunk<'a> {
    Rest(&'a [u8]),
    Records(Records),
}

/// Consecutive records of one list inside copies of the tags that enclose them.
/// The start tags are the first line.
struct Records {
    kind: usize,
    /// Index of the list among elements with the same path.
    list: usize,
    /// Position of the first record in the file.
    at: Position,
    text: Vec<u8>,
}

impl Records {
    fn new(kind: usize, list: usize, at: Position, open: &[Vec<u8>]) -> Self {
        // In a tag a line break means the same as a space.
        let tags = open.iter().flatten().map(|byte| (*byte).max(b' '));
        Self {
            kind,
            list,
            at,
            text: tags.chain([b'\n']).collect(),
        }
    }

    /// The complete chunk: adds the end tags of the `open` elements.
    fn closed(mut self, open: &[Vec<u8>]) -> Chunk<'static> {
        for tag in open.iter().rev() {
            self.text.extend_from_slice(b"</");
            self.text.extend_from_slice(qualified_name(tag));
            self.text.push(b'>');
        }
        Chunk::Records(self)
    }
}

/// Whether the open elements are those of `path`.
fn is_at(open: &[Vec<u8>], path: &[&str]) -> bool {
    open.len() == path.len()
        && std::iter::zip(open, path).all(|(tag, name)| local_name(tag) == name.as_bytes())
}

/// The name in a start tag, with its prefix.
fn qualified_name(tag: &[u8]) -> &[u8] {
    let end = |byte: &u8| byte.is_ascii_whitespace() || matches!(byte, b'/' | b'>');
    tag[1..].split(end).next().unwrap_or_default()
}

/// The name in a start tag, without its prefix.
fn local_name(tag: &[u8]) -> &[u8] {
    let name = qualified_name(tag).rsplit(|byte| *byte == b':').next();
    name.unwrap_or_default()
}

/// A token, its position and its bytes.
type Lexed<'a> = (Token, Position, &'a [u8]);

/// Splits a stream into tokens.
struct Lexer<'a, R> {
    file: &'a Path,
    stream: R,
    buffer: Vec<u8>,
    /// The last token is `buffer[start..][..length]`.
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
                // An incomplete token: the parser refuses it.
                self.length = rest.len();
                break Token::Other;
            }
            if rest.len() > MAX_TOKEN {
                let what = format!("a tag or comment is longer than {MAX_TOKEN} bytes");
                return Err(ServiceError::at_position(self.file, self.position, what));
            }
            self.fill()?;
        };
        if token == Token::Dtd {
            let error = ServiceError::at_position(self.file, self.position, xml::DTD);
            return Err(error.with_hint(xml::DTD_HINT));
        }
        let bytes = &self.buffer[self.start..][..self.length];
        Ok(Some((token, self.position, bytes)))
    }

    fn fill(&mut self) -> Result<(), ServiceError> {
        let first = self.buffer.is_empty();
        self.buffer.drain(..self.start);
        self.start = 0;
        let read = (&mut self.stream)
            .take(READ_SIZE as u64)
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
    // Columns count characters: skip UTF-8 continuation bytes.
    position.column += after.iter().filter(|byte| **byte & 0xC0 != 0x80).count();
}

#[cfg(test)]
mod tests;

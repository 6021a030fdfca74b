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
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FILE: &str = "m.xml";
    const ROOT: (&str, &str) = ("R", "urn:r");
    const LISTS: &[&[&str]] = &[&["R", "A", "I"], &["R", "B", "C", "I"]];

    /// What was read: the kind of record, which list, and its name.
    type Seen = Vec<(usize, usize, String)>;

    fn take(
        seen: &mut Seen,
        kind: usize,
        list: Element<'_>,
        number: usize,
    ) -> Result<(), ServiceError> {
        for record in list.children("I") {
            let name = record.leaf("N")?;
            if name == "bad" {
                return Err(record.refuse("bad"));
            }
            seen.push((kind, number, name.to_owned()));
        }
        Ok(())
    }

    /// Reads a few bytes at a time.
    struct Drops<'a>(&'a [u8], usize);

    impl Read for Drops<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            let most = buffer.len().min(self.1);
            self.0.read(&mut buffer[..most])
        }
    }

    fn in_pieces(text: &str, drop: usize) -> Result<Seen, ServiceError> {
        let large = LargeXml {
            file: Path::new(FILE),
            open: || Drops(text.as_bytes(), drop),
            root: ROOT,
            records: LISTS,
        };
        let rest = large.rest()?;
        large.read_rest(&rest, |root| {
            let others = root.children("A").chain(root.children("B"));
            let lists = others.flat_map(|list| [list].into_iter().chain(list.children("C")));
            // None is left in the lists.
            for list in lists.filter(|list| list.name() != "B") {
                assert_eq!(list.children("I").count(), 0);
            }
            Ok(())
        })?;
        let mut seen = Seen::new();
        for kind in 0..LISTS.len() {
            large.read_records(kind, |list, number| take(&mut seen, kind, list, number))?;
        }
        Ok(seen)
    }

    fn as_a_whole(text: &str) -> Result<Seen, ServiceError> {
        let file = Path::new(FILE);
        let text = xml::text_of(file, text.into(), 1 << 20)?;
        let document = xml::parse(file, &text, 1 << 20)?;
        let root = xml::root(file, &text, &document, ROOT.0, ROOT.1)?;
        let mut seen = Seen::new();
        for (number, list) in root.children("A").enumerate() {
            take(&mut seen, 0, list, number)?;
        }
        let lists = root.children("B").flat_map(|list| list.children("C"));
        for (number, list) in lists.enumerate() {
            take(&mut seen, 1, list, number)?;
        }
        Ok(seen)
    }

    fn item() -> impl Strategy<Value = String> {
        prop_oneof![
            8 => "[a-z]{1,9}".prop_map(|name| format!("<I><N>{name}</N></I>")),
            2 => Just("<I b='/>'\n c=\"a'>\" ><!-- </I> --><N>&lt;I></N></I>".to_owned()),
            2 => Just("<I><N><![CDATA[</I>]]></N><?x </I>?></I >".to_owned()),
            1 => Just("<p:I xmlns:p='urn:r'><p:N>p</p:N></p:I>".to_owned()),
            1 => Just("<I><N/><I><N>inner</N></I></I>".to_owned()),
            6 => Just("\n  ".to_owned()),
            1 => Just("<!-- <I> -->".to_owned()),
            1 => Just("<J/>é".to_owned()),
        ]
    }

    fn list() -> impl Strategy<Value = String> {
        let items = || proptest::collection::vec(item(), 0..20).prop_map(|items| items.concat());
        prop_oneof![
            3 => items().prop_map(|items| format!("<A x='-->' >{items}</A>")),
            3 => (items(), items()).prop_map(|(a, b)| format!("<B><C\ny='1'>{a}</C><C>{b}</C>\n</B>")),
            1 => items().prop_map(|items| format!("<p:A xmlns:p='urn:r' xmlns='urn:r'>{items}</p:A>")),
            1 => items().prop_map(|items| format!("<O><A>{items}</A></O>")),
            1 => Just("<A/><B/><B><C/></B>".to_owned()),
            1 => Just("\n<!-- <A><I/></A> -->\n".to_owned()),
        ]
    }

    fn document() -> impl Strategy<Value = String> {
        proptest::collection::vec(list(), 0..6).prop_map(|lists| {
            let lists = lists.concat();
            format!("<?xml version='1.0'?>\n<R\txmlns='urn:r'>{lists}</R>\n")
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3000))]

        /// Whatever the file and however it comes: it is accepted when the
        /// parser accepts it as a whole, and means the same.
        #[test]
        fn a_file_read_in_pieces_is_the_file_read_as_a_whole(
            document in document(),
            damage in proptest::collection::vec(
                (any::<prop::sample::Index>(), 0usize..3, r#"[<>/&'"!?=a-cI \n-]{1,3}"#), 0..3),
            drop in prop_oneof![Just(1usize), 2usize..40, Just(1000)],
        ) {
            let mut text = document;
            for (at, length, new) in damage {
                let places: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
                let at = at.index(places.len());
                let end = (at + length).min(places.len() - 1);
                text.replace_range(places[at]..places[end], &new);
            }
            match (in_pieces(&text, drop), as_a_whole(&text)) {
                (Ok(mut pieces), Ok(mut whole)) => {
                    pieces.sort();
                    whole.sort();
                    prop_assert_eq!(pieces, whole);
                }
                (Err(_), Err(_)) => {}
                (Ok(_), Err(error)) => prop_assert!(false, "accepted: {error}\n{text}"),
                (Err(error), Ok(_)) => prop_assert!(false, "refused: {error}\n{text}"),
            }
        }

        #[test]
        fn a_record_is_refused_where_it_is(
            before in proptest::collection::vec(item(), 0..60),
            after in proptest::collection::vec(item(), 0..30),
            drop in 1usize..100,
        ) {
            let (before, after) = (before.concat(), after.concat());
            let text = format!(
                "<R\nxmlns='urn:r'><A>{before}\n</A><B><C>{after}é<I><N>bad</N></I></C></B></R>"
            );
            let pieces = in_pieces(&text, drop).unwrap_err();
            let whole = as_a_whole(&text).unwrap_err();
            prop_assert_eq!(pieces.position(), whole.position(), "{}", text);
        }
    }

    #[test]
    fn what_would_take_memory_without_end_is_refused() {
        let list = |content: &str| format!("<R xmlns='urn:r'><A>{content}</A></R>");
        let depth = 100;
        let deep = "<d>".repeat(depth) + &"</d>".repeat(depth);
        let cases = [
            (
                list(&format!("<I>{}</I>", "<x/>".repeat(100_000))),
                "too large",
            ),
            (list(&format!("<!--{}-->", "x".repeat(200_000))), "too long"),
            (list(&"<x/>".repeat(600_000)), "beside its lists"),
            (list(&deep), "nested deeper"),
            (list(&format!("<I>{deep}</I>")), "nested deeper"),
            (format!("<!DOCTYPE x>{}", list("")), "DTD"),
            (list("<I><!DOCTYPE x></I>"), "DTD"),
        ];
        for (text, why) in cases {
            let error = in_pieces(&text, 10_000).unwrap_err().to_string();
            assert!(error.contains(why), "{why}: {error}");
        }
        let mut utf16 = vec![0xFF, 0xFE];
        utf16.extend(list("").encode_utf16().flat_map(u16::to_le_bytes));
        let large = LargeXml {
            file: Path::new(FILE),
            open: || Drops(&utf16, 7),
            root: ROOT,
            records: LISTS,
        };
        assert!(large.rest().unwrap_err().what().contains("UTF-16"));
    }
}

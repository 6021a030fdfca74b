//! Reads XML files of bounded size and depth, without DTD. Unknown elements and
//! attributes are refused, and every refusal can name its line.

use std::collections::HashSet;
use std::io::Read;
use std::path::Path;

use roxmltree::{Attribute, Document, Node, ParsingOptions};

use super::error::{ServiceError, SourceLocation, nearest};
use super::open::open_regular;
use super::xml_tokens::{Token, attributes, declares_namespace, first_token};

/// Largest definition or configuration. Real ones are some kilobytes.
pub const MAX_BYTES: u64 = 1 << 20;

/// Deepest nesting of elements. The schemas need 8.
pub const MAX_DEPTH: usize = 32;

/// Most attributes of an element, namespace declarations among them, and most declarations
/// in force at an element. The schemas need 5. The parser's time grows with the square.
const MAX_ATTRIBUTES: usize = 64;

/// Most nodes of a document: the elements that fit into [`MAX_BYTES`], with the white space
/// between them. Each takes some 100 bytes.
pub(super) const MAX_NODES: u32 = 120_000;

/// Error for a DTD.
pub(super) const DTD: &str = "document type declaration (DTD) refused";
/// Hint of [`DTD`].
pub(super) const DTD_HINT: &str = "remove it: a service file needs none";

/// Hint of what only a file that is made to cost time or memory exceeds.
const FEWER: &str = "remove what the service does not need";

/// What an element may contain. A name in none of the lists is refused as
/// unknown, one in a `later_` list as not supported yet.
#[derive(Debug, Clone, Copy)]
pub(super) struct Schema {
    /// Attributes that are read.
    pub attributes: &'static [&'static str],
    /// Attributes of the classic schema that this version does not support.
    pub later_attributes: &'static [&'static str],
    /// Child elements that are read.
    pub children: &'static [&'static str],
    /// Child elements of the classic schema that this version does not support.
    pub later_children: &'static [&'static str],
}

/// Neither attributes nor child elements.
pub(super) const EMPTY: Schema = Schema {
    attributes: &[],
    later_attributes: &[],
    children: &[],
    later_children: &[],
};

impl Schema {
    /// Child elements only.
    pub const fn of_children(children: &'static [&'static str]) -> Self {
        Self { children, ..EMPTY }
    }

    /// Attributes only.
    pub const fn of_attributes(attributes: &'static [&'static str]) -> Self {
        Self {
            attributes,
            ..EMPTY
        }
    }
}

/// An element and its file.
#[derive(Clone, Copy)]
pub(super) struct Element<'a> {
    file: &'a Path,
    text: &'a str,
    node: Node<'a, 'a>,
}

/// The value of an attribute and its element.
#[derive(Clone, Copy)]
pub(super) struct Value<'a> {
    element: Element<'a>,
    attribute: Attribute<'a, 'a>,
    /// The value, entities resolved.
    pub text: &'a str,
}

/// Reads `file` as text.
pub(super) fn read_text(file: &Path) -> Result<String, ServiceError> {
    const CANNOT: &str = "cannot read the file";
    let mut bytes = Vec::new();
    open_regular(file, CANNOT)?
        .take(MAX_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(|source| ServiceError::io(file, CANNOT, source))?;
    text_of(file, bytes, MAX_BYTES)
}

/// Checks size and encoding of `bytes`, the content of `file`.
pub(super) fn text_of(file: &Path, bytes: Vec<u8>, limit: u64) -> Result<String, ServiceError> {
    if bytes.len() as u64 > limit {
        return Err(ServiceError::new(
            file,
            format!("is larger than {limit} bytes"),
        ));
    }
    check_encoding(file, &bytes)?;
    let mut text = String::from_utf8(bytes).map_err(|error| {
        let valid = error.utf8_error().valid_up_to();
        let prefix = String::from_utf8_lossy(&error.as_bytes()[..valid]).into_owned();
        ServiceError::at(file, &prefix, valid, "this byte is not UTF-8")
            .with_hint("save the file as UTF-8")
    })?;
    // A byte order mark would shift the columns of the first line.
    if text.starts_with('\u{FEFF}') {
        text.drain(..'\u{FEFF}'.len_utf8());
    }
    // The parser would skip another one.
    if text.starts_with('\u{FEFF}') {
        return Err(ServiceError::at(file, &text, 0, "second byte order mark")
            .with_hint("save the file as UTF-8 with one byte order mark or none"));
    }
    Ok(text)
}

/// Refuses UTF-16, which the first bytes show.
pub(super) fn check_encoding(file: &Path, bytes: &[u8]) -> Result<(), ServiceError> {
    if bytes.starts_with(&[0xFE, 0xFF]) || bytes.starts_with(&[0xFF, 0xFE]) {
        return Err(ServiceError::new(file, "is encoded in UTF-16")
            .with_hint("save it as UTF-8 (iconv -f UTF-16 -t UTF-8)"));
    }
    Ok(())
}

/// Parses `text`, the content of `file`, into at most `nodes` nodes.
pub(super) fn parse<'a>(
    file: &Path,
    text: &'a str,
    nodes: u32,
) -> Result<Document<'a>, ServiceError> {
    prescan(file, text)?;
    let options = ParsingOptions {
        allow_dtd: false,
        nodes_limit: nodes,
        ..ParsingOptions::default()
    };
    Document::parse_with_options(text, options).map_err(|error| {
        use roxmltree::Error as E;
        if error == E::NodesLimitReached {
            let what = format!("holds more than {nodes} elements, texts and comments");
            return ServiceError::new(file, what).with_hint(FEWER);
        }
        let position = error.pos();
        let offset = match error {
            E::AttributesLimitReached | E::NamespacesLimitReached => 0,
            E::UnclosedRootNode | E::UnexpectedEndOfStream | E::NoRootNode => text.len(),
            _ => offset_of(text, position.row, position.col),
        };
        let message = error.to_string();
        // Cut the parser's own "at row:column", which can be wrong.
        let message = message.split(" at ").next().unwrap_or(&message);
        ServiceError::at(
            file,
            text,
            offset,
            format!("not well-formed XML: {message}"),
        )
    })
}

/// Parses `text`, the content of `file`, which a user wrote.
pub(super) fn parse_written<'a>(file: &Path, text: &'a str) -> Result<Document<'a>, ServiceError> {
    let hint = "close every tag and quote, and write &amp; and &lt; for & and < in values";
    parse(file, text, MAX_NODES).map_err(|error| error.or_hint(hint))
}

/// Byte offset of a line and a column in characters, both counted from 1.
fn offset_of(text: &str, row: u32, column: u32) -> usize {
    let mut start = 0;
    for _ in 1..row {
        match text[start..].find('\n') {
            Some(newline) => start += newline + 1,
            None => return text.len(),
        }
    }
    text[start..]
        .char_indices()
        .nth(column.saturating_sub(1) as usize)
        .map_or(text.len(), |(offset, _)| start + offset)
}

/// Refuses what costs the parser too much, a DTD and a wrong declaration of the encoding,
/// before the parser builds anything.
fn prescan(file: &Path, text: &str) -> Result<(), ServiceError> {
    // For each open element the namespace declarations in force.
    let mut open: Vec<usize> = Vec::new();
    let mut at = 0;
    // An incomplete token is left to the parser.
    while let Some((token, length)) = first_token(&text.as_bytes()[at..]) {
        let bytes = &text.as_bytes()[at..at + length];
        let refuse = |what: String| ServiceError::at(file, text, at, what);
        match token {
            Token::Dtd => return Err(refuse(DTD.into()).with_hint(DTD_HINT)),
            Token::Start if open.len() == MAX_DEPTH => return Err(refuse(too_deep())),
            Token::Start | Token::Empty => {
                let outer = open.last().copied().unwrap_or_default();
                let declared =
                    check_attributes(bytes, outer).map_err(|what| refuse(what).with_hint(FEWER))?;
                if token == Token::Start {
                    open.push(declared);
                }
            }
            Token::End => drop(open.pop()),
            Token::Other => check_declaration(bytes).map_err(|what| {
                refuse(what).with_hint("save the file as UTF-8 and write encoding=\"UTF-8\"")
            })?,
            Token::Text => {}
        }
        at += length;
    }
    Ok(())
}

/// Refuses too many attributes of `tag`. Returns the number of namespace declarations in
/// force in it, where `outer` are those in force around it.
fn check_attributes(tag: &[u8], outer: usize) -> Result<usize, String> {
    let (mut count, mut declared) = (0, outer);
    for (name, _) in attributes(tag) {
        count += 1;
        declared += usize::from(declares_namespace(name));
        if count > MAX_ATTRIBUTES {
            return Err(format!(
                "more than {MAX_ATTRIBUTES} attributes on an element"
            ));
        }
        if declared > MAX_ATTRIBUTES {
            return Err(format!(
                "more than {MAX_ATTRIBUTES} namespace declarations around an element"
            ));
        }
    }
    Ok(declared)
}

/// Refuses an XML declaration with another encoding than UTF-8, which every text has here:
/// a reader that believes the declaration sees other characters.
fn check_declaration(token: &[u8]) -> Result<(), String> {
    let declaration = token
        .strip_prefix(b"<?xml")
        .filter(|rest| rest.first().is_some_and(u8::is_ascii_whitespace));
    let mut declared = declaration.into_iter().flat_map(attributes);
    match declared.find(|(name, _)| *name == b"encoding") {
        Some((_, value)) if !value.eq_ignore_ascii_case(b"utf-8") => Err(format!(
            "declares the encoding \"{}\", but is UTF-8",
            value[..value.len().min(40)].escape_ascii()
        )),
        _ => Ok(()),
    }
}

pub(super) fn too_deep() -> String {
    format!("elements nested deeper than {MAX_DEPTH}")
}

/// The root of `document`, which must have this `name` and `namespace`.
pub(super) fn root<'a>(
    file: &'a Path,
    text: &'a str,
    document: &'a Document<'a>,
    name: &str,
    namespace: &str,
) -> Result<Element<'a>, ServiceError> {
    let root = Element {
        file,
        text,
        node: document.root_element(),
    };
    if root.name() != name {
        return Err(root
            .refuse(format!("expected <{name}>, found <{}>", root.name()))
            .with_hint(format!("write <{name} xmlns=\"{namespace}\" …>")));
    }
    match root.node.tag_name().namespace() {
        Some(found) if found == namespace => Ok(root),
        Some(found) => Err(root
            .refuse(format!("<{name}> is in the wrong namespace \"{found}\""))
            .with_hint(format!("write xmlns=\"{namespace}\""))),
        None => Err(root
            .refuse(format!("<{name}> has no namespace"))
            .with_hint(format!("write <{name} xmlns=\"{namespace}\" …>"))),
    }
}

impl<'a> Element<'a> {
    /// Local name.
    pub fn name(self) -> &'a str {
        self.node.tag_name().name()
    }

    /// Byte offset of the element in its file.
    pub fn start(self) -> usize {
        self.node.range().start
    }

    /// Where it is.
    pub fn location(self) -> SourceLocation {
        SourceLocation::of(self.file, self.text, self.start())
    }

    /// An error at this element.
    pub fn refuse(self, what: impl Into<String>) -> ServiceError {
        ServiceError::at(self.file, self.text, self.start(), what)
    }

    /// Refuses, by name, everything that `schema` does not list.
    pub fn check(self, schema: &Schema) -> Result<(), ServiceError> {
        let here = self.name();
        for attribute in self.node.attributes() {
            let name = attribute.name();
            let refuse = |what: String| {
                ServiceError::at(self.file, self.text, attribute.range().start, what)
            };
            if let Some(namespace) = attribute.namespace() {
                return Err(refuse(format!(
                    "unknown attribute \"{name}\" of namespace \"{namespace}\" on <{here}>"
                ))
                .with_hint("remove it"));
            }
            if schema.later_attributes.contains(&name) {
                return Err(refuse(format!(
                    "attribute \"{name}\" of <{here}> is not supported yet"
                ))
                .with_hint("remove it"));
            }
            if !schema.attributes.contains(&name) {
                return Err(refuse(format!("unknown attribute \"{name}\" on <{here}>"))
                    .with_hint(meant(name, schema.attributes, "attributes")));
            }
        }
        for node in self.node.children() {
            if node.is_element() {
                let child = Element { node, ..self };
                let name = child.name();
                if node.tag_name().namespace() != self.node.tag_name().namespace() {
                    return Err(child
                        .refuse(format!("<{name}> is in another namespace than <{here}>"))
                        .with_hint("remove the element or its xmlns"));
                }
                if schema.later_children.contains(&name) {
                    return Err(child
                        .refuse(format!("<{name}> is not supported yet"))
                        .with_hint("remove it"));
                }
                if !schema.children.contains(&name) {
                    return Err(child
                        .refuse(format!("unknown element <{name}> in <{here}>"))
                        .with_hint(meant(name, schema.children, "elements")));
                }
            } else if node.is_text() && node.text().is_some_and(|text| !text.trim().is_empty()) {
                let start = node.range().start;
                let lead = self.text[start..].len() - self.text[start..].trim_start().len();
                let what = format!("unexpected text in <{here}>");
                return Err(ServiceError::at(self.file, self.text, start + lead, what)
                    .with_hint("remove it: values are written as attributes"));
            }
        }
        Ok(())
    }

    /// Every child element named `name`.
    pub fn children(self, name: &'static str) -> impl Iterator<Item = Element<'a>> {
        self.node
            .children()
            .filter(move |node| node.is_element() && node.tag_name().name() == name)
            .map(move |node| Element { node, ..self })
    }

    /// The child named `name`, if there is one; a second is refused.
    pub fn child(self, name: &'static str) -> Result<Option<Element<'a>>, ServiceError> {
        let mut found = self.children(name);
        let first = found.next();
        match found.next() {
            Some(second) => Err(second
                .refuse(format!("second <{name}> in <{}>", self.name()))
                .with_hint("merge it into the first")),
            None => Ok(first),
        }
    }

    /// The only child named `name`.
    pub fn required_child(self, name: &'static str) -> Result<Element<'a>, ServiceError> {
        self.child(name)?
            .ok_or_else(|| self.refuse(format!("<{}> has no <{name}>", self.name())))
    }

    /// The text of the only child named `name`, which must contain only text.
    pub fn leaf(self, name: &'static str) -> Result<&'a str, ServiceError> {
        let child = self.required_child(name)?;
        if child.node.attributes().len() > 0 {
            return Err(child.refuse(format!("unknown attribute on <{name}>")));
        }
        let mut nodes = child.node.children();
        match (nodes.next(), nodes.next()) {
            (None, _) => Ok(""),
            (Some(node), None) if node.is_text() => Ok(node.text().unwrap_or_default()),
            _ => Err(child.refuse(format!("<{name}> holds more than text"))),
        }
    }

    /// The attribute `name`, if there is one.
    pub fn attribute(self, name: &str) -> Option<Value<'a>> {
        let attribute = self
            .node
            .attributes()
            .find(|attribute| attribute.namespace().is_none() && attribute.name() == name)?;
        Some(Value {
            element: self,
            attribute,
            text: attribute.value(),
        })
    }

    /// The attribute `name`, which is required.
    pub fn required(self, name: &str) -> Result<Value<'a>, ServiceError> {
        self.attribute(name).ok_or_else(|| {
            self.refuse(format!("<{}> has no attribute \"{name}\"", self.name()))
                .with_hint(format!("add {name}=\"…\""))
        })
    }
}

impl<'a> Value<'a> {
    /// Byte offset of the value in its file.
    pub fn start(self) -> usize {
        self.attribute.range_value().start
    }

    /// Where it is.
    pub fn location(self) -> SourceLocation {
        SourceLocation::of(self.element.file, self.element.text, self.start())
    }

    /// An error at this value.
    pub fn refuse(self, what: impl Into<String>) -> ServiceError {
        ServiceError::at(self.element.file, self.element.text, self.start(), what)
    }

    /// `name="value"` for messages.
    pub fn quoted(self) -> String {
        format!("{}=\"{}\"", self.attribute.name(), self.text)
    }

    /// An `xs:boolean`.
    pub fn boolean(self) -> Result<bool, ServiceError> {
        match self.text {
            "true" | "1" => Ok(true),
            "false" | "0" => Ok(false),
            _ => Err(self
                .refuse(format!("{} is neither true nor false", self.quoted()))
                .with_hint("write \"true\" or \"false\"")),
        }
    }

    /// A whole number from `range`.
    pub fn number(self, range: std::ops::RangeInclusive<u64>) -> Result<u64, ServiceError> {
        let digits = !self.text.is_empty() && self.text.bytes().all(|byte| byte.is_ascii_digit());
        let number = self.text.parse().ok().filter(|_| digits);
        number.filter(|n| range.contains(n)).ok_or_else(|| {
            let (low, high) = (range.start(), range.end());
            self.refuse(format!(
                "{} is not a number from {low} to {high}",
                self.quoted()
            ))
            .with_hint(format!("write a whole number from {low} to {high}"))
        })
    }

    /// A name that is safe as a file name and in messages: letters, digits, `_`,
    /// `-` and `.`, not `-` or `.` first, at most 64 bytes.
    pub fn identifier(self) -> Result<&'a str, ServiceError> {
        self.identifier_of(64)
    }

    /// As [`Self::identifier`], but at most `longest` bytes.
    pub fn identifier_of(self, longest: usize) -> Result<&'a str, ServiceError> {
        let name = self.text;
        let first = name.bytes().next();
        let fits = first.is_some_and(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
            && name.len() <= longest
            && name
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte));
        if fits {
            return Ok(name);
        }
        Err(self
            .refuse(format!("{} is not a usable name", self.quoted()))
            .with_hint(format!(
                "use 1 to {longest} letters, digits, \"_\", \"-\" and \".\", not \"-\" or \".\" first"
            )))
    }
}

/// Names that are already used, to refuse duplicates.
pub(super) struct Names {
    what: &'static str,
    taken: HashSet<String>,
}

impl Names {
    /// An empty set of names of `what`.
    pub fn of(what: &'static str) -> Self {
        Self {
            what,
            taken: HashSet::new(),
        }
    }

    /// Adds `value`. Names differing only in ASCII case are duplicates, as on the
    /// classic platform.
    pub fn take(&mut self, value: Value<'_>) -> Result<(), ServiceError> {
        if self.taken.insert(value.text.to_ascii_lowercase()) {
            return Ok(());
        }
        Err(value
            .refuse(format!("duplicate {} \"{}\"", self.what, value.text))
            .with_hint("names are compared without regard to case; rename one"))
    }
}

/// The hint for a name that is not in `known`.
pub(super) fn meant(name: &str, known: &[&'static str], what: &str) -> String {
    if let Some(near) = nearest(name, known.iter().copied()) {
        return format!("did you mean \"{near}\"?");
    }
    if known.is_empty() {
        return format!("remove it: no {what} are allowed here");
    }
    format!("remove it; {what} allowed here: {}", known.join(", "))
}

/// `text` as the value of an attribute in double quotes.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            // Attribute-value normalisation turns literal ones into spaces.
            '\t' => escaped.push_str("&#9;"),
            '\n' => escaped.push_str("&#10;"),
            '\r' => escaped.push_str("&#13;"),
            c => escaped.push(c),
        }
    }
    escaped
}

//! Splits XML into tokens, so that tags can be found without parsing. Whether a
//! text is well-formed is left to the parser.

/// Kind of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Token {
    /// Character data, or a part of it.
    Text,
    /// Start tag.
    Start,
    /// Tag of an empty element: `<name/>`.
    Empty,
    /// End tag.
    End,
    /// Comment, CDATA section or processing instruction.
    Other,
    /// Document type declaration; its length is not known.
    Dtd,
}

/// The first token of `bytes` and its length; none if its end is not in `bytes`.
pub(super) fn first_token(bytes: &[u8]) -> Option<(Token, usize)> {
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

/// Name and value of each attribute in `tag`, up to the first that is malformed: there the
/// parser stops as well.
pub(super) fn attributes(tag: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    let mut rest = tag;
    std::iter::from_fn(move || {
        let equals = rest.iter().position(|byte| *byte == b'=')?;
        let before = rest[..equals].trim_ascii_end();
        let name = before.rsplit(u8::is_ascii_whitespace).next()?;
        let (quote, value) = rest[equals + 1..].trim_ascii_start().split_first()?;
        let length = match quote {
            b'"' | b'\'' => value.iter().position(|byte| byte == quote)?,
            _ => return None,
        };
        rest = &value[length + 1..];
        Some((name, &value[..length]))
    })
}

/// Whether `name` is that of a namespace declaration.
pub(super) fn declares_namespace(name: &[u8]) -> bool {
    name == b"xmlns" || name.starts_with(b"xmlns:")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_found_without_a_parser() {
        let found = |tag: &'static str| -> Vec<(&str, &str)> {
            let text = |bytes| std::str::from_utf8(bytes).unwrap();
            let pairs = attributes(tag.as_bytes());
            pairs
                .map(|(name, value)| (text(name), text(value)))
                .collect()
        };
        assert_eq!(found("<a>"), []);
        assert_eq!(
            found("<a b='1=\"2' \n c = \"'>\"/>"),
            [("b", "1=\"2"), ("c", "'>")]
        );
        assert_eq!(found("<?xml version='1.0'?>"), [("version", "1.0")]);
        for rest in ["d", "d=", "d=x", "d=\"x", "d==\"x\""] {
            let tag = format!("<a b='1' {rest}>").leak();
            assert_eq!(found(tag), [("b", "1")], "{tag}");
        }
    }
}

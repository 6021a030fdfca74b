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

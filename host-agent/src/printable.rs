//! The one filter of text from guests, packages and files that goes to a terminal or to
//! a line of a log: without it the text could drive the terminal, forge a line, or show
//! its characters in another order.

const REPLACEMENT: &str = "\u{fffd}";

/// Whether `c` is shown as itself: not a control character (Cc), an invisible or
/// direction-changing format character (Cf), or a line or paragraph separator.
pub fn is_printable(c: char) -> bool {
    !c.is_control() && !is_format(c) && !matches!(c, '\u{2028}' | '\u{2029}')
}

/// Unicode 16.0, general category Cf.
const fn is_format(c: char) -> bool {
    matches!(c,
        '\u{ad}'
        | '\u{600}'..='\u{605}'
        | '\u{61c}'
        | '\u{6dd}'
        | '\u{70f}'
        | '\u{890}'..='\u{891}'
        | '\u{8e2}'
        | '\u{180e}'
        | '\u{200b}'..='\u{200f}'
        | '\u{202a}'..='\u{202e}'
        | '\u{2060}'..='\u{2064}'
        | '\u{2066}'..='\u{206f}'
        | '\u{feff}'
        | '\u{fff9}'..='\u{fffb}'
        | '\u{110bd}'
        | '\u{110cd}'
        | '\u{13430}'..='\u{1343f}'
        | '\u{1bca0}'..='\u{1bca3}'
        | '\u{1d173}'..='\u{1d17a}'
        | '\u{e0001}'
        | '\u{e0020}'..='\u{e007f}')
}

/// `text` with every character replaced that is neither printable nor in `kept`.
fn filtered(text: &str, kept: &[char]) -> String {
    text.replace(|c| !is_printable(c) && !kept.contains(&c), REPLACEMENT)
}

/// `text` with every character replaced that is not printable.
pub fn printable(text: &str) -> String {
    filtered(text, &[])
}

/// As [`printable`], but keeps tabs.
pub fn printable_code(text: &str) -> String {
    filtered(text, &['\t'])
}

/// As [`printable`], but keeps newlines.
pub fn printable_lines(text: &str) -> String {
    filtered(text, &['\n'])
}

/// A line of a log: characters that are not printable, but for tabs, become escape
/// sequences of Rust, so that nothing is lost.
pub fn escaped(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for c in text.chars() {
        if is_printable(c) || c == '\t' {
            line.push(c);
        } else {
            line.extend(c.escape_default());
        }
    }
    line
}

/// The same JSON document with the characters escaped that are not printable. They can
/// only be in strings; the newlines between the values stay.
pub fn printable_json(document: &str) -> String {
    let mut text = String::with_capacity(document.len());
    for c in document.chars() {
        if is_printable(c) || c == '\n' {
            text.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                text.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    text
}

/// Makes a stream of bytes printable piece by piece. Keeps newlines and tabs, and drops
/// the carriage return before a newline, which serial consoles send.
#[derive(Debug, Default)]
pub struct PrintableStream {
    /// The beginning of a character, or a carriage return.
    held: Vec<u8>,
}

impl PrintableStream {
    /// The printable form of what is complete after `bytes`.
    pub fn next(&mut self, bytes: &[u8]) -> String {
        self.held.extend_from_slice(bytes);
        let complete = complete(&self.held);
        let rest = self.held.split_off(complete);
        let whole = std::mem::replace(&mut self.held, rest);
        shown(&whole)
    }

    /// What is left at the end of the stream.
    pub fn end(self) -> String {
        shown(&self.held)
    }
}

fn shown(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes).replace("\r\n", "\n");
    filtered(&text, &['\n', '\t'])
}

/// Length of `bytes` without an unfinished character or a carriage return at the end.
fn complete(bytes: &[u8]) -> usize {
    if bytes.ends_with(b"\r") {
        return bytes.len() - 1;
    }
    let last = bytes.utf8_chunks().last();
    let unfinished = last.map_or(&[][..], |chunk| chunk.invalid());
    // Each pattern is the beginning of a longer character.
    let may_continue = matches!(
        unfinished,
        [0xc2..=0xf4] | [0xe0..=0xf4, _] | [0xf0..=0xf4, _, _]
    );
    bytes.len() - if may_continue { unfinished.len() } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A character of each kind: escape, C1 control, soft hyphen, zero width, bidi override
    /// and isolate, separators, byte order mark, tag.
    const UNPRINTABLE: [char; 11] = [
        '\u{1b}',
        '\u{9b}',
        '\u{ad}',
        '\u{200b}',
        '\u{202e}',
        '\u{2067}',
        '\u{2028}',
        '\u{2029}',
        '\u{feff}',
        '\u{7f}',
        '\u{e0041}',
    ];

    #[test]
    fn control_characters_are_replaced_one_by_one() {
        assert_eq!(printable("a\u{1b}[2J\nb\u{9b}c\t"), "a�[2J�b�c�");
        assert_eq!(printable_code("\ta\n"), "\ta�");
        assert_eq!(printable_lines("\ta\nb"), "�a\nb");
    }

    #[test]
    fn no_form_lets_an_unprintable_character_pass() {
        for c in UNPRINTABLE {
            let text = format!("a{c}b");
            let shown = [
                printable(&text),
                printable_code(&text),
                printable_lines(&text),
                escaped(&text),
                printable_json(&text),
                PrintableStream::default().next(text.as_bytes()),
            ];
            for shown in shown {
                assert!(!shown.contains(c) && shown.len() > 2, "{c:?}: {shown}");
            }
        }
        // Rust's own list also has unassigned characters, and so is larger.
        for c in (0..=0x0010_ffff).filter_map(char::from_u32) {
            assert!(is_printable(c) || c.escape_debug().count() > 1, "{c:?}");
        }
        assert_eq!(printable("Grüße, 世界 🙂"), "Grüße, 世界 🙂");
    }

    #[test]
    fn an_escaped_line_and_json_keep_the_characters() {
        assert_eq!(
            escaped("a\tb\x1b[31m\r\u{202e}"),
            "a\tb\\u{1b}[31m\\r\\u{202e}"
        );
        let value = serde_json::Value::from(UNPRINTABLE.iter().collect::<String>());
        let text = printable_json(&value.to_string());
        assert!(text.is_ascii(), "{text}");
        assert_eq!(
            serde_json::from_str::<serde_json::Value>(&text).unwrap(),
            value
        );
    }

    #[test]
    fn a_stream_gives_the_same_text_however_it_is_cut() {
        let bytes = "eins\r\nzwölf\t世界 🙂\u{1b}[2J\rx\u{202e}\n".as_bytes();
        let bytes = [bytes, b"\xff\xc3(\xf0\x9f\n\xe4\xb8"].concat();
        let whole = {
            let mut stream = PrintableStream::default();
            stream.next(&bytes) + &stream.end()
        };
        assert_eq!(whole, "eins\nzwölf\t世界 🙂�[2J�x�\n��(�\n�");
        for size in 1..bytes.len() {
            let mut stream = PrintableStream::default();
            let mut shown = String::new();
            for piece in bytes.chunks(size) {
                shown.push_str(&stream.next(piece));
            }
            assert_eq!(shown + &stream.end(), whole, "pieces of {size} bytes");
        }
    }
}

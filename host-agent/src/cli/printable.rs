//! Removes control characters from text of guests, packages and file names, which
//! could otherwise drive the terminal or forge a line.

const REPLACEMENT: &str = "\u{fffd}";

/// `text` with every control character replaced.
pub fn printable(text: &str) -> String {
    text.replace(char::is_control, REPLACEMENT)
}

/// As [`printable`], but keeps tabs.
pub fn printable_code(text: &str) -> String {
    text.replace(|c: char| c.is_control() && c != '\t', REPLACEMENT)
}

/// As [`printable`], but keeps newlines.
pub fn printable_lines(text: &str) -> String {
    text.replace(|c: char| c.is_control() && c != '\n', REPLACEMENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_replaced_one_by_one() {
        assert_eq!(printable("a\u{1b}[2J\nb\u{9b}c\t"), "a�[2J�b�c�");
        assert_eq!(printable_code("\ta\n"), "\ta�");
        assert_eq!(printable_lines("\ta\nb"), "�a\nb");
    }
}

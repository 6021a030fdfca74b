//! Text of others made fit for a terminal.

/// `text` on one line and without control sequences: what a guest, a package
/// or a file name holds must neither drive the terminal nor forge a line.
pub fn printable(text: &str) -> String {
    text.chars().map(harmless).collect()
}

/// As [`printable`], but with its tabs.
pub fn printable_code(text: &str) -> String {
    let keep_tab = |c| if c == '\t' { c } else { harmless(c) };
    text.chars().map(keep_tab).collect()
}

/// As [`printable`], but with its lines.
pub fn printable_lines(text: &str) -> String {
    let keep_newline = |c| if c == '\n' { c } else { harmless(c) };
    text.chars().map(keep_newline).collect()
}

fn harmless(c: char) -> char {
    if c.is_control() { '\u{fffd}' } else { c }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_drives_a_terminal_is_replaced_in_place() {
        assert_eq!(printable("a\u{1b}[2J\nb\u{9b}c\t"), "a�[2J�b�c�");
        assert_eq!(printable_code("\ta\n"), "\ta�");
        assert_eq!(printable_lines("\ta\nb"), "�a\nb");
    }
}

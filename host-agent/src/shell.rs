//! Quotes arguments of commands that a user may copy into a shell.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::os::unix::ffi::OsStrExt as _;

use crate::printable::is_printable;

/// `argument` as bash reads it back, in quotes only where it needs them. Characters
/// that are not printable are escaped, because the result goes to terminals.
pub fn quoted(argument: impl AsRef<OsStr>) -> String {
    let bytes = argument.as_ref().as_bytes();
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"_@%+=:,./-".contains(byte);
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.is_empty() && bytes.iter().all(plain) => text.to_owned(),
        Ok(text) if text.chars().all(is_printable) => {
            format!("'{}'", text.replace('\'', r"'\''"))
        }
        _ => {
            let mut text = String::from("$'");
            for byte in bytes {
                match byte {
                    b'\'' | b'\\' => {
                        text.push('\\');
                        text.push(char::from(*byte));
                    }
                    b' '..=b'~' => text.push(char::from(*byte)),
                    // Always three digits: the next character may be a digit.
                    byte => {
                        let _ = write!(text, "\\{byte:03o}");
                    }
                }
            }
            text.push('\'');
            text
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_shell_reads_back_a_quoted_argument() {
        let cases: [&[u8]; 9] = [
            b"./redis",
            b"",
            b"my dir/s\xc3\xa9rvice",
            b"it's $HOME `x` \"y\" \\",
            b"~root",
            b"line\nend\x1b[2J'\\1",
            b"\xff\xfe0",
            "over\u{202e}ride\u{2028}".as_bytes(),
            b"a;b&c|d<e>f(g)*?#!",
        ];
        for case in cases {
            let argument = OsStr::from_bytes(case);
            let command = format!("printf %s {}", quoted(argument));
            assert!(command.chars().all(is_printable), "{command:?}");
            let output = Command::new("bash").args(["-c", &command]).output();
            assert_eq!(output.unwrap().stdout, case, "{command}");
        }
        assert_eq!(quoted("./redis"), "./redis");
        assert_eq!(quoted("a b"), "'a b'");
    }
}

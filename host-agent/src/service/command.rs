//! Splits a `commandLine` into the program and its arguments.

/// Words of `line`, separated by blanks. Double quotes hold a word together, and
/// `\"` inside them is a quote. Backslashes and single quotes are otherwise
/// literal, as on Windows (a POSIX splitter would change them), and nothing is
/// expanded.
///
/// # Errors
/// What is wrong with the line.
pub(super) fn words(line: &str) -> Result<Vec<String>, String> {
    if line.chars().any(|c| c.is_control() && c != '\t') {
        return Err("the command line contains a line break or control character".into());
    }
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quoted = false;
    let mut chars = line.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '"' => {
                quoted = !quoted;
                word.get_or_insert_default();
            }
            '\\' if quoted && chars.peek() == Some(&'"') => {
                chars.next();
                word.get_or_insert_default().push('"');
            }
            ' ' | '\t' if !quoted => words.extend(word.take()),
            c => word.get_or_insert_default().push(c),
        }
    }
    if quoted {
        return Err("the command line has an unclosed double quote".into());
    }
    words.extend(word);
    Ok(words)
}

/// `program` as a path below approot with `/` between its parts.
///
/// # Errors
/// Why the path is refused.
pub(super) fn program(program: &str) -> Result<String, String> {
    let path = program.replace('\\', "/");
    let drive = path.len() >= 2 && path.as_bytes()[1] == b':';
    if path.starts_with('/') || drive {
        return Err(format!("the program \"{program}\" is an absolute path"));
    }
    let mut parts = Vec::new();
    for part in path.split('/') {
        match part {
            "." => {}
            "" => return Err(format!("the path of \"{program}\" has an empty part")),
            ".." => {
                return Err(format!(
                    "the program \"{program}\" leaves approot by \"..\""
                ));
            }
            part => parts.push(part),
        }
    }
    if parts.is_empty() {
        return Err(format!("the program \"{program}\" is not a file"));
    }
    Ok(parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_command_line_is_split_at_blanks_outside_quotes() {
        let split = |line| words(line).unwrap();
        assert_eq!(split("run.sh"), ["run.sh"]);
        assert_eq!(split("  a  b\tc "), ["a", "b", "c"]);
        assert_eq!(split(r#""my app" --x="a b" """#), ["my app", "--x=a b", ""]);
        assert_eq!(split(r#"a "say \"hi\"" b\c"#), ["a", "say \"hi\"", "b\\c"]);
        assert_eq!(
            split("a;b $(c) %D% 'e f'"),
            ["a;b", "$(c)", "%D%", "'e", "f'"]
        );
        assert!(words("a \"b").is_err());
        assert!(words("a\nb").is_err());
    }

    #[test]
    fn a_program_stays_under_approot() {
        assert_eq!(program(r"bin\server").unwrap(), "bin/server");
        assert_eq!(program("./run.sh").unwrap(), "run.sh");
        for bad in [
            "/bin/sh",
            r"C:\x",
            "../x",
            r"a\..\..\x",
            "",
            ".",
            "a//b",
            "a/",
            r"\x",
        ] {
            assert!(program(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn splitting_reverses_quoting(
            expected in proptest::collection::vec("[ -!#-\\[\\]-~äß]{0,12}", 0..6),
        ) {
            let line = expected.iter().map(|w| format!("\"{w}\"")).collect::<Vec<_>>().join(" ");
            prop_assert_eq!(words(&line).unwrap(), expected);
        }
    }
}

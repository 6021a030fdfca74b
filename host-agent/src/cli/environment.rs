//! Settings from environment variables, and the error format of a command line
//! that does not parse.

use std::ffi::{OsStr, OsString};

use clap::ValueEnum;

use super::args::{ErrorFormat, Format};
use super::error::{CliError, Code};

/// The value of the variable `name`; an empty one counts as unset.
///
/// # Errors
/// The value is not one of `T`'s.
pub fn choice<T: ValueEnum>(name: &str) -> Result<Option<T>, CliError> {
    match std::env::var_os(name) {
        Some(value) => parse(name, &value),
        None => Ok(None),
    }
}

fn parse<T: ValueEnum>(name: &str, value: &OsStr) -> Result<Option<T>, CliError> {
    if value.is_empty() {
        return Ok(None);
    }
    let value = value.to_string_lossy();
    T::from_str(&value, false).map(Some).map_err(|_| {
        let names = T::value_variants().iter();
        let names: Vec<_> = names
            .filter_map(|variant| Some(variant.to_possible_value()?.get_name().to_owned()))
            .collect();
        CliError::new(Code::Usage, format!("{name}={value} is not a valid value"))
            .cause(format!("valid values: {}", names.join(", ")))
            .hint(format!("unset {name}"))
    })
}

/// Whether to print errors as JSON, by `arguments` that the parser refused and
/// `format`, the value of `HOST_AGENT_FORMAT`.
pub fn errors_are_json(arguments: impl IntoIterator<Item = OsString>, format: &OsStr) -> bool {
    let mut output_format = parse::<Format>("", format).ok().flatten();
    let mut error_format = None;
    let arguments: Vec<_> = arguments
        .into_iter()
        .map(|argument| argument.to_string_lossy().into_owned())
        .take_while(|argument| argument != "--")
        .collect();
    let mut json = false;
    for (index, argument) in arguments.iter().enumerate() {
        let (name, value) = match argument.split_once('=') {
            Some((name, value)) => (name, value),
            None => (
                argument.as_str(),
                arguments.get(index + 1).map_or("", String::as_str),
            ),
        };
        match name {
            "--json" => json = true,
            "--format" => output_format = Format::from_str(value, false).ok().or(output_format),
            "--error-format" => error_format = ErrorFormat::from_str(value, false).ok(),
            _ => {}
        }
    }
    match error_format {
        Some(format) => format == ErrorFormat::Json,
        None => json || output_format.is_some_and(|format| format != Format::Table),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_value_names_the_variable_and_an_empty_one_is_unset() {
        let parse = |value: &str| parse::<Format>("HOST_AGENT_FORMAT", OsStr::new(value));
        assert_eq!(parse("").unwrap(), None);
        assert_eq!(parse("jsonl").unwrap(), Some(Format::Jsonl));
        let error = parse("xml").unwrap_err();
        assert_eq!(error.what(), "HOST_AGENT_FORMAT=xml is not a valid value");
        assert!(error.human(false).contains("table, json, jsonl"));
        assert_eq!(error.hint_text(), Some("unset HOST_AGENT_FORMAT"));
    }

    #[test]
    fn the_error_format_is_found_in_a_line_that_does_not_parse() {
        let json = |line: &str, variable: &str| {
            let arguments = line.split(' ').map(OsString::from);
            errors_are_json(arguments, OsStr::new(variable))
        };
        for line in [
            "x --json bogus",
            "x --format json bogus",
            "x --format=jsonl bogus",
            "x bogus --format jsonl",
            "x --error-format json bogus",
            "x --error-format=json bogus",
        ] {
            assert!(json(line, ""), "{line}");
        }
        assert!(json("x bogus", "json") && json("x bogus", "jsonl"));
        for line in [
            "x bogus",
            "x --format table bogus",
            "x exec A -- --json",
            "x --json --error-format human bogus",
        ] {
            assert!(!json(line, ""), "{line}");
        }
        assert!(!json("x bogus", "xml") && !json("x --format table bogus", "json"));
    }
}

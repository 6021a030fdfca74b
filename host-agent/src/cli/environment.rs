//! Settings from environment variables, and what can be told of the command
//! line before it is understood.

use std::ffi::{OsStr, OsString};

use clap::ValueEnum;

use super::args::{ErrorFormat, Format};
use super::error::{CliError, Code};

/// The value of the variable `name`; empty is as good as unset.
///
/// # Errors
/// It is none of the values that there are.
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
        CliError::new(Code::Usage, format!("{name}={value} makes no sense"))
            .cause(format!("the values are {}", names.join(", ")))
            .hint(format!("unset {name}"))
    })
}

/// Whether errors are to be JSON, by `arguments` that need make no sense and
/// by the value of `HOST_AGENT_FORMAT`.
pub fn errors_are_json(arguments: impl IntoIterator<Item = OsString>, format: &OsStr) -> bool {
    let mut of_answer = parse::<Format>("", format).ok().flatten();
    let mut of_errors = None;
    let arguments: Vec<_> = arguments
        .into_iter()
        .map(|argument| argument.to_string_lossy().into_owned())
        .take_while(|argument| argument != "--")
        .collect();
    let mut json = false;
    for (place, argument) in arguments.iter().enumerate() {
        let (name, value) = match argument.split_once('=') {
            Some((name, value)) => (name, value),
            None => (
                argument.as_str(),
                arguments.get(place + 1).map_or("", String::as_str),
            ),
        };
        match name {
            "--json" => json = true,
            "--format" => of_answer = Format::from_str(value, false).ok().or(of_answer),
            "--error-format" => of_errors = ErrorFormat::from_str(value, false).ok(),
            _ => {}
        }
    }
    match of_errors {
        Some(format) => format == ErrorFormat::Json,
        None => json || of_answer.is_some_and(|format| format != Format::Table),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_value_of_a_variable_names_the_variable_and_an_empty_one_is_none() {
        let parse = |value: &str| parse::<Format>("HOST_AGENT_FORMAT", OsStr::new(value));
        assert_eq!(parse("").unwrap(), None);
        assert_eq!(parse("jsonl").unwrap(), Some(Format::Jsonl));
        let error = parse("xml").unwrap_err();
        assert_eq!(error.what(), "HOST_AGENT_FORMAT=xml makes no sense");
        assert!(error.human(false).contains("table, json, jsonl"));
        assert_eq!(error.hint_text(), Some("unset HOST_AGENT_FORMAT"));
    }

    #[test]
    fn the_form_of_errors_is_found_in_a_line_that_makes_no_sense() {
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

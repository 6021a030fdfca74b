//! `host-agent explain`: what an error number means and what to do, from docs/errors.md.

use clap::Args;
use serde_json::json;

use super::error::{CliError, Code};
use super::exit::Exit;
use super::output::Output;

/// The manual's page, the one source of these texts.
const MANUAL: &str = include_str!("../../../docs/errors.md");

/// `explain`.
#[derive(Debug, Clone, Args)]
pub struct ExplainArgs {
    /// Number of an error, such as HA-0204 or 204; all of them if left out
    #[arg(value_name = "HA-nnnn")]
    pub number: Option<String>,
}

/// What the manual says about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    name: &'static str,
    exit: &'static str,
    meaning: &'static str,
    /// What to do.
    text: &'static str,
}

/// Prints the entry of a number, or the list of all numbers.
pub fn run(args: &ExplainArgs, output: &Output) -> Result<Exit, CliError> {
    let entries: Vec<_> = entries().collect();
    let shown = match &args.number {
        None => entries,
        Some(number) => vec![find(&entries, number)?],
    };
    let text: Vec<_> = shown
        .iter()
        .map(|entry| match args.number {
            None => format!("{}  exit {:>3}  {}", entry.name, entry.exit, entry.meaning),
            Some(_) => format!(
                "{}: {} (exit code {})\n\n{}",
                entry.name, entry.meaning, entry.exit, entry.text
            ),
        })
        .collect();
    output.answer(&text.join("\n"), || {
        let errors = shown.iter().map(|entry| {
            json!({
                "code": entry.name,
                "exit_code": entry.exit.parse::<u8>().ok(),
                "meaning": entry.meaning,
                "text": entry.text,
            })
        });
        json!({"schema": "host-agent.explain/1", "errors": errors.collect::<Vec<_>>()})
    })?;
    Ok(Exit::Success)
}

fn find(entries: &[Entry], number: &str) -> Result<Entry, CliError> {
    let digits = number.trim_start_matches(|c: char| !c.is_ascii_digit());
    let wanted = digits.parse::<u16>().map(|it| format!("HA-{it:04}"));
    let found = wanted.ok().and_then(|wanted| {
        let mut entries = entries.iter();
        entries.find(|entry| entry.name == wanted).copied()
    });
    found.ok_or_else(|| {
        let what = format!("this version has no error {number}");
        CliError::new(Code::NoSuchError, what).hint("host-agent explain   (lists all)")
    })
}

/// The rows of the table of numbers, each with the section that has its number as title.
fn entries() -> impl Iterator<Item = Entry> {
    MANUAL.lines().filter_map(|line| {
        let row = line.strip_prefix("| ")?.strip_suffix(" |")?;
        let mut cells = row.splitn(3, " | ");
        let name = cells.next().filter(|name| name.starts_with("HA-"))?;
        Some(Entry {
            name,
            exit: cells.next()?,
            meaning: cells.next()?,
            text: section(name).unwrap_or_default(),
        })
    })
}

fn section(name: &str) -> Option<&'static str> {
    let title = format!("\n### {name}\n");
    let (_, text) = MANUAL.split_once(&title)?;
    let end = text.find("\n#").unwrap_or(text.len());
    Some(text[..end].trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_error_of_the_manual_says_what_to_do() {
        let all: Vec<_> = entries().collect();
        assert!(all.len() > 30);
        for entry in all {
            assert!(entry.text.ends_with('.'), "{}: {}", entry.name, entry.text);
            assert!(entry.exit.parse::<u8>().is_ok(), "{entry:?}");
        }
    }

    #[test]
    fn a_number_is_found_however_it_is_written() {
        let all: Vec<_> = entries().collect();
        for number in ["HA-0204", "ha-0204", "0204", "204", "error[HA-0204"] {
            assert_eq!(find(&all, number).unwrap().name, "HA-0204");
        }
        for number in ["HA-9999", "", "HA-", "99999999"] {
            let error = find(&all, number).unwrap_err();
            assert_eq!(error.exit(), Exit::NotFound, "{number}");
        }
    }
}

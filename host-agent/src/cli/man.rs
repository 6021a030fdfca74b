//! `host-agent man`: the manual pages, made of the same descriptions as `--help`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use clap::{Args, Command, CommandFactory as _};
use clap_mangen::Man;
use serde_json::json;

use super::args::CommandLine;
use super::error::{CliError, Code};
use super::exit::Exit;
use super::output::{self, Output};

/// `man`.
#[derive(Debug, Clone, Args)]
pub struct ManArgs {
    /// Print the page of this verb, such as `service apply` [default: of the program]
    #[arg(value_name = "VERB", conflicts_with = "dir")]
    pub verb: Vec<String>,
    /// Write all pages to this directory
    #[arg(long)]
    pub dir: Option<PathBuf>,
}

/// A page: its file name and its text.
type Page = (String, Vec<u8>);

/// Prints or writes pages.
pub fn run(args: &ManArgs, output: &Output) -> Result<Exit, CliError> {
    if let Some(dir) = &args.dir {
        let pages = pages().map_err(|error| cannot_write(dir, &error))?;
        write(dir, &pages).map_err(|error| cannot_write(dir, &error))?;
        let names: Vec<_> = pages.iter().map(|(name, _)| name).collect();
        output.answer(
            &format!("wrote {} pages to {}", pages.len(), dir.display()),
            || json!({"schema": "host-agent.man/1", "directory": dir.display().to_string(), "pages": names}),
        )?;
        return Ok(Exit::Success);
    }
    let name = std::iter::once("host-agent").chain(args.verb.iter().map(String::as_str));
    let name = name.collect::<Vec<_>>().join("-") + ".1";
    let pages = pages().map_err(|error| output::cannot_write(&error))?;
    let Some((_, page)) = pages.iter().find(|(found, _)| *found == name) else {
        let what = format!("there is no verb {}", args.verb.join(" "));
        return Err(CliError::new(Code::Usage, what).hint("host-agent --help"));
    };
    output::write(page)?;
    Ok(Exit::Success)
}

/// The page of the program and of each verb.
fn pages() -> io::Result<Vec<Page>> {
    let mut command = CommandLine::command().disable_help_subcommand(true);
    command.build();
    let mut pages = Vec::new();
    add(&command, "host-agent", &mut pages)?;
    Ok(pages)
}

fn add(command: &Command, name: &str, pages: &mut Vec<Page>) -> io::Result<()> {
    let mut page = Vec::new();
    Man::new(command.clone().display_name(name.to_owned()))
        .title(name)
        .render(&mut page)?;
    pages.push((format!("{name}.1"), page));
    for verb in command.get_subcommands().filter(|it| !it.is_hide_set()) {
        add(verb, &format!("{name}-{}", verb.get_name()), pages)?;
    }
    Ok(())
}

fn write(dir: &Path, pages: &[Page]) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    pages
        .iter()
        .try_for_each(|(name, page)| fs::write(dir.join(name), page))
}

fn cannot_write(dir: &Path, error: &io::Error) -> CliError {
    let exit = match error.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Exit::Permission,
        _ => Exit::Unclassified,
    };
    CliError::new(Code::Output, format!("cannot write to {}", dir.display()))
        .cause(error.to_string())
        .exit_with(exit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_verb_has_a_page_with_its_options_and_examples() {
        let pages = pages().unwrap();
        let page = |name: &str| {
            let found = pages.iter().find(|(found, _)| found == name);
            let text = String::from_utf8(found.unwrap().1.clone()).unwrap();
            // roff writes a hyphen as `\\-`.
            text.replace('\\', "")
        };
        let apply = page("host-agent-service-apply.1");
        for text in ["host-agent-service-apply", "--dry-run", "Examples:"] {
            assert!(apply.contains(text), "{text} in {apply}");
        }
        assert!(page("host-agent.1").contains("host-agent-exec(1)"));
        assert!(!pages.iter().any(|(name, _)| name.contains("freeze")));
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &pages).unwrap();
        write(dir.path(), &pages).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), pages.len());
    }
}

//! The command line: verbs, output, exit codes.

mod agent;
mod args;
mod completion;
mod config;
mod cp;
mod deploy;
mod doctor;
mod endpoint_probe;
mod environment;
mod error;
mod events;
mod evidence;
mod exec;
mod exit;
mod explain;
mod gc;
mod image;
mod init;
mod instances;
mod interrupt;
mod log;
mod logs;
mod lossless_output;
mod man;
mod meter;
mod names;
mod output;
mod package;
mod report;
mod run;
mod running;
mod serve;
mod service;
mod service_manager;
mod terminal;
mod test;
mod ticker;
mod top;
mod wait;
mod watch;

use std::process::ExitCode;

use clap::Parser as _;
use clap::error::ErrorKind;

use args::{CommandLine, Verb};
use error::{CliError, Code};
use exit::Exit;
use log::LogControl;
use output::Output;

/// Runs the verb that the arguments name.
pub fn main() -> ExitCode {
    let line = match CommandLine::try_parse() {
        Ok(line) => line,
        Err(error) => return usage(&error).into(),
    };
    let output = match Output::new(&line.global) {
        Ok(output) => output,
        Err(error) => {
            before_flags().error(&error);
            return error.exit().into();
        }
    };
    let log = LogControl::start(line.global.verbose, &output);
    let no_input = line.global.no_input;
    if let Err(error) = config::check(&line.verb) {
        output.error(&error);
        return error.exit().into();
    }
    let result = match line.verb {
        Verb::Doctor => doctor::run(&output),
        Verb::Image(args) => image::run(&args.verb, &output),
        Verb::Top(args) => top::run(&args, &output),
        Verb::Init(args) => init::run(&args, &output),
        Verb::Gc(args) => gc::run(&args, no_input, &output),
        Verb::Cp(args) => cp::run(&args, &output),
        Verb::Exec(args) => exec::run(&args, no_input),
        Verb::Logs(args) => logs::run(&args),
        Verb::Wait(args) => wait::run(&args, &output),
        Verb::Explain(args) => explain::run(&args, &output),
        Verb::Ps => instances::list(&output),
        Verb::Freeze(args) => instances::pause(&args, true, &output),
        Verb::Thaw(args) => instances::pause(&args, false, &output),
        Verb::Pack(args) => package::pack(&args, &output),
        Verb::Validate(args) => package::validate(&args, &output),
        Verb::Config(args) => config::print(&args, &output),
        Verb::Man(args) => man::run(&args, &output),
        Verb::Names(args) => names::run(&args),
        Verb::Console(args) => logs::console(&args),
        Verb::Completion(args) => completion::print(args.shell),
        Verb::Version => version(&output),
        Verb::Events(args) => events::run(&args, &output),
        Verb::Agent(args) => agent::run(&args.verb, &output),
        Verb::Serve(args) => serve::run(&args, &log, &output),
        Verb::Service(args) => service::run(&args.verb, no_input, &output),
        Verb::Run(args) => run::run(&args, &output),
        Verb::Test(args) => Ok(test::run(&args, &output)),
    };
    let code: ExitCode = match result {
        Ok(exit) => exit.into(),
        Err(error) => {
            // A closed pipe is not an error to report.
            if error.exit() != Exit::Signal(13) {
                output.error(&error);
            }
            error.exit().into()
        }
    };
    output.finish();
    code
}

fn version(output: &Output) -> Result<Exit, CliError> {
    let version = env!("CARGO_PKG_VERSION");
    output.answer(&format!("host-agent {version}"), || {
        serde_json::json!({
            "schema": "host-agent.version/1",
            "version": version,
            "vmbus": vmbus::version::SUPPORTED,
        })
    })?;
    Ok(Exit::Success)
}

/// Prints help, or the error in the arguments.
fn usage(error: &clap::Error) -> Exit {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            // A closed pipe is ignored.
            let _ = error.print();
            Exit::Success
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = error.print();
            Exit::Usage
        }
        _ => {
            before_flags().error(&usage_error(&error.render().to_string()));
            Exit::Usage
        }
    }
}

/// The output for a command line that does not parse.
fn before_flags() -> Output {
    let variable = std::env::var_os(output::FORMAT).unwrap_or_default();
    let json = environment::errors_are_json(std::env::args_os(), &variable);
    Output::before_flags(json)
}

/// From the parser's message: its first paragraph, usage and tip.
fn usage_error(text: &str) -> CliError {
    let what = text.split("\n\n").next().unwrap_or(text);
    let what: Vec<_> = what.lines().map(str::trim).collect();
    let what = what.join(" ");
    let what = what.strip_prefix("error: ").unwrap_or(&what);
    let tip = text
        .lines()
        .find_map(|line| line.trim_start().strip_prefix("tip: "));
    let usage = text.lines().find_map(|line| line.strip_prefix("Usage: "));
    let mut error = CliError::new(Code::Usage, what);
    if let Some(usage) = usage {
        error = error.cause(format!("usage: {usage}"));
    }
    error.hint(tip.unwrap_or("host-agent --help"))
}

/// An asynchronous runtime on this thread.
fn runtime() -> Result<tokio::runtime::Runtime, CliError> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| CliError::chain(Code::Unclassified, &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_usage_error_is_one_line_with_the_tip_of_the_parser() {
        let parse = |line: &[&str]| {
            let error = CommandLine::try_parse_from(line).unwrap_err();
            usage_error(&error.render().to_string())
        };
        let error = parse(&["host-agent", "dcotor"]);
        assert_eq!(error.exit(), Exit::Usage);
        assert_eq!(error.what(), "unrecognized subcommand 'dcotor'");
        assert!(error.hint_text().unwrap().contains("doctor"));
        let error = parse(&["host-agent", "exec", "A_IN_0"]);
        assert!(error.what().contains("<CMD>"), "{}", error.what());
        assert_eq!(error.hint_text(), Some("host-agent --help"));
    }
}

//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use super::endpoint_probe::EndpointProbe;
use super::events::EventsArgs;
use super::report::ReportFile;
use crate::api::types::LogFile;
use crate::service::PublishedPort;

/// Verbs in the order in which a newcomer meets them.
const OVERVIEW: &str = "\
Start:   doctor  validate  pack  run  test
Look:    ps  logs
Inside:  exec
Keep:    serve  service  events
More:    completion  version  help

Examples:
  host-agent doctor             can this machine run guests?
  host-agent run ./redis        boot and deploy the service in ./redis";

/// Run cloud services in small Linux guests on this machine.
#[derive(Debug, Parser)]
#[command(
    name = "host-agent",
    version,
    after_help = OVERVIEW,
    max_term_width = 100,
    disable_help_flag = true,
    help_template = "{about}\n\n{usage-heading} {usage}\n\nOptions:\n{options}{after-help}",
    subcommand_value_name = "VERB",
)]
pub struct CommandLine {
    /// Flags of every verb.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// Flags of every verb.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Output")]
pub struct Global {
    /// Output format [default: table]
    #[arg(long, global = true)]
    pub format: Option<Format>,
    /// Same as --format json; with run, jsonl
    #[arg(long, global = true)]
    pub json: bool,
    /// Print only the result and errors
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// Log more; -vv even more
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// Colors
    #[arg(long, global = true, default_value = "auto", hide_default_value = true)]
    pub color: Color,
    /// How progress is shown
    #[arg(long, global = true, default_value = "auto", hide_default_value = true)]
    pub progress: Progress,
    /// Never prompt, never read the terminal
    #[arg(long, global = true, env = "HOST_AGENT_NO_INPUT", hide_env = true, value_parser = clap::builder::FalseyValueParser::new())]
    pub no_input: bool,
    /// Print help
    #[arg(short, long, global = true, action = clap::ArgAction::HelpShort)]
    help: Option<bool>,
    /// Error format; json with --json
    #[arg(long, global = true)]
    pub error_format: Option<ErrorFormat>,
}

/// Output formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    Table,
    /// One JSON document; the same as `jsonl` for `run`, which prints events.
    Json,
    /// One JSON document per line.
    Jsonl,
}

/// When to use colors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Color {
    /// On a terminal, unless `NO_COLOR` is set.
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// How progress is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Progress {
    /// One changing line on a terminal, else as `Plain`.
    Auto,
    /// One line per step.
    Plain,
    /// No progress.
    None,
}

/// Error formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ErrorFormat {
    /// Text.
    Human,
    /// One JSON document.
    Json,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Can this machine run guests? If not: why, and how to fix it
    #[command(after_help = "\
Examples:
  host-agent doctor
  host-agent doctor --json | jq .verdict")]
    Doctor,
    /// Boot and deploy a service; Ctrl-C stops it
    #[command(after_help = "\
Examples:
  host-agent run ./redis
  host-agent run redis.cspkg --config test.cscfg --until ready")]
    Run(RunArgs),
    /// Smoke test: Ready, probes, clean stop; exits with a code
    #[command(after_help = "\
Examples:
  host-agent test ./redis --probe tcp://Redis --report junit=report.xml
  host-agent test ./web --probe http://www/health=200 --artifacts out")]
    Test(TestArgs),
    /// Run a command in a guest and exit with its exit code
    #[command(after_help = "\
The output of the command is passed on as it is, also to a terminal, like that of ssh.

Examples:
  host-agent exec -i Cache_IN_0 -- redis-cli --pipe < keys
  host-agent exec -it Cache_IN_0 -- sh")]
    Exec(ExecArgs),
    /// Print a log of an instance
    #[command(after_help = "\
A terminal gets printable characters only; a pipe or a file gets the bytes of the log.

Examples:
  host-agent logs Cache_IN_0 -f
  host-agent logs Cache_IN_0 --source serial")]
    Logs(LogsArgs),
    /// List running instances of this user
    #[command(after_help = "\
Examples:
  host-agent ps
  host-agent ps --json | jq '.deployments[].instances[].name'")]
    Ps,
    /// Keep services running, whatever ends; guests outlive this command
    #[command(after_help = "\
Examples:
  host-agent serve
  host-agent serve --json >> events.jsonl &")]
    Serve(ServeArgs),
    /// Create, list and delete the services that serve keeps
    #[command(after_help = "\
Examples:
  host-agent service apply shop --package shop.cspkg --config shop.cscfg --wait
  host-agent service list --json")]
    Service(ServiceCommand),
    /// Print what happened to services and instances
    #[command(after_help = "\
Examples:
  host-agent events -f --service shop
  host-agent events --after 120 --json | jq -r .event.event")]
    Events(EventsArgs),
    /// Make a package from a service directory
    #[command(after_help = "\
Examples:
  host-agent pack ./redis -o redis.cspkg
  SOURCE_DATE_EPOCH=1700000000 host-agent pack ./redis -o redis.cspkg")]
    Pack(PackArgs),
    /// Check service directories, definitions, configurations, packages
    #[command(after_help = "\
Examples:
  host-agent validate ./redis
  host-agent validate redis.cspkg ServiceConfiguration.cscfg --json")]
    Validate(ValidateArgs),
    /// Print the completion script of a shell
    #[command(after_help = "\
Examples:
  host-agent completion bash > ~/.local/share/bash-completion/completions/host-agent
  host-agent completion fish > ~/.config/fish/completions/host-agent.fish")]
    Completion(CompletionArgs),
    /// Print the version
    #[command(after_help = "\
Examples:
  host-agent version
  host-agent version --json")]
    Version,
    /// Pause the vCPUs of an instance, to test the heartbeat limit
    #[command(hide = true)]
    Freeze(InstanceArg),
    /// Resume the vCPUs of an instance
    #[command(hide = true)]
    Thaw(InstanceArg),
}

/// The service to deploy.
#[derive(Debug, Clone, Args)]
pub struct ServiceArgs {
    /// Directory with a .csdef, or a .cspkg
    pub service: PathBuf,
    /// Configuration, when it is not beside the service
    #[arg(long, value_name = "F.cscfg")]
    pub config: Option<PathBuf>,
    /// Publish an endpoint on this port; may be repeated
    #[arg(short, long, value_name = "PORT:ENDPOINT")]
    pub publish: Vec<PublishedPort>,
}

/// `run`.
#[derive(Debug, Clone, Args)]
pub struct RunArgs {
    /// The service.
    #[command(flatten)]
    pub service: ServiceArgs,
    /// Run until the service is stopped, or stop it when it is Ready
    #[arg(long, default_value = "stopped")]
    pub until: Until,
    /// Keep disks and logs at the end
    #[arg(long, env = "HOST_AGENT_KEEP", hide_env = true, value_parser = clap::builder::FalseyValueParser::new())]
    pub keep: bool,
    /// Refuse to run guests whose VMM process lacks a layer of the sandbox
    #[arg(long)]
    pub require_sandbox: bool,
    /// Restart a guest that is silent this long [default: 10m]
    #[arg(long, value_name = "S", value_parser = duration)]
    pub heartbeat_limit: Option<Duration>,
    /// Give up if not Ready after this time, times the timeout scale
    #[arg(long, value_name = "S", value_parser = duration)]
    pub timeout: Option<Duration>,
}

/// `serve`.
#[derive(Debug, Clone, Args)]
pub struct ServeArgs {
    /// Refuse to run guests whose VMM process lacks a layer of the sandbox
    #[arg(long)]
    pub require_sandbox: bool,
    /// Restart a guest that is silent this long [default: 10m]
    #[arg(long, value_name = "S", value_parser = duration)]
    pub heartbeat_limit: Option<Duration>,
}

/// `service`.
#[derive(Debug, Clone, Args)]
#[command(disable_help_subcommand = true)]
pub struct ServiceCommand {
    /// What to do.
    #[command(subcommand)]
    pub verb: ServiceVerb,
}

/// What to do with services.
#[derive(Debug, Clone, Subcommand)]
pub enum ServiceVerb {
    /// Create a service, or do nothing if it is as wanted already
    #[command(after_help = "\
Examples:
  host-agent service apply shop --package shop.cspkg --config shop.cscfg --wait
  host-agent service apply shop --package ./shop --dry-run")]
    Apply(ApplyArgs),
    /// List the services
    #[command(after_help = "\
Examples:
  host-agent service list
  host-agent service list --json | jq '.services[].name'")]
    List,
    /// Show a service with its instances and endpoints
    #[command(after_help = "\
Examples:
  host-agent service show shop
  host-agent service show shop --json | jq .operation")]
    Show(ServiceName),
    /// Show the revisions and operations of a service
    #[command(after_help = "\
Examples:
  host-agent service history shop
  host-agent service history shop --json | jq '.operations[0]'")]
    History(ServiceName),
    /// Stop a service and remove everything of it
    #[command(after_help = "\
Examples:
  host-agent service delete shop
  host-agent service delete shop --yes --wait")]
    Delete(DeleteArgs),
}

/// A service.
#[derive(Debug, Clone, Args)]
pub struct ServiceName {
    /// Name of the service
    pub service: String,
}

/// `service apply`.
#[derive(Debug, Clone, Args)]
pub struct ApplyArgs {
    /// Name of the service
    pub service: String,
    /// A .cspkg, or a directory with a .csdef
    #[arg(long, value_name = "F")]
    pub package: PathBuf,
    /// Configuration, when it is not beside the package
    #[arg(long, value_name = "F.cscfg")]
    pub config: Option<PathBuf>,
    /// Publish an endpoint on this port; may be repeated
    #[arg(short, long, value_name = "PORT:ENDPOINT")]
    pub publish: Vec<PublishedPort>,
    /// Only show what would be done
    #[arg(long)]
    pub dry_run: bool,
    /// How the operation is begun.
    #[command(flatten)]
    pub begin: BeginArgs,
}

/// `service delete`.
#[derive(Debug, Clone, Args)]
pub struct DeleteArgs {
    /// Name of the service
    pub service: String,
    /// How the operation is begun.
    #[command(flatten)]
    pub begin: BeginArgs,
}

/// How an operation is begun.
#[derive(Debug, Clone, Args)]
pub struct BeginArgs {
    /// Do not ask on a terminal
    #[arg(short, long)]
    pub yes: bool,
    /// Wait until it is done
    #[arg(long)]
    pub wait: bool,
    /// With --wait: give up waiting after this time, not the operation
    #[arg(long, value_name = "S", value_parser = duration, requires = "wait")]
    pub timeout: Option<Duration>,
}

/// When `run` ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Until {
    /// When a signal stops it, or it fails.
    Stopped,
    /// When every instance is Ready.
    Ready,
}

/// `test`.
#[derive(Debug, Clone, Args)]
pub struct TestArgs {
    /// The service.
    #[command(flatten)]
    pub service: ServiceArgs,
    /// tcp://ENDPOINT or http://ENDPOINT/PATH[=CODE]; may be repeated
    #[arg(long = "probe", value_name = "URL")]
    pub probes: Vec<EndpointProbe>,
    /// Give up after this time, times the timeout scale
    #[arg(long, value_name = "S", value_parser = duration, default_value = "3m")]
    pub timeout: Duration,
    /// json=FILE or junit=FILE; may be repeated
    #[arg(long = "report", value_name = "KIND=FILE")]
    pub reports: Vec<ReportFile>,
    /// Copy logs of every instance here
    #[arg(long, value_name = "DIR")]
    pub artifacts: Option<PathBuf>,
    /// On a machine that cannot run guests [default: fail]
    #[arg(long)]
    pub on_no_kvm: Option<OnNoKvm>,
}

/// The result of a test on a machine that cannot run guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OnNoKvm {
    /// A failure, exit 6 or 11.
    Fail,
    /// Skipped, exit 77.
    Skip,
}

/// `exec`.
#[derive(Debug, Clone, Args)]
pub struct ExecArgs {
    /// Forward standard input [default: on a terminal]
    #[arg(short, long)]
    pub interactive: bool,
    /// Give the command a terminal [default: on a terminal]
    #[arg(short, long)]
    pub tty: bool,
    /// Instance, or DEPLOYMENT/INSTANCE
    pub instance: String,
    /// Command and its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    pub command: Vec<String>,
}

/// `logs`.
#[derive(Debug, Clone, Args)]
pub struct LogsArgs {
    /// Instance, or DEPLOYMENT/INSTANCE
    pub instance: String,
    /// Keep printing what is appended
    #[arg(short, long)]
    pub follow: bool,
    /// Which log
    #[arg(long, default_value = "role")]
    pub source: LogFile,
}

/// `pack`.
#[derive(Debug, Clone, Args)]
pub struct PackArgs {
    /// Directory with a .csdef and a directory of files per role
    pub dir: PathBuf,
    /// The package to write
    #[arg(short, long, value_name = "F.cspkg")]
    pub output: PathBuf,
}

/// `validate`.
#[derive(Debug, Clone, Args)]
pub struct ValidateArgs {
    /// Service directories, .csdef, .cscfg, .cspkg
    #[arg(required = true, value_name = "F")]
    pub files: Vec<PathBuf>,
    /// Configuration, when it is not beside the service
    #[arg(long, value_name = "F.cscfg")]
    pub config: Option<PathBuf>,
}

/// `completion`.
#[derive(Debug, Clone, Args)]
pub struct CompletionArgs {
    /// The shell
    pub shell: Shell,
}

/// Shells with a completion script.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Shell {
    /// Bash.
    Bash,
    /// Zsh.
    Zsh,
    /// Fish.
    Fish,
}

/// An instance.
#[derive(Debug, Clone, Args)]
pub struct InstanceArg {
    /// Instance, or DEPLOYMENT/INSTANCE
    pub instance: String,
}

/// Longest time accepted: a longer one is a mistake, and `now` + it may overflow.
const LONGEST: Duration = Duration::from_hours(366 * 24);

/// Parses a time: seconds, or a number with `ms`, `s`, `m` or `h`.
fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        other => return Err(format!("{other} is not a unit: write ms, s, m or h")),
    };
    let number: f64 = digits
        .parse()
        .map_err(|_| "write a time like 90, 90s, 1.5m or 500ms".to_owned())?;
    let time = Duration::try_from_secs_f64(number * unit)
        .map_err(|_| "the time is negative or too long".to_owned())?;
    if time.is_zero() || time > LONGEST {
        return Err("the time must be over 0 and at most a year".into());
    }
    Ok(time)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        CommandLine::command().debug_assert();
    }

    #[test]
    fn every_help_fits_one_screen_and_ends_with_two_examples() {
        let mut command = CommandLine::command();
        command.build();
        let top = command.render_help().to_string();
        assert!(top.lines().count() <= 40, "{top}");
        assert!(top.trim_end().lines().rev().nth(2) == Some("Examples:"));
        for verb in command.get_subcommands_mut() {
            if verb.is_hide_set() || verb.get_name() == "help" {
                continue;
            }
            let help = verb.render_help().to_string();
            assert!(help.lines().count() <= 40, "{help}");
            let lines: Vec<_> = help.trim_end().lines().collect();
            assert_eq!(lines[lines.len() - 3], "Examples:", "{help}");
            for example in &lines[lines.len() - 2..] {
                assert!(example.contains("host-agent"), "{help}");
            }
            assert!(
                top.contains(verb.get_name()),
                "{} in overview",
                verb.get_name()
            );
        }
    }

    #[test]
    fn times_are_parsed_with_and_without_units() {
        assert_eq!(duration("90"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("1.5m"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        for bad in ["", "s", "-1", "0", "1d", "nan", "inf", "1e30h", "1 s"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn flags_after_the_double_dash_belong_to_the_guest_command() {
        let line = ["host-agent", "exec", "A_IN_0", "--", "ls", "--json", "-q"];
        let parsed = CommandLine::try_parse_from(line).unwrap();
        let Verb::Exec(args) = parsed.verb else {
            panic!("not exec");
        };
        assert_eq!(args.command, ["ls", "--json", "-q"]);
        assert!(!args.interactive && !args.tty);
        assert!(!parsed.global.json && !parsed.global.quiet);
        let line = ["host-agent", "exec", "-it", "A_IN_0", "--", "sh", "-i"];
        let Verb::Exec(args) = CommandLine::try_parse_from(line).unwrap().verb else {
            panic!("not exec");
        };
        assert!(args.interactive && args.tty);
        assert_eq!(args.command, ["sh", "-i"]);
    }

    #[test]
    fn malformed_probes_and_reports_are_refused() {
        let parse = |extra: &[&str]| {
            let line = ["host-agent", "test", "dir"].iter().chain(extra);
            CommandLine::try_parse_from(line)
        };
        let parsed = parse(&[
            "--probe",
            "tcp://redis",
            "--probe",
            "http://www/a=404",
            "--report",
            "junit=a.xml",
            "--report=json=b.json",
            "--json",
        ]);
        let Verb::Test(args) = parsed.unwrap().verb else {
            panic!("not test");
        };
        assert_eq!((args.probes.len(), args.reports.len()), (2, 2));
        for bad in ["udp://x", "tcp://", "http://x/=9999"] {
            assert!(parse(&["--probe", bad]).is_err(), "{bad}");
        }
        assert!(parse(&["--report", "html=x"]).is_err());
        assert!(parse(&["--on-no-kvm", "process"]).is_err());
    }
}

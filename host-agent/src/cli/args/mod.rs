//! The command line.

mod agents;
mod deploy;
mod files;
mod instances;
mod services;
mod time;

use clap::{Args, Parser, Subcommand, ValueEnum};

pub use self::agents::*;
pub use self::deploy::*;
pub use self::files::*;
pub use self::instances::*;
pub use self::services::*;
pub(super) use self::time::duration;
use super::config::ConfigFileArg;
use super::cp::CpArgs;
use super::events::EventsArgs;
use super::explain::ExplainArgs;
use super::gc::GcArgs;
use super::image::ImageCommand;
use super::init::InitArgs;
use super::man::ManArgs;
use super::names::NamesArgs;
use super::top::TopArgs;
use super::wait::WaitArgs;

/// Verbs in the order in which a newcomer meets them.
const OVERVIEW: &str = "\
Start:   doctor  init  validate  pack  run  test
Look:    ps  top  logs  wait  explain
Inside:  exec  cp  console
Keep:    serve  service  events  agent  image  gc
More:    config  man  completion  version  help

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
    /// Write a commented service that runs as it is
    #[command(after_help = "\
Examples:
  host-agent init hello && host-agent run hello
  host-agent init shop --template web")]
    Init(InitArgs),
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
    /// Copy files and directories into a guest and out of it
    #[command(after_help = "\
Links are copied as links. Modes are kept, owners are not. A log that is being written is
copied as far as it is.

Examples:
  host-agent cp Cache_IN_0:/var/lib/redis/dump.rdb .
  host-agent cp ./site Web_IN_0:/srv/")]
    Cp(CpArgs),
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
    /// Wait until an instance or a service is Ready, or never will be
    #[command(after_help = "\
Exits with 7 at --timeout, 4 if the name is unknown or goes away, 8 or 9 with the cause if
guest or role failed.

Examples:
  host-agent wait Cache_IN_0 --for agent --timeout 60
  host-agent wait shop --for gone")]
    Wait(WaitArgs),
    /// Say what an error number means and what to do
    #[command(after_help = "\
Examples:
  host-agent explain HA-0204
  host-agent explain --json | jq -r '.errors[].code'")]
    Explain(ExplainArgs),
    /// Show what every instance takes: state, processor time, memory
    #[command(after_help = "\
On a terminal the table is shown again and again until Ctrl-C, else once.

Examples:
  host-agent top
  host-agent top --json | jq '.instances[].cpu_percent'")]
    Top(TopArgs),
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
    /// Publish guest agents, which guests take while their roles run on
    #[command(after_help = "\
Examples:
  host-agent agent publish guest-agent-0.2.0.agent
  host-agent agent list")]
    Agent(AgentCommand),
    /// Print what happened to services and instances
    #[command(after_help = "\
Examples:
  host-agent events -f --service shop
  host-agent events --after 120 --json | jq -r .event.event")]
    Events(EventsArgs),
    /// Build, import, list, verify and remove guest images
    #[command(after_help = "\
Examples:
  host-agent image build minimal
  host-agent image import redis redis.tar")]
    Image(ImageCommand),
    /// Remove packages, disks and directories that nothing needs any more
    #[command(after_help = "\
Removed are packages that no revision names and that are older than an hour, application disks
without users, directories of commands that were killed, and images with --images. The daemon
does it if one runs.

Examples:
  host-agent gc --dry-run
  host-agent gc --images --yes --json | jq .bytes")]
    Gc(GcArgs),
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
    /// Print the configuration: each value and where it comes from
    #[command(after_help = "\
Files: /etc/host-agent/config.toml, then ~/.config/host-agent/config.toml, then that of --config
or HOST_AGENT_CONFIG. Later ones win, and variables win over files.

Examples:
  host-agent config
  host-agent config --config ./config.toml --json")]
    Config(ConfigFileArg),
    /// Print the completion script of a shell
    #[command(after_help = "\
Examples:
  host-agent completion bash > ~/.local/share/bash-completion/completions/host-agent
  host-agent completion fish > ~/.config/fish/completions/host-agent.fish")]
    Completion(CompletionArgs),
    /// Print the serial console of a guest from its beginning, until Ctrl-C
    #[command(after_help = "\
Only output: the serial port of a guest takes no input. Use exec -it for a shell.

Examples:
  host-agent console Cache_IN_0
  host-agent exec -it Cache_IN_0 -- sh")]
    Console(InstanceArg),
    /// Print a manual page, or write all of them
    #[command(after_help = "\
Examples:
  host-agent man service apply | man -l -
  host-agent man --dir ~/.local/share/man/man1")]
    Man(ManArgs),
    /// Print names for the completion of shells
    #[command(hide = true)]
    Names(NamesArgs),
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

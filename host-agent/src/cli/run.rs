//! `host-agent run`: deploys a service and stays with it.

use tokio::time::Instant;

use super::args::{RunArgs, Until};
use super::config;
use super::deploy::MORE_SPACE;
use super::error::{CliError, Code};
use super::evidence;
use super::exit::Exit;
use super::output::Output;
use super::running::{Running, WaitEnd, interrupted};
use super::watch::RunError;
use super::{deploy, runtime};
use crate::doctor::Scope;
use crate::store::deployment::Retention;
use crate::supervisor::event::{TimelineEvent, missed};

/// Lines of each log shown with an error.
const TAIL: usize = 15;

/// Runs the service; 0 when it was stopped on request.
pub fn run(args: &RunArgs, output: &Output) -> Result<Exit, CliError> {
    let unblocked = output.never_block();
    unblocked.map_err(|error| CliError::chain(Code::Unclassified, &error))?;
    let config = config::load(None)?;
    let model = deploy::load(&args.service, &config.rules(), output)?;
    let host = deploy::host(
        &config,
        if args.require_sandbox {
            Scope::GuestsAndSandbox
        } else {
            Scope::Guests
        },
    )?;
    if !host.is_usable() {
        return Err(CliError::host(&host, &args.service.service));
    }
    output.progress(&format!("host-agent: {}", host.summary()));
    let mut options = deploy::options(&host, &config, args.heartbeat_limit)?;
    if args.require_sandbox {
        if !host.has_sandbox() {
            return Err(CliError::sandbox(&host));
        }
        // A VMM process that gets less than the probe did is refused too.
        options.require_sandbox = true;
    }
    let retention = if args.keep {
        Retention::Kept
    } else {
        Retention::Ephemeral
    };
    let timeout = args.timeout.map(|timeout| host.scaled(timeout));
    let runtime = runtime()?;
    let result = runtime.block_on(async {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        let show = |event: &TimelineEvent, line| show(output, event, line);
        let mut running = Running::start(model, options, retention, output, show).await?;
        let result = follow(&mut running, args, deadline, output).await;
        // Before the logs are removed.
        let result = result.map_err(|failed| with_logs(failed, &running, args.keep));
        if args.keep {
            let place = running.deployment().directory().display();
            output.progress(&format!("disks and logs are kept in {place}"));
        }
        running.finish(output).await;
        result
    });
    runtime.shutdown_background();
    result
}

fn show(output: &Output, event: &TimelineEvent, line: String) -> Result<(), CliError> {
    output.line(&line, || event.json(), |count| missed(event.at, count))
}

async fn follow(
    running: &mut Running,
    args: &RunArgs,
    deadline: Option<Instant>,
    output: &Output,
) -> Result<Exit, RunError> {
    let show = |event: &TimelineEvent, line| show(output, event, line);
    let mut deadline = deadline;
    let mut last = None;
    let mut hint = Some("Ready. Ctrl-C stops it");
    let outcome = loop {
        let ended = match args.until {
            Until::Ready => running.steady(deadline, show).await,
            Until::Stopped => running.wait(deadline, show).await,
        };
        match ended? {
            WaitEnd::Ready => {
                deadline = None;
                if args.until == Until::Ready {
                    break Ok(Exit::Success);
                }
                if let Some(hint) = hint.take() {
                    let name = &running.names[0];
                    output.progress(&format!(
                        "{hint}; host-agent exec {name} -- sh looks inside"
                    ));
                }
            }
            WaitEnd::Failed(error) => {
                if args.until == Until::Ready {
                    break Err(error);
                }
                // The supervisor restarts the instance. If every instance ends instead,
                // this is why.
                last = Some(error);
            }
            WaitEnd::Finished => return last.map_or(Ok(Exit::Success), Err),
            WaitEnd::Deadline => break Err(not_ready(running)),
            WaitEnd::Signal(number) => {
                output.progress("stopping; once more kills");
                running.stop(output, show).await?;
                return if running.was_killed() || args.until == Until::Ready {
                    Err(interrupted(number).into())
                } else {
                    unclean(running)
                };
            }
        }
    };
    running.stop(output, show).await?;
    outcome?;
    unclean(running)
}

fn unclean(running: &Running) -> Result<Exit, RunError> {
    let left = running.watch.unclean();
    let Some(first) = left.first() else {
        return Ok(Exit::Success);
    };
    let what = format!("{} had to be stopped by force", left.join(", "));
    Err(RunError {
        error: CliError::new(Code::Unclean, what),
        instance: Some(first.clone()),
    })
}

/// The error of a service that was not Ready at the deadline.
pub fn not_ready(running: &Running) -> RunError {
    let mut error = CliError::new(Code::Timeout, "the service was not Ready in time");
    for waiting in running.watch.waiting() {
        error = error.cause(waiting);
    }
    let hint = if running.watch.lacks_space() {
        MORE_SPACE
    } else {
        "give it longer: --timeout S"
    };
    RunError {
        error: error.hint(hint),
        instance: running.not_ready().cloned(),
    }
}

/// Adds the end of the logs of the instance that failed.
fn with_logs(failed: RunError, running: &Running, keep: bool) -> CliError {
    let RunError { error, instance } = failed;
    let Some(name) = instance else {
        return error;
    };
    let directory = running.deployment().directory().join(&name);
    let mut error = tails(error, &directory, &name);
    if keep {
        error = error.logs(directory.display().to_string());
    } else if error.hint_text().is_none() {
        error = error.hint("the same with --keep leaves disks and logs to look at");
    }
    error
}

/// The last lines of the role's log and of the serial console in `directory`.
pub fn tails(error: CliError, directory: &std::path::Path, name: &str) -> CliError {
    let tail = |file: &str| evidence::tail(&directory.join(file), TAIL);
    error
        .tail(
            format!("lines of the role's log of {name}"),
            tail("role.log"),
        )
        .tail(
            format!("lines of the agents' log of {name}"),
            tail("agent.log"),
        )
        .tail(
            format!("lines of the serial console of {name}"),
            tail("serial.log"),
        )
}

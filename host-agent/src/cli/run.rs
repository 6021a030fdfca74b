//! `host-agent run`: deploys a service and stays with it.

use std::time::Duration;

use tokio::time::Instant;

use super::args::{RunArgs, Until};
use super::deploy::MORE_SPACE;
use super::error::{CliError, Code};
use super::evidence;
use super::exit::Exit;
use super::output::Output;
use super::running::{Ended, Running, STEADY, interrupted};
use super::watch::{News, Trouble};
use super::{deploy, runtime};
use crate::store::deployment::Retention;
use crate::supervisor::event::{TimelineEvent, missed};

/// Lines of each log shown with an error.
const TAIL: usize = 15;

/// Runs the service; 0 when it was stopped on request.
pub fn run(args: &RunArgs, output: &Output) -> Result<Exit, CliError> {
    let unblocked = output.never_block();
    unblocked.map_err(|error| CliError::chain(Code::Unclassified, &error))?;
    let model = deploy::load(&args.service, output)?;
    let host = deploy::host()?;
    if !host.is_usable() {
        return Err(CliError::host(&host, &args.service.service));
    }
    output.progress(&format!("host-agent: {}", host.summary()));
    let options = deploy::options(&host, args.heartbeat_limit)?;
    let retention = match (args.keep, args.outlive) {
        (true, _) => Retention::Kept,
        (false, true) => Retention::Durable,
        (false, false) => Retention::Ephemeral,
    };
    let timeout = args.timeout.map(|timeout| host.scaled(timeout));
    let runtime = runtime()?;
    let result = runtime.block_on(async {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        let tell = |event: &TimelineEvent, line| tell(output, event, line);
        let mut running = Running::start(model, options, retention, output, tell).await?;
        let steady = host.scaled(STEADY);
        let result = follow(&mut running, args, deadline, steady, output).await;
        // What a failure left is looked at before the files go.
        let result = result.map_err(|error| with_logs(error, &running, args.keep));
        if args.keep {
            let place = running.deployment().directory().display();
            output.progress(&format!("disks and logs are kept in {place}"));
        }
        running.finish(output).await;
        result.map_err(|(error, _)| error)
    });
    runtime.shutdown_background();
    result
}

fn tell(output: &Output, event: &TimelineEvent, line: String) -> Result<(), CliError> {
    output.line(&line, || event.json(), |count| missed(event.at, count))
}

type Failure = (CliError, Option<String>);

async fn follow(
    running: &mut Running,
    args: &RunArgs,
    deadline: Option<Instant>,
    steady: Duration,
    output: &Output,
) -> Result<Exit, Failure> {
    let tell = |event: &TimelineEvent, line| tell(output, event, line);
    let plain = |error: CliError| (error, None);
    let mut deadline = deadline;
    let mut last = None;
    let mut hint = Some("Ready. Ctrl-C stops it");
    let outcome = loop {
        let ended = match args.until {
            Until::Ready => running.steady(steady, deadline, tell).await,
            Until::Stopped => running.wait(deadline, tell).await,
        };
        match ended.map_err(plain)? {
            Ended::News(News::Ready) => {
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
            Ended::News(News::Trouble(trouble)) => {
                if args.until == Until::Ready {
                    break Err(failure(trouble));
                }
                // The supervisor goes on; if this was the end, it is the cause.
                last = Some(trouble);
            }
            Ended::News(News::Nothing) => {}
            Ended::Finished => {
                return match last {
                    Some(trouble) => Err(failure(trouble)),
                    None => Ok(Exit::Success),
                };
            }
            Ended::Deadline => break Err((not_ready(running), running.idle().cloned())),
            Ended::Signal(number) => {
                output.progress("stopping; once more kills");
                running.stop(output, tell).await.map_err(plain)?;
                return if running.was_killed() || args.until == Until::Ready {
                    Err(plain(interrupted(number)))
                } else {
                    unclean(running)
                };
            }
        }
    };
    running.stop(output, tell).await.map_err(plain)?;
    outcome?;
    unclean(running)
}

fn unclean(running: &Running) -> Result<Exit, Failure> {
    let left = running.watch.unclean();
    let Some(first) = left.first() else {
        return Ok(Exit::Success);
    };
    let what = format!("{} had to be stopped by force", left.join(", "));
    Err((CliError::new(Code::Unclean, what), Some(first.clone())))
}

fn failure(trouble: Trouble) -> Failure {
    let instance = trouble.instance.clone();
    (trouble.into(), Some(instance))
}

/// The time is up before every instance is Ready.
pub fn not_ready(running: &Running) -> CliError {
    let mut error = CliError::new(Code::Timeout, "the service was not Ready in time");
    for waiting in running.watch.waiting() {
        error = error.cause(waiting);
    }
    if running.watch.lacks_space() {
        return error.hint(MORE_SPACE);
    }
    error.hint("give it longer: --timeout S")
}

/// Adds the end of the logs of the instance at fault.
fn with_logs((error, instance): Failure, running: &Running, keep: bool) -> Failure {
    let Some(name) = instance else {
        return (error, None);
    };
    let directory = running.deployment().directory().join(&name);
    let mut error = tails(error, &directory, &name);
    if keep {
        error = error.logs(directory.display().to_string());
    } else if error.hint_text().is_none() {
        error = error.hint("the same with --keep leaves disks and logs to look at");
    }
    (error, Some(name))
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

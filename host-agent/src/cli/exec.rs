//! `host-agent exec`: runs a program in a guest with the streams, signals and exit code of
//! this process.

mod keys;

use std::io::{self, IsTerminal as _};
use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::sync::mpsc;
use tokio::time::Instant;
use vmbus::message::{ExecInput, ExecOutput, ExecRequest, ExitCause};
use vmbus::stream::{StreamError, send};

use super::args::ExecArgs;
use super::error::{CliError, Code};
use super::exit::Exit;
use super::lossless_output::{LosslessOutput, Slot};
use super::terminal::{RawMode, window_size};
use super::{instances, runtime};
use crate::api::client::{Client, ExecReader, ExecWriter, InstanceTarget};
use keys::{Keys, Signals};

/// Frames that may wait to be sent while the guest reads none.
const BACKLOG: usize = 16;
/// Time for the program to end after a signal that ends this process too.
const END_LIMIT: Duration = Duration::from_secs(5);

/// Runs the command and exits with its exit code.
pub fn run(args: &ExecArgs, no_input: bool) -> Result<Exit, CliError> {
    let mode = mode(
        args,
        no_input,
        io::stdin().is_terminal(),
        io::stdout().is_terminal(),
    )
    .map_err(|(what, hint)| CliError::new(Code::Usage, what).hint(hint))?;
    let runtime = runtime()?;
    let result = runtime.block_on(execute(args, mode));
    // A thread may still wait for standard input: it ends with the process.
    runtime.shutdown_background();
    // A failure on the host is exit code 125, with the cause in its HA number: an exit code
    // below is that of the program.
    result.map_err(|error| match error.code() {
        Code::ExecGuest => error,
        _ if error.exit() == Exit::Signal(13) => error,
        _ => error.exit_with(Exit::ExecHost),
    })
}

/// What the program gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mode {
    /// The standard input of this process.
    input: bool,
    /// A terminal.
    terminal: bool,
}

/// The mode from the flags and the kinds of standard input and output; else what is wrong
/// and what to do.
fn mode(
    args: &ExecArgs,
    no_input: bool,
    input_is_terminal: bool,
    output_is_terminal: bool,
) -> Result<Mode, (&'static str, &'static str)> {
    let (input, terminal) = (args.interactive, args.tty);
    match (input, terminal) {
        // On a terminal the program gets the terminal. Elsewhere it gets no input, which
        // would take that of the calling script.
        (false, false) => {
            let both = input_is_terminal && output_is_terminal && !no_input;
            Ok(Mode {
                input: both,
                terminal: both,
            })
        }
        (true, _) if input_is_terminal && no_input => Err((
            "-i reads standard input, which is a terminal, and --no-input forbids that",
            "leave out -i or --no-input (HOST_AGENT_NO_INPUT)",
        )),
        (true, true) if !input_is_terminal => Err((
            "-it needs a terminal on standard input",
            "leave out -t: the command then reads from a pipe",
        )),
        _ => Ok(Mode { input, terminal }),
    }
}

async fn execute(args: &ExecArgs, mode: Mode) -> Result<Exit, CliError> {
    let target = instances::find(&args.instance).await?;
    match session(&target, args, mode).await? {
        Last::Frame(frame) => finish(frame, &args.command[0]),
        Last::Signal(number) => Ok(Exit::Signal(number)),
    }
}

/// How a session ended.
enum Last {
    /// With this frame, which is not output.
    Frame(ExecOutput),
    /// This process got a signal to end, and the program did not end in its time.
    Signal(u8),
}

async fn session(target: &InstanceTarget, args: &ExecArgs, mode: Mode) -> Result<Last, CliError> {
    let request = ExecRequest {
        command: args.command.clone(),
        environment: environment(mode.terminal),
        terminal: mode.terminal.then(window_size),
    };
    let client = Client::connect(&target.socket).await?;
    let (mut reader, writer) = client.exec(target, &request).await?;
    let mut signals = Signals::listen()?;
    let sink = |file: io::Result<LosslessOutput>| {
        let what = "cannot print the output of the command";
        file.map_err(|error| CliError::new(Code::ExecHost, what).cause(error.to_string()))
    };
    let (stdout, stderr) = (
        sink(LosslessOutput::to(io::stdout()))?,
        sink(LosslessOutput::to(io::stderr()))?,
    );
    // Restored when this returns or panics, so that errors are printed in the terminal's
    // own mode.
    let _raw = if mode.input && mode.terminal {
        Some(RawMode::enter().map_err(|errno| {
            CliError::new(Code::ExecHost, "cannot set up the terminal").cause(errno.to_string())
        })?)
    } else {
        None
    };
    // A task of its own: output is read even while the guest reads no input.
    let (input, pieces) = mpsc::channel(BACKLOG);
    let (urgent, commands) = mpsc::channel(BACKLOG);
    tokio::spawn(pass_on(commands, pieces, writer));
    let mut keys = mode.input.then(Keys::read);
    if !mode.input {
        let _ = input.try_send(ExecInput::StdinEnd {});
    }
    let lost = |cause: String| {
        let what = format!("lost {} while the command ran", target.instance);
        CliError::new(Code::ExecHost, what)
            .cause(cause)
            .hint("host-agent ps")
    };
    let mut end_signal: Option<(u8, Instant)> = None;
    let last = loop {
        let (places, frame) = tokio::select! {
            frame = next_frame(&mut reader, &stdout, &stderr) => frame,
            // Without further output no write would show that the reader is gone.
            () = stdout.broken() => break Err(lost("standard output is closed".into())),
            (place, piece) = next_piece(&input, &mut keys) => {
                if piece == (ExecInput::StdinEnd {}) {
                    keys = None;
                }
                place.send(piece);
                continue;
            }
            number = signals.next() => {
                if number == libc::SIGWINCH {
                    if mode.terminal {
                        let (rows, columns) = window_size();
                        let _ = urgent.try_send(ExecInput::Resize { rows, columns });
                    }
                    continue;
                }
                let sent = urgent.try_send(ExecInput::Signal { number });
                let number = u8::try_from(number).expect("Linux has 64 signals");
                if sent.is_err() {
                    return Ok(Last::Signal(number));
                }
                // These end this process too; the others are for the program alone.
                if matches!(i32::from(number), libc::SIGTERM | libc::SIGHUP) {
                    end_signal.get_or_insert((number, Instant::now() + END_LIMIT));
                }
                continue;
            }
            number = overdue(end_signal) => return Ok(Last::Signal(number)),
        };
        match frame {
            Ok(Some(ExecOutput::Stdout { bytes })) => match places.stdout {
                Some(place) => place.send(bytes),
                None => break Err(lost("standard output is closed".into())),
            },
            Ok(Some(ExecOutput::Stderr { bytes })) => {
                // There is nowhere to report that standard error is closed.
                if let Some(place) = places.stderr {
                    place.send(bytes);
                }
            }
            Ok(Some(ExecOutput::Consumed { bytes })) => {
                if let Some(keys) = &mut keys {
                    keys.consumed(bytes);
                }
            }
            Ok(Some(last)) => break Ok(Last::Frame(last)),
            Ok(None) => break Err(lost("the connection was closed".into())),
            Err(error) => break Err(lost(vmbus::text::chain(&error))),
        }
    };
    let printed = async {
        stdout.finish().await?;
        // There is nowhere to report that standard error is closed.
        let _ = stderr.finish().await;
        Ok::<(), CliError>(())
    };
    let mut printed = std::pin::pin!(printed);
    loop {
        // The program ended: every signal is for this process.
        tokio::select! {
            // An output error takes precedence over the exit code.
            printed = &mut printed => return printed.and(last),
            number = signals.next() => if number != libc::SIGWINCH {
                return Ok(Last::Signal(u8::try_from(number).expect("Linux has 64 signals")));
            },
            number = overdue(end_signal) => return Ok(Last::Signal(number)),
        }
    }
}

/// Room for a piece of each stream, as long as it has a reader.
struct Places<'a> {
    stdout: Option<Slot<'a>>,
    stderr: Option<Slot<'a>>,
}

/// The next frame, when there is room for what it may say. Cancelling loses
/// nothing.
async fn next_frame<'a>(
    reader: &mut ExecReader,
    stdout: &'a LosslessOutput,
    stderr: &'a LosslessOutput,
) -> (Places<'a>, Result<Option<ExecOutput>, StreamError>) {
    let places = Places {
        stdout: stdout.reserve().await,
        stderr: stderr.reserve().await,
    };
    (places, reader.next().await)
}

/// Sends frames, `urgent` ones first. Frames after a failed one are dropped: the reader
/// reports the end of the connection, after the exit code of a program that ended without
/// reading its input.
async fn pass_on(
    mut urgent: mpsc::Receiver<ExecInput>,
    mut input: mpsc::Receiver<ExecInput>,
    mut writer: ExecWriter,
) {
    let mut gone = false;
    loop {
        let frame = tokio::select! {
            biased;
            Some(frame) = urgent.recv() => frame,
            Some(frame) = input.recv() => frame,
            else => break,
        };
        gone = gone || send(&mut writer, &frame).await.is_err();
    }
    let _ = writer.shutdown().await;
}

/// The next piece of standard input and a place for it; never if there is no input.
async fn next_piece<'a>(
    input: &'a mpsc::Sender<ExecInput>,
    keys: &mut Option<Keys>,
) -> (mpsc::Permit<'a, ExecInput>, ExecInput) {
    match (keys, input.reserve().await) {
        (Some(keys), Ok(place)) => (place, keys.next().await),
        _ => std::future::pending().await,
    }
}

/// The signal to end, once the time of the program to end is over.
async fn overdue(signal: Option<(u8, Instant)>) -> u8 {
    match signal {
        Some((number, at)) => {
            tokio::time::sleep_until(at).await;
            number
        }
        None => std::future::pending().await,
    }
}

/// The exit code from the last frame.
fn finish(last: ExecOutput, program: &str) -> Result<Exit, CliError> {
    match last {
        ExecOutput::Exited {
            cause: ExitCause::Code(code),
        } => Ok(Exit::Guest(code as u8)),
        ExecOutput::Exited {
            cause: ExitCause::Signal(number),
        } => Ok(Exit::Signal(u8::try_from(number).unwrap_or(u8::MAX))),
        ExecOutput::NotStarted { reason, code } => {
            let what = format!("{program} could not be started in the guest");
            let code = match code {
                126 | 127 => Exit::Guest(code as u8),
                _ => Exit::ExecHost,
            };
            Err(CliError::new(Code::ExecGuest, what)
                .cause(reason)
                .exit_with(code))
        }
        ExecOutput::Stdout { .. } | ExecOutput::Stderr { .. } | ExecOutput::Consumed { .. } => {
            unreachable!("the caller takes these")
        }
    }
}

fn environment(terminal: bool) -> Vec<(String, String)> {
    let term = std::env::var("TERM").ok().filter(|_| terminal);
    term.map(|value| ("TERM".to_owned(), value))
        .into_iter()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_true_exit_code_is_ours() {
        let code = |cause| finish(ExecOutput::Exited { cause }, "x").unwrap().code();
        assert_eq!(code(ExitCause::Code(0)), 0);
        assert_eq!(code(ExitCause::Code(1)), 1);
        assert_eq!(code(ExitCause::Code(255)), 255);
        assert_eq!(code(ExitCause::Signal(9)), 137);
        for (given, expected) in [(126, 126), (127, 127), (125, 125), (9000, 125)] {
            let last = ExecOutput::NotStarted {
                reason: "no".into(),
                code: given,
            };
            assert_eq!(finish(last, "x").unwrap_err().exit().code(), expected);
        }
    }

    #[test]
    fn a_terminal_is_given_on_request_or_if_both_ends_are_one() {
        let given = |flags: &str, no_input, terminals: (bool, bool)| {
            let args = ExecArgs {
                interactive: flags.contains('i'),
                tty: flags.contains('t'),
                instance: String::new(),
                command: Vec::new(),
            };
            mode(&args, no_input, terminals.0, terminals.1)
                .ok()
                .map(|mode| (mode.input, mode.terminal))
        };
        let (both, stdin, stdout, none) =
            ((true, true), (true, false), (false, true), (false, false));
        assert_eq!(given("", false, both), Some((true, true)));
        assert_eq!(given("", true, both), Some((false, false)));
        for terminals in [stdin, stdout, none] {
            assert_eq!(given("", false, terminals), Some((false, false)));
            assert_eq!(given("i", false, terminals), Some((true, false)));
            assert_eq!(given("t", false, terminals), Some((false, true)));
        }
        assert_eq!(given("it", false, stdin), Some((true, true)));
        assert_eq!(given("it", false, stdout), None);
        assert_eq!(given("i", true, both), None);
        assert_eq!(given("i", true, none), Some((true, false)));
    }
}

//! `host-agent exec`: a program in a guest as if it ran here.

use std::io::{self, IsTerminal as _, Read as _, Write as _};

use tokio::sync::mpsc;
use vmbus::message::{ExecInput, ExecOutput, ExecRequest, ExitCause};
use vmbus::stream::send;

use super::args::ExecArgs;
use super::error::{CliError, Code};
use super::exit::Exit;
use super::interrupt::Interrupts;
use super::terminal::{RawMode, window_size};
use super::{instances, output, runtime};
use crate::api::client::{Connection, Target};
use crate::api::types::Request;

/// Bytes of standard input in one frame, the protocol's limit.
const PIECE: usize = 16 * 1024;
/// Pieces of standard input that wait for the guest.
const BACKLOG: usize = 4;

/// Runs the command; its exit code is ours.
pub fn run(args: &ExecArgs, no_input: bool) -> Result<Exit, CliError> {
    let runtime = runtime()?;
    let result = runtime.block_on(execute(args, no_input));
    // A thread may still wait for standard input: it ends with the process.
    runtime.shutdown_background();
    // That the instance does not exist is told apart from what the program
    // says; everything else on this side is 125.
    result.map_err(|error| match error.code() {
        Code::NoInstance | Code::Ambiguous | Code::ExecGuest => error,
        _ if error.exit() == Exit::Signal(13) => error,
        _ => error.exit_with(Exit::ExecHost),
    })
}

async fn execute(args: &ExecArgs, no_input: bool) -> Result<Exit, CliError> {
    let target = instances::find(&args.instance).await?;
    let terminal = !no_input && io::stdin().is_terminal() && io::stdout().is_terminal();
    let mut input = (!no_input).then(read_stdin);
    let mut last = session(&target, args, terminal, &mut input).await?;
    if terminal && matches!(last, Last::Frame(ExecOutput::NotStarted { code: 125, .. })) {
        // A guest agent may have no terminals to give; a command without one
        // is of more use than none.
        last = session(&target, args, false, &mut input).await?;
    }
    match last {
        Last::Frame(frame) => finish(frame, &args.command[0]),
        Last::Signal(number) => Ok(Exit::Signal(number)),
    }
}

/// How a session ended.
enum Last {
    /// With this frame, which is not output.
    Frame(ExecOutput),
    /// We were told to end, and the guest could not be told.
    Signal(u8),
}

async fn session(
    target: &Target,
    args: &ExecArgs,
    terminal: bool,
    input: &mut Option<mpsc::Receiver<ExecInput>>,
) -> Result<Last, CliError> {
    let request = Request::Exec {
        instance: target.instance.clone(),
        exec: ExecRequest {
            command: args.command.clone(),
            environment: environment(terminal),
            terminal: terminal.then(window_size),
        },
    };
    let mut connection = Connection::open(&target.socket, &request).await?;
    connection.accepted().await?;
    let (mut reader, mut writer) = connection.into_parts();
    // Until this returns: errors are printed on a terminal in its own mode.
    let _raw = if terminal {
        Some(RawMode::enter().map_err(|errno| {
            CliError::new(Code::ExecHost, "cannot set up the terminal").cause(errno.to_string())
        })?)
    } else {
        None
    };
    let mut interrupts = Interrupts::listen()?;
    if input.is_none() {
        let _ = send(&mut writer, &ExecInput::StdinEnd {}).await;
    }
    let lost = |cause: String| {
        let what = format!("lost {} while the command ran", target.instance);
        CliError::new(Code::ExecHost, what)
            .cause(cause)
            .hint("host-agent ps")
    };
    loop {
        let frame = tokio::select! {
            frame = reader.next::<ExecOutput>() => frame,
            piece = next_piece(input) => {
                let last = piece == ExecInput::StdinEnd {};
                // The program may have ended without reading: its exit code
                // then waits to be read.
                if send(&mut writer, &piece).await.is_err() || last {
                    *input = None;
                }
                continue;
            }
            number = interrupts.next() => {
                let signal = ExecInput::Signal { number: i32::from(number) };
                if send(&mut writer, &signal).await.is_err() {
                    return Ok(Last::Signal(number));
                }
                continue;
            }
        };
        match frame {
            Ok(Some(ExecOutput::Stdout { bytes })) => output::write(&bytes)?,
            Ok(Some(ExecOutput::Stderr { bytes })) => {
                let mut stderr = io::stderr().lock();
                // Nothing can be told when standard error is gone.
                let _ = stderr.write_all(&bytes);
            }
            Ok(Some(last)) => return Ok(Last::Frame(last)),
            Ok(None) => return Err(lost("the connection was closed".into())),
            Err(error) => return Err(lost(vmbus::text::chain(&error))),
        }
    }
}

/// From the last frame to the exit code.
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
        ExecOutput::Stdout { .. } | ExecOutput::Stderr { .. } => {
            unreachable!("the caller prints output")
        }
    }
}

fn environment(interactive: bool) -> Vec<(String, String)> {
    let term = std::env::var("TERM").ok().filter(|_| interactive);
    term.map(|value| ("TERM".to_owned(), value))
        .into_iter()
        .collect()
}

/// Reads standard input in a thread: it cannot be polled when it is a file.
fn read_stdin() -> mpsc::Receiver<ExecInput> {
    let (sender, receiver) = mpsc::channel(BACKLOG);
    std::thread::spawn(move || {
        let mut piece = vec![0; PIECE];
        loop {
            let read = io::stdin().lock().read(&mut piece);
            let input = match read {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Ok(0) | Err(_) => ExecInput::StdinEnd {},
                Ok(count) => ExecInput::Stdin {
                    bytes: piece[..count].to_vec(),
                },
            };
            let last = input == ExecInput::StdinEnd {};
            if sender.blocking_send(input).is_err() || last {
                return;
            }
        }
    });
    receiver
}

/// The next piece of standard input; waits for ever when there is none.
async fn next_piece(input: &mut Option<mpsc::Receiver<ExecInput>>) -> ExecInput {
    match input {
        Some(receiver) => receiver.recv().await.unwrap_or(ExecInput::StdinEnd {}),
        None => std::future::pending().await,
    }
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
}

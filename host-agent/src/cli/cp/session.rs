//! A helper program in a guest: bytes to its standard input and from its standard output.

use tokio::io::AsyncWriteExt as _;
use tokio::sync::mpsc;
use vmbus::message::{EXEC_PIECE, EXEC_WINDOW, ExecInput, ExecOutput, ExecRequest, ExitCause};
use vmbus::stream::send;

use crate::api::client::{Client, InstanceTarget};
use crate::cli::error::{CliError, Code};

/// Most bytes of its standard error that are kept: messages for people.
const MAX_STDERR: usize = 4096;

/// How the program ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// By itself, or by a signal.
    Exited(ExitCause),
    /// It could not be started.
    NotStarted(String),
    /// Nobody takes its output any more.
    Cut,
}

/// A program that ended.
#[derive(Debug)]
pub struct Ended {
    /// How.
    pub outcome: Outcome,
    /// The beginning of its standard error.
    pub stderr: String,
}

impl Ended {
    /// Whether everything was done. 1 is also the exit code of a `tar` that copied files
    /// which others were writing, such as logs.
    pub fn is_success(&self) -> bool {
        let changed = ["changed as we read it", "removed before we read it"];
        let tolerable = |line: &str| {
            changed.iter().any(|text| line.contains(text)) || line.ends_with("socket ignored")
        };
        match self.outcome {
            Outcome::Exited(ExitCause::Code(0)) => true,
            Outcome::Exited(ExitCause::Code(1)) => {
                !self.stderr.is_empty() && self.stderr.lines().all(tolerable)
            }
            _ => false,
        }
    }
}

/// Runs a program to its end, or until the receiver of `output` is dropped. Messages are in
/// English, because some are looked for.
pub async fn run(
    target: &InstanceTarget,
    command: &[&str],
    mut input: Option<mpsc::Receiver<Vec<u8>>>,
    output: Option<mpsc::Sender<Vec<u8>>>,
) -> Result<Ended, CliError> {
    let request = ExecRequest {
        command: command.iter().map(ToString::to_string).collect(),
        environment: vec![("LC_ALL".to_owned(), "C".to_owned())],
        terminal: None,
    };
    let lost = |cause: String| {
        let what = format!("lost {} while files were copied", target.instance);
        CliError::new(Code::Unreachable, what)
            .cause(cause)
            .hint("host-agent ps")
    };
    let client = Client::connect(&target.socket).await?;
    let (mut reader, mut writer) = client.exec(target, &request).await?;
    let mut underway = 0;
    let mut stderr = Vec::new();
    if input.is_none() {
        let _ = send(&mut writer, &ExecInput::StdinEnd {}).await;
    }
    let outcome = loop {
        let next = async {
            let place = match &output {
                None => None,
                Some(output) => Some(output.reserve().await.map_err(|_| Outcome::Cut)?),
            };
            Ok((place, reader.next::<ExecOutput>().await))
        };
        let (place, frame) = tokio::select! {
            next = next => match next {
                Ok(next) => next,
                Err(cut) => break cut,
            },
            piece = next_piece(&mut input), if underway + EXEC_PIECE <= EXEC_WINDOW => {
                underway += piece.as_ref().map_or(0, Vec::len);
                let frame = match piece {
                    Some(bytes) => ExecInput::Stdin { bytes },
                    None => {
                        input = None;
                        ExecInput::StdinEnd {}
                    }
                };
                // The end of the connection is seen by the reader, after the exit code.
                let _ = send(&mut writer, &frame).await;
                continue;
            }
        };
        match frame {
            Ok(Some(ExecOutput::Stdout { bytes })) => {
                if let Some(place) = place {
                    place.send(bytes);
                }
            }
            Ok(Some(ExecOutput::Stderr { bytes })) => {
                let room = MAX_STDERR.saturating_sub(stderr.len()).min(bytes.len());
                stderr.extend_from_slice(&bytes[..room]);
            }
            Ok(Some(ExecOutput::Consumed { bytes })) => {
                underway = underway.saturating_sub(bytes);
            }
            Ok(Some(ExecOutput::Exited { cause })) => break Outcome::Exited(cause),
            Ok(Some(ExecOutput::NotStarted { reason, .. })) => break Outcome::NotStarted(reason),
            Ok(None) => return Err(lost("the connection was closed".into())),
            Err(error) => return Err(lost(vmbus::text::chain(&error))),
        }
    };
    let _ = writer.shutdown().await;
    let stderr = String::from_utf8_lossy(&stderr).into_owned();
    Ok(Ended { outcome, stderr })
}

/// The next piece, `None` at the end of the input; never if there is no input.
async fn next_piece(input: &mut Option<mpsc::Receiver<Vec<u8>>>) -> Option<Vec<u8>> {
    match input {
        Some(input) => input.recv().await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_that_changed_meanwhile_are_no_failure() {
        let ended = |code, stderr: &str| Ended {
            outcome: Outcome::Exited(ExitCause::Code(code)),
            stderr: stderr.to_owned(),
        };
        assert!(ended(0, "tar: ./s: socket ignored").is_success());
        assert!(ended(1, "tar: ./log: file changed as we read it").is_success());
        assert!(!ended(1, "").is_success());
        assert!(!ended(1, "tar: ./log: file changed as we read it\ntar: x").is_success());
        assert!(!ended(2, "tar: ./log: file changed as we read it").is_success());
    }
}

//! What is asked of the VMM process of an instance: on behalf of its owner, of
//! clients of its endpoints, and of the heartbeat rule.

use std::io;
use std::os::fd::OwnedFd;

use tokio::net::UnixStream;
use tokio::sync::oneshot;
use vmbus::channel::{EXEC_PORT, tunnel_port};

use super::super::lifecycle::Input;
use super::{Instance, MOST_ASKED, Request};
use crate::endpoints::Incoming;
use crate::vmm::control::{Command, DialOutcome};

/// Said to who asks too much at a time.
const BUSY: &str = "too many questions to the VMM process are open";
/// Said to who wants something of a guest that stands still.
const NO_SPACE: &str = "the host has no space for what the guest writes: it goes on by itself \
    when there is";

/// Our end of a dial to the exec service, and who waits for it.
pub(super) type Dialed = (UnixStream, oneshot::Sender<Result<UnixStream, String>>);

impl Instance {
    pub(super) fn request(&mut self, request: Request) -> bool {
        match request {
            Request::Stop => return self.feed(Input::Stop),
            Request::Kill => return self.feed(Input::Kill),
            Request::Apply(goal) => {
                self.goal.send_replace(*goal);
            }
            Request::Pause(_, answer) if self.is_behind() => {
                let _ = answer.send(Err(BUSY.into()));
            }
            Request::Pause(paused, answer) => {
                let command = if paused {
                    Command::Pause {}
                } else {
                    Command::Resume {}
                };
                let sent = self.command(&command, Vec::new());
                let result = match sent.map_err(|error| error.to_string()) {
                    Ok(()) if !paused && self.liveness.is_paused_for_space() => {
                        Err(NO_SPACE.into())
                    }
                    other => other,
                };
                let _ = answer.send(result);
            }
            Request::Exec(answer) if self.is_busy() => {
                let _ = answer.send(Err(BUSY.into()));
            }
            Request::Stats(answer) if self.is_busy() => {
                let _ = answer.send(Err(BUSY.into()));
            }
            Request::Exec(answer) if self.liveness.is_paused_for_space() => {
                let _ = answer.send(Err(NO_SPACE.into()));
            }
            Request::Exec(answer) => self.exec(answer),
            Request::Stats(answer) => match self.command(&Command::Stats {}, Vec::new()) {
                Ok(()) => {
                    if let Some(boot) = &mut self.boot {
                        boot.stats.push_back(answer);
                    }
                }
                Err(error) => {
                    let _ = answer.send(Err(error.to_string()));
                }
            },
        }
        true
    }

    /// Whether one more question would be too many.
    fn is_busy(&self) -> bool {
        let boot = self.boot.as_ref();
        self.is_behind()
            || boot.is_some_and(|boot| boot.dials.len() + boot.stats.len() >= MOST_ASKED)
    }

    /// Whether the VMM process does not keep up with what is asked of it.
    fn is_behind(&self) -> bool {
        let boot = self.boot.as_ref();
        boot.is_some_and(|boot| boot.process.is_behind())
    }

    fn exec(&mut self, answer: oneshot::Sender<Result<UnixStream, String>>) {
        let result = (|| {
            let (ours, theirs) = UnixStream::pair()?;
            let theirs = OwnedFd::from(theirs.into_std()?);
            let id = self.next_id();
            let port = EXEC_PORT;
            self.command(&Command::Dial { id, port }, vec![theirs])?;
            Ok::<_, io::Error>((id, ours))
        })();
        match (result, &mut self.boot) {
            (Ok((id, stream)), Some(boot)) => {
                boot.dials.insert(id, (stream, answer));
            }
            (Err(error), _) => {
                let _ = answer.send(Err(error.to_string()));
            }
            (Ok(_), None) => {
                let _ = answer.send(Err("no guest runs".into()));
            }
        }
    }

    /// Passes a client on. A VMM process that is behind or gone takes none: its
    /// connection closes.
    pub(super) fn connect(&mut self, connection: Incoming) {
        if self.is_behind() {
            return;
        }
        let id = self.next_id();
        let port = tunnel_port(connection.local_port);
        let _ = self.command(&Command::Dial { id, port }, vec![connection.socket]);
    }

    pub(super) fn command(&mut self, command: &Command, files: Vec<OwnedFd>) -> io::Result<()> {
        match &mut self.boot {
            Some(boot) => boot.process.send(command, files),
            None => Err(io::Error::new(io::ErrorKind::NotConnected, "no guest runs")),
        }
    }

    /// The guest answered, or not.
    pub(super) fn dialed(&mut self, id: u64, outcome: DialOutcome) -> bool {
        let effect = self.liveness.dial_answered(id, outcome);
        if effect.is_some() {
            return self.perform_liveness(effect);
        }
        let Some(boot) = &mut self.boot else {
            return true;
        };
        // Nobody waits for the outcome of a client's connection.
        if let Some((stream, answer)) = boot.dials.remove(&id) {
            let result = match outcome {
                DialOutcome::Connected => Ok(stream),
                other => Err(format!("guest agent does not take exec: {other:?}")),
            };
            let _ = answer.send(result);
        }
        true
    }

    pub(super) fn next_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }
}

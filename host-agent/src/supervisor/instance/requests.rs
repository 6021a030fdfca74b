//! Requests of an instance's owner and connections of its clients, passed on to
//! the VMM process.

use std::io;
use std::os::fd::OwnedFd;

use tokio::net::UnixStream;
use tokio::sync::oneshot;
use vmbus::channel::{EXEC_PORT, TUNNEL_PORT};
use vmbus::frame::encode;
use vmbus::message::TunnelRequest;

use super::super::event::EventKind;
use super::super::lifecycle::Input;
use super::{Instance, MAX_OPEN_REQUESTS, Request};
use crate::endpoints::Incoming;
use crate::guest_stream::GuestStream;
use crate::vmm::control::{Command, DialOutcome};

/// Error for too many outstanding requests.
const BUSY: &str = "too many requests to the VMM process are open";
/// Error for a request that a guest paused for space cannot serve.
const NO_SPACE: &str = "the guest is paused: the host has no space for its writes; it runs again \
    by itself when there is space";

/// A dial to the exec service: our end, and where the outcome goes.
pub(super) type PendingExec = (GuestStream, oneshot::Sender<Result<GuestStream, String>>);

impl Instance {
    pub(super) fn request(&mut self, request: Request) -> bool {
        match request {
            Request::Stop => return self.feed(Input::Stop),
            Request::Kill => return self.feed(Input::Kill),
            Request::Drain => return self.feed(Input::Drain),
            Request::Apply(goal) => {
                self.goal.send_if_modified(|known| {
                    let newer = goal.incarnation > known.incarnation;
                    if newer {
                        *known = *goal;
                    }
                    newer
                });
                self.record();
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
            Request::Exec(answer) if self.liveness.is_paused_for_space() => {
                let _ = answer.send(Err(NO_SPACE.into()));
            }
            Request::Exec(answer) => self.exec(answer),
        }
        true
    }

    /// Whether no more requests that wait for an answer are taken.
    fn is_busy(&self) -> bool {
        let boot = self.boot.as_ref();
        self.is_behind() || boot.is_some_and(|boot| boot.execs.len() >= MAX_OPEN_REQUESTS)
    }

    /// Whether the VMM process does not keep up with the commands sent to it.
    fn is_behind(&self) -> bool {
        let boot = self.boot.as_ref();
        boot.is_some_and(|boot| boot.process.is_behind())
    }

    fn exec(&mut self, answer: oneshot::Sender<Result<GuestStream, String>>) {
        let result = (|| {
            let (ours, theirs) = UnixStream::pair()?;
            let theirs = OwnedFd::from(theirs.into_std()?);
            let id = self.next_id();
            let port = EXEC_PORT;
            let dial = Command::Dial {
                id,
                port,
                first: Vec::new(),
            };
            self.command(&dial, vec![theirs])?;
            Ok::<_, io::Error>((id, ours))
        })();
        match (result, &mut self.boot) {
            (Ok((id, stream)), Some(boot)) => {
                let stream = GuestStream::new(stream, boot.process.closer().clone());
                boot.execs.insert(id, (stream, answer));
            }
            (Err(error), _) => {
                let _ = answer.send(Err(error.to_string()));
            }
            (Ok(_), None) => {
                let _ = answer.send(Err("no guest runs".into()));
            }
        }
    }

    /// Passes a client's connection on. It closes if the VMM process is behind or
    /// gone.
    pub(super) fn connect(&mut self, connection: Incoming) {
        if self.is_behind() {
            return;
        }
        let id = self.next_id();
        let request = TunnelRequest {
            local_port: connection.local_port,
        };
        let dial = Command::Dial {
            id,
            port: TUNNEL_PORT,
            first: encode(&request).expect("a number fits into a frame"),
        };
        let _ = self.command(&dial, vec![connection.socket]);
    }

    /// Gives the VMM process of a durable instance the listening sockets of its role, which
    /// it hands to the next host agent.
    pub(super) fn hold_listeners(&mut self) {
        let boot = self.boot.as_ref().filter(|boot| boot.holds_listeners);
        if !self.parts.durable || boot.is_none() {
            return;
        }
        match self.parts.listeners.duplicates() {
            // If this fails, the process has ended.
            Ok(files) => drop(self.command(&Command::HoldListeners {}, files)),
            Err(error) => {
                let text = format!("cannot duplicate a listening socket: {error}");
                self.report(EventKind::Warning { text });
            }
        }
    }

    pub(super) fn command(&mut self, command: &Command, files: Vec<OwnedFd>) -> io::Result<()> {
        match &mut self.boot {
            Some(boot) => boot.process.send(command, files),
            None => Err(io::Error::new(io::ErrorKind::NotConnected, "no guest runs")),
        }
    }

    /// The outcome of a dial: of a probe, of an exec, or of a client's
    /// connection, for which nothing is left to do.
    pub(super) fn dialed(&mut self, id: u64, outcome: DialOutcome) -> bool {
        let effect = self.liveness.dial_answered(id, outcome);
        if effect.is_some() {
            return self.perform_liveness(effect);
        }
        let boot = self.boot.as_mut();
        if let Some((stream, answer)) = boot.and_then(|boot| boot.execs.remove(&id)) {
            let result = match outcome {
                DialOutcome::Connected => Ok(stream),
                other => Err(format!("guest agent does not take exec: {other:?}")),
            };
            let _ = answer.send(result);
        }
        true
    }

    /// An id that no dial, probe or ping has had.
    pub(super) fn next_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }
}

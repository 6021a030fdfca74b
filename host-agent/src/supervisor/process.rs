//! The VMM process of one boot: started with descriptors only or attached again,
//! driven over its control socket, reaped.

mod attach;
mod handle;

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command as Program, Stdio};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use serde::de::DeserializeOwned;
use tokio::io::Interest;
use tokio::net::UnixStream;

use crate::vmm::control::{Adoption, Attached, Command, Event, ExitReason, Start};
use crate::vmm::spec::{FileIndex, GuestSpec};
use crate::vmm::wire;
pub use attach::{AttachError, Expected, prepare as prepare_adoption};
use handle::ProcessHandle;
pub use handle::ProcessId;

/// Commands that wait for a full socket before those on behalf of clients are
/// refused.
const MAX_WAITING: usize = 192;

/// Why no VMM process could be started.
#[derive(Debug, thiserror::Error)]
#[error("cannot start the VMM process: {step}")]
pub struct SpawnError {
    step: &'static str,
    #[source]
    source: io::Error,
}

/// A VMM process to start.
#[derive(Debug)]
pub struct Launch<'a> {
    /// Number of the guest's boot.
    pub generation: u64,
    /// The guest.
    pub guest: GuestSpec,
    /// The descriptors of `guest` in order.
    pub files: Vec<OwnedFd>,
    /// Standard error.
    pub log: File,
    /// Directory of the instance if the process is to outlive this one:
    /// [`VmmProcess::attach`] finds it there.
    pub outlive_in: Option<&'a Path>,
}

/// A running VMM process. Dropped, it is killed, or left to the next supervisor
/// if it may outlive this one.
#[derive(Debug)]
pub struct VmmProcess {
    process: ProcessHandle,
    control: UnixStream,
    waiting: VecDeque<(Vec<u8>, Vec<OwnedFd>)>,
    /// The exit file of a process that may outlive this one.
    exit: Option<PathBuf>,
    /// The control socket failed.
    hung_up: bool,
    killed: bool,
    unknown_events: u64,
}

impl VmmProcess {
    /// Starts this program again as a VMM process. `admit` is called with the
    /// process id before the process has a guest.
    pub fn spawn(launch: Launch<'_>, admit: impl FnOnce(u32)) -> Result<Self, SpawnError> {
        let step = |step| move |source| SpawnError { step, source };
        let mut files = launch.files;
        let mut add = |file| {
            files.push(file);
            let index = u8::try_from(files.len() - 1);
            FileIndex(index.expect("a packet carries fewer than 256 files"))
        };
        let mut exit = None;
        let mut adoption = None;
        if let Some(dir) = launch.outlive_in {
            let (listener, file) = prepare_adoption(dir).map_err(step("listening socket"))?;
            adoption = Some(Adoption {
                listener: add(listener),
                exit: add(file.into()),
            });
            exit = Some(attach::exit_path(dir));
        }
        let (ours, theirs) = wire::pair().map_err(step("control socket"))?;
        // Standard library: tokio would wait for the child itself.
        let child = Program::new("/proc/self/exe")
            .arg("vmm")
            .env_clear()
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::from(launch.log))
            // A Ctrl-C at the terminal is for the supervisor alone.
            .process_group(0)
            .spawn()
            .map_err(step("exec"))?;
        let process = ProcessHandle::child(child).map_err(step("pidfd"))?;
        // Before it has received Start the process ends when this end of the socket
        // closes: an error from here on leaves no process behind.
        admit(process.id().pid);
        let start = Start {
            generation: launch.generation,
            guest: launch.guest,
            adoption,
        };
        let borrowed: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
        fcntl(&ours, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
            .map_err(|errno| step("control socket")(errno.into()))?;
        // tokio only waits for this socket; `wire` reads and writes whole packets.
        let control = UnixStream::from_std(ours.into()).map_err(step("control socket"))?;
        wire::send(control.as_fd(), &Command::Start(Box::new(start)), &borrowed)
            .map_err(step("send the guest specification"))?;
        Ok(Self::new(process, control, exit))
    }

    /// Attaches to the VMM process that listens in the instance's directory `dir`;
    /// the process and the state of its guest. A failure does nothing to the
    /// process.
    pub async fn attach(dir: &Path, expected: &Expected) -> Result<(Self, Attached), AttachError> {
        attach::attach(dir, expected).await
    }

    const fn new(process: ProcessHandle, control: UnixStream, exit: Option<PathBuf>) -> Self {
        Self {
            process,
            control,
            waiting: VecDeque::new(),
            exit,
            hung_up: false,
            killed: false,
            unknown_events: 0,
        }
    }

    /// Identity for a later [`VmmProcess::attach`].
    pub const fn id(&self) -> ProcessId {
        self.process.id()
    }

    /// Process id.
    pub const fn pid(&self) -> u32 {
        self.id().pid
    }

    /// Sends a command, or keeps it until the socket has space: the kernel queues
    /// few packets. Never waits and never drops a command. A caller that passes on
    /// requests of clients checks [`VmmProcess::is_behind`] first; the
    /// supervisor's own commands are few.
    pub fn send(&mut self, command: &Command, files: Vec<OwnedFd>) -> io::Result<()> {
        self.waiting.push_back((wire::encode(command)?, files));
        self.flush()
    }

    /// Whether too many commands wait to add requests of clients.
    pub fn is_behind(&self) -> bool {
        self.waiting.len() >= MAX_WAITING
    }

    fn flush(&mut self) -> io::Result<()> {
        while let Some((bytes, files)) = self.waiting.front() {
            let borrowed: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
            let sent = self.control.try_io(Interest::WRITABLE, || {
                wire::send_bytes(self.control.as_fd(), bytes, &borrowed)
            });
            match sent {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                other => other?,
            }
            self.waiting.pop_front();
        }
        Ok(())
    }

    /// The next event with its files, or the end of the process. Cancelling loses
    /// nothing.
    pub async fn next(&mut self) -> VmmEvent {
        if self.hung_up {
            return self.end().await;
        }
        while !self.waiting.is_empty() {
            tokio::select! {
                biased;
                ready = self.control.readable() => {
                    let _ = ready;
                    break;
                }
                ready = self.control.writable() => {
                    if let Err(error) = ready.and_then(|()| self.flush()) {
                        // Its last events are still to be read.
                        tracing::debug!(pid = self.pid(), %error, "takes no commands");
                        self.waiting.clear();
                    }
                }
            }
        }
        let received = tokio::select! {
            biased;
            event = receive::<Event>(&self.control) => event,
            // The runtime may report the end of the process before its last events:
            // read them first.
            _ = self.process.ended() => wire::recv(self.control.as_fd()),
        };
        match received {
            Ok(Some((event, files))) => {
                if event == Event::Unknown {
                    self.note_unknown();
                }
                VmmEvent::Event(event, files)
            }
            Err(error) if error.kind() == io::ErrorKind::InvalidData => VmmEvent::Garbled(error),
            // The socket closes a moment before the process ends.
            Ok(None) | Err(_) => {
                self.hung_up = true;
                self.end().await
            }
        }
    }

    async fn end(&mut self) -> VmmEvent {
        let how = self.process.ended().await;
        let reason = self.exit.as_deref().and_then(attach::exit_reason);
        VmmEvent::Ended(Ending { how, reason })
    }

    /// Logs the first event of another build.
    fn note_unknown(&mut self) {
        self.unknown_events = self.unknown_events.saturating_add(1);
        if self.unknown_events == 1 {
            tracing::warn!(pid = self.pid(), "ignores events of another version");
        }
    }

    /// Kills the process; [`VmmProcess::next`] reports its end.
    pub fn kill(&mut self) {
        self.process.kill();
        self.killed = true;
    }

    /// Whether [`VmmProcess::kill`] was called.
    pub const fn was_killed(&self) -> bool {
        self.killed
    }
}

impl Drop for VmmProcess {
    fn drop(&mut self) {
        if self.exit.is_none() {
            self.process.kill();
        }
    }
}

/// An event of a VMM process or about it.
#[derive(Debug)]
pub enum VmmEvent {
    /// The process sent an event.
    Event(Event, Vec<OwnedFd>),
    /// The process sent a packet that is no event. It is ignored.
    Garbled(io::Error),
    /// The process ended.
    Ended(Ending),
}

/// The end of a VMM process.
#[derive(Debug)]
pub struct Ending {
    /// How it ended, in words.
    pub how: io::Result<String>,
    /// The reason in its exit file, for an [`Event::Exited`] that was not received.
    pub reason: Option<ExitReason>,
}

impl Ending {
    /// The exit reason of a process that sent none. `why` is what the kernel knows
    /// of it, `killed` whether this supervisor killed the process.
    pub fn reason(self, why: Option<String>, killed: bool) -> ExitReason {
        if let Some(reason) = self.reason {
            return reason;
        }
        if killed && why.is_none() {
            return ExitReason::Killed;
        }
        let mut detail = match self.how {
            Ok(text) => format!("VMM process {text}"),
            Err(error) => format!("VMM process lost: {error}"),
        };
        if let Some(why) = why {
            detail = format!("{detail}: {why}");
        }
        ExitReason::Failed { detail }
    }
}

async fn receive<T: DeserializeOwned>(
    socket: &UnixStream,
) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    loop {
        socket.readable().await?;
        match socket.try_io(Interest::READABLE, || wire::recv(socket.as_fd())) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests;

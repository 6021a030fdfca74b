//! The VMM process of one boot: started with descriptors only or attached again,
//! driven over its control socket, reaped.

mod attach;
mod control_socket;
mod handle;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command as Program, Stdio};
use std::sync::Arc;
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::closer::Closer;
use crate::endpoints::HandedOver;
use crate::event_budget::EventBudget;
use crate::vmm::control::{Adoption, Attached, Command, Event, ExitReason, Start};
use crate::vmm::spec::{FileIndex, GuestSpec};
use crate::vmm::wire;
pub use attach::{AttachError, Expected, prepare as prepare_adoption};
use control_socket::ControlSocket;
use handle::ProcessHandle;
pub use handle::ProcessId;

/// Most time for the exit file to be read. Short in tests, of which one waits for it.
const EXIT_FILE_LIMIT: Duration = Duration::from_millis(if cfg!(test) { 2000 } else { 5000 });

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
    /// Start no guest if a layer of the sandbox is missing.
    pub require_sandbox: bool,
}

/// A running VMM process. Dropped, it is killed, or left to the next supervisor
/// if it may outlive this one.
#[derive(Debug)]
pub struct VmmProcess {
    process: ProcessHandle,
    control: ControlSocket,
    /// The exit file of a process that may outlive this one.
    exit: Option<PathBuf>,
    /// The read of the exit file, and its deadline: a cancelled [`VmmProcess::next`] must not
    /// begin the time again.
    exit_reading: Option<(JoinHandle<Option<ExitReason>>, Instant)>,
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
            // A Ctrl-C at the terminal is for the supervisor alone. The process begins
            // its own session as soon as it has blocked the signal.
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
            require_sandbox: launch.require_sandbox,
        };
        let borrowed: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
        fcntl(&ours, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
            .map_err(|errno| step("control socket")(errno.into()))?;
        // tokio only waits for this socket; `wire` reads and writes whole packets.
        let control = UnixStream::from_std(ours.into()).map_err(step("control socket"))?;
        wire::send(control.as_fd(), &Command::Start(Box::new(start)), &borrowed)
            .map_err(step("send the guest specification"))?;
        Ok(Self::new(process, ControlSocket::new(control), exit))
    }

    /// Attaches to the VMM process that listens in the instance's directory `dir`;
    /// the process, the state of its guest, and the listening sockets that it held. A
    /// failure does nothing to the process.
    pub async fn attach(
        dir: &Path,
        expected: &Expected,
    ) -> Result<(Self, Attached, HandedOver), AttachError> {
        attach::attach(dir, expected).await
    }

    const fn new(process: ProcessHandle, control: ControlSocket, exit: Option<PathBuf>) -> Self {
        Self {
            process,
            control,
            exit,
            exit_reading: None,
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
        self.control.send(command, files)
    }

    /// Whether too many commands wait to add requests of clients.
    pub fn is_behind(&self) -> bool {
        self.control.is_behind()
    }

    /// The events that the guest may cause in this boot. Once it floods, no more of its
    /// events are read.
    pub const fn budget(&self) -> &Arc<EventBudget> {
        &self.control.budget
    }

    /// Closes descriptors that the VMM process has had.
    pub const fn closer(&self) -> &Closer {
        self.control.closer()
    }

    /// The next event with the descriptor that belongs to it, or the end of the process.
    /// Cancelling loses nothing.
    pub async fn next(&mut self) -> VmmEvent {
        if self.hung_up {
            return self.end().await;
        }
        let received = tokio::select! {
            biased;
            received = self.control.next() => received,
            // The runtime may report the end of the process before its last events:
            // read them first.
            _ = self.process.ended() => self.control.last(),
        };
        match received {
            Ok(Some((Ok(event), file))) => {
                if event == Event::Unknown {
                    self.note_unknown();
                }
                VmmEvent::Event(event, file)
            }
            Ok(Some((Err(error), _))) => VmmEvent::Garbled(error),
            // The socket closes a moment before the process ends.
            Ok(None) | Err(_) => {
                self.hung_up = true;
                self.end().await
            }
        }
    }

    async fn end(&mut self) -> VmmEvent {
        let how = self.process.ended().await;
        let reason = match &self.exit {
            None => None,
            Some(path) => {
                let path = path.clone();
                let read = || tokio::task::spawn_blocking(move || attach::exit_reason(&path));
                let begin = || (read(), Instant::now() + EXIT_FILE_LIMIT);
                let (reading, deadline) = self.exit_reading.get_or_insert_with(begin);
                // A file system that hangs holds up no restart.
                let read = tokio::time::timeout_at(*deadline, reading).await;
                self.exit_reading = None;
                read.ok().and_then(Result::ok).flatten()
            }
        };
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
    /// The process sent an event, with a descriptor if it is [`Event::Opened`].
    Event(Event, Option<OwnedFd>),
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

#[cfg(test)]
pub(super) mod tests;

//! The VMM process of one boot: started with descriptors only, spoken to over
//! its control socket, reaped.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::Stdio;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use serde::de::DeserializeOwned;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::process::{Child, Command as Program};

use crate::vmm::control::{Command, Event, ExitReason};
use crate::vmm::spec::GuestSpec;
use crate::vmm::wire;

/// Commands kept for a socket that is full at the moment, before what others
/// ask for is refused.
const MOST_WAITING: usize = 192;

/// Why no VMM process could be started.
#[derive(Debug, thiserror::Error)]
#[error("cannot start the VMM process: {step}")]
pub struct SpawnError {
    step: &'static str,
    #[source]
    source: io::Error,
}

/// A running VMM process. Dropping it kills the process.
#[derive(Debug)]
pub struct VmmProcess {
    child: Child,
    pid: u32,
    control: UnixStream,
    waiting: VecDeque<(Vec<u8>, Vec<OwnedFd>)>,
    /// Nothing more is taken from it.
    deaf: bool,
    killed: bool,
}

impl VmmProcess {
    /// Starts this program again as the VMM process of `spec`; `files` are
    /// the spec's descriptors in order, `log` takes its standard error. `admit`
    /// is called with the process id before the process has a guest.
    pub fn spawn(
        spec: GuestSpec,
        files: &[OwnedFd],
        log: File,
        admit: impl FnOnce(u32),
    ) -> Result<Self, SpawnError> {
        let step = |step| move |source| SpawnError { step, source };
        let (ours, theirs) = wire::pair().map_err(step("control socket"))?;
        let child = Program::new("/proc/self/exe")
            .arg("vmm")
            .env_clear()
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::from(log))
            // A Ctrl-C at the terminal is for the supervisor alone.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(step("exec"))?;
        let pid = child.id().unwrap_or_default();
        admit(pid);
        let files: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
        wire::send(ours.as_fd(), &Command::Start(Box::new(spec)), &files)
            .map_err(step("hand over the guest"))?;
        fcntl(&ours, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
            .map_err(|errno| step("control socket")(errno.into()))?;
        // tokio only waits for this socket; what is read and written are
        // whole packets, by `wire`.
        let control = UnixStream::from_std(ours.into()).map_err(step("control socket"))?;
        Ok(Self {
            child,
            pid,
            control,
            waiting: VecDeque::new(),
            deaf: false,
            killed: false,
        })
    }

    /// Process id.
    pub const fn pid(&self) -> u32 {
        self.pid
    }

    /// Sends a command, or keeps it until the socket takes it again: the kernel
    /// queues few packets. Never waits. A command of the supervisor's own is
    /// never lost for want of room: they are few. Whoever passes on what others
    /// want asks [`VmmProcess::is_behind`] before.
    pub fn send(&mut self, command: &Command, files: Vec<OwnedFd>) -> io::Result<()> {
        self.waiting.push_back((wire::encode(command)?, files));
        self.flush()
    }

    /// Whether so much waits for the process that no more is to be asked of it
    /// on behalf of others.
    pub fn is_behind(&self) -> bool {
        self.waiting.len() >= MOST_WAITING
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

    /// The next event with its files, or how the process ended. Cancelling
    /// loses nothing.
    pub async fn next(&mut self) -> Happening {
        if self.deaf {
            return Happening::Ended(self.child.wait().await.map(exit_detail));
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
                        // What it said last is still to be read.
                        tracing::debug!(pid = self.pid, %error, "takes no commands");
                        self.waiting.clear();
                    }
                }
            }
        }
        tokio::select! {
            biased;
            event = receive::<Event>(&self.control) => match event {
                Ok(Some((event, files))) => Happening::Event(event, files),
                // The socket closes a moment before the process ends.
                Ok(None) => Happening::Ended(self.child.wait().await.map(exit_detail)),
                Err(error) => {
                    self.deaf = true;
                    Happening::Garbled(error)
                }
            },
            // What it said last is still to be read: a process is seen to have
            // ended before its socket is seen to be readable.
            status = self.child.wait() => match wire::recv(self.control.as_fd()) {
                Ok(Some((event, files))) => Happening::Event(event, files),
                _ => Happening::Ended(status.map(exit_detail)),
            },
        }
    }

    /// Kills the process; [`VmmProcess::next`] tells when it is gone.
    pub fn kill(&mut self) {
        // It fails only when the process has ended already.
        let _ = self.child.start_kill();
        self.killed = true;
    }

    /// Whether [`VmmProcess::kill`] was called.
    pub const fn was_killed(&self) -> bool {
        self.killed
    }
}

/// What a VMM process did.
#[derive(Debug)]
pub enum Happening {
    /// It said something.
    Event(Event, Vec<OwnedFd>),
    /// It sent what is no event.
    Garbled(io::Error),
    /// It is gone; in words, how.
    Ended(io::Result<String>),
}

impl Happening {
    /// The exit reason of a process that ended without giving one; `why` if
    /// the kernel knows. `killed` if we killed it.
    pub fn died(how: io::Result<String>, why: Option<String>, killed: bool) -> ExitReason {
        if killed && why.is_none() {
            return ExitReason::Killed;
        }
        let mut detail = match how {
            Ok(text) => format!("VMM process {text}"),
            Err(error) => format!("VMM process lost: {error}"),
        };
        if let Some(why) = why {
            detail = format!("{detail}: {why}");
        }
        ExitReason::Failed { detail }
    }
}

fn exit_detail(status: std::process::ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with code {code}"),
        (_, Some(signal)) => format!("was killed by signal {signal}"),
        _ => "ended".into(),
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
mod tests {
    use super::*;

    fn process(child: Child, ours: OwnedFd) -> VmmProcess {
        fcntl(&ours, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        VmmProcess {
            pid: 1,
            child,
            control: UnixStream::from_std(ours.into()).unwrap(),
            waiting: VecDeque::new(),
            deaf: false,
            killed: false,
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_crowd_of_clients_takes_no_room_from_the_supervisors_own_commands() {
        let (ours, theirs) = wire::pair().unwrap();
        let child = Program::new("true").spawn().unwrap();
        let mut process = process(child, ours);
        let mut dialed = 0;
        while !process.is_behind() {
            let dial = Command::Dial {
                id: dialed,
                port: 1,
            };
            process.send(&dial, Vec::new()).unwrap();
            dialed += 1;
        }
        let own = [
            Command::Ping { id: 7 },
            Command::Resume {},
            Command::Stop {},
        ];
        for command in &own {
            process.send(command, Vec::new()).unwrap();
        }
        // Now it takes them, in their order.
        let mut taken = Vec::new();
        while taken.len() < dialed as usize + own.len() {
            process.control.writable().await.unwrap();
            process.flush().unwrap();
            taken.push(wire::recv::<Command>(theirs.as_fd()).unwrap().unwrap().0);
        }
        assert_eq!(taken[dialed as usize..], own);
        assert!(!process.is_behind());
    }

    #[tokio::test(flavor = "current_thread")]
    async fn what_a_process_said_last_is_heard_before_its_end() {
        let (ours, theirs) = wire::pair().unwrap();
        let mut child = Program::new("true").spawn().unwrap();
        let said = [Event::GuestPanicked {}, Event::Exited(ExitReason::PowerOff)];
        for event in &said {
            wire::send(theirs.as_fd(), event, &[]).unwrap();
        }
        wire::send(ours.as_fd(), &Command::Stats {}, &[]).unwrap();
        drop(theirs);
        // Nothing here lets the runtime look at the socket.
        while child.try_wait().unwrap().is_none() {
            std::thread::yield_now();
        }
        let mut process = process(child, ours);
        for event in said {
            assert!(matches!(process.next().await, Happening::Event(heard, _) if heard == event));
        }
        for _ in 0..2 {
            let end = process.next().await;
            assert!(matches!(end, Happening::Ended(Ok(how)) if how == "ended with code 0"));
        }
    }
}

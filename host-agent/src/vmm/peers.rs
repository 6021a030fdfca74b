//! Supervisors of this process: the attached one, and those that ask to attach.
//!
//! One supervisor is attached at a time. Another is refused until that one closes
//! its socket, which the kernel does when it dies: two host agents never drive the
//! same guest, and the attached one never loses a guest without noticing. A hung
//! supervisor holds its guests until it is killed.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{Backlog, getsockopt, listen, sockopt};
use vmm_sys_util::eventfd::EventFd;

use super::control::{Attached, Command, Event, VERSIONS};
use super::outbox::Outbox;
use super::virtio::borrow_event;
use super::wire;

/// How often the main thread looks at everything while an event or a connection
/// waits, in milliseconds.
const LOOK_MS: u16 = 500;
/// The same while nothing waits: what changes wakes the thread, except for the
/// second and later violations of a device.
const IDLE_LOOK_MS: u16 = 5000;
/// Time for a connection to send `Attach`.
const ATTACH_LIMIT: Duration = Duration::from_secs(2);
/// Most connections that have not sent `Attach`. More wait in the backlog.
const MAX_CANDIDATES: usize = 4;
/// Backlog of the listening socket.
const BACKLOG: i32 = 8;

/// What supervisors sent.
#[derive(Debug)]
pub enum Message {
    /// A command of the attached supervisor, with its files.
    Command(Command, Vec<OwnedFd>),
    /// A packet of the attached supervisor that is no command.
    Garbled(io::Error),
    /// The attached supervisor closed its socket, or the socket failed.
    Left(Option<io::Error>),
    /// A supervisor may attach: [`Peers::attach`].
    Attach(Candidate),
    /// A connection was dropped.
    Dropped(Rejection),
}

/// Why a connection did not become the supervisor.
#[derive(Debug, thiserror::Error)]
pub enum Rejection {
    /// The user is not that of the first supervisor.
    #[error("user {0} may not attach")]
    User(u32),
    /// No packet in time.
    #[error("a connection sent nothing for {} s", ATTACH_LIMIT.as_secs())]
    Silent,
    /// The first packet was not `Attach`.
    #[error("a connection did not send Attach first")]
    NotAttach,
    /// No version in common.
    #[error("a supervisor speaks versions {0:?} of the control protocol")]
    Version(Vec<u32>),
    /// Another supervisor is attached.
    #[error("another supervisor is attached")]
    Busy,
    /// A system call failed.
    #[error("accept a supervisor: {0}")]
    System(#[from] io::Error),
}

/// A supervisor that may attach.
#[derive(Debug)]
pub struct Candidate {
    socket: OwnedFd,
    /// The version that both ends speak.
    pub version: u32,
    /// It takes the sockets of [`Command::HoldListeners`].
    pub takes_listeners: bool,
}

/// A connection that is not attached.
#[derive(Debug)]
struct Waiting {
    socket: OwnedFd,
    deadline: Instant,
    /// Its `Attach`, once received: the versions, and whether it takes listeners.
    asked: Option<(Vec<u32>, bool)>,
}

/// The supervisors, on the main thread.
#[derive(Debug)]
pub struct Peers {
    outbox: Outbox,
    wake: EventFd,
    attached: Option<Arc<OwnedFd>>,
    listener: Option<UnixListener>,
    /// User of the first supervisor: only processes of this user may attach.
    user: u32,
    waiting: Vec<Waiting>,
    attach_limit: Duration,
}

impl Peers {
    /// `first` is the socket of the first supervisor, which no longer blocks from
    /// here on. `wake` wakes [`Peers::wait`].
    pub fn new(first: OwnedFd, wake: EventFd) -> io::Result<Self> {
        wire::set_nonblocking(&first)?;
        let user = getsockopt(&first, sockopt::PeerCredentials)?.uid();
        let first = Arc::new(first);
        let outbox = Outbox::new(wake.try_clone()?);
        outbox.attach(Arc::clone(&first), None)?;
        Ok(Self {
            outbox,
            wake,
            attached: Some(first),
            listener: None,
            user,
            waiting: Vec::new(),
            attach_limit: ATTACH_LIMIT,
        })
    }

    /// Lets later supervisors connect to `listener`, a bound socket.
    pub fn listen(&mut self, listener: OwnedFd) -> io::Result<()> {
        listen(&listener, Backlog::new(BACKLOG)?)?;
        // Its methods do for any type of Unix socket.
        let listener = UnixListener::from(listener);
        listener.set_nonblocking(true)?;
        self.listener = Some(listener);
        Ok(())
    }

    /// The queue of events.
    pub const fn outbox(&self) -> &Outbox {
        &self.outbox
    }

    /// Wakes [`Peers::wait`].
    pub const fn wake(&self) -> &EventFd {
        &self.wake
    }

    /// Makes `candidate` the supervisor. Its first packet is `attached`, with `listeners` if
    /// it takes them.
    pub fn attach(
        &mut self,
        candidate: Candidate,
        attached: Attached,
        listeners: &[Arc<OwnedFd>],
    ) -> io::Result<()> {
        let mut files = Vec::new();
        if candidate.takes_listeners {
            files.extend_from_slice(listeners);
        }
        let socket = Arc::new(candidate.socket);
        let first = Event::Attached(Box::new(attached));
        self.outbox
            .attach(Arc::clone(&socket), Some((&first, files)))?;
        self.attached = Some(socket);
        Ok(())
    }

    /// Waits for a message, a wake-up, or the time of the next look, and sends
    /// events that had to wait. At most one command at a time.
    pub fn wait(&mut self, soon: bool) -> nix::Result<Vec<Message>> {
        let mut fds = vec![PollFd::new(borrow_event(&self.wake), PollFlags::POLLIN)];
        let listening = self.listener.as_ref();
        let listening = listening.filter(|_| self.waiting.len() < MAX_CANDIDATES);
        let listener_at = listening.map(|listener| {
            fds.push(PollFd::new(listener.as_fd(), PollFlags::POLLIN));
            fds.len() - 1
        });
        let waiting_at = fds.len();
        for waiting in &self.waiting {
            // One that has sent Attach is not read again.
            let interest = match waiting.asked {
                None => PollFlags::POLLIN,
                Some(_) => PollFlags::empty(),
            };
            fds.push(PollFd::new(waiting.socket.as_fd(), interest));
        }
        // Last: whoever sees the new connection of a successor then sees the end of
        // the supervisor too.
        let attached_at = self.attached.as_ref().map(|attached| {
            let mut interest = PollFlags::POLLIN;
            interest.set(PollFlags::POLLOUT, self.outbox.wants_space());
            fds.push(PollFd::new(attached.as_fd(), interest));
            fds.len() - 1
        });
        let waits = soon || !self.waiting.is_empty() || self.outbox.is_behind();
        let look = if waits { LOOK_MS } else { IDLE_LOOK_MS };
        match poll(&mut fds, PollTimeout::from(look)) {
            Err(Errno::EINTR) => return Ok(Vec::new()),
            other => other?,
        };
        let ready: Vec<PollFlags> = fds
            .iter()
            .map(|fd| fd.revents().unwrap_or(PollFlags::empty()))
            .collect();
        drop(fds);
        let at = |index: Option<usize>| index.map_or(PollFlags::empty(), |index| ready[index]);
        if !ready[0].is_empty() {
            // Reset of a counter that may already be zero.
            let _ = self.wake.read();
        }
        // Not only when the socket has space: the kernel may have refused events for
        // another reason, whose end it does not report.
        self.outbox.flush();
        let mut messages = Vec::new();
        self.read_waiting(&ready[waiting_at..], &mut messages);
        if !at(listener_at).is_empty() {
            self.accept(&mut messages);
        }
        let attached = at(attached_at);
        // The end of the stream and errors count as readable.
        if !(attached - PollFlags::POLLOUT).is_empty() {
            self.read_attached(&mut messages);
        }
        // Its last commands come before its successor.
        if self.attached.is_none() || !attached.contains(PollFlags::POLLHUP) {
            self.decide(&mut messages);
        }
        Ok(messages)
    }

    /// Reads the first packet of connections, and drops those that are late.
    fn read_waiting(&mut self, ready: &[PollFlags], messages: &mut Vec<Message>) {
        let now = Instant::now();
        let mut ready = ready.iter();
        self.waiting.retain_mut(|waiting| {
            let ready = ready.next().is_some_and(|ready| !ready.is_empty());
            if waiting.asked.is_some() {
                return true;
            }
            let rejection = if ready {
                match wire::recv::<Command>(waiting.socket.as_fd()) {
                    Ok(Some((
                        Command::Attach {
                            versions,
                            takes_listeners,
                        },
                        _,
                    ))) => {
                        waiting.asked = Some((versions, takes_listeners));
                        return true;
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
                    _ => Rejection::NotAttach,
                }
            } else if now >= waiting.deadline {
                Rejection::Silent
            } else {
                return true;
            };
            messages.push(Message::Dropped(rejection));
            false
        });
    }

    fn accept(&mut self, messages: &mut Vec<Message>) {
        let Some(listener) = &self.listener else {
            return;
        };
        match accept_from(listener, self.user) {
            Ok(socket) => self.waiting.push(Waiting {
                socket,
                deadline: Instant::now() + self.attach_limit,
                asked: None,
            }),
            // The connection is gone already.
            Err(Rejection::System(error)) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(rejection) => messages.push(Message::Dropped(rejection)),
        }
    }

    fn read_attached(&mut self, messages: &mut Vec<Message>) {
        let Some(attached) = &self.attached else {
            return;
        };
        let left = match wire::recv::<Command>(attached.as_fd()) {
            Ok(Some((command, files))) => return messages.push(Message::Command(command, files)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                return messages.push(Message::Garbled(error));
            }
            Ok(None) => None,
            Err(error) => Some(error),
        };
        self.attached = None;
        self.outbox.detach();
        messages.push(Message::Left(left));
    }

    /// Answers connections that sent `Attach`: the first of them may attach if
    /// there is no supervisor.
    fn decide(&mut self, messages: &mut Vec<Message>) {
        let asked = |waiting: &mut Waiting| waiting.asked.is_some();
        let mut taken = self.attached.is_some();
        for waiting in self.waiting.extract_if(.., asked) {
            let (theirs, takes_listeners) = waiting.asked.unwrap_or_default();
            let common = VERSIONS.iter().find(|version| theirs.contains(version));
            let rejection = match common {
                Some(version) if !taken => {
                    taken = true;
                    messages.push(Message::Attach(Candidate {
                        socket: waiting.socket,
                        version: *version,
                        takes_listeners,
                    }));
                    continue;
                }
                Some(_) => Rejection::Busy,
                None => Rejection::Version(theirs),
            };
            let refused = Event::Refused {
                versions: VERSIONS.to_vec(),
                busy: matches!(rejection, Rejection::Busy),
            };
            // It fails only if the connection is closed already.
            let _ = wire::send(waiting.socket.as_fd(), &refused, &[]);
            messages.push(Message::Dropped(rejection));
        }
    }
}

#[cfg(test)]
impl Peers {
    pub(super) const fn set_attach_limit(&mut self, limit: Duration) {
        self.attach_limit = limit;
    }

    pub(super) const fn set_user(&mut self, user: u32) {
        self.user = user;
    }
}

/// Accepts a connection of `user`.
fn accept_from(listener: &UnixListener, user: u32) -> Result<OwnedFd, Rejection> {
    let socket = wire::accept(listener.as_fd())?;
    let peer = getsockopt(&socket, sockopt::PeerCredentials).map_err(io::Error::from)?;
    if peer.uid() != user {
        return Err(Rejection::User(peer.uid()));
    }
    Ok(socket)
}

//! The supervisor's end of a control socket: commands that wait for space, and events
//! within the budget of the guest's boot.
//!
//! The other end may have been taken over by the guest. So an event is small, is read at a
//! limited rate, carries a descriptor only where one belongs, and every other descriptor is
//! closed elsewhere.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::sys::socket::{
    AddressFamily, SockType, SockaddrLike as _, SockaddrStorage, getsockname, getsockopt, sockopt,
};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::time::Instant;

use crate::closer::{Closer, PeerSocket};
use crate::endpoints::HandedOver;
use crate::event_budget::{EventBudget, PAUSE};
use crate::until::until;
use crate::vmm::control::{Command, Event};
use crate::vmm::wire::{self, Received};

/// Commands that wait for a full socket before those on behalf of clients are
/// refused.
const MAX_WAITING: usize = 192;
/// Events in a row after which the tasks of other guests get their turn.
const MAX_IN_A_ROW: u32 = 16;

/// An event with the descriptor that belongs to it.
pub(super) type Incoming = (io::Result<Event>, Option<OwnedFd>);

/// The socket.
#[derive(Debug)]
pub(super) struct ControlSocket {
    /// tokio only waits for this socket; `wire` reads and writes whole packets.
    stream: PeerSocket,
    waiting: VecDeque<(Vec<u8>, Vec<OwnedFd>)>,
    /// Commands whose answer has not come. The guest causes none of these events.
    answers_due: u64,
    in_a_row: u32,
    /// When the next event is read, after one beyond the budget.
    paused_until: Option<Instant>,
    pub(super) budget: Arc<EventBudget>,
}

impl ControlSocket {
    /// A socket that does not block.
    pub(super) fn new(stream: UnixStream) -> Self {
        Self {
            stream: PeerSocket::new(stream, Closer::default()),
            waiting: VecDeque::new(),
            answers_due: 0,
            in_a_row: 0,
            paused_until: None,
            budget: Arc::default(),
        }
    }

    /// Closes what the process has had.
    pub(super) const fn closer(&self) -> &Closer {
        self.stream.closer()
    }

    /// Sends a command, or keeps it until the socket has space.
    pub(super) fn send(&mut self, command: &Command, files: Vec<OwnedFd>) -> io::Result<()> {
        self.waiting.push_back((wire::encode(command)?, files));
        let is_answered = matches!(
            command,
            Command::Dial { .. }
                | Command::Probe { .. }
                | Command::Pause {}
                | Command::Resume {}
                | Command::Ping { .. }
                | Command::Stats {}
        );
        self.answers_due += u64::from(is_answered);
        self.flush()
    }

    /// Whether too many commands wait to add requests of clients.
    pub(super) fn is_behind(&self) -> bool {
        self.waiting.len() >= MAX_WAITING
    }

    pub(super) fn flush(&mut self) -> io::Result<()> {
        let mut sent = Vec::new();
        let result = loop {
            let Some((bytes, files)) = self.waiting.front() else {
                break Ok(());
            };
            let borrowed: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
            let tried = self.stream.try_io(Interest::WRITABLE, || {
                wire::send_bytes(self.stream.as_fd(), bytes, &borrowed)
            });
            match tried {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break Ok(()),
                Err(error) => break Err(error),
                Ok(()) => {}
            }
            let packet = self.waiting.pop_front();
            sent.extend(packet.into_iter().flat_map(|(_, files)| files));
        };
        // The VMM process has them already: it may have set SO_LINGER on them.
        self.closer().close(sent);
        result
    }

    /// Waits for the next event; `None` when the other end is closed. Cancelling loses
    /// nothing.
    pub(super) async fn next(&mut self) -> io::Result<Option<Incoming>> {
        let received = self.receive().await?;
        Ok(received.map(|received| self.admit(received)))
    }

    /// The answer to [`Command::Attach`], with the descriptors of [`Event::Attached`].
    pub(super) async fn answer(&mut self) -> io::Result<Option<(io::Result<Event>, HandedOver)>> {
        let Some(mut received) = self.receive().await? else {
            return Ok(None);
        };
        let files = match received.message {
            Ok(Event::Attached(_)) => std::mem::take(&mut received.files),
            _ => Vec::new(),
        };
        let handed_over = HandedOver::new(files, self.closer().clone());
        let (event, _) = self.admit(received);
        Ok(Some((event, handed_over)))
    }

    /// Waits for the next packet.
    async fn receive(&mut self) -> io::Result<Option<Received<Event>>> {
        if self.in_a_row >= MAX_IN_A_ROW {
            self.in_a_row = 0;
            tokio::task::yield_now().await;
        }
        loop {
            let reads = !self.budget.floods();
            let paused_until = self.paused_until;
            let stream = &self.stream;
            tokio::select! {
                biased;
                () = until(paused_until), if reads && paused_until.is_some() => {
                    self.paused_until = None;
                }
                ready = stream.readable(), if reads && paused_until.is_none() => {
                    ready?;
                    let received = stream.try_io(Interest::READABLE, || {
                        wire::receive(stream.as_fd())
                    });
                    match received {
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                            self.in_a_row = 0;
                        }
                        received => {
                            self.in_a_row += 1;
                            return received;
                        }
                    }
                }
                ready = stream.writable(), if !self.waiting.is_empty() => {
                    if let Err(error) = ready.and_then(|()| self.flush()) {
                        // Its last events are still to be read.
                        tracing::debug!(%error, "a VMM process takes no commands");
                        self.waiting.clear();
                    }
                }
                else => std::future::pending().await,
            }
        }
    }

    /// The next event that is in the socket already. The process has ended.
    pub(super) fn last(&mut self) -> io::Result<Option<Incoming>> {
        if self.budget.floods() {
            return Ok(None);
        }
        let received = wire::receive(self.stream.as_fd())?;
        Ok(received.map(|received| self.admit(received)))
    }

    /// Counts a packet, and takes the descriptor that belongs to its event.
    fn admit(&mut self, received: Received<Event>) -> Incoming {
        let Received { message, files } = received;
        let is_answer = matches!(
            message,
            Ok(Event::Dialed { .. } | Event::Paused { .. } | Event::Pong { .. } | Event::Stats(_))
        ) && self.answers_due > 0;
        let mut price = 1;
        if is_answer {
            self.answers_due -= 1;
            price = 0;
        }
        let mut files = files.into_iter();
        let incoming = match message {
            Ok(Event::Opened { .. }) => match files.next() {
                Some(file) if !is_unix_stream(&file) => {
                    self.closer().close([file]);
                    let text = "a connection whose descriptor is no Unix stream socket";
                    (Err(io::Error::new(io::ErrorKind::InvalidData, text)), None)
                }
                file => (message, file),
            },
            _ => (message, None),
        };
        let others: Vec<OwnedFd> = files.collect();
        price += others.len();
        self.closer().close(others);
        let now = Instant::now();
        for _ in 0..price {
            if !self.budget.spend(now) {
                self.paused_until = Some(now + PAUSE);
            }
        }
        incoming
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        let waiting = std::mem::take(&mut self.waiting);
        self.closer()
            .close(waiting.into_iter().flat_map(|(_, files)| files));
    }
}

/// Whether `file` is what an [`Event::Opened`] carries. Neither call waits.
fn is_unix_stream(file: &OwnedFd) -> bool {
    getsockopt(file, sockopt::SockType) == Ok(SockType::Stream)
        && getsockname::<SockaddrStorage>(file.as_raw_fd())
            .is_ok_and(|address| address.family() == Some(AddressFamily::Unix))
}

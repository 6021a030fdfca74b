//! The worker of a vsock device: one epoll loop for kicks, commands, sockets and
//! deadlines.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::time::Instant;

use tracing::warn;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::connection_table::ConnectionId;
use super::endpoint::{Endpoint, Origin};
use super::muxer::Muxer;
use super::rings::{QUEUES, Rings};
use super::{EventSink, TimeLimits, VsockCounters};
use crate::vmm::control::DialOutcome;
use crate::vmm::virtio::queue::QueueError;

/// Epoll token of commands. The kicks of the queues have the tokens below it, the
/// connections those above it.
const COMMANDS: u64 = QUEUES as u64;
/// Most events per `epoll_wait`.
const EVENTS: usize = 64;
/// Most packets and turns between two calls of `epoll_wait`.
const BATCH: usize = 128;

/// A command of the front or of a handle.
#[derive(Debug)]
pub enum WorkerCommand {
    /// Serve these queues.
    Activate(Box<Rings>),
    /// Drop the queues, then the sender.
    Reset(Sender<()>),
    /// End: the front was dropped.
    End,
    /// Connect a socket to a port of the guest.
    Dial {
        /// Returned with the result.
        id: u64,
        /// Guest port.
        port: u32,
        /// Bytes for the guest before those of the socket.
        first: Vec<u8>,
        /// The socket.
        stream: OwnedFd,
    },
    /// Dial, and end the connection once it is accepted.
    Probe {
        /// Returned with the result.
        id: u64,
        /// Guest port.
        port: u32,
    },
}

/// State of the worker.
pub struct Worker {
    poll: Arc<Epoll>,
    muxer: Muxer,
    rings: Option<Rings>,
    commands: Receiver<WorkerCommand>,
    wake: Arc<EventFd>,
    counters: Arc<VsockCounters>,
}

impl Worker {
    /// A worker without queues.
    pub fn new(
        cid: u64,
        limits: TimeLimits,
        commands: Receiver<WorkerCommand>,
        wake: Arc<EventFd>,
        counters: Arc<VsockCounters>,
        sink: EventSink,
    ) -> io::Result<Self> {
        let poll = Arc::new(Epoll::new()?);
        poll.ctl(
            ControlOperation::Add,
            wake.as_raw_fd(),
            EpollEvent::new(EventSet::IN, COMMANDS),
        )?;
        Ok(Self {
            muxer: Muxer::new(
                cid,
                COMMANDS,
                Arc::clone(&poll),
                limits,
                Arc::clone(&counters),
                sink,
            ),
            poll,
            rings: None,
            commands,
            wake,
            counters,
        })
    }

    /// Runs until the device is dropped.
    pub fn run(mut self) {
        let mut events = vec![EpollEvent::default(); EVENTS];
        loop {
            let count = match self.poll.wait(self.timeout(), &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                Err(error) => {
                    warn!(%error, "vsock: epoll failed");
                    if let Some(rings) = &self.rings {
                        rings.needs_reset(&error);
                    }
                    return;
                }
            };
            let now = Instant::now();
            for event in &events[..count] {
                let result = self.event(event, now);
                self.check(result);
            }
            if !self.take_commands(now) {
                return;
            }
            self.muxer.expire(now);
            let result = self.work(now);
            self.check(result);
            let held = u32::try_from(self.muxer.len()).unwrap_or(u32::MAX);
            self.counters.connections.store(held, Ordering::Relaxed);
        }
    }

    /// Drops the queues of a driver that violated the ring protocol.
    fn check(&mut self, result: Result<(), QueueError>) {
        if let Err(error) = result {
            if let Some(rings) = &self.rings {
                rings.needs_reset(&error);
            }
            self.drop_rings();
        }
    }

    /// Timeout of `epoll_wait` in milliseconds: 0 while there is work, otherwise
    /// until the next deadline.
    fn timeout(&self) -> i32 {
        let busy = self.rings.as_ref().is_some_and(|rings| {
            rings.tx_pending || (self.muxer.has_output() && !rings.is_rx_empty())
        });
        if busy {
            return 0;
        }
        self.muxer.next_deadline().map_or(-1, |deadline| {
            let rest = deadline.saturating_duration_since(Instant::now());
            // Rounded up, so that the deadline has passed on wake-up.
            i32::try_from(rest.as_millis() + 1).unwrap_or(i32::MAX)
        })
    }

    fn event(&mut self, event: &EpollEvent, now: Instant) -> Result<(), QueueError> {
        let token = event.data();
        if token == COMMANDS {
            // `run` takes the commands after every wait.
            let _ = self.wake.read();
            return Ok(());
        }
        if token > COMMANDS {
            let id = ConnectionId(token);
            self.muxer.socket_ready(id, event.event_set(), now);
            return Ok(());
        }
        match (&mut self.rings, token) {
            (Some(rings), 0) => rings.rx_kicked(),
            (Some(rings), 1) => rings.tx_kicked(),
            (Some(rings), _) => {
                rings.events_kicked();
                Ok(())
            }
            (None, _) => Ok(()),
        }
    }

    /// Returns `false` if the worker must end.
    fn take_commands(&mut self, now: Instant) -> bool {
        loop {
            let command = match self.commands.try_recv() {
                Ok(command) => command,
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            };
            match command {
                WorkerCommand::End => {
                    self.drop_rings();
                    return false;
                }
                WorkerCommand::Activate(rings) => self.activate(*rings),
                WorkerCommand::Reset(done) => {
                    self.drop_rings();
                    drop(done);
                }
                WorkerCommand::Dial {
                    id,
                    port,
                    first,
                    stream,
                } => {
                    let endpoint = Endpoint::dialing(Origin::Dial(id), stream, first);
                    self.dial(endpoint, port, now);
                }
                WorkerCommand::Probe { id, port } => {
                    self.dial(Endpoint::new(Origin::Probe(id), None), port, now);
                }
            }
        }
    }

    fn dial(&mut self, endpoint: Endpoint, port: u32, now: Instant) {
        if self.rings.is_some() {
            self.muxer.dial(endpoint, port, now);
        } else {
            self.muxer.answer(endpoint.origin, DialOutcome::Unavailable);
        }
    }

    fn activate(&mut self, rings: Rings) {
        self.drop_rings();
        let added = (0..).zip(rings.kicks()).try_for_each(|(token, kick)| {
            let event = EpollEvent::new(EventSet::IN, token);
            self.poll.ctl(ControlOperation::Add, kick, event)
        });
        let rings = self.rings.insert(rings);
        if let Err(error) = added {
            rings.needs_reset(&error);
            self.drop_rings();
        }
    }

    fn drop_rings(&mut self) {
        self.muxer.clear();
        if let Some(rings) = self.rings.take() {
            for kick in rings.kicks() {
                let event = EpollEvent::default();
                let _ = self.poll.ctl(ControlOperation::Delete, kick, event);
            }
        }
    }

    /// Takes packets of the guest, sends packets to the guest, then raises one
    /// interrupt for both.
    fn work(&mut self, now: Instant) -> Result<(), QueueError> {
        let Some(rings) = &mut self.rings else {
            return Ok(());
        };
        for _ in 0..BATCH {
            if !rings.tx_pending {
                break;
            }
            let Some(chain) = rings.next_packet()? else {
                break;
            };
            self.muxer.packet(&chain, rings.memory(), now);
            rings.return_packet(chain)?;
        }
        self.muxer.output(rings, now, BATCH)?;
        rings.notify()
    }
}

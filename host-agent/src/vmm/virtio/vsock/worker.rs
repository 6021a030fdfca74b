//! The thread of a vsock device: one poll set for kicks, commands, sockets and deadlines.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::time::{Duration, Instant};

use tracing::warn;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::connection_table::ConnectionId;
use super::endpoint::Origin;
use super::muxer::Muxer;
use super::rings::{QUEUES, Rings};
use super::{EventSink, VsockCounters};
use crate::vmm::control::DialOutcome;
use crate::vmm::virtio::Activation;
use crate::vmm::virtio::queue::QueueError;

/// Tokens of the queues' kicks come first, then that of commands.
const COMMANDS: u64 = QUEUES as u64;
/// Events taken from the poll set at once.
const EVENTS: usize = 64;
/// Packets and turns between two looks at the poll set.
const BATCH: usize = 128;

/// What the rest of the process wants.
#[derive(Debug)]
pub enum WorkerCommand {
    /// The driver is ready.
    Activate(Box<Activation>),
    /// Let go of the queues; dropped when done.
    Reset(Sender<()>),
    /// The device is gone: end.
    End,
    /// Dial and join.
    Dial {
        /// For the answer.
        id: u64,
        /// Guest port.
        port: u32,
        /// Joined with the connection.
        stream: OwnedFd,
    },
    /// Dial and drop.
    Probe {
        /// For the answer.
        id: u64,
        /// Guest port.
        port: u32,
    },
}

/// The thread's state.
pub struct Worker {
    poll: Epoll,
    muxer: Muxer,
    rings: Option<Rings>,
    commands: Receiver<WorkerCommand>,
    wake: Arc<EventFd>,
    counters: Arc<VsockCounters>,
}

impl Worker {
    /// A thread without queues.
    pub fn new(
        cid: u64,
        dial_limit: Duration,
        commands: Receiver<WorkerCommand>,
        wake: Arc<EventFd>,
        counters: Arc<VsockCounters>,
        sink: EventSink,
    ) -> io::Result<Self> {
        let poll = Epoll::new()?;
        poll.ctl(
            ControlOperation::Add,
            wake.as_raw_fd(),
            EpollEvent::new(EventSet::IN, COMMANDS),
        )?;
        Ok(Self {
            poll,
            muxer: Muxer::new(cid, COMMANDS, dial_limit, Arc::clone(&counters), sink),
            rings: None,
            commands,
            wake,
            counters,
        })
    }

    /// Runs until the device is gone.
    pub fn run(mut self) {
        let mut events = vec![EpollEvent::default(); EVENTS];
        loop {
            let count = match self.poll.wait(self.timeout(), &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                Err(error) => {
                    warn!(%error, "vsock: poll set failed");
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
            self.muxer.expire(now, &self.poll);
            let result = self.work(now);
            self.check(result);
            let held = u32::try_from(self.muxer.len()).unwrap_or(u32::MAX);
            self.counters.connections.store(held, Ordering::Relaxed);
        }
    }

    /// Lets go of the queues of a driver that broke their rules.
    fn check(&mut self, result: Result<(), QueueError>) {
        if let Err(error) = result {
            if let Some(rings) = &self.rings {
                rings.needs_reset(&error);
            }
            self.drop_rings();
        }
    }

    /// Milliseconds to wait: none while there is work, else to the deadline.
    fn timeout(&self) -> i32 {
        let busy = self.rings.as_ref().is_some_and(|rings| {
            rings.outgoing || (self.muxer.has_output() && !rings.is_starved())
        });
        if busy {
            return 0;
        }
        self.muxer.next_deadline().map_or(-1, |deadline| {
            let rest = deadline.saturating_duration_since(Instant::now());
            // Rounded up, so that a deadline has passed when it wakes us.
            i32::try_from(rest.as_millis() + 1).unwrap_or(i32::MAX)
        })
    }

    fn event(&mut self, event: &EpollEvent, now: Instant) -> Result<(), QueueError> {
        let token = event.data();
        if token == COMMANDS {
            // Orders are taken after every wait.
            let _ = self.wake.read();
            return Ok(());
        }
        if token > COMMANDS {
            let id = ConnectionId(token);
            self.muxer
                .socket_ready(id, event.event_set(), &self.poll, now);
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

    /// False when the thread shall end.
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
                WorkerCommand::Activate(activation) => self.activate(*activation),
                WorkerCommand::Reset(done) => {
                    self.drop_rings();
                    drop(done);
                }
                WorkerCommand::Dial { id, port, stream } => {
                    self.dial(Origin::Dial(id), port, Some(stream), now);
                }
                WorkerCommand::Probe { id, port } => self.dial(Origin::Probe(id), port, None, now),
            }
        }
    }

    fn dial(&mut self, origin: Origin, port: u32, stream: Option<OwnedFd>, now: Instant) {
        if self.rings.is_some() {
            self.muxer.dial(origin, port, stream, now);
        } else {
            self.muxer.answer(origin, DialOutcome::Unavailable);
        }
    }

    fn activate(&mut self, activation: Activation) {
        self.drop_rings();
        let interrupt = activation.interrupt.clone();
        match Rings::new(activation) {
            Ok(rings) => {
                let kicks = rings.kicks();
                self.rings = Some(rings);
                for (token, kick) in (0..).zip(kicks) {
                    let event = EpollEvent::new(EventSet::IN, token);
                    if let Err(error) = self.poll.ctl(ControlOperation::Add, kick, event) {
                        interrupt.needs_reset(&error);
                        self.drop_rings();
                        return;
                    }
                }
            }
            Err(error) => interrupt.needs_reset(&error),
        }
    }

    fn drop_rings(&mut self) {
        self.muxer.clear(&self.poll);
        if let Some(rings) = self.rings.take() {
            for kick in rings.kicks() {
                let event = EpollEvent::default();
                // It was added when the queues came.
                let _ = self.poll.ctl(ControlOperation::Delete, kick, event);
            }
        }
    }

    /// Packets of the guest, then packets for it, then one interrupt.
    fn work(&mut self, now: Instant) -> Result<(), QueueError> {
        let Some(rings) = &mut self.rings else {
            return Ok(());
        };
        for _ in 0..BATCH {
            if !rings.outgoing {
                break;
            }
            let Some(chain) = rings.next_packet()? else {
                break;
            };
            self.muxer.packet(&chain, rings.memory(), &self.poll, now);
            rings.return_packet(chain)?;
        }
        self.muxer.output(rings, &self.poll, now, BATCH)?;
        rings.notify()
    }
}

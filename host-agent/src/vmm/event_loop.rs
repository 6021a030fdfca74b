//! The main thread while there is a guest: commands of the supervisor, reports of
//! processors, the state of devices. At the end it stops the guest.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::control::{Attached, Command, DialOutcome, Event, ExitReason, MAX_LISTENERS, Stats};
use super::disk_watch::DiskWatch;
use super::machine::DiskState;
use super::peers::{Candidate, Message, Peers};
use super::teardown::Teardown;
use super::vcpu::VcpuReport;
use crate::token_bucket::{LogLimit, MISBEHAVIOUR, TokenBucket, VMM_LOG};

/// Most time for the guest to stop, with the last flush of its disks. What the
/// guest flushed itself is safe by then.
const STOP_LIMIT: Duration = Duration::from_secs(120);

/// What the main thread does with a guest.
pub trait Guest: Send + 'static {
    /// The next report of a processor.
    fn report(&mut self) -> Option<VcpuReport>;
    /// The disks.
    fn disks(&self) -> &[DiskState];
    /// Devices that met a violation since the last call.
    fn broken_devices(&mut self) -> Vec<Event>;
    /// Takes the processors out of the guest until [`Guest::resume`]. It may return
    /// before all of them are: [`Guest::is_paused`].
    fn pause(&self);
    /// Whether every processor is out of the guest, after [`Guest::pause`].
    fn is_paused(&self) -> bool;
    /// Lets the processors run.
    fn resume(&self);
    /// Connects `socket` to `port`, which gets the bytes `first` before those of the socket;
    /// the outcome is reported under `number`.
    fn dial(&self, number: u64, port: u32, first: Vec<u8>, socket: OwnedFd);
    /// Connects to `port` and closes the connection.
    fn probe(&self, number: u64, port: u32);
    /// Counters.
    fn stats(&self) -> Stats;
    /// Stops the guest. May wait for the host's disks.
    fn stop(self);
}

/// One boot, as its supervisors know it.
#[derive(Debug)]
pub struct Boot {
    /// Instance name.
    pub name: String,
    /// Number of the boot.
    pub generation: u64,
    /// Start of the process.
    pub started: Instant,
    /// Microseconds from there until the vCPUs ran.
    pub setup_us: u64,
    /// Whether the guest runs on without a supervisor.
    pub outlives: bool,
}

/// The main loop.
pub struct EventLoop<G> {
    peers: Peers,
    /// `None` once the guest is being stopped.
    guest: Option<G>,
    /// `None` from then on too.
    teardown: Option<Teardown<G>>,
    boot: Boot,
    disks: DiskWatch,
    pause: PauseReasons,
    fails_when_full: bool,
    /// Kept for the next supervisor.
    listeners: Vec<Arc<OwnedFd>>,
    panicked: bool,
    panic_reported: bool,
    /// Limits reports about devices, which a guest can break again and again.
    broken_devices: TokenBucket<Instant>,
    exit: Option<ExitReason>,
    /// Of a guest that is being stopped.
    last_stats: Stats,
    ignored_commands: u64,
    log: LogLimit<Instant>,
    /// [`STOP_LIMIT`], except in tests.
    stop_limit: Duration,
}

/// Why the processors are paused: each reason is enough.
#[derive(Debug, Default)]
struct PauseReasons {
    /// [`Command::Pause`].
    command: bool,
    /// The command is not answered yet: a processor is late.
    unanswered: bool,
    /// A disk holds a write for which the host has no space.
    no_space: bool,
}

impl<G: Guest> EventLoop<G> {
    /// A loop for a guest that has just started. `teardown` calls [`Guest::stop`].
    pub fn new(peers: Peers, guest: G, boot: Boot, teardown: Teardown<G>) -> Self {
        Self {
            peers,
            disks: DiskWatch::new(guest.disks()),
            guest: Some(guest),
            teardown: Some(teardown),
            boot,
            pause: PauseReasons::default(),
            fails_when_full: false,
            listeners: Vec::new(),
            panicked: false,
            panic_reported: false,
            broken_devices: TokenBucket::new(MISBEHAVIOUR),
            exit: None,
            last_stats: Stats::default(),
            ignored_commands: 0,
            log: LogLimit::new(VMM_LOG),
            stop_limit: STOP_LIMIT,
        }
    }

    /// Runs until the guest has ended and is stopped; why it ended.
    pub fn run(mut self) -> ExitReason {
        let reason = loop {
            if let Err(error) = self.turn() {
                let detail = format!("poll: {error}");
                self.exit.get_or_insert(ExitReason::Failed { detail });
            }
            if let Some(reason) = self.exit.clone() {
                break reason;
            }
        };
        let flushed = self.stop();
        // The last flush is part of the stop.
        self.disks.report_failures(self.peers.outbox());
        if flushed {
            return reason;
        }
        let limit = self.stop_limit;
        ExitReason::Failed {
            detail: format!("{reason:?}, and the disks were not flushed within {limit:?}"),
        }
    }

    fn turn(&mut self) -> io::Result<()> {
        let soon = self.pause.unanswered || self.disks.is_report_late();
        let messages = self.peers.wait(soon)?;
        self.reports();
        self.report_panic();
        for message in messages {
            self.message(message);
        }
        if let (Some(guest), None) = (&mut self.guest, &self.exit) {
            for event in guest.broken_devices() {
                // `Stats` counts the violations that are not reported.
                if self.broken_devices.take(Instant::now()) {
                    self.peers.outbox().send(&event, vec![]);
                }
            }
            self.disks.report_failures(self.peers.outbox());
            self.pause_without_space();
            self.answer_pause();
        }
        Ok(())
    }

    /// Stops the guest on a thread of its own, and answers supervisors meanwhile:
    /// the process does not hang, its disk may be slow. False if the guest did not
    /// stop in time.
    fn stop(&mut self) -> bool {
        let (Some(guest), Some(teardown)) = (self.guest.take(), self.teardown.take()) else {
            return true;
        };
        self.last_stats = guest.stats();
        let limit = self.stop_limit;
        let serve = || {
            let messages = self.peers.wait(false)?;
            for message in messages {
                self.message(message);
            }
            Ok(())
        };
        teardown.run_while(guest, serve, limit)
    }

    fn reports(&mut self) {
        while let Some(report) = self.guest.as_mut().and_then(G::report) {
            match report {
                VcpuReport::Exit(reason) => {
                    self.exit.get_or_insert(reason);
                    return;
                }
                VcpuReport::Panicked => self.panicked = true,
            }
        }
    }

    /// Reports a panic once, as soon as the outbox takes it.
    fn report_panic(&mut self) {
        if self.panicked && !self.panic_reported {
            self.panic_reported = self.peers.outbox().send(&Event::GuestPanicked {}, vec![]);
        }
    }

    fn message(&mut self, message: Message) {
        match message {
            Message::Command(command, files) => self.command(command, files),
            // One packet, not the stream: no reason to end a guest.
            Message::Garbled(error) => {
                self.ignored_commands = self.ignored_commands.saturating_add(1);
                self.warn(&format_args!("not a command: {error}"));
            }
            Message::Left(error) => {
                if let Some(error) = &error {
                    self.warn(&format_args!("control socket: {error}"));
                }
                if !self.boot.outlives {
                    let reason = error.map_or(ExitReason::Stopped, |error| ExitReason::Failed {
                        detail: format!("control socket: {error}"),
                    });
                    self.exit.get_or_insert(reason);
                }
            }
            Message::Attach(candidate) => self.attach(candidate),
            Message::Dropped(rejection) => self.warn(&rejection),
        }
    }

    fn attach(&mut self, candidate: Candidate) {
        let (no_space, failed_disks) = self.disks.attached();
        let attached = Attached {
            version: candidate.version,
            name: self.boot.name.clone(),
            generation: self.boot.generation,
            setup_us: self.boot.setup_us,
            uptime_ms: u64::try_from(self.boot.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            paused: self.pause.command,
            fails_when_full: self.fails_when_full,
            no_space,
            failed_disks,
            panicked: self.panicked,
            exit: self.exit.clone(),
            holds_listeners: true,
            stats: self.stats(),
            ignored_commands: self.ignored_commands,
        };
        match self.peers.attach(candidate, attached, &self.listeners) {
            Ok(()) => self.panic_reported = self.panicked,
            Err(error) => self.warn(&format_args!("attach a supervisor: {error}")),
        }
    }

    fn command(&mut self, command: Command, files: Vec<OwnedFd>) {
        // After the end the supervisor can only kill the process.
        let guest = self.guest.as_ref().filter(|_| self.exit.is_none());
        match (command, guest) {
            (Command::Ping { id }, _) => self.send(&Event::Pong { id }),
            (Command::Stats {}, _) => self.send(&Event::Stats(self.stats())),
            (Command::Dial { id, port, first }, Some(guest)) => {
                if let Some(socket) = files.into_iter().next() {
                    guest.dial(self.peers.outbox().dial(id), port, first, socket);
                } else {
                    self.unavailable(id);
                    self.warn(&"a dial came without its descriptor");
                }
            }
            (Command::Probe { id, port }, Some(guest)) => {
                guest.probe(self.peers.outbox().dial(id), port);
            }
            (Command::Dial { id, .. } | Command::Probe { id, .. }, None) => self.unavailable(id),
            (Command::Pause {}, Some(guest)) => {
                guest.pause();
                self.pause.command = true;
                self.pause.unanswered = true;
                self.answer_pause();
            }
            (Command::Resume {}, Some(guest)) => {
                if !self.pause.no_space {
                    guest.resume();
                }
                self.pause.command = false;
                self.pause.unanswered = false;
                self.send(&Event::Paused { paused: false });
            }
            (Command::FailWhenFull {}, Some(_)) => {
                self.fails_when_full = true;
                self.disks.fail_when_full();
            }
            (Command::HoldListeners {}, _) => {
                let held = files.into_iter().take(MAX_LISTENERS);
                self.listeners = held.map(Arc::new).collect();
            }
            (Command::Stop {}, Some(_)) => self.exit = Some(ExitReason::Stopped),
            (
                Command::Pause {}
                | Command::Resume {}
                | Command::FailWhenFull {}
                | Command::Stop {},
                None,
            ) => {}
            // First messages, which this supervisor has sent already, and commands of
            // another build.
            (Command::Start(_) | Command::Attach { .. } | Command::Unknown, _) => {
                self.ignored_commands = self.ignored_commands.saturating_add(1);
                self.warn(&"unknown command");
            }
        }
    }

    /// Answers [`Command::Pause`] once every processor is out of the guest.
    fn answer_pause(&mut self) {
        let paused = self.guest.as_ref().is_some_and(G::is_paused);
        if self.pause.unanswered && paused {
            self.pause.unanswered = false;
            self.send(&Event::Paused { paused: true });
        }
    }

    fn unavailable(&self, id: u64) {
        let outcome = DialOutcome::Unavailable;
        self.send(&Event::Dialed { id, outcome });
    }

    fn stats(&self) -> Stats {
        let guest = self.guest.as_ref();
        guest.map_or_else(|| self.last_stats.clone(), G::stats)
    }

    /// Pauses the guest while a disk holds a write for which the host has no space:
    /// else a time limit in the guest could run out meanwhile.
    fn pause_without_space(&mut self) {
        let before = std::mem::replace(&mut self.pause.no_space, self.disks.check());
        if let Some(guest) = &self.guest {
            match (before, self.pause.no_space) {
                (false, true) => guest.pause(),
                (true, false) if !self.pause.command => guest.resume(),
                _ => {}
            }
        }
        self.disks.report_space(self.peers.outbox());
    }

    /// A supervisor that is too far behind loses the event; the guest goes on.
    fn send(&self, event: &Event) {
        self.peers.outbox().send(event, vec![]);
    }

    /// Logs a problem with the control socket, at a limited rate.
    fn warn(&mut self, text: &dyn std::fmt::Display) {
        if let Some(suppressed) = self.log.allow(Instant::now()) {
            tracing::warn!("{text}; {suppressed} more before");
        }
    }
}

#[cfg(test)]
mod tests;

//! A VMM process from its first instruction to its exit code.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::sync::{OnceLock, mpsc};
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use vmbus::text::chain;
use vmm_sys_util::eventfd::EventFd;

use super::control::{Command, DialOutcome, Event, ExitReason, Start, Stats};
use super::disk_watch::DiskWatch;
use super::machine::{Files, Machine, MachineError};
use super::outbox::Outbox;
use super::serial::SerialOutput;
use super::spec::GuestSpec;
use super::vcpu::VcpuReport;
use super::{teardown, wire};
use crate::queued_writer::{QueuedWriter, RotatingFile};
use crate::token_bucket::{LogLimit, VMM_LOG};

/// Most time for the machine to stop, the disks' last flush with it. By then a
/// guest has what it flushed itself, and nobody knows whether the rest will ever
/// be written.
const STOP_LIMIT: Duration = Duration::from_secs(120);
/// Time for the last serial output to get into its log.
const LAST_OUTPUT: Duration = Duration::from_secs(2);

/// File descriptors: 1,023 connections with one each, those of the devices, and
/// as many again on their way in packets.
const MOST_FILES: u64 = 4096;
/// Of 1000: guests go before the host agent and before what else runs here.
const OOM_SCORE: &str = "500";

/// Time for the supervisor to take the last events, before the process ends
/// without them.
const FAREWELL: Duration = Duration::from_secs(2);

/// Why the process ends without a guest.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error("control socket")]
    Socket(#[source] io::Error),
    #[error("the first command is not Start")]
    NoStart,
    #[error("serial log")]
    Serial(#[source] io::Error),
    #[error(transparent)]
    Machine(#[from] MachineError),
}

/// The whole process, after [`crate::child::begin`]: standard input is the
/// control socket.
pub fn main() -> ExitCode {
    let started = Instant::now();
    limit_itself();
    let control = io::stdin().as_fd().try_clone_to_owned();
    let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
    let (control, wake, waker) = match (control, wake) {
        (Ok(control), Ok(wake)) => match wake.try_clone() {
            Ok(waker) => (control, wake, waker),
            Err(error) => return hopeless(&error),
        },
        (Err(error), _) | (_, Err(error)) => return hopeless(&error),
    };
    // The first command is waited for; from then on the socket does not block.
    let start = wire::recv::<Command>(control.as_fd());
    let outbox = match Outbox::new(control, waker) {
        Ok(outbox) => outbox,
        Err(error) => return hopeless(&error),
    };
    report_panics(outbox.clone());
    if let Err(error) = start_log() {
        note(&format!("warnings are not logged: {error}"));
    }
    let ran = match start.map_err(StartError::Socket) {
        Ok(Some((Command::Start(start), files))) => run(*start, files, &outbox, wake, started),
        Ok(_) => Err(StartError::NoStart),
        Err(error) => Err(error),
    };
    let reason = match ran {
        Ok(reason) => reason,
        Err(error) => {
            let reason = chain(&error);
            note(&reason);
            let detail = reason.clone();
            outbox.send(&Event::StartFailed { reason }, vec![]);
            ExitReason::Failed { detail }
        }
    };
    let code = reason.code();
    outbox.finish(&Event::Exited(reason), FAREWELL);
    if let Some(log) = LOG.get() {
        log.finish(LAST_OUTPUT);
    }
    ExitCode::from(code)
}

fn hopeless(error: &io::Error) -> ExitCode {
    note(&format!("no control socket: {error}"));
    ExitCode::from(2)
}

/// Writes to standard error, which is `vmm.log`: a slow disk stops no vCPU and
/// no device.
static LOG: OnceLock<QueuedWriter> = OnceLock::new();

/// Sends warnings to `vmm.log`. Those that a guest can cause are limited in rate.
fn start_log() -> io::Result<()> {
    let stderr = File::from(io::stderr().as_fd().try_clone_to_owned()?);
    let log = QueuedWriter::start("log", stderr)?;
    let log = LOG.get_or_init(|| log);
    let lines = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::WARN)
        .with_writer(move || log)
        .with_ansi(false)
        .with_target(false)
        // It would print what could not be printed, and end the thread.
        .log_internal_errors(false)
        .finish();
    // There is no other: this is the only call in the process.
    let _ = tracing::subscriber::set_global_default(lines);
    Ok(())
}

/// No core file with a guest's memory in it, no more descriptors than its
/// connections need, and the first to go when the host runs out of memory.
/// None of them is a reason to run no guest.
fn limit_itself() {
    let _ = setrlimit(Resource::RLIMIT_CORE, 0, 0);
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let most = MOST_FILES.min(hard);
        let _ = setrlimit(Resource::RLIMIT_NOFILE, most, most);
    }
    let _ = std::fs::write("/proc/self/oom_score_adj", OOM_SCORE);
}

/// Writes a line to `vmm.log`.
fn note(text: &dyn std::fmt::Display) {
    let line = format!("host-agent vmm: {text}");
    match LOG.get() {
        Some(log) => log.line(&line),
        // The process ends before it has a guest.
        None => drop(writeln!(io::stderr(), "{line}")),
    }
}

/// A thread that ends by a bug of ours must not leave a guest that hangs: the
/// process ends with it, and says why.
fn report_panics(outbox: Outbox) {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let reason = ExitReason::Failed {
            detail: format!("bug: {panic}"),
        };
        let code = reason.code();
        outbox.finish(&Event::Exited(reason), FAREWELL);
        // Last, because a stalled disk blocks it.
        usual(panic);
        std::process::exit(i32::from(code));
    }));
}

fn run(
    start: Start,
    files: Vec<OwnedFd>,
    outbox: &Outbox,
    wake: EventFd,
    started: Instant,
) -> Result<ExitReason, StartError> {
    let outlive = start.adoption.is_some();
    let spec = start.guest;
    let name: String = spec.name.chars().take(15).collect();
    // Only what a process list shows depends on it.
    let _ = std::fs::write("/proc/self/comm", name);
    let mut files = Files::new(files);
    let log = serial_log(&spec, &mut files)?;
    let log = QueuedWriter::start("serial", log).map_err(StartError::Serial)?;
    let serial = SerialOutput::new(started, log);
    let (reports, reported) = mpsc::channel();
    let machine = Machine::build(&spec, files, outbox, &wake, reports, serial)?;
    let setup_us = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
    outbox.send(&Event::Running { setup_us }, vec![]);
    let disks = DiskWatch::new(machine.disks());
    Ok(Loop {
        outbox,
        machine,
        wake,
        reported,
        outlive,
        told_violations: Vec::new(),
        disks,
        standing: Standing::default(),
        complaints: LogLimit::new(VMM_LOG),
        supervised: true,
    }
    .run())
}

fn serial_log(spec: &GuestSpec, files: &mut Files) -> Result<RotatingFile, StartError> {
    let mut take = |index| files.take(index).map(File::from);
    let current = take(spec.serial.current).map_err(StartError::Machine)?;
    let previous = take(spec.serial.previous).map_err(StartError::Machine)?;
    RotatingFile::from_files(current, previous, spec.serial.max_bytes).map_err(StartError::Serial)
}

/// The main thread: commands, reports of processors, the state of devices.
struct Loop<'a> {
    outbox: &'a Outbox,
    machine: Machine,
    wake: EventFd,
    reported: mpsc::Receiver<VcpuReport>,
    outlive: bool,
    told_violations: Vec<u64>,
    disks: DiskWatch,
    standing: Standing,
    complaints: LogLimit<Instant>,
    supervised: bool,
}

/// Why the processors stand still: each reason is enough.
#[derive(Debug, Default)]
struct Standing {
    /// The supervisor wants it.
    ordered: bool,
    /// A disk waits for room.
    no_space: bool,
}

impl Loop<'_> {
    fn run(mut self) -> ExitReason {
        let reason = loop {
            match self.outbox.wait(&self.wake, self.supervised) {
                Ok((command, woken)) => {
                    if woken {
                        // Reset of a counter that may already be zero.
                        let _ = self.wake.read();
                    }
                    if let Some(reason) = self.reports() {
                        break reason;
                    }
                    if command && let Some(reason) = self.command() {
                        break reason;
                    }
                    self.look_at_devices();
                    self.stand_still_without_room();
                }
                Err(error) => {
                    break ExitReason::Failed {
                        detail: format!("poll: {error}"),
                    };
                }
            }
        };
        let Self {
            machine,
            mut disks,
            outbox,
            wake,
            supervised,
            ..
        } = self;
        let serial = machine.serial().clone();
        let stop = |machine: Machine| {
            if let Err(error) = machine.stop() {
                note(&error);
            }
        };
        if !teardown::run_answering(machine, stop, STOP_LIMIT, (outbox, &wake), supervised) {
            note(&"the disks were not flushed in time");
        }
        // The last flush is part of the stop.
        disks.report_failures(outbox);
        serial.finish(LAST_OUTPUT);
        match reason {
            ExitReason::Reboot if serial.shows_panic() => ExitReason::Panic,
            other => other,
        }
    }

    /// Notes what is wrong with a packet, at a limited rate.
    fn complain(&mut self, text: &dyn std::fmt::Display) {
        if let Some(suppressed) = self.complaints.allow(Instant::now()) {
            note(&format_args!("{text}; {suppressed} more before"));
        }
    }

    /// A supervisor that is gone or hung loses events; the guest goes on.
    fn tell(&self, event: &Event) {
        self.outbox.send(event, vec![]);
    }

    fn reports(&mut self) -> Option<ExitReason> {
        while let Ok(report) = self.reported.try_recv() {
            match report {
                VcpuReport::Exit(reason) => return Some(reason),
                VcpuReport::Panicked => self.tell(&Event::GuestPanicked {}),
            }
        }
        None
    }

    fn command(&mut self) -> Option<ExitReason> {
        match wire::recv::<Command>(self.outbox.socket()) {
            Ok(Some((command, files))) => self.obey(command, files),
            Ok(None) if self.outlive => {
                self.supervised = false;
                None
            }
            Ok(None) => Some(ExitReason::Stopped),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            // One packet, and not the stream: a guest is worth more than that.
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                self.complain(&format!("not a command: {error}"));
                None
            }
            Err(error) => Some(ExitReason::Failed {
                detail: format!("control socket: {error}"),
            }),
        }
    }

    fn obey(&mut self, command: Command, files: Vec<OwnedFd>) -> Option<ExitReason> {
        match command {
            // Once is enough.
            Command::Start(_) | Command::Attach { .. } | Command::Unknown => {}
            Command::Dial { id, port } => {
                if let Some(socket) = files.into_iter().next() {
                    self.machine.vsock().dial(id, port, socket);
                } else {
                    self.complain(&"a connection came without its descriptor");
                    let outcome = DialOutcome::Unavailable;
                    self.tell(&Event::Dialed { id, outcome });
                }
            }
            Command::Probe { id, port } => self.machine.vsock().probe(id, port),
            Command::Pause {} => {
                self.stand_still();
                self.standing.ordered = true;
                self.tell(&Event::Paused { paused: true });
            }
            Command::Resume {} => {
                self.standing.ordered = false;
                if !self.standing.no_space {
                    self.machine.vcpus().resume();
                }
                self.tell(&Event::Paused { paused: false });
            }
            Command::FailWhenFull {} => self.disks.fail_when_full(),
            Command::Ping { id } => self.tell(&Event::Pong { id }),
            Command::Stats {} => self.tell(&Event::Stats(self.stats())),
            Command::Stop {} => return Some(ExitReason::Stopped),
        }
        None
    }

    fn stats(&self) -> Stats {
        let serial = self.machine.serial();
        let vsock = self.machine.vsock();
        let disks = self.machine.disks().iter();
        let refused = disks.map(|disk| disk.counters.refused.load(Ordering::Relaxed));
        Stats {
            exits: self.machine.vcpus().exits(),
            first_serial_us: serial.first_us(),
            serial_dropped: serial.dropped(),
            violations: self
                .machine
                .bus()
                .virtio()
                .iter()
                .map(|transport| transport.interrupt().violations())
                .sum(),
            refused: refused.sum::<u64>() + vsock.refused(),
            vsock_connections: vsock.connections(),
        }
    }

    /// Tells of each device that broke since the last look, though a reset may
    /// have mended it meanwhile, and of disks that the host cannot serve.
    fn look_at_devices(&mut self) {
        let devices = self.machine.bus().virtio();
        self.told_violations.resize(devices.len(), 0);
        for (transport, told) in devices.iter().zip(&mut self.told_violations) {
            let violations = transport.interrupt().violations();
            if violations > *told {
                let event = Event::DeviceNeedsReset {
                    device: transport.interrupt().name().to_owned(),
                    reason: transport.interrupt().reason(),
                };
                self.outbox.send(&event, vec![]);
            }
            *told = violations;
        }
        self.disks.report_failures(self.outbox);
    }

    /// Takes the processors out of the guest. One that is late is not in it: it
    /// resets a device, say, that waits for the host's disk. It stops when it
    /// would enter the guest again.
    fn stand_still(&self) {
        if let Err(error) = self.machine.vcpus().pause() {
            note(&error);
        }
    }

    /// Takes the processors out of the guest while a disk waits for room, so
    /// that no time limit in the guest runs out over it.
    fn stand_still_without_room(&mut self) {
        let before = std::mem::replace(&mut self.standing.no_space, self.disks.check());
        match (before, self.standing.no_space) {
            (false, true) => self.stand_still(),
            (true, false) if !self.standing.ordered => self.machine.vcpus().resume(),
            _ => {}
        }
        self.disks.report_space(self.outbox);
    }
}

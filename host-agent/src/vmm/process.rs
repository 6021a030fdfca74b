//! A VMM process from its start to its exit code.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock, mpsc};
use std::time::{Duration, Instant};

use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use vmbus::text::chain;
use vmm_sys_util::eventfd::EventFd;

use super::control::{Command, Event, ExitReason, Start, Stats};
use super::event_loop::{Boot, EventLoop, Guest};
use super::exit_report::ExitReport;
use super::machine::{DiskState, Files, Machine, MachineError};
use super::peers::Peers;
use super::sandbox::{self, FilterError, SandboxReport, ThreadClass};
use super::serial::SerialOutput;
use super::spec::GuestSpec;
use super::start_code;
use super::teardown::Teardown;
use super::vcpu::VcpuReport;
use super::wire;
use crate::queued_writer::{QueuedWriter, RotatingFile};

/// Time to write the last serial output to its log.
const LAST_OUTPUT: Duration = Duration::from_secs(2);

/// Descriptors: one for each of 1,023 connections, those of the devices, and as
/// many again on their way in packets.
const MAX_FILES: u64 = 4096;
/// Largest size in bytes of `vmm.log`, far more than its lines, which are limited
/// in rate, reach.
const MAX_LOG: u64 = 64 << 20;
/// Of 1000: the OOM killer ends guests before the host agent and other processes.
const OOM_SCORE: &str = "500";

/// Why the process ends without a guest.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error("control socket")]
    Socket(#[source] io::Error),
    #[error("the first command is not Start")]
    NoStart,
    #[error("the sandbox is required and incomplete: {0}")]
    Sandbox(SandboxReport),
    #[error("listening socket")]
    Listen(#[source] io::Error),
    #[error("serial log")]
    Serial(#[source] io::Error),
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error("thread for the end")]
    Teardown(#[source] io::Error),
    #[error(transparent)]
    Filter(#[from] FilterError),
}

/// The whole process, after [`crate::child::begin`]: standard input is the
/// control socket.
pub fn main() -> ExitCode {
    let started = Instant::now();
    limit_itself();
    // Waits for the first command, before which the supervisor reads what it has to
    // know of this process from /proc. Peers makes the socket non-blocking.
    let start = wire::recv::<Command>(io::stdin().as_fd());
    let peers = match connect() {
        Ok(peers) => peers,
        Err(error) => {
            note(&format!("no control socket: {error}"));
            return ExitCode::from(2);
        }
    };
    let outbox = peers.outbox().clone();
    let sandbox = sandbox::enter();
    let report = Arc::new(ExitReport::new(outbox.clone()));
    report_panics(Arc::clone(&report));
    if let Err(error) = start_log() {
        note(&format!("warnings are not logged: {error}"));
    }
    let ran = match start.map_err(StartError::Socket) {
        Ok(Some((Command::Start(start), files))) => {
            run(*start, files, peers, &report, started, sandbox)
        }
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
    if let Err(error) = report.finish(reason) {
        note(&format!("exit file: {error}"));
    }
    if let Some(log) = LOG.get() {
        log.finish(LAST_OUTPUT);
    }
    ExitCode::from(code)
}

fn connect() -> io::Result<Peers> {
    let control = io::stdin().as_fd().try_clone_to_owned()?;
    Peers::new(
        control,
        EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
    )
}

/// Writes to standard error, which is `vmm.log`: a slow disk stops no vCPU and
/// no device.
static LOG: OnceLock<QueuedWriter> = OnceLock::new();

/// Sends warnings to `vmm.log`. Those that a guest can cause are limited in rate.
fn start_log() -> io::Result<()> {
    let stderr = File::from(io::stderr().as_fd().try_clone_to_owned()?);
    let log = queued_writer("log", stderr)?;
    let log = LOG.get_or_init(|| log);
    let lines = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::WARN)
        .with_writer(move || log)
        .with_ansi(false)
        .with_target(false)
        // Reporting a failed write to standard error would panic.
        .log_internal_errors(false)
        .finish();
    // Fails only if there is a subscriber already; this is the only call.
    let _ = tracing::subscriber::set_global_default(lines);
    Ok(())
}

/// A writer whose thread has a filter.
fn queued_writer(name: &str, target: impl io::Write + Send + 'static) -> io::Result<QueuedWriter> {
    QueuedWriter::start_by(
        |work| sandbox::spawn(ThreadClass::Log, name, work).map(drop),
        target,
    )
}

/// No terminal, no core file with guest memory, a bound on descriptors, and a high
/// OOM score. The guest runs even if one of them fails.
fn limit_itself() {
    sandbox::leave_session();
    let _ = setrlimit(Resource::RLIMIT_CORE, 0, 0);
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let most = MAX_FILES.min(hard);
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

/// Ends the process when a thread panics, and reports why: the guest would hang
/// without it.
fn report_panics(report: Arc<ExitReport>) {
    std::panic::set_hook(Box::new(move |panic| {
        let reason = ExitReason::Failed {
            detail: format!("bug: {panic}"),
        };
        let code = reason.code();
        // The process ends without a report rather than not at all.
        let _ = report.finish(reason);
        // Last, because a stalled disk blocks it. The usual hook may look for the
        // program's symbols, and no filter allows `open`.
        let name = std::thread::current().name().unwrap_or_default().to_owned();
        let _ = writeln!(io::stderr(), "host-agent vmm: thread {name} {panic}");
        std::process::exit(i32::from(code));
    }));
}

fn run(
    start: Start,
    files: Vec<OwnedFd>,
    mut peers: Peers,
    report: &ExitReport,
    started: Instant,
    sandbox: SandboxReport,
) -> Result<ExitReason, StartError> {
    if start.require_sandbox && !sandbox.is_complete() {
        return Err(StartError::Sandbox(sandbox));
    }
    let spec = start.guest;
    let mut files = Files::new(files);
    if let Some(adoption) = &start.adoption {
        report.write_to(files.take(adoption.exit)?.into());
        let listener = files.take(adoption.listener)?;
        peers.listen(listener).map_err(StartError::Listen)?;
    }
    if let Ok(name) = CString::new(spec.name.as_str()) {
        // Only what a process list shows depends on it.
        let _ = prctl::set_name(&name);
    }
    let log = serial_log(&spec, &mut files)?;
    let log = queued_writer("serial", log).map_err(StartError::Serial)?;
    let serial = SerialOutput::new(started, log);
    let (reports, reported) = mpsc::channel();
    let output = serial.clone();
    let machine = Machine::build(&spec, files, peers.outbox(), peers.wake(), reports, output)?;
    let max_file_size = machine.max_file_size().max(2 * spec.serial.max_bytes);
    // A guest that takes over this process fills no file system beyond that. Fails
    // only if the limit was lower before.
    let _ = sandbox::limit_file_size(max_file_size.max(MAX_LOG));
    let teardown = peers.wake().try_clone();
    let teardown = teardown.and_then(|wake| Teardown::start(MachineGuest::stop, wake));
    let teardown = teardown.map_err(StartError::Teardown)?;
    // Every thread has its filter before the guest runs.
    sandbox::filter_this(ThreadClass::Main)?;
    machine.vcpus().resume();
    let setup_us = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
    peers
        .outbox()
        .send(&Event::Running { setup_us, sandbox }, vec![]);
    let guest = MachineGuest {
        machine,
        reported,
        seen_violations: Vec::new(),
    };
    let boot = Boot {
        name: spec.name,
        generation: start.generation,
        started,
        setup_us,
        outlives: start.adoption.is_some(),
    };
    start_code::release();
    let reason = EventLoop::new(peers, guest, boot, teardown).run();
    serial.finish(LAST_OUTPUT);
    Ok(match reason {
        ExitReason::Reboot if serial.shows_panic() => ExitReason::Panic,
        other => other,
    })
}

fn serial_log(spec: &GuestSpec, files: &mut Files) -> Result<RotatingFile, StartError> {
    let mut take = |index| files.take(index).map(File::from);
    let current = take(spec.serial.current).map_err(StartError::Machine)?;
    let previous = take(spec.serial.previous).map_err(StartError::Machine)?;
    RotatingFile::from_files(current, previous, spec.serial.max_bytes).map_err(StartError::Serial)
}

/// The machine for the main loop.
struct MachineGuest {
    machine: Machine,
    reported: mpsc::Receiver<VcpuReport>,
    /// Violations of each device that were reported.
    seen_violations: Vec<u64>,
}

impl Guest for MachineGuest {
    fn report(&mut self) -> Option<VcpuReport> {
        self.reported.try_recv().ok()
    }

    fn disks(&self) -> &[DiskState] {
        self.machine.disks()
    }

    fn broken_devices(&mut self) -> Vec<Event> {
        let devices = self.machine.bus().virtio();
        self.seen_violations.resize(devices.len(), 0);
        let mut events = Vec::new();
        for (transport, seen) in devices.iter().zip(&mut self.seen_violations) {
            let violations = transport.interrupt().violations();
            // Even if a reset has repaired the device since.
            if violations > *seen {
                events.push(Event::DeviceNeedsReset {
                    device: transport.interrupt().name().to_owned(),
                    reason: transport.interrupt().reason(),
                });
            }
            *seen = violations;
        }
        events
    }

    /// A late processor may wait in a device's reset for the host's disk. It stops
    /// before it enters the guest again.
    fn pause(&self) {
        if let Err(error) = self.machine.vcpus().pause() {
            note(&error);
        }
    }

    fn is_paused(&self) -> bool {
        self.machine.vcpus().is_paused()
    }

    fn resume(&self) {
        self.machine.vcpus().resume();
    }

    fn dial(&self, number: u64, port: u32, first: Vec<u8>, socket: OwnedFd) {
        let vsock = self.machine.vsock();
        vsock.dial(number, port, first, socket);
    }

    fn probe(&self, number: u64, port: u32) {
        self.machine.vsock().probe(number, port);
    }

    fn stats(&self) -> Stats {
        let serial = self.machine.serial();
        let vsock = self.machine.vsock();
        let disks = self.machine.disks().iter();
        let refused = disks.map(|disk| disk.counters.refused.load(Ordering::Relaxed));
        let devices = self.machine.bus().virtio().iter();
        Stats {
            exits: self.machine.vcpus().exits(),
            first_serial_us: serial.first_us(),
            serial_dropped: serial.dropped(),
            violations: devices
                .map(|transport| transport.interrupt().violations())
                .sum(),
            refused: refused.sum::<u64>() + vsock.refused(),
            vsock_connections: vsock.connections(),
        }
    }

    fn stop(self) {
        if let Err(error) = self.machine.stop() {
            note(&error);
        }
    }
}

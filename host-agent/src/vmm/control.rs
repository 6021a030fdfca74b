//! The control protocol between supervisor and VMM process.
//!
//! Packets on a `SOCK_SEQPACKET` socket: one JSON message each, with file
//! descriptors beside it (`SCM_RIGHTS`). The supervisor that starts a VMM process
//! passes its end as standard input, a socket pair, and sends [`Command::Start`]
//! first. A later supervisor connects to the socket in the instance's directory
//! and sends [`Command::Attach`] first. From there on both speak the same messages.
//!
//! The VMM process trusts the supervisor. The supervisor treats every event as a
//! claim of a process that its guest may have taken over.
//!
//! Builds of different age meet here. A receiver ignores fields that it does not
//! know, and takes a command or event that it does not know as `Unknown`, which it
//! counts and ignores. A new field therefore needs a default, and a new value of
//! [`DialOutcome`] or [`ExitReason`] needs a new version.

use serde::{Deserialize, Serialize};

use super::sandbox::SandboxReport;
use super::spec::{FileIndex, GuestSpec};
use super::wire::Packet;

/// Versions of this protocol that this build speaks, the preferred one first.
pub const VERSIONS: &[u32] = &[1];

/// Longest command in bytes: [`Command::Start`] names every disk.
pub const MAX_COMMAND: usize = 64 * 1024;

/// Most file descriptors of a command: those of [`Command::Start`].
pub const MAX_FILES: usize = 32;

/// Most listening sockets that a VMM process holds: the endpoints of a service.
pub const MAX_LISTENERS: usize = 25;

/// Longest event in bytes. The supervisor receives the events of every guest, so they are
/// cheap to receive; [`Event::Attached`] and a long reason of an exit fit.
pub const MAX_EVENT: usize = 16 * 1024;

/// Longest text in an event in bytes. In JSON each may become six.
pub const MAX_TEXT: usize = 2 * 1024;

/// Supervisor to VMM process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case")]
pub enum Command {
    /// First message on the inherited socket: run this guest. Carries every file
    /// that the message names.
    Start(Box<Start>),
    /// First message on a connection to the listening socket. Answered by
    /// [`Event::Attached`] or [`Event::Refused`].
    Attach {
        /// [`VERSIONS`] of the supervisor.
        versions: Vec<u32>,
        /// The supervisor takes the sockets of [`Command::HoldListeners`] with the answer.
        #[serde(default)]
        takes_listeners: bool,
    },
    /// Keep the listening sockets that the packet carries open for the next supervisor, in
    /// place of those before. The VMM process does not use them.
    HoldListeners {},
    /// Connect to `port` in the guest and join the connection with the stream
    /// socket that the packet carries. Answered by [`Event::Dialed`].
    Dial {
        /// Chosen by the supervisor, repeated in the answer.
        id: u64,
        /// Guest vsock port.
        port: u32,
        /// Bytes for the guest before those of the socket.
        #[serde(default)]
        first: Vec<u8>,
    },
    /// Connect to `port` and drop the connection, to learn whether the guest's
    /// kernel answers. Answered by [`Event::Dialed`].
    Probe {
        /// Chosen by the supervisor, repeated in the answer.
        id: u64,
        /// Guest vsock port.
        port: u32,
    },
    /// Stop every vCPU until [`Command::Resume`].
    Pause {},
    /// Let the vCPUs run again.
    Resume {},
    /// From now on ENOSPC fails a guest's write instead of holding it, and a
    /// write that is held fails now: the guest is to shut down.
    FailWhenFull {},
    /// Answer with [`Event::Pong`].
    Ping {
        /// Repeated in the answer.
        id: u64,
    },
    /// Answer with [`Event::Stats`].
    Stats {},
    /// Flush the disks and end the process.
    Stop {},
    /// A command of another build.
    #[serde(other)]
    Unknown,
}

impl Packet for Command {
    const MAX_BYTES: usize = MAX_COMMAND;

    fn max_files(&self) -> usize {
        MAX_FILES
    }
}

impl Packet for Event {
    const MAX_BYTES: usize = MAX_EVENT;

    fn max_files(&self) -> usize {
        match self {
            Self::Attached(_) => MAX_LISTENERS,
            // That of `Opened`.
            _ => 1,
        }
    }
}

/// How a VMM process starts. Only the program that started it sends this, so both
/// ends are of one build.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Start {
    /// Number of the guest's boot.
    pub generation: u64,
    /// The guest.
    pub guest: GuestSpec,
    /// Without it the process ends when its supervisor closes the socket.
    pub adoption: Option<Adoption>,
    /// Start no guest if a layer of the sandbox is missing.
    pub require_sandbox: bool,
}

/// What a VMM process that outlives its supervisor needs for the next one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Adoption {
    /// Bound `SOCK_SEQPACKET` socket. The VMM process calls `listen(2)`, so that
    /// `SO_PEERCRED` at a connecting supervisor names the VMM process.
    pub listener: FileIndex,
    /// Empty file, open for writing, that gets the [`ExitReason`] as JSON.
    pub exit: FileIndex,
}

/// VMM process to supervisor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// The guest was built and its vCPUs run.
    Running {
        /// Microseconds from process start to here.
        setup_us: u64,
        /// What the process has given up.
        #[serde(default)]
        sandbox: SandboxReport,
    },
    /// The guest cannot be built; the process ends.
    StartFailed {
        /// The error chain.
        reason: String,
    },
    /// Answer to [`Command::Attach`]: the whole state of the guest. Carries the sockets of
    /// [`Command::HoldListeners`] if the supervisor takes them.
    Attached(Box<Attached>),
    /// Answer to [`Command::Attach`]; the connection closes.
    Refused {
        /// [`VERSIONS`] of the VMM process.
        versions: Vec<u32>,
        /// Another supervisor is attached. The VMM process keeps the one that it
        /// has until that one closes its socket: so no process that claims to
        /// have a new supervisor escapes the old one.
        busy: bool,
    },
    /// The guest connected to a host port. Carries one end of a stream socket
    /// pair; closing it resets the connection.
    Opened {
        /// Host port.
        port: u32,
        /// Guest port.
        source_port: u32,
    },
    /// Answer to [`Command::Dial`] and [`Command::Probe`] of this supervisor.
    Dialed {
        /// From the command.
        id: u64,
        /// How the guest answered.
        outcome: DialOutcome,
    },
    /// The vCPUs are paused or run again by command of the supervisor.
    Paused {
        /// Whether they are paused.
        paused: bool,
    },
    /// Answer to [`Command::Ping`].
    Pong {
        /// From the command.
        id: u64,
    },
    /// Answer to [`Command::Stats`].
    Stats(Stats),
    /// A device met a violation of the protocol and waits for a reset.
    DeviceNeedsReset {
        /// `blk-0`, `vsock`, `rng`.
        device: String,
        /// The violation.
        reason: String,
    },
    /// The host cannot read or write the file behind a disk; the guest sees I/O
    /// errors. Sent once a disk.
    DiskFailed(DiskFailed),
    /// The host has no space for a write to a disk. The write is held, not
    /// failed, and the vCPUs are paused until [`Event::SpaceBack`].
    NoSpace(NoSpace),
    /// No write is held any more; the vCPUs run again unless the supervisor
    /// paused them too.
    SpaceBack {},
    /// The guest reported a kernel panic; an exit follows.
    GuestPanicked {},
    /// The guest ended; the last event.
    Exited(ExitReason),
    /// An event of another build.
    #[serde(other)]
    Unknown,
}

/// A disk whose file the host cannot serve.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskFailed {
    /// Serial number of the disk.
    pub disk: String,
    /// The first error.
    pub error: String,
    /// Whether that was a write without space.
    pub full: bool,
}

/// A disk with a write that is held because the host has no space for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NoSpace {
    /// Serial number of the disk.
    pub disk: String,
    /// Bytes of the request that is held; 0 for a flush.
    pub needed: u32,
    /// A quota is used up, not the file system.
    pub quota: bool,
}

/// Everything that a supervisor needs to go on with a guest that another one
/// started. A field that a later version adds has a default.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Attached {
    /// The version that both ends speak from here on.
    pub version: u32,
    /// Instance name.
    pub name: String,
    /// Number of the guest's boot.
    pub generation: u64,
    /// Microseconds from process start until the vCPUs ran.
    pub setup_us: u64,
    /// Milliseconds since process start.
    pub uptime_ms: u64,
    /// Whether the vCPUs are paused by command of a supervisor.
    pub paused: bool,
    /// Whether [`Command::FailWhenFull`] was given.
    pub fails_when_full: bool,
    /// Every disk that holds a write. While there is one the vCPUs are paused.
    pub no_space: Vec<NoSpace>,
    /// Every disk that the host failed to serve.
    pub failed_disks: Vec<DiskFailed>,
    /// Whether the guest reported a kernel panic.
    pub panicked: bool,
    /// Why the guest ended, if it has: the process flushes its disks and ends.
    pub exit: Option<ExitReason>,
    /// Whether the process knows [`Command::HoldListeners`].
    pub holds_listeners: bool,
    /// Counters since process start.
    pub stats: Stats,
    /// Commands that this build does not know, and packets that were no commands.
    pub ignored_commands: u64,
}

/// How a connection into the guest ended up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DialOutcome {
    /// The guest accepted.
    Connected,
    /// The guest's kernel reset the connection: it is alive, nothing listens.
    Refused,
    /// No answer within the limit.
    TimedOut,
    /// Every connection of the device is taken, or the driver is not up.
    Unavailable,
}

/// Why a guest ended. Each is a distinct, reported exit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reason", rename_all = "kebab-case")]
pub enum ExitReason {
    /// The guest powered off (ACPI S5).
    PowerOff,
    /// The guest asked for a reset (ACPI reset register).
    Reboot,
    /// A processor shut down after a triple fault.
    TripleFault,
    /// The guest's kernel panicked.
    Panic,
    /// [`Command::Stop`], or the supervisor closed its socket.
    Stopped,
    /// The supervisor killed the VMM process, which sent no reason. Never sent.
    Killed,
    /// KVM or the VMM could not go on.
    Failed {
        /// The error chain.
        detail: String,
    },
}

impl ExitReason {
    /// The reason with at most [`MAX_TEXT`] bytes of text, so that it fits into an event.
    #[must_use]
    pub fn bounded(self) -> Self {
        match self {
            Self::Failed { mut detail } => {
                detail.truncate(detail.floor_char_boundary(MAX_TEXT));
                Self::Failed { detail }
            }
            other => other,
        }
    }

    /// Its kind, as in an event.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::PowerOff => "power-off",
            Self::Reboot => "reboot",
            Self::TripleFault => "triple-fault",
            Self::Panic => "panic",
            Self::Stopped => "stopped",
            Self::Killed => "killed",
            Self::Failed { .. } => "failed",
        }
    }

    /// Exit code of the VMM process for this reason. 0 and 1 are left to the
    /// run-time, 2 to bad usage.
    pub const fn code(&self) -> u8 {
        match self {
            Self::PowerOff | Self::Stopped => 0,
            Self::Reboot => 10,
            Self::TripleFault => 11,
            Self::Panic => 12,
            Self::Failed { .. } | Self::Killed => 13,
        }
    }
}

/// Counters of a VMM process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Stats {
    /// Exits of each vCPU that reached this process.
    pub exits: Vec<u64>,
    /// Microseconds from process start to the first byte on the serial line.
    pub first_serial_us: Option<u64>,
    /// Lines of serial output lost because writing the log failed or was too slow.
    pub serial_dropped: u64,
    /// Protocol violations by the guest, all devices together.
    pub violations: u64,
    /// Requests and packets of the guest that were malformed or out of range, all
    /// devices together. Each was refused or dropped by itself.
    pub refused: u64,
    /// Open vsock connections.
    pub vsock_connections: u32,
}

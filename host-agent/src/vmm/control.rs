//! The one protocol between supervisor and VMM process.
//!
//! A `SOCK_SEQPACKET` pair: each message is one packet of JSON, file
//! descriptors ride along (`SCM_RIGHTS`). The VMM process has its end as standard
//! input, which a parent can set without code between `fork` and `exec`. The VMM process trusts the
//! supervisor; the supervisor treats every event as a claim of a process that
//! its guest may have taken over.

use serde::{Deserialize, Serialize};

use super::spec::GuestSpec;

/// Longest packet in bytes.
pub const MAX_PACKET: usize = 64 * 1024;

/// Most file descriptors in one packet (the kernel's own limit is 253).
pub const MAX_FILES: usize = 32;

/// Supervisor to VMM process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case")]
pub enum Command {
    /// First message, once: run this guest. Carries every file of the spec.
    Start(Box<GuestSpec>),
    /// Dial `port` in the guest and join it with the stream socket carried
    /// along. Answered by [`Event::Dialed`].
    Dial {
        /// Chosen by the supervisor, repeated in the answer.
        id: u64,
        /// Guest vsock port.
        port: u32,
    },
    /// Dial `port` and drop the connection: does the guest kernel answer?
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
    /// The guest is to end: from here on a write for which the host has no room
    /// fails, and one that is held fails now.
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
}

/// VMM process to supervisor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// The guest was built and its vCPUs run.
    Running {
        /// Microseconds from process start to here.
        setup_us: u64,
    },
    /// The guest cannot be built; the process ends.
    StartFailed {
        /// The error chain.
        reason: String,
    },
    /// The guest dialed a host port. Carries one end of a stream socket pair;
    /// closing it resets the connection.
    Opened {
        /// Host port.
        port: u32,
        /// Guest port.
        source_port: u32,
    },
    /// Answer to [`Command::Dial`] and [`Command::Probe`].
    Dialed {
        /// From the command.
        id: u64,
        /// What the guest said.
        outcome: DialOutcome,
    },
    /// The vCPUs stopped or run again on the supervisor's word.
    Paused {
        /// Whether they are stopped.
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
        /// What was wrong.
        reason: String,
    },
    /// The host cannot read or write the file behind a disk; the guest sees
    /// errors. Sent once a disk.
    DiskFailed {
        /// Serial number of the disk.
        disk: String,
        /// The system's words.
        error: String,
        /// Whether there was no room for a write.
        full: bool,
    },
    /// The host has no room for a write to a disk. The write is held, not
    /// failed, and the vCPUs are stopped until [`Event::SpaceBack`].
    NoSpace {
        /// Serial number of the disk.
        disk: String,
        /// Bytes of the request that is held; 0 for a flush.
        needed: u32,
        /// A quota is used up, not the file system.
        quota: bool,
    },
    /// No write is held any more; the vCPUs run again, if the supervisor lets
    /// them.
    SpaceBack {},
    /// The guest said that its kernel panicked; an exit follows.
    GuestPanicked {},
    /// The guest ended; the last message.
    Exited(ExitReason),
}

/// What became of a dial.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DialOutcome {
    /// The guest accepted.
    Connected,
    /// The guest reset: nothing listens, but its kernel is alive.
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
    /// The supervisor asked.
    Stopped,
    /// The supervisor killed the VMM process, which said nothing more. Never
    /// sent: the supervisor alone knows.
    Killed,
    /// KVM or the VMM could not go on.
    Failed {
        /// The error chain.
        detail: String,
    },
}

impl ExitReason {
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
pub struct Stats {
    /// Exits of each vCPU that reached this process.
    pub exits: Vec<u64>,
    /// Microseconds from process start to the first byte on the serial line.
    pub first_serial_us: Option<u64>,
    /// Bytes of serial output lost because the file could not take them.
    pub serial_dropped: u64,
    /// Protocol violations by the guest, all devices together.
    pub violations: u64,
    /// Requests and packets of the guest that were malformed or asked for what
    /// is not there, all devices together. Each was refused or dropped by
    /// itself.
    pub refused: u64,
    /// Open vsock connections.
    pub vsock_connections: u32,
}

//! The typed messages of each channel.
//!
//! The host never uses a guest's values as paths, keys or formats, and checks them against
//! its own tables. Times in the guest are durations, since the clocks differ.

mod agent;

use serde::{Deserialize, Serialize};

use crate::frame::{self, FrameError, Message};
use crate::piece::{self, STDERR, STDIN, STDOUT};
use crate::role::RoleDefinition;

pub use agent::{AgentOffer, AgentUpdate, AgentVersions, BadAgent, MAX_BAD, UpdateStep};

impl Message for ToHost {}
impl Message for ToGuest {}
impl Message for ExecRequest {}
impl Message for TunnelRequest {}

/// Any frame that a guest may send after its hello, on whichever channel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum ToHost {
    /// Channel `heartbeat`.
    Beat(Beat),
    /// Channel `status`.
    Status(Status),
    /// Channel `agent`: which guest agent runs. The host answers with its offer.
    AgentVersions(AgentVersions),
    /// Channel `agent`: ready to receive a package or a program.
    AgentRequest {
        /// The package of the offer; absent for the program of the image, which an image
        /// without a guest agent takes at each boot.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        sha256: Option<String>,
    },
    /// Channel `agent`: what became of a package.
    AgentUpdate(AgentUpdate),
    /// Channel `agent`: the program was started, or could not be started, or ended.
    AgentResult {
        /// Absent when the program runs; else why it does not.
        error: Option<String>,
    },
    /// Channel `log`.
    Log(LogRecord),
    /// Channel `shutdown`: the shutdown has begun.
    ShutdownBegun {},
    /// Channel `control`: PID 1 runs.
    Booted {
        /// Milliseconds from kernel start until PID 1 ran (`CLOCK_BOOTTIME`).
        init_ms: u64,
    },
}

/// Any frame that the host may send after its welcome.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum ToGuest {
    /// Channel `heartbeat`: answer with a [`Beat`] that repeats `sequence`.
    Ask {
        /// Rises by one with each question of a connection.
        sequence: u64,
    },
    /// Channel `goal`: the desired state; replaces every earlier goal.
    Goal(Box<Goal>),
    /// Channel `agent`: what the guest may take; replaces every earlier offer. A request for
    /// an earlier one is not answered.
    AgentOffer {
        /// Absent when nothing is offered.
        offer: Option<AgentOffer>,
    },
    /// Channel `agent`: what was requested and follows as `size` raw bytes.
    AgentProgram {
        /// Version, for people and logs.
        version: String,
        /// Length in bytes.
        size: u64,
        /// SHA-256 in lower-case hexadecimal.
        sha256: String,
    },
    /// Channel `shutdown`.
    Shutdown {
        /// What the guest shall do at the end.
        then: PowerAction,
        /// Milliseconds the role may take to stop before it is killed.
        deadline_ms: u64,
    },
}

/// How a shutdown ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PowerAction {
    /// Power off (ACPI S5).
    PowerOff,
    /// Reset.
    Reboot,
}

/// The app agent's answer to [`ToGuest::Ask`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Beat {
    /// The sequence of the question.
    pub sequence: u64,
    /// The guest kernel's boot id.
    pub boot_id: String,
    /// How the app agent sees the guest.
    pub health: Health,
}

/// Health of a guest as the app agent sees it (the four states of Hyper-V's heartbeat).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Health {
    /// Nothing known yet.
    Unknown,
    /// App agent and guest agent run.
    Healthy,
    /// The guest agent is down or keeps dying.
    Critical,
    /// The guest shuts down: missing heartbeats are expected.
    Stopped,
}

/// State of the role inside the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "kebab-case")]
pub enum RoleState {
    /// No goal received yet.
    Unknown,
    /// Disks, user, local storage are being set up.
    Creating,
    /// Startup tasks and the role host are being started.
    Starting,
    /// Started and usable.
    Ready,
    /// Running but not available.
    Busy,
    /// The role ended and is started again after a delay.
    Recycling,
    /// Recycled again and again; the next try is after a delay that grows.
    Cycling,
    /// Stopping by request.
    Stopping,
    /// Stopped by request.
    Stopped,
    /// Cannot be started as described: another attempt in this boot would fail too.
    Failed,
}

/// Longest [`Status::detail`], in characters.
pub const MAX_DETAIL: usize = 2000;

/// Channel `status`: sent on every change, and repeated after a reconnect. A failure that
/// may pass leaves the state at Creating or Recycling, with the cause and the next attempt
/// in `detail`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Incarnation of the goal that this state belongs to, 0 before one.
    pub incarnation: u64,
    /// Highest incarnation that was applied whole, 0 before one: its role was started, or
    /// stopped if that is the goal.
    pub applied: u64,
    /// The state.
    pub state: RoleState,
    /// For people: which step, which cause. At most [`MAX_DETAIL`] characters.
    pub detail: String,
    /// How often the role has ended by itself in this boot.
    pub recycles: u32,
    /// How the role last ended, if it did.
    pub last_exit: Option<ExitCause>,
    /// Milliseconds until the next attempt, if the last one failed or the role ended.
    pub retry_in_ms: Option<u64>,
    /// The role did not stop in its time, or its bootstrapper did not answer, and it was
    /// killed.
    #[serde(default)]
    pub killed: bool,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExitCause {
    /// Exit code.
    Code(i32),
    /// Ended by this signal.
    Signal(i32),
}

/// Where a log record comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogSource {
    /// Standard output and error of the role.
    Role,
    /// App agent, guest agent and bootstrapper.
    Agent,
}

/// One line of log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogRecord {
    /// Who wrote it.
    pub source: LogSource,
    /// `out` or `err` for a role, the program's name for an agent.
    pub stream: String,
    /// Milliseconds since the guest booted.
    pub uptime_ms: u64,
    /// Records of this connection lost before this one because the host read
    /// too slowly.
    pub dropped: u64,
    /// The line, without its end; at most 8 KiB, longer lines are cut in pieces.
    pub text: String,
}

/// Desired state of a role instance, whole: each goal replaces every earlier one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Goal {
    /// Rises with every change.
    pub incarnation: u64,
    /// Whether the role shall run.
    pub expected: ExpectedState,
    /// 32 hexadecimal digits.
    pub deployment_id: String,
    /// `<Role>_IN_<n>`.
    pub instance: String,
    /// Number of the update domain.
    pub update_domain: u32,
    /// Number of the fault domain.
    pub fault_domain: u32,
    /// What runs. [`RoleDefinition::check_length`] keeps the goal's frame within its limit.
    pub role: RoleDefinition,
    /// Serial number (`/sys/block/*/serial`) of the application disk.
    pub application_disk: String,
    /// Serial number of the resource disk.
    pub resource_disk: String,
    /// Milliseconds that the role may take to stop.
    pub stop_timeout_ms: u64,
}

/// Whether a role shall run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExpectedState {
    /// Run.
    Started,
    /// Do not run.
    Stopped,
}

/// First frame from the host on a tunnel (guest port [`crate::channel::TUNNEL_PORT`]).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelRequest {
    /// The local port of one of the role's endpoints.
    pub local_port: u16,
}

/// First frame from the host on an `exec` connection (guest port
/// [`crate::channel::EXEC_PORT`]).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ExecRequest {
    /// Program and arguments; looked up on `PATH`.
    pub command: Vec<String>,
    /// Variables on top of the role's environment.
    pub environment: Vec<(String, String)>,
    /// Give the program a terminal of this many rows and columns.
    pub terminal: Option<(u16, u16)>,
}

/// Most bytes of standard input that the host sends before they are
/// [`ExecOutput::Consumed`], so that a signal never waits behind input of a program that does
/// not read.
pub const EXEC_WINDOW: usize = 256 * 1024;

/// Most bytes in one [`ExecInput::Stdin`], [`ExecOutput::Stdout`] or
/// [`ExecOutput::Stderr`]; none has fewer than one.
pub const EXEC_PIECE: usize = 16 * 1024;

/// Host to guest, after the request. Bytes are a [`crate::piece`], the rest is JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum ExecInput {
    /// Bytes for standard input, at most [`EXEC_PIECE`].
    #[serde(skip)]
    Stdin {
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// Standard input ends.
    StdinEnd {},
    /// Send this signal to the program's process group.
    Signal {
        /// Signal number.
        number: i32,
    },
    /// The terminal has another size.
    Resize {
        /// Rows.
        rows: u16,
        /// Columns.
        columns: u16,
    },
}

impl Message for ExecInput {
    fn write(&self, body: &mut Vec<u8>) -> Result<(), FrameError> {
        match self {
            Self::Stdin { bytes } => piece::write(body, STDIN, bytes, EXEC_PIECE),
            other => frame::write_json(other, body),
        }
    }

    fn read(body: &[u8]) -> Result<Self, FrameError> {
        if let Some(bytes) = piece::read(body, STDIN, EXEC_PIECE)? {
            return Ok(Self::Stdin { bytes });
        }
        frame::parse(body)
    }
}

/// Guest to host. Bytes are a [`crate::piece`], the rest is JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum ExecOutput {
    /// Bytes of standard output, at most [`EXEC_PIECE`].
    #[serde(skip)]
    Stdout {
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// Bytes of standard error, at most [`EXEC_PIECE`].
    #[serde(skip)]
    Stderr {
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// The program read this many more bytes of standard input, or they were discarded
    /// because it never will.
    Consumed {
        /// How many.
        bytes: usize,
    },
    /// The program ended; the last frame.
    Exited {
        /// How.
        cause: ExitCause,
    },
    /// The program could not be started; the last frame.
    NotStarted {
        /// Why.
        reason: String,
        /// 126 (not executable), 127 (not found) or 125 (anything else).
        code: i32,
    },
}

impl Message for ExecOutput {
    fn write(&self, body: &mut Vec<u8>) -> Result<(), FrameError> {
        match self {
            Self::Stdout { bytes } => piece::write(body, STDOUT, bytes, EXEC_PIECE),
            Self::Stderr { bytes } => piece::write(body, STDERR, bytes, EXEC_PIECE),
            other => frame::write_json(other, body),
        }
    }

    fn read(body: &[u8]) -> Result<Self, FrameError> {
        if let Some(bytes) = piece::read(body, STDOUT, EXEC_PIECE)? {
            return Ok(Self::Stdout { bytes });
        }
        if let Some(bytes) = piece::read(body, STDERR, EXEC_PIECE)? {
            return Ok(Self::Stderr { bytes });
        }
        frame::parse(body)
    }
}

#[cfg(test)]
mod tests;

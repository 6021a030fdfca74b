//! Events of the timeline: changes of state, as data and as text.

mod rollout;

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};
use vmbus::message::{ExitCause, RoleState, UpdateStep};

pub use rollout::RolloutStep;

use crate::vmm::control::ExitReason;
use crate::vmm::sandbox::SandboxReport;

/// Schema of an event as JSON.
const SCHEMA: &str = "host-agent.event/1";

/// One change of state.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TimelineEvent {
    /// Time since the start of the timeline, in milliseconds.
    #[serde(rename = "at_ms", serialize_with = "as_ms")]
    pub at: Duration,
    /// Id of the deployment; absent if the event is about the whole host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deployment: Option<String>,
    /// Instance name; null if the event is about the whole deployment.
    pub instance: Option<String>,
    /// What changed.
    #[serde(flatten)]
    pub kind: EventKind,
}

impl TimelineEvent {
    /// Schema `host-agent.event/1`: grows only by new fields and new events.
    pub fn json(&self) -> Value {
        let mut value = serde_json::to_value(self).unwrap_or_default();
        value["schema"] = json!(SCHEMA);
        value
    }
}

/// The line that replaces `count` events which a slow reader missed.
pub fn missed(at: Duration, count: u64) -> Value {
    json!({
        "schema": SCHEMA,
        "at_ms": millis(at),
        "instance": null,
        "event": "lines-dropped",
        "count": count,
    })
}

/// What changed.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum EventKind {
    /// The guest image has the digests of its manifest.
    ImageVerified {
        /// Image name.
        image: String,
        /// Whether an earlier check of the same files was reused.
        cached: bool,
    },
    /// Diff, resource and application disk exist.
    DisksReady {
        /// Whether the disks are those of an earlier boot.
        kept: bool,
    },
    /// A VMM process was started.
    GuestStarting {
        /// Number of this boot.
        generation: u64,
        /// Process id of the VMM.
        pid: u32,
    },
    /// host-agent attached to a guest that was already running.
    GuestAdopted {
        /// Number of the guest's boot.
        generation: u64,
        /// Process id of the VMM.
        pid: u32,
    },
    /// The vCPUs run.
    GuestRunning {
        /// Microseconds from start of the process.
        setup_us: u64,
        /// What its VMM process has given up.
        sandbox: SandboxReport,
    },
    /// PID 1 of the guest has connected.
    AgentConnected {
        /// Milliseconds from the guest kernel's start until PID 1 ran.
        init_ms: u64,
        /// Name and version of the program.
        agent: String,
    },
    /// The guest agent was started, or could not be, or ended.
    GuestAgent {
        /// Why it could not be started.
        error: Option<String>,
    },
    /// What became of a guest agent that was offered.
    AgentUpdate {
        /// Its version.
        version: String,
        /// SHA-256 of its package.
        package: String,
        /// What happened.
        step: UpdateStep,
        /// Why, if something is wrong.
        detail: String,
    },
    /// The role's state changed.
    Role {
        /// New state.
        state: RoleState,
        /// Text of the guest agent.
        detail: String,
        /// Times the role ended by itself in this boot.
        recycles: u32,
        /// How it last ended.
        last_exit: Option<ExitCause>,
        /// Milliseconds until the next start.
        retry_in_ms: Option<u64>,
    },
    /// An endpoint can be reached.
    EndpointPublished {
        /// Endpoint name, with that of the role if several roles have an endpoint of
        /// this name.
        endpoint: String,
        /// Address on the host.
        address: SocketAddr,
        /// Port in the guest.
        local_port: u16,
    },
    /// An instance left the rotation of its endpoints.
    OutOfRotation,
    /// A device needs a reset after a protocol violation of the guest's driver.
    DeviceNeedsReset {
        /// Device name.
        device: String,
        /// What was wrong.
        reason: String,
    },
    /// I/O on the file of a disk failed, and the guest got an error.
    DiskFailed {
        /// Serial number of the disk.
        disk: String,
        /// The file.
        #[serde(serialize_with = "as_text")]
        file: PathBuf,
        /// The error of the system call.
        error: String,
        /// Whether the file system had no space for a write.
        full: bool,
    },
    /// The host has no space for a write to a disk. The write is held and the guest is
    /// paused until there is; the pause does not count as silence.
    NoSpace {
        /// Serial number of the disk.
        disk: String,
        /// The file.
        #[serde(serialize_with = "as_text")]
        file: PathBuf,
        /// Mount point of its file system.
        #[serde(serialize_with = "as_text")]
        mount: PathBuf,
        /// Least bytes that are needed.
        needed_bytes: u64,
        /// Bytes that are free now, if known.
        free_bytes: Option<u64>,
        /// A quota is used up, and not the file system.
        quota: bool,
    },
    /// The guest runs again: the held writes succeeded, or failed because the guest is to
    /// stop.
    SpaceBack {
        /// Length of the pause in milliseconds.
        paused_ms: u64,
    },
    /// The host was stalled or suspended: for a while no guest is condemned.
    Resumed,
    /// The operator stopped or resumed the vCPUs.
    Paused {
        /// Whether they are stopped.
        paused: bool,
    },
    /// The guest is condemned.
    Verdict {
        /// Why.
        verdict: Verdict,
        /// What a probe of its kernel showed.
        evidence: String,
    },
    /// The guest ended.
    GuestExited {
        /// Why.
        #[serde(flatten)]
        reason: ExitReason,
        /// Why host-agent ended it, if it did.
        #[serde(skip_serializing_if = "Option::is_none")]
        because: Option<String>,
    },
    /// The guest will be restarted on the same disks.
    Restarting {
        /// Why.
        because: String,
        /// Number of the boot to come.
        generation: u64,
        /// Milliseconds until the boot.
        delay_ms: u64,
    },
    /// Too many boots in a row without a heartbeat; the next one is after a long delay.
    Faulted {
        /// The last cause.
        because: String,
        /// Milliseconds until the next try.
        retry_in_ms: u64,
    },
    /// The instance is stopping.
    Stopping,
    /// The instance has stopped and its resources are released.
    Stopped {
        /// Whether role and guest ended by themselves, or had not started.
        clean: bool,
    },
    /// The host cannot run the instance.
    Failed {
        /// The error chain.
        error: String,
    },
    /// A step of the update of a service.
    Rollout {
        /// The step.
        #[serde(flatten)]
        step: RolloutStep,
    },
    /// The store of services was damaged, and its good copy is in its place.
    StoreRestored {
        /// What was wrong.
        what: String,
        /// Where the damaged file is.
        aside: Option<PathBuf>,
    },
    /// A deployment is kept that no service has.
    UnknownDeployment {
        /// Its directory.
        path: PathBuf,
    },
    /// A message for the operator; no state changes.
    Warning {
        /// The message.
        text: String,
    },
}

/// Why a guest is condemned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Verdict {
    /// No heartbeat for the limit.
    Silent {
        /// Accumulated silence in milliseconds.
        silence_ms: u64,
    },
    /// No first contact within the boot limit.
    NoContact {
        /// Time since the start in milliseconds.
        waited_ms: u64,
    },
    /// The VMM process does not answer its control socket.
    VmmHung,
    /// The guest or its VMM process causes more events than the host agent takes.
    Floods,
}

impl Verdict {
    /// Its kind, as in an event.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Silent { .. } => "silent",
            Self::NoContact { .. } => "no-contact",
            Self::VmmHung => "vmm-hung",
            Self::Floods => "floods",
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Silent { silence_ms } => write!(f, "no heartbeat for {}", ms(*silence_ms)),
            Self::NoContact { waited_ms } => {
                write!(f, "no contact {} after start", ms(*waited_ms))
            }
            Self::VmmHung => write!(f, "VMM process does not answer"),
            Self::Floods => write!(f, "guest floods the host agent with events"),
        }
    }
}

impl fmt::Display for EventKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ImageVerified { image, cached } => {
                write!(f, "image {image} verified")?;
                if *cached {
                    write!(f, " (digests checked earlier)")?;
                }
                Ok(())
            }
            Self::DisksReady { kept: false } => write!(f, "disks created"),
            Self::DisksReady { kept: true } => write!(f, "disks kept"),
            Self::GuestStarting { generation, pid } => {
                write!(f, "guest starting, generation {generation} (process {pid})")
            }
            Self::GuestAdopted { generation, pid } => {
                write!(f, "guest adopted, generation {generation} (process {pid})")
            }
            Self::GuestRunning { setup_us, sandbox } => {
                let built = ms(setup_us / 1000);
                write!(f, "guest running, built in {built}; sandbox: {sandbox}")
            }
            Self::AgentConnected { init_ms, agent } => {
                write!(f, "{agent} connected, kernel took {} to init", ms(*init_ms))
            }
            Self::GuestAgent { error: None } => write!(f, "guest agent started"),
            Self::GuestAgent { error: Some(error) } => write!(f, "guest agent: {error}"),
            Self::AgentUpdate {
                version,
                step,
                detail,
                ..
            } => match step {
                UpdateStep::Refused => write!(f, "guest agent {version} refused: {detail}"),
                UpdateStep::Installed => write!(f, "guest agent {version} installed and started"),
                UpdateStep::Confirmed => write!(f, "guest agent {version} has proven itself"),
                UpdateStep::WentBack => write!(
                    f,
                    "guest agent {version} failed and is bad from now on, the one before follows: \
                     {detail}"
                ),
            },
            Self::Role {
                state,
                detail,
                retry_in_ms,
                ..
            } => {
                write!(f, "role {}", state_name(*state))?;
                if !detail.is_empty() {
                    write!(f, ": {detail}")?;
                }
                if let Some(retry) = retry_in_ms {
                    write!(f, ", next start in {}", ms(*retry))?;
                }
                Ok(())
            }
            Self::EndpointPublished {
                endpoint,
                address,
                local_port,
            } => write!(
                f,
                "endpoint {endpoint}: {address} -> guest port {local_port}"
            ),
            Self::OutOfRotation => write!(f, "out of rotation"),
            Self::DeviceNeedsReset { device, reason } => {
                write!(f, "device {device} waits for a reset: {reason}")
            }
            Self::DiskFailed {
                disk,
                file,
                error,
                full,
            } => {
                let file = file.display();
                write!(f, "the host cannot serve disk {disk}: {file}: {error}")?;
                if *full {
                    write!(f, "; free space there, or set HOST_AGENT_DATA_DIR")?;
                }
                Ok(())
            }
            Self::NoSpace {
                disk,
                file,
                mount,
                needed_bytes,
                free_bytes,
                quota,
            } => {
                let file = file.display();
                let what = if *quota { "quota" } else { "space" };
                write!(f, "guest paused: no {what} for disk {disk} ({file}); ")?;
                let needed = bytes(*needed_bytes);
                if *quota {
                    write!(
                        f,
                        "raise the quota on {} by at least {needed}",
                        mount.display()
                    )?;
                } else {
                    write!(f, "free at least {needed} on {}", mount.display())?;
                    if let Some(free) = free_bytes {
                        write!(f, " ({} free)", bytes(*free))?;
                    }
                }
                write!(f, ": it continues by itself")
            }
            Self::SpaceBack { paused_ms } => {
                write!(
                    f,
                    "guest continues after a pause of {} for space",
                    ms(*paused_ms)
                )
            }
            Self::Resumed => write!(f, "host was stalled or asleep; silence limit extended"),
            Self::Paused { paused: true } => write!(f, "vCPUs stopped"),
            Self::Paused { paused: false } => write!(f, "vCPUs run again"),
            Self::Verdict { verdict, evidence } => write!(f, "{verdict} ({evidence})"),
            Self::GuestExited { reason, because } => {
                write!(f, "guest ended: {}", exit_text(reason))?;
                match because {
                    Some(because) => write!(f, ", {because}"),
                    None => Ok(()),
                }
            }
            Self::Restarting {
                because,
                generation,
                delay_ms,
            } => {
                write!(f, "restarting as generation {generation}: {because}")?;
                if *delay_ms > 0 {
                    write!(f, ", in {}", ms(*delay_ms))?;
                }
                Ok(())
            }
            Self::Faulted {
                because,
                retry_in_ms,
            } => write!(f, "faulted: {because}; next try in {}", ms(*retry_in_ms)),
            Self::Stopping => write!(f, "stopping"),
            Self::Stopped { clean: true } => write!(f, "stopped"),
            Self::Stopped { clean: false } => write!(f, "stopped by force"),
            Self::Failed { error } => write!(f, "failed: {error}"),
            Self::Rollout { step } => step.fmt(f),
            Self::StoreRestored { what, aside } => {
                write!(
                    f,
                    "the store of services was damaged ({what}) and is restored from its good \
                     copy; its events are lost, and so are changes of its last seconds"
                )?;
                match aside {
                    Some(aside) => write!(f, "; the damaged file is {}", aside.display()),
                    None => Ok(()),
                }
            }
            Self::UnknownDeployment { path } => write!(
                f,
                "no service has the deployment in {}; it is left as it is: remove the directory \
                 when no guest of it runs",
                path.display()
            ),
            Self::Warning { text } => write!(f, "warning: {text}"),
        }
    }
}

/// Text of an exit reason.
pub fn exit_text(reason: &ExitReason) -> String {
    match reason {
        ExitReason::PowerOff => "power-off".into(),
        ExitReason::Reboot => "reboot".into(),
        ExitReason::TripleFault => "triple fault".into(),
        ExitReason::Panic => "kernel panic".into(),
        ExitReason::Stopped => "stopped by host-agent".into(),
        ExitReason::Killed => "killed by host-agent".into(),
        ExitReason::Failed { detail } => format!("VMM failure: {detail}"),
    }
}

/// Name of a state of the role.
pub const fn state_name(state: RoleState) -> &'static str {
    match state {
        RoleState::Unknown => "Unknown",
        RoleState::Creating => "Creating",
        RoleState::Starting => "Starting",
        RoleState::Ready => "Ready",
        RoleState::Busy => "Busy",
        RoleState::Recycling => "Recycling",
        RoleState::Cycling => "Cycling",
        RoleState::Stopping => "Stopping",
        RoleState::Stopped => "Stopped",
        RoleState::Failed => "Failed",
    }
}

fn ms(value: u64) -> String {
    if value < 1000 {
        format!("{value} ms")
    } else {
        format!("{:.1} s", value as f64 / 1000.0)
    }
}

/// A number of bytes, rounded up: a hint of how much to free must not be too small.
fn bytes(value: u64) -> String {
    let (unit, name) = match value {
        0..=1023 => return format!("{value} B"),
        1024..=1_048_575 => (1 << 10, "KiB"),
        1_048_576..=1_073_741_823 => (1 << 20, "MiB"),
        _ => (1 << 30, "GiB"),
    };
    format!("{} {name}", value.div_ceil(unit))
}

fn as_ms<S: serde::Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(millis(*duration))
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// JSON is UTF-8, a path need not be.
fn as_text<S: serde::Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&path.display())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt as _;

    #[test]
    fn every_line_has_its_schema_time_and_instance() {
        let event = TimelineEvent {
            at: Duration::from_millis(12),
            deployment: None,
            instance: Some("A_IN_0".into()),
            kind: EventKind::NoSpace {
                disk: "os".into(),
                file: OsStr::from_bytes(b"/\xff/diff").into(),
                mount: "/".into(),
                needed_bytes: 1,
                free_bytes: None,
                quota: false,
            },
        };
        let line = event.json();
        assert_eq!(line["event"], "no-space");
        assert_eq!(line["instance"], "A_IN_0");
        assert_eq!(line["file"], "/\u{fffd}/diff");
        for line in [line, missed(event.at, 7)] {
            assert_eq!(line["schema"], "host-agent.event/1");
            assert_eq!(line["at_ms"], 12);
            assert!(line.as_object().unwrap().contains_key("instance"));
        }
    }
}

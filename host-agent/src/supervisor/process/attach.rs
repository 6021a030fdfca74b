//! Attaching to a VMM process that an earlier supervisor started.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, bind, connect, getsockopt, socket, sockopt,
};
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;
use tokio::time::Instant;

use super::VmmProcess;
use super::control_socket::ControlSocket;
use super::handle::{ProcessHandle, ProcessId};
use crate::blocking::blocking;
use crate::endpoints::HandedOver;
use crate::vmm::control::{Attached, Command, Event, ExitReason, VERSIONS};
use crate::vmm::wire;

/// Name of the socket on which a VMM process listens, in its instance's directory.
const SOCKET: &str = "vmm.sock";
/// Name of the file with its exit reason, there too.
const EXIT: &str = "vmm.exit";
/// Longest exit reason that is read, in bytes.
const MAX_EXIT: u64 = 64 * 1024;
/// Time for the answer to `Attach`. The main thread of the VMM process answers,
/// which never waits for the guest or a disk.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// Time in which a supervisor that was just killed lets go of its guests, and in
/// which a process that was just started begins to listen.
const RETRY_LIMIT: Duration = Duration::from_secs(2);
/// Time between two tries.
const RETRY: Duration = Duration::from_millis(50);

/// What the supervisor's records say of a VMM process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Expected {
    /// Instance name.
    pub name: String,
    /// Number of the guest's boot.
    pub generation: u64,
    /// The process. `None` if the supervisor ended before it recorded this.
    pub process: Option<ProcessId>,
}

/// Why a VMM process was not attached. None of these does anything to the process.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// No socket: the process was never started, or cannot be attached.
    #[error("no socket {0}")]
    NoSocket(PathBuf),
    /// The expected process runs, but does not accept connections.
    #[error("VMM process {pid} does not accept connections")]
    Refused {
        /// Its process id.
        pid: u32,
    },
    /// The process has ended.
    #[error("the VMM process has ended{}", exit_text(exit.as_ref()))]
    Gone {
        /// The reason that it left; `None` if it was killed or crashed.
        exit: Option<ExitReason>,
    },
    /// Another supervisor is attached.
    #[error("another host-agent is attached to the VMM process")]
    Busy,
    /// No version of the protocol in common.
    #[error(
        "VMM process speaks versions {theirs:?} of the control protocol, this host-agent {ours:?}"
    )]
    Version {
        /// Versions of this program.
        ours: Vec<u32>,
        /// Versions of the VMM process.
        theirs: Vec<u32>,
    },
    /// Another process listens on the socket.
    #[error("the socket belongs to process {found}, expected was {expected}")]
    WrongProcess {
        /// The recorded process.
        expected: ProcessId,
        /// The process that listens.
        found: ProcessId,
    },
    /// The process runs another guest.
    #[error(
        "the VMM process runs generation {found_generation} of {found_name:?}, \
         expected was generation {expected_generation} of {expected_name:?}"
    )]
    WrongGuest {
        /// Recorded instance name.
        expected_name: String,
        /// Recorded boot.
        expected_generation: u64,
        /// Its instance name.
        found_name: String,
        /// Its boot.
        found_generation: u64,
    },
    /// No answer in time: the process hangs.
    #[error("the VMM process did not answer for {} s", ANSWER_LIMIT.as_secs())]
    NoAnswer,
    /// The answer is not one of the protocol.
    #[error("the VMM process answered with another message than the protocol has: {0}")]
    BadAnswer(String),
    /// A system call failed.
    #[error("{step} of the VMM process")]
    System {
        /// What was tried.
        step: &'static str,
        /// The error.
        #[source]
        source: io::Error,
    },
}

fn exit_text(exit: Option<&ExitReason>) -> String {
    match exit {
        Some(reason) => format!(": {}", crate::supervisor::event::exit_text(reason)),
        None => " and left no reason: it was killed or crashed".into(),
    }
}

impl fmt::Display for ProcessId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (start time {})", self.pid, self.start_ticks)
    }
}

fn system(step: &'static str) -> impl Fn(io::Error) -> AttachError {
    move |source| AttachError::System { step, source }
}

/// Attaches to the process that listens in `dir`.
pub(super) async fn attach(
    dir: &Path,
    expected: &Expected,
) -> Result<(VmmProcess, Attached, HandedOver), AttachError> {
    let deadline = Instant::now() + RETRY_LIMIT;
    loop {
        let result = attach_once(dir, expected).await;
        let retry = match &result {
            Err(AttachError::Busy | AttachError::Refused { .. }) => true,
            // Perhaps it does not listen yet: no record tells whether it runs.
            Err(AttachError::Gone { exit: None }) => expected.process.is_none(),
            _ => false,
        };
        if !retry || Instant::now() >= deadline {
            return result;
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn attach_once(
    dir: &Path,
    expected: &Expected,
) -> Result<(VmmProcess, Attached, HandedOver), AttachError> {
    let gone = async || {
        let path = exit_path(dir);
        let exit = blocking(move || exit_reason(&path)).await;
        AttachError::Gone {
            exit: exit.ok().flatten(),
        }
    };
    let of_connect = dir.to_owned();
    let connected = blocking(move || connect_in(&of_connect)).await;
    let connected = connected.map_err(io::Error::other);
    let socket = match connected.map_err(system("connect to the socket"))? {
        Ok(socket) => socket,
        Err(Errno::ENOENT) => return Err(AttachError::NoSocket(dir.join(SOCKET))),
        Err(Errno::ECONNREFUSED) => {
            return Err(match expected.process.filter(|process| process.runs()) {
                Some(ProcessId { pid, .. }) => AttachError::Refused { pid },
                None => gone().await,
            });
        }
        // So many wait already.
        Err(Errno::EAGAIN) => return Err(AttachError::Busy),
        Err(errno) => return Err(system("connect to the socket")(errno.into())),
    };
    // Whoever called listen(2).
    let peer = getsockopt(&socket, sockopt::PeerCredentials)
        .map_err(|errno| system("read the peer credentials")(errno.into()))?;
    let pid = u32::try_from(peer.pid()).unwrap_or_default();
    let mut process = match ProcessHandle::running(pid) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(gone().await),
        other => other.map_err(system("open the pidfd"))?,
    };
    let found = process.id();
    if let Some(expected) = expected.process.filter(|expected| *expected != found) {
        return Err(AttachError::WrongProcess { expected, found });
    }
    let attach = Command::Attach {
        versions: VERSIONS.to_vec(),
        takes_listeners: true,
    };
    wire::send(socket.as_fd(), &attach, &[]).map_err(system("send Attach"))?;
    let control = UnixStream::from_std(socket.into()).map_err(system("register the socket"))?;
    let mut control = ControlSocket::new(control);
    let answer = tokio::time::timeout(ANSWER_LIMIT, async {
        match control.answer().await {
            // The socket closes a moment before the process ends.
            Ok(None) => process.ended().await.map(|_| None),
            Ok(Some((event, handed_over))) => event.map(|event| Some((event, handed_over))),
            Err(error) => Err(error),
        }
    });
    let (attached, handed_over) = match answer.await {
        Err(_) => return Err(AttachError::NoAnswer),
        Ok(Ok(None)) => return Err(gone().await),
        Ok(Ok(Some((Event::Attached(attached), handed_over)))) => (*attached, handed_over),
        Ok(Ok(Some((Event::Refused { busy: true, .. }, _)))) => return Err(AttachError::Busy),
        Ok(Ok(Some((Event::Refused { versions, .. }, _)))) => {
            return Err(AttachError::Version {
                ours: VERSIONS.to_vec(),
                theirs: versions,
            });
        }
        Ok(Ok(Some((event, _)))) => return Err(AttachError::BadAnswer(format!("{event:?}"))),
        Ok(Err(error)) if error.kind() == io::ErrorKind::InvalidData => {
            return Err(AttachError::BadAnswer(error.to_string()));
        }
        Ok(Err(error)) => return Err(system("read the answer")(error)),
    };
    if attached.name != expected.name || attached.generation != expected.generation {
        return Err(AttachError::WrongGuest {
            expected_name: expected.name.clone(),
            expected_generation: expected.generation,
            found_name: attached.name,
            found_generation: attached.generation,
        });
    }
    let exit = Some(exit_path(dir));
    Ok((
        VmmProcess::new(process, control, exit),
        attached,
        handed_over,
    ))
}

fn connect_in(dir: &Path) -> nix::Result<OwnedFd> {
    let (_dir, address) = address(dir)?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    connect(socket.as_raw_fd(), &address)?;
    Ok(socket)
}

/// The address of the socket in `dir`, valid while the directory stays open: the
/// 108 bytes of `sun_path` are too few for the path of a data directory.
fn address(dir: &Path) -> nix::Result<(File, UnixAddr)> {
    let dir = File::open(dir).map_err(errno)?;
    let path = format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd());
    Ok((dir, UnixAddr::new(path.as_str())?))
}

fn errno(error: io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

/// Makes what a VMM process in `dir` needs to outlive its supervisor: a bound
/// socket, which only the VMM process listens on, and an empty exit file. Both
/// replace those of the boot before.
pub fn prepare(dir: &Path) -> io::Result<(OwnedFd, File)> {
    let (path, exit) = (dir.join(SOCKET), exit_path(dir));
    for old in [&path, &exit] {
        match fs::remove_file(old) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    let (_dir, address) = address(dir)?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    bind(socket.as_raw_fd(), &address)?;
    // The VMM process checks the uid of a peer too.
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    let exit = File::create_new(&exit)?;
    // A block for the reason, which a full disk then does not cost. Not every file
    // system can reserve one.
    let _ = fallocate(&exit, FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, 4096);
    Ok((socket, exit))
}

/// The exit file in `dir`.
pub(super) fn exit_path(dir: &Path) -> PathBuf {
    dir.join(EXIT)
}

/// The reason that a VMM process left in its exit file.
pub(super) fn exit_reason(path: &Path) -> Option<ExitReason> {
    let mut text = Vec::new();
    let read = File::open(path).and_then(|file| file.take(MAX_EXIT).read_to_end(&mut text));
    if let Err(error) = read {
        tracing::warn!(path = %path.display(), %error, "cannot read the exit file");
        return None;
    }
    if text.is_empty() {
        return None;
    }
    let reason = serde_json::from_slice(&text).unwrap_or_else(|error| ExitReason::Failed {
        detail: format!("unreadable exit file: {error}"),
    });
    Some(reason)
}

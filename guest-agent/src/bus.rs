//! The guest end of channels: dial from a privileged port, say hello.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, bind, connect, getpeername, socket,
};
use tokio::time::Instant;
use tokio_vsock::{OwnedReadHalf, OwnedWriteHalf, VsockListener, VsockStream};
use vmbus::channel::{Channel, HOST_CID, PRIVILEGED_PORTS};
use vmbus::stream::{FrameReader, StreamError, send};
use vmbus::version::{Hello, SUPPORTED, Welcome};

use crate::backoff::Backoff;

/// Bind to whatever context id the guest has.
const ANY_CID: u32 = u32::MAX;
/// Waits between attempts to get something from the host.
pub const RETRY: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(30));

/// The next dial follows at once after a connection that lasted this long, for example until
/// the host agent ended.
const LASTING: Duration = Duration::from_secs(30);

/// Why a channel is not open.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// There is no bus, or the host does not answer.
    #[error("dial channel {0:?}")]
    Connect(Channel, #[source] io::Error),
    /// The connection broke, or the host's answer is not valid.
    #[error("channel {0:?}")]
    Stream(Channel, #[source] StreamError),
    /// The host closed or refused.
    #[error("host refused channel {0:?}: {1}")]
    Refused(Channel, String),
}

/// An open channel.
#[derive(Debug)]
pub struct Open {
    /// Frames from the host.
    pub reader: FrameReader<OwnedReadHalf>,
    /// Frames to the host.
    pub writer: OwnedWriteHalf,
}

/// The kernel's random id of this boot.
pub fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|text| text.trim().to_owned())
        .unwrap_or_default()
}

/// Opens a channel.
pub async fn dial(channel: Channel, program: &str) -> Result<Open, DialError> {
    let socket = tokio::task::spawn_blocking(move || connect_privileged(channel.port()))
        .await
        .map_err(|error| DialError::Connect(channel, io::Error::other(error)))?
        .map_err(|error| DialError::Connect(channel, error))?;
    let (reader, mut writer) = VsockStream::from(socket).into_split();
    let mut reader = FrameReader::new(reader);
    let hello = Hello {
        versions: SUPPORTED.to_vec(),
        channel,
        boot_id: boot_id(),
        agent: crate::name(program),
    };
    let stream = |error| DialError::Stream(channel, error);
    send(&mut writer, &hello).await.map_err(stream)?;
    match reader.next::<Welcome>().await.map_err(stream)? {
        Some(Welcome::Accepted { .. }) => Ok(Open { reader, writer }),
        Some(Welcome::Refused { reason }) => Err(DialError::Refused(channel, reason)),
        None => Err(DialError::Refused(channel, "closed".into())),
    }
}

/// Opens a channel again and again, with growing waits after dials that fail and after
/// connections that end soon: the host closes a channel on which it cannot go on.
#[derive(Debug)]
pub struct Dialer {
    channel: Channel,
    program: &'static str,
    backoff: Backoff,
    opened: Option<Instant>,
}

impl Dialer {
    /// The channel is not open yet.
    pub const fn new(channel: Channel, program: &'static str) -> Self {
        Self {
            channel,
            program,
            backoff: RETRY,
            opened: None,
        }
    }

    /// Dials until it works. The connection before has ended.
    pub async fn open(&mut self) -> Open {
        if let Some(opened) = self.opened.take() {
            tokio::time::sleep(wait_after(&mut self.backoff, opened.elapsed())).await;
        }
        loop {
            match dial(self.channel, self.program).await {
                Ok(open) => {
                    self.opened = Some(Instant::now());
                    return open;
                }
                Err(error) => eprintln!("{}: {}", self.program, vmbus::text::chain(&error)),
            }
            tokio::time::sleep(self.backoff.failed()).await;
        }
    }
}

/// The wait after a connection that `lasted` so long. Pure.
fn wait_after(backoff: &mut Backoff, lasted: Duration) -> Duration {
    if lasted < LASTING {
        return backoff.failed();
    }
    backoff.reset();
    Duration::ZERO
}

/// Connections that may wait to be accepted: as many as the device carries. With fewer,
/// the guest's kernel would refuse connections of many simultaneous clients.
const BACKLOG: i32 = 1023;

/// Wait after a failed accept: it fails when the guest has no memory or no file descriptors
/// left, and would fail again at once.
pub const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Listens on `port` for connections of the host.
pub fn listen(port: u32) -> io::Result<VsockListener> {
    let socket = socket(
        AddressFamily::Vsock,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        None,
    )?;
    bind(socket.as_raw_fd(), &VsockAddr::new(ANY_CID, port))?;
    nix::sys::socket::listen(&socket, Backlog::new(BACKLOG)?)?;
    Ok(VsockListener::from(socket))
}

/// Listens on `port`, which only another program of root can have taken; tries again until it
/// is free.
pub async fn listen_when_free(port: u32) -> VsockListener {
    let mut backoff = RETRY;
    loop {
        match listen(port) {
            Ok(listener) => return listener,
            Err(error) => eprintln!("vsock port {port}: {error}"),
        }
        tokio::time::sleep(backoff.failed()).await;
    }
}

/// A connection to `port` of the host from a source port that only root has.
fn connect_privileged(port: u32) -> io::Result<OwnedFd> {
    let socket = socket(
        AddressFamily::Vsock,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    let free = (1..PRIVILEGED_PORTS)
        .rev()
        .find(|source| bind(socket.as_raw_fd(), &VsockAddr::new(ANY_CID, *source)).is_ok());
    if free.is_none() {
        return Err(io::ErrorKind::AddrInUse.into());
    }
    connect(socket.as_raw_fd(), &VsockAddr::new(HOST_CID, port))?;
    getpeername::<VsockAddr>(socket.as_raw_fd())?;
    nix::fcntl::fcntl(
        &socket,
        nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK),
    )?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_that_end_soon_are_dialed_less_and_less_often() {
        let mut backoff = RETRY;
        let mut wait = |seconds| wait_after(&mut backoff, Duration::from_secs(seconds)).as_secs();
        let waits: Vec<u64> = (0..7).map(|_| wait(0)).collect();
        assert_eq!(waits, [1, 2, 4, 8, 16, 30, 30]);
        assert_eq!(wait(29), 30);
        assert_eq!(wait(30), 0);
        assert_eq!(wait(0), 1);
    }
}

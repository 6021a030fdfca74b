//! The guest agent's end: finds the bootstrapper that runs, or starts one, and ends it
//! with everything that it started.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::process::Stdio;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::process::Command;
use vmbus::message::Goal;
use vmbus::stream::{FrameReader, send};

use super::{BootstrapperEvent, Order, Role, SOCKET};
use crate::clock::{self, timeout, timeout_at};
use crate::os::cgroup::{BOOTSTRAPPER, Group, STACK};
use crate::os::child;

/// Most time for a bootstrapper's hello: one that sends none is not adopted.
const HELLO_LIMIT: Duration = Duration::from_secs(10);
/// Most time for killed processes to end.
const KILL_LIMIT: Duration = Duration::from_secs(5);

/// A connection to a bootstrapper that runs.
#[derive(Debug)]
pub struct Bootstrapper {
    reader: FrameReader<OwnedReadHalf>,
    orders: OwnedWriteHalf,
}

/// A bootstrapper and its hello.
#[derive(Debug)]
pub struct Found {
    /// The bootstrapper.
    pub bootstrapper: Bootstrapper,
    /// The goal that it was ordered to run, if it was.
    pub goal: Option<Box<Goal>>,
    /// State of the role.
    pub role: Role,
}

impl Bootstrapper {
    /// The bootstrapper that an earlier guest agent started, if one answers.
    pub async fn find() -> Option<Found> {
        // Only the bootstrapper holds the listening socket: without a bootstrapper the
        // connection is refused or the file does not exist.
        let socket = UnixStream::connect(SOCKET).await.ok()?;
        let (reader, orders) = socket.into_split();
        let mut reader = FrameReader::new(reader);
        match timeout(HELLO_LIMIT, reader.next()).await {
            Ok(Ok(Some(BootstrapperEvent::Hello { goal, role }))) => Some(Found {
                bootstrapper: Self { reader, orders },
                goal,
                role,
            }),
            _ => None,
        }
    }

    /// Starts a bootstrapper that runs the role of `goal`. What is left of an earlier one
    /// is killed first.
    pub async fn start(goal: Goal) -> io::Result<Self> {
        let group = Group::at(STACK)?;
        if !group.clear(KILL_LIMIT).await? {
            return Err(io::Error::other("processes of the role do not end"));
        }
        let mut command = Command::new("/proc/self/exe");
        command
            .arg("bootstrapper")
            .stdin(Stdio::from(OwnedFd::from(listen()?)))
            .process_group(0);
        child::join(&mut command, &Group::at(BOOTSTRAPPER)?)?;
        // Dropped, not killed: the bootstrapper outlives this process.
        drop(command.spawn()?);
        // With the command goes this process's copy of the listening socket.
        drop(command);
        let Some(mut found) = Self::find().await else {
            return Err(io::Error::other("does not answer"));
        };
        send(&mut found.bootstrapper.orders, &Order::Run(Box::new(goal)))
            .await
            .map_err(io::Error::other)?;
        Ok(found.bootstrapper)
    }

    /// The next event; `None` when the bootstrapper is gone. Cancelling loses nothing.
    pub async fn next_event(&mut self) -> Option<BootstrapperEvent> {
        // One that breaks the framing counts as gone.
        self.reader.next().await.ok().flatten()
    }

    /// Orders it to stop the role and to exit, waits at most `limit`, then kills what is
    /// left. Events meanwhile go to `on_event`.
    pub async fn stop(
        mut self,
        limit: Duration,
        mut on_event: impl FnMut(BootstrapperEvent),
    ) -> io::Result<()> {
        let mut deadline = clock::deadline(limit);
        // Fails when the bootstrapper is gone already.
        let _ = timeout_at(&mut deadline, send(&mut self.orders, &Order::Stop)).await;
        while let Ok(Some(event)) = timeout_at(&mut deadline, self.next_event()).await {
            on_event(event);
        }
        clear().await
    }
}

/// Kills bootstrapper and role, whether or not they answer.
pub async fn clear() -> io::Result<()> {
    if Group::at(STACK)?.clear(KILL_LIMIT).await? {
        Ok(())
    } else {
        Err(io::Error::other("processes of the role do not end"))
    }
}

/// A fresh listening socket that only root can connect to.
fn listen() -> io::Result<UnixListener> {
    match fs::remove_file(SOCKET) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(SOCKET)?;
    fs::set_permissions(SOCKET, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

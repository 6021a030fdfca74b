//! The guest agent's end: finds the bootstrapper that runs, or starts one, and
//! ends it with everything that it started.

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
use tokio::time::{Instant, timeout, timeout_at};
use vmbus::message::Goal;
use vmbus::stream::{FrameReader, send};

use super::{Order, Role, SOCKET, Said};
use crate::os::cgroup::{Group, STACK};
use crate::os::child;

/// Time for a bootstrapper to say hello: one that does not is not adopted.
const HELLO_LIMIT: Duration = Duration::from_secs(10);
/// Time for killed processes to be gone.
const KILL_LIMIT: Duration = Duration::from_secs(5);

/// A bootstrapper that runs.
#[derive(Debug)]
pub struct Stack {
    reader: FrameReader<OwnedReadHalf>,
    orders: OwnedWriteHalf,
}

/// A bootstrapper and what it said first.
#[derive(Debug)]
pub struct Found {
    /// The bootstrapper.
    pub stack: Stack,
    /// What it was ordered, if it was.
    pub goal: Option<Box<Goal>>,
    /// How the role is.
    pub role: Role,
}

impl Stack {
    /// The bootstrapper that an earlier guest agent started, if one answers.
    pub async fn find() -> Option<Found> {
        // The listening socket lives in the bootstrapper alone: when nothing
        // is there, or what is there refuses, none runs.
        let socket = UnixStream::connect(SOCKET).await.ok()?;
        let (reader, orders) = socket.into_split();
        let mut reader = FrameReader::new(reader);
        match timeout(HELLO_LIMIT, reader.next()).await {
            Ok(Ok(Some(Said::Hello { goal, role }))) => Some(Found {
                stack: Self { reader, orders },
                goal,
                role,
            }),
            _ => None,
        }
    }

    /// Starts a bootstrapper that runs the role of `goal`. Whatever is left of an
    /// earlier one is killed first.
    pub async fn start(goal: Goal) -> io::Result<Self> {
        let group = Group::at(STACK)?;
        if !group.clear(KILL_LIMIT).await? {
            return Err(io::Error::other("what runs does not die"));
        }
        let mut command = Command::new("/proc/self/exe");
        command
            .arg("bootstrapper")
            .stdin(Stdio::from(OwnedFd::from(listen()?)))
            .process_group(0);
        child::join(&mut command, &group)?;
        // It is not killed with this process, and reaped when it ends.
        drop(command.spawn()?);
        drop(command);
        let Some(mut found) = Self::find().await else {
            return Err(io::Error::other("does not answer"));
        };
        send(&mut found.stack.orders, &Order::Run(Box::new(goal)))
            .await
            .map_err(io::Error::other)?;
        Ok(found.stack)
    }

    /// What it says next; `None` when it is gone. Cancelling loses nothing.
    pub async fn said(&mut self) -> Option<Said> {
        // A bootstrapper that breaks the framing is of no more use than one
        // that ended.
        self.reader.next().await.ok().flatten()
    }

    /// Has it stop the role and end, for at most `limit`, then ends what is
    /// left by force. What it says meanwhile goes to `hear`.
    pub async fn stop(mut self, limit: Duration, mut hear: impl FnMut(Said)) -> io::Result<()> {
        let deadline = Instant::now() + limit;
        // It fails when the bootstrapper is gone, which is what is wanted.
        let _ = timeout_at(deadline, send(&mut self.orders, &Order::Stop)).await;
        while let Ok(Some(said)) = timeout_at(deadline, self.said()).await {
            hear(said);
        }
        clear().await
    }
}

/// Ends bootstrapper and role by force, whether or not they can be talked to.
pub async fn clear() -> io::Result<()> {
    if Group::at(STACK)?.clear(KILL_LIMIT).await? {
        Ok(())
    } else {
        Err(io::Error::other("processes of the role do not die"))
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

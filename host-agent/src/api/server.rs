//! The socket of a host: who can reach it, when it goes.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::Router;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::guard::{Guard, guarded};
use super::listener::{Allowed, Places, accept};
use super::routes::router;
use crate::controller::Controller;
use crate::store::paths;
use crate::supervisor::host::Host;

/// A refusing socket older than this is stale and may be removed.
const STALE: Duration = Duration::from_mins(1);

/// Most time at the end for clients to receive the rest of a log.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);

/// Most time for a client to send the head of a request, and for its body. A client sends
/// both at once.
const REQUEST_LIMIT: Duration = Duration::from_secs(10);

/// A socket that is being served; dropping it stops and removes it.
#[derive(Debug)]
pub struct Server {
    path: Option<PathBuf>,
    task: JoinHandle<()>,
    /// For other listeners. `None` at the end.
    router: Option<Router>,
    ended: watch::Sender<bool>,
}

/// Who can reach a server, and what is recorded of it.
#[derive(Debug, Default)]
pub struct Access {
    /// Passed by every request.
    pub guard: Guard,
    /// Id of the group whose members may use the socket.
    pub group: Option<u32>,
    /// The socket, if the service manager has made it.
    pub activated: Option<std::os::unix::net::UnixListener>,
}

/// Serves `host`, and the services that it keeps, on its socket.
pub fn serve(host: &Host, controller: Option<Controller>) -> io::Result<Server> {
    let access = Access::default();
    serve_within(host, controller, Router::new(), access, REQUEST_LIMIT)
}

/// Serves `host` and the services of `controller`, and `pages` beside the API, as `access`
/// says.
pub fn serve_with(
    host: &Host,
    controller: Controller,
    pages: Router,
    access: Access,
) -> io::Result<Server> {
    serve_within(host, Some(controller), pages, access, REQUEST_LIMIT)
}

fn serve_within(
    host: &Host,
    controller: Option<Controller>,
    pages: Router,
    access: Access,
    request_limit: Duration,
) -> io::Result<Server> {
    let Access {
        guard,
        group,
        activated,
    } = access;
    let runtime_dir = &host.options().runtime_dir;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(runtime_dir)?;
    paths::check_own(runtime_dir)?;
    let (path, listener) = match activated {
        Some(listener) => {
            listener.set_nonblocking(true)?;
            // The service manager removes what it has made.
            (None, UnixListener::from_std(listener)?)
        }
        None => {
            let path = host.socket();
            if host.options().socket.is_some() {
                // Its owner has the store, so that the socket is of one that is gone.
                remove(&path)?;
            }
            let listener = UnixListener::bind(&path)?;
            open_to(&path, 0o600, group)?;
            open_to(runtime_dir, 0o700, group)?;
            (Some(path), listener)
        }
    };
    let directory = runtime_dir.clone();
    tokio::spawn(async move { sweep(&directory, STALE).await });
    let (ended, receiver) = watch::channel(false);
    let places = Places::default();
    let router = router(
        host.clone(),
        controller,
        receiver,
        places.clone(),
        request_limit,
    );
    let router = guarded(router.merge(pages), guard);
    let task = tokio::spawn(accept(
        listener,
        places,
        router.clone(),
        Allowed { group },
        request_limit,
    ));
    Ok(Server {
        path,
        task,
        router: Some(router),
        ended,
    })
}

impl Server {
    /// What is served, for another listener, which ends before this.
    pub(crate) fn router(&self) -> Router {
        self.router.clone().unwrap_or_default()
    }

    /// Stops the server when the deployment has ended: clients that follow a log get the
    /// rest of it and its end.
    pub async fn close(mut self) {
        self.ended.send_replace(true);
        // The handlers' own receiver goes with the router.
        self.router = None;
        self.task.abort();
        let _ = (&mut self.task).await;
        // A client that does not read misses the end.
        let _ = tokio::time::timeout(DRAIN_LIMIT, self.ended.closed()).await;
    }
}

/// Gives `path` this mode of its owner; with a group, the socket is for its members, and they
/// may pass through the directory.
fn open_to(path: &Path, owner: u32, group: Option<u32>) -> io::Result<()> {
    // First closed: the members of the group that it had before are others.
    fs::set_permissions(path, fs::Permissions::from_mode(owner))?;
    let Some(group) = group else {
        return Ok(());
    };
    std::os::unix::fs::chown(path, None, Some(group))?;
    let of_group = if owner == 0o600 { 0o060 } else { 0o010 };
    fs::set_permissions(path, fs::Permissions::from_mode(owner | of_group))
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Removes sockets on which no process listens, because their host agent and its janitor
/// were killed. A socket younger than `stale` may be bound and not listen yet.
async fn sweep(runtime_dir: &Path, stale: Duration) {
    let entries = fs::read_dir(runtime_dir).into_iter().flatten().flatten();
    for path in entries.map(|entry| entry.path()) {
        let Ok(metadata) = fs::symlink_metadata(&path) else {
            continue;
        };
        let age = metadata.modified().map(|time| time.elapsed());
        let old = matches!(age, Ok(Ok(age)) if age >= stale);
        if !old || !metadata.file_type().is_socket() {
            continue;
        }
        // A socket with a full queue returns another error.
        if let Err(error) = UnixStream::connect(&path).await
            && error.kind() == io::ErrorKind::ConnectionRefused
        {
            let _ = fs::remove_file(path);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
        if let Some(path) = &self.path {
            let _ = fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests;

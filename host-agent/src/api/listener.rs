//! Connections to the API's socket: how many, whose, and how long a request may take.

use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::time::Duration;

use axum::{Extension, Router};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use nix::sys::socket::{self, MsgFlags};
use nix::unistd::{Gid, Group, Uid, User};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::types::{Problem, RefusalKind};
use crate::blocking::blocking;

/// Most connections. Each command of a user has one, for as long as it runs.
pub(super) const MAX_CONNECTIONS: usize = 256;

/// Pause after `accept` failed.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// The places for connections. A clone has the same places.
#[derive(Debug, Clone)]
pub(super) struct Places(Arc<Semaphore>);

impl Client {
    /// For the audit log.
    pub(super) fn who(&self) -> String {
        format!("uid:{}", self.user)
    }
}

impl Default for Places {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(MAX_CONNECTIONS)))
    }
}

impl Places {
    /// How many connections there are.
    pub(super) fn taken(&self) -> usize {
        MAX_CONNECTIONS.saturating_sub(self.0.available_permits())
    }
}

/// The client of a connection. The connection's place is free when the last clone is dropped.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    /// Id of its user; that of nobody if the kernel does not say it.
    pub(crate) user: u32,
    /// Id of its group.
    group: u32,
    _place: Arc<OwnedSemaphorePermit>,
}

/// Serves every connection until the future is dropped. A client that has not sent the head of
/// a request after `limit` is disconnected.
pub(super) async fn accept(
    listener: UnixListener,
    places: Places,
    router: Router,
    allowed: Allowed,
    limit: Duration,
) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            // Descriptors or memory are short: wait until connections close.
            tokio::time::sleep(ACCEPT_RETRY).await;
            continue;
        };
        let Ok(place) = Arc::clone(&places.0).try_acquire_owned() else {
            let text =
                format!("this host agent serves {MAX_CONNECTIONS} commands already; end one");
            refuse(&stream, &Problem::new(RefusalKind::Busy, text));
            continue;
        };
        let peer = stream.peer_cred();
        let client = Client {
            user: peer.as_ref().map_or(u32::MAX, |peer| peer.uid()),
            group: peer.map_or(u32::MAX, |peer| peer.gid()),
            _place: Arc::new(place),
        };
        let router = router.clone();
        tokio::spawn(async move {
            if allowed.contains(&client).await {
                serve_connection(stream, client, router, limit).await;
            } else {
                // A client whose request is not read may miss the answer.
                if tokio::time::timeout(limit, stream.readable()).await.is_ok() {
                    let _ = stream.try_read(&mut [0; 4096]);
                }
                refuse(
                    &stream,
                    &Problem::new(RefusalKind::Forbidden, "this user may not use it"),
                );
            }
        });
    }
}

/// Who may use a socket: this user, root, and the members of a group.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Allowed {
    /// Id of the group.
    pub(super) group: Option<u32>,
}

impl Allowed {
    /// Whether `client` may. The mode of the socket says the same; this holds also if
    /// something else changes the mode.
    async fn contains(self, client: &Client) -> bool {
        if client.user == 0 || client.user == Uid::effective().as_raw() {
            return true;
        }
        let Some(group) = self.group else {
            return false;
        };
        let user = client.user;
        // The databases of users and groups are files, or servers.
        client.group == group
            || blocking(move || is_member(user, group))
                .await
                .unwrap_or(false)
    }
}

/// Whether `user` is a member of `group` by the databases of this machine.
fn is_member(user: u32, group: u32) -> bool {
    let user = User::from_uid(Uid::from_raw(user)).ok().flatten();
    let group = Group::from_gid(Gid::from_raw(group)).ok().flatten();
    let (Some(user), Some(group)) = (user, group) else {
        return false;
    };
    user.gid == group.gid || group.mem.contains(&user.name)
}

/// Serves one connection. An error ends only this connection.
async fn serve_connection<S>(stream: S, client: Client, router: Router, limit: Duration)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = TowerToHyperService::new(router.layer(Extension(client)));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limit)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    let _ = connection.await;
}

/// Answers a client that is not served. Never waits.
fn refuse(stream: &UnixStream, problem: &Problem) {
    let body = serde_json::to_string(problem).expect("strings are JSON");
    let answer = format!(
        "HTTP/1.1 {}\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{body}",
        problem.kind.status(),
        body.len()
    );
    // The buffer of a new connection is empty.
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let _ = socket::send(stream.as_raw_fd(), answer.as_bytes(), flags);
}

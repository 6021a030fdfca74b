//! Connections to the API's socket: how many, whose, and how long a request may take.

use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::time::Duration;

use axum::{Extension, Router};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use nix::sys::socket::{self, MsgFlags};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::types::{Problem, RefusalKind};

/// Most connections. Each command of a user has one, for as long as it runs.
pub(super) const MAX_CONNECTIONS: usize = 256;

/// Pause after `accept` failed.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// The places for connections. A clone has the same places.
#[derive(Debug, Clone)]
pub(super) struct Places(Arc<Semaphore>);

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
    _place: Arc<OwnedSemaphorePermit>,
}

/// Serves every connection until the future is dropped. A client that has not sent the head of
/// a request after `limit` is disconnected.
pub(super) async fn accept(
    listener: UnixListener,
    places: Places,
    router: Router,
    limit: Duration,
) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            // Descriptors or memory are short: wait until connections close.
            tokio::time::sleep(ACCEPT_RETRY).await;
            continue;
        };
        let Ok(place) = Arc::clone(&places.0).try_acquire_owned() else {
            refuse(&stream);
            continue;
        };
        let client = Client {
            user: stream.peer_cred().map_or(u32::MAX, |peer| peer.uid()),
            _place: Arc::new(place),
        };
        let service = TowerToHyperService::new(router.clone().layer(Extension(client)));
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(limit)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades();
        tokio::spawn(async move {
            // An error ends only this connection.
            let _ = connection.await;
        });
    }
}

/// Answers a client for which there is no place. Never waits.
fn refuse(stream: &UnixStream) {
    let text = format!("this host agent serves {MAX_CONNECTIONS} commands already; end one");
    let problem = Problem::new(RefusalKind::Busy, text);
    let body = serde_json::to_string(&problem).expect("strings are JSON");
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

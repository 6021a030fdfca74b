//! The page on loopback TCP: off by default, and only for who has the secret that `serve`
//! prints.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::middleware::{from_fn_with_state, map_response};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use super::gate::{Gate, LOGIN, pass, protect};
use super::sessions::Sessions;
use crate::api::server::Server;

/// Most connections: a browser has six.
const MAX_CONNECTIONS: usize = 64;

/// Most time for the head of a request, which a browser sends at once.
const HEAD_LIMIT: Duration = Duration::from_secs(10);

/// Pause after `accept` failed.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// The page on TCP. Drop stops to listen.
#[derive(Debug)]
pub struct TcpPage {
    task: JoinHandle<()>,
    address: SocketAddr,
    token: String,
}

impl TcpPage {
    /// Listens on `address`, which is a loopback address, and serves the page of `server`.
    ///
    /// # Errors
    /// The address is in use.
    pub async fn start(address: SocketAddr, server: &Server) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let (sessions, token) = Sessions::new()?;
        let gate = Gate {
            sessions: Arc::new(sessions),
            port: address.port(),
        };
        let router = server
            .router()
            .layer(from_fn_with_state(gate, pass))
            .layer(map_response(protect));
        let task = tokio::spawn(accept(listener, router));
        Ok(Self {
            task,
            address,
            token,
        })
    }

    /// The address for a browser. It has the secret.
    pub fn url(&self) -> String {
        format!("http://{}{LOGIN}?token={}", self.address, self.token)
    }
}

impl Drop for TcpPage {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept(listener: TcpListener, router: Router) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        // A client waits until another one leaves.
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        let Ok((stream, _)) = listener.accept().await else {
            // Descriptors or memory are short: wait until connections close.
            tokio::time::sleep(ACCEPT_RETRY).await;
            continue;
        };
        let service = TowerToHyperService::new(router.clone());
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_LIMIT)
            .serve_connection(TokioIo::new(stream), service);
        tokio::spawn(async move {
            // An error ends only this connection.
            let _ = connection.await;
            drop(place);
        });
    }
}

//! The bootstrapper's end of its socket: one guest agent at a time.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::net::UnixListener;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::{Notify, mpsc};
use vmbus::message::Goal;
use vmbus::stream::{FrameReader, StreamError, send};

use super::outbox::Outbox;
use super::{Order, Role};
use crate::bus::ACCEPT_PAUSE;
use crate::clock;
use crate::log::uptime_ms;

/// The [`Outbox`], shared by the task that watches the role and the one that sends.
#[derive(Debug)]
pub struct SharedOutbox {
    outbox: Mutex<Outbox>,
    /// Something was added, or a guest agent was attached.
    changed: Notify,
    /// Everything was sent, or the guest agent is gone.
    sent: Notify,
}

impl SharedOutbox {
    /// An empty one.
    pub fn new() -> Self {
        Self {
            outbox: Mutex::new(Outbox::new(Instant::now())),
            changed: Notify::new(),
            sent: Notify::new(),
        }
    }

    /// The order to run this goal's role came.
    pub fn ordered(&self, goal: Goal) {
        self.with(|outbox| outbox.ordered(goal));
    }

    /// The role's state changed.
    pub fn state(&self, role: Role) {
        self.with(|outbox| outbox.state(role, Instant::now()));
        self.changed.notify_one();
    }

    /// The role wrote a line.
    pub fn line(&self, stream: &str, text: String) {
        self.with(|outbox| outbox.line(stream, uptime_ms(), text));
        self.changed.notify_one();
    }

    /// Waits until everything is sent to the guest agent that is attached, if one is, or
    /// for `limit`.
    pub async fn flush(&self, limit: Duration) {
        let sent = async {
            while self.with(|outbox| outbox.has_unsent()) {
                self.sent.notified().await;
            }
        };
        let _ = clock::timeout(limit, sent).await;
    }

    fn with<T>(&self, act: impl FnOnce(&mut Outbox) -> T) -> T {
        act(&mut self.outbox.lock().unwrap_or_else(PoisonError::into_inner))
    }

    async fn send_all(&self, mut writer: OwnedWriteHalf) -> Result<(), StreamError> {
        let hello = self.with(|outbox| outbox.attach(Instant::now()));
        send(&mut writer, &hello).await?;
        loop {
            match self.with(Outbox::pop) {
                Some(event) => send(&mut writer, &event).await?,
                None => {
                    self.sent.notify_one();
                    self.changed.notified().await;
                }
            }
        }
    }
}

impl Default for SharedOutbox {
    fn default() -> Self {
        Self::new()
    }
}

/// Serves guest agents for the life of the process; their orders go to `orders`. The end
/// of a connection is no order: the role goes on, and the next guest agent is waited for.
pub async fn serve(listener: UnixListener, outbox: &SharedOutbox, orders: mpsc::Sender<Order>) {
    loop {
        let Ok((socket, _)) = listener.accept().await else {
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        };
        let (reader, writer) = socket.into_split();
        let receive = async {
            let mut reader = FrameReader::new(reader);
            while let Ok(Some(order)) = reader.next::<Order>().await {
                if orders.send(order).await.is_err() {
                    return;
                }
            }
        };
        tokio::select! {
            () = receive => {}
            _ = outbox.send_all(writer) => {}
        }
        outbox.with(Outbox::detach);
        outbox.sent.notify_one();
    }
}

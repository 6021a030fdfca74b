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
use crate::log::uptime_ms;

/// Where the role's watcher puts what it has to say.
#[derive(Debug)]
pub struct Desk {
    outbox: Mutex<Outbox>,
    /// Something was put in, or taken out and sent.
    changed: Notify,
    /// As `changed`, for who waits for the end.
    sent: Notify,
}

impl Desk {
    /// An empty one.
    pub fn new() -> Self {
        Self {
            outbox: Mutex::new(Outbox::new(Instant::now())),
            changed: Notify::new(),
            sent: Notify::new(),
        }
    }

    /// This is what runs from now on.
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

    /// Waits until a guest agent that listens has been told everything, or for
    /// `limit`.
    pub async fn told(&self, limit: Duration) {
        let told = async {
            while self.with(|outbox| outbox.owes()) {
                self.sent.notified().await;
            }
        };
        let _ = tokio::time::timeout(limit, told).await;
    }

    fn with<T>(&self, act: impl FnOnce(&mut Outbox) -> T) -> T {
        act(&mut self.outbox.lock().unwrap_or_else(PoisonError::into_inner))
    }

    async fn tell(&self, mut writer: OwnedWriteHalf) -> Result<(), StreamError> {
        let hello = self.with(|outbox| outbox.attach(Instant::now()));
        send(&mut writer, &hello).await?;
        loop {
            match self.with(Outbox::pop) {
                Some(said) => send(&mut writer, &said).await?,
                None => {
                    self.sent.notify_one();
                    self.changed.notified().await;
                }
            }
        }
    }
}

impl Default for Desk {
    fn default() -> Self {
        Self::new()
    }
}

/// Serves guest agents for ever; what they order goes to `orders`. One that
/// goes away is no order: the role runs on, and the next one is waited for.
pub async fn serve(listener: UnixListener, desk: &Desk, orders: mpsc::Sender<Order>) {
    loop {
        let Ok((socket, _)) = listener.accept().await else {
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        };
        let (reader, writer) = socket.into_split();
        let hear = async {
            let mut reader = FrameReader::new(reader);
            while let Ok(Some(order)) = reader.next::<Order>().await {
                if orders.send(order).await.is_err() {
                    return;
                }
            }
        };
        tokio::select! {
            () = hear => {}
            _ = desk.tell(writer) => {}
        }
        desk.with(Outbox::detach);
        desk.sent.notify_one();
    }
}

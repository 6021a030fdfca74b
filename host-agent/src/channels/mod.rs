//! The host end of each VMBus channel: bytes of one connection to typed events.
//!
//! A connection is a task. The port that the guest dialed determines the channel, whatever
//! the guest's hello claims, and the instance's actor checks everything that a guest reports.

mod agent;
mod serve;
#[cfg(test)]
mod tests;

use std::convert::Infallible;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use vmbus::channel::{Channel, PRIVILEGED_PORTS};
use vmbus::message::{AgentUpdate, Beat, Goal, LogSource, PowerAction, Status};
use vmbus::stream::{FrameReader, StreamError, send};
use vmbus::text::chain;
use vmbus::version::{Hello, SUPPORTED, Welcome, negotiate};

use crate::closer::Closer;
use crate::event_budget::{EventBudget, PAUSE};
use crate::guest_stream::GuestStream;
use crate::queued_writer::QueuedWriter;
use crate::store::image::AgentProgram;
use crate::supervisor::agents::{Offers, RunningAgent};

/// What a guest reports on its channels, for the instance's actor.
#[derive(Debug, Clone, PartialEq)]
pub enum ChannelEvent {
    /// PID 1 sent its hello on the control channel.
    Booted {
        /// Milliseconds from the guest kernel's start until PID 1 ran.
        init_ms: u64,
        /// Name and version of the agent, at most 100 characters.
        agent: String,
    },
    /// A heartbeat question was sent.
    Asked(u64),
    /// A heartbeat answer.
    Beat(Beat),
    /// The role's status.
    Status(Status),
    /// Whether the guest agent runs.
    AgentResult {
        /// Why it does not run, if so.
        error: Option<String>,
    },
    /// Which guest agent runs, or what became of one that was offered.
    Agent(AgentEvent),
    /// The guest has begun to shut down.
    ShutdownBegun,
    /// A connection was ended because it broke the protocol.
    Violation {
        /// Which channel.
        channel: Channel,
        /// What was wrong.
        reason: String,
    },
}

/// What a guest says of its guest agent. Versions and digests are valid.
#[derive(Debug, Clone, PartialEq)]
pub enum AgentEvent {
    /// This one runs.
    Runs(RunningAgent),
    /// What became of one that was offered.
    Update(AgentUpdate),
}

/// A request to the app agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShutdownRequest {
    /// What the guest shall do at the end.
    pub then: PowerAction,
    /// Time for the role to stop.
    pub deadline: Duration,
}

/// State of all channel connections of one boot of a guest.
#[derive(Debug)]
pub struct GuestChannels {
    /// Number of this boot.
    pub generation: u64,
    /// Time between heartbeat questions.
    pub interval: Duration,
    /// Most time for a hello.
    pub hello_limit: Duration,
    /// Where events go, with the generation they belong to.
    pub events: mpsc::Sender<(u64, ChannelEvent)>,
    /// The goal.
    pub goal: watch::Receiver<Goal>,
    /// Set when the guest shall shut down.
    pub shutdown: watch::Receiver<Option<ShutdownRequest>>,
    /// The guest agent of the image, for guests whose disk has none.
    pub program: Arc<AgentProgram>,
    /// The guest agent that is offered.
    pub offers: Offers,
    /// The role's log.
    pub role_log: Arc<QueuedWriter>,
    /// The agents' log.
    pub agent_log: Arc<QueuedWriter>,
    /// Closed when the last connection is over.
    pub alive: mpsc::Sender<Infallible>,
    /// Last heartbeat question of this boot, over all its connections.
    pub sequence: AtomicU64,
    /// Events that the guest may cause in this boot.
    pub budget: Arc<EventBudget>,
    /// Closes the sockets of connections.
    pub closer: Closer,
}

/// Why a connection ended before its guest did.
#[derive(Debug, thiserror::Error)]
enum ChannelError {
    #[error(transparent)]
    Stream(#[from] StreamError),
    #[error("{0}")]
    Protocol(String),
}

impl GuestChannels {
    /// Serves a connection that the guest opened to host port `port`. Returns at once.
    /// Closes a connection to a port that is not a channel's, or from an unprivileged port.
    pub fn accept(self: &Arc<Self>, port: u32, source_port: u32, socket: OwnedFd) {
        let channel = Channel::from_port(port).filter(|_| source_port < PRIVILEGED_PORTS);
        let Some(channel) = channel else {
            return self.closer.close([socket]);
        };
        let shared = Arc::clone(self);
        tokio::spawn(async move {
            if let Err(error) = shared.connection(channel, socket).await {
                let reason = match error {
                    // The guest closed the connection or ended, which is reported elsewhere.
                    ChannelError::Stream(StreamError::Io(error))
                        if error.kind() != io::ErrorKind::InvalidData =>
                    {
                        return;
                    }
                    other => serve::bounded(&chain(&other)),
                };
                shared
                    .report_caused(ChannelEvent::Violation { channel, reason })
                    .await;
            }
        });
    }

    async fn connection(&self, channel: Channel, socket: OwnedFd) -> Result<(), ChannelError> {
        let stream = GuestStream::received(socket, self.closer.clone()).map_err(StreamError::Io)?;
        let (reader, mut writer) = tokio::io::split(stream);
        let mut reader = FrameReader::new(reader);
        let hello = tokio::time::timeout(self.hello_limit, reader.next::<Hello>())
            .await
            .map_err(|_| StreamError::Io(io::ErrorKind::TimedOut.into()))??;
        let Some(hello) = hello else { return Ok(()) };
        let answer = if hello.channel == channel {
            negotiate(SUPPORTED, &hello.versions)
        } else {
            Err(format!(
                "hello for channel {:?} on the port of {channel:?}",
                hello.channel
            ))
        };
        match answer {
            Ok(version) => {
                send(&mut writer, &Welcome::Accepted { version }).await?;
            }
            Err(reason) => {
                let refused = Welcome::Refused {
                    reason: reason.clone(),
                };
                send(&mut writer, &refused).await?;
                return Err(ChannelError::Protocol(reason));
            }
        }
        self.serve(channel, &hello, reader, writer).await
    }

    /// Reports what the guest caused. Its connection is read again when the budget allows.
    async fn report_caused(&self, event: ChannelEvent) {
        let within = self.budget.spend(Instant::now());
        self.report(event).await;
        if !within {
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn report(&self, event: ChannelEvent) {
        // The actor is gone only when the instance ends.
        let _ = self.events.send((self.generation, event)).await;
    }

    fn next_sequence(&self) -> u64 {
        self.sequence.fetch_add(1, Ordering::Relaxed) + 1
    }

    fn log(&self, source: LogSource, line: &str) {
        let file = match source {
            LogSource::Role => &self.role_log,
            LogSource::Agent => &self.agent_log,
        };
        file.line(line);
    }
}

//! Channel *agent*: what runs in the guest, what the host offers, and the bytes of packages.

use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncWriteExt as _, ReadHalf, WriteHalf};
use tokio::time::Instant;
use vmbus::agent_package::Version;
use vmbus::message::{AgentUpdate, AgentVersions, MAX_BAD, ToGuest, ToHost};
use vmbus::stream::{FrameReader, StreamError, send};

use super::serve::{MAX_TEXT, clean, unexpected};
use super::{AgentEvent, ChannelError, ChannelEvent, GuestChannels};
use crate::blocking::blocking;
use crate::digest::Digest;
use crate::guest_stream::GuestStream;
use crate::store::image::AgentProgram;
use crate::supervisor::agents::{FailedAgent, OfferedAgent, RunningAgent};
use crate::token_bucket::{Rate, TokenBucket};

/// Bytes read from a package at once.
const PART: u64 = 256 * 1024;
/// Longest reason taken from a guest, in characters.
const MAX_REASON: usize = 300;
/// Downloads of one connection. A guest asks once for each offer.
const DOWNLOADS: Rate = Rate::new(4, Duration::from_secs(10));

/// The connection's place in the order of offers.
#[derive(Default)]
struct Told {
    /// The guest knows offers: it has said what it runs.
    follows: bool,
    /// The offer that it was told last.
    offer: Option<Arc<OfferedAgent>>,
    /// What failed in this guest, as it says.
    failed: Vec<FailedAgent>,
}

impl GuestChannels {
    pub(super) async fn agent(
        &self,
        mut reader: FrameReader<ReadHalf<GuestStream>>,
        mut writer: WriteHalf<GuestStream>,
    ) -> Result<(), ChannelError> {
        let mut offers = self.offers.clone();
        let mut downloads = TokenBucket::new(DOWNLOADS);
        let mut told = Told::default();
        loop {
            let message = tokio::select! {
                Ok(()) = offers.changed(), if told.follows => {
                    let offer = offers.borrow_and_update().clone();
                    self.tell(&mut writer, &mut told, offer).await?;
                    continue;
                }
                message = reader.next() => message?,
            };
            match message {
                None => return Ok(()),
                Some(ToHost::AgentVersions(versions)) => {
                    let running = running(versions).map_err(ChannelError::Protocol)?;
                    told.failed.clone_from(&running.failed);
                    self.report_caused(ChannelEvent::Agent(AgentEvent::Runs(running)))
                        .await;
                    if !std::mem::replace(&mut told.follows, true) {
                        let offer = offers.borrow_and_update().clone();
                        self.tell(&mut writer, &mut told, offer).await?;
                    }
                }
                Some(ToHost::AgentRequest { sha256 }) => {
                    while !downloads.take(Instant::now()) {
                        tokio::time::sleep(Duration::from_secs(1)).await;
                    }
                    match (sha256, &told.offer) {
                        (None, _) => deliver(&mut writer, &self.program).await?,
                        (Some(wanted), Some(offered)) if wanted == offered.offer.sha256 => {
                            deliver(&mut writer, &offered.package).await?;
                        }
                        // The guest has been told of a newer offer meanwhile.
                        (Some(_), _) => {}
                    }
                }
                Some(ToHost::AgentUpdate(update)) => {
                    let update = known(update).map_err(ChannelError::Protocol)?;
                    self.report_caused(ChannelEvent::Agent(AgentEvent::Update(update)))
                        .await;
                }
                Some(ToHost::AgentResult { error }) => {
                    let error = error.map(|text| clean(&text, MAX_TEXT));
                    self.report_caused(ChannelEvent::AgentResult { error })
                        .await;
                }
                Some(other) => return Err(unexpected(&other)),
            }
        }
    }

    /// Tells the guest what is offered, unless that failed in it.
    async fn tell(
        &self,
        writer: &mut WriteHalf<GuestStream>,
        told: &mut Told,
        offer: Option<Arc<OfferedAgent>>,
    ) -> Result<(), ChannelError> {
        let guest = {
            let goal = self.goal.borrow();
            (goal.deployment_id.clone(), goal.instance.clone())
        };
        told.offer = offer.filter(|it| {
            let says_so = told
                .failed
                .iter()
                .any(|failed| failed.package.hex() == it.offer.sha256);
            !says_so && !it.failed_in.contains(&guest)
        });
        let offer = told.offer.as_ref().map(|it| it.offer.clone());
        Ok(send(writer, &ToGuest::AgentOffer { offer }).await?)
    }
}

/// Sends a file after its description.
async fn deliver(
    writer: &mut WriteHalf<GuestStream>,
    program: &AgentProgram,
) -> Result<(), ChannelError> {
    let message = ToGuest::AgentProgram {
        version: program.version.clone(),
        size: program.size,
        sha256: program.sha256.clone(),
    };
    send(writer, &message).await?;
    let mut at = 0;
    while at < program.size {
        let file = Arc::clone(&program.file);
        let length = PART.min(program.size - at);
        let read = move || {
            let mut part = vec![0; usize::try_from(length).unwrap_or(0)];
            file.read_exact_at(&mut part, at).map(|()| part)
        };
        let read = blocking(read).await.map_err(io::Error::other);
        let part = read.and_then(|it| it).map_err(StreamError::Io)?;
        writer.write_all(&part).await.map_err(StreamError::Io)?;
        at += length;
    }
    writer.flush().await.map_err(StreamError::Io)?;
    Ok(())
}

/// What a guest says of its guest agent, as far as it is possible.
fn running(versions: AgentVersions) -> Result<RunningAgent, String> {
    let failed = versions.bad.into_iter().take(MAX_BAD).map(|bad| {
        Ok(FailedAgent {
            version: version(&bad.version)?,
            package: digest(&bad.sha256)?,
            reason: clean(&bad.reason, MAX_REASON),
        })
    });
    Ok(RunningAgent {
        version: version(&versions.version)?,
        package: versions.sha256.as_deref().map(digest).transpose()?,
        watched: versions.watched,
        failed: failed.collect::<Result<_, String>>()?,
    })
}

fn known(update: AgentUpdate) -> Result<AgentUpdate, String> {
    Ok(AgentUpdate {
        version: version(&update.version)?,
        sha256: digest(&update.sha256)?.hex(),
        step: update.step,
        detail: clean(&update.detail, MAX_REASON),
    })
}

fn version(text: &str) -> Result<String, String> {
    let version: Version = text.parse().map_err(|_| "no version of an agent")?;
    Ok(version.to_string())
}

fn digest(text: &str) -> Result<Digest, String> {
    Digest::from_hex(text).ok_or_else(|| "no SHA-256 of an agent".into())
}

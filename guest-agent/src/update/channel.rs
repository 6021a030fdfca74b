//! The app agent's end of channel *agent*: tells the host what runs, takes what it offers.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write as _};
use std::sync::Arc;

use tokio::sync::mpsc;
use vmbus::agent_package::{MAX_PACKAGE, Version};
use vmbus::agent_signature::{KeyError, TrustedKeys};
use vmbus::channel::Channel;
use vmbus::message::{AgentOffer, AgentUpdate, ToGuest, ToHost, UpdateStep};
use vmbus::stream::{StreamError, send};
use vmbus::text::{chain, clip};

use super::slots::Installed;
use super::{FilesError, MAX_REASON, Updates};
use crate::bus::{Dialer, Open};

/// Bytes written at once, on a thread that may wait for the disk.
const PART: usize = 256 * 1024;

/// Why an offer is not installed.
#[derive(Debug, thiserror::Error)]
enum OfferError {
    /// The channel broke: the host offers again on the next one.
    #[error("channel agent")]
    Stream(#[from] StreamError),
    /// The host offers something else by now.
    #[error("the offer was replaced")]
    Replaced(Box<Option<AgentOffer>>),
    /// It names no version.
    #[error(transparent)]
    Version(#[from] vmbus::agent_package::VersionError),
    /// It names no package.
    #[error("the offer names no SHA-256")]
    Digest,
    /// Its keys are none.
    #[error("the keys of the offer")]
    Keys(#[from] KeyError),
    /// The package has another version than the offer.
    #[error("the package has version {found}, the offer {offered}")]
    Other {
        /// Of the package.
        found: Version,
        /// Of the offer.
        offered: Version,
    },
    /// It is refused or cannot be stored.
    #[error(transparent)]
    Files(#[from] FilesError),
}

/// Serves the channel for as long as the guest runs. `pinned` are the keys of the image: if
/// there are any, those of the host do not count.
pub async fn serve(
    updates: Arc<Updates>,
    mut messages: mpsc::Receiver<ToHost>,
    pinned: TrustedKeys,
    program: &'static str,
) {
    let mut dialer = Dialer::new(Channel::Agent, program);
    let mut unsent = VecDeque::new();
    loop {
        let mut open = dialer.open().await;
        // The state first; what happened before follows.
        unsent.push_front(ToHost::AgentVersions(updates.versions()));
        if let Err(error) =
            serve_one(&updates, &mut open, &mut messages, &mut unsent, &pinned).await
        {
            eprintln!("{program}: channel agent: {}", chain(&error));
        }
        unsent.retain(|message| !matches!(message, ToHost::AgentVersions(_)));
    }
}

async fn serve_one(
    updates: &Arc<Updates>,
    open: &mut Open,
    messages: &mut mpsc::Receiver<ToHost>,
    unsent: &mut VecDeque<ToHost>,
    pinned: &TrustedKeys,
) -> Result<(), StreamError> {
    loop {
        while let Some(message) = unsent.front() {
            send(&mut open.writer, message).await?;
            unsent.pop_front();
        }
        tokio::select! {
            Some(message) = messages.recv() => unsent.push_back(message),
            received = open.reader.next::<ToGuest>() => match received? {
                Some(ToGuest::AgentOffer { mut offer }) => {
                    while let Some(current) = offer.take() {
                        offer = take(updates, open, &current, pinned).await?;
                    }
                }
                // A message of a later version.
                Some(_) => {}
                None => return Ok(()),
            },
        }
    }
}

/// Takes an offer if it is wanted; the offer that has replaced it meanwhile.
async fn take(
    updates: &Arc<Updates>,
    open: &mut Open,
    offer: &AgentOffer,
    pinned: &TrustedKeys,
) -> Result<Option<AgentOffer>, StreamError> {
    let error = match install(updates, open, offer, pinned).await {
        Ok(None) => return Ok(None),
        Ok(Some(installed)) => {
            let of_blocking = Arc::clone(updates);
            let recorded = installed.clone();
            let changed = tokio::task::spawn_blocking(move || {
                of_blocking
                    .change(|slots| slots.install(recorded))
                    .is_some()
            });
            if changed.await.unwrap_or(false) {
                updates.report(&installed, UpdateStep::Installed, String::new());
                updates.replaced.notify_one();
            }
            return Ok(None);
        }
        Err(OfferError::Stream(error)) => return Err(error),
        Err(OfferError::Replaced(newer)) => return Ok(*newer),
        Err(error) => error,
    };
    let detail = clip(chain(&error), MAX_REASON);
    eprintln!(
        "app-agent: guest agent {} not taken: {detail}",
        offer.version
    );
    updates.send(ToHost::AgentUpdate(AgentUpdate {
        version: offer.version.clone(),
        sha256: offer.sha256.clone(),
        step: UpdateStep::Refused,
        detail,
    }));
    Ok(None)
}

/// Downloads, checks and installs an offer; `None` if it is not wanted.
async fn install(
    updates: &Arc<Updates>,
    open: &mut Open,
    offer: &AgentOffer,
    pinned: &TrustedKeys,
) -> Result<Option<Installed>, OfferError> {
    let version: Version = offer.version.parse()?;
    let digits = offer.sha256.bytes();
    if offer.sha256.len() != 64
        || !digits
            .clone()
            .all(|it| matches!(it, b'0'..=b'9' | b'a'..=b'f'))
    {
        return Err(OfferError::Digest);
    }
    let wanted = updates.with(|slots| {
        let slots = slots.as_ref();
        slots.is_some_and(|it| it.wants(offer, version, updates.image))
    });
    if !wanted {
        return Ok(None);
    }
    let keys = if pinned.is_empty() {
        TrustedKeys::parse(&offer.keys)?
    } else {
        pinned.clone()
    };
    let size = request(open, offer).await?;
    let file = download(updates, open, &offer.sha256, size).await?;
    let (files, offer) = (updates.files.clone(), offer.clone());
    let installed = tokio::task::spawn_blocking(move || {
        files.install(file, &offer.sha256, &offer.signature, &keys)
    });
    let installed = installed.await.map_err(joined)??;
    if installed.version != version {
        let (found, offered) = (installed.version, version);
        return Err(OfferError::Other { found, offered });
    }
    Ok(Some(installed))
}

/// Requests the package of an offer; its size. The bytes follow.
async fn request(open: &mut Open, offer: &AgentOffer) -> Result<u64, OfferError> {
    let sha256 = Some(offer.sha256.clone());
    send(&mut open.writer, &ToHost::AgentRequest { sha256 }).await?;
    loop {
        match open.reader.next::<ToGuest>().await? {
            Some(ToGuest::AgentProgram { size, .. }) if size > MAX_PACKAGE => {
                // The bytes would be taken for frames.
                return Err(StreamError::Io(io::ErrorKind::InvalidData.into()).into());
            }
            Some(ToGuest::AgentProgram { size, .. }) => return Ok(size),
            Some(ToGuest::AgentOffer { offer: Some(again) }) if again.sha256 == offer.sha256 => {}
            // The host sent it before it saw the request, and does not answer that.
            Some(ToGuest::AgentOffer { offer }) => {
                return Err(OfferError::Replaced(Box::new(offer)));
            }
            Some(_) => {}
            None => return Err(StreamError::Io(io::ErrorKind::UnexpectedEof.into()).into()),
        }
    }
}

/// Stores the bytes that follow. After an error the channel has no frame boundary.
async fn download(
    updates: &Arc<Updates>,
    open: &mut Open,
    sha256: &str,
    size: u64,
) -> Result<File, OfferError> {
    let (files, name) = (updates.files.clone(), sha256.to_owned());
    let begun = tokio::task::spawn_blocking(move || files.begin(&name)).await;
    let mut stored: Result<File, OfferError> = match begun {
        Ok(begun) => begun.map_err(Into::into),
        Err(error) => Err(joined(error)),
    };
    let mut left = size;
    while left > 0 {
        let mut part = vec![0; PART.min(usize::try_from(left).unwrap_or(PART))];
        open.reader
            .read_raw(&mut part)
            .await
            .map_err(StreamError::Io)?;
        left -= part.len() as u64;
        // The bytes that come after a failed write are read all the same.
        if let Ok(mut file) = stored {
            let written = tokio::task::spawn_blocking(move || {
                file.write_all(&part)?;
                Ok::<_, io::Error>(file)
            });
            stored = match written.await {
                Ok(Ok(file)) => Ok(file),
                Ok(Err(source)) => Err(OfferError::Files(FilesError::File {
                    what: "write",
                    path: sha256.into(),
                    source,
                })),
                Err(error) => Err(joined(error)),
            };
        }
    }
    stored
}

fn joined(error: tokio::task::JoinError) -> OfferError {
    StreamError::Io(io::Error::other(error)).into()
}

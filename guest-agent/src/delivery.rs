//! Takes the guest agent of an image whose initrd has none over the bus, at each boot.

use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use sha2::{Digest, Sha256};
use vmbus::message::{ToGuest, ToHost};
use vmbus::stream::{StreamError, send};

use crate::bus::Open;

/// Largest program taken, in bytes.
const MAX_PROGRAM: u64 = 256 << 20;

/// Why there is no program.
#[derive(Debug, thiserror::Error)]
pub enum DeliveryError {
    /// The channel broke.
    #[error("channel agent")]
    Stream(#[from] StreamError),
    /// The host sent another message, or closed.
    #[error("host sent no program")]
    NoProgram,
    /// The announced program is over the limit.
    #[error("program of {0} bytes is over the limit of {MAX_PROGRAM}")]
    TooLarge(u64),
    /// The bytes are not those that were announced.
    #[error("SHA-256 of the program is {actual}, announced was {expected}")]
    Digest {
        /// Of the bytes received.
        actual: String,
        /// Announced by the host.
        expected: String,
    },
    /// The program cannot be stored.
    #[error("store the program")]
    Store(#[from] io::Error),
}

/// Asks for the program and stores it at `path`; its version.
pub async fn receive(open: &mut Open, path: &Path) -> Result<String, DeliveryError> {
    send(&mut open.writer, &ToHost::AgentRequest { sha256: None }).await?;
    let Some(ToGuest::AgentProgram {
        version,
        size,
        sha256,
    }) = open.reader.next().await?
    else {
        return Err(DeliveryError::NoProgram);
    };
    if size > MAX_PROGRAM {
        return Err(DeliveryError::TooLarge(size));
    }
    let new = path.with_extension("new");
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o700)
        .open(&new)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 64 * 1024];
    let mut left = size;
    while left > 0 {
        let part = &mut buffer[..left.min(64 * 1024) as usize];
        open.reader.read_raw(part).await?;
        hasher.update(&*part);
        file.write_all(part)?;
        left -= part.len() as u64;
    }
    drop(file);
    let actual: String = hasher
        .finalize()
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    if actual != sha256 {
        std::fs::remove_file(&new)?;
        return Err(DeliveryError::Digest {
            actual,
            expected: sha256,
        });
    }
    std::fs::rename(&new, path)?;
    Ok(version)
}

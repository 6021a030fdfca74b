//! Files of this machine as a tar stream. Links are archived, not followed.

use std::fs::{self, File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;

use tar::{Builder, EntryType, Header};
use tokio::sync::mpsc;
use vmbus::message::EXEC_PIECE;

use super::Copied;
use crate::progress::Progress;

/// Writes the file or directory `from` under the name `name`.
pub fn pack(from: &Path, name: &Path, to: impl Write, progress: &Progress) -> io::Result<Copied> {
    let mut archive = Archive {
        builder: Builder::new(to),
        copied: Copied::default(),
        progress,
    };
    archive.add(from, name)?;
    archive.builder.into_inner()?.flush()?;
    Ok(archive.copied)
}

struct Archive<'a, W: Write> {
    builder: Builder<W>,
    copied: Copied,
    progress: &'a Progress,
}

impl<W: Write> Archive<'_, W> {
    fn add(&mut self, from: &Path, name: &Path) -> io::Result<()> {
        self.progress.check()?;
        let of = |error: io::Error| match error.kind() {
            // The caller knows what it means.
            io::ErrorKind::BrokenPipe => error,
            kind => io::Error::new(kind, format!("{}: {error}", from.display())),
        };
        let metadata = from.symlink_metadata().map_err(of)?;
        let kind = metadata.file_type();
        if kind.is_dir() {
            self.builder
                .append_data(
                    &mut header(&metadata, EntryType::Directory),
                    name,
                    io::empty(),
                )
                .map_err(of)?;
            let mut names = fs::read_dir(from)
                .and_then(|entries| entries.map(|it| it.map(|it| it.file_name())).collect())
                .map(|names: Vec<_>| names)
                .map_err(of)?;
            names.sort();
            for entry in names {
                self.add(&from.join(&entry), &name.join(&entry))?;
            }
        } else if kind.is_symlink() {
            let target = fs::read_link(from).map_err(of)?;
            self.builder
                .append_link(&mut header(&metadata, EntryType::Symlink), name, target)
                .map_err(of)?;
        } else if kind.is_file() {
            self.add_file(from, name).map_err(of)?;
        } else {
            self.copied.skipped += 1;
            return Ok(());
        }
        self.copied.entries += 1;
        Ok(())
    }

    fn add_file(&mut self, from: &Path, name: &Path) -> io::Result<()> {
        // Not a link, nor a pipe that blocks, if it was replaced meanwhile.
        let file = File::options()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(from)?;
        let metadata = file.metadata()?;
        let mut header = header(&metadata, EntryType::Regular);
        header.set_size(metadata.len());
        header.set_cksum();
        let content = Exactly {
            inner: self.progress.watch(file),
            left: metadata.len(),
        };
        self.builder.append_data(&mut header, name, content)?;
        self.copied.bytes += metadata.len();
        Ok(())
    }
}

fn header(metadata: &Metadata, kind: EntryType) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(metadata.permissions().mode() & 0o7777);
    header.set_mtime(u64::try_from(metadata.mtime()).unwrap_or(0));
    header.set_size(0);
    header
}

/// The bytes that the header says: what a file grows by meanwhile is left out, and one that
/// shrinks is an error.
struct Exactly<R> {
    inner: R,
    left: u64,
}

impl<R: Read> Read for Exactly<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        if most == 0 {
            return Ok(0);
        }
        let count = self.inner.read(&mut buffer[..most])?;
        if count == 0 {
            return Err(io::Error::other("it became shorter while it was read"));
        }
        self.left -= count as u64;
        Ok(count)
    }
}

/// Sends what is written in pieces that a connection takes.
pub struct Chunks {
    pieces: mpsc::Sender<Vec<u8>>,
    waiting: Vec<u8>,
}

impl Chunks {
    /// To the sender of a session's input, which [`Write::flush`] completes.
    pub fn to(pieces: mpsc::Sender<Vec<u8>>) -> Self {
        Self {
            pieces,
            waiting: Vec::with_capacity(EXEC_PIECE),
        }
    }

    fn send(&mut self) -> io::Result<()> {
        let piece = std::mem::replace(&mut self.waiting, Vec::with_capacity(EXEC_PIECE));
        let sent = self.pieces.blocking_send(piece);
        sent.map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

impl Write for Chunks {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(EXEC_PIECE - self.waiting.len());
        self.waiting.extend_from_slice(&bytes[..count]);
        if self.waiting.len() == EXEC_PIECE {
            self.send()?;
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        self.send()
    }
}

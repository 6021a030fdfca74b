//! Writes the subset of ZIP that `archive` reads. The same parts always give the
//! same bytes.

use std::fs::File;
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};

use flate2::write::DeflateEncoder;
use flate2::{Compression, Crc};

use super::archive::{
    CENTRAL_MAGIC, END_MAGIC, END_SIZE, LOCAL_MAGIC, MAX_PACKED, MAX_PARTS, MAX_RATIO,
};

/// Writes parts one after another; [`Self::finish`] adds the directory.
pub(super) struct ArchiveWriter {
    out: BufWriter<File>,
    /// Date and time of every part, in MS-DOS format.
    date: (u16, u16),
    central: Vec<u8>,
    count: u16,
    at: u64,
}

impl ArchiveWriter {
    /// Writes to `out`, an empty file. `date` is the date and the time of every
    /// part, in MS-DOS format.
    pub fn new(out: File, date: (u16, u16)) -> Self {
        Self {
            out: BufWriter::with_capacity(1 << 18, out),
            date,
            central: Vec::new(),
            count: 0,
            at: 0,
        }
    }

    /// Adds the part `name`. `open` opens its content and may be called twice: a
    /// content whose compression ratio a reader would refuse is stored instead.
    pub fn add<R: Read>(
        &mut self,
        name: &str,
        mut open: impl FnMut() -> io::Result<R>,
    ) -> io::Result<()> {
        let start = self.at;
        let header = 30 + name.len() as u64;
        self.out.seek(SeekFrom::Start(start + header))?;
        let mut method = 8;
        let deflated = DeflateEncoder::new(&mut self.out, Compression::new(6));
        let (mut crc, mut size, mut packed) = deflate(open()?, deflated)?;
        // Half the limit, so that rounding never matters.
        if size > packed.saturating_mul(MAX_RATIO / 2) {
            self.out.seek(SeekFrom::Start(start + header))?;
            method = 0;
            (crc, size) = store(open()?, &mut self.out)?;
            packed = size;
        }
        let end = start + header + packed;
        if end > MAX_PACKED {
            return Err(too_large());
        }
        if usize::from(self.count) == MAX_PARTS {
            return Err(limit(format!("the package would exceed {MAX_PARTS} parts")));
        }
        let sizes = [crc, packed as u32, size as u32];
        let described = self.describe(method, sizes, name);

        self.out.seek(SeekFrom::Start(start))?;
        self.out.write_all(&LOCAL_MAGIC.to_le_bytes())?;
        self.out.write_all(&described)?;
        self.out.write_all(name.as_bytes())?;
        self.out.seek(SeekFrom::Start(end))?;

        self.central.extend(CENTRAL_MAGIC.to_le_bytes());
        // Made by version 2.0 on Unix, so that the mode below is valid.
        self.central.extend([20, 3]);
        self.central.extend(described);
        // No comment, first file, no internal attributes; -rw-r--r--.
        self.central.extend([0; 6]);
        self.central.extend((0o100_644_u32 << 16).to_le_bytes());
        self.central.extend((start as u32).to_le_bytes());
        self.central.extend(name.as_bytes());
        self.count += 1;
        self.at = end;
        Ok(())
    }

    /// The fields that the local header and the central directory share.
    fn describe(&self, method: u16, sizes: [u32; 3], name: &str) -> Vec<u8> {
        let flags: u16 = if name.is_ascii() { 0 } else { 1 << 11 };
        let mut bytes = Vec::with_capacity(26);
        for value in [20, flags, method, self.date.1, self.date.0] {
            bytes.extend(value.to_le_bytes());
        }
        for value in sizes {
            bytes.extend(value.to_le_bytes());
        }
        bytes.extend((name.len() as u16).to_le_bytes());
        bytes.extend([0; 2]);
        bytes
    }

    /// Writes the central directory and returns the file, not synced.
    pub fn finish(mut self) -> io::Result<File> {
        if self.at + (self.central.len() + END_SIZE) as u64 > MAX_PACKED {
            return Err(too_large());
        }
        self.out.write_all(&self.central)?;
        let mut end = Vec::with_capacity(22);
        end.extend(END_MAGIC.to_le_bytes());
        end.extend([0; 4]);
        end.extend(self.count.to_le_bytes());
        end.extend(self.count.to_le_bytes());
        end.extend((self.central.len() as u32).to_le_bytes());
        end.extend((self.at as u32).to_le_bytes());
        end.extend([0; 2]);
        self.out.write_all(&end)?;
        let file = self.out.into_inner();
        file.map_err(io::IntoInnerError::into_error)
    }
}

fn too_large() -> io::Error {
    limit(format!("the package would exceed {MAX_PACKED} bytes"))
}

/// The error of a package that would exceed a limit.
fn limit(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::FileTooLarge, what)
}

/// Whether `error` is of a package that would exceed a limit, and not of the file system.
pub(super) fn is_limit(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::FileTooLarge && error.raw_os_error().is_none()
}

/// Writes `content` compressed: checksum, size and packed size.
fn deflate<W: Write>(
    mut content: impl Read,
    mut out: DeflateEncoder<W>,
) -> io::Result<(u32, u64, u64)> {
    let (crc, size) = store(&mut content, &mut out)?;
    out.try_finish()?;
    Ok((crc, size, out.total_out()))
}

/// Writes `content` as it is: checksum and size.
fn store(mut content: impl Read, out: &mut impl Write) -> io::Result<(u32, u64)> {
    let mut crc = Crc::new();
    let mut size = 0;
    let mut buffer = vec![0; 1 << 16];
    loop {
        match content.read(&mut buffer) {
            Ok(0) => return Ok((crc.sum(), size)),
            Ok(read) => {
                crc.update(&buffer[..read]);
                out.write_all(&buffer[..read])?;
                size += read as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

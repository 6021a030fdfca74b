//! Reads a strict subset of ZIP, in which every reader sees the same files.
//!
//! Every byte of the file is accounted for: parts follow one another from the
//! first byte, local headers and central directory agree, and only the end record
//! follows the central directory. `archive_policy` says what a part may be.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use flate2::Crc;
use flate2::bufread::DeflateDecoder;

use super::archive_policy::{
    DEFLATED, FLAG_DESCRIPTOR, FLAG_UTF8, STORED, ZIP64, check_extra, check_kind, part_name,
};
use super::error::ServiceError;
use super::open::open_regular;
use super::payload::MAX_UNPACKED;

/// Largest package: 600 MiB.
pub const MAX_PACKED: u64 = 600 << 20;

/// Most parts: the files and the parts that describe them.
pub const MAX_PARTS: usize = super::payload::MAX_FILES + 1_000;

/// Most bytes of a part for each of its packed bytes, beyond [`RATIO_FREE`].
/// Deflate reaches about 1,030.
pub const MAX_RATIO: u64 = 200;

/// Bytes of a part to which [`MAX_RATIO`] does not apply, because short repetitive
/// data compresses to almost nothing.
pub(super) const RATIO_FREE: u64 = 64 << 10;

/// Largest central directory: [`MAX_PARTS`] entries of some 300 bytes.
const MAX_DIRECTORY: u64 = 16 << 20;

// APPNOTE.TXT 6.3.10, section 4.3.
pub(super) const LOCAL_MAGIC: u32 = 0x0403_4b50;
pub(super) const CENTRAL_MAGIC: u32 = 0x0201_4b50;
pub(super) const END_MAGIC: u32 = 0x0605_4b50;
const DESCRIPTOR_MAGIC: u32 = 0x0807_4b50;
const LOCAL_SIZE: usize = 30;
const CENTRAL_SIZE: usize = 46;
pub(super) const END_SIZE: usize = 22;

const SPLIT: &str = "split ZIP archives are not supported";

/// An archive with a valid structure. Contents are checked as they are read.
#[derive(Debug)]
pub(super) struct Archive {
    path: PathBuf,
    file: File,
    parts: Vec<Part>,
    /// Indices of parts, sorted by [`folded`] name.
    by_name: Vec<u32>,
}

/// A file in the archive.
#[derive(Debug)]
pub(super) struct Part {
    /// Relative path of pieces separated by `/`, none of them `.` or `..`.
    pub name: Box<str>,
    /// Declared size after unpacking.
    pub size: u64,
    packed: u64,
    deflated: bool,
    crc: u32,
    data: u64,
}

/// An entry of the central directory.
struct Central<'a> {
    fixed: &'a [u8],
    name: &'a [u8],
    /// Offset of the local header.
    local: u64,
}

/// Why an archive is refused.
enum Refusal {
    Io(io::Error),
    Invalid(String),
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<String> for Refusal {
    fn from(what: String) -> Self {
        Self::Invalid(what)
    }
}

impl From<&str> for Refusal {
    fn from(what: &str) -> Self {
        Self::Invalid(what.into())
    }
}

impl Archive {
    /// Opens the archive at `path` and checks its structure.
    pub fn open(path: &Path) -> Result<Self, ServiceError> {
        const CANNOT: &str = "cannot read the package";
        let file = open_regular(path, CANNOT)?;
        let parts = read_directory(&file).map_err(|refusal| match refusal {
            Refusal::Io(source) => ServiceError::io(path, CANNOT, source),
            Refusal::Invalid(what) => ServiceError::new(path, what),
        })?;
        let name = |index: &u32| &*parts[*index as usize].name;
        let mut by_name: Vec<u32> = (0..parts.len() as u32).collect();
        by_name.sort_by_cached_key(|index| folded(name(index)).collect::<String>());
        for pair in by_name.windows(2) {
            if folded(name(&pair[0])).eq(folded(name(&pair[1]))) {
                let second = name(pair.iter().max().unwrap_or(&0));
                let what = format!("duplicate part \"{second}\"");
                return Err(ServiceError::new(path, what));
            }
        }
        Ok(Self {
            path: path.to_owned(),
            file,
            parts,
            by_name,
        })
    }

    /// The package's file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All parts, in the order of their data.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// The part named exactly `name`.
    pub fn find(&self, name: &str) -> Option<&Part> {
        self.index_of(name).map(|index| &self.parts[index])
    }

    /// Index in [`Self::parts`] of the part named exactly `name`.
    pub fn index_of(&self, name: &str) -> Option<usize> {
        let part = |index: &u32| &self.parts[*index as usize];
        let found = self
            .by_name
            .binary_search_by(|index| folded(&part(index).name).cmp(folded(name)));
        let index = &self.by_name[found.ok()?];
        (*part(index).name == *name).then_some(*index as usize)
    }

    /// The content of `part`. Reading ends with an error unless the content
    /// has the declared size and checksum.
    pub fn read<'a>(&'a self, part: &Part) -> PartReader<'a> {
        let packed = Window {
            file: &self.file,
            at: part.data,
            end: part.data + part.packed,
        };
        let packed = BufReader::with_capacity(32 << 10, packed);
        PartReader {
            content: if part.deflated {
                Content::Deflated(DeflateDecoder::new(packed))
            } else {
                Content::Stored(packed)
            },
            crc: Crc::new(),
            left: part.size,
            expected: part.crc,
            packed: part.packed,
        }
    }

    /// The content of `part`, which must not be larger than `limit` bytes.
    pub fn read_all(&self, part: &Part, limit: u64) -> Result<Vec<u8>, ServiceError> {
        let place = self.path.join(&*part.name);
        if part.size > limit {
            let what = format!("is larger than {limit} bytes");
            return Err(ServiceError::new(&place, what));
        }
        let mut content = Vec::with_capacity(part.size as usize);
        self.read(part)
            .read_to_end(&mut content)
            .map_err(|source| ServiceError::io(&place, "cannot unpack the part", source))?;
        Ok(content)
    }
}

/// A part's name as it is compared: without regard to case. Open Packaging ignores that of
/// ASCII, some file systems that of every letter.
fn folded(name: &str) -> impl Iterator<Item = char> {
    name.chars().flat_map(char::to_lowercase)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// All parts, in the order of their data.
fn read_directory(file: &File) -> Result<Vec<Part>, Refusal> {
    let length = file.metadata()?.len();
    if length > MAX_PACKED {
        return Err(format!("the package is larger than {MAX_PACKED} bytes").into());
    }
    let (count, start, size) = end_record(file, length)?;
    let mut directory = vec![0; size as usize];
    file.read_exact_at(&mut directory, start)?;
    let mut centrals = central_entries(&directory, count)?;
    centrals.sort_by_key(|central| central.local);

    let mut parts = Vec::with_capacity(count);
    let mut at = 0;
    let mut total = 0_u64;
    for central in &centrals {
        let (part, end) =
            check_part(file, central, at, start).map_err(|refusal| match refusal {
                Refusal::Invalid(what) => format!("{}: {what}", shown(central.name)).into(),
                io @ Refusal::Io(_) => io,
            })?;
        at = end;
        total = total.saturating_add(part.size);
        if total > MAX_UNPACKED {
            return Err(format!("the package unpacks to more than {MAX_UNPACKED} bytes").into());
        }
        parts.push(part);
    }
    if at != start {
        return Err(format!("{} bytes belong to no part", start - at).into());
    }
    Ok(parts)
}

/// Number of entries, start and size of the central directory.
fn end_record(file: &File, length: u64) -> Result<(usize, u64, u64), Refusal> {
    let start = length.checked_sub(END_SIZE as u64);
    let start = start.ok_or("is not a package: too short")?;
    let mut end = [0; END_SIZE];
    file.read_exact_at(&mut end, start)?;
    if u32_at(&end, 0) != END_MAGIC {
        let longest = length.min(0x1_0000 + END_SIZE as u64);
        let mut tail = vec![0; longest as usize];
        file.read_exact_at(&mut tail, length - longest)?;
        let found = tail
            .windows(4)
            .rposition(|bytes| u32_at(bytes, 0) == END_MAGIC);
        return Err(match found {
            Some(at) if tail.len() - at < END_SIZE => "the package is truncated",
            Some(_) => "there is data after the end of the package",
            None => "is not a package: no ZIP end record",
        }
        .into());
    }
    let (disk, directory_disk) = (u16_at(&end, 4), u16_at(&end, 6));
    let (here, count) = (u16_at(&end, 8), u16_at(&end, 10));
    let (size, offset) = (u32_at(&end, 12), u32_at(&end, 16));
    if disk != 0 || directory_disk != 0 || here != count {
        return Err(SPLIT.into());
    }
    if u16_at(&end, 20) != 0 {
        return Err("there is a comment after the end of the package".into());
    }
    if count == u16::MAX || size == u32::MAX || offset == u32::MAX {
        return Err(ZIP64.into());
    }
    if u64::from(offset) + u64::from(size) != start {
        return Err("the central directory does not end at the end record".into());
    }
    if usize::from(count) > MAX_PARTS {
        return Err(format!("the package has more than {MAX_PARTS} parts").into());
    }
    if u64::from(size) > MAX_DIRECTORY {
        return Err(format!("the central directory is larger than {MAX_DIRECTORY} bytes").into());
    }
    Ok((count.into(), offset.into(), size.into()))
}

/// Splits the central directory into its entries.
fn central_entries(directory: &[u8], count: usize) -> Result<Vec<Central<'_>>, Refusal> {
    let mut entries = Vec::with_capacity(count);
    let mut rest = directory;
    while !rest.is_empty() {
        let malformed = || {
            format!(
                "entry {} of the central directory is malformed",
                entries.len()
            )
        };
        if rest.len() < CENTRAL_SIZE || u32_at(rest, 0) != CENTRAL_MAGIC {
            return Err(malformed().into());
        }
        let (fixed, variable) = rest.split_at(CENTRAL_SIZE);
        let name = usize::from(u16_at(fixed, 28));
        let extra = usize::from(u16_at(fixed, 30));
        let comment = usize::from(u16_at(fixed, 32));
        if variable.len() < name + extra + comment {
            return Err(malformed().into());
        }
        let (name, variable) = variable.split_at(name);
        check_extra(&variable[..extra]).map_err(|what| format!("{}: {what}", shown(name)))?;
        if comment != 0 {
            return Err(format!("{}: has a comment", shown(name)).into());
        }
        rest = &variable[extra..];
        if u16_at(fixed, 34) != 0 {
            return Err(SPLIT.into());
        }
        entries.push(Central {
            fixed,
            name,
            local: u32_at(fixed, 42).into(),
        });
    }
    if entries.len() != count {
        let found = entries.len();
        return Err(
            format!("the end record counts {count} parts, the central directory {found}").into(),
        );
    }
    Ok(entries)
}

/// Checks the part that must begin at `at` and end before `limit`. Returns the
/// part and the offset after its last byte.
fn check_part(
    file: &File,
    central: &Central<'_>,
    at: u64,
    limit: u64,
) -> Result<(Part, u64), Refusal> {
    let fixed = central.fixed;
    let (flags, method) = (u16_at(fixed, 8), u16_at(fixed, 10));
    let (crc, packed, size) = (u32_at(fixed, 16), u32_at(fixed, 20), u32_at(fixed, 24));
    let name = part_name(central.name, flags & FLAG_UTF8 != 0)?;
    check_kind(u32_at(fixed, 38), flags, method)?;
    let (packed_size, size) = (u64::from(packed), u64::from(size));
    if packed == u32::MAX || size == u64::from(u32::MAX) {
        return Err(ZIP64.into());
    }
    if method == STORED && packed_size != size {
        return Err("a stored part declares two different sizes".into());
    }
    if size > packed_size * MAX_RATIO + RATIO_FREE {
        return Err(format!(
            "unpacks to more than {MAX_RATIO} times its size ({packed_size} to {size} bytes)"
        )
        .into());
    }

    if central.local != at {
        return Err(match central.local.checked_sub(at) {
            None => "overlaps the part before it".into(),
            Some(gap) => format!("{gap} bytes before it belong to no part").into(),
        });
    }
    let outside = "extends into the central directory";
    let mut local = [0; LOCAL_SIZE];
    if at + LOCAL_SIZE as u64 > limit {
        return Err(outside.into());
    }
    file.read_exact_at(&mut local, at)?;
    let name_length = usize::from(u16_at(&local, 26));
    let extra_length = usize::from(u16_at(&local, 28));
    let data = at + (LOCAL_SIZE + name_length + extra_length) as u64;
    let end = data + packed_size;
    if end > limit {
        return Err(outside.into());
    }
    let mut variable = vec![0; name_length + extra_length];
    file.read_exact_at(&mut variable, at + LOCAL_SIZE as u64)?;
    check_extra(&variable[name_length..])?;
    let differs = "the local header and the central directory differ";
    if u32_at(&local, 0) != LOCAL_MAGIC
        || u16_at(&local, 6) != flags
        || u16_at(&local, 8) != method
        || &variable[..name_length] != central.name
    {
        return Err(differs.into());
    }
    let sizes = [crc, packed, size as u32];
    let local_sizes = [14, 18, 22].map(|at| u32_at(&local, at));
    let mut end = end;
    if flags & FLAG_DESCRIPTOR == 0 {
        if local_sizes != sizes {
            return Err(differs.into());
        }
    } else {
        if local_sizes != [0; 3] && local_sizes != sizes {
            return Err(differs.into());
        }
        match descriptor(file, end, limit, sizes)? {
            Some(length) => end += length,
            None => return Err(differs.into()),
        }
    }
    let part = Part {
        name: name.into(),
        size,
        packed: packed_size,
        deflated: method == DEFLATED,
        crc,
        data,
    };
    Ok((part, end))
}

/// Length of the data descriptor at `at`; none unless it repeats `sizes`.
fn descriptor(file: &File, at: u64, limit: u64, sizes: [u32; 3]) -> io::Result<Option<u64>> {
    let available = limit.saturating_sub(at).min(16) as usize;
    let mut bytes = [0; 16];
    file.read_exact_at(&mut bytes[..available], at)?;
    let read = |from: usize| [from, from + 4, from + 8].map(|at| u32_at(&bytes, at));
    if available == 16 && u32_at(&bytes, 0) == DESCRIPTOR_MAGIC && read(4) == sizes {
        return Ok(Some(16));
    }
    Ok((available >= 12 && read(0) == sizes).then_some(12))
}

/// A part's name for messages, cut and on one line.
fn shown(name: &[u8]) -> String {
    let text = String::from_utf8_lossy(&name[..name.len().min(200)]);
    format!("part \"{}\"", text.escape_debug())
}

/// A range of a file.
struct Window<'a> {
    file: &'a File,
    at: u64,
    end: u64,
}

impl Read for Window<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = buffer.len().min((self.end - self.at) as usize);
        let read = self.file.read_at(&mut buffer[..length], self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}

enum Content<'a> {
    Stored(BufReader<Window<'a>>),
    Deflated(DeflateDecoder<BufReader<Window<'a>>>),
}

/// Unpacks a part and checks its declared size and checksum.
pub(super) struct PartReader<'a> {
    content: Content<'a>,
    crc: Crc,
    left: u64,
    expected: u32,
    packed: u64,
}

impl Read for PartReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        let bad = |what| io::Error::new(io::ErrorKind::InvalidData, what);
        let read = match &mut self.content {
            Content::Stored(content) => content.read(buffer)?,
            Content::Deflated(content) => content.read(buffer)?,
        };
        if read as u64 > self.left {
            return Err(bad("holds more bytes than it declares"));
        }
        self.left -= read as u64;
        self.crc.update(&buffer[..read]);
        if read == 0 {
            let consumed = match &self.content {
                Content::Stored(_) => self.packed,
                Content::Deflated(content) => content.total_in(),
            };
            if self.left > 0 {
                return Err(bad("holds fewer bytes than it declares"));
            }
            if consumed != self.packed {
                return Err(bad("holds data after the end of its content"));
            }
            if self.crc.sum() != self.expected {
                return Err(bad("the checksum is wrong"));
            }
        }
        Ok(read)
    }
}

//! What a part of an archive may be: its kind, its name and its extra fields
//! (`docs/packages.md` lists what is refused).

use super::payload::MAX_DEPTH;

/// Longest name of a part.
const MAX_PART_NAME: usize = 1024;

// APPNOTE.TXT 6.3.10, section 4.4.
pub(super) const STORED: u16 = 0;
pub(super) const DEFLATED: u16 = 8;
pub(super) const FLAG_DESCRIPTOR: u16 = 1 << 3;
pub(super) const FLAG_UTF8: u16 = 1 << 11;
/// Bits 1 and 2 are the compression level of the writer.
const FLAGS_ALLOWED: u16 = 0b110 | FLAG_DESCRIPTOR | FLAG_UTF8;

const EXTRA_ZIP64: u16 = 0x0001;
const EXTRA_UNICODE_PATH: u16 = 0x7075;
/// Extra fields that say nothing about name, size or kind of a part: times of NTFS and of
/// Info-ZIP, user and group of Info-ZIP.
const EXTRA_IGNORED: [u16; 3] = [0x000a, 0x5455, 0x7875];
/// Padding of Open Packaging writers: signature, length when written, zero bytes.
const EXTRA_PADDING: u16 = 0xa220;
const PADDING_SIGNATURE: [u8; 2] = 0xa028_u16.to_le_bytes();

pub(super) const ZIP64: &str = "ZIP64 is not supported";

/// Refuses every extra field but those known to be harmless: an unknown one may give a
/// part another name, size or kind in other readers.
pub(super) fn check_extra(mut extra: &[u8]) -> Result<(), String> {
    while !extra.is_empty() {
        let malformed = || "an extra field is malformed".to_owned();
        let (header, rest) = extra.split_at_checked(4).ok_or_else(malformed)?;
        let [id, length] = [0, 2].map(|at| u16::from_le_bytes([header[at], header[at + 1]]));
        let (data, rest) = rest.split_at_checked(length.into()).ok_or_else(malformed)?;
        match id {
            EXTRA_ZIP64 => return Err(ZIP64.into()),
            EXTRA_UNICODE_PATH => return Err("Unicode path fields are not supported".into()),
            EXTRA_PADDING if !is_padding(data) => return Err(malformed()),
            EXTRA_PADDING => {}
            _ if EXTRA_IGNORED.contains(&id) => {}
            _ => return Err(format!("the extra field {id:#06x} is not supported")),
        }
        extra = rest;
    }
    Ok(())
}

fn is_padding(data: &[u8]) -> bool {
    data.starts_with(&PADDING_SIGNATURE)
        && data.iter().skip(4).all(|byte| *byte == 0)
        && data.len() >= 4
}

/// Refuses everything but regular files, stored or deflated. The mode of Unix counts
/// whichever system the entry names as its maker, because readers differ in that.
pub(super) fn check_kind(attributes: u32, flags: u16, method: u16) -> Result<(), &'static str> {
    /// Volume label, directory, device and reparse point of MS-DOS and Windows.
    const NOT_REGULAR: u32 = 0x08 | 0x10 | 0x40 | 0x400;
    let kind = (attributes >> 16) & libc::S_IFMT;
    if kind == libc::S_IFLNK {
        return Err("symbolic links are not allowed in a package");
    }
    if kind != 0 && kind != libc::S_IFREG || attributes & NOT_REGULAR != 0 {
        return Err("only regular files are allowed in a package");
    }
    if flags & 1 != 0 {
        return Err("encrypted packages are not supported");
    }
    if flags & !FLAGS_ALLOWED != 0 {
        return Err("uses an unsupported ZIP feature");
    }
    if method != STORED && method != DEFLATED {
        return Err("uses an unsupported compression method");
    }
    Ok(())
}

/// Checks the name of a part, which must not leave its directory.
pub(super) fn part_name(name: &[u8], utf8: bool) -> Result<&str, String> {
    let name = std::str::from_utf8(name).map_err(|_| "the name is not UTF-8")?;
    if !utf8 && !name.is_ascii() {
        return Err("the name is not marked as UTF-8".into());
    }
    if name.is_empty() || name.len() > MAX_PART_NAME {
        return Err(format!("the name is not 1 to {MAX_PART_NAME} bytes long"));
    }
    if name.contains(|c: char| c.is_control() || c == '\\' || c == ':') {
        return Err("the name holds a control character, \"\\\" or \":\"".into());
    }
    if name.starts_with('/') {
        return Err("absolute names are not allowed".into());
    }
    if name.ends_with('/') {
        return Err("only regular files are allowed in a package".into());
    }
    if name.split('/').any(|piece| piece == "..") {
        return Err("names with \"..\" are not allowed".into());
    }
    if name
        .split('/')
        .any(|piece| piece.is_empty() || piece == ".")
    {
        return Err("the name has an empty or \".\" piece".into());
    }
    if name.split('/').count() > MAX_DEPTH {
        return Err(format!("the name has more than {MAX_DEPTH} pieces"));
    }
    Ok(name)
}

//! Reads malformed and hostile archives: each is refused with its own error.

use std::fs;
use std::io::{Cursor, Read, Write};
use std::path::Path;

use flate2::write::DeflateEncoder;
use flate2::{Compression, Crc};
use proptest::prelude::*;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use super::archive::{Archive, MAX_PARTS};
use super::archive_writer::ArchiveWriter;

/// One part, whose fields may contradict each other.
#[derive(Clone)]
struct Raw {
    name: Vec<u8>,
    local_name: Option<Vec<u8>>,
    made_by: u16,
    flags: u16,
    local_flags: Option<u16>,
    method: u16,
    crc: u32,
    size: u32,
    local_size: Option<u32>,
    packed: Option<u32>,
    attributes: u32,
    extra: Vec<u8>,
    offset: Option<u32>,
    data: Vec<u8>,
    after: Vec<u8>,
}

fn part(name: &str, content: &[u8]) -> Raw {
    let mut crc = Crc::new();
    crc.update(content);
    Raw {
        name: name.into(),
        local_name: None,
        made_by: (3 << 8) + 20,
        flags: 0,
        local_flags: None,
        method: 0,
        crc: crc.sum(),
        size: content.len() as u32,
        local_size: None,
        packed: None,
        attributes: 0o100_644 << 16,
        extra: Vec::new(),
        offset: None,
        data: content.to_vec(),
        after: Vec::new(),
    }
}

fn deflated(name: &str, content: &[u8]) -> Raw {
    let mut encoder = DeflateEncoder::new(Vec::new(), Compression::new(9));
    encoder.write_all(content).unwrap();
    Raw {
        method: 8,
        data: encoder.finish().unwrap(),
        ..part(name, content)
    }
}

/// The archive of `parts`, whose end record `end` changes.
fn archive_with(parts: &[Raw], end: impl Fn(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = Vec::new();
    let mut central = Vec::new();
    let put = |out: &mut Vec<u8>, values: &[u16]| {
        out.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    };
    for raw in parts {
        let offset = raw.offset.unwrap_or(out.len() as u32);
        let packed = raw.packed.unwrap_or(raw.data.len() as u32);
        let local_name = raw.local_name.as_ref().unwrap_or(&raw.name);
        out.extend(0x0403_4b50_u32.to_le_bytes());
        put(
            &mut out,
            &[20, raw.local_flags.unwrap_or(raw.flags), raw.method, 0, 33],
        );
        for value in [raw.crc, packed, raw.local_size.unwrap_or(raw.size)] {
            out.extend(value.to_le_bytes());
        }
        put(&mut out, &[local_name.len() as u16, raw.extra.len() as u16]);
        for bytes in [local_name, &raw.extra, &raw.data, &raw.after] {
            out.extend(bytes);
        }
        central.extend(0x0201_4b50_u32.to_le_bytes());
        put(
            &mut central,
            &[raw.made_by, 20, raw.flags, raw.method, 0, 33],
        );
        for value in [raw.crc, packed, raw.size] {
            central.extend(value.to_le_bytes());
        }
        put(
            &mut central,
            &[raw.name.len() as u16, raw.extra.len() as u16, 0, 0, 0],
        );
        central.extend(raw.attributes.to_le_bytes());
        central.extend(offset.to_le_bytes());
        central.extend(&raw.name);
        central.extend(&raw.extra);
    }
    let start = out.len() as u32;
    out.extend(&central);
    let mut record = 0x0605_4b50_u32.to_le_bytes().to_vec();
    put(&mut record, &[0, 0, parts.len() as u16, parts.len() as u16]);
    record.extend((central.len() as u32).to_le_bytes());
    record.extend(start.to_le_bytes());
    record.extend([0, 0]);
    end(&mut record);
    out.extend(record);
    out
}

fn archive(parts: &[Raw]) -> Vec<u8> {
    archive_with(parts, |_| ())
}

/// Opens `bytes` as an archive and reads every part to the end.
fn read_all(bytes: &[u8]) -> Result<Vec<(String, Vec<u8>)>, String> {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), bytes).unwrap();
    read_file(file.path())
}

fn read_file(path: &Path) -> Result<Vec<(String, Vec<u8>)>, String> {
    let archive = Archive::open(path).map_err(|error| error.what().to_owned())?;
    let mut contents = Vec::new();
    for part in archive.parts() {
        let mut content = Vec::new();
        archive
            .read(part)
            .read_to_end(&mut content)
            .map_err(|error| error.to_string())?;
        contents.push((part.name.to_string(), content));
    }
    Ok(contents)
}

fn refused(bytes: &[u8], why: &str) {
    match read_all(bytes) {
        Ok(parts) => panic!("accepted, expected {why}: {:?}", parts.len()),
        Err(what) => assert!(what.contains(why), "{what} should contain {why}"),
    }
}

#[test]
fn a_plain_archive_is_read() {
    let text = "abc".repeat(1000);
    let descriptor = |raw: &Raw, magic: bool| {
        let mut bytes = Vec::new();
        if magic {
            bytes.extend(0x0807_4b50_u32.to_le_bytes());
        }
        for value in [raw.crc, raw.data.len() as u32, raw.size] {
            bytes.extend(value.to_le_bytes());
        }
        bytes
    };
    let mut streamed = deflated("c", text.as_bytes());
    streamed.flags = 8;
    streamed.after = descriptor(&streamed, true);
    let mut bare = part("d", b"x");
    bare.flags = 8;
    bare.after = descriptor(&bare, false);
    let parts = [part("a/ä", b"one"), part("empty", b""), streamed, bare];
    let mut parts = parts.to_vec();
    parts[0].flags = 1 << 11;
    let read = read_all(&archive(&parts)).unwrap();
    let expected: [(&str, &[u8]); 4] = [
        ("a/ä", b"one"),
        ("empty", b""),
        ("c", text.as_bytes()),
        ("d", b"x"),
    ];
    assert_eq!(
        read,
        expected.map(|(name, content)| (name.to_owned(), content.to_vec()))
    );
    assert_eq!(read_all(&archive(&[])).unwrap(), []);
}

#[test]
fn part_names_that_leave_the_archive_are_refused() {
    for (name, why) in [
        ("../x", "names with \"..\" are not allowed"),
        ("a/../../x", "names with \"..\" are not allowed"),
        ("a/..", "names with \"..\" are not allowed"),
        ("/etc/passwd", "absolute names are not allowed"),
        ("//x", "absolute names"),
        ("C:/x", "control character, \"\\\" or \":\""),
        ("..\\x", "control character, \"\\\""),
        ("a\0b", "control character"),
        ("a\nb", "control character"),
        ("./x", "empty or \".\" piece"),
        ("a//b", "empty or \".\" piece"),
        ("", "not 1 to 1024 bytes"),
        ("dir/", "only regular files"),
        (&"d/".repeat(40), "only regular files"),
        (&format!("{}x", "d/".repeat(40)), "more than 32 pieces"),
        (&"n".repeat(1025), "not 1 to 1024 bytes"),
        ("ä", "not marked as UTF-8"),
    ] {
        refused(&archive(&[part("ok", b"1"), part(name, b"2")]), why);
    }
    let mut latin = part("x", b"");
    latin.name = vec![0xE4];
    refused(&archive(&[latin]), "not UTF-8");
    refused(
        &archive(&[part("a", b"1"), part("a", b"2")]),
        "duplicate part",
    );
    refused(
        &archive(&[part("a", b"1"), part("A", b"2")]),
        "duplicate part",
    );
}

#[test]
fn inconsistent_parts_are_refused() {
    type Lie = fn(&mut Raw);
    let lies: &[(Lie, &str)] = &[
        (|p| p.attributes = 0o120_777 << 16, "symbolic links"),
        (|p| p.attributes = 0o040_755 << 16, "only regular files"),
        (|p| p.attributes = 0o020_666 << 16, "only regular files"),
        // Whatever the part names as the system of its maker.
        (
            |p| (p.made_by, p.attributes) = (20, 0o120_777 << 16),
            "symbolic links",
        ),
        (
            |p| (p.made_by, p.attributes) = (19 << 8, 0o040_755 << 16),
            "only regular files",
        ),
        (|p| p.extra = vec![0x42, 0x42, 0, 0], "not supported"),
        (|p| p.attributes = 0x10, "only regular files"),
        (|p| p.flags = 1, "encrypted"),
        (|p| p.flags = 1 << 13, "unsupported ZIP feature"),
        (|p| p.method = 14, "unsupported compression method"),
        (|p| p.local_name = Some(b"z".to_vec()), "differ"),
        (|p| p.local_flags = Some(2), "differ"),
        (|p| p.local_size = Some(1), "differ"),
        (|p| p.flags = 8, "differ"),
        (|p| p.size -= 1, "two different sizes"),
        (|p| p.packed = Some(u32::MAX), "ZIP64"),
        (|p| p.extra = vec![1, 0, 0, 0], "ZIP64"),
        (|p| p.extra = vec![0x75, 0x70, 1, 0, 1], "Unicode path"),
        (
            |p| p.extra = vec![9, 9, 9, 0, 1],
            "extra field is malformed",
        ),
        (|p| p.extra = vec![9], "extra field is malformed"),
        (|p| p.crc ^= 1, "checksum is wrong"),
        (|p| p.offset = Some(0), "overlaps"),
        (|p| p.offset = Some(40), "belong to no part"),
        (|p| p.offset = Some(u32::MAX), "belong to no part"),
        (|p| p.after = b"hidden".to_vec(), "belong to no part"),
        (
            |p| {
                p.packed = Some(1 << 20);
                p.size = 1 << 20;
            },
            "central directory",
        ),
    ];
    for (lie, why) in lies {
        let mut parts = [part("first", b"1"), part("second", b"content")];
        lie(&mut parts[1]);
        refused(&archive(&parts), why);
    }
    // Deflated parts.
    let text = "abc".repeat(1000);
    let lies: &[(Lie, &str)] = &[
        (|p| p.size -= 1, "holds more bytes than it declares"),
        (|p| p.size += 1, "holds fewer bytes than it declares"),
        (|p| p.data.push(0), "after the end of its content"),
        (|p| p.data.truncate(5), ""),
        (|p| p.data[0] = 0xFF, ""),
    ];
    for (lie, why) in lies {
        let mut raw = deflated("text", text.as_bytes());
        lie(&mut raw);
        refused(&archive(&[raw]), why);
    }
}

#[test]
fn bytes_outside_of_parts_and_directory_are_refused() {
    let parts = [part("a", b"1"), part("b", b"2")];
    let good = archive(&parts);
    assert!(read_all(&good).is_ok());
    refused(&[&good[..], b"x"].concat(), "data after the end");
    refused(
        &[&good[..], &good[..]].concat(),
        "central directory does not end",
    );
    refused(
        &[b"x", &good[..]].concat(),
        "central directory does not end",
    );
    refused(&good[..good.len() - 1], "truncated");
    refused(&good[..good.len() - 22], "no ZIP end record");
    refused(b"", "too short");
    refused(&[0; 100], "no ZIP end record");
    let end = |at: usize, value: u8| archive_with(&parts, |record| record[at] = value);
    refused(&end(20, 1), "comment after the end");
    refused(&end(4, 1), "split ZIP archives");
    refused(&end(8, 1), "split ZIP archives");
    refused(
        &archive_with(&parts, |record| (record[8], record[10]) = (1, 1)),
        "counts 1 parts, the central directory 2",
    );
    refused(
        &archive_with(&parts, |record| record[16..20].fill(0xFF)),
        "ZIP64",
    );
    // A part that the central directory omits: other readers may find it.
    let both = archive(&parts);
    let central = both.len() - 22 - 47;
    let mut cut = both[..central - 47].to_vec();
    cut.extend(&both[central..]);
    let length = cut.len();
    let start = (central - 47) as u32;
    cut[length - 14..length - 10].copy_from_slice(&1_u16.to_le_bytes().repeat(2));
    cut[length - 10..length - 6].copy_from_slice(&47_u32.to_le_bytes());
    cut[length - 6..length - 2].copy_from_slice(&start.to_le_bytes());
    refused(&cut, "belong to no part");
}

#[test]
fn bombs_are_refused_before_they_are_unpacked() {
    let zeroes = vec![0; 32 << 20];
    refused(
        &archive(&[deflated("bomb", &zeroes)]),
        "more than 200 times",
    );
    // Declared as small: reading stops at the declared size.
    let mut bomb = deflated("bomb", &zeroes);
    bomb.size = 100;
    refused(
        &archive(&[bomb.clone()]),
        "holds more bytes than it declares",
    );
    // Parts that share one content.
    let copies: Vec<Raw> = (0..1000)
        .map(|i| Raw {
            offset: Some(0),
            ..part(&format!("p{i:04}"), &[0; 4096])
        })
        .collect();
    refused(&archive(&copies), "overlaps");
    // Each part is within the ratio; together they are too large.
    let large = Raw {
        size: 190 * 1_000_000,
        ..part("x", &vec![0; 1_000_000])
    };
    let many: Vec<Raw> = (0..12)
        .map(|i| Raw {
            name: format!("p{i:02}").into(),
            method: 8,
            ..large.clone()
        })
        .collect();
    refused(&archive(&many), "unpacks to more than 2147483648 bytes");
    let crowd: Vec<Raw> = (0..=MAX_PARTS)
        .map(|i| part(&format!("{i}"), b""))
        .collect();
    refused(&archive(&crowd), "more than 51000 parts");
}

#[test]
fn a_file_larger_than_a_package_is_refused_unread() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len((600 << 20) + 1).unwrap();
    let error = read_file(file.path()).unwrap_err();
    assert!(error.contains("larger than 629145600 bytes"), "{error}");
}

#[test]
fn reader_and_writer_agree_with_the_zip_crate() {
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Deflated);
    let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
    writer.start_file("a/b", options).unwrap();
    writer.write_all(b"hello").unwrap();
    let bytes = writer.finish().unwrap().into_inner();
    assert_eq!(
        read_all(&bytes).unwrap(),
        [("a/b".to_owned(), b"hello".to_vec())]
    );
    let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
    writer
        .add_symlink("link", "../../etc/passwd", options)
        .unwrap();
    refused(&writer.finish().unwrap().into_inner(), "symbolic links");

    let contents: [(&str, Vec<u8>); 4] = [
        ("text", b"abc".repeat(1000)),
        ("none", Vec::new()),
        ("zeroes, which are stored", vec![0; 1 << 20]),
        ("päth/x", (0..=255).collect()),
    ];
    let out = tempfile::NamedTempFile::new().unwrap();
    let mut writer = ArchiveWriter::new(out.reopen().unwrap(), (33, 0));
    for (name, content) in &contents {
        writer.add(name, || Ok(content.as_slice())).unwrap();
    }
    let length = writer.finish().unwrap().metadata().unwrap().len();
    assert!(length > 1 << 20 && length < (1 << 20) + 2000, "{length}");
    let mut other = zip::ZipArchive::new(out.reopen().unwrap()).unwrap();
    assert_eq!(other.len(), contents.len());
    for (name, content) in &contents {
        let mut part = other.by_name(name).unwrap();
        assert_eq!(part.unix_mode(), Some(0o100_644));
        let mut read = Vec::new();
        part.read_to_end(&mut read).unwrap();
        assert_eq!(&read, content);
    }
    let ours = read_file(out.path()).unwrap();
    assert_eq!(
        ours,
        contents.map(|(name, content)| (name.to_owned(), content))
    );
}

proptest! {
    #![proptest_config(crate::property::cases(2000))]

    /// Reading ends without a panic.
    #[test]
    fn damaged_archives_never_make_the_reader_panic(
        noise in proptest::collection::vec(any::<u8>(), 0..60),
        at in any::<prop::sample::Index>(),
        replace in any::<bool>(),
    ) {
        let _ = read_all(&noise);
        let mut streamed = deflated("c", &b"abc".repeat(100));
        streamed.flags = 8;
        streamed.after = vec![0; 16];
        let mut bytes = archive(&[part("a", b"one"), deflated("b", &b"xyz".repeat(50)), streamed]);
        let at = at.index(bytes.len());
        let end = if replace { (at + noise.len()).min(bytes.len()) } else { at };
        bytes.splice(at..end, noise);
        let _ = read_all(&bytes);
    }
}

#[test]
fn a_central_directory_of_over_16_mib_is_not_read() {
    let directory = vec![0; (16 << 20) + 1];
    let size = u32::try_from(directory.len()).unwrap();
    // One part, in a directory that begins the file.
    let [count, none] = [1_u16, 0].map(u16::to_le_bytes);
    let end = [
        &b"PK\x05\x06"[..],
        &[0; 4],
        &count,
        &count,
        &size.to_le_bytes(),
        &[0; 4],
        &none,
    ];
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), [directory, end.concat()].concat()).unwrap();
    let error = Archive::open(file.path()).unwrap_err();
    let expected = "the central directory is larger than 16777216 bytes";
    assert!(error.what().contains(expected), "{error}");
}

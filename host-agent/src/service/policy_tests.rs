//! The table of `docs/packages.md`: each line is a case here.

use std::fs;
use std::path::Path;

use super::archive::Archive;
use super::archive_policy::{check_extra, check_kind};
use super::load_tests::service_directory;
use super::package_tests::{load_parts, parts};
use super::{load, pack};
use crate::progress::Progress;

#[test]
fn only_regular_files_are_parts_whoever_made_them() {
    let kind = |attributes| check_kind(attributes, 0, 8);
    // Neither a mode nor attributes; -rw-r--r--; read-only and archived file of Windows.
    for regular in [0, 0o100_644 << 16, 0o100_644 << 16 | 0x20, 0x21, 0x80] {
        kind(regular).unwrap();
    }
    assert!(kind(0o120_777 << 16).unwrap_err().contains("symbolic"));
    for mode in [0o010_644, 0o020_666, 0o040_755, 0o060_660, 0o140_777] {
        assert!(kind(mode << 16).unwrap_err().contains("only regular"));
    }
    // Volume label, directory, device, reparse point.
    for attribute in [0x08, 0x10, 0x40, 0x400] {
        assert!(kind(attribute).unwrap_err().contains("only regular"));
    }
}

#[test]
fn only_extra_fields_without_effect_are_accepted() {
    let field = |id: u16, data: &[u8]| {
        let mut field = id.to_le_bytes().to_vec();
        field.extend((data.len() as u16).to_le_bytes());
        field.extend(data);
        field
    };
    for (id, data) in [
        (0x000a, &[0; 32][..]),
        (0x5455, &[3, 0, 0, 0, 0]),
        (0x7875, &[1, 0]),
        (0xa220, &[0x28, 0xa0, 9, 0, 0, 0]),
    ] {
        check_extra(&[field(id, data), field(id, data)].concat()).unwrap();
    }
    for (id, data, why) in [
        (0x0001, &[0; 16][..], "ZIP64"),
        (0x7075, &[1], "Unicode path"),
        // PKWARE Unix and ASi Unix can hold the target of a link, 0x6375 a comment.
        (0x000d, &[0; 12], "0x000d is not supported"),
        (0x756e, &[0; 14], "0x756e is not supported"),
        (0x6375, &[1], "0x6375 is not supported"),
        (0x4242, &[], "0x4242 is not supported"),
        // Padding that hides something.
        (0xa220, &[0x28, 0xa0, 0, 0, 1], "malformed"),
        (0xa220, &[0, 0, 0, 0], "malformed"),
        (0xa220, &[0x28, 0xa0], "malformed"),
    ] {
        let harmless = field(0x5455, &[0]);
        let error = check_extra(&[harmless, field(id, data)].concat()).unwrap_err();
        assert!(error.contains(why), "{error}");
    }
    for cut in 1..8 {
        assert!(check_extra(&field(0x5455, &[1, 2, 3, 4])[..cut]).is_err());
    }
}

#[test]
fn a_comment_of_a_part_is_refused() {
    let directory = service_directory();
    let file = directory.path().join("a.cspkg");
    pack(directory.path(), &file, &Progress::default()).unwrap();
    let mut bytes = fs::read(&file).unwrap();
    let first = bytes.windows(4).position(|four| four == b"PK\x01\x02");
    let first = first.unwrap();
    // The comment follows the name; the directory grows by a byte.
    let name = usize::from(bytes[first + 28]);
    bytes[first + 32] = 1;
    bytes.insert(first + 46 + name, b'x');
    let end = bytes.len() - 22;
    let size = u32::from_le_bytes(bytes[end + 12..end + 16].try_into().unwrap());
    bytes[end + 12..end + 16].copy_from_slice(&(size + 1).to_le_bytes());
    fs::write(&file, bytes).unwrap();
    let error = Archive::open(&file).unwrap_err();
    let expected = "part \"[Content_Types].xml\": has a comment";
    assert!(error.what().contains(expected), "{error}");
}

/// Loads the redis package with `old` replaced by `new` in part number `index`.
fn changed(index: usize, old: &str, new: &str) -> Result<(), String> {
    let mut parts = parts();
    let text = String::from_utf8(parts[index].1.clone()).unwrap();
    assert!(text.contains(old), "{old}");
    parts[index].1 = text.replacen(old, new, 1).into_bytes();
    match load_parts(&parts) {
        Ok(_) => Ok(()),
        Err(error) => Err(error.to_string()),
    }
}

const RELATIONSHIPS: usize = 1;
const MANIFEST: usize = 2;

#[test]
fn the_target_mode_is_internal_or_external() {
    let mode = |mode: &str| changed(RELATIONSHIPS, "Target=", &format!("{mode} Target="));
    mode("").unwrap();
    mode("TargetMode=\"Internal\"").unwrap();
    mode("TargetMode=\"External\"").unwrap();
    let error = mode("TargetMode=\"Outside\"").unwrap_err();
    assert!(error.contains("unknown TargetMode=\"Outside\""), "{error}");
    // No second relationship, whatever its mode.
    let second = "<Relationship Type=\"urn:x\" Target=\"http://example.org/\" \
                  TargetMode=\"External\" Id=\"R2\"/></Relationships>";
    let error = changed(RELATIONSHIPS, "</Relationships>", second).unwrap_err();
    assert!(error.contains("unknown relationship"), "{error}");
}

#[test]
fn a_second_byte_order_mark_is_refused() {
    for index in 0..3 {
        changed(index, "<", "\u{feff}<").unwrap();
        let error = changed(index, "<", "\u{feff}\u{feff}<").unwrap_err();
        assert!(error.contains("second byte order mark"), "{index}: {error}");
    }
    // A definition that is not in a package is read by other code.
    let directory = service_directory();
    let file = directory.path().join("ServiceDefinition.csdef");
    let definition = fs::read_to_string(&file).unwrap();
    let with = |marks: &str| {
        fs::write(&file, format!("{marks}{definition}")).unwrap();
        load(directory.path(), None, &Progress::default()).map(|_| ())
    };
    with("\u{feff}").unwrap();
    let error = with("\u{feff}\u{feff}").unwrap_err();
    assert_eq!(error.what(), "second byte order mark");
}

#[test]
fn only_utf8_is_declared_as_the_encoding() {
    for index in 0..3 {
        let declared = |new: &str| changed(index, "encoding=\"utf-8\"", new);
        for right in [
            "",
            "encoding = 'UTF-8'",
            "encoding=\"Utf-8\" standalone='yes'",
        ] {
            declared(right).unwrap();
        }
        for wrong in ["utf-16", "iso-8859-1", "", "utf8", "windows-1252"] {
            let error = declared(&format!("encoding=\"{wrong}\"")).unwrap_err();
            let expected = format!("declares the encoding \"{wrong}\", but is UTF-8");
            assert!(error.contains(&expected), "{index}: {error}");
        }
    }
    // The parser takes this for a processing instruction.
    let instruction = "<?xml\tversion='1.0' encoding='latin1'?>";
    let error = changed(
        MANIFEST,
        "<?xml version=\"1.0\" encoding=\"utf-8\"?>",
        instruction,
    );
    assert!(error.unwrap_err().contains("declares the encoding"));
}

#[test]
fn names_that_differ_only_in_case_are_refused() {
    // Parts, also outside ASCII.
    for (one, other) in [("x/a", "X/a"), ("x/ä", "x/Ä")] {
        let mut parts = parts();
        parts.extend([(one.to_owned(), vec![]), (other.to_owned(), vec![])]);
        let error = load_parts(&parts).unwrap_err();
        let expected = format!("duplicate part \"{other}\"");
        assert!(error.what().contains(&expected), "{error}");
    }
    // Contents and files of the manifest.
    let original = String::from_utf8(parts()[MANIFEST].1.clone()).unwrap();
    let element = |name: &str| {
        let (start, end) = (format!("<{name}>"), format!("</{name}>"));
        let at = original.find(&start).unwrap();
        original[at..original.find(&end).unwrap() + end.len()].to_owned()
    };
    let content = element("ContentDefinition");
    let twice = content.replacen("<Name>Service", "<Name>SERVICE", 1);
    let error = changed(MANIFEST, &content, &format!("{content}{twice}")).unwrap_err();
    assert!(
        error.contains("differs from another only in case"),
        "{error}"
    );
    let file = element("FileDefinition");
    for (other, why) in [
        ("RUN.SH", "\"run.sh\" differ only in case"),
        ("RUN.SH\\x", "\"run.sh\" is a file and a directory"),
    ] {
        let twice = file.replace("run.sh", other);
        let error = changed(MANIFEST, &file, &format!("{file}{twice}")).unwrap_err();
        assert!(error.contains(why), "{error}");
    }
}

/// A service must be the same packed and not.
#[test]
fn a_directory_with_two_cases_of_a_name_is_not_packed() {
    let directory = service_directory();
    fs::write(directory.path().join("Cart/DATA"), "").unwrap();
    let out = tempfile::tempdir().unwrap();
    let out = out.path().join("a.cspkg");
    let packed = pack(directory.path(), &out, &Progress::default()).unwrap_err();
    let loaded = load(directory.path(), None, &Progress::default()).unwrap_err();
    for error in [packed, loaded] {
        assert!(
            error
                .to_string()
                .contains("/Cart: \"DATA\" and \"data\" differ"),
            "{error}"
        );
        assert!(error.hint().unwrap().contains("rename one"));
    }
    assert!(!Path::new(&out).exists());
}

//! Malicious packages: each is refused with one error that names the file and a
//! remedy, and nothing is left behind.

use std::fs;
use std::io::{Cursor, Read, Write};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use e2e::service::Service;
use e2e::{Sandbox, text};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

/// Names and contents of the parts of a package.
type Parts = Vec<(String, Vec<u8>)>;

const MANIFEST: &str = "package.xml";

fn unpack(package: &[u8]) -> Result<Parts> {
    let mut archive = ZipArchive::new(Cursor::new(package))?;
    let mut parts = Vec::new();
    for index in 0..archive.len() {
        let mut part = archive.by_index(index)?;
        let name = part.name()?.into_owned();
        let mut content = Vec::new();
        part.read_to_end(&mut content)?;
        parts.push((name, content));
    }
    Ok(parts)
}

fn pack(parts: &Parts, method: CompressionMethod) -> Result<Vec<u8>> {
    let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
    let options = SimpleFileOptions::default().compression_method(method);
    for (name, content) in parts {
        writer.start_file(name.as_str(), options)?;
        writer.write_all(content)?;
    }
    Ok(writer.finish()?.into_inner())
}

/// `bytes` with every `from` replaced by `to` of the same length.
fn patched(mut bytes: Vec<u8>, from: &[u8], to: &[u8]) -> Result<Vec<u8>> {
    ensure!(from.len() == to.len());
    let mut count = 0;
    for at in 0..=bytes.len() - from.len() {
        if &bytes[at..at + from.len()] == from {
            bytes[at..at + to.len()].copy_from_slice(to);
            count += 1;
        }
    }
    ensure!(count > 0, "no {} found", String::from_utf8_lossy(from));
    Ok(bytes)
}

/// The package with a part named `name` added, even if a ZIP writer refuses the name.
fn with_part(parts: &Parts, name: &str) -> Result<Vec<u8>> {
    let placeholder = "~".repeat(name.len());
    let mut parts = parts.clone();
    parts.push((placeholder.clone(), b"root::0:0::/:/bin/sh\n".to_vec()));
    let bytes = pack(&parts, CompressionMethod::Stored)?;
    patched(bytes, placeholder.as_bytes(), name.as_bytes())
}

fn with_link(parts: &Parts) -> Result<Vec<u8>> {
    let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    for (name, content) in parts {
        writer.start_file(name.as_str(), options)?;
        writer.write_all(content)?;
    }
    writer.add_symlink("LocalContent/link", "/etc/passwd", options)?;
    Ok(writer.finish()?.into_inner())
}

/// The package with its manifest changed.
fn with_manifest(parts: &Parts, change: impl Fn(&str) -> String) -> Result<Vec<u8>> {
    let mut parts = parts.clone();
    for (name, content) in &mut parts {
        if name == MANIFEST {
            let before = std::str::from_utf8(content)?.to_owned();
            let after = change(&before);
            ensure!(before != after, "nothing changed in {before}");
            *content = after.into_bytes();
        }
    }
    pack(&parts, CompressionMethod::Deflated)
}

/// The package in which both headers of the manifest declare `more` bytes more than it
/// has.
fn with_false_size(parts: &Parts, more: i64) -> Result<Vec<u8>> {
    // Offsets of the uncompressed size and of the name (APPNOTE.TXT, 4.3.7 and 4.3.12).
    let mut bytes = pack(parts, CompressionMethod::Deflated)?;
    for (magic, size_at, name_at) in [(b"PK\x03\x04", 22, 30), (b"PK\x01\x02", 24, 46)] {
        let at = (0..bytes.len() - 4)
            .find(|at| {
                bytes[*at..].starts_with(magic)
                    && bytes
                        .get(at + name_at..)
                        .is_some_and(|rest| rest.starts_with(MANIFEST.as_bytes()))
            })
            .context("the manifest's header")?
            + size_at;
        let field: [u8; 4] = bytes[at..at + 4].try_into()?;
        let lie = u32::try_from(i64::from(u32::from_le_bytes(field)) + more)?;
        bytes[at..at + 4].copy_from_slice(&lie.to_le_bytes());
    }
    Ok(bytes)
}

/// `text` with the part between the first `from` and the next `to` replaced.
fn replace_between(text: &str, from: &str, to: &str, new: &str) -> String {
    let start = text.find(from).map_or(0, |at| at + from.len());
    let end = text[start..].find(to).map_or(start, |at| start + at);
    format!("{}{new}{}", &text[..start], &text[end..])
}

/// `text` with the part from the first `from` to the next `to` repeated.
fn repeat_element(text: &str, from: &str, to: &str) -> String {
    let start = text.find(from).unwrap_or(0);
    let end = text[start..]
        .find(to)
        .map_or(start, |at| start + at + to.len());
    let piece = &text[start..end];
    text.replacen(piece, &piece.repeat(2), 1)
}

fn cases(parts: &Parts) -> Result<Vec<(&'static str, Vec<u8>, &'static str)>> {
    let good = pack(parts, CompressionMethod::Deflated)?;
    let mut bomb = parts.clone();
    bomb.push(("LocalContent/bomb".into(), vec![0; 64 << 20]));
    let file_path = |new: &'static str| {
        with_manifest(parts, |text| {
            replace_between(text, "<FilePath>", "</FilePath>", new)
        })
    };
    Ok(vec![
        ("parent", with_part(parts, "../../etc/passwd")?, "\"..\""),
        ("absolute", with_part(parts, "/etc/passwd")?, "absolute"),
        ("drive", with_part(parts, "c:/passwd")?, "\":\""),
        ("backslash", with_part(parts, "..\\passwd")?, "\"\\\""),
        ("empty-component", with_part(parts, "a//b")?, "empty"),
        ("twice", with_part(parts, MANIFEST)?, "duplicate part"),
        (
            "twice-case",
            with_part(parts, "PACKAGE.XML")?,
            "duplicate part",
        ),
        ("link", with_link(parts)?, "symbolic link"),
        (
            "not-named",
            with_part(parts, "LocalContent/extra")?,
            "not in the manifest",
        ),
        (
            "bomb",
            pack(&bomb, CompressionMethod::Deflated)?,
            "200 times",
        ),
        (
            "too-long",
            with_false_size(parts, -7)?,
            "more bytes than it declares",
        ),
        (
            "too-short",
            with_false_size(parts, 7)?,
            "fewer bytes than it declares",
        ),
        ("cut", good[..good.len() / 2].to_vec(), "no ZIP end record"),
        ("trailing", [&good[..], b"x"].concat(), "after the end"),
        (
            "text",
            b"not a package at all, only some text".to_vec(),
            "not a package",
        ),
        ("empty", Vec::new(), "too short"),
        (
            "file-parent",
            file_path("\\approot\\..\\..\\passwd")?,
            "\"..\"",
        ),
        ("file-absolute", file_path("/etc/passwd")?, "not below"),
        ("file-drive", file_path("C:\\passwd")?, "not below"),
        (
            "file-twice",
            with_manifest(parts, |text| {
                repeat_element(text, "<FileDefinition>", "</FileDefinition>")
            })?,
            "duplicate file",
        ),
        (
            "content-twice",
            with_manifest(parts, |text| {
                repeat_element(text, "<ContentDefinition>", "</ContentDefinition>")
            })?,
            "duplicate content",
        ),
        (
            "length",
            with_manifest(parts, |text| {
                replace_between(text, "<LengthInBytes>", "</LengthInBytes>", "1")
            })?,
            "LengthInBytes",
        ),
        (
            "hash",
            with_manifest(parts, |text| {
                let zeros = format!("{}=", "A".repeat(43));
                replace_between(
                    text,
                    "<IntegrityCheckHash>",
                    "</IntegrityCheckHash>",
                    &zeros,
                )
            })?,
            "damaged",
        ),
        (
            "entities",
            with_manifest(parts, |text| {
                text.replacen(
                    "<PackageDefinition",
                    "<!DOCTYPE a [<!ENTITY b \"c\">]><PackageDefinition",
                    1,
                )
            })?,
            "DTD",
        ),
    ])
}

#[test]
fn malicious_packages_are_refused_and_leave_nothing() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let service = Service::idle().write(&sandbox.file("service"))?;
    fs::write(service.join("Role/data"), "some data ".repeat(1000))?;
    let config = service.join("ServiceConfiguration.cscfg");
    let config = config.to_string_lossy();
    let good = sandbox.file("good.cspkg");
    let output = sandbox.output(&[
        "pack",
        &service.to_string_lossy(),
        "-o",
        &good.to_string_lossy(),
    ])?;
    ensure!(output.status.success(), "{}", text(&output));
    let parts = unpack(&fs::read(&good)?)?;
    let again = sandbox.file("again.cspkg");
    fs::write(&again, pack(&parts, CompressionMethod::Deflated)?)?;
    let output = sandbox.output(&[
        "validate",
        &good.to_string_lossy(),
        &again.to_string_lossy(),
    ])?;
    ensure!(output.status.success(), "{}", text(&output));

    let before = everything(&sandbox)?;
    for (name, bytes, words) in cases(&parts)? {
        let bad = sandbox.file(&format!("{name}.cspkg"));
        fs::write(&bad, bytes)?;
        let bad = bad.to_string_lossy().into_owned();
        for arguments in [
            &["validate", &bad][..],
            &["test", &bad, "--config", &config],
            &["run", &bad, "--config", &config],
        ] {
            let output = sandbox.output(arguments)?;
            let printed = text(&output);
            let error = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.code() == Some(3), "{name}: {printed}");
            ensure!(error.matches("error[").count() == 1, "{name}: {printed}");
            ensure!(
                error.contains(&bad) && error.contains(words),
                "{name}: {printed}"
            );
            ensure!(
                error.contains("\n  hint "),
                "{name} has no remedy: {printed}"
            );
            ensure!(!error.contains("panicked"), "{name}: {printed}");
        }
        fs::remove_file(bad)?;
        ensure!(everything(&sandbox)? == before, "{name} left something");
    }
    sandbox.assert_nothing_left()
}

/// The files of the sandbox, and the number of temporary files of `pack`.
fn everything(sandbox: &Sandbox) -> Result<(Vec<(std::path::PathBuf, u64)>, usize)> {
    let own = e2e::files(&sandbox.file(""))?;
    let temporary = fs::read_dir(std::env::temp_dir())?
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(".pack-"))
        .count();
    Ok((own, temporary))
}

#[test]
fn a_link_in_a_service_directory_is_refused_by_its_path() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let service = Service::idle().write(&sandbox.file("service"))?;
    std::os::unix::fs::symlink("/etc/passwd", service.join("Role/users"))?;
    let package = sandbox.file("a.cspkg");
    let service = service.to_string_lossy();
    for arguments in [
        &["validate", &service][..],
        &["test", &service],
        &["pack", &service, "-o", &package.to_string_lossy()],
    ] {
        let output = sandbox.output(arguments)?;
        let printed = text(&output);
        ensure!(output.status.code() == Some(3), "{printed}");
        for wanted in ["Role/users", "symbolic link", "  hint "] {
            ensure!(printed.contains(wanted), "`{wanted}` is not in: {printed}");
        }
    }
    ensure!(!Path::new(&package).exists());
    sandbox.assert_nothing_left()
}

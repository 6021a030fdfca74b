//! Packages made to harm: each is refused with one error that names the file
//! and the way out, and nothing is left behind.

use std::fs;
use std::io::{Cursor, Read, Write};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use e2e::service::Service;
use e2e::{Place, text};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

/// The parts of a package.
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
    ensure!(count > 0, "{} is not there", String::from_utf8_lossy(from));
    Ok(bytes)
}

/// The package with one more part, whose name is written as `name`.
fn with_part(parts: &Parts, name: &str) -> Result<Vec<u8>> {
    let stand_in = "~".repeat(name.len());
    let mut parts = parts.clone();
    parts.push((stand_in.clone(), b"root::0:0::/:/bin/sh\n".to_vec()));
    let bytes = pack(&parts, CompressionMethod::Stored)?;
    patched(bytes, stand_in.as_bytes(), name.as_bytes())
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

/// The package in which one part declares `more` bytes more than it holds, in
/// both of its headers.
fn with_false_size(parts: &Parts, more: i64) -> Result<Vec<u8>> {
    // Local header: the size is 8 bytes before the name; central: 22.
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

/// `text` with what stands between the first `from` and the next `to`
/// replaced.
fn between(text: &str, from: &str, to: &str, new: &str) -> String {
    let start = text.find(from).map_or(0, |at| at + from.len());
    let end = text[start..].find(to).map_or(start, |at| start + at);
    format!("{}{new}{}", &text[..start], &text[end..])
}

fn once_more(text: &str, from: &str, to: &str) -> String {
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
            between(text, "<FilePath>", "</FilePath>", new)
        })
    };
    Ok(vec![
        ("parent", with_part(parts, "../../etc/passwd")?, "\"..\""),
        ("absolute", with_part(parts, "/etc/passwd")?, "absolute"),
        ("drive", with_part(parts, "c:/passwd")?, "\":\""),
        ("backslash", with_part(parts, "..\\passwd")?, "\"\\\""),
        ("empty-piece", with_part(parts, "a//b")?, "empty"),
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
                once_more(text, "<FileDefinition>", "</FileDefinition>")
            })?,
            "duplicate file",
        ),
        (
            "content-twice",
            with_manifest(parts, |text| {
                once_more(text, "<ContentDefinition>", "</ContentDefinition>")
            })?,
            "duplicate content",
        ),
        (
            "length",
            with_manifest(parts, |text| {
                between(text, "<LengthInBytes>", "</LengthInBytes>", "1")
            })?,
            "LengthInBytes",
        ),
        (
            "hash",
            with_manifest(parts, |text| {
                let zeros = format!("{}=", "A".repeat(43));
                between(
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
fn a_package_with_names_links_or_sizes_that_lie_is_refused_and_leaves_nothing() -> Result<()> {
    let place = Place::new()?;
    let service =
        Service::script("#!/bin/sh\nexec sleep 100000\n").write(&place.file("service"))?;
    fs::write(service.join("Role/data"), "some data ".repeat(1000))?;
    let config = service.join("ServiceConfiguration.cscfg");
    let config = config.to_string_lossy();
    let good = place.file("good.cspkg");
    let output = place.output(&[
        "pack",
        &service.to_string_lossy(),
        "-o",
        &good.to_string_lossy(),
    ])?;
    ensure!(output.status.success(), "{}", text(&output));
    let parts = unpack(&fs::read(&good)?)?;
    let again = place.file("again.cspkg");
    fs::write(&again, pack(&parts, CompressionMethod::Deflated)?)?;
    let output = place.output(&[
        "validate",
        &good.to_string_lossy(),
        &again.to_string_lossy(),
    ])?;
    ensure!(output.status.success(), "{}", text(&output));

    let before = everything(&place)?;
    for (name, bytes, words) in cases(&parts)? {
        let bad = place.file(&format!("{name}.cspkg"));
        fs::write(&bad, bytes)?;
        let bad = bad.to_string_lossy().into_owned();
        for arguments in [
            &["validate", &bad][..],
            &["test", &bad, "--config", &config],
            &["run", &bad, "--config", &config],
        ] {
            let output = place.output(arguments)?;
            let said = text(&output);
            let error = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.code() == Some(3), "{name}: {said}");
            ensure!(error.matches("error[").count() == 1, "{name}: {said}");
            ensure!(
                error.contains(&bad) && error.contains(words),
                "{name}: {said}"
            );
            ensure!(error.contains("\n  hint "), "{name} has no remedy: {said}");
            ensure!(!error.contains("panicked"), "{name}: {said}");
        }
        fs::remove_file(bad)?;
        ensure!(everything(&place)? == before, "{name} left something");
    }
    place.assert_nothing_left()
}

/// Files of the test's directory and temporary files of ours.
fn everything(place: &Place) -> Result<(Vec<(std::path::PathBuf, u64)>, usize)> {
    let own = e2e::files(&place.file(""))?;
    let temporary = fs::read_dir(std::env::temp_dir())?
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(".pack-"))
        .count();
    Ok((own, temporary))
}

#[test]
fn a_link_in_a_service_directory_is_refused_by_its_path() -> Result<()> {
    let place = Place::new()?;
    let service =
        Service::script("#!/bin/sh\nexec sleep 100000\n").write(&place.file("service"))?;
    std::os::unix::fs::symlink("/etc/passwd", service.join("Role/users"))?;
    let package = place.file("a.cspkg");
    let service = service.to_string_lossy();
    for arguments in [
        &["validate", &service][..],
        &["test", &service],
        &["pack", &service, "-o", &package.to_string_lossy()],
    ] {
        let output = place.output(arguments)?;
        let said = text(&output);
        ensure!(output.status.code() == Some(3), "{said}");
        for wanted in ["Role/users", "symbolic link", "  hint "] {
            ensure!(said.contains(wanted), "`{wanted}` is not in: {said}");
        }
    }
    ensure!(!Path::new(&package).exists());
    place.assert_nothing_left()
}

//! Packs services and reads packages, valid, damaged and hostile.

use std::fs;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::archive::Archive;
use super::archive_writer::ArchiveWriter;
use super::load_tests::service_directory;
use super::model::{Payload, ServiceModel};
use super::package::EXECUTABLE_KEY;
use super::{Blame, SAMPLE, ServiceError, Validated, build_application_image, load, pack};
use crate::progress::Progress;

fn validate(path: &Path, progress: &Progress) -> Result<Validated, ServiceError> {
    super::validate(path, None, progress)
}

fn image(model: &ServiceModel, role: usize) -> Vec<u8> {
    let out = tempfile::NamedTempFile::new().unwrap();
    build_application_image(&model.roles[role], out.as_file(), &Progress::default()).unwrap();
    fs::read(out.path()).unwrap()
}

#[test]
fn a_packed_service_is_the_same_as_its_directory() {
    let directory = service_directory();
    let out = tempfile::tempdir().unwrap();
    let file = out.path().join("shop.cspkg");
    let packed = pack(directory.path(), &file, &Progress::default()).unwrap();
    assert_eq!(
        (packed.service.as_str(), packed.roles, packed.files),
        ("Shop", 2, 6)
    );
    assert_eq!(packed.bytes, fs::metadata(&file).unwrap().len());
    assert_eq!(
        fs::read_dir(out.path()).unwrap().count(),
        1,
        "nothing is left beside it"
    );

    let config = directory.path().join("ServiceConfiguration.cscfg");
    let original = load(directory.path(), None, &Progress::default()).unwrap();
    let mut read = load(&file, Some(&config), &Progress::default()).unwrap();
    // The package that was checked is used for every role, whatever has its name now.
    fs::rename(&file, out.path().join("renamed")).unwrap();
    fs::write(&file, "another file").unwrap();
    for (index, role) in original.roles.iter().enumerate() {
        assert!(
            image(&original, index) == image(&read, index),
            "{}",
            role.definition.name
        );
        let Payload::Package { role: layout, .. } = &read.roles[index].payload else {
            panic!("{:?}", read.roles[index].payload);
        };
        assert_eq!(*layout, role.definition.name);
        read.roles[index].payload = role.payload.clone();
        // The definition in the package has another file name and the same lines.
        for (read, original) in
            std::iter::zip(&mut read.roles[index].public_ports, &role.public_ports)
        {
            assert_eq!(read.place.position, original.place.position);
            assert!(read.place.file.starts_with(&file));
            read.place.clone_from(&original.place);
        }
    }
    assert_eq!(read, original);
    fs::rename(out.path().join("renamed"), &file).unwrap();

    // The configuration is found if it is next to the package.
    let error = load(&file, None, &Progress::default()).unwrap_err();
    assert!(error.hint().unwrap().contains("--config"), "{error}");
    assert_eq!(
        validate(&file, &Progress::default()).unwrap(),
        Validated::Package
    );
    fs::copy(&config, out.path().join("any.cscfg")).unwrap();
    load(&file, None, &Progress::default()).unwrap();
    assert_eq!(
        validate(&file, &Progress::default()).unwrap(),
        Validated::PackagedService
    );
    // The definition of a configuration may be in the package next to it.
    let beside = out.path().join("any.cscfg");
    assert_eq!(
        validate(&beside, &Progress::default()).unwrap(),
        Validated::Configuration
    );
    // With two configurations none is chosen, and the package is still valid.
    fs::write(out.path().join("other.cscfg"), "<other/>").unwrap();
    assert_eq!(
        validate(&file, &Progress::default()).unwrap(),
        Validated::Package
    );
    let chosen =
        |path: &Path, config: &Path| super::validate(path, Some(config), &Progress::default());
    assert_eq!(chosen(&file, &beside).unwrap(), Validated::PackagedService);
    let other = chosen(&file, &out.path().join("other.cscfg")).unwrap_err();
    assert!(other.to_string().contains("other.cscfg:1:1"), "{other}");
    fs::write(directory.path().join("other.cscfg"), "").unwrap();
    fs::rename(&config, directory.path().join("mine.cscfg")).unwrap();
    let error = validate(directory.path(), &Progress::default()).unwrap_err();
    assert!(error.hint().unwrap().contains("--config"), "{error}");
    assert_eq!(
        chosen(directory.path(), &beside).unwrap(),
        Validated::Service
    );
    let definition = directory.path().join("ServiceDefinition.csdef");
    assert_eq!(
        chosen(&definition, &beside).unwrap(),
        Validated::Configuration
    );
    assert!(chosen(&beside, &beside).is_err());
    fs::rename(directory.path().join("mine.cscfg"), &config).unwrap();
    assert_eq!(
        validate(directory.path(), &Progress::default()).unwrap(),
        Validated::Service
    );
    assert_eq!(
        validate(&config, &Progress::default()).unwrap(),
        Validated::Configuration
    );
    assert_eq!(
        validate(&definition, &Progress::default()).unwrap(),
        Validated::Definition
    );
    assert!(validate(&directory.path().join("Cart/data"), &Progress::default()).is_err());
}

#[test]
fn packing_is_reproducible_and_stores_each_content_once() {
    let out = tempfile::tempdir().unwrap();
    let packed = |name: &str| {
        let directory = service_directory();
        let file = out.path().join(name);
        pack(directory.path(), &file, &Progress::default()).unwrap();
        fs::read(file).unwrap()
    };
    assert!(packed("a") == packed("b"));
    let archive = Archive::open(&out.path().join("a")).unwrap();
    // "same" twice, "#!/bin/sh" twice, an empty file, zeroes.
    let contents = archive
        .parts()
        .iter()
        .filter(|p| p.name.starts_with("LocalContent/"));
    assert_eq!(contents.count(), 4);
}

#[test]
fn a_refused_or_cancelled_pack_leaves_no_file() {
    let directory = service_directory();
    fs::remove_file(directory.path().join("Mail/run")).unwrap();
    let out = tempfile::tempdir().unwrap();
    let file = out.path().join("x.cspkg");
    let error = pack(directory.path(), &file, &Progress::default()).unwrap_err();
    assert!(error.what().contains("\"run\" does not exist"), "{error}");
    assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0);
    let cancelled = Progress::default();
    cancelled.cancel();
    pack(Path::new(SAMPLE), &file, &cancelled).unwrap_err();
    assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0);
    let error = pack(
        Path::new(SAMPLE),
        Path::new("/nowhere/x.cspkg"),
        &Progress::default(),
    )
    .unwrap_err();
    assert!(error.what().contains("cannot write the package"), "{error}");
}

#[test]
fn a_package_replaces_only_a_regular_file() {
    let out = tempfile::tempdir().unwrap();
    let path = |name: &str| out.path().join(name);
    let pack = |name| pack(Path::new(SAMPLE), &path(name), &Progress::default());
    fs::write(path("old"), "old").unwrap();
    std::os::unix::fs::symlink("old", path("link")).unwrap();
    std::os::unix::fs::symlink("gone", path("dangling")).unwrap();
    std::os::unix::fs::symlink("/dev/null", path("null")).unwrap();
    nix::unistd::mkfifo(&path("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    fs::create_dir(path("directory")).unwrap();
    for (name, why) in [
        ("fifo", "not a regular file"),
        ("null", "not a regular file"),
        ("directory", "a directory"),
        ("dangling", "a link to gone"),
    ] {
        let before = fs::symlink_metadata(path(name)).unwrap().file_type();
        let error = pack(name).unwrap_err();
        assert!(error.what().contains(why), "{error}");
        assert!(error.hint().is_some(), "{error}");
        assert_eq!(error.blame(), Blame::Output, "{error}");
        let after = fs::symlink_metadata(path(name)).unwrap().file_type();
        assert_eq!(after, before, "{name}");
    }
    let packed = pack("link").unwrap();
    assert_eq!(fs::read_link(path("link")).unwrap(), Path::new("old"));
    let replaced = fs::symlink_metadata(path("old")).unwrap();
    assert_eq!(replaced.len(), packed.bytes);
    // Readable as any new file, not only by its owner.
    fs::write(path("plain"), "").unwrap();
    let plain = fs::symlink_metadata(path("plain")).unwrap();
    assert_eq!(replaced.mode(), plain.mode());
    assert_eq!(fs::read_dir(out.path()).unwrap().count(), 7);
}

/// Hangs if a FIFO is opened with blocking.
#[test]
fn a_fifo_instead_of_a_file_is_refused_at_once() {
    let out = tempfile::tempdir().unwrap();
    for name in ["a.csdef", "a.cscfg", "a.cspkg"] {
        let pipe = out.path().join(name);
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let error = match name {
            "a.cscfg" => super::validate(Path::new(SAMPLE), Some(&pipe), &Progress::default()),
            _ => validate(&pipe, &Progress::default()),
        };
        let error = error.unwrap_err();
        assert_eq!(error.file(), pipe);
        assert_eq!(error.what(), "is not a regular file");
    }
}

/// The package of the redis service, in parts.
pub(super) fn parts() -> Vec<(String, Vec<u8>)> {
    let out = tempfile::tempdir().unwrap();
    let file = out.path().join("redis.cspkg");
    pack(Path::new(SAMPLE), &file, &Progress::default()).unwrap();
    let archive = Archive::open(&file).unwrap();
    let read = |part| archive.read_all(part, 1 << 20).unwrap();
    archive
        .parts()
        .iter()
        .map(|part| (part.name.to_string(), read(part)))
        .collect()
}

/// Loads a package of `parts`.
pub(super) fn load_parts(parts: &[(String, Vec<u8>)]) -> Result<ServiceModel, ServiceError> {
    let out = tempfile::NamedTempFile::new().unwrap();
    let mut writer = ArchiveWriter::new(out.reopen().unwrap(), (33, 0));
    for (name, content) in parts {
        writer.add(name, || Ok(content.as_slice())).unwrap();
    }
    writer.finish().unwrap();
    load(out.path(), Some(&config()), &Progress::default())
}

/// Where the hash of the first content in `manifest` is.
fn hash_of(manifest: &str) -> Range<usize> {
    let start = manifest.find("<IntegrityCheckHash>").unwrap() + "<IntegrityCheckHash>".len();
    start..start + 44
}

fn config() -> PathBuf {
    Path::new(SAMPLE).join("ServiceConfiguration.cscfg")
}

#[test]
fn each_error_in_a_manifest_is_reported() {
    let original = parts();
    load_parts(&original).unwrap();
    let manifest = String::from_utf8(original[2].1.clone()).unwrap();
    assert_eq!(original[2].0, "package.xml");
    let script = original
        .iter()
        .find(|part| part.0.starts_with("LocalContent/"))
        .unwrap();
    let reference = format!("<DataContentReference>{}<", script.0);
    let length = format!("<LengthInBytes>{}<", script.1.len());
    let file = {
        let start = manifest.find("<FileDefinition>").unwrap();
        let end = manifest.find("</FileDefinition>").unwrap() + "</FileDefinition>".len();
        &manifest[start..end]
    };
    let content = {
        let start = manifest.find("<ContentDefinition>").unwrap();
        let end = manifest.find("</ContentDefinition>").unwrap() + "</ContentDefinition>".len();
        &manifest[start..end]
    };
    let path = |path: &str| format!("<FilePath>{path}<");
    let run = path("\\approot\\run.sh");
    let second = |name: &str| file.replace("run.sh", name);
    let hash = &manifest[hash_of(&manifest)];
    let nobody = format!(
        "<KeyValuePair><Key>{EXECUTABLE_KEY}Nobody</Key><Value></Value></KeyValuePair>\
         </PackageMetaData>"
    );
    let ghost = "<LayoutDefinition><Name>Roles/Ghost</Name><LayoutDescription>\
                 </LayoutDescription></LayoutDefinition></PackageLayouts>";
    #[rustfmt::skip]
    let changes: &[(&str, &str, &str)] = &[
        (&run, &path("\\approot\\..\\..\\etc\\run.sh"), "\"..\" is not the name of a file"),
        (&run, &path("\\approot\\\\run.sh"), "\"\" is not the name of a file"),
        (&run, &path("\\approot\\a/../run.sh"), "holds '/'"),
        (&run, &path("\\approot\\a&#10;run.sh"), "holds '\\n'"),
        (&run, &path("/etc/passwd"), "is not below \\approot\\"),
        (&run, &path("\\base\\x64\\WaHostBootstrapper.exe"), "is not below \\approot\\"),
        (&run, &path("\\approot\\gone.sh"), "names \"\\approot\\run.sh\", which is not a file"),
        ("\\approot\\run.sh", "\\approot\\gone.sh", "entry point \"run.sh\" does not exist"),
        ("\\approot\\run.sh", "\\approot\\run.sh\\x", "entry point \"run.sh\" is a directory"),
        (&run, &path(&format!("\\approot{}", "\\d".repeat(40))), "nested deeper than 32"),
        (file, &format!("{file}{file}"), "duplicate file \"run.sh\""),
        (file, &format!("{file}{}", second("run.sh\\x")), "\"run.sh\" is a file and a directory"),
        (content, &format!("{content}{content}"), "duplicate content"),
        (content, "", "is not in the manifest"),
        (&reference, "<DataContentReference>other<", "has no content \"other\""),
        (&length, "<LengthInBytes>1<", "LengthInBytes is not the size"),
        (&length, "<LengthInBytes>x<", "LengthInBytes is not the size"),
        (hash, "ungWv48Bz+pBQUDeXa4iI7ADYaOWF3qctBD/YfIAFa0=", "damaged"),
        (hash, "abc", "not a SHA-256 in base64"),
        (">Sha256<", ">None<", "has no SHA-256"),
        ("<DataStorePath>S", "<DataStorePath>../S", "has no part"),
        ("Cache<", "Other<", "no files for role \"Cache\""),
        ("Roles/Cache</Name>", "Startup/Cache</Name>", "layout \"Startup/Cache\" is not supported yet"),
        ("executable:Cache", "executable:Cachet", "executable:Cachet\" names a role without a layout"),
        ("</PackageMetaData>", &nobody, "executable:Nobody\" names a role without"),
        ("\\approot\\run.sh</Value>", "\\approot\\run.sh\n\\approot\\nosuch</Value>", "names \"\\approot\\nosuch\", which is not a file"),
        ("\\approot\\run.sh</Value>", "</Value>", "\"run.sh\" is not executable"),
        ("</PackageLayouts>", ghost, "layout \"Roles/Ghost\" belongs to no role"),
        (&reference, "<DataContentReference>ServiceDefinition/ServiceDefinition.csdef<", "\" is in no layout"),
        ("<PackageLayouts>", "<PackageLayouts/><PackageLayouts>", "second <PackageLayouts>"),
        ("<PackageLayouts>", "<Extra/><PackageLayouts>", "unknown element <Extra>"),
        ("<FilePath>", "<FilePath a=\"1\">", "unknown attribute on <FilePath>"),
        ("<FilePath>", "<FilePath><b/>", "<FilePath> holds more than text"),
        ("schemas.microsoft.com/windowsazure\"", "example.org/x\"", "wrong namespace"),
        ("<PackageDefinition", "<!DOCTYPE x><PackageDefinition", "DTD"),
    ];
    for (old, new, why) in changes {
        assert!(manifest.contains(old), "{old}");
        let mut parts = original.clone();
        parts[2].1 = manifest.replace(old, new).into_bytes();
        let error = load_parts(&parts)
            .err()
            .unwrap_or_else(|| panic!("accepted: {new}"));
        assert!(error.to_string().contains(why), "{old} -> {new}: {error}");
    }
}

#[test]
fn a_missing_or_unknown_part_is_named() {
    let original = parts();
    let without = |name: &str| {
        let kept = original.iter().filter(|part| !part.0.starts_with(name));
        load_parts(&kept.cloned().collect::<Vec<_>>())
            .unwrap_err()
            .to_string()
    };
    for name in [
        "[Content_Types].xml",
        "_rels/.rels",
        "package.xml",
        "ServiceDefinition/",
        "LocalContent/",
    ] {
        let error = without(name);
        assert!(
            error.contains("no part \"") && error.contains(name),
            "{error}"
        );
    }
    let mut parts = original.clone();
    parts.push(("extra.sh".into(), b"#!/bin/sh".to_vec()));
    let error = load_parts(&parts).unwrap_err().to_string();
    assert!(
        error.contains("\"extra.sh\" is not in the manifest"),
        "{error}"
    );
    let mut parts = original.clone();
    let types = String::from_utf8(parts[0].1.clone()).unwrap();
    parts[0].1 = types.replace("</Types>", "<Bogus/></Types>").into_bytes();
    let error = load_parts(&parts).unwrap_err().to_string();
    assert!(
        error.contains("unknown element <Bogus> in <Types>"),
        "{error}"
    );
    // Only contents that describe the package may be in no layout.
    let manifest = String::from_utf8(original[2].1.clone()).unwrap();
    let end = "</ContentDefinition>";
    let start = manifest.find("<ContentDefinition>").unwrap();
    let content = &manifest[start..manifest.find(end).unwrap() + end.len()];
    let with = |name: &str| {
        let name = format!("<Name>{name}<");
        let second = content.replace("<Name>ServiceDefinition/ServiceDefinition.csdef<", &name);
        let all = format!("{second}</PackageContents>");
        let mut parts = original.clone();
        parts[2].1 = manifest.replace("</PackageContents>", &all).into_bytes();
        load_parts(&parts)
    };
    with("NamedStreams/SupportData/Cache/1.0").unwrap();
    // A part has one digest, though it may be several contents.
    let mut second = original.clone();
    let all = content
        .replace("<Name>ServiceDefinition/", "<Name>NamedStreams/")
        .replace(
            &content[hash_of(content)],
            "ungWv48Bz+pBQUDeXa4iI7ADYaOWF3qctBD/YfIAFa0=",
        );
    let all = format!("{all}</PackageContents>");
    second[2].1 = manifest.replace("</PackageContents>", &all).into_bytes();
    let error = load_parts(&second).unwrap_err().to_string();
    assert!(error.contains("gives its part a second hash"), "{error}");
    let error = with("Extra").unwrap_err().to_string();
    assert!(
        error.contains("content \"Extra\" is in no layout"),
        "{error}"
    );
    // A package of the old format has another relationship.
    let mut parts = original;
    let rels = String::from_utf8(parts[1].1.clone()).unwrap();
    parts[1].1 = rels
        .replace("PackageDefinition/Version", "Other")
        .into_bytes();
    let error = load_parts(&parts).unwrap_err();
    assert!(error.hint().unwrap().contains("old format"), "{error}");
}

proptest! {
    #![proptest_config(crate::property::cases(1500))]

    /// A package with damaged bytes is refused or still has the same files.
    #[test]
    fn damage_never_changes_the_files_of_a_package(
        at in any::<prop::sample::Index>(),
        damage in proptest::collection::vec(any::<u8>(), 1..4),
    ) {
        use std::sync::OnceLock;
        static GOOD: OnceLock<(Vec<u8>, Vec<u8>)> = OnceLock::new();
        let (good, disk) = GOOD.get_or_init(|| {
            let out = tempfile::tempdir().unwrap();
            let file = out.path().join("redis.cspkg");
            pack(Path::new(SAMPLE), &file, &Progress::default()).unwrap();
            (fs::read(&file).unwrap(), image(&load(Path::new(SAMPLE), None, &Progress::default()).unwrap(), 0))
        });
        let mut bytes = good.clone();
        let at = at.index(bytes.len());
        for (byte, damaged) in bytes[at..].iter_mut().zip(damage) {
            *byte = damaged;
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), &bytes).unwrap();
        if let Ok(model) = load(file.path(), Some(&config()), &Progress::default()) {
            prop_assert!(image(&model, 0) == *disk);
        }
    }
}

//! Guest images: found by name, opened read-only, and checked against the digests
//! of the manifest before a guest reads them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::progress::Progress;

/// Files that every image has.
const FILES: [&str; 5] = [
    "kernel",
    "initrd",
    "base.ext4",
    "resource.ext4",
    "guest-agent",
];
/// Manifest schema that this build reads.
const SCHEMA: &str = "host-agent.image/1";
/// Longest manifest in bytes.
const MAX_MANIFEST: u64 = 4 << 20;
/// File beside the manifest that records which files passed a full check.
const CHECKED: &str = "checked.json";

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// There is no image of that name.
    #[error("image {name} does not exist: there is no {}", path.display())]
    Missing {
        /// Image name.
        name: String,
        /// Where it was expected.
        path: PathBuf,
    },
    /// A file of the image cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The manifest does not parse.
    #[error("{}: not an image manifest", path.display())]
    Manifest {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The manifest has another schema or lacks a file.
    #[error("{}: {what}", path.display())]
    Incomplete {
        /// The manifest.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A file does not match the manifest.
    #[error("{}: SHA-256 is {actual}, the manifest says {expected}", path.display())]
    Digest {
        /// The file.
        path: PathBuf,
        /// Digest found.
        actual: String,
        /// Digest expected.
        expected: String,
    },
}

/// `manifest.json` of an image.
#[derive(Debug, Deserialize)]
struct Manifest {
    schema: String,
    files: BTreeMap<String, ManifestFile>,
}

#[derive(Debug, Deserialize)]
struct ManifestFile {
    sha256: String,
    #[serde(default)]
    version: Option<String>,
}

/// A guest agent that is sent to guests: the program of an image, or a package.
#[derive(Debug, Clone)]
pub struct AgentProgram {
    /// Its version, for people.
    pub version: String,
    /// SHA-256 in lower-case hexadecimal.
    pub sha256: String,
    /// Its length in bytes.
    pub size: u64,
    /// The file.
    pub file: Arc<File>,
}

/// An image whose files match their digests.
#[derive(Debug)]
pub struct Image {
    /// SHA-256 of the manifest, which identifies the image.
    pub digest: Digest,
    /// Kernel, open read-only.
    pub kernel: File,
    /// Initial RAM file system, open read-only.
    pub initrd: File,
    /// Base of the OS disk, open read-only.
    pub base: File,
    /// Path of the base, which diff disks name for `qemu-img`.
    pub base_path: PathBuf,
    /// Size of the base in bytes.
    pub base_size: u64,
    /// Initial file system of resource disks, open read-only.
    pub resource: File,
    /// The guest agent, which guests download if their disk has none.
    pub agent: Arc<AgentProgram>,
    /// Whether an earlier full check of the same files was used.
    pub cached: bool,
}

/// Identifies the content of a file without reading it: a write changes the ctime,
/// which users cannot set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct FileIdentity {
    sha256: String,
    device: u64,
    inode: u64,
    size: u64,
    changed: (i64, i64),
}

/// Directory of image `name`.
pub fn directory(data_dir: &Path, name: &str) -> PathBuf {
    data_dir.join("images").join(name)
}

/// Names of the images, sorted. Blocking.
pub fn names(data_dir: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(data_dir.join("images")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry?;
        // The builder's own names begin with a period.
        if let Ok(name) = entry.file_name().into_string()
            && !name.starts_with('.')
            && entry.path().join("manifest.json").exists()
        {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// Removes image `name` unless it `is_used`, which is asked again when nobody finds the image
/// by its name any more. Whether it was removed. Blocking.
pub fn remove(
    data_dir: &Path,
    name: &str,
    is_used: impl FnOnce() -> io::Result<bool>,
) -> io::Result<bool> {
    let path = directory(data_dir, name);
    let aside = directory(data_dir, &format!(".gone-{name}"));
    // Of a removal that was interrupted.
    let _ = fs::remove_dir_all(&aside);
    match fs::rename(&path, &aside) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        renamed => renamed?,
    }
    if is_used().unwrap_or(true) {
        fs::rename(&aside, &path)?;
        return Ok(false);
    }
    fs::remove_dir_all(&aside)?;
    Ok(true)
}

/// Opens image `name` and reads every file of it, also those that were checked before. Blocking.
pub fn verify(data_dir: &Path, name: &str, progress: &Progress) -> Result<Image, ImageError> {
    let path = directory(data_dir, name).join(CHECKED);
    if let Err(source) = fs::remove_file(&path)
        && source.kind() != io::ErrorKind::NotFound
    {
        return Err(ImageError::Read { path, source });
    }
    open(data_dir, name, progress)
}

/// Text of the manifest of image `name`. Blocking.
pub fn manifest(data_dir: &Path, name: &str) -> Result<Vec<u8>, ImageError> {
    let path = directory(data_dir, name).join("manifest.json");
    match read_bounded(&path, MAX_MANIFEST) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(ImageError::Missing {
            name: name.to_owned(),
            path,
        }),
        other => other.map_err(|source| ImageError::Read { path, source }),
    }
}

/// Opens and checks image `name` in `data_dir`. Blocking: it may read whole files.
pub fn open(data_dir: &Path, name: &str, progress: &Progress) -> Result<Image, ImageError> {
    let dir = data_dir.join("images").join(name);
    let path = dir.join("manifest.json");
    let bytes = manifest(data_dir, name)?;
    let (digest, _) = Digest::of(&bytes[..]).map_err(|source| ImageError::Read {
        path: path.clone(),
        source,
    })?;
    let manifest: Manifest =
        serde_json::from_slice(&bytes).map_err(|source| ImageError::Manifest {
            path: path.clone(),
            source,
        })?;
    if manifest.schema != SCHEMA {
        let what = format!("schema {}, this build reads {SCHEMA}", manifest.schema);
        return Err(ImageError::Incomplete { path, what });
    }
    let known: BTreeMap<String, FileIdentity> = fs::read(dir.join(CHECKED))
        .ok()
        .and_then(|bytes| serde_json::from_slice(&bytes).ok())
        .unwrap_or_default();
    let lengths = FILES
        .iter()
        .filter_map(|file| fs::metadata(dir.join(file)).ok());
    let total = lengths.map(|metadata| metadata.len()).sum();
    let _step = progress.step(format!("checking image {name}"), Some(total));
    let mut identities = BTreeMap::new();
    let mut opened = Vec::new();
    for file in FILES {
        let expected = manifest
            .files
            .get(file)
            .ok_or_else(|| ImageError::Incomplete {
                path: path.clone(),
                what: format!("lists no file {file}"),
            })?;
        let (handle, identity) =
            check(&dir.join(file), &expected.sha256, known.get(file), progress)?;
        identities.insert(file.to_owned(), identity);
        opened.push(handle);
    }
    let cached = known == identities;
    if !cached && let Ok(json) = serde_json::to_vec(&identities) {
        // Without this file only the next start is slower.
        let _ = fs::write(dir.join(CHECKED), json);
    }
    let [kernel, initrd, base, resource, program] =
        <[File; 5]>::try_from(opened).expect("one handle was opened for each of FILES");
    let agent = &manifest.files["guest-agent"];
    let agent = Arc::new(AgentProgram {
        version: agent.version.clone().unwrap_or_default(),
        sha256: agent.sha256.clone(),
        size: identities["guest-agent"].size,
        file: Arc::new(program),
    });
    Ok(Image {
        digest,
        kernel,
        initrd,
        base,
        base_size: identities["base.ext4"].size,
        base_path: dir.join("base.ext4"),
        resource,
        agent,
        cached,
    })
}

fn check(
    path: &Path,
    expected: &str,
    known: Option<&FileIdentity>,
    progress: &Progress,
) -> Result<(File, FileIdentity), ImageError> {
    let read = |source| ImageError::Read {
        path: path.to_owned(),
        source,
    };
    let mut file = File::open(path).map_err(read)?;
    let metadata = file.metadata().map_err(read)?;
    let identity = FileIdentity {
        sha256: expected.to_owned(),
        device: metadata.dev(),
        inode: metadata.ino(),
        size: metadata.size(),
        changed: (metadata.ctime(), metadata.ctime_nsec()),
    };
    if known == Some(&identity) {
        progress.advance(identity.size);
        return Ok((file, identity));
    }
    let (actual, _) = Digest::of(progress.watch(&mut file)).map_err(read)?;
    let actual = actual.hex();
    if actual != expected {
        return Err(ImageError::Digest {
            path: path.to_owned(),
            actual,
            expected: expected.to_owned(),
        });
    }
    // Not opened again: the path may lead to another file by now.
    file.rewind().map_err(read)?;
    Ok((file, identity))
}

fn read_bounded(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(dir: &Path) {
        let image = dir.join("images/minimal");
        fs::create_dir_all(&image).unwrap();
        let mut files = Vec::new();
        for name in FILES {
            fs::write(image.join(name), name).unwrap();
            let sum = Digest::of(name.as_bytes()).unwrap().0.hex();
            files.push(format!(r#""{name}":{{"sha256":"{sum}","size":1}}"#));
        }
        let json = format!(
            r#"{{"schema":"{SCHEMA}","name":"minimal","files":{{{}}}}}"#,
            files.join(",")
        );
        fs::write(image.join("manifest.json"), json).unwrap();
    }

    #[test]
    fn a_change_after_an_earlier_check_is_found() {
        let dir = tempfile::tempdir().unwrap();
        image(dir.path());
        let open = || open(dir.path(), "minimal", &Progress::default());
        assert!(!open().unwrap().cached);
        assert!(open().unwrap().cached);
        let base = dir.path().join("images/minimal/base.ext4");
        fs::write(&base, "base.exT4").unwrap();
        let error = open().unwrap_err();
        assert!(matches!(&error, ImageError::Digest { path, .. } if *path == base));
    }

    #[test]
    fn a_missing_image_or_file_is_named_with_its_path() {
        let dir = tempfile::tempdir().unwrap();
        let error = open(dir.path(), "nothere", &Progress::default()).unwrap_err();
        assert!(error.to_string().contains("images/nothere/manifest.json"));
        image(dir.path());
        fs::remove_file(dir.path().join("images/minimal/initrd")).unwrap();
        let error = open(dir.path(), "minimal", &Progress::default()).unwrap_err();
        assert!(error.to_string().contains("initrd"));
    }
}

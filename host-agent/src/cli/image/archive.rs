//! The file of `image import`: a tar of a root file system, or an archive of layers as OCI and
//! `docker save` write it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufReader, Read, Seek as _, SeekFrom};
use std::path::Path;

use flate2::read::MultiGzDecoder;
use serde::Deserialize;
use tempfile::TempPath;

use super::layers::{self, Layer};
use crate::cli::error::{CliError, Code};
use crate::cli::exit::Exit;
use crate::digest::Digest;
use crate::progress::Progress;

/// Longest description in an archive: the index of a large image has 100 KiB.
const MAX_JSON: u64 = 4 << 20;
/// Files in an archive of layers: three for each layer and a few more.
const MAX_FILES: usize = 4096;
/// Indexes that lead to a manifest.
const MAX_DEPTH: u32 = 4;
/// How a gzip file begins (RFC 1952).
const GZIP: [u8; 2] = [0x1f, 0x8b];
/// How a zstd frame begins (RFC 8878).
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// An archive.
#[derive(Debug)]
pub struct Archive {
    file: File,
    /// Where each file of an archive of layers is; empty of a root file system.
    files: BTreeMap<String, (u64, u64)>,
}

/// `index.json`, or another index of OCI.
#[derive(Debug, Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

/// A manifest of OCI.
#[derive(Debug, Deserialize)]
struct Manifest {
    layers: Vec<Descriptor>,
}

#[derive(Debug, Clone, Deserialize)]
struct Descriptor {
    #[serde(default, rename = "mediaType")]
    media_type: String,
    digest: String,
    platform: Option<Platform>,
}

#[derive(Debug, Clone, Deserialize)]
struct Platform {
    architecture: String,
    os: String,
}

/// An entry of `manifest.json` of `docker save`.
#[derive(Debug, Deserialize)]
struct Saved {
    #[serde(rename = "Layers")]
    layers: Vec<String>,
}

impl Archive {
    /// Opens a file and finds out what it is. Blocking.
    pub fn open(path: &Path) -> io::Result<Self> {
        let mut file = File::open(path)?;
        if !file.metadata()?.is_file() {
            return Err(invalid("it is not a file"));
        }
        let mut magic = [0; 2];
        let is_gzip = file.read_exact(&mut magic).is_ok() && magic == GZIP;
        file.rewind()?;
        let mut this = Self {
            file,
            files: BTreeMap::new(),
        };
        // An archive of layers is not compressed itself.
        if !is_gzip {
            this.files = this.index()?;
        }
        Ok(this)
    }

    /// The files, if these are layers.
    fn index(&self) -> io::Result<BTreeMap<String, (u64, u64)>> {
        let mut files = BTreeMap::new();
        let mut archive = tar::Archive::new(&self.file);
        let mut layers = false;
        for (count, entry) in archive.entries_with_seek()?.enumerate() {
            let entry = entry.map_err(|error| invalid(&format!("it is not a tar: {error}")))?;
            let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
            let path = path.trim_start_matches("./").to_owned();
            layers |= path == "index.json" || path == "manifest.json";
            // A root file system has its first thousands of files elsewhere.
            if count >= MAX_FILES {
                return Ok(BTreeMap::new());
            }
            if entry.header().entry_type().is_file() {
                files.insert(path, (entry.raw_file_position(), entry.size()));
            }
        }
        let described = files.contains_key("manifest.json") || files.contains_key("oci-layout");
        if layers && described {
            return Ok(files);
        }
        Ok(BTreeMap::new())
    }

    /// The root file system of layers in a new file of directory `place`; nothing if the archive
    /// is one already. Blocking.
    pub fn root_file_system(
        &self,
        place: &Path,
        progress: &Progress,
    ) -> io::Result<Option<TempPath>> {
        if self.files.is_empty() {
            return Ok(None);
        }
        let names = if self.files.contains_key("index.json") {
            self.of_index("index.json", 0)?
        } else {
            let saved: Vec<Saved> = self.json("manifest.json")?;
            let first = saved.into_iter().next();
            first.ok_or_else(|| invalid("it has no image"))?.layers
        };
        let layers = names.iter().map(|name| self.layer(name, progress));
        let layers = layers.collect::<io::Result<Vec<_>>>()?;
        fs::create_dir_all(place)?;
        let flat = tempfile::Builder::new()
            .prefix(".import-")
            .suffix(".tar")
            .tempfile_in(place)?;
        layers::merge(&layers, flat.as_file(), progress)?;
        Ok(Some(flat.into_temp_path()))
    }

    /// The layers of the image for this platform in an index.
    fn of_index(&self, name: &str, depth: u32) -> io::Result<Vec<String>> {
        if depth > MAX_DEPTH {
            return Err(invalid("its indexes do not end"));
        }
        let index: Index = self.json(name)?;
        let suits = |it: &&Descriptor| {
            let platform = it.platform.as_ref();
            platform.is_none_or(|it| it.architecture == "amd64" && it.os == "linux")
        };
        let found: Vec<_> = index.manifests.iter().filter(suits).collect();
        let [chosen] = found.as_slice() else {
            let text = format!("it has {} images for linux/amd64, not one", found.len());
            return Err(invalid(&text));
        };
        let blob = blob(&chosen.digest)?;
        self.check(&chosen.digest, &blob)?;
        if chosen.media_type.contains("index") || chosen.media_type.contains("list") {
            return self.of_index(&blob, depth + 1);
        }
        let manifest: Manifest = self.json(&blob)?;
        let layers = manifest.layers.iter();
        layers
            .map(|layer| {
                let name = self::blob(&layer.digest)?;
                self.check(&layer.digest, &name)?;
                Ok(name)
            })
            .collect()
    }

    /// A file of the archive is the one that its digest names.
    fn check(&self, digest: &str, name: &str) -> io::Result<()> {
        let (found, _) = Digest::of(self.part(name)?)?;
        if format!("sha256:{}", found.hex()) == digest {
            return Ok(());
        }
        Err(invalid(&format!(
            "{name} has SHA-256 {}, not {digest}",
            found.hex()
        )))
    }

    fn layer(&self, name: &str, progress: &Progress) -> io::Result<Layer> {
        let mut magic = Vec::new();
        self.part(name)?.take(4).read_to_end(&mut magic)?;
        if magic == ZSTD {
            let text = format!("layer {name} is compressed by zstd: write the archive with gzip");
            return Err(invalid(&text));
        }
        progress.check()?;
        let (position, size) = self.place(name)?;
        Ok(Layer {
            file: self.file.try_clone()?,
            position,
            size,
            is_gzip: magic.starts_with(&GZIP),
        })
    }

    fn json<T: for<'a> Deserialize<'a>>(&self, name: &str) -> io::Result<T> {
        let mut text = Vec::new();
        self.part(name)?.take(MAX_JSON).read_to_end(&mut text)?;
        serde_json::from_slice(&text).map_err(|error| invalid(&format!("{name}: {error}")))
    }

    fn part(&self, name: &str) -> io::Result<impl Read + use<'_>> {
        let (position, size) = self.place(name)?;
        let mut file = &self.file;
        file.seek(SeekFrom::Start(position))?;
        Ok(file.take(size))
    }

    fn place(&self, name: &str) -> io::Result<(u64, u64)> {
        let found = self.files.get(name).copied();
        found.ok_or_else(|| invalid(&format!("it has no file {name}")))
    }
}

impl Layer {
    /// Its tar, from the beginning.
    pub fn read(&self) -> io::Result<Box<dyn Read + '_>> {
        let mut file = &self.file;
        file.seek(SeekFrom::Start(self.position))?;
        let part = BufReader::new(file.take(self.size));
        Ok(if self.is_gzip {
            Box::new(MultiGzDecoder::new(part))
        } else {
            Box::new(part)
        })
    }
}

/// The path of a blob; its digest is no path.
fn blob(digest: &str) -> io::Result<String> {
    let hex = digest
        .strip_prefix("sha256:")
        .filter(|hex| hex.len() == 64 && hex.bytes().all(|byte| byte.is_ascii_hexdigit()));
    let hex = hex.ok_or_else(|| invalid(&format!("{digest} is not a SHA-256")))?;
    Ok(format!("blobs/sha256/{hex}"))
}

/// The archive is not what it should be.
pub(super) fn invalid(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

/// The error of an archive as it is printed.
pub fn refused(file: &Path, error: &io::Error) -> CliError {
    let exit = match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Exit::NotFound,
        io::ErrorKind::PermissionDenied => Exit::Permission,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Exit::Host,
        _ => Exit::Invalid,
    };
    CliError::new(
        Code::ImageImport,
        format!("cannot import {}", file.display()),
    )
    .cause(error.to_string())
    .exit_with(exit)
}

//! Layers of an OCI image as one root file system (OCI image-spec, layer.md): an upper layer
//! replaces what is below it, and whiteouts remove it.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};

use tar::{Archive, Builder, EntryType};

use super::archive::invalid;
use crate::progress::Progress;

/// Prefix of an entry that removes the one named behind it.
const WHITEOUT: &[u8] = b".wh.";
/// Name of an entry that removes what lower layers have in its directory.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Entries of an image: a whole desktop distribution has half a million.
const MAX_ENTRIES: u64 = 4_000_000;

/// A tar in a file.
#[derive(Debug)]
pub struct Layer {
    /// The file.
    pub file: File,
    /// Where it begins.
    pub position: u64,
    /// Its length in the file.
    pub size: u64,
    /// Whether it is compressed.
    pub is_gzip: bool,
}

/// The entry that stands for a path in the end: number of its layer and of the entry in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Winner {
    layer: usize,
    entry: u64,
}

/// Which entries are kept.
#[derive(Debug, Default)]
struct Tree {
    paths: BTreeMap<PathBuf, Winner>,
    /// Target of each hard link that is kept.
    links: HashMap<PathBuf, PathBuf>,
}

/// Writes the file system of `layers`, of which the lowest is the first, as a tar to `to`.
pub fn merge(layers: &[Layer], to: &File, progress: &Progress) -> io::Result<()> {
    let total: u64 = layers.iter().map(|layer| layer.size).sum();
    let mut tree = Tree::default();
    {
        let _step = progress.step("reading layers", Some(total));
        for (number, layer) in layers.iter().enumerate() {
            tree.read(number, layer, progress)?;
            progress.advance(layer.size);
        }
    }
    let _step = progress.step("merging layers", Some(total));
    let mut builder = Builder::new(io::BufWriter::new(to));
    for (number, layer) in layers.iter().enumerate() {
        tree.write(number, layer, &mut builder, progress)?;
        progress.advance(layer.size);
    }
    builder.into_inner()?.flush()
}

impl Tree {
    fn read(&mut self, number: usize, layer: &Layer, progress: &Progress) -> io::Result<()> {
        let mut archive = Archive::new(layer.read()?);
        for (entry, count) in archive.entries()?.zip(0..) {
            progress.check()?;
            if count >= MAX_ENTRIES {
                return Err(invalid("it has more files than an image may have"));
            }
            let entry = entry?;
            let path = inside(&entry.path_bytes())?;
            let name = path.file_name().map(OsStr::as_bytes).unwrap_or_default();
            if name == OPAQUE {
                self.remove_below(path.parent().unwrap_or(&path), number);
            } else if let Some(name) = name.strip_prefix(WHITEOUT) {
                let gone = path.with_file_name(OsStr::from_bytes(name));
                self.remove(&gone, number);
            } else {
                let kind = entry.header().entry_type();
                if kind != EntryType::Directory {
                    self.remove_below(&path, number);
                }
                self.links.remove(&path);
                if kind == EntryType::Link {
                    let target = entry.link_name_bytes().unwrap_or_default();
                    self.links.insert(path.clone(), inside(&target)?);
                }
                let winner = Winner {
                    layer: number,
                    entry: count,
                };
                self.paths.insert(path, winner);
            }
        }
        Ok(())
    }

    /// Removes what layers below `layer` have at `path` and below it.
    fn remove(&mut self, path: &Path, layer: usize) {
        if self
            .paths
            .get(path)
            .is_some_and(|found| found.layer < layer)
        {
            self.paths.remove(path);
            self.links.remove(path);
        }
        self.remove_below(path, layer);
    }

    fn remove_below(&mut self, path: &Path, layer: usize) {
        let below = self.paths.range(path.to_owned()..);
        let below = below.take_while(|(found, _)| found.starts_with(path));
        let gone: Vec<_> = below
            .filter(|(found, winner)| *found != path && winner.layer < layer)
            .map(|(found, _)| found.clone())
            .collect();
        for path in gone {
            self.paths.remove(&path);
            self.links.remove(&path);
        }
    }

    fn write(
        &self,
        number: usize,
        layer: &Layer,
        builder: &mut Builder<impl io::Write>,
        progress: &Progress,
    ) -> io::Result<()> {
        let heirs = self.heirs(number);
        let mut archive = Archive::new(layer.read()?);
        for (entry, count) in archive.entries()?.zip(0..) {
            progress.check()?;
            let mut entry = entry?;
            let path = inside(&entry.path_bytes())?;
            let is_winner = |path: &Path| {
                let found = self.paths.get(path);
                found.is_some_and(|it| it.layer == number && it.entry == count)
            };
            let mut header = entry.header().clone();
            if !is_winner(&path) {
                // Its first link takes its place.
                if let Some(heir) = heirs.get(&path)
                    && header.entry_type().is_file()
                {
                    builder.append_data(&mut header, heir, &mut entry)?;
                }
                continue;
            }
            if path.as_os_str().is_empty() {
                continue;
            }
            match header.entry_type() {
                EntryType::Link => {
                    let target = inside(&entry.link_name_bytes().unwrap_or_default())?;
                    let target = heirs.get(&target).unwrap_or(&target);
                    if *target != path {
                        builder.append_link(&mut header, &path, target)?;
                    }
                }
                EntryType::Symlink => {
                    let target = entry.link_name_bytes().unwrap_or_default();
                    let target = PathBuf::from(OsStr::from_bytes(&target));
                    builder.append_link(&mut header, &path, target)?;
                }
                kind if kind.is_file()
                    || kind.is_dir()
                    || kind.is_character_special()
                    || kind.is_block_special()
                    || kind.is_fifo() =>
                {
                    header.set_size(entry.size());
                    builder.append_data(&mut header, &path, &mut entry)?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// For files of a layer that are replaced or removed above it, while a hard link to them is
    /// not: the link that gets their content.
    fn heirs(&self, layer: usize) -> HashMap<PathBuf, PathBuf> {
        let mut heirs: HashMap<PathBuf, PathBuf> = HashMap::new();
        for (path, winner) in &self.paths {
            if winner.layer == layer
                && let Some(target) = self.links.get(path)
                && self.paths.get(target).is_none_or(|it| it.layer != layer)
            {
                heirs.entry(target.clone()).or_insert_with(|| path.clone());
            }
        }
        heirs
    }
}

/// A path of an archive below its root.
fn inside(bytes: &[u8]) -> io::Result<PathBuf> {
    let mut path = PathBuf::new();
    for component in Path::new(OsStr::from_bytes(bytes)).components() {
        match component {
            Component::Normal(name) => path.push(name),
            Component::CurDir | Component::RootDir => {}
            _ => return Err(invalid("a path in it leads out of it")),
        }
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::super::archive::Archive as Source;
    use super::*;
    use crate::digest::Digest;
    use flate2::Compression;
    use flate2::write::GzEncoder;
    use serde_json::json;
    use std::fs;
    use std::io::Read as _;
    use tar::Header;

    /// Kind, path, and content or target.
    type Files<'a> = &'a [(char, &'a str, &'a str)];

    fn tar(files: Files<'_>) -> Vec<u8> {
        let mut builder = Builder::new(Vec::new());
        for (kind, path, rest) in files {
            let mut header = Header::new_gnu();
            header.set_mode(0o755);
            header.set_size(0);
            let link = |kind| {
                (
                    kind,
                    builder_link as fn(&mut Builder<_>, &mut Header, &str, &str),
                )
            };
            let (kind, add) = match kind {
                'l' => link(EntryType::Link),
                's' => link(EntryType::Symlink),
                'd' => (EntryType::Directory, builder_data as _),
                _ => (EntryType::Regular, builder_data as _),
            };
            header.set_entry_type(kind);
            add(&mut builder, &mut header, path, rest);
        }
        builder.into_inner().unwrap()
    }

    fn builder_link(builder: &mut Builder<Vec<u8>>, header: &mut Header, path: &str, rest: &str) {
        builder.append_link(header, path, rest).unwrap();
    }

    fn builder_data(builder: &mut Builder<Vec<u8>>, header: &mut Header, path: &str, rest: &str) {
        header.set_size(rest.len() as u64);
        builder.append_data(header, path, rest.as_bytes()).unwrap();
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    /// An OCI archive of layers; with `damage` its last layer is another than its digest.
    fn archive(layers: &[Vec<u8>], damage: bool) -> tempfile::NamedTempFile {
        let mut files: Vec<(String, Vec<u8>)> = vec![("oci-layout".into(), b"{}".to_vec())];
        let mut add = |bytes: Vec<u8>| {
            let hex = Digest::of(&bytes[..]).unwrap().0.hex();
            files.push((format!("blobs/sha256/{hex}"), bytes));
            format!("sha256:{hex}")
        };
        let described: Vec<_> = layers
            .iter()
            .map(|layer| json!({"digest": add(layer.clone())}))
            .collect();
        let manifest = json!({"layers": described}).to_string();
        let digest = add(manifest.into_bytes());
        let amd64 = json!({"architecture": "amd64", "os": "linux"});
        let arm64 = json!({"architecture": "arm64", "os": "linux"});
        let index = json!({"manifests": [
            {"digest": digest, "platform": amd64}, {"digest": "sha256:no", "platform": arm64},
        ]});
        files.push(("index.json".into(), index.to_string().into_bytes()));
        if damage {
            let last = files.iter_mut().rev().nth(2).unwrap();
            *last.1.last_mut().unwrap() ^= 1;
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut builder = Builder::new(file.as_file());
        for (name, bytes) in files {
            let mut header = Header::new_gnu();
            header.set_size(bytes.len() as u64);
            builder.append_data(&mut header, name, &bytes[..]).unwrap();
        }
        builder.finish().unwrap();
        drop(builder);
        file
    }

    fn flatten(archive: &Path) -> io::Result<Vec<String>> {
        let place = tempfile::tempdir()?;
        let source = Source::open(archive)?;
        let flat = source.root_file_system(place.path(), &Progress::default())?;
        let flat = flat.expect("the archive has layers");
        let mut shown = Vec::new();
        for entry in Archive::new(fs::File::open(&flat)?).entries()? {
            let mut entry = entry?;
            let mut text = String::new();
            entry.read_to_string(&mut text)?;
            let target = entry.link_name()?.map(|it| format!(" -> {}", it.display()));
            let path = entry.path()?.display().to_string();
            shown.push(format!("{path} {text}{}", target.unwrap_or_default()));
        }
        shown.sort();
        Ok(shown)
    }

    #[test]
    fn an_upper_layer_replaces_and_removes_what_is_below_it() {
        let lower = tar(&[
            ('d', "etc", ""),
            ('f', "./etc/kept", "lower"),
            ('f', "etc/replaced", "lower"),
            ('f', "etc/gone", "lower"),
            ('d', "opt", ""),
            ('d', "opt/a", ""),
            ('f', "opt/a/x", "lower"),
            ('d', "var", ""),
            ('f', "var/old", "lower"),
            ('f', "var-other", "lower"),
            ('d', "becomes", ""),
            ('f', "becomes/file", "lower"),
            ('f', "data", "of both"),
            ('l', "link", "data"),
            ('l', "link2", "data"),
        ]);
        let upper = tar(&[
            ('f', "etc/replaced", "upper"),
            ('f', "etc/.wh.gone", ""),
            ('f', ".wh.opt", ""),
            ('f', "var/new", "upper"),
            ('f', "var/.wh..wh..opq", ""),
            ('s', "becomes", "/etc"),
            ('f', "data", "upper"),
        ]);
        let file = archive(&[gzip(&lower), upper], false);
        let found = flatten(file.path()).unwrap();
        assert_eq!(
            found,
            [
                "becomes  -> /etc",
                "data upper",
                "etc ",
                "etc/kept lower",
                "etc/replaced upper",
                "link of both",
                "link2  -> link",
                "var ",
                "var-other lower",
                "var/new upper",
            ]
        );
    }

    #[test]
    fn archives_that_are_damaged_or_lead_out_are_refused() {
        let layer = tar(&[('f', "a", "1")]);
        let damaged = archive(std::slice::from_ref(&layer), true);
        let error = flatten(damaged.path()).unwrap_err();
        assert!(error.to_string().contains("SHA-256"), "{error}");
        let cut = archive(&[gzip(&layer)[..20].to_vec()], false);
        flatten(cut.path()).unwrap_err();
        assert_eq!(inside(b"./a/b/").unwrap(), Path::new("a/b"));
        inside(b"a/../../b").unwrap_err();
        // A root file system is none, compressed or not.
        for bytes in [layer.clone(), gzip(&layer)] {
            let file = tempfile::NamedTempFile::new().unwrap();
            fs::write(file.path(), bytes).unwrap();
            let source = Source::open(file.path()).unwrap();
            let place = tempfile::tempdir().unwrap();
            let flat = source.root_file_system(place.path(), &Progress::default());
            assert!(flat.unwrap().is_none());
        }
        let text = tempfile::NamedTempFile::new().unwrap();
        fs::write(text.path(), "not a tar at all".repeat(100)).unwrap();
        Source::open(text.path()).unwrap_err();
    }
}

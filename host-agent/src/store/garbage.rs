//! What nothing needs any more: packages, application disks, directories and images, found
//! and removed by the same rules. Blocking.

use std::collections::BTreeSet;
use std::fs::{self, Metadata};
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::content::ContentStore;
use super::packages::PackageStore;
use super::{deployment, image};
use crate::digest::Digest;

/// Age from which a package without a revision is garbage. Between the upload of a package and
/// the request that names it is the time that an operator takes to answer a question.
const UPLOADED: Duration = Duration::from_hours(1);

/// Kind of a thing that is not needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum GarbageKind {
    /// A package that no revision names.
    Package,
    /// An application disk without a user.
    ApplicationDisk,
    /// The directory of a deployment whose owner has died.
    Deployment,
    /// An image that no instance and no revision names.
    Image,
}

impl GarbageKind {
    /// In words.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Package => "package",
            Self::ApplicationDisk => "application disk",
            Self::Deployment => "deployment",
            Self::Image => "image",
        }
    }
}

/// Something that is not needed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Garbage {
    /// What it is.
    pub kind: GarbageKind,
    /// Its name: a digest, an id, the name of an image.
    pub name: String,
    /// Bytes that it takes on disk.
    pub bytes: u64,
}

/// What is needed besides what the data directory shows.
#[derive(Debug, Clone, Default)]
pub struct Needed {
    /// Packages that revisions name.
    pub packages: Vec<Digest>,
    /// Images that revisions name; images are left alone without it.
    pub images: Option<BTreeSet<String>>,
}

/// Finds everything that is not needed, and removes it unless only asked. No revision may be
/// added meanwhile.
///
/// # Errors
/// The first thing that could not be listed or removed.
pub fn collect(data_dir: &Path, needed: &Needed, only_ask: bool) -> io::Result<Vec<Garbage>> {
    let mut found = Vec::new();
    let mut take = |kind, paths: Vec<PathBuf>, remove: &dyn Fn(&Path) -> io::Result<bool>| {
        for path in paths {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let garbage = Garbage {
                kind,
                name: name.trim_end_matches(".cspkg").to_owned(),
                bytes: allocated(&path),
            };
            if only_ask || remove(&path)? {
                found.push(garbage);
            }
        }
        Ok::<_, io::Error>(())
    };
    // Disks have links in the directories of deployments.
    take(
        GarbageKind::Deployment,
        deployment::dead(data_dir)?,
        &|path| deployment::remove_if_dead(path).map(|()| true),
    )?;
    let packages = PackageStore::new(data_dir).unused(&needed.packages, UPLOADED)?;
    take(GarbageKind::Package, packages, &|path| {
        gone(fs::remove_file(path))
    })?;
    let content = ContentStore::new(data_dir);
    let unused = content.unused()?;
    take(GarbageKind::ApplicationDisk, unused.paths(), &|path| {
        gone(fs::remove_file(path))
    })?;
    drop(unused);
    if let Some(needed) = &needed.images {
        let unused = image::names(data_dir)?.into_iter();
        let used = |name: &str| -> io::Result<bool> {
            Ok(needed.contains(name) || deployment::images(data_dir)?.contains(name))
        };
        for name in unused {
            if used(&name)? {
                continue;
            }
            let path = image::directory(data_dir, &name);
            take(GarbageKind::Image, vec![path], &|_| {
                image::remove(data_dir, &name, || used(&name))
            })?;
        }
    }
    Ok(found)
}

/// Whether this call removed it.
fn gone(removed: io::Result<()>) -> io::Result<bool> {
    match removed {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Bytes that a file or a directory takes on disk, as far as it can be read. A file with other
/// names too takes none.
pub fn allocated(path: &Path) -> u64 {
    let Ok(metadata) = fs::symlink_metadata(path) else {
        return 0;
    };
    if !metadata.is_dir() {
        return of_file(&metadata);
    }
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries.map(|entry| allocated(&entry.path())).sum()
}

fn of_file(metadata: &Metadata) -> u64 {
    // `st_blocks` counts in 512 bytes, whatever the file system (stat(2)).
    match metadata.nlink() {
        1 => metadata.blocks() * 512,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::SystemTime;

    fn package(data: &Path, text: &str) -> Digest {
        let digest = Digest::of(text.as_bytes()).unwrap().0;
        let mut partial = PackageStore::new(data).begin().unwrap();
        partial.write(text.as_bytes()).unwrap();
        partial.finish(&digest).unwrap();
        digest
    }

    fn age(path: &Path) {
        let old = SystemTime::now() - 2 * UPLOADED;
        fs::File::open(path).unwrap().set_modified(old).unwrap();
    }

    fn names(found: &[Garbage]) -> Vec<(GarbageKind, &str)> {
        found.iter().map(|it| (it.kind, it.name.as_str())).collect()
    }

    #[test]
    fn only_what_nothing_names_is_shown_and_then_removed() {
        let data = tempfile::tempdir().unwrap();
        let data = data.path();
        let [used, unused, fresh] = ["used", "unused", "fresh"].map(|text| package(data, text));
        let packages = PackageStore::new(data);
        for digest in [&used, &unused] {
            age(&packages.path(digest));
        }
        let dead = deployment::DeploymentDir::create(data, "dead", "o").unwrap();
        fs::write(dead.path().join("disk"), vec![1; 8192]).unwrap();
        // As of a process that was killed: its lock is free.
        let path = dead.path().to_owned();
        let aside = data.join("aside");
        fs::rename(&path, &aside).unwrap();
        drop(dead);
        fs::rename(&aside, &path).unwrap();
        let live = deployment::DeploymentDir::create(data, "live", "o").unwrap();
        for name in ["minimal", "other"] {
            fs::create_dir_all(image::directory(data, name)).unwrap();
            let manifest = image::directory(data, name).join("manifest.json");
            fs::write(manifest, "{}").unwrap();
        }
        let mut needed = Needed {
            packages: vec![used],
            images: None,
        };
        let expected = [
            (GarbageKind::Deployment, "dead"),
            (GarbageKind::Package, &*unused.hex()),
        ];
        let asked = collect(data, &needed, true).unwrap();
        assert_eq!(names(&asked), expected);
        assert!(asked[0].bytes >= 8192);
        // `has` would make it fresh.
        assert!(packages.path(&unused).exists() && path.exists());
        let removed = collect(data, &needed, false).unwrap();
        assert_eq!(removed, asked);
        assert!(!packages.has(&unused) && !path.exists());
        assert!(packages.has(&used) && packages.has(&fresh) && live.path().exists());
        assert_eq!(collect(data, &needed, false).unwrap(), []);

        needed.images = Some(["minimal".to_owned()].into());
        let removed = collect(data, &needed, false).unwrap();
        assert_eq!(names(&removed), [(GarbageKind::Image, "other")]);
        assert!(image::directory(data, "minimal").exists());
        assert!(!image::directory(data, "other").exists());
    }
}

//! Packages by digest: each a file named by its SHA-256.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::digest::Digest;

/// The directory of all packages.
#[derive(Debug, Clone)]
pub struct PackageStore {
    directory: PathBuf,
}

/// A package that is being written. Drop removes it.
#[derive(Debug)]
pub struct PartialPackage {
    directory: PathBuf,
    file: tempfile::NamedTempFile,
}

/// Why a package was not added.
#[derive(Debug, thiserror::Error)]
pub enum AddError {
    /// It is another one.
    #[error("the package has SHA-256 {found}, not {wanted}")]
    Digest {
        /// Digest of what arrived.
        found: String,
        /// Digest that was named.
        wanted: String,
    },
    /// The file system.
    #[error("cannot write the package")]
    Io(#[from] io::Error),
}

impl PackageStore {
    /// The store in `data_dir`.
    pub fn new(data_dir: &Path) -> Self {
        Self {
            directory: data_dir.join("packages"),
        }
    }

    /// Where a package is. Its name ends in `.cspkg`.
    pub fn path(&self, digest: &Digest) -> PathBuf {
        self.directory.join(format!("{}.cspkg", digest.hex()))
    }

    /// Whether the package is here. It is not removed as unused for a while then, since who
    /// looks for it is going to name it. Blocking.
    pub fn has(&self, digest: &Digest) -> bool {
        let Ok(file) = File::open(self.path(digest)) else {
            return false;
        };
        // On a file system that refuses this, an operator must be fast.
        let _ = file.set_modified(SystemTime::now());
        true
    }

    /// Begins a package. Blocking.
    pub fn begin(&self) -> io::Result<PartialPackage> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.directory)?;
        let file = tempfile::Builder::new()
            .prefix(".partial-")
            .permissions(Permissions::from_mode(0o600))
            .tempfile_in(&self.directory)?;
        Ok(PartialPackage {
            directory: self.directory.clone(),
            file,
        })
    }

    /// Packages that are not among `used` and were not looked for in the last `age`.
    pub fn unused(&self, used: &[Digest], age: Duration) -> io::Result<Vec<PathBuf>> {
        let entries = match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other?,
        };
        let used: Vec<_> = used.iter().map(|digest| self.path(digest)).collect();
        let mut unused = Vec::new();
        for entry in entries {
            let path = entry?.path();
            let changed = fs::metadata(&path).and_then(|found| found.modified());
            // A clock that was set back only delays it.
            let is_old = changed.is_ok_and(|time| time.elapsed().is_ok_and(|old| old > age));
            if is_old && !used.contains(&path) {
                unused.push(path);
            }
        }
        unused.sort();
        Ok(unused)
    }

    /// Removes packages that are not among `used`, and what a process that died was writing.
    /// No package may be begun meanwhile. Blocking.
    pub fn sweep(&self, used: &[Digest]) -> io::Result<()> {
        let entries = match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other?,
        };
        let used: Vec<_> = used.iter().map(|digest| self.path(digest)).collect();
        for entry in entries {
            let path = entry?.path();
            if !used.contains(&path) {
                fs::remove_file(path)?;
            }
        }
        Ok(())
    }
}

impl PartialPackage {
    /// Appends bytes. Blocking.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)
    }

    /// Gives the file its name if it is the package `wanted`. It is on disk then. Blocking.
    pub fn finish(mut self, wanted: &Digest) -> Result<(), AddError> {
        let file = self.file.as_file_mut();
        io::Seek::rewind(file)?;
        let (found, _) = Digest::of(&mut *file)?;
        if found != *wanted {
            return Err(AddError::Digest {
                found: found.hex(),
                wanted: wanted.hex(),
            });
        }
        file.set_permissions(Permissions::from_mode(0o400))?;
        file.sync_all()?;
        let name = self.directory.join(format!("{}.cspkg", wanted.hex()));
        self.file.persist(name).map_err(|error| error.error)?;
        File::open(&self.directory)?.sync_all()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_package_gets_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let store = PackageStore::new(dir.path());
        let wanted = Digest::of(&b"whole"[..]).unwrap().0;
        let mut partial = store.begin().unwrap();
        partial.write(b"who").unwrap();
        let refused = partial.finish(&wanted).unwrap_err();
        assert!(matches!(refused, AddError::Digest { .. }));
        assert!(!store.has(&wanted));
        assert_eq!(fs::read_dir(&store.directory).unwrap().count(), 0);
        for _ in 0..2 {
            let mut partial = store.begin().unwrap();
            partial.write(b"whole").unwrap();
            partial.finish(&wanted).unwrap();
        }
        assert_eq!(fs::read(store.path(&wanted)).unwrap(), b"whole");
    }

    #[test]
    fn a_sweep_removes_what_no_revision_names() {
        let dir = tempfile::tempdir().unwrap();
        let store = PackageStore::new(dir.path());
        store.sweep(&[]).unwrap();
        let digests = ["a", "b"].map(|text| {
            let digest = Digest::of(text.as_bytes()).unwrap().0;
            let mut partial = store.begin().unwrap();
            partial.write(text.as_bytes()).unwrap();
            partial.finish(&digest).unwrap();
            digest
        });
        fs::write(store.directory.join(".partial-x"), b"").unwrap();
        store.sweep(&digests[..1]).unwrap();
        assert!(store.has(&digests[0]));
        assert_eq!(fs::read_dir(&store.directory).unwrap().count(), 1);
    }
}

//! Content by digest: application disks, each a file named by its SHA-256.
//!
//! A user of content is a hard link to its file, so the link count is the number of
//! users plus one, and no crash can make it wrong.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Seek};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use crate::digest::Digest;

/// Held shared while content is added and linked, exclusively while it is swept.
const LOCK: &str = "lock";
/// Prefix of files that are being written.
const PARTIAL: &str = ".partial-";

/// The directory of all content.
#[derive(Debug, Clone)]
pub struct ContentStore {
    directory: PathBuf,
}

/// While a hold exists, no content is removed. The last Drop removes content without users.
#[derive(Debug)]
pub struct ContentHold {
    _lock: Flock<File>,
    // After the lock.
    _sweep: SweepOnDrop,
}

/// Content without users, while nobody can begin to use it.
#[derive(Debug)]
pub struct UnusedContent {
    paths: Vec<PathBuf>,
    lock: Option<Flock<File>>,
}

impl UnusedContent {
    /// The files.
    pub fn paths(&self) -> Vec<PathBuf> {
        self.paths.clone()
    }
}

/// Sweeps the store when it is dropped, which blocks.
#[derive(Debug)]
pub struct SweepOnDrop(pub ContentStore);

impl Drop for SweepOnDrop {
    fn drop(&mut self) {
        // What cannot be removed now is left to the next sweep.
        let _ = self.0.sweep();
    }
}

impl ContentStore {
    /// The store in `data_dir`.
    pub fn new(data_dir: &Path) -> Self {
        Self {
            directory: data_dir.join("content"),
        }
    }

    /// Where the content is.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Keeps content without users, so that it can be added and linked. Blocking.
    pub fn hold(&self) -> io::Result<ContentHold> {
        let lock = self.lock_file()?;
        let lock = Flock::lock(lock, FlockArg::LockShared).map_err(|(_, errno)| errno)?;
        Ok(ContentHold {
            _lock: lock,
            _sweep: SweepOnDrop(self.clone()),
        })
    }

    /// Adds the file that `write` fills. It is on disk before it gets its name. Blocking.
    ///
    /// # Errors
    /// The error of `write`, or of the file system.
    pub fn add<E: From<io::Error>>(
        &self,
        _hold: &ContentHold,
        write: impl FnOnce(&File) -> Result<(), E>,
    ) -> Result<Digest, E> {
        let file = tempfile::Builder::new()
            .prefix(PARTIAL)
            .permissions(fs::Permissions::from_mode(0o600))
            .tempfile_in(&self.directory)?;
        write(file.as_file())?;
        let mut content = file.as_file();
        content.rewind()?;
        let (digest, _) = Digest::of(content)?;
        content.set_permissions(fs::Permissions::from_mode(0o400))?;
        content.sync_all()?;
        match file.persist_noclobber(self.path(&digest)) {
            Ok(_) => File::open(&self.directory)?.sync_all()?,
            Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error.error.into()),
        }
        Ok(digest)
    }

    /// Gives the content the additional name `to`, on the same file system.
    pub fn link(&self, _hold: &ContentHold, digest: &Digest, to: &Path) -> io::Result<()> {
        fs::hard_link(self.path(digest), to)
    }

    /// Content without users, none if a hold exists. No content is added or linked while the
    /// answer exists. Blocking.
    pub fn unused(&self) -> io::Result<UnusedContent> {
        let mut unused = UnusedContent {
            paths: Vec::new(),
            lock: None,
        };
        if !self.directory.exists() {
            return Ok(unused);
        }
        let Ok(lock) = Flock::lock(self.lock_file()?, FlockArg::LockExclusiveNonblock) else {
            return Ok(unused);
        };
        unused.lock = Some(lock);
        for entry in fs::read_dir(&self.directory)? {
            let entry = entry?;
            if entry.file_name() != LOCK && entry.metadata()?.nlink() == 1 {
                unused.paths.push(entry.path());
            }
        }
        unused.paths.sort();
        Ok(unused)
    }

    /// Removes content without users, unless a hold exists. Blocking.
    pub fn sweep(&self) -> io::Result<()> {
        let unused = self.unused()?;
        unused.paths.iter().try_for_each(fs::remove_file)
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        self.directory.join(digest.hex())
    }

    fn lock_file(&self) -> io::Result<File> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.directory)?;
        OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(self.directory.join(LOCK))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    fn add(store: &ContentStore, hold: &ContentHold, text: &str) -> Digest {
        let write = |mut file: &File| file.write_all(text.as_bytes());
        store.add::<io::Error>(hold, write).unwrap()
    }

    #[test]
    fn the_last_hold_removes_only_content_without_users() {
        let dir = tempfile::tempdir().unwrap();
        let store = ContentStore::new(dir.path());
        let hold = store.hold().unwrap();
        let [used, unused] = ["used", "unused"].map(|text| add(&store, &hold, text));
        let user = dir.path().join("user");
        store.link(&hold, &used, &user).unwrap();
        assert_eq!(add(&store, &hold, "used"), used);
        store.sweep().unwrap();
        assert!(store.path(&unused).exists(), "a hold prevents the sweep");
        let other = store.hold().unwrap();
        drop(hold);
        assert!(store.path(&unused).exists(), "the other hold keeps it");
        drop(other);
        assert!(store.path(&used).exists() && !store.path(&unused).exists());
        assert_eq!(fs::read_to_string(&user).unwrap(), "used");
        fs::remove_file(&user).unwrap();
        store.sweep().unwrap();
        assert!(!store.path(&used).exists());
    }

    #[test]
    fn content_whose_write_fails_leaves_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let store = ContentStore::new(dir.path());
        let hold = store.hold().unwrap();
        let failed = store.add(&hold, |_| Err(io::Error::other("no")));
        assert!(failed.is_err());
        let names = fs::read_dir(&store.directory).unwrap();
        assert_eq!(names.count(), 1, "only the lock");
    }
}

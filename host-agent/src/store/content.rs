//! Content by digest: application disks, each a file named by its SHA-256.
//!
//! Users of a content hold hard links to it, so its link count is its reference
//! count, which no crash can make wrong. A content that only its own name refers to
//! is unused.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Seek};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use crate::digest::Digest;

/// Held shared while content is added and linked, exclusively while it is swept.
const LOCK: &str = "lock";
/// Names of files that are being written begin so.
const PARTIAL: &str = ".partial-";

/// The directory of all content.
#[derive(Debug, Clone)]
pub struct ContentStore {
    directory: PathBuf,
}

/// Keeps unused content in place while it is held.
#[derive(Debug)]
pub struct ContentHold {
    _lock: Flock<File>,
}

impl ContentStore {
    /// The store in `data_dir`.
    pub fn new(data_dir: &Path) -> Self {
        Self {
            directory: data_dir.join("content"),
        }
    }

    /// Until it is dropped, nothing is swept: content that was added can be linked.
    /// Blocking.
    pub fn hold(&self) -> io::Result<ContentHold> {
        let lock = self.lock_file()?;
        let lock = Flock::lock(lock, FlockArg::LockShared).map_err(|(_, errno)| errno)?;
        Ok(ContentHold { _lock: lock })
    }

    /// Adds what `write` writes to the file it is given. The content is on disk before
    /// it has its name. Blocking.
    ///
    /// # Errors
    /// What `write` returned, or of the file system.
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
        let path = self.path(&digest);
        // The same content may have been added before: its users keep their links.
        if !path.exists() {
            file.persist(&path).map_err(|error| error.error)?;
            File::open(&self.directory)?.sync_all()?;
        }
        Ok(digest)
    }

    /// Gives the content the additional name `to`, on the same file system.
    pub fn link(&self, _hold: &ContentHold, digest: &Digest, to: &Path) -> io::Result<()> {
        fs::hard_link(self.path(digest), to)
    }

    /// Removes unused content, unless somebody adds content at the moment: then the
    /// next sweep does. Blocking.
    pub fn sweep(&self) -> io::Result<()> {
        if !self.directory.exists() {
            return Ok(());
        }
        let lock = self.lock_file()?;
        let Ok(_lock) = Flock::lock(lock, FlockArg::LockExclusiveNonblock) else {
            return Ok(());
        };
        for entry in fs::read_dir(&self.directory)? {
            let entry = entry?;
            if entry.file_name() != LOCK && entry.metadata()?.nlink() == 1 {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
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
    fn a_sweep_removes_only_content_without_users() {
        let dir = tempfile::tempdir().unwrap();
        let store = ContentStore::new(dir.path());
        let hold = store.hold().unwrap();
        let [used, unused] = ["used", "unused"].map(|text| add(&store, &hold, text));
        let user = dir.path().join("user");
        store.link(&hold, &used, &user).unwrap();
        // The same content again changes nothing for its user.
        assert_eq!(add(&store, &hold, "used"), used);
        store.sweep().unwrap();
        assert!(store.path(&unused).exists(), "a hold prevents the sweep");
        drop(hold);
        store.sweep().unwrap();
        assert!(store.path(&used).exists() && !store.path(&unused).exists());
        assert_eq!(fs::read_to_string(&user).unwrap(), "used");
        fs::remove_file(&user).unwrap();
        store.sweep().unwrap();
        assert!(!store.path(&used).exists());
    }

    #[test]
    fn content_that_was_not_written_whole_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let store = ContentStore::new(dir.path());
        let hold = store.hold().unwrap();
        let failed = store.add(&hold, |_| Err(io::Error::other("no")));
        assert!(failed.is_err());
        let names = fs::read_dir(&store.directory).unwrap();
        assert_eq!(names.count(), 1, "only the lock");
    }
}

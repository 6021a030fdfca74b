//! The directory of a deployment: disks and logs of its instances, removed when the
//! deployment ends, and swept when its owner died.
//!
//! A directory is made under another name and gets its own when it is locked, and it is
//! renamed again before it is emptied. So a directory under its own name whose lock is
//! free belongs to a process that died.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};

use crate::digest::hex;

/// Held with `flock` while the deployment lives: the kernel releases it whatever ends
/// the owner.
const LOCK: &str = "lock";
/// Id of the host agent that made the directory.
const OWNER: &str = "owner";
/// Present in a directory that stays when the deployment has ended.
const KEEP: &str = "keep";
/// Present in a directory whose guests outlive the host agent.
const DURABLE: &str = "durable";
/// Names of directories that are being made begin so.
const NEW: &str = ".new-";
/// Names of directories that are being removed begin so.
const GONE: &str = ".gone-";

/// A directory that was being made this long ago never got its name.
const ABANDONED: Duration = Duration::from_mins(1);

/// What happens to a deployment's directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retention {
    /// Removed when the deployment ends or its owner dies.
    Ephemeral,
    /// Stays for somebody to look at.
    Kept,
    /// Guests outlive the owner, and another process adopts them: removed only when the
    /// deployment is.
    Durable,
}

/// A deployment's directory, in use.
#[derive(Debug)]
pub struct DeploymentDir {
    id: String,
    path: PathBuf,
    retention: Retention,
    _lock: Flock<File>,
}

/// A random id of a deployment or a host agent: 32 hexadecimal digits.
pub fn random_id() -> io::Result<String> {
    let mut random = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut random)?;
    Ok(hex(&random))
}

impl DeploymentDir {
    /// Makes the directory of deployment `id` for the host agent `owner`.
    pub fn create(
        data_dir: &Path,
        id: &str,
        owner: &str,
        retention: Retention,
    ) -> io::Result<Self> {
        let parent = data_dir.join("deployments");
        let unnamed = parent.join(format!("{NEW}{id}"));
        make(&unnamed)?;
        let lock = lock_file(&unnamed)?;
        let lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock)
            .map_err(|(_, errno)| io::Error::from(errno))?;
        fs::write(unnamed.join(OWNER), owner)?;
        match retention {
            Retention::Ephemeral => {}
            Retention::Kept => fs::write(unnamed.join(KEEP), b"")?,
            Retention::Durable => fs::write(unnamed.join(DURABLE), b"")?,
        }
        let path = parent.join(id);
        fs::rename(&unnamed, &path)?;
        Ok(Self {
            id: id.to_owned(),
            path,
            retention,
            _lock: lock,
        })
    }

    /// 32 hexadecimal digits.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What happens to it.
    pub const fn retention(&self) -> Retention {
        self.retention
    }

    /// Directory of one instance, made if it does not exist.
    pub fn instance(&self, name: &str) -> io::Result<PathBuf> {
        let path = self.path.join(name);
        make(&path)?;
        Ok(path)
    }

    /// Names of the instances that have a directory.
    pub fn instances(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                names.push(entry.file_name().to_string_lossy().into_owned());
            }
        }
        names.sort();
        Ok(names)
    }

    /// The deployment has ended: removes the directory unless it is kept. Blocking.
    pub fn remove(mut self) -> io::Result<()> {
        if self.retention == Retention::Kept {
            return Ok(());
        }
        self.retention = Retention::Kept;
        remove(&self.path)
    }
}

impl Drop for DeploymentDir {
    fn drop(&mut self) {
        if self.retention == Retention::Ephemeral {
            // The next start sweeps what cannot be removed now.
            let _ = remove(&self.path);
        }
    }
}

/// What of dead deployments could not be removed.
#[derive(Debug, thiserror::Error)]
#[error("cannot remove what a deployment left in {}", path.display())]
pub struct SweepError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// Removes the directories of ephemeral deployments whose owner is gone.
///
/// # Errors
/// The first directory that could not be removed; the others are removed all the same.
pub fn sweep(data_dir: &Path) -> Result<(), SweepError> {
    let failed = |path: &Path, source| SweepError {
        path: path.to_owned(),
        source,
    };
    let directory = data_dir.join("deployments");
    let mut first = Ok(());
    let found = list(&directory).map_err(|error| failed(&directory, error))?;
    for path in found {
        let removed = remove_if_dead(&path).map_err(|error| failed(&path, error));
        first = first.and(removed);
    }
    first
}

/// Whether `data_dir` has no directory left that the host agent `owner` made and that is
/// to be removed.
pub fn is_clean(data_dir: &Path, owner: &str) -> bool {
    let found = list(&data_dir.join("deployments")).unwrap_or_default();
    found.iter().all(|path| {
        let name = file_name(path);
        if name.starts_with(GONE) {
            return false;
        }
        let of_owner = fs::read_to_string(path.join(OWNER)).is_ok_and(|found| found == owner);
        !of_owner || retention(path) != Retention::Ephemeral
    })
}

/// Whether `data_dir` has a durable deployment of the host agent `owner`, whose guests
/// outlive it.
pub fn has_durable(data_dir: &Path, owner: &str) -> bool {
    let found = list(&data_dir.join("deployments")).unwrap_or_default();
    found.iter().any(|path| {
        let of_owner = fs::read_to_string(path.join(OWNER)).is_ok_and(|found| found == owner);
        of_owner && retention(path) == Retention::Durable
    })
}

/// Takes over the durable deployments that no process owns, for `owner`.
pub fn take_durable(data_dir: &Path, owner: &str) -> io::Result<Vec<DeploymentDir>> {
    let mut taken = Vec::new();
    for path in list(&data_dir.join("deployments"))? {
        let id = file_name(&path);
        if id.starts_with('.') || retention(&path) != Retention::Durable {
            continue;
        }
        let lock = lock_file(&path)?;
        // Held: another host agent runs the deployment.
        let Ok(lock) = Flock::lock(lock, FlockArg::LockExclusiveNonblock) else {
            continue;
        };
        fs::write(path.join(OWNER), owner)?;
        taken.push(DeploymentDir {
            id,
            path,
            retention: Retention::Durable,
            _lock: lock,
        });
    }
    taken.sort_by(|a, b| a.id.cmp(&b.id));
    Ok(taken)
}

fn remove_if_dead(path: &Path) -> io::Result<()> {
    let name = file_name(path);
    if name.starts_with(GONE) || (name.starts_with(NEW) && is_abandoned(path)) {
        return fs::remove_dir_all(path);
    }
    if name.starts_with('.') || retention(path) != Retention::Ephemeral {
        return Ok(());
    }
    let Ok(_lock) = Flock::lock(lock_file(path)?, FlockArg::LockExclusiveNonblock) else {
        return Ok(());
    };
    remove(path)
}

/// Renames the directory, so that it is known to be unused, and removes it.
fn remove(path: &Path) -> io::Result<()> {
    let gone = path.with_file_name(format!("{GONE}{}", file_name(path)));
    fs::rename(path, &gone)?;
    fs::remove_dir_all(&gone)
}

fn retention(path: &Path) -> Retention {
    if path.join(KEEP).exists() {
        Retention::Kept
    } else if path.join(DURABLE).exists() {
        Retention::Durable
    } else {
        Retention::Ephemeral
    }
}

/// A clock that was set back only delays the sweep.
fn is_abandoned(path: &Path) -> bool {
    let changed = fs::metadata(path).and_then(|metadata| metadata.modified());
    changed.is_ok_and(|time| time.elapsed().is_ok_and(|age| age > ABANDONED))
}

fn list(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    entries.map(|entry| Ok(entry?.path())).collect()
}

fn file_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// The first digits of an id: enough to tell deployments apart, for people and paths.
pub fn short_id(id: &str) -> &str {
    id.get(..8).unwrap_or(id)
}

fn make(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

fn lock_file(dir: &Path) -> io::Result<File> {
    OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(dir.join(LOCK))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::SystemTime;

    fn create(data_dir: &Path, retention: Retention) -> DeploymentDir {
        let id = random_id().unwrap();
        DeploymentDir::create(data_dir, &id, "me", retention).unwrap()
    }

    #[test]
    fn a_sweep_removes_only_ephemeral_deployments_of_the_dead() {
        let dir = tempfile::tempdir().unwrap();
        let live = create(dir.path(), Retention::Ephemeral);
        assert_eq!(live.id().len(), 32);
        let dead = dir.path().join("deployments/dead");
        fs::create_dir_all(dead.join("Role_IN_0")).unwrap();
        fs::write(dead.join(OWNER), "me").unwrap();
        assert!(!is_clean(dir.path(), "me") && is_clean(dir.path(), "other"));
        sweep(dir.path()).unwrap();
        assert!(live.path().exists() && !dead.exists());
        let path = live.path().to_owned();
        drop(live);
        assert!(!path.exists() && is_clean(dir.path(), "me"));
        for retention in [Retention::Kept, Retention::Durable] {
            let path = create(dir.path(), retention).path().to_owned();
            assert_eq!(
                has_durable(dir.path(), "me"),
                retention == Retention::Durable
            );
            sweep(dir.path()).unwrap();
            assert!(path.exists() && is_clean(dir.path(), "me"));
        }
    }

    #[test]
    fn an_interrupted_creation_or_removal_is_finished_by_a_sweep() {
        let dir = tempfile::tempdir().unwrap();
        let deployments = dir.path().join("deployments");
        let [gone, fresh, old] = [".gone-a", ".new-b", ".new-c"].map(|name| {
            let path = deployments.join(name);
            fs::create_dir_all(path.join("Role_IN_0")).unwrap();
            path
        });
        let before = SystemTime::now() - 2 * ABANDONED;
        File::open(&old).unwrap().set_modified(before).unwrap();
        assert!(!is_clean(dir.path(), "me"));
        sweep(dir.path()).unwrap();
        assert!(!gone.exists() && fresh.exists() && !old.exists());
    }

    #[test]
    fn a_durable_deployment_is_taken_by_one_owner_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let first = create(dir.path(), Retention::Durable);
        first.instance("A_IN_0").unwrap();
        assert!(take_durable(dir.path(), "other").unwrap().is_empty());
        let id = first.id().to_owned();
        drop(first);
        let mut taken = take_durable(dir.path(), "other").unwrap();
        let taken = taken.pop().unwrap();
        assert_eq!((taken.id(), taken.retention()), (&*id, Retention::Durable));
        assert_eq!(taken.instances().unwrap(), ["A_IN_0"]);
        let path = taken.path().to_owned();
        taken.remove().unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn a_directory_that_cannot_be_removed_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let deployments = dir.path().join("deployments");
        let name = |number: u32| deployments.join(format!("{number:032x}"));
        // The file system decides in which order a directory is read.
        for number in (0..16).filter(|number| *number != 8) {
            fs::create_dir_all(name(number)).unwrap();
        }
        File::create(name(8)).unwrap();
        let error = sweep(dir.path()).unwrap_err().to_string();
        assert!(error.contains(&*name(8).to_string_lossy()), "{error}");
        let left: Vec<_> = fs::read_dir(&deployments).unwrap().flatten().collect();
        assert_eq!(left.len(), 1);
    }
}

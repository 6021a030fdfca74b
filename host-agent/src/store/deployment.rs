//! The directory of a deployment: disks and logs of its instances.
//!
//! A directory is created under another name and gets its own when its owner has locked
//! it, and it is renamed again before it is emptied. So a directory under its own name
//! whose lock is free belongs to a process that died.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use serde::Deserialize;

use crate::digest::hex;

/// Directory of all deployments, in the data directory.
const PARENT: &str = "deployments";
/// Held with `flock` while the owner lives: the kernel releases it whatever ends the owner.
const LOCK: &str = "lock";
/// Id of the host agent that created the directory.
const OWNER: &str = "owner";
/// Present in a directory that stays when the deployment has ended.
const KEEP: &str = "keep";
/// Present in a directory whose guests outlive the host agent.
const DURABLE: &str = "durable";
/// Record of an instance, in its directory.
const RECORD: &str = "instance.json";
/// Prefix of directories that are being created.
const NEW: &str = ".new-";
/// Prefix of directories that are being removed.
const GONE: &str = ".gone-";

/// Age of a directory with the prefix [`NEW`] and without an owner whose creator has died.
const ABANDONED: Duration = Duration::from_mins(1);

/// What happens to a deployment's directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retention {
    /// Removed when the deployment ends or its owner dies.
    Ephemeral,
    /// Never removed, so that its disks and logs can be examined.
    Kept,
    /// Removed when the deployment ends. If the owner dies, the guests run on and another
    /// process adopts them.
    Durable,
}

/// A deployment's directory, in use. Drop removes it unless [`DeploymentDir::retain`] was
/// called; the Drop blocks.
#[derive(Debug)]
pub struct DeploymentDir {
    id: String,
    path: PathBuf,
    /// Set when the deployment is complete.
    retention: OnceLock<Retention>,
    _lock: Flock<File>,
}

/// Directory of deployment `id`.
pub fn directory(data_dir: &Path, id: &str) -> PathBuf {
    data_dir.join(PARENT).join(id)
}

/// A random id of a deployment or a host agent: 32 hexadecimal digits.
pub fn random_id() -> io::Result<String> {
    let mut random = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut random)?;
    Ok(hex(&random))
}

impl DeploymentDir {
    /// Creates the directory of deployment `id` for the host agent `owner`. Blocking.
    pub fn create(data_dir: &Path, id: &str, owner: &str) -> io::Result<Self> {
        let parent = data_dir.join(PARENT);
        make(&parent)?;
        let unnamed = tempfile::Builder::new()
            .prefix(NEW)
            .permissions(Permissions::from_mode(0o700))
            .tempdir_in(&parent)?;
        let lock = Flock::lock(lock_file(unnamed.path())?, FlockArg::LockExclusiveNonblock)
            .map_err(|(_, errno)| io::Error::from(errno))?;
        fs::write(unnamed.path().join(OWNER), owner)?;
        let path = parent.join(id);
        fs::rename(unnamed.path(), &path)?;
        // The name of the temporary directory no longer exists.
        let _ = unnamed.keep();
        Ok(Self {
            id: id.to_owned(),
            path,
            retention: OnceLock::new(),
            _lock: lock,
        })
    }

    /// Takes over the directory of a durable deployment. `None` if another host agent has
    /// it or has removed it. Blocking.
    pub fn adopt(path: &Path) -> io::Result<Option<Self>> {
        let lock = match lock_file(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        let Ok(lock) = Flock::lock(lock, FlockArg::LockExclusiveNonblock) else {
            return Ok(None);
        };
        // It may have been removed before its owner released the lock.
        if retention(path) != Retention::Durable {
            return Ok(None);
        }
        Ok(Some(Self {
            id: file_name(path),
            path: path.to_owned(),
            retention: Retention::Durable.into(),
            _lock: lock,
        }))
    }

    /// The deployment is complete: from now on `retention` applies. Blocking.
    pub fn retain(&self, retention: Retention) -> io::Result<()> {
        match retention {
            Retention::Ephemeral => {}
            Retention::Kept => fs::write(self.path.join(KEEP), b"")?,
            Retention::Durable => fs::write(self.path.join(DURABLE), b"")?,
        }
        self.retention.get_or_init(|| retention);
        Ok(())
    }

    /// 32 hexadecimal digits.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Creates the directory of an instance if it does not exist. Blocking.
    pub fn instance(&self, name: &str) -> io::Result<PathBuf> {
        let path = self.path.join(name);
        make(&path)?;
        Ok(path)
    }

    /// Directories of the instances. Blocking.
    pub fn instances(&self) -> io::Result<Vec<PathBuf>> {
        let mut found = list(&self.path)?;
        found.retain(|path| path.is_dir());
        Ok(found)
    }

    /// Removes the directory of an instance, if it exists. A part of it that is left by a
    /// process that dies is no instance, and the next start removes it. Blocking.
    pub fn remove_instance(&self, name: &str) -> io::Result<()> {
        let unused = format!("{GONE}{}.{name}", self.id);
        let unused = self.path.with_file_name(unused);
        gone(fs::remove_dir_all(&unused))?;
        gone(fs::rename(self.path.join(name), &unused).and_then(|()| fs::remove_dir_all(&unused)))
    }

    /// Removes the directory unless it is kept. Blocking.
    pub fn remove(&self) -> io::Result<()> {
        match self.retention.get() {
            Some(Retention::Kept) => Ok(()),
            _ => remove(&self.path),
        }
    }
}

impl Drop for DeploymentDir {
    fn drop(&mut self) {
        if matches!(self.retention.get(), None | Some(Retention::Ephemeral)) {
            // The next start sweeps what cannot be removed now.
            let _ = remove(&self.path);
        }
    }
}

/// A directory that could not be removed.
#[derive(Debug, thiserror::Error)]
#[error("cannot remove what a deployment left in {}", path.display())]
pub struct SweepError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// Removes the directories of ephemeral deployments whose owner has died. Blocking.
///
/// # Errors
/// The first directory that could not be removed. The others are removed all the same.
pub fn sweep(data_dir: &Path) -> Result<(), SweepError> {
    let failed = |path: &Path, source| SweepError {
        path: path.to_owned(),
        source,
    };
    let directory = data_dir.join(PARENT);
    let found = list(&directory).map_err(|error| failed(&directory, error))?;
    let removed = found
        .iter()
        .map(|path| remove_if_dead(path).map_err(|error| failed(path, error)));
    removed.fold(Ok(()), Result::and)
}

/// Whether every ephemeral directory of the host agent `owner` is removed. Blocking.
pub fn is_clean(data_dir: &Path, owner: &str) -> bool {
    let found = list(&data_dir.join(PARENT)).unwrap_or_default();
    found.iter().all(|path| {
        if file_name(path).starts_with(GONE) {
            return false;
        }
        let of_owner = fs::read_to_string(path.join(OWNER)).is_ok_and(|found| found == owner);
        !of_owner || retention(path) != Retention::Ephemeral
    })
}

/// Directories of the durable deployments. Blocking.
pub fn durable(data_dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = list(&data_dir.join(PARENT))?;
    found.retain(|path| !file_name(path).starts_with('.') && retention(path) == Retention::Durable);
    Ok(found)
}

/// Directories of ephemeral deployments whose owner has died. Blocking.
pub fn dead(data_dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut dead = Vec::new();
    for path in list(&data_dir.join(PARENT))? {
        if file_name(&path).starts_with(GONE) || lock_if_dead(&path)?.is_some() {
            dead.push(path);
        }
    }
    Ok(dead)
}

/// Names of the images whose bases the disks of deployments stand on. Blocking.
pub fn images(data_dir: &Path) -> io::Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for deployment in list(&data_dir.join(PARENT))? {
        for instance in list(&deployment).unwrap_or_default() {
            // What cannot be read was never started, or is just being removed.
            let record = fs::read(instance.join(RECORD)).unwrap_or_default();
            if let Ok(record) = serde_json::from_slice::<ImageOfRecord>(&record) {
                names.insert(record.spec.image.name);
            }
        }
    }
    Ok(names)
}

/// The part of an instance's record that names its image.
#[derive(Deserialize)]
struct ImageOfRecord {
    spec: ImageOfSpec,
}

#[derive(Deserialize)]
struct ImageOfSpec {
    image: ImageName,
}

#[derive(Deserialize)]
struct ImageName {
    name: String,
}

/// Removes the directory of an ephemeral deployment whose owner has died. Blocking.
pub fn remove_if_dead(path: &Path) -> io::Result<()> {
    if file_name(path).starts_with(GONE) {
        return gone(fs::remove_dir_all(path));
    }
    match lock_if_dead(path)? {
        Some(_lock) => remove(path),
        None => Ok(()),
    }
}

/// The lock of an ephemeral deployment's directory, if its owner has died.
fn lock_if_dead(path: &Path) -> io::Result<Option<Flock<File>>> {
    let name = file_name(path);
    let dead = if name.starts_with(NEW) {
        // Its creator writes the owner when it has the lock.
        path.join(OWNER).exists() || is_abandoned(path)
    } else {
        !name.starts_with('.') && retention(path) == Retention::Ephemeral
    };
    if !dead {
        return Ok(None);
    }
    let lock = match lock_file(path) {
        // Its owner has renamed it.
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    let Ok(lock) = Flock::lock(lock, FlockArg::LockExclusiveNonblock) else {
        return Ok(None);
    };
    // Its owner may have made it durable before it died.
    let durable = !name.starts_with(NEW) && retention(path) != Retention::Ephemeral;
    Ok((!durable).then_some(lock))
}

/// Renames the directory, so that it is known to be unused, and removes it.
fn remove(path: &Path) -> io::Result<()> {
    let unused = path.with_file_name(format!("{GONE}{}", file_name(path)));
    gone(fs::rename(path, &unused).and_then(|()| fs::remove_dir_all(&unused)))
}

/// Several processes may remove the same directory: then it is gone all the same.
fn gone(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
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

/// Sorted entries of a directory; none if it does not exist.
fn list(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut paths: Vec<_> = entries
        .map(|entry| Ok(entry?.path()))
        .collect::<io::Result<_>>()?;
    paths.sort();
    Ok(paths)
}

fn file_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// The first digits of an id, which distinguish deployments in names and output.
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
        let dir = DeploymentDir::create(data_dir, &id, "me").unwrap();
        dir.retain(retention).unwrap();
        dir
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
            sweep(dir.path()).unwrap();
            assert!(path.exists() && is_clean(dir.path(), "me"));
        }
        assert_eq!(durable(dir.path()).unwrap().len(), 1);
    }

    #[test]
    fn an_interrupted_creation_or_removal_is_finished_by_a_sweep() {
        let dir = tempfile::tempdir().unwrap();
        let deployments = dir.path().join("deployments");
        let [gone, fresh, old, owned] = [".gone-a", ".new-b", ".new-c", ".new-d"].map(|name| {
            let path = deployments.join(name);
            fs::create_dir_all(path.join("Role_IN_0")).unwrap();
            path
        });
        let before = SystemTime::now() - 2 * ABANDONED;
        File::open(&old).unwrap().set_modified(before).unwrap();
        fs::write(owned.join(OWNER), "me").unwrap();
        assert!(!is_clean(dir.path(), "me"));
        sweep(dir.path()).unwrap();
        assert!(!gone.exists() && fresh.exists() && !old.exists() && !owned.exists());
    }

    #[test]
    fn a_directory_that_cannot_be_created_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let live = create(dir.path(), Retention::Durable);
        assert!(DeploymentDir::create(dir.path(), live.id(), "me").is_err());
        assert_eq!(
            list(&dir.path().join("deployments")).unwrap(),
            [live.path()]
        );
    }

    #[test]
    fn a_removal_by_two_processes_is_no_error() {
        let dir = tempfile::tempdir().unwrap();
        let live = create(dir.path(), Retention::Ephemeral);
        fs::remove_dir_all(live.path()).unwrap();
        live.remove().unwrap();
        remove_if_dead(live.path()).unwrap();
        remove_if_dead(&live.path().with_file_name(".gone-a")).unwrap();
    }

    #[test]
    fn a_durable_deployment_is_taken_by_one_owner_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let first = create(dir.path(), Retention::Durable);
        let instance = first.instance("A_IN_0").unwrap();
        let (id, path) = (first.id().to_owned(), first.path().to_owned());
        assert!(DeploymentDir::adopt(&path).unwrap().is_none());
        drop(first);
        let second = DeploymentDir::adopt(&path).unwrap().unwrap();
        assert_eq!(second.id(), id);
        assert_eq!(second.instances().unwrap(), [instance]);
        second.remove().unwrap();
        assert!(DeploymentDir::adopt(&path).unwrap().is_none());
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

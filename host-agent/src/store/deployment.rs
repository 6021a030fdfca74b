//! The directory of a deployment: disks and logs of its instances, removed
//! when the deployment ends, and swept when its owner died.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};

use crate::digest::hex;

/// Held with `flock` while the deployment lives: the kernel lets go of it
/// whatever ends the owner.
const LOCK: &str = "lock";
/// Present in a directory that its owner wants kept.
const KEEP: &str = "keep";

/// A directory without a lock that did not change for this long is nobody's.
const SETTLED: Duration = Duration::from_mins(1);

/// A deployment's directory, in use.
#[derive(Debug)]
pub struct DeploymentDir {
    id: String,
    path: PathBuf,
    keep: bool,
    _lock: Flock<File>,
}

impl DeploymentDir {
    /// Makes the directory of a new deployment with a random id.
    pub fn create(data_dir: &Path, keep: bool) -> io::Result<Self> {
        let mut random = [0; 16];
        File::open("/dev/urandom")?.read_exact(&mut random)?;
        let id = hex(&random);
        let path = data_dir.join("deployments").join(&id);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&path)?;
        let lock = lock_file(&path)?;
        let lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock)
            .map_err(|(_, errno)| io::Error::from(errno))?;
        if keep {
            fs::write(path.join(KEEP), b"")?;
        }
        Ok(Self {
            id,
            path,
            keep,
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

    /// Directory of one instance, made if it is not there.
    pub fn instance(&self, name: &str) -> io::Result<PathBuf> {
        let path = self.path.join(name);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&path)?;
        Ok(path)
    }
}

impl Drop for DeploymentDir {
    fn drop(&mut self) {
        if !self.keep {
            // What cannot be removed now is swept by the next start.
            let _ = fs::remove_dir_all(&self.path);
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

/// Removes the directories of deployments whose owner is gone and who were
/// not to be kept.
///
/// # Errors
/// The first that could not be removed; it keeps no other.
pub fn sweep(data_dir: &Path) -> Result<(), SweepError> {
    let directory = data_dir.join("deployments");
    let failed = |path: &Path, source| SweepError {
        path: path.to_owned(),
        source,
    };
    let entries = match fs::read_dir(&directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(|error| failed(&directory, error))?,
    };
    let mut first = Ok(());
    for entry in entries {
        let removed = match entry {
            Ok(entry) => {
                let path = entry.path();
                let removed = remove_if_dead(&path, forgotten(&path));
                removed.map_err(|error| failed(&path, error))
            }
            Err(error) => Err(failed(&directory, error)),
        };
        first = first.and(removed.map(drop));
    }
    first
}

/// Removes a deployment's directory if its owner is gone and it was not to be
/// kept; whether there is nothing left to do. One without a lock is being made
/// or removed, unless its owner is known to be `gone`.
pub fn remove_if_dead(path: &Path, gone: bool) -> io::Result<bool> {
    if path.join(KEEP).exists() {
        return Ok(true);
    }
    if !gone && !path.join(LOCK).exists() {
        return Ok(false);
    }
    let Ok(lock) = Flock::lock(lock_file(path)?, FlockArg::LockExclusiveNonblock) else {
        return Ok(false);
    };
    fs::remove_dir_all(path)?;
    drop(lock);
    Ok(true)
}

/// Whether nothing was made or removed in the directory for a while.
fn forgotten(path: &Path) -> bool {
    let changed = fs::metadata(path).and_then(|metadata| metadata.modified());
    // A clock that was set back only puts the sweep off.
    changed.is_ok_and(|time| time.elapsed().is_ok_and(|age| age > SETTLED))
}

/// The first digits of the id of the deployment in `directory`.
pub fn short_id(directory: &Path) -> String {
    let name = directory.file_name().unwrap_or_default().to_string_lossy();
    name.chars().take(8).collect()
}

/// Name of the socket of the deployment in `directory`, in the run-time directory.
pub fn socket_name(directory: &Path) -> String {
    format!("{}.sock", short_id(directory))
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

    #[test]
    fn a_live_deployment_survives_a_sweep_and_a_dead_or_ended_one_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let live = DeploymentDir::create(dir.path(), false).unwrap();
        assert_eq!(live.id().len(), 32);
        let dead = dir.path().join("deployments/dead");
        fs::create_dir_all(dead.join("Role_IN_0")).unwrap();
        fs::write(dead.join(LOCK), b"").unwrap();
        sweep(dir.path()).unwrap();
        assert!(live.path().exists() && !dead.exists());
        let path = live.path().to_owned();
        drop(live);
        assert!(!path.exists());
        let kept = DeploymentDir::create(dir.path(), true).unwrap();
        let path = kept.path().to_owned();
        drop(kept);
        sweep(dir.path()).unwrap();
        assert!(path.exists());
    }

    #[test]
    fn one_that_cannot_be_removed_is_named_and_keeps_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let deployments = dir.path().join("deployments");
        let name = |number: u32| deployments.join(format!("{number:032x}"));
        // The order in which a directory is read is the file system's.
        for number in (0..16).filter(|number| *number != 8) {
            fs::create_dir_all(name(number)).unwrap();
            fs::write(name(number).join(LOCK), b"").unwrap();
        }
        // What is no directory and has been there for long.
        let file = File::create(name(8)).unwrap();
        file.set_modified(SystemTime::now() - 2 * SETTLED).unwrap();
        let error = sweep(dir.path()).unwrap_err().to_string();
        assert!(error.contains(&*name(8).to_string_lossy()), "{error}");
        let left: Vec<_> = fs::read_dir(&deployments).unwrap().flatten().collect();
        assert_eq!(left.len(), 1);
    }
}

//! Guest-agent packages: each a file named by its SHA-256; what is offered and what failed is
//! in the database of the services. All calls block.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rusqlite::{Row, params};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use vmbus::agent_signature::{CheckError, Checked, KeyError, MAX_KEY, TrustedKeys, check};

use super::database::StoreError;
use super::services::{ServiceStore, digest, now_ms, signed, unsigned};
use crate::digest::Digest;

/// The files of a host's guest agents.
#[derive(Debug, Clone)]
pub struct AgentPackages {
    directory: PathBuf,
    keys: PathBuf,
}

/// A package that is being written. Drop removes it.
#[derive(Debug)]
pub struct PartialAgent {
    directory: PathBuf,
    file: tempfile::NamedTempFile,
}

/// Why a package is not on this host, or not to be offered.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// It was not uploaded.
    #[error("guest-agent package {0} is not on this host")]
    Missing(String),
    /// It is another one.
    #[error("the guest-agent package has SHA-256 {found}, not {wanted}")]
    Digest {
        /// Of what arrived.
        found: String,
        /// Of what was named.
        wanted: String,
    },
    /// Nobody may sign packages.
    #[error("no public key is trusted: put files .pub of minisign into {}", .0.display())]
    NoKeys(PathBuf),
    /// A file of the trusted keys.
    #[error("trusted key {}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: KeyError,
    },
    /// It is not what it should be.
    #[error("the guest-agent package is refused")]
    Refused(#[from] CheckError),
    /// An older one than that which is offered, and not by name.
    #[error(
        "guest agent {version} is not newer than {offered}, which is offered: allow the downgrade"
    )]
    Downgrade {
        /// The version.
        version: String,
        /// The version that is offered.
        offered: String,
    },
    /// The file system.
    #[error("cannot use {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The texts of the trusted keys, and the keys.
#[derive(Debug, Clone, Default)]
pub struct Keys {
    /// As in the files.
    pub texts: Vec<String>,
    /// Parsed.
    pub trusted: TrustedKeys,
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> AgentError {
    let path = path.to_owned();
    move |source| AgentError::Io { path, source }
}

impl AgentPackages {
    /// In `data_dir`.
    pub fn new(data_dir: &Path) -> Self {
        Self {
            directory: data_dir.join("agents"),
            keys: data_dir.join("agent-keys"),
        }
    }

    /// Where a package is.
    pub fn path(&self, digest: &Digest) -> PathBuf {
        self.directory.join(format!("{}.agent", digest.hex()))
    }

    /// The keys that are trusted now: each file `.pub` in `agent-keys` of the data directory.
    pub fn keys(&self) -> Result<Keys, AgentError> {
        let mut paths = Vec::new();
        match fs::read_dir(&self.keys) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => {
                for entry in other.map_err(failed(&self.keys))? {
                    paths.push(entry.map_err(failed(&self.keys))?.path());
                }
            }
        }
        paths.retain(|path| path.extension().is_some_and(|it| it == "pub"));
        paths.sort();
        let mut texts = Vec::new();
        for path in paths {
            let mut text = String::new();
            let file = File::open(&path).map_err(failed(&path))?;
            // One byte more than the longest shows that it is longer.
            let read = file.take(MAX_KEY as u64 + 1).read_to_string(&mut text);
            read.map_err(failed(&path))?;
            TrustedKeys::parse(&[&text]).map_err(|source| AgentError::Key { path, source })?;
            texts.push(text);
        }
        let trusted = TrustedKeys::parse(&texts).map_err(|source| AgentError::Key {
            path: self.keys.clone(),
            source,
        })?;
        Ok(Keys { texts, trusted })
    }

    /// Begins a package.
    pub fn begin(&self) -> io::Result<PartialAgent> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.directory)?;
        let file = tempfile::Builder::new()
            .prefix(".partial-")
            .permissions(Permissions::from_mode(0o600))
            .tempfile_in(&self.directory)?;
        Ok(PartialAgent {
            directory: self.directory.clone(),
            file,
        })
    }

    /// The package, checked against its signature and the keys that are trusted now.
    pub fn open(&self, package: &Digest, signature: &str) -> Result<OpenAgent, AgentError> {
        let path = self.path(package);
        let mut file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(AgentError::Missing(package.hex()));
            }
            other => other.map_err(failed(&path))?,
        };
        let keys = self.keys()?;
        if keys.texts.is_empty() {
            return Err(AgentError::NoKeys(self.keys.clone()));
        }
        let length = file.metadata().map_err(failed(&path))?.len();
        let checked = check(&mut file, length, signature, &keys.trusted)?;
        if checked.sha256 != package.hex() {
            let (found, wanted) = (checked.sha256, package.hex());
            return Err(AgentError::Digest { found, wanted });
        }
        Ok(OpenAgent {
            file,
            length,
            checked,
            keys,
        })
    }

    /// Removes a package, if it is there.
    pub fn remove(&self, package: &Digest) -> io::Result<()> {
        match fs::remove_file(self.path(package)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    /// Removes packages that are not among `used`, and what a process that died was writing.
    /// No package may be begun meanwhile.
    pub fn sweep(&self, used: &[Digest]) -> io::Result<()> {
        let entries = match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other?,
        };
        let used: Vec<_> = used.iter().map(|it| self.path(it)).collect();
        for entry in entries {
            let path = entry?.path();
            if !used.contains(&path) {
                fs::remove_file(path)?;
            }
        }
        Ok(())
    }
}

/// A package that was checked.
#[derive(Debug)]
pub struct OpenAgent {
    /// The file that was checked.
    pub file: File,
    /// Its length.
    pub length: u64,
    /// What it is.
    pub checked: Checked,
    /// The keys that are trusted.
    pub keys: Keys,
}

impl PartialAgent {
    /// Appends bytes.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)
    }

    /// Gives the file its name if it is the package `wanted`. It is on disk then.
    pub fn finish(mut self, wanted: &Digest) -> Result<(), AgentError> {
        let directory = self.directory;
        let file = self.file.as_file_mut();
        let digested = io::Seek::rewind(file).and_then(|()| Digest::of(&mut *file));
        let (found, _) = digested.map_err(failed(&directory))?;
        if found != *wanted {
            let (found, wanted) = (found.hex(), wanted.hex());
            return Err(AgentError::Digest { found, wanted });
        }
        let synced = file
            .set_permissions(Permissions::from_mode(0o400))
            .and_then(|()| file.sync_all());
        synced.map_err(failed(&directory))?;
        let name = directory.join(format!("{}.agent", wanted.hex()));
        let named = self.file.persist(name).map_err(|error| error.error);
        named
            .and_then(|_| File::open(&directory)?.sync_all())
            .map_err(failed(&directory))
    }
}

/// A package that was published.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PublishedAgent {
    /// SHA-256 of the package.
    pub package: Digest,
    /// Its version.
    pub version: String,
    /// Whether it was withdrawn.
    pub withdrawn: bool,
    /// Whether guests take it though it is not newer than what they run.
    pub allow_downgrade: bool,
    /// Id of the user who published it.
    pub user: u32,
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
    /// Its signature.
    #[serde(skip)]
    pub signature: String,
}

/// A package that failed in a guest.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
pub struct AgentFailure {
    /// The deployment.
    pub deployment: String,
    /// The instance.
    pub instance: String,
    /// SHA-256 of the package.
    pub package: Digest,
    /// How it failed.
    pub reason: String,
}

impl ServiceStore {
    /// Every package that was published, the newest publication first.
    pub fn agents(&self) -> Result<Vec<PublishedAgent>, StoreError> {
        let sql = "SELECT digest, version, withdrawn, allow_downgrade, user, at_ms, signature \
                   FROM agent ORDER BY number DESC";
        let mut statement = self.0.connection.prepare(sql)?;
        let found = statement.query_map([], published)?;
        Ok(found.collect::<Result<_, _>>()?)
    }

    /// Publishes a package; one that was published before becomes the newest.
    pub fn publish_agent(&mut self, new: &PublishedAgent) -> Result<(), StoreError> {
        self.0.connection.execute(
            "INSERT OR REPLACE INTO agent \
             (digest, version, withdrawn, allow_downgrade, user, at_ms, signature) \
             VALUES (?1, ?2, 0, ?3, ?4, ?5, ?6)",
            params![
                new.package.hex(),
                new.version,
                new.allow_downgrade,
                new.user,
                signed(now_ms()),
                new.signature
            ],
        )?;
        Ok(())
    }

    /// Withdraws a package; whether there is one.
    pub fn withdraw_agent(&mut self, package: &Digest) -> Result<bool, StoreError> {
        let sql = "UPDATE agent SET withdrawn = 1 WHERE digest = ?1";
        let changed = self.0.connection.execute(sql, [package.hex()])?;
        Ok(changed > 0)
    }

    /// Records failures; those that are known already stay as they are.
    pub fn agents_failed(&mut self, failures: &[AgentFailure]) -> Result<(), StoreError> {
        let transaction = self.0.connection.transaction()?;
        for failure in failures {
            transaction.execute(
                "INSERT OR IGNORE INTO agent_failure VALUES (?1, ?2, ?3, ?4, ?5)",
                params![
                    failure.deployment,
                    failure.instance,
                    failure.package.hex(),
                    failure.reason,
                    signed(now_ms())
                ],
            )?;
        }
        Ok(transaction.commit()?)
    }

    /// Every failure in the guests of services.
    pub fn agent_failures(&self) -> Result<Vec<AgentFailure>, StoreError> {
        let sql = "SELECT deployment, instance, digest, reason FROM agent_failure \
                   WHERE deployment IN (SELECT deployment FROM service) \
                   ORDER BY deployment, instance, at_ms";
        let mut statement = self.0.connection.prepare(sql)?;
        let found = statement.query_map([], |row| {
            Ok(AgentFailure {
                deployment: row.get(0)?,
                instance: row.get(1)?,
                package: digest(row, 2)?,
                reason: row.get(3)?,
            })
        })?;
        Ok(found.collect::<Result<_, _>>()?)
    }

    /// Forgets failures in guests of deployments that are gone.
    pub fn forget_agent_failures(&mut self) -> Result<(), StoreError> {
        let sql = "DELETE FROM agent_failure WHERE deployment NOT IN \
                   (SELECT deployment FROM service WHERE deployment IS NOT NULL)";
        self.0.connection.execute(sql, [])?;
        Ok(())
    }
}

fn published(row: &Row<'_>) -> rusqlite::Result<PublishedAgent> {
    Ok(PublishedAgent {
        package: digest(row, 0)?,
        version: row.get(1)?,
        withdrawn: row.get(2)?,
        allow_downgrade: row.get(3)?,
        user: row.get(4)?,
        at_ms: unsigned(row, 5)?,
        signature: row.get(6)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn agent(text: &str, version: &str) -> PublishedAgent {
        PublishedAgent {
            package: Digest::of(text.as_bytes()).unwrap().0,
            version: version.into(),
            withdrawn: false,
            allow_downgrade: false,
            user: 7,
            at_ms: 0,
            signature: "s".into(),
        }
    }

    #[test]
    fn the_newest_publication_is_first_and_a_repeated_one_counts_once() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = ServiceStore::open(dir.path()).unwrap();
        let (one, two) = (agent("1", "1.0.0"), agent("2", "2.0.0"));
        store.publish_agent(&one).unwrap();
        store.publish_agent(&two).unwrap();
        assert!(store.withdraw_agent(&one.package).unwrap());
        store.publish_agent(&one).unwrap();
        let found = store.agents().unwrap();
        let found: Vec<_> = found
            .iter()
            .map(|it| (&*it.version, it.withdrawn))
            .collect();
        assert_eq!(found, [("1.0.0", false), ("2.0.0", false)]);
        assert!(!store.withdraw_agent(&agent("3", "3.0.0").package).unwrap());
    }

    #[test]
    fn a_failure_is_kept_as_long_as_its_deployment() {
        use crate::store::services::Wanted;
        let dir = tempfile::tempdir().unwrap();
        let mut store = ServiceStore::open(dir.path()).unwrap();
        let package = agent("1", "1.0.0").package;
        let wanted = Wanted {
            package,
            configuration: String::new(),
            publish: Vec::new(),
        };
        store.apply("shop", &wanted, 7).unwrap();
        store.deploying("shop", "d").unwrap();
        let failure = |deployment: &str, reason: &str| AgentFailure {
            deployment: deployment.into(),
            instance: "A_IN_0".into(),
            package,
            reason: reason.into(),
        };
        let all = [
            failure("d", "first"),
            failure("d", "second"),
            failure("gone", "x"),
        ];
        store.agents_failed(&all).unwrap();
        assert_eq!(store.agent_failures().unwrap(), all[..1]);
        store.forget_agent_failures().unwrap();
        drop(store);
        let store = ServiceStore::open(dir.path()).unwrap();
        assert_eq!(store.agent_failures().unwrap(), all[..1]);
    }
}

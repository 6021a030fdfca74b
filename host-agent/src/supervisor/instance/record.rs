//! The record of an instance on disk, from which another host agent adopts it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use super::super::lifecycle::RestartHistory;
use super::super::process::ProcessId;
use super::super::spec::InstanceSpec;

/// Name of the file in the instance's directory.
const FILE: &str = "instance.json";
/// Id of this boot of the host: process ids and monotonic times are only valid in it
/// (`random(4)`).
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Spec and history of an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceRecord {
    /// Its spec, with the newest goal.
    pub spec: InstanceSpec,
    /// Its boots so far.
    pub history: RestartHistory,
    /// The VMM process of the last boot, once it has been started.
    pub process: Option<ProcessId>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Stored {
    host_boot: String,
    #[serde(flatten)]
    record: InstanceRecord,
}

impl InstanceRecord {
    /// Reads the record in `dir`. If the host has booted since, no guest runs and the
    /// process is unknown. Blocking.
    pub fn read(dir: &Path) -> io::Result<Self> {
        let stored: Stored = serde_json::from_slice(&fs::read(dir.join(FILE))?)?;
        let mut record = stored.record;
        if stored.host_boot != fs::read_to_string(BOOT_ID)? {
            record.history = record.history.after_host_boot();
            record.process = None;
        }
        Ok(record)
    }

    /// Replaces the record in `dir` atomically. Blocking.
    pub fn write(&self, dir: &Path) -> io::Result<()> {
        let stored = Stored {
            host_boot: fs::read_to_string(BOOT_ID)?,
            record: self.clone(),
        };
        let file = tempfile::NamedTempFile::new_in(dir)?;
        serde_json::to_writer(file.as_file(), &stored)?;
        file.as_file().sync_all()?;
        file.persist(dir.join(FILE)).map_err(|error| error.error)?;
        Ok(())
    }
}

/// The records of one instance. Several threads write them; an older record never
/// replaces a newer one.
#[derive(Debug)]
pub(super) struct Records {
    dir: PathBuf,
    /// Number of the newest record on disk.
    written: Arc<Mutex<u64>>,
    number: u64,
    last: Option<InstanceRecord>,
}

/// A record that is to be written.
#[derive(Debug)]
pub(super) struct PendingRecord {
    dir: PathBuf,
    written: Arc<Mutex<u64>>,
    number: u64,
    record: InstanceRecord,
}

impl Records {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self {
            dir,
            written: Arc::default(),
            number: 0,
            last: None,
        }
    }

    /// The record to write, if it differs from the last one.
    pub(super) fn update(&mut self, record: InstanceRecord) -> Option<PendingRecord> {
        if self.last.as_ref() == Some(&record) {
            return None;
        }
        self.number += 1;
        self.last = Some(record.clone());
        Some(PendingRecord {
            dir: self.dir.clone(),
            written: Arc::clone(&self.written),
            number: self.number,
            record,
        })
    }
}

impl PendingRecord {
    /// Writes the record unless a newer one is written. Blocking.
    pub(super) fn write(&self) -> io::Result<()> {
        // A panic while the lock was held leaves the number of the record on disk.
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        if self.number > *written {
            self.record.write(&self.dir)?;
            *written = self.number;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::content::ContentStore;
    use crate::supervisor::guest::tests::{image, spec};

    fn record(dir: &Path) -> InstanceRecord {
        let content = ContentStore::new(dir);
        let image = image(dir);
        InstanceRecord {
            spec: spec(&content, &content.hold().unwrap(), &image),
            history: RestartHistory {
                generation: 3,
                running: true,
                ..RestartHistory::default()
            },
            process: None,
        }
    }

    #[test]
    fn an_older_record_never_replaces_a_newer_one() {
        let dir = tempfile::tempdir().unwrap();
        let mut records = Records::new(dir.path().to_owned());
        let mut record = record(dir.path());
        let first = records.update(record.clone()).unwrap();
        assert!(records.update(record.clone()).is_none());
        record.history.generation = 4;
        records.update(record.clone()).unwrap().write().unwrap();
        first.write().unwrap();
        assert_eq!(InstanceRecord::read(dir.path()).unwrap(), record);
    }

    #[test]
    fn a_reboot_of_the_host_forgets_the_process() {
        let dir = tempfile::tempdir().unwrap();
        let record = record(dir.path());
        record.write(dir.path()).unwrap();
        let path = dir.path().join(FILE);
        let boot = fs::read_to_string(BOOT_ID).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.replace(boot.trim_end(), "another boot")).unwrap();
        let found = InstanceRecord::read(dir.path()).unwrap();
        assert_eq!(found.spec, record.spec);
        assert_eq!(
            (found.history.generation, found.history.running),
            (3, false)
        );
    }
}

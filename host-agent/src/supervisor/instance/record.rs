//! What is kept of an instance on disk, so that another host agent can adopt it.

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

/// The kept state of an instance: what was asked for, and what its lifecycle decided.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceRecord {
    /// What it is.
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
    /// The record in `dir`. Of an earlier boot of the host it has what is still true.
    /// Blocking.
    pub fn read(dir: &Path) -> io::Result<Self> {
        let stored: Stored = serde_json::from_slice(&fs::read(dir.join(FILE))?)?;
        let mut record = stored.record;
        if stored.host_boot != fs::read_to_string(BOOT_ID)? {
            record.history = record.history.after_host_boot();
            record.process = None;
        }
        Ok(record)
    }

    /// Writes the record to `dir`: whole, or the one before it stays. Blocking.
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

/// Writes the records of one instance, from several threads: an older record never
/// replaces a newer one.
#[derive(Debug, Clone)]
pub struct Recorder(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    dir: PathBuf,
    written: Mutex<u64>,
}

impl Recorder {
    /// Records to `dir`.
    pub fn new(dir: PathBuf) -> Self {
        let written = Mutex::new(0);
        Self(Arc::new(Shared { dir, written }))
    }

    /// Writes `record` unless one with a higher `number` was written. Blocking.
    pub fn write(&self, number: u64, record: &InstanceRecord) -> io::Result<()> {
        // A panic in a write leaves the number of the record before it.
        let mut written = self
            .0
            .written
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if number > *written {
            record.write(&self.0.dir)?;
            *written = number;
        }
        Ok(())
    }
}

/// The records of one instance, as its actor sees them.
#[derive(Debug)]
pub(super) struct Records {
    recorder: Recorder,
    number: u64,
    last: Option<InstanceRecord>,
}

/// A record that is to be written.
#[derive(Debug)]
pub(super) struct PendingRecord {
    recorder: Recorder,
    number: u64,
    record: InstanceRecord,
}

impl Records {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self {
            recorder: Recorder::new(dir),
            number: 0,
            last: None,
        }
    }

    /// The record to write, if it is another one than the last.
    pub(super) fn update(&mut self, record: InstanceRecord) -> Option<PendingRecord> {
        if self.last.as_ref() == Some(&record) {
            return None;
        }
        self.number += 1;
        self.last = Some(record.clone());
        Some(PendingRecord {
            recorder: self.recorder.clone(),
            number: self.number,
            record,
        })
    }
}

impl PendingRecord {
    /// Writes it. Blocking.
    pub(super) fn write(&self) -> io::Result<()> {
        self.recorder.write(self.number, &self.record)
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

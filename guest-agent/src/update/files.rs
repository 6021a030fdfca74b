//! Installed guest agents as files of the OS disk, which the guest keeps over reboots. What is
//! written is on disk before it gets its name. All calls block.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use vmbus::agent_signature::{CheckError, Checked, TrustedKeys, check};

use super::is_private;
use super::slots::{Installed, Slots};

/// Name of the program in the directory of its package: the name of its process.
const PROGRAM: &str = "guest-agent";
/// What is installed.
const STATE: &str = "state.json";
/// Prefix of names that are not final.
const PARTIAL: &str = ".partial-";
/// Longest state: [`vmbus::message::MAX_BAD`] entries have a tenth of it.
const MAX_STATE: u64 = 1 << 20;
/// Bytes copied at once.
const BUFFER: usize = 64 * 1024;

/// The directory of installed guest agents.
#[derive(Debug, Clone)]
pub struct AgentFiles {
    directory: PathBuf,
}

/// Why something cannot be installed, found or recorded.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// A file.
    #[error("cannot {what} {}", path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The state is none.
    #[error("{} is damaged", path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// A program was changed after it was installed.
    #[error("the installed program was changed: {}", .0.display())]
    Changed(PathBuf),
    /// The package is refused.
    #[error("the package is refused")]
    Refused(#[from] CheckError),
    /// It is another package than that of the offer.
    #[error("the package has SHA-256 {found}, not {wanted}")]
    Digest {
        /// Of what arrived.
        found: String,
        /// Of what was offered.
        wanted: String,
    },
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FilesError {
    let path = path.to_owned();
    move |source| FilesError::File { what, path, source }
}

impl AgentFiles {
    /// In `directory`, which need not exist.
    pub fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    /// What is installed. Removes what an interrupted installation has left.
    pub fn load(&self) -> Result<Slots, FilesError> {
        let path = self.directory.join(STATE);
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Slots::default()),
            other => other.map_err(failed("open", &path))?,
        };
        let metadata = fs::symlink_metadata(&self.directory);
        metadata
            .and_then(|it| is_private(&it))
            .map_err(failed("trust", &self.directory))?;
        let mut bytes = Vec::new();
        let read = file.take(MAX_STATE).read_to_end(&mut bytes);
        read.map_err(failed("read", &path))?;
        let slots: Slots =
            serde_json::from_slice(&bytes).map_err(|source| FilesError::State { path, source })?;
        // What cannot be removed only takes space.
        let _ = self.sweep(&slots);
        Ok(slots)
    }

    /// Records what is installed: the whole old state or the whole new one, whenever the guest
    /// ends.
    pub fn save(&self, slots: &Slots) -> Result<(), FilesError> {
        self.make()?;
        let (path, new) = (self.directory.join(STATE), self.partial(STATE));
        let bytes = serde_json::to_vec(slots).expect("text and numbers are JSON");
        let written = create(&new, 0o600).and_then(|mut file| {
            file.write_all(&bytes)?;
            file.sync_all()
        });
        written.map_err(failed("write", &new))?;
        fs::rename(&new, &path).map_err(failed("replace", &path))?;
        self.sync()
    }

    /// A file for the bytes of package `sha256`.
    pub fn begin(&self, sha256: &str) -> Result<File, FilesError> {
        self.make()?;
        let path = self.partial(sha256);
        create(&path, 0o600).map_err(failed("create", &path))
    }

    /// Checks the package whose bytes are in `file`, which `begin` gave, and installs it.
    pub fn install(
        &self,
        mut file: File,
        sha256: &str,
        signature: &str,
        keys: &TrustedKeys,
    ) -> Result<Installed, FilesError> {
        let partial = self.partial(sha256);
        let result = self.install_from(&mut file, sha256, signature, keys);
        // The installed program is a file of its own.
        let _ = fs::remove_file(&partial);
        result
    }

    fn install_from(
        &self,
        file: &mut File,
        sha256: &str,
        signature: &str,
        keys: &TrustedKeys,
    ) -> Result<Installed, FilesError> {
        let partial = self.partial(sha256);
        let read = |error| failed("read", &partial)(error);
        file.rewind().map_err(read)?;
        let length = file
            .metadata()
            .map_err(|error| failed("read", &partial)(error))?
            .len();
        let Checked {
            head,
            program_at,
            sha256: found,
        } = check(file, length, signature, keys)?;
        if found != sha256 {
            let wanted = sha256.to_owned();
            return Err(FilesError::Digest { found, wanted });
        }
        let directory = self.directory.join(sha256);
        let new = self.directory.join(format!("{PARTIAL}{sha256}.d"));
        let copied = copy_program(file, program_at, &new);
        let program = copied.map_err(failed("install", &new))?;
        // Left by an installation whose record was not written.
        let _ = fs::remove_dir_all(&directory);
        fs::rename(&new, &directory).map_err(failed("install", &directory))?;
        self.sync()?;
        Ok(Installed {
            version: head.version,
            sha256: sha256.to_owned(),
            program,
            confirmed: false,
            starts: 0,
        })
    }

    /// The program of an installed package, whose bytes are those that were installed.
    pub fn find(&self, installed: &Installed) -> Result<PathBuf, FilesError> {
        let path = self.directory.join(&installed.sha256).join(PROGRAM);
        let mut file = File::open(&path).map_err(failed("open", &path))?;
        let digest = copy_digested(&mut file, &mut io::sink()).map_err(failed("read", &path))?;
        if digest != installed.program {
            return Err(FilesError::Changed(path));
        }
        Ok(path)
    }

    /// Removes everything that `slots` does not name.
    pub fn sweep(&self, slots: &Slots) -> io::Result<()> {
        let used = [&slots.current, &slots.previous];
        for entry in fs::read_dir(&self.directory)? {
            let entry = entry?;
            let name = entry.file_name();
            let is_used = |it: &&Option<Installed>| {
                it.as_ref()
                    .is_some_and(|it| name.to_str() == Some(&it.sha256))
            };
            if name == STATE || used.iter().any(is_used) {
                continue;
            }
            if entry.file_type()?.is_dir() {
                fs::remove_dir_all(entry.path())?;
            } else {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    fn make(&self) -> Result<(), FilesError> {
        let made = DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.directory);
        made.map_err(failed("create", &self.directory))
    }

    fn partial(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{PARTIAL}{name}"))
    }

    fn sync(&self) -> Result<(), FilesError> {
        let synced = File::open(&self.directory).and_then(|directory| directory.sync_all());
        synced.map_err(failed("sync", &self.directory))
    }
}

fn create(path: &Path, mode: u32) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(path)
}

/// Writes the program of a package to a new `directory`; its SHA-256.
fn copy_program(package: &mut File, at: u64, directory: &Path) -> io::Result<String> {
    if directory.exists() {
        fs::remove_dir_all(directory)?;
    }
    DirBuilder::new().mode(0o700).create(directory)?;
    package.seek(SeekFrom::Start(at))?;
    let mut program = create(&directory.join(PROGRAM), 0o700)?;
    let digest = copy_digested(package, &mut program)?;
    program.set_permissions(Permissions::from_mode(0o500))?;
    program.sync_all()?;
    File::open(directory)?.sync_all()?;
    Ok(digest)
}

fn copy_digested(from: &mut impl Read, to: &mut impl Write) -> io::Result<String> {
    let mut digest = Sha256::new();
    let mut buffer = vec![0; BUFFER];
    loop {
        let count = from.read(&mut buffer)?;
        if count == 0 {
            return Ok(digest
                .finalize()
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect());
        }
        digest.update(&buffer[..count]);
        to.write_all(&buffer[..count])?;
    }
}

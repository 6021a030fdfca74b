//! Replaces the guest agent while the guest and its role run on: takes packages over the bus,
//! installs them beside each other on the OS disk, decides which one runs, and goes back from
//! one that fails.

mod channel;
mod files;
mod slots;

use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use nix::unistd::Uid;
use tokio::sync::{Notify, mpsc};
use vmbus::agent_package::Version;
use vmbus::message::{AgentUpdate, AgentVersions, ToHost, UpdateStep};
use vmbus::text::{chain, clip};

pub use channel::serve;
pub use files::{AgentFiles, FilesError};
pub use slots::{Installed, Slots};

/// Messages to the host that may wait for the channel.
const BACKLOG: usize = 64;
/// Longest reason that is kept, in characters.
const MAX_REASON: usize = 300;

/// Which guest agent runs, and what becomes of offers. Shared by the task that keeps the guest
/// agent running and the one that serves the channel.
#[derive(Debug)]
pub struct Updates {
    files: AgentFiles,
    /// `None`: the state cannot be read or written, and nothing is installed in this boot.
    slots: Mutex<Option<Slots>>,
    /// Of the guest agent of the image.
    image: Version,
    image_program: PathBuf,
    messages: mpsc::Sender<ToHost>,
    replaced: Notify,
}

/// The guest agent that is to be started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Start {
    /// SHA-256 of its package; absent for that of the image.
    sha256: Option<String>,
    /// Its program.
    pub program: PathBuf,
    /// It is new: one failure of a kind that lasts is enough.
    pub watched: bool,
}

/// How a guest agent failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// It ended, and not for the first time.
    Again,
    /// It ended.
    Once,
    /// It sent no report, or none of a role, for a minute.
    Hung,
}

impl Updates {
    /// Reads what is installed. `image` is the version of the guest agent of the image,
    /// `image_program` its program. Also the receiver for [`serve`]. Blocking.
    pub fn open(
        files: AgentFiles,
        image: Version,
        image_program: PathBuf,
    ) -> (Self, mpsc::Receiver<ToHost>) {
        let (messages, receiver) = mpsc::channel(BACKLOG);
        let slots = files.load();
        let this = Self {
            slots: Mutex::new(None),
            files,
            image,
            image_program,
            messages,
            replaced: Notify::new(),
        };
        match slots {
            Ok(slots) => this.with(|it| *it = Some(slots)),
            Err(error) => this.disabled(&error),
        }
        (this, receiver)
    }

    /// The guest agent to start now. The start is on disk before it happens, so that one that
    /// takes the guest with it is found too. Blocking.
    pub fn next(&self) -> Start {
        loop {
            let Some(current) = self.current() else {
                return Start {
                    sha256: None,
                    program: self.image_program.clone(),
                    watched: false,
                };
            };
            let found = self.files.find(&current);
            let counted = self.change(Slots::starting);
            match (found, counted) {
                (Ok(program), Some(Ok(()))) => {
                    return Start {
                        sha256: Some(current.sha256),
                        program,
                        watched: !current.confirmed,
                    };
                }
                (Err(error), _) => self.go_back(&chain(&error)),
                (_, Some(Err(reason))) => self.go_back(&reason),
                // Nothing is installed any more.
                (_, None) => {}
            }
        }
    }

    /// The guest agent that runs has failed: whether another one is started now. Blocking.
    pub fn failed(&self, failure: Failure, how: &str) -> bool {
        let Some(current) = self.current() else {
            return false;
        };
        let bad = match failure {
            Failure::Again => true,
            Failure::Hung => !current.confirmed,
            Failure::Once => !current.confirmed && current.starts >= slots::MAX_STARTS,
        };
        if bad {
            self.go_back(how);
        }
        bad
    }

    /// The guest agent that runs has run well for long enough. Blocking.
    pub fn confirm(&self) {
        let Some(current) = self.current().filter(|it| !it.confirmed) else {
            return;
        };
        self.change(Slots::confirm);
        self.sweep();
        self.report(&current, UpdateStep::Confirmed, String::new());
    }

    /// The guest shuts down while the guest agent works: its starts are not failures. Blocking.
    pub fn left_well(&self) {
        self.change(Slots::forget_starts);
    }

    /// Waits until another guest agent than `started` is to run.
    pub async fn replaced(&self, started: &Start) {
        loop {
            self.replaced.notified().await;
            if self.current().map(|it| it.sha256) != started.sha256 {
                return;
            }
        }
    }

    /// Queues a message for the host; dropped when too many wait.
    pub fn send(&self, message: ToHost) {
        let _ = self.messages.try_send(message);
    }

    /// What runs and what never will again.
    fn versions(&self) -> AgentVersions {
        self.with(|slots| {
            let slots = slots.as_ref();
            let current = slots.and_then(|it| it.current.as_ref());
            AgentVersions {
                version: current.map_or(self.image, |it| it.version).to_string(),
                sha256: current.map(|it| it.sha256.clone()),
                watched: current.is_some_and(|it| !it.confirmed),
                bad: slots.map(|it| it.bad.clone()).unwrap_or_default(),
            }
        })
    }

    fn go_back(&self, how: &str) {
        let Some(current) = self.current() else {
            return;
        };
        let reason = clip(how.to_owned(), MAX_REASON);
        self.change(|slots| slots.fail(&reason));
        self.report(&current, UpdateStep::WentBack, reason);
        self.sweep();
    }

    fn report(&self, version: &Installed, step: UpdateStep, detail: String) {
        self.send(ToHost::AgentUpdate(AgentUpdate {
            version: version.version.to_string(),
            sha256: version.sha256.clone(),
            step,
            detail,
        }));
        self.send(ToHost::AgentVersions(self.versions()));
    }

    fn current(&self) -> Option<Installed> {
        self.with(|slots| slots.as_ref()?.current.clone())
    }

    /// Changes the state on disk. What cannot be written is not relied on: the guest agent of
    /// the image runs until the next boot.
    fn change<T>(&self, change: impl FnOnce(&mut Slots) -> T) -> Option<T> {
        let mut slots = self.with(|slots| slots.clone())?;
        let before = slots.clone();
        let result = change(&mut slots);
        let saved = if slots == before {
            Ok(())
        } else {
            self.files.save(&slots)
        };
        match saved {
            Ok(()) => {
                self.with(|it| *it = Some(slots));
                Some(result)
            }
            Err(error) => {
                self.with(|it| *it = None);
                self.disabled(&error);
                None
            }
        }
    }

    /// Removes packages that are neither current nor the one before. What cannot be removed
    /// only takes space.
    fn sweep(&self) {
        if let Some(slots) = self.with(|slots| slots.clone()) {
            let _ = self.files.sweep(&slots);
        }
    }

    fn disabled(&self, error: &dyn std::error::Error) {
        let text = format!(
            "guest agents cannot be updated in this boot: {}",
            chain(error)
        );
        eprintln!("app-agent: {text}");
        self.send(ToHost::AgentResult { error: Some(text) });
    }

    fn with<T>(&self, act: impl FnOnce(&mut Option<Slots>) -> T) -> T {
        act(&mut self.slots.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Whether `directory` is root's alone, as everything that runs as root must be.
fn is_private(metadata: &std::fs::Metadata) -> io::Result<()> {
    use std::os::unix::fs::MetadataExt as _;
    if metadata.uid() == Uid::effective().as_raw() && metadata.mode() & 0o022 == 0 {
        return Ok(());
    }
    Err(io::ErrorKind::PermissionDenied.into())
}

#[cfg(test)]
mod tests;

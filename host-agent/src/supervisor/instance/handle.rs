//! What the owner of an instance holds: requests to its actor and a view of it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};

use crate::vmm::control::Stats;

/// Most time for an answer. A VMM process that takes longer is found hung.
const ANSWER_LIMIT: Duration = Duration::from_secs(45);

/// What an owner may ask of an instance.
#[derive(Debug)]
pub enum Request {
    /// Stop cleanly.
    Stop,
    /// Stop now.
    Kill,
    /// Stop or resume the vCPUs.
    Pause(bool, oneshot::Sender<Result<(), String>>),
    /// A connection to the guest agent's exec service.
    Exec(oneshot::Sender<Result<UnixStream, String>>),
    /// Counters of the VMM process.
    Stats(oneshot::Sender<Result<Stats, String>>),
}

/// What can be seen of an instance at any time.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct View {
    /// Number of the boot.
    pub generation: u64,
    /// Process id of the VMM, 0 when none runs.
    pub pid: u32,
    /// State in one word.
    pub state: String,
    /// The host has no room for what it writes: it stands still.
    pub no_space: bool,
}

/// A handle to a running actor.
#[derive(Debug, Clone)]
pub struct InstanceHandle {
    /// Instance name.
    pub name: String,
    /// Directory with its logs.
    pub dir: PathBuf,
    requests: mpsc::Sender<Request>,
    view: watch::Receiver<View>,
}

impl InstanceHandle {
    pub(super) fn new(
        name: &str,
        dir: &Path,
        requests: mpsc::Sender<Request>,
        view: watch::Receiver<View>,
    ) -> Self {
        Self {
            name: name.to_owned(),
            dir: dir.to_owned(),
            requests,
            view,
        }
    }

    /// Puts a request; an actor that is gone has nothing left to stop.
    pub async fn send(&self, request: Request) {
        let _ = self.requests.send(request).await;
    }

    /// The instance as it is now.
    pub fn view(&self) -> View {
        self.view.borrow().clone()
    }

    /// Connects to the guest agent's exec service.
    pub async fn exec(&self) -> Result<UnixStream, String> {
        self.ask(Request::Exec).await
    }

    /// Stops or resumes the vCPUs.
    pub async fn pause(&self, paused: bool) -> Result<(), String> {
        self.ask(|answer| Request::Pause(paused, answer)).await
    }

    /// Counters of the VMM process.
    pub async fn stats(&self) -> Result<Stats, String> {
        self.ask(Request::Stats).await
    }

    async fn ask<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<T, String>>) -> Request,
    ) -> Result<T, String> {
        let (answer, answered) = oneshot::channel();
        self.send(request(answer)).await;
        match tokio::time::timeout(ANSWER_LIMIT, answered).await {
            Ok(answer) => answer.unwrap_or_else(|_| Err("the instance ended".into())),
            Err(_) => Err("the VMM process does not answer".into()),
        }
    }
}

//! The owner's end of an instance: requests to its actor and its current state.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use vmbus::message::Goal;

use super::super::spec::InstanceSpec;
use super::super::status::InstanceStatus;
use crate::guest_stream::GuestStream;

/// Most time for an answer. A VMM process that takes longer is hung: its pings end
/// it.
const ANSWER_LIMIT: Duration = Duration::from_secs(45);

/// A request of an owner.
#[derive(Debug)]
pub enum Request {
    /// Stop cleanly.
    Stop,
    /// Stop now.
    Kill,
    /// Leave the rotation until the guest reports its role Ready anew.
    Drain,
    /// Be at this goal.
    Apply(Box<Goal>),
    /// Stop or resume the vCPUs.
    Pause(bool, oneshot::Sender<Result<(), String>>),
    /// A connection to the guest agent's exec service.
    Exec(oneshot::Sender<Result<GuestStream, String>>),
}

/// A handle to a running actor.
#[derive(Debug, Clone)]
pub struct InstanceHandle {
    spec: Arc<InstanceSpec>,
    directory: Arc<Path>,
    requests: mpsc::Sender<Request>,
    status: watch::Receiver<InstanceStatus>,
}

impl InstanceHandle {
    pub(super) fn new(
        spec: &InstanceSpec,
        directory: &Path,
        requests: mpsc::Sender<Request>,
        status: watch::Receiver<InstanceStatus>,
    ) -> Self {
        Self {
            spec: Arc::new(spec.clone()),
            directory: directory.into(),
            requests,
            status,
        }
    }

    /// The same instance with a newer goal.
    pub(in super::super) fn with_goal(&self, goal: Goal) -> Self {
        let mut spec = InstanceSpec::clone(&self.spec);
        spec.goal = goal;
        Self {
            spec: Arc::new(spec),
            ..self.clone()
        }
    }

    /// What it is, with the newest goal that this host agent gave it.
    pub fn spec(&self) -> &InstanceSpec {
        &self.spec
    }

    /// Directory with its disks and logs.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Waits until the actor has ended.
    pub async fn ended(&self) {
        let mut status = self.status.clone();
        while status.changed().await.is_ok() {}
    }

    /// Sends a request. If the actor is gone, nothing is left to stop.
    pub async fn send(&self, request: Request) {
        let _ = self.requests.send(request).await;
    }

    /// The current state.
    pub fn status(&self) -> InstanceStatus {
        self.status.borrow().clone()
    }

    /// The current state and its changes, until the actor ends.
    pub fn watch_status(&self) -> watch::Receiver<InstanceStatus> {
        self.status.clone()
    }

    /// Connects to the guest agent's exec service.
    pub async fn exec(&self) -> Result<GuestStream, String> {
        self.ask(Request::Exec).await
    }

    /// Stops or resumes the vCPUs.
    pub async fn pause(&self, paused: bool) -> Result<(), String> {
        self.ask(|answer| Request::Pause(paused, answer)).await
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

//! The guest agent: takes goals, sets the guest up, has the bootstrapper run
//! the role, serves its tunnels. One that finds a bootstrapper at work goes on
//! where the guest agent before it ended.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use vmbus::channel::Channel;
use vmbus::message::{ExpectedState, Goal, LogRecord, LogSource, RoleState, Status};
use vmbus::message::{ToGuest, ToHost};
use vmbus::stream::send;
use vmbus::text::chain;

use crate::bootstrapper::stack::{self, Found, Stack};
use crate::bootstrapper::{Role, Said};
use crate::exec::{self, Environment};
use crate::log::Logger;
use crate::report::{self, Report};
use crate::setup::{self, Launch};
use crate::{bus, tunnel};

const NAME: &str = "guest-agent";
/// Wait before a bootstrapper that died is started again.
const BOOTSTRAPPER_WAIT: Duration = Duration::from_secs(5);
/// Time beyond the role's own for the bootstrapper to end.
const STOP_MARGIN: Duration = Duration::from_secs(5);
/// Time for the last log lines to leave.
const FAREWELL: Duration = Duration::from_secs(1);

/// Runs until told to end by SIGTERM, which stops the role.
pub async fn run() -> io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let logger = Logger::start(NAME);
    logger.agent(NAME, format!("{} starts", crate::name(NAME)));
    let (status, seen) = watch::channel(status(0, Role::unknown()));
    let mut agent = Agent {
        logger,
        status,
        environment: Environment::new(RwLock::new(Vec::new())),
        tunnels: BTreeMap::new(),
        stack: None,
        applied: None,
        start_at: None,
    };
    // Before anything is told to anyone: what is adopted never was unknown.
    if let Some(found) = Stack::find().await {
        agent.adopt(found).await;
    }
    tokio::spawn(report_to_app_agent(seen.clone()));
    tokio::spawn(report_to_host(seen));
    let (goals, mut wanted) = mpsc::channel(1);
    tokio::spawn(receive_goals(goals));
    exec::serve(Arc::clone(&agent.environment)).await?;
    loop {
        tokio::select! {
            Some(goal) = wanted.recv() => agent.apply(goal).await,
            said = said(&mut agent.stack) => match said {
                Some(said) => agent.heard(said),
                None => agent.bootstrapper_ended().await,
            },
            () = due(agent.start_at) => agent.start_stack().await,
            _ = terminate.recv() => {
                agent.stop_stack().await;
                agent.logger.flush(FAREWELL).await;
                return Ok(());
            }
        }
    }
}

/// What the bootstrapper says next, `None` when it is gone.
async fn said(stack: &mut Option<Stack>) -> Option<Said> {
    match stack {
        Some(stack) => stack.said().await,
        None => std::future::pending().await,
    }
}

async fn due(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// What a goal asks of a guest agent. Pure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// It is applied already, or older than what is.
    Nothing,
    /// The role shall not run.
    Stop,
    /// The role shall run as this goal says: one that runs is replaced.
    Replace,
}

fn step(applied: u64, goal: &Goal) -> Step {
    match goal.expected {
        _ if goal.incarnation <= applied => Step::Nothing,
        ExpectedState::Stopped => Step::Stop,
        ExpectedState::Started => Step::Replace,
    }
}

struct Agent {
    logger: Logger,
    status: watch::Sender<Status>,
    environment: Environment,
    tunnels: BTreeMap<u16, JoinHandle<()>>,
    stack: Option<Stack>,
    applied: Option<Goal>,
    /// When a bootstrapper is started again.
    start_at: Option<Instant>,
}

impl Agent {
    /// Goes on with a bootstrapper that an earlier guest agent started.
    async fn adopt(&mut self, found: Found) {
        let Found { stack, goal, role } = found;
        let Some(goal) = goal else {
            // The guest agent before died between the start and the order.
            if let Err(error) = stack.stop(STOP_MARGIN, drop).await {
                self.log(format!("an idle bootstrapper: {error}"));
            }
            return;
        };
        let incarnation = goal.incarnation;
        self.log(format!(
            "found the bootstrapper at work on goal {incarnation}, role {:?}",
            role.state
        ));
        self.status.send_replace(status(incarnation, role));
        self.stack = Some(stack);
        if let Err(detail) = self.serve(&goal) {
            self.fail(detail);
        }
        self.applied = Some(*goal);
    }

    async fn apply(&mut self, goal: Goal) {
        let step = step(self.status.borrow().incarnation, &goal);
        if step == Step::Nothing {
            return;
        }
        self.log(format!("goal {} received", goal.incarnation));
        self.status
            .send_modify(|status| status.incarnation = goal.incarnation);
        self.stop_stack().await;
        self.start_at = None;
        self.applied = None;
        if step == Step::Stop {
            if self.status.borrow().state != RoleState::Stopped {
                self.set(RoleState::Stopped, String::new());
            }
            return;
        }
        self.set(RoleState::Creating, String::new());
        let for_setup = goal.clone();
        let logger = self.logger.clone();
        let prepared = tokio::task::spawn_blocking(move || {
            setup::prepare(&for_setup, |stage| logger.agent(NAME, stage))
        })
        .await;
        match prepared {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return self.fail(chain(&error)),
            Err(error) => return self.fail(error.to_string()),
        }
        if let Err(detail) = self.serve(&goal) {
            return self.fail(detail);
        }
        self.applied = Some(goal);
        self.start_stack().await;
    }

    /// What this process itself serves of a goal: the environment of exec and
    /// the tunnels, of which those no longer wanted end.
    fn serve(&mut self, goal: &Goal) -> Result<(), String> {
        let endpoints = &goal.role.endpoints;
        if let Ok(mut environment) = self.environment.write() {
            *environment = Launch::of(goal).environment.into_iter().collect();
        }
        self.tunnels.retain(|port, task| {
            let wanted = endpoints.iter().any(|it| it.local_port == *port);
            if !wanted {
                task.abort();
            }
            wanted
        });
        for endpoint in endpoints {
            if let Entry::Vacant(free) = self.tunnels.entry(endpoint.local_port) {
                let task = tunnel::serve(endpoint.local_port)
                    .map_err(|error| format!("tunnel {}: {error}", endpoint.name))?;
                free.insert(task);
            }
        }
        Ok(())
    }

    async fn start_stack(&mut self) {
        self.start_at = None;
        let Some(applied) = self.applied.clone() else {
            return;
        };
        match Stack::start(applied).await {
            Ok(stack) => {
                self.log("bootstrapper started".into());
                self.stack = Some(stack);
            }
            Err(error) => self.start_later(format!("bootstrapper: {error}")),
        }
    }

    fn start_later(&mut self, detail: String) {
        self.log(detail.clone());
        self.set(RoleState::Recycling, detail);
        self.status.send_modify(|status| {
            status.retry_in_ms = u64::try_from(BOOTSTRAPPER_WAIT.as_millis()).ok();
        });
        self.start_at = Some(Instant::now() + BOOTSTRAPPER_WAIT);
    }

    /// It died: the role, if it still runs, is watched by nobody and ends.
    async fn bootstrapper_ended(&mut self) {
        self.stack = None;
        if let Err(error) = stack::clear().await {
            self.log(format!("after the bootstrapper: {error}"));
        }
        self.start_later("bootstrapper ended by itself".into());
    }

    async fn stop_stack(&mut self) {
        let Some(stack) = self.stack.take() else {
            return;
        };
        self.set(RoleState::Stopping, String::new());
        let limit = self.applied.as_ref().map_or(0, |goal| goal.stop_timeout_ms);
        let limit = Duration::from_millis(limit) + STOP_MARGIN;
        let stopped = stack.stop(limit, |said| self.heard(said)).await;
        if let Err(error) = stopped {
            self.log(format!("stop: {error}"));
        }
        // The bootstrapper's last word is how the role stopped.
        if self.status.borrow().state != RoleState::Stopped {
            self.set(RoleState::Stopped, "killed with its bootstrapper".into());
            self.status.send_modify(|status| status.killed = true);
        }
    }

    fn heard(&self, said: Said) {
        match said {
            Said::State(role) => {
                self.logger.agent(
                    "bootstrapper",
                    format!("role {:?} {}", role.state, role.detail),
                );
                let incarnation = self.status.borrow().incarnation;
                self.status.send_replace(status(incarnation, role));
            }
            Said::Line {
                stream,
                uptime_ms,
                dropped,
                text,
            } => self.logger.record(LogRecord {
                source: LogSource::Role,
                stream,
                uptime_ms,
                dropped,
                text,
            }),
            // Only the first message is one.
            Said::Hello { .. } => {}
        }
    }

    fn set(&self, state: RoleState, detail: String) {
        self.status.send_modify(|status| {
            status.state = state;
            status.detail = detail;
            status.retry_in_ms = None;
            status.killed = false;
        });
    }

    fn fail(&self, detail: String) {
        self.log(detail.clone());
        self.set(RoleState::Failed, detail);
    }

    fn log(&self, text: String) {
        self.logger.agent(NAME, text);
    }
}

fn status(incarnation: u64, role: Role) -> Status {
    Status {
        incarnation,
        state: role.state,
        detail: role.detail,
        recycles: role.recycles,
        last_exit: role.last_exit,
        retry_in_ms: role.retry_in_ms,
        killed: role.killed,
    }
}

async fn receive_goals(goals: mpsc::Sender<Goal>) {
    loop {
        let mut open = bus::dial_until_open(Channel::Goal, NAME).await;
        while let Ok(Some(message)) = open.reader.next::<ToGuest>().await {
            if let ToGuest::Goal(goal) = message
                && goals.send(*goal).await.is_err()
            {
                return;
            }
        }
    }
}

async fn report_to_host(mut status: watch::Receiver<Status>) {
    loop {
        let mut open = bus::dial_until_open(Channel::Status, NAME).await;
        loop {
            let current = status.borrow_and_update().clone();
            if send(&mut open.writer, &ToHost::Status(current))
                .await
                .is_err()
            {
                break;
            }
            if status.changed().await.is_err() {
                return;
            }
        }
    }
}

async fn report_to_app_agent(mut status: watch::Receiver<Status>) {
    loop {
        if let Ok(mut socket) = tokio::net::UnixStream::connect(report::SOCKET).await {
            loop {
                let report = {
                    let status = status.borrow_and_update();
                    Report {
                        incarnation: status.incarnation,
                        role: status.state,
                    }
                };
                if send(&mut socket, &report).await.is_err() {
                    break;
                }
                // Repeated when nothing changes: see `report::EVERY`.
                if let Ok(Err(_)) = tokio::time::timeout(report::EVERY, status.changed()).await {
                    return;
                }
            }
        }
        tokio::time::sleep(report::EVERY).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmbus::role::{EntryPoint, RoleDefinition};

    #[test]
    fn only_a_newer_goal_stops_or_replaces_what_runs() {
        let goal = |incarnation, expected| Goal {
            incarnation,
            expected,
            deployment_id: String::new(),
            instance: String::new(),
            update_domain: 0,
            fault_domain: 0,
            role: RoleDefinition {
                name: String::new(),
                entry_point: EntryPoint::Program {
                    command: Vec::new(),
                    ready_on_start: true,
                },
                elevated: false,
                settings: BTreeMap::new(),
                environment: Vec::new(),
                local_storage: Vec::new(),
                endpoints: Vec::new(),
            },
            application_disk: String::new(),
            resource_disk: String::new(),
            stop_timeout_ms: 0,
        };
        use ExpectedState::*;
        assert_eq!(step(0, &goal(1, Started)), Step::Replace);
        assert_eq!(step(7, &goal(7, Started)), Step::Nothing);
        assert_eq!(step(7, &goal(7, Stopped)), Step::Nothing);
        assert_eq!(step(7, &goal(6, Stopped)), Step::Nothing);
        assert_eq!(step(7, &goal(8, Started)), Step::Replace);
        assert_eq!(step(7, &goal(8, Stopped)), Step::Stop);
    }
}

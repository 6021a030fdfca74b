//! The guest agent: takes goals from the host and performs what the planner names: sets
//! the guest up, serves tunnels, has the bootstrapper run the role. A guest agent that
//! finds a bootstrapper of an earlier one adopts it.

use std::io;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use vmbus::channel::Channel;
use vmbus::message::{Goal, LogRecord, LogSource, RoleState, Status, ToGuest, ToHost};
use vmbus::stream::send;

use crate::bootstrapper::client::{self, Bootstrapper, Found};
use crate::bootstrapper::{BootstrapperEvent, Role};
use crate::bus::Dialer;
use crate::exec::{self, Environment};
use crate::failure::Failure;
use crate::log::Logger;
use crate::os::cgroup;
use crate::planner::{Effect, Next, Planner};
use crate::report::{self, Report};
use crate::tunnel::{self, Endpoints};
use crate::{environment, setup};

const NAME: &str = "guest-agent";
/// Time beyond the role's own for the bootstrapper to end.
const STOP_MARGIN: Duration = Duration::from_secs(5);
/// Most time at the end for the last log lines to be sent.
const LAST_LINES: Duration = Duration::from_secs(1);

/// Runs until SIGTERM, which stops the role, or SIGUSR1, which does not: another guest agent
/// takes the place of this one.
pub async fn run() -> io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut replaced = signal(SignalKind::user_defined1())?;
    let logger = Logger::start(NAME);
    logger.agent(NAME, format!("{} starts", crate::name(NAME)));
    let planner = Planner::new();
    let role = Role::unknown();
    let (status, reported) = watch::channel(planner.status(&role));
    let mut agent = Agent {
        logger,
        planner,
        role,
        status,
        environment: Environment::new(RwLock::new(environment::of_command(None))),
        endpoints: Endpoints::default(),
        bootstrapper: None,
        set_up: None,
    };
    if let Err(error) = cgroup::prepare() {
        agent.log(format!("limits of role and exec: {error}"));
    }
    // Before the first report: a running role is never reported as Unknown.
    if let Some(found) = Bootstrapper::find().await {
        agent.adopt(found).await;
    }
    tokio::spawn(report_to_app_agent(reported.clone()));
    tokio::spawn(report_to_host(reported));
    let (goals, mut wanted) = mpsc::channel(1);
    tokio::spawn(receive_goals(goals));
    exec::serve(Arc::clone(&agent.environment)).await?;
    tokio::spawn(tunnel::serve(agent.endpoints.clone()));
    loop {
        let wait = match agent.planner.next(std::time::Instant::now()) {
            Next::Do(effect, goal) => {
                agent.perform(effect, *goal).await;
                continue;
            }
            Next::Wait(until) => until,
        };
        tokio::select! {
            Some(goal) = wanted.recv() => agent.take_goal(goal),
            result = set_up_result(&mut agent.set_up) => {
                agent.set_up = None;
                agent.finished(result);
            }
            event = next_event(&mut agent.bootstrapper) => match event {
                Some(event) => agent.bootstrapper_event(event),
                None => agent.bootstrapper_ended().await,
            },
            () = until(wait) => {}
            _ = replaced.recv() => {
                agent.log("another guest agent follows".into());
                agent.logger.flush(LAST_LINES).await;
                return Ok(());
            }
            _ = terminate.recv() => {
                if let Err(failure) = agent.stop().await {
                    agent.log(failure.detail);
                }
                agent.logger.flush(LAST_LINES).await;
                return Ok(());
            }
        }
    }
}

/// The bootstrapper's next event, `None` when it is gone; never if there is none.
async fn next_event(bootstrapper: &mut Option<Bootstrapper>) -> Option<BootstrapperEvent> {
    match bootstrapper {
        Some(bootstrapper) => bootstrapper.next_event().await,
        None => std::future::pending().await,
    }
}

/// The result of the set-up in progress; never if there is none.
async fn set_up_result(task: &mut Option<SetUpTask>) -> Result<(), Failure> {
    match task {
        Some(task) => match task.await {
            Ok(result) => result,
            Err(error) => Err(Failure::passing(error.to_string())),
        },
        None => std::future::pending().await,
    }
}

async fn until(at: Option<std::time::Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(Instant::from_std(at)).await,
        None => std::future::pending().await,
    }
}

type SetUpTask = JoinHandle<Result<(), Failure>>;

struct Agent {
    logger: Logger,
    planner: Planner,
    /// What the bootstrapper reported last.
    role: Role,
    status: watch::Sender<Status>,
    environment: Environment,
    endpoints: Endpoints,
    bootstrapper: Option<Bootstrapper>,
    /// The set-up in progress: it may wait for a disk.
    set_up: Option<SetUpTask>,
}

impl Agent {
    /// Continues with a bootstrapper that an earlier guest agent started.
    async fn adopt(&mut self, found: Found) {
        let Found {
            bootstrapper,
            goal,
            role,
        } = found;
        let Some(goal) = goal else {
            // The earlier guest agent died between start and order.
            if let Err(error) = bootstrapper.stop(STOP_MARGIN, drop).await {
                self.log(format!("stop an idle bootstrapper: {error}"));
            }
            return;
        };
        self.log(format!(
            "adopted the bootstrapper of goal {}, role {:?}",
            goal.incarnation, role.state
        ));
        self.role = role;
        self.bootstrapper = Some(bootstrapper);
        self.planner.adopted(goal, std::time::Instant::now());
        self.publish();
    }

    fn take_goal(&mut self, goal: Goal) {
        let incarnation = goal.incarnation;
        if self.planner.goal(goal) {
            self.log(format!("goal {incarnation} received"));
            self.publish();
        }
    }

    async fn perform(&mut self, effect: Effect, goal: Goal) {
        let result = match effect {
            Effect::Stop => self.stop().await,
            Effect::SetUp => {
                let logger = self.logger.clone();
                // `finished` follows when the task ends.
                self.set_up = Some(tokio::task::spawn_blocking(move || {
                    setup::prepare(&goal, |stage| logger.agent(NAME, stage))
                        .map_err(|error| error.failure())
                }));
                return;
            }
            Effect::Serve => {
                self.serve(&goal);
                Ok(())
            }
            Effect::Start => self.start(goal).await,
        };
        self.finished(result);
    }

    fn finished(&mut self, result: Result<(), Failure>) {
        self.planner.finished(result, std::time::Instant::now());
        if let Some(detail) = self.planner.failure() {
            self.log(detail.to_owned());
        }
        self.publish();
    }

    /// What this process itself serves of a goal: the environment of exec and the tunnels.
    fn serve(&self, goal: &Goal) {
        if let Ok(mut environment) = self.environment.write() {
            *environment = environment::of_command(Some(goal));
        }
        self.endpoints.set(goal);
    }

    async fn start(&mut self, goal: Goal) -> Result<(), Failure> {
        let started = Bootstrapper::start(goal).await;
        self.bootstrapper =
            Some(started.map_err(|error| Failure::passing(format!("bootstrapper: {error}")))?);
        self.log("bootstrapper started".into());
        // What an earlier bootstrapper reported is not true of this one.
        self.role = Role {
            state: RoleState::Starting,
            ..Role::unknown()
        };
        Ok(())
    }

    /// Ends the role too, which no bootstrapper watches any more, and has both started again.
    async fn bootstrapper_ended(&mut self) {
        self.bootstrapper = None;
        if let Err(error) = client::clear().await {
            self.log(format!("after the end of the bootstrapper: {error}"));
        }
        self.planner.bootstrapper_ended(std::time::Instant::now());
        if let Some(detail) = self.planner.failure() {
            self.log(detail.to_owned());
        }
        self.publish();
    }

    /// Stops bootstrapper and role.
    async fn stop(&mut self) -> Result<(), Failure> {
        let failed = |error| Failure::passing(format!("stop the role: {error}"));
        let Some(bootstrapper) = self.bootstrapper.take() else {
            return match self.planner.running() {
                // An earlier attempt asked the bootstrapper already.
                Some(_) => client::clear().await.map_err(failed),
                None => Ok(()),
            };
        };
        let limit = self
            .planner
            .running()
            .map_or(0, |goal| goal.stop_timeout_ms);
        let limit = Duration::from_millis(limit) + STOP_MARGIN;
        self.role.state = RoleState::Stopping;
        self.role.detail.clear();
        self.role.retry_in_ms = None;
        self.publish();
        let stopped = bootstrapper
            .stop(limit, |event| self.bootstrapper_event(event))
            .await;
        // The last state that the bootstrapper reports is how the role stopped.
        if self.role.state != RoleState::Stopped {
            self.role.state = RoleState::Stopped;
            self.role.detail = "killed with its bootstrapper".into();
            self.role.killed = true;
            self.publish();
        }
        stopped.map_err(failed)
    }

    fn bootstrapper_event(&mut self, event: BootstrapperEvent) {
        match event {
            BootstrapperEvent::State(role) => {
                self.logger.agent(
                    "bootstrapper",
                    format!("role {:?} {}", role.state, role.detail),
                );
                self.role = role;
                self.publish();
            }
            BootstrapperEvent::Line {
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
            // Only the first message of a connection is one.
            BootstrapperEvent::Hello { .. } => {}
        }
    }

    /// Reports the status if it changed.
    fn publish(&self) {
        let new = self.planner.status(&self.role);
        self.status.send_if_modified(|status| {
            let changed = *status != new;
            *status = new;
            changed
        });
    }

    fn log(&self, text: String) {
        self.logger.agent(NAME, text);
    }
}

async fn receive_goals(goals: mpsc::Sender<Goal>) {
    let mut dialer = Dialer::new(Channel::Goal, NAME);
    loop {
        let mut open = dialer.open().await;
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
    let mut dialer = Dialer::new(Channel::Status, NAME);
    loop {
        let mut open = dialer.open().await;
        loop {
            let current = status.borrow_and_update().clone();
            if send(&mut open.writer, &ToHost::Status(current))
                .await
                .is_err()
            {
                break;
            }
            tokio::select! {
                changed = status.changed() => if changed.is_err() { return },
                // The host sends nothing here: the connection has ended, and the host agent
                // that follows needs the status though it has not changed.
                _ = open.reader.next::<ToGuest>() => break,
            }
        }
    }
}

async fn report_to_app_agent(mut status: watch::Receiver<Status>) {
    loop {
        if let Ok(mut socket) = tokio::net::UnixStream::connect(report::SOCKET).await {
            loop {
                let role = status.borrow_and_update().state;
                if send(&mut socket, &Report { role }).await.is_err() {
                    break;
                }
                tokio::select! {
                    changed = status.changed() => if changed.is_err() { return },
                    // Repeated when nothing changes: see `report::EVERY`.
                    () = tokio::time::sleep(report::EVERY) => {}
                }
            }
        }
        tokio::time::sleep(report::EVERY).await;
    }
}

//! The guest agent: takes goals, sets the guest up, runs the bootstrapper,
//! reports status, serves tunnels and exec.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::process::{ExitCode, Stdio};
use std::sync::{Arc, RwLock};
use std::time::Duration;

use guest_agent::bootstrapper::{Order, Said, role};
use guest_agent::bus;
use guest_agent::exec::{self, Environment};
use guest_agent::log::Logger;
use guest_agent::report::{self, Report};
use guest_agent::setup::{self, Prepared};
use guest_agent::tunnel;
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use vmbus::channel::Channel;
use vmbus::message::{ExpectedState, Goal, LogSource, RoleState, Status, ToGuest, ToHost};
use vmbus::stream::{FrameReader, send};
use vmbus::text::chain;

const NAME: &str = "guest-agent";
/// Wait before a bootstrapper that died is started again.
const BOOTSTRAPPER_WAIT: Duration = Duration::from_secs(5);
/// Time beyond the role's own for the bootstrapper to end.
const STOP_MARGIN: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("{NAME}: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = if std::env::args().nth(1).as_deref() == Some("bootstrapper") {
        runtime.block_on(role::main())
    } else {
        runtime.block_on(agent())
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{NAME}: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

/// A bootstrapper and what it serves.
struct Stack {
    child: Child,
    orders: tokio::net::unix::OwnedWriteHalf,
    limit: Duration,
}

struct Agent {
    logger: Logger,
    status: watch::Sender<Status>,
    environment: Environment,
    tunnels: BTreeMap<u16, JoinHandle<()>>,
    said: mpsc::Sender<Said>,
    stack: Option<Stack>,
    prepared: Option<Prepared>,
}

async fn agent() -> std::io::Result<()> {
    let logger = Logger::start(NAME);
    logger.agent(NAME, format!("{} starts", guest_agent::name(NAME)));
    let (status, seen) = watch::channel(Status {
        incarnation: 0,
        state: RoleState::Unknown,
        detail: String::new(),
        recycles: 0,
        last_exit: None,
        retry_in_ms: None,
    });
    tokio::spawn(report_to_app_agent(seen.clone()));
    tokio::spawn(report_to_host(seen));
    let environment = Environment::new(RwLock::new(Vec::new()));
    exec::serve(Arc::clone(&environment)).await?;
    let (goals, mut wanted) = mpsc::channel(1);
    tokio::spawn(receive_goals(goals));
    let (said, mut heard) = mpsc::channel(64);
    let mut agent = Agent {
        logger,
        status,
        environment,
        tunnels: BTreeMap::new(),
        said,
        stack: None,
        prepared: None,
    };
    let mut terminate = signal(SignalKind::terminate())?;
    loop {
        tokio::select! {
            Some(goal) = wanted.recv() => agent.apply(goal).await,
            Some(said) = heard.recv() => agent.heard(said),
            () = agent.stack_ended() => {
                agent.logger.agent(NAME, "bootstrapper ended by itself");
                agent.stack = None;
                agent.set(RoleState::Recycling, "bootstrapper ended".into());
                tokio::time::sleep(BOOTSTRAPPER_WAIT).await;
                agent.start_stack().await;
            }
            _ = terminate.recv() => {
                agent.stop_stack(&mut heard).await;
                return Ok(());
            }
        }
    }
}

impl Agent {
    async fn apply(&mut self, goal: Goal) {
        let applied = self.status.borrow().incarnation;
        if goal.incarnation <= applied {
            return;
        }
        self.logger
            .agent(NAME, format!("goal {} received", goal.incarnation));
        self.status
            .send_modify(|status| status.incarnation = goal.incarnation);
        let (_, mut nobody) = mpsc::channel(1);
        self.stop_stack(&mut nobody).await;
        if goal.expected == ExpectedState::Stopped {
            self.set(RoleState::Stopped, String::new());
            return;
        }
        self.set(RoleState::Creating, String::new());
        let for_setup = goal.clone();
        let prepared = tokio::task::spawn_blocking(move || setup::prepare(&for_setup)).await;
        let prepared = match prepared {
            Ok(Ok(prepared)) => prepared,
            Ok(Err(error)) => return self.fail(chain(&error)),
            Err(error) => return self.fail(error.to_string()),
        };
        if let Ok(mut environment) = self.environment.write() {
            *environment = prepared.environment.clone().into_iter().collect();
        }
        for endpoint in &goal.endpoints {
            if self.tunnels.contains_key(&endpoint.local_port) {
                continue;
            }
            match tunnel::serve(endpoint.local_port) {
                Ok(task) => self.tunnels.insert(endpoint.local_port, task),
                Err(error) => return self.fail(format!("tunnel {}: {error}", endpoint.name)),
            };
        }
        self.prepared = Some(prepared);
        self.start_stack().await;
    }

    async fn start_stack(&mut self) {
        let Some(prepared) = self.prepared.clone() else {
            return;
        };
        match start(prepared, self.said.clone()).await {
            Ok(stack) => self.stack = Some(stack),
            Err(error) => self.fail(format!("bootstrapper: {error}")),
        }
    }

    async fn stop_stack(&mut self, heard: &mut mpsc::Receiver<Said>) {
        let Some(mut stack) = self.stack.take() else {
            return;
        };
        self.set(RoleState::Stopping, String::new());
        // It fails when the bootstrapper is gone, which is what is wanted.
        let _ = send(&mut stack.orders, &Order::Stop).await;
        let limit = tokio::time::sleep(stack.limit);
        tokio::pin!(limit);
        loop {
            tokio::select! {
                _ = stack.child.wait() => break,
                () = &mut limit => {
                    let _ = stack.child.kill().await;
                    break;
                }
                Some(said) = heard.recv() => self.heard(said),
            }
        }
        self.set(RoleState::Stopped, String::new());
    }

    /// Resolves when the bootstrapper ends.
    async fn stack_ended(&mut self) {
        match &mut self.stack {
            Some(stack) => {
                let _ = stack.child.wait().await;
            }
            None => std::future::pending().await,
        }
    }

    fn heard(&mut self, said: Said) {
        match said {
            Said::State {
                state,
                detail,
                recycles,
                last_exit,
                retry_in_ms,
            } => {
                self.logger
                    .agent("bootstrapper", format!("role {state:?} {detail}"));
                self.status.send_modify(|status| {
                    status.state = state;
                    status.detail = detail;
                    status.recycles = recycles;
                    if last_exit.is_some() {
                        status.last_exit = last_exit;
                    }
                    status.retry_in_ms = retry_in_ms;
                });
            }
            Said::Line { stream, text } => self.logger.line(LogSource::Role, &stream, text),
        }
    }

    fn set(&self, state: RoleState, detail: String) {
        self.status.send_modify(|status| {
            status.state = state;
            status.detail = detail;
            status.retry_in_ms = None;
        });
    }

    fn fail(&mut self, detail: String) {
        self.logger.agent(NAME, detail.clone());
        self.set(RoleState::Failed, detail);
    }
}

async fn start(prepared: Prepared, said: mpsc::Sender<Said>) -> std::io::Result<Stack> {
    let (ours, theirs) = UnixStream::pair()?;
    let theirs = theirs.into_std()?;
    theirs.set_nonblocking(false)?;
    let limit = Duration::from_millis(prepared.stop_timeout_ms) + STOP_MARGIN;
    let child = Command::new("/proc/self/exe")
        .arg("bootstrapper")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .process_group(0)
        .kill_on_drop(true)
        .spawn()?;
    let (reader, mut orders) = ours.into_split();
    send(&mut orders, &Order::Run(prepared))
        .await
        .map_err(std::io::Error::other)?;
    tokio::spawn(async move {
        let mut reader = FrameReader::new(reader);
        while let Ok(Some(message)) = reader.next::<Said>().await {
            if said.send(message).await.is_err() {
                return;
            }
        }
    });
    Ok(Stack {
        child,
        orders,
        limit,
    })
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
    while let Ok(mut socket) = UnixStream::connect(report::SOCKET).await {
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
            if status.changed().await.is_err() {
                return;
            }
        }
    }
}

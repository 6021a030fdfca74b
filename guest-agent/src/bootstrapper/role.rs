//! The bootstrapper process: one role, its output, its end, its next start.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::net::{UnixDatagram, UnixListener};
use tokio::process::{Child, Command};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;
use vmbus::message::{ExitCause, Goal, MAX_DETAIL, RoleState};
use vmbus::role::EntryPoint;
use vmbus::text::clip;

use super::recycle::Recycling;
use super::serve::{SharedOutbox, serve};
use super::{Order, Role};
use crate::backoff::Backoff;
use crate::clock;
use crate::environment::ROLE_ROOT;
use crate::failure::Failure;
use crate::log::lines;
use crate::os::cgroup::{self, Group};
use crate::os::user::ROLE_ID;
use crate::os::{child, remove};
use crate::setup::Launch;

/// Socket on which a role reports `READY=1` (sd_notify).
const NOTIFY: &str = "/run/host-agent/role-notify";
/// Most time for the last state and lines to reach the guest agent.
const LAST_SEND: Duration = Duration::from_secs(1);
/// Most time to read what is left in the pipes of a role that ended.
const LAST_LINES: Duration = Duration::from_millis(500);
/// Most time for killed processes to end.
const KILL_LIMIT: Duration = Duration::from_secs(5);
/// Delay after a start that failed, and the longest.
const FIRST_DELAY: Duration = Duration::from_secs(1);
const LONGEST_DELAY: Duration = Duration::from_secs(60);

/// How one run of the role ended.
enum RunEnd {
    /// The role ended by itself; how long it was Ready.
    Exited(ExitStatus, Option<Duration>),
    /// It was not started.
    NotStarted(Failure),
    /// The guest agent ordered the stop; whether the role ended in its time.
    Stopped(bool),
}

/// Runs until the order to stop.
pub async fn main() -> io::Result<()> {
    nix::sys::prctl::set_name(c"bootstrapper")?;
    let socket = io::stdin().as_fd().try_clone_to_owned()?;
    let socket = std::os::unix::net::UnixListener::from(socket);
    socket.set_nonblocking(true)?;
    let listener = UnixListener::from_std(socket)?;
    let outbox = Arc::new(SharedOutbox::new());
    let (order, mut orders) = mpsc::channel(1);
    let work = async {
        if let Some(Order::Run(goal)) = orders.recv().await {
            outbox.ordered(Goal::clone(&goal));
            let group = Group::at(cgroup::ROLE)?;
            if !goal.role.elevated {
                nix::sys::prctl::set_no_new_privs()?;
            }
            run(&goal, &group, &outbox, &mut orders).await;
        }
        outbox.flush(LAST_SEND).await;
        Ok(())
    };
    tokio::select! {
        result = work => result,
        () = serve(listener, &outbox, order) => Ok(()),
    }
}

/// Runs the role again and again, until any further order, which means stop.
async fn run(
    goal: &Goal,
    group: &Group,
    outbox: &Arc<SharedOutbox>,
    orders: &mut mpsc::Receiver<Order>,
) {
    let mut runner = RoleRunner {
        goal,
        launch: Launch::of(goal),
        group,
        outbox,
        recycling: Recycling::default(),
        last_exit: None,
        killed: false,
    };
    let mut not_started = Backoff::new(FIRST_DELAY, LONGEST_DELAY);
    let mut last_detail = String::new();
    loop {
        let (state, detail, delay) = match runner.run_once(orders).await {
            RunEnd::Stopped(in_time) => {
                if !in_time {
                    let limit = goal.stop_timeout_ms;
                    last_detail = format!("killed: not stopped within {limit} ms");
                }
                runner.killed = !in_time;
                break;
            }
            RunEnd::NotStarted(failure) if failure.permanent => {
                runner.report(RoleState::Failed, failure.detail, None);
                orders.recv().await;
                break;
            }
            RunEnd::NotStarted(failure) => {
                let delay = not_started.failed();
                let seconds = delay.as_secs();
                let detail = format!("{}; next attempt in {seconds} s", failure.detail);
                (RoleState::Recycling, detail, delay)
            }
            RunEnd::Exited(status, ready_for) => {
                not_started.reset();
                let cause = child::exit_cause(status);
                runner.last_exit = Some(cause);
                let (delay, state) = runner.recycling.ended(ready_for);
                let command = runner.launch.command.join(" ");
                (state, format!("{command} {}", describe(cause)), delay)
            }
        };
        runner.report(state, detail, Some(delay));
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            _ = orders.recv() => break,
        }
    }
    runner.report(RoleState::Stopped, last_detail, None);
}

/// A role and its record.
struct RoleRunner<'a> {
    goal: &'a Goal,
    launch: Launch,
    group: &'a Group,
    outbox: &'a Arc<SharedOutbox>,
    recycling: Recycling,
    last_exit: Option<ExitCause>,
    killed: bool,
}

impl RoleRunner<'_> {
    fn report(&self, state: RoleState, detail: String, retry: Option<Duration>) {
        self.outbox.state(Role {
            state,
            // A command may be long, and state and goal share a frame.
            detail: clip(detail, MAX_DETAIL),
            recycles: self.recycling.total(),
            last_exit: self.last_exit,
            retry_in_ms: retry.map(|d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX)),
            killed: self.killed,
        });
    }

    /// The role is Ready, from the returned time on.
    fn ready(&self) -> Instant {
        self.report(RoleState::Ready, String::new(), None);
        Instant::now()
    }

    async fn run_once(&self, orders: &mut mpsc::Receiver<Order>) -> RunEnd {
        let EntryPoint::Program { ready_on_start, .. } = self.goal.role.entry_point;
        self.report(RoleState::Starting, String::new(), None);
        let (mut child, notify) = match self.start().await {
            Ok(started) => started,
            Err(failure) => return RunEnd::NotStarted(failure),
        };
        let mut output = JoinSet::new();
        if let Some(stream) = child.stdout.take() {
            let outbox = Arc::clone(self.outbox);
            output.spawn(lines(stream, move |text| outbox.line("out", text)));
        }
        if let Some(stream) = child.stderr.take() {
            let outbox = Arc::clone(self.outbox);
            output.spawn(lines(stream, move |text| outbox.line("err", text)));
        }
        // `start` fails when the kernel refuses the program, so it runs now. If it ends
        // soon it is started again like one that ends late.
        let mut ready_since = ready_on_start.then(|| self.ready());
        let mut message = [0; 256];
        let end = loop {
            let becomes_ready = tokio::select! {
                status = child.wait() => break match status {
                    Ok(status) => {
                        RunEnd::Exited(status, ready_since.map(|since: Instant| since.elapsed()))
                    }
                    Err(error) => {
                        let detail = format!("cannot wait for the role: {error}");
                        RunEnd::NotStarted(Failure::passing(detail))
                    }
                },
                _ = orders.recv() => {
                    self.report(RoleState::Stopping, String::new(), None);
                    let limit = Duration::from_millis(self.goal.stop_timeout_ms);
                    break RunEnd::Stopped(stop(&mut child, &notify, limit).await);
                }
                // Read on after READY=1: a full datagram socket would block the role.
                Ok(count) = notify.recv(&mut message) => {
                    message[..count].split(|byte| *byte == b'\n').any(|line| line == b"READY=1")
                }
            };
            if becomes_ready && ready_since.is_none() {
                ready_since = Some(self.ready());
            }
        };
        // Every process that the role started ends too. Where one does not, the next start
        // fails and tries again; after a stop the guest agent does.
        let _ = self.clear().await;
        // Their ends of the pipes are closed now: what is left to read is the last output.
        let _ = clock::timeout(LAST_LINES, output.join_all()).await;
        end
    }

    /// Ends every process of the role.
    async fn clear(&self) -> Result<(), Failure> {
        match self.group.clear(KILL_LIMIT).await {
            Ok(true) => Ok(()),
            Ok(false) => {
                let detail = "processes of the role do not end";
                Err(Failure::passing(detail.into()))
            }
            Err(error) => Err(Failure::passing(format!("cannot end the role: {error}"))),
        }
    }

    /// Starts the role's program in a clean state; the program and its notify socket.
    async fn start(&self) -> Result<(Child, UnixDatagram), Failure> {
        self.clear().await?;
        let directories = self.launch.clean.clone();
        // Of a large tree this takes seconds, in which the guest agent is to be answered.
        tokio::task::spawn_blocking(move || clean(&directories))
            .await
            .map_err(|error| Failure::passing(error.to_string()))??;
        // The socket of an earlier run.
        let _ = fs::remove_file(NOTIFY);
        let notify = UnixDatagram::bind(NOTIFY)
            .map_err(|error| Failure::passing(format!("{NOTIFY}: {error}")))?;
        let _ = fs::set_permissions(NOTIFY, fs::Permissions::from_mode(0o666));
        let child = spawn(&self.launch, self.goal.role.elevated, self.group)?;
        Ok((child, notify))
    }
}

fn spawn(launch: &Launch, elevated: bool, group: &Group) -> Result<Child, Failure> {
    let Some((program, arguments)) = launch.command.split_first() else {
        return Err(Failure::permanent("the entry point has no command".into()));
    };
    let metadata = fs::metadata(program)
        .map_err(|error| Failure::of_program(format!("{program}: {error}"), &error))?;
    if !metadata.is_file() || metadata.permissions().mode() & 0o111 == 0 {
        let detail = format!("{program} is not an executable file: chmod +x it");
        return Err(Failure::permanent(detail));
    }
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .envs(&launch.environment)
        .env("NOTIFY_SOCKET", NOTIFY)
        .current_dir(format!("{ROLE_ROOT}/approot"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    child::join(&mut command, group)
        .map_err(|error| Failure::passing(format!("{program} has no control group: {error}")))?;
    child::drop_agent_privileges(&mut command);
    if !elevated {
        child::confine(&mut command, ROLE_ID)
            .map_err(|error| Failure::passing(format!("{program} has no filter: {error}")))?;
    }
    command.spawn().map_err(|error| {
        Failure::of_program(format!("{program} cannot be started: {error}"), &error)
    })
}

/// Sends SIGTERM to the role's process group and waits for its first process, for at most
/// `limit`; whether it ended. The caller kills what is left. Messages on `notify` are read
/// meanwhile, since a full socket would block the role.
async fn stop(child: &mut Child, notify: &UnixDatagram, limit: Duration) -> bool {
    // A child that was not waited for keeps its process id, and so the group.
    if let Some(id) = child.id().and_then(|id| i32::try_from(id).ok()) {
        let _ = killpg(Pid::from_raw(id), Signal::SIGTERM);
    }
    let mut message = [0; 256];
    let ended = async {
        loop {
            tokio::select! {
                _ = child.wait() => break,
                Ok(_) = notify.recv(&mut message) => {}
            }
        }
    };
    clock::timeout(limit, ended).await.is_ok()
}

fn clean(directories: &[PathBuf]) -> Result<(), Failure> {
    for directory in directories {
        remove::empty(directory).map_err(|error| {
            Failure::passing(format!("cannot empty {}: {error}", directory.display()))
        })?;
    }
    Ok(())
}

fn describe(cause: ExitCause) -> String {
    match cause {
        ExitCause::Code(code) => format!("exited with code {code}"),
        ExitCause::Signal(signal) => format!("was ended by signal {signal}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;
    use tokio::io::{AsyncBufReadExt, BufReader};

    /// A process in a group of its own that runs `script`, which has printed `runs`.
    async fn running(script: &str) -> Child {
        let mut child = Command::new("sh")
            .args(["-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert_eq!(lines.next_line().await.unwrap().as_deref(), Some("runs"));
        child
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_stop_tells_whether_the_role_ended_in_its_time() {
        let notify = UnixDatagram::unbound().unwrap();
        let mut polite = running("trap 'exit 3' TERM; echo runs; sleep 60 & wait").await;
        assert!(stop(&mut polite, &notify, Duration::from_secs(60)).await);
        let mut stubborn = running("trap '' TERM; echo runs; exec sleep 60").await;
        assert!(!stop(&mut stubborn, &notify, Duration::from_millis(100)).await);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_missing_or_plain_file_is_a_permanent_failure() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("cgroup.procs"), "").unwrap();
        let group = Group::at(directory.path().to_str().unwrap()).unwrap();
        let spawn = |path: &Path| {
            let launch = Launch {
                command: vec![path.to_str().unwrap().to_owned()],
                ..Launch::default()
            };
            spawn(&launch, true, &group).unwrap_err()
        };
        let program = directory.path().join("program");
        assert!(spawn(&program).permanent);
        fs::write(&program, "").unwrap();
        let failure = spawn(&program);
        assert!(failure.permanent && failure.detail.contains("chmod +x"));
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_full_notify_socket_does_not_block_a_role_that_stops() {
        let (notify, role) = UnixDatagram::pair().unwrap();
        let mut child = running("trap '' TERM; echo runs; read line").await;
        let end = child.stdin.take();
        let notifies = async {
            for _ in 0..1000 {
                role.send(b"STATUS=on its way down").await.unwrap();
            }
            drop(end);
        };
        let ((), in_time) =
            tokio::join!(notifies, stop(&mut child, &notify, Duration::from_secs(60)));
        assert!(in_time);
    }
}

//! The bootstrapper process: one role, its output, its end, its next start.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
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
use vmbus::message::{ExitCause, Goal, RoleState};
use vmbus::role::EntryPoint;

use super::recycle::Recycling;
use super::serve::{Desk, serve};
use super::{Order, Role};
use crate::log::lines;
use crate::os::cgroup::{self, Group};
use crate::os::child;
use crate::os::user::ROLE_ID;
use crate::setup::{Launch, ROLE_ROOT};

/// Where a role says `READY=1` (sd_notify).
const NOTIFY: &str = "/run/host-agent/role-notify";
/// Time for the last state and lines to reach the guest agent.
const FAREWELL: Duration = Duration::from_secs(1);
/// Time for what is left in the pipes of a role that ended.
const LAST_LINES: Duration = Duration::from_millis(500);
/// Time for killed processes to be gone.
const KILL_LIMIT: Duration = Duration::from_secs(5);

/// What ended one run of the role.
enum Over {
    /// It ended by itself.
    Exit(ExitStatus, Option<Duration>),
    /// It cannot be started.
    Impossible(String),
    /// The guest agent wanted it down, and it is; whether it stopped in time.
    Told(bool),
}

/// Runs until told to stop.
pub async fn main() -> io::Result<()> {
    nix::sys::prctl::set_name(c"bootstrapper")?;
    let socket = io::stdin().as_fd().try_clone_to_owned()?;
    let socket = std::os::unix::net::UnixListener::from(socket);
    socket.set_nonblocking(true)?;
    let listener = UnixListener::from_std(socket)?;
    let desk = Arc::new(Desk::new());
    let (order, mut orders) = mpsc::channel(1);
    let work = async {
        if let Some(Order::Run(goal)) = orders.recv().await {
            desk.ordered(Goal::clone(&goal));
            let group = Group::at(cgroup::ROLE)?;
            if !goal.role.elevated {
                nix::sys::prctl::set_no_new_privs()?;
            }
            run(&goal, &group, &desk, &mut orders).await;
        }
        desk.told(FAREWELL).await;
        Ok(())
    };
    tokio::select! {
        result = work => result,
        () = serve(listener, &desk, order) => Ok(()),
    }
}

/// Runs the role again and again, until any further order, which means stop.
async fn run(goal: &Goal, group: &Group, desk: &Arc<Desk>, orders: &mut mpsc::Receiver<Order>) {
    let mut watch = Watch {
        goal,
        launch: Launch::of(goal),
        group,
        desk,
        recycling: Recycling::default(),
        last_exit: None,
        killed: false,
    };
    let mut detail = String::new();
    loop {
        let (state, why, delay) = match watch.run_once(orders).await {
            Over::Told(in_time) => {
                if !in_time {
                    detail = format!("killed: not stopped within {} ms", goal.stop_timeout_ms);
                }
                watch.killed = !in_time;
                break;
            }
            Over::Impossible(detail) => {
                watch.say(RoleState::Failed, detail, None);
                orders.recv().await;
                break;
            }
            Over::Exit(status, ready_for) => {
                let cause = cause(status);
                watch.last_exit = Some(cause);
                let (delay, state) = watch.recycling.ended(ready_for);
                let why = format!("{} {}", watch.launch.command.join(" "), words(cause));
                (state, why, delay)
            }
        };
        watch.say(state, why, Some(delay));
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            _ = orders.recv() => break,
        }
    }
    watch.say(RoleState::Stopped, detail, None);
}

/// A role and its record.
struct Watch<'a> {
    goal: &'a Goal,
    launch: Launch,
    group: &'a Group,
    desk: &'a Arc<Desk>,
    recycling: Recycling,
    last_exit: Option<ExitCause>,
    killed: bool,
}

impl Watch<'_> {
    fn say(&self, state: RoleState, detail: String, retry: Option<Duration>) {
        self.desk.state(Role {
            state,
            detail,
            recycles: self.recycling.total(),
            last_exit: self.last_exit,
            retry_in_ms: retry.map(|d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX)),
            killed: self.killed,
        });
    }

    /// The role is Ready, from the returned time on.
    fn ready(&self) -> Instant {
        self.say(RoleState::Ready, String::new(), None);
        Instant::now()
    }

    async fn run_once(&self, orders: &mut mpsc::Receiver<Order>) -> Over {
        let EntryPoint::Program { ready_on_start, .. } = self.goal.role.entry_point;
        self.say(RoleState::Starting, String::new(), None);
        for directory in &self.launch.clean {
            if let Err(error) = empty(directory) {
                return Over::Impossible(format!("cannot empty {}: {error}", directory.display()));
            }
        }
        let notify = match UnixDatagram::bind(fresh(NOTIFY)) {
            Ok(socket) => socket,
            Err(error) => return Over::Impossible(format!("{NOTIFY}: {error}")),
        };
        let _ = fs::set_permissions(NOTIFY, fs::Permissions::from_mode(0o666));
        let mut child = match start(&self.launch, self.goal.role.elevated, self.group) {
            Ok(child) => child,
            Err(reason) => return Over::Impossible(reason),
        };
        let mut output = JoinSet::new();
        if let Some(stream) = child.stdout.take() {
            let desk = Arc::clone(self.desk);
            output.spawn(lines(stream, move |text| desk.line("out", text)));
        }
        if let Some(stream) = child.stderr.take() {
            let desk = Arc::clone(self.desk);
            output.spawn(lines(stream, move |text| desk.line("err", text)));
        }
        // The program runs: had the kernel refused it, `start` would have failed.
        // Should it end soon, it is started again like one that ends late.
        let mut ready_since = ready_on_start.then(|| self.ready());
        let mut message = [0; 256];
        let over = loop {
            let becomes_ready = tokio::select! {
                status = child.wait() => break match status {
                    Ok(status) => Over::Exit(status, ready_since.map(|since: Instant| since.elapsed())),
                    Err(error) => Over::Impossible(format!("cannot wait for the role: {error}")),
                },
                _ = orders.recv() => {
                    self.say(RoleState::Stopping, String::new(), None);
                    let limit = Duration::from_millis(self.goal.stop_timeout_ms);
                    break Over::Told(stop(&mut child, &notify, limit).await);
                }
                // Taken whatever it says, then and later: a role would wait for
                // ever to send one more than the kernel keeps.
                Ok(count) = notify.recv(&mut message) => {
                    message[..count].split(|byte| *byte == b'\n').any(|line| line == b"READY=1")
                }
            };
            if becomes_ready && ready_since.is_none() {
                ready_since = Some(self.ready());
            }
        };
        // Everything that the role started goes with it.
        match self.group.clear(KILL_LIMIT).await {
            Ok(true) => {}
            Ok(false) => return Over::Impossible("processes of the role do not die".into()),
            Err(error) => return Over::Impossible(format!("cannot end the role: {error}")),
        }
        // The last words are in the pipes, whose other ends are closed.
        let _ = tokio::time::timeout(LAST_LINES, output.join_all()).await;
        over
    }
}

fn start(launch: &Launch, elevated: bool, group: &Group) -> Result<Child, String> {
    let (program, arguments) = launch
        .command
        .split_first()
        .ok_or("the entry point has no command")?;
    let metadata = fs::metadata(program).map_err(|error| format!("{program}: {error}"))?;
    if !metadata.is_file() || metadata.permissions().mode() & 0o111 == 0 {
        return Err(format!("{program} is not an executable file: chmod +x it"));
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
        .map_err(|error| format!("{program} has no control group: {error}"))?;
    child::ordinary(&mut command, (!elevated).then_some(ROLE_ID));
    command
        .spawn()
        .map_err(|error| format!("{program} cannot be started: {error}"))
}

/// Asks the role's process group to end and waits for its first process, for
/// at most `limit`; whether it ended. What is left then is the caller's to kill.
/// What it has to say meanwhile is taken from `notify`.
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
    tokio::time::timeout(limit, ended).await.is_ok()
}

fn empty(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn fresh(path: &str) -> &str {
    // Left by an earlier run of the role.
    let _ = fs::remove_file(path);
    path
}

fn cause(status: ExitStatus) -> ExitCause {
    match status.signal() {
        Some(signal) => ExitCause::Signal(signal),
        None => ExitCause::Code(status.code().unwrap_or(-1)),
    }
}

fn words(cause: ExitCause) -> String {
    match cause {
        ExitCause::Code(code) => format!("exited with code {code}"),
        ExitCause::Signal(signal) => format!("was ended by signal {signal}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncBufReadExt, BufReader};

    /// A process in a group of its own that runs `script` and said that it does.
    async fn running(script: &str) -> Child {
        let mut child = Command::new("sh")
            .args(["-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut said = BufReader::new(child.stdout.take().unwrap()).lines();
        assert_eq!(said.next_line().await.unwrap().as_deref(), Some("runs"));
        child
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_role_that_does_not_stop_in_its_time_is_told_from_one_that_does() {
        let notify = UnixDatagram::unbound().unwrap();
        let mut polite = running("trap 'exit 3' TERM; echo runs; sleep 60 & wait").await;
        assert!(stop(&mut polite, &notify, Duration::from_secs(60)).await);
        let mut stubborn = running("trap '' TERM; echo runs; exec sleep 60").await;
        assert!(!stop(&mut stubborn, &notify, Duration::from_millis(100)).await);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_role_that_has_much_to_say_while_it_stops_does_not_wait_for_ever() {
        let (notify, role) = UnixDatagram::pair().unwrap();
        let mut child = running("trap '' TERM; echo runs; read line").await;
        let end = child.stdin.take();
        let says = async {
            for _ in 0..1000 {
                role.send(b"STATUS=on its way down").await.unwrap();
            }
            drop(end);
        };
        let ((), in_time) = tokio::join!(says, stop(&mut child, &notify, Duration::from_secs(60)));
        assert!(in_time);
    }
}

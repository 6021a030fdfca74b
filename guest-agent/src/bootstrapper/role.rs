//! The bootstrapper process: one role, its output, its end, its next start.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::net::UnixDatagram;
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio::sync::mpsc;
use tokio::time::Instant;
use vmbus::message::{ExitCause, RoleState};
use vmbus::stream::{FrameReader, send};

use super::recycle::Recycling;
use super::{Order, Said};
use crate::log::lines;
use crate::os::user::ROLE_ID;
use crate::setup::{Prepared, ROLE_ROOT};

/// A role whose process ends within this time of its start did not start.
const SETTLE: Duration = Duration::from_millis(500);
/// Where a role says `READY=1` (sd_notify).
const NOTIFY: &str = "/run/host-agent/role-notify";
/// Lines that may wait for the guest agent.
const BACKLOG: usize = 256;

/// What ended one run of the role.
enum Over {
    /// It ended by itself.
    Exit(ExitStatus, Option<Duration>),
    /// It cannot be started.
    Impossible(String),
    /// The guest agent wants it down, or is gone.
    Told,
}

/// Runs until told to stop.
pub async fn main() -> io::Result<()> {
    let socket = io::stdin().as_fd().try_clone_to_owned()?;
    let socket = std::os::unix::net::UnixStream::from(socket);
    socket.set_nonblocking(true)?;
    let (reader, mut writer) = UnixStream::from_std(socket)?.into_split();
    let mut orders = FrameReader::new(reader);
    let Ok(Some(Order::Run(role))) = orders.next::<Order>().await else {
        return Ok(());
    };
    if !role.elevated {
        nix::sys::prctl::set_no_new_privs()?;
    }
    let (say, mut said) = mpsc::channel::<Said>(BACKLOG);
    let shipping = tokio::spawn(async move {
        while let Some(message) = said.recv().await {
            if send(&mut writer, &message).await.is_err() {
                return;
            }
        }
    });
    let told = async move {
        // Any order after the first, and the end of the socket, mean stop.
        let _ = orders.next::<Order>().await;
    };
    tokio::pin!(told);
    let mut recycling = Recycling::default();
    loop {
        let over = run_once(&role, &say, &recycling, &mut told).await;
        let (state, detail, delay, cause) = match over {
            Over::Told => break,
            Over::Impossible(detail) => {
                state(&say, RoleState::Failed, detail, &recycling, None, None).await;
                told.as_mut().await;
                break;
            }
            Over::Exit(status, ready_for) => {
                let cause = cause(status);
                let (delay, state) = recycling.ended(ready_for);
                let detail = format!("{} {}", role.command.join(" "), words(cause));
                (state, detail, delay, cause)
            }
        };
        self::state(&say, state, detail, &recycling, Some(cause), Some(delay)).await;
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            () = &mut told => break,
        }
    }
    state(
        &say,
        RoleState::Stopped,
        String::new(),
        &recycling,
        None,
        None,
    )
    .await;
    drop(say);
    let _ = shipping.await;
    Ok(())
}

async fn state(
    say: &mpsc::Sender<Said>,
    state: RoleState,
    detail: String,
    recycling: &Recycling,
    last_exit: Option<ExitCause>,
    retry: Option<Duration>,
) {
    let said = Said::State {
        state,
        detail,
        recycles: recycling.total(),
        last_exit,
        retry_in_ms: retry.map(|d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX)),
    };
    let _ = say.send(said).await;
}

async fn run_once(
    role: &Prepared,
    say: &mpsc::Sender<Said>,
    recycling: &Recycling,
    told: &mut (impl Future<Output = ()> + Unpin),
) -> Over {
    state(
        say,
        RoleState::Starting,
        String::new(),
        recycling,
        None,
        None,
    )
    .await;
    for directory in &role.clean {
        if let Err(error) = empty(directory) {
            return Over::Impossible(format!("cannot empty {}: {error}", directory.display()));
        }
    }
    let notify = match UnixDatagram::bind(fresh(NOTIFY)) {
        Ok(socket) => socket,
        Err(error) => return Over::Impossible(format!("{NOTIFY}: {error}")),
    };
    let _ = fs::set_permissions(NOTIFY, fs::Permissions::from_mode(0o666));
    let mut child = match start(role) {
        Ok(child) => child,
        Err(reason) => return Over::Impossible(reason),
    };
    let group = child.id().and_then(|id| i32::try_from(id).ok());
    let mut output = Vec::new();
    if let Some(stream) = child.stdout.take() {
        output.push(tokio::spawn(ship(stream, "out", say.clone())));
    }
    if let Some(stream) = child.stderr.take() {
        output.push(tokio::spawn(ship(stream, "err", say.clone())));
    }
    let mut ready_since = None;
    let settled = tokio::time::sleep(SETTLE);
    tokio::pin!(settled);
    let mut message = [0; 256];
    let status = loop {
        let becomes_ready = tokio::select! {
            status = child.wait() => break status,
            () = &mut *told => {
                stop(&mut child, group, Duration::from_millis(role.stop_timeout_ms)).await;
                return Over::Told;
            }
            () = &mut settled, if ready_since.is_none() && role.ready_on_start => true,
            Ok(count) = notify.recv(&mut message), if ready_since.is_none() && !role.ready_on_start => {
                message[..count].split(|byte| *byte == b'\n').any(|line| line == b"READY=1")
            }
        };
        if becomes_ready {
            ready_since = Some(Instant::now());
            state(say, RoleState::Ready, String::new(), recycling, None, None).await;
        }
    };
    // Children that the role left behind go with it.
    signal(group, Signal::SIGKILL);
    for task in output {
        // A child in a session of its own may hold the pipe: what it still
        // writes is no longer the role's.
        let _ = tokio::time::timeout(SETTLE, task).await;
    }
    match status {
        Ok(status) => Over::Exit(status, ready_since.map(|since| since.elapsed())),
        Err(error) => Over::Impossible(format!("cannot wait for the role: {error}")),
    }
}

fn start(role: &Prepared) -> Result<Child, String> {
    let (program, arguments) = role
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
        .envs(&role.environment)
        .env("NOTIFY_SOCKET", NOTIFY)
        .current_dir(format!("{ROLE_ROOT}/approot"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    if !role.elevated {
        command.uid(ROLE_ID).gid(ROLE_ID);
    }
    command
        .spawn()
        .map_err(|error| format!("{program} cannot be started: {error}"))
}

async fn ship(
    stream: impl tokio::io::AsyncRead + Unpin,
    name: &'static str,
    say: mpsc::Sender<Said>,
) {
    let (sender, mut receiver) = mpsc::channel(1);
    let forward = async {
        while let Some(text) = receiver.recv().await {
            let stream = name.to_owned();
            if say.send(Said::Line { stream, text }).await.is_err() {
                return;
            }
        }
    };
    tokio::join!(forward, lines(stream, sender));
}

async fn stop(child: &mut Child, group: Option<i32>, limit: Duration) {
    signal(group, Signal::SIGTERM);
    if tokio::time::timeout(limit, child.wait()).await.is_err() {
        signal(group, Signal::SIGKILL);
        let _ = child.wait().await;
    }
    signal(group, Signal::SIGKILL);
}

fn signal(group: Option<i32>, signal: Signal) {
    if let Some(group) = group {
        // The group is gone when its last process is.
        let _ = killpg(Pid::from_raw(group), signal);
    }
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

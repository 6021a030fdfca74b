//! The app agent: PID 1 of the guest. Boots it, answers heartbeats, takes the
//! guest agent over the bus, keeps it running, shuts the guest down.

use std::collections::VecDeque;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use guest_agent::log::uptime_ms;
use guest_agent::os::{boot, disk, loopback};
use guest_agent::report::{self, Report};
use guest_agent::{RUN_DIR, bus, delivery};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, sync};
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use vmbus::channel::Channel;
use vmbus::message::{AgentState, Beat, Health, PowerAction, RoleState, ToGuest, ToHost};
use vmbus::stream::{FrameReader, send};
use vmbus::text::chain;

const NAME: &str = "app-agent";
/// Where the delivered program is kept, in memory.
const PROGRAM: &str = "/run/host-agent/guest-agent";
/// Serial number of the OS disk.
const OS_DISK: &str = "os";
/// This many deaths of the guest agent within the window are critical.
const CRITICAL_DEATHS: usize = 3;
const DEATH_WINDOW: Duration = Duration::from_secs(300);
/// Wait before the guest agent is started again, then, when critical.
const RESTART_WAIT: Duration = Duration::from_millis(500);
const CRITICAL_WAIT: Duration = Duration::from_secs(30);
/// Time for processes that no agent stopped.
const LAST_PROCESSES: Duration = Duration::from_secs(2);

/// What heartbeats tell.
#[derive(Debug)]
struct State {
    health: Health,
    report: Option<(Report, Instant)>,
    starts: u32,
}

type Shared = Arc<Mutex<State>>;

fn main() {
    let init_ms = uptime_ms();
    if let Err(error) = boot::mount_kernel_file_systems().and_then(|()| boot::load_modules()) {
        die(&chain(&error));
    }
    // The line by which boot times of any VMM can be compared.
    kernel_log(&format!("{NAME}: init at {init_ms} ms"));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    match runtime {
        Ok(runtime) => runtime.block_on(init(init_ms)),
        Err(error) => die(&error.to_string()),
    }
}

/// Without a root there is nothing to go on with: the kernel panics when PID 1
/// ends, which the host sees and reports.
fn die(reason: &str) -> ! {
    kernel_log(&format!("{NAME}: {reason}"));
    eprintln!("{NAME}: {reason}");
    std::process::exit(1)
}

fn kernel_log(line: &str) {
    eprintln!("{line}");
}

async fn init(init_ms: u64) {
    let shared: Shared = Arc::new(Mutex::new(State {
        health: Health::Unknown,
        report: None,
        starts: 0,
    }));
    tokio::spawn(control(init_ms));
    tokio::spawn(heartbeat(Arc::clone(&shared)));
    let (power, mut powered) = mpsc::channel(1);
    tokio::spawn(shutdown_channel(power));

    let rooted = tokio::task::spawn_blocking(|| {
        let device = disk::by_serial(OS_DISK).map_err(|error| chain(&error))?;
        boot::switch_root(&device).map_err(|error| chain(&error))
    });
    match rooted.await {
        Ok(Ok(())) => {}
        Ok(Err(reason)) => die(&reason),
        Err(error) => die(&error.to_string()),
    }
    if let Err(error) = loopback::up() {
        eprintln!("{NAME}: loopback: {error}");
    }
    if let Err(error) = listen_for_reports(Arc::clone(&shared)) {
        eprintln!("{NAME}: {}: {error}", report::SOCKET);
    }
    let (deaths, ended) = mpsc::channel(16);
    tokio::spawn(reap(deaths));
    let (pid, current) = watch::channel(None);
    tokio::spawn(keep_agent(Arc::clone(&shared), ended, pid));
    if let Some((then, deadline)) = powered.recv().await {
        shut_down(&shared, current, then, deadline).await;
    }
}

fn with<T>(shared: &Shared, change: impl FnOnce(&mut State) -> T) -> T {
    change(&mut shared.lock().unwrap_or_else(PoisonError::into_inner))
}

async fn control(init_ms: u64) {
    loop {
        let mut open = bus::dial_until_open(Channel::Control, NAME).await;
        let booted = ToHost::Booted {
            init_ms,
            now_ms: uptime_ms(),
        };
        if send(&mut open.writer, &booted).await.is_ok() {
            // The host says nothing here; the end of the channel is news.
            let _ = open.reader.next::<ToGuest>().await;
        }
    }
}

async fn heartbeat(shared: Shared) {
    let boot_id = bus::boot_id();
    loop {
        let mut open = bus::dial_until_open(Channel::Heartbeat, NAME).await;
        while let Ok(Some(ToGuest::Ask { sequence })) = open.reader.next().await {
            let beat = with(&shared, |state| Beat {
                sequence,
                boot_id: boot_id.clone(),
                health: state.health,
                applied_incarnation: state.report.map_or(0, |(report, _)| report.incarnation),
                agent: state.report.map(|(report, _)| AgentState {
                    role: report.role,
                    starts: state.starts,
                }),
                agent_age_ms: state.report.map_or(0, |(_, at)| {
                    u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX)
                }),
            });
            if send(&mut open.writer, &ToHost::Beat(beat)).await.is_err() {
                break;
            }
        }
    }
}

async fn shutdown_channel(power: mpsc::Sender<(PowerAction, Duration)>) {
    loop {
        let mut open = bus::dial_until_open(Channel::Shutdown, NAME).await;
        while let Ok(Some(message)) = open.reader.next().await {
            if let ToGuest::Shutdown { then, deadline_ms } = message {
                let _ = send(&mut open.writer, &ToHost::ShutdownBegun {}).await;
                let _ = power.send((then, Duration::from_millis(deadline_ms))).await;
            }
        }
    }
}

fn listen_for_reports(shared: Shared) -> std::io::Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(RUN_DIR)?;
    let listener = UnixListener::bind(report::SOCKET)?;
    std::fs::set_permissions(report::SOCKET, std::fs::Permissions::from_mode(0o600))?;
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let shared = Arc::clone(&shared);
            tokio::spawn(async move {
                let mut reader = FrameReader::new(socket);
                while let Ok(Some(report)) = reader.next::<Report>().await {
                    with(&shared, |state| {
                        if report.role != RoleState::Unknown && state.health == Health::Unknown {
                            state.health = Health::Healthy;
                        }
                        state.report = Some((report, Instant::now()));
                    });
                }
            });
        }
    });
    Ok(())
}

/// Reaps every child: PID 1 inherits the orphans of the guest.
async fn reap(deaths: mpsc::Sender<(Pid, String)>) {
    let Ok(mut children) = signal(SignalKind::child()) else {
        die("no SIGCHLD");
    };
    loop {
        loop {
            let (pid, how) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, format!("exited with code {code}")),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, format!("was ended by {signal}")),
                Ok(WaitStatus::StillAlive) | Err(_) => break,
                Ok(_) => continue,
            };
            // Nobody waits for orphans: a full channel loses nothing.
            let _ = deaths.try_send((pid, how));
        }
        children.recv().await;
    }
}

/// Takes the guest agent over the bus, runs it, and runs it again.
async fn keep_agent(
    shared: Shared,
    mut ended: mpsc::Receiver<(Pid, String)>,
    current: watch::Sender<Option<Pid>>,
) {
    let mut deaths: VecDeque<Instant> = VecDeque::new();
    let mut open = bus::dial_until_open(Channel::Agent, NAME).await;
    let mut delivered = false;
    loop {
        if !delivered {
            match delivery::receive(&mut open, Path::new(PROGRAM)).await {
                Ok(_) => delivered = true,
                Err(error) => {
                    let error = Some(chain(&error));
                    let _ = send(&mut open.writer, &ToHost::AgentResult { error }).await;
                    open = bus::dial_until_open(Channel::Agent, NAME).await;
                    continue;
                }
            }
        }
        let started = Command::new(PROGRAM)
            .env_clear()
            .env("PATH", guest_agent::setup::PATH)
            .spawn();
        let error = match &started {
            Ok(_) => None,
            Err(error) => Some(format!("cannot start: {error}")),
        };
        let _ = send(&mut open.writer, &ToHost::AgentResult { error }).await;
        let Ok(child) = started else {
            with(&shared, |state| state.health = Health::Critical);
            tokio::time::sleep(CRITICAL_WAIT).await;
            continue;
        };
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap_or_default());
        current.send_replace(Some(pid));
        with(&shared, |state| state.starts += 1);
        let how = loop {
            match ended.recv().await {
                Some((dead, how)) if dead == pid => break how,
                Some(_) => {}
                None => return,
            }
        };
        current.send_replace(None);
        if with(&shared, |state| state.health == Health::Stopped) {
            return;
        }
        eprintln!("{NAME}: guest agent {how}");
        deaths.push_back(Instant::now());
        while deaths.front().is_some_and(|at| at.elapsed() > DEATH_WINDOW) {
            deaths.pop_front();
        }
        let critical = deaths.len() >= CRITICAL_DEATHS;
        with(&shared, |state| {
            state.health = if critical {
                Health::Critical
            } else {
                Health::Unknown
            };
        });
        let wait = if critical {
            CRITICAL_WAIT
        } else {
            RESTART_WAIT
        };
        tokio::time::sleep(wait).await;
    }
}

async fn shut_down(
    shared: &Shared,
    mut agent: watch::Receiver<Option<Pid>>,
    then: PowerAction,
    deadline: Duration,
) {
    with(shared, |state| state.health = Health::Stopped);
    let pid = *agent.borrow();
    if let Some(pid) = pid {
        // The guest agent stops the role within its own limit.
        let _ = kill(pid, Signal::SIGTERM);
        let gone = agent.wait_for(Option::is_none);
        let _ = tokio::time::timeout(deadline, gone).await;
    }
    let _ = tokio::task::spawn_blocking(move || end(then)).await;
}

/// Ends what still runs, writes everything, and leaves the machine.
fn end(then: PowerAction) {
    let everyone = Pid::from_raw(-1);
    let _ = kill(everyone, Signal::SIGTERM);
    let deadline = Instant::now() + LAST_PROCESSES;
    while kill(everyone, None).is_ok() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    let _ = kill(everyone, Signal::SIGKILL);
    sync();
    for target in [guest_agent::setup::ROLE_ROOT, guest_agent::setup::RESOURCE] {
        let _ = umount2(target, MntFlags::MNT_DETACH);
    }
    let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    let _ = mount(None::<&str>, "/", None::<&str>, read_only, None::<&str>);
    sync();
    let mode = match then {
        PowerAction::PowerOff => RebootMode::RB_POWER_OFF,
        PowerAction::Reboot => RebootMode::RB_AUTOBOOT,
    };
    let error = reboot(mode).err();
    eprintln!("{NAME}: cannot leave the machine: {error:?}");
}

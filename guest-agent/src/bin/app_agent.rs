//! The app agent: PID 1 of the guest. Boots it, answers heartbeats, keeps the guest agent of
//! the image running, or one that it took over the bus, shuts the guest down.

use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use guest_agent::agent_monitor::{AgentMonitor, TICK, Tick};
use guest_agent::bootstrapper::client::Bootstrapper;
use guest_agent::bus::Dialer;
use guest_agent::log::uptime_ms;
use guest_agent::os::{boot, disk, loopback, power, user};
use guest_agent::report::{self, Report};
use guest_agent::update::{self, AgentFiles, Failure, Start, Updates};
use guest_agent::{RUN_DIR, bus, clock, delivery};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use vmbus::agent_signature::TrustedKeys;
use vmbus::channel::Channel;
use vmbus::message::{PowerAction, ToGuest, ToHost};
use vmbus::stream::{FrameReader, send};
use vmbus::text::chain;

const NAME: &str = "app-agent";
/// The guest agent of the image.
const IMAGE_PROGRAM: &str = "/usr/lib/host-agent/guest-agent";
/// Where the guest agent is kept in memory if the image has none and it is delivered.
const DELIVERED_PROGRAM: &str = "/run/host-agent/guest-agent";
/// Guest agents that were installed over the bus, on the OS disk.
const INSTALLED: &str = "/var/lib/host-agent/agents";
/// Time for a guest agent that is replaced to send its last lines.
const REPLACE_LIMIT: Duration = Duration::from_secs(2);
/// Serial number of the OS disk.
const OS_DISK: &str = "os";
/// Most time for the OS disk to appear.
const OS_DISK_LIMIT: Duration = Duration::from_secs(60);
/// Time beyond the role's own for the guest agent to report that it killed the role.
/// Together with the last steps (`power`) it is less than the host waits.
const REPORT_MARGIN: Duration = Duration::from_secs(3);
/// RCU is expedited for this long: most roles are Ready by then.
const EXPEDITE_RCU_FOR: Duration = Duration::from_secs(30);

type SharedMonitor = Arc<Mutex<AgentMonitor>>;

/// The guest agent's process. The tasks that start it, reap it and signal it run on one
/// thread and do not wait in between, so the process id in `Running` is of a process that
/// was not reaped.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Process {
    None,
    Running(Pid),
    /// How it ended.
    Ended(String),
}

fn main() {
    let init_ms = uptime_ms();
    if let Err(error) = boot::mount_kernel_file_systems().and_then(|()| boot::load_modules()) {
        die(&chain(&error));
    }
    boot::expedite_rcu(true);
    // Benchmarks read this line, and compare boot times of VMMs by it.
    kernel_log(&format!("{NAME}: init at {init_ms} ms"));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    match runtime {
        Ok(runtime) => runtime.block_on(init(init_ms)),
        Err(error) => die(&error.to_string()),
    }
}

/// Ends PID 1, since the guest is of no use without its root file system: the kernel
/// panics, which the host sees and reports.
fn die(reason: &str) -> ! {
    kernel_log(&format!("{NAME}: {reason}"));
    eprintln!("{NAME}: {reason}");
    std::process::exit(1)
}

fn kernel_log(line: &str) {
    eprintln!("{line}");
}

async fn init(init_ms: u64) {
    let shared = SharedMonitor::default();
    tokio::spawn(control(init_ms));
    tokio::spawn(heartbeat(Arc::clone(&shared)));
    tokio::spawn(async {
        tokio::time::sleep(EXPEDITE_RCU_FOR).await;
        boot::expedite_rcu(false);
    });
    let (power, mut powered) = mpsc::channel(1);
    tokio::spawn(shutdown_channel(power));

    let rooted = tokio::task::spawn_blocking(prepare_root).await;
    let keys = match rooted {
        Ok(Ok(keys)) => keys,
        Ok(Err(reason)) => die(&reason),
        Err(error) => die(&error.to_string()),
    };
    if let Err(error) = loopback::up().and_then(|()| loopback::free_low_ports()) {
        eprintln!("{NAME}: loopback: {error}");
    }
    if let Err(error) = user::forbid_namespaces() {
        eprintln!("{NAME}: user namespaces: {error}");
    }
    let (agent, current) = watch::channel(Process::None);
    let agent = Arc::new(agent);
    let listening = listen_for_reports(Arc::clone(&shared));
    if let Err(error) = &listening {
        eprintln!("{NAME}: {}: {error}", report::SOCKET);
    }
    tokio::spawn(reap(Arc::clone(&agent)));
    let updates = tokio::select! {
        updates = serve_updates(keys) => updates,
        // The host may not deliver a guest agent, and no role runs.
        Some((then, _)) = powered.recv() => {
            let _ = tokio::task::spawn_blocking(move || power::leave(then)).await;
            return;
        }
    };
    // Without reports every guest agent would be taken for hung and killed.
    if listening.is_ok() {
        let watched = (Arc::clone(&shared), Arc::clone(&agent));
        tokio::spawn(watch_agent(watched.0, watched.1, Arc::clone(&updates)));
    }
    tokio::spawn(keep_agent(Arc::clone(&shared), agent, Arc::clone(&updates)));
    if let Some((then, deadline)) = powered.recv().await {
        shut_down(&shared, updates, current, then, deadline).await;
    }
}

/// Makes the OS disk the root; the keys of the image.
fn prepare_root() -> Result<TrustedKeys, String> {
    let keys = boot::image_keys().map_err(|error| chain(&error))?;
    let keys = TrustedKeys::parse(&keys).map_err(|error| chain(&error))?;
    let device = disk::by_serial(OS_DISK, OS_DISK_LIMIT).map_err(|error| chain(&error))?;
    boot::switch_root(&device).map_err(|error| chain(&error))?;
    Ok(keys)
}

/// Finds out what is installed, and serves channel *agent*.
async fn serve_updates(keys: TrustedKeys) -> Arc<Updates> {
    let program = if Path::new(IMAGE_PROGRAM).exists() {
        IMAGE_PROGRAM
    } else {
        take_program().await;
        DELIVERED_PROGRAM
    };
    let opened = tokio::task::spawn_blocking(move || {
        let files = AgentFiles::new(INSTALLED.into());
        // The programs of an image are of one build.
        let image = env!("CARGO_PKG_VERSION").parse();
        let image = image.expect("the version of this package is three numbers");
        Updates::open(files, image, program.into())
    });
    let (updates, messages) = match opened.await {
        Ok(opened) => opened,
        Err(error) => die(&error.to_string()),
    };
    let updates = Arc::new(updates);
    tokio::spawn(update::serve(Arc::clone(&updates), messages, keys, NAME));
    updates
}

fn with<T>(shared: &SharedMonitor, act: impl FnOnce(&mut AgentMonitor) -> T) -> T {
    act(&mut shared.lock().unwrap_or_else(PoisonError::into_inner))
}

async fn control(init_ms: u64) {
    let mut dialer = Dialer::new(Channel::Control, NAME);
    loop {
        let mut open = dialer.open().await;
        if send(&mut open.writer, &ToHost::Booted { init_ms })
            .await
            .is_ok()
        {
            // The host sends nothing here: this waits for the end of the channel.
            let _ = open.reader.next::<ToGuest>().await;
        }
    }
}

async fn heartbeat(shared: SharedMonitor) {
    let boot_id = bus::boot_id();
    let mut dialer = Dialer::new(Channel::Heartbeat, NAME);
    loop {
        let mut open = dialer.open().await;
        while let Ok(Some(ToGuest::Ask { sequence })) = open.reader.next().await {
            let beat = with(&shared, |monitor| {
                monitor.beat(sequence, boot_id.clone(), Instant::now())
            });
            if send(&mut open.writer, &ToHost::Beat(beat)).await.is_err() {
                break;
            }
        }
    }
}

async fn shutdown_channel(power: mpsc::Sender<(PowerAction, Duration)>) {
    let mut dialer = Dialer::new(Channel::Shutdown, NAME);
    loop {
        let mut open = dialer.open().await;
        while let Ok(Some(message)) = open.reader.next().await {
            if let ToGuest::Shutdown { then, deadline_ms } = message {
                let _ = send(&mut open.writer, &ToHost::ShutdownBegun {}).await;
                let _ = power.send((then, Duration::from_millis(deadline_ms))).await;
            }
        }
    }
}

fn listen_for_reports(shared: SharedMonitor) -> std::io::Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(RUN_DIR)?;
    let listener = UnixListener::bind(report::SOCKET)?;
    std::fs::set_permissions(report::SOCKET, std::fs::Permissions::from_mode(0o600))?;
    tokio::spawn(async move {
        loop {
            let Ok((socket, _)) = listener.accept().await else {
                tokio::time::sleep(bus::ACCEPT_PAUSE).await;
                continue;
            };
            let shared = Arc::clone(&shared);
            tokio::spawn(async move {
                let mut reader = FrameReader::new(socket);
                while let Ok(Some(report)) = reader.next::<Report>().await {
                    with(&shared, |monitor| monitor.reported(report.role));
                }
            });
        }
    });
    Ok(())
}

/// Reaps every child: PID 1 inherits the orphans of the guest.
async fn reap(agent: Arc<watch::Sender<Process>>) {
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
            agent.send_if_modified(|process| {
                let ended = *process == Process::Running(pid);
                if ended {
                    *process = Process::Ended(how);
                }
                ended
            });
        }
        children.recv().await;
    }
}

/// Kills a guest agent that hangs: this process then starts another, clients of its tunnels
/// see their connections close, and the role goes on. Confirms a new one that has proven itself.
async fn watch_agent(
    shared: SharedMonitor,
    agent: Arc<watch::Sender<Process>>,
    updates: Arc<Updates>,
) {
    loop {
        tokio::time::sleep(TICK).await;
        match with(&shared, AgentMonitor::tick) {
            Tick::Nothing => {}
            Tick::Kill => {
                if let Process::Running(pid) = *agent.borrow() {
                    let _ = kill(pid, Signal::SIGKILL);
                }
            }
            Tick::Proven => of_updates(&updates, Updates::confirm).await,
        }
    }
}

/// Work on the OS disk, which may take its time.
async fn of_updates<T: Send + 'static>(
    updates: &Arc<Updates>,
    work: impl FnOnce(&Updates) -> T + Send + 'static,
) -> T {
    let updates = Arc::clone(updates);
    match tokio::task::spawn_blocking(move || work(&updates)).await {
        Ok(result) => result,
        Err(error) => die(&error.to_string()),
    }
}

/// Runs the guest agent, and runs it again when it ends, or another one in its place. The role
/// of an earlier guest agent goes on meanwhile.
async fn keep_agent(
    shared: SharedMonitor,
    agent: Arc<watch::Sender<Process>>,
    updates: Arc<Updates>,
) {
    let mut process = agent.subscribe();
    while !with(&shared, |monitor| monitor.leaving()) {
        let start = of_updates(&updates, Updates::next).await;
        let end = match start_agent(&shared, &agent, &start) {
            Err(error) => format!("cannot start: {error}"),
            Ok(()) => {
                updates.send(ToHost::AgentResult { error: None });
                let ended = tokio::select! {
                    how = end_of(&mut process) => Some(how),
                    () = updates.replaced(&start) => None,
                };
                let Some(how) = ended else {
                    replace(&mut process).await;
                    with(&shared, AgentMonitor::replaced);
                    continue;
                };
                how
            }
        };
        let (hung, mut wait, again, leaving) = with(&shared, |monitor| {
            let (hung, now) = (monitor.hung(), Instant::now());
            let wait = monitor.ended(now);
            (hung, wait, monitor.keeps_dying(now), monitor.leaving())
        });
        let end = match hung {
            Some(how) => format!("{how} and {end}"),
            None => end,
        };
        if leaving {
            return;
        }
        eprintln!("{NAME}: guest agent {end}");
        updates.send(ToHost::AgentResult {
            error: Some(end.clone()),
        });
        let failure = match hung {
            _ if again => Failure::Again,
            Some(_) => Failure::Hung,
            None => Failure::Once,
        };
        if of_updates(&updates, move |it| it.failed(failure, &end)).await {
            with(&shared, AgentMonitor::replaced);
            wait = Duration::ZERO;
        }
        tokio::time::sleep(wait).await;
    }
}

/// How the guest agent that runs ends.
async fn end_of(process: &mut watch::Receiver<Process>) -> String {
    let ended = process.wait_for(|it| matches!(it, Process::Ended(_))).await;
    match ended.as_deref() {
        Ok(Process::Ended(how)) => how.clone(),
        // PID 1 keeps the sender.
        _ => "ended".into(),
    }
}

/// Ends the guest agent that runs, whose role goes on. One that knows SIGUSR1 sends its last
/// lines first; others are ended by it.
async fn replace(process: &mut watch::Receiver<Process>) {
    for (signal, limit) in [
        (Signal::SIGUSR1, REPLACE_LIMIT),
        (Signal::SIGKILL, Duration::MAX),
    ] {
        if let Process::Running(pid) = *process.borrow() {
            let _ = kill(pid, signal);
        }
        if clock::timeout(limit, end_of(process)).await.is_ok() {
            return;
        }
    }
}

/// Takes the program of an image that carries none, with growing waits after attempts that
/// fail.
async fn take_program() {
    let mut dialer = Dialer::new(Channel::Agent, NAME);
    loop {
        let mut open = dialer.open().await;
        let Err(error) = delivery::receive(&mut open, Path::new(DELIVERED_PROGRAM)).await else {
            return;
        };
        let error = chain(&error);
        eprintln!("{NAME}: guest agent not delivered: {error}");
        let error = Some(error);
        let _ = send(&mut open.writer, &ToHost::AgentResult { error }).await;
    }
}

/// Does not wait: see [`Process`].
fn start_agent(
    shared: &SharedMonitor,
    agent: &watch::Sender<Process>,
    start: &Start,
) -> std::io::Result<()> {
    let child = Command::new(&start.program)
        .env_clear()
        .env("PATH", guest_agent::environment::PATH)
        .spawn()?;
    let pid = i32::try_from(child.id()).expect("a process id is a positive i32");
    agent.send_replace(Process::Running(Pid::from_raw(pid)));
    with(shared, |monitor| monitor.started(start.watched));
    Ok(())
}

async fn shut_down(
    shared: &SharedMonitor,
    updates: Arc<Updates>,
    mut agent: watch::Receiver<Process>,
    then: PowerAction,
    deadline: Duration,
) {
    let works = with(shared, |monitor| {
        monitor.leave();
        monitor.works()
    });
    if works {
        // Beside the shutdown, which does not wait for the disk.
        tokio::task::spawn_blocking(move || updates.left_well());
    }
    let mut end = clock::deadline(deadline);
    let process = agent.borrow().clone();
    if let Process::Running(pid) = process {
        // The guest agent stops the role within this limit, and reports how.
        let _ = kill(pid, Signal::SIGTERM);
        let mut gone = Box::pin(agent.wait_for(|it| matches!(it, Process::Ended(_))));
        if clock::timeout_at(&mut end, &mut gone).await.is_err() {
            let _ = clock::timeout(REPORT_MARGIN, gone).await;
        }
    }
    // A role whose guest agent died is stopped too.
    let left = end.left(Instant::now());
    let orphan = async {
        if let Some(found) = Bootstrapper::find().await {
            let _ = found.bootstrapper.stop(left, drop).await;
        }
    };
    let _ = clock::timeout_at(&mut end, orphan).await;
    let _ = tokio::task::spawn_blocking(move || power::leave(then)).await;
}

//! An actor without KVM: what it does before a VMM process starts, and with the
//! last messages of one that ended.

pub(super) mod hanging;
mod holding;

use std::fs::{self, OpenOptions};
use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::AtomicU64;

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use tempfile::TempDir;
use tokio::task::JoinHandle;
use vmbus::frame;
use vmbus::message::{RoleState, Status, ToHost};
use vmbus::version::{Hello, SUPPORTED};

use super::drain::drain;
use super::headroom::tests::keeps_blocks;
use super::*;
use crate::channels::GuestChannels;
use crate::closer::Closer;
use crate::closer::tests::{busy, is_open};
use crate::store::content::ContentStore;
use crate::supervisor::event::Verdict;
use crate::supervisor::guest;
use crate::supervisor::guest::tests::image;
use crate::supervisor::lifecycle::RestartHistory;
use crate::supervisor::process::VmmProcess;
use crate::supervisor::process::tests::limited;
use crate::supervisor::timeline::Events;
use crate::vmm::control::{self, Attached, Event, ExitReason};
use crate::vmm::wire;

const LIMITS: Limits = Limits {
    role_stop: Duration::from_secs(30),
    power_off: Duration::from_secs(10),
    begin: Duration::from_secs(3),
    condemned: Duration::from_secs(30),
    vmm_stop: Duration::from_secs(2),
    death: Duration::from_secs(10),
};

fn spec(data_dir: &Path, image: &Image) -> InstanceSpec {
    let content = ContentStore::new(data_dir);
    guest::tests::spec(&content, &content.hold().unwrap(), image)
}

struct Started {
    dir: TempDir,
    handle: InstanceHandle,
    task: JoinHandle<()>,
    events: Events,
    listeners: HeldListeners,
}

/// Starts an instance without disks, after `change` has changed its directory.
fn started(change: impl FnOnce(&Path)) -> Started {
    started_as(HeartbeatRule::DEFAULT, false, change, |prepared| prepared)
}

fn started_as(
    rule: HeartbeatRule,
    durable: bool,
    change: impl FnOnce(&Path),
    origin: impl FnOnce(PreparedInstance) -> PreparedInstance,
) -> Started {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("instance");
    fs::create_dir(&path).unwrap();
    change(&path);
    let image = image(dir.path());
    let timeline = Timeline::start();
    let events = timeline.subscribe();
    let listeners = HeldListeners::default();
    let parts = InstanceParts {
        spec: spec(dir.path(), &image),
        image: Arc::new(image),
        dir: path,
        rule,
        limits: LIMITS,
        group: None,
        hello_limit: Duration::from_secs(10),
        dial_limit: Duration::from_secs(2),
        probe_limit: Duration::from_secs(3),
        ping_every: Duration::from_secs(10),
        prepare_limit: Duration::from_millis(10),
        rotation: Rotation::default(),
        listeners: listeners.clone(),
        timeline,
        durable,
        require_sandbox: false,
        offers: watch::channel(None).1,
    };
    let prepared = origin(PreparedInstance::new(parts).unwrap());
    let (handle, task) = prepared.start();
    Started {
        dir,
        handle,
        task: tokio::spawn(task),
        events,
        listeners,
    }
}

/// An instance with a VMM process that sends what the test sends on the socket.
fn running() -> (Started, OwnedFd) {
    adopted(Attached::default())
}

/// The same, of a VMM process that was attached in this state.
fn adopted(state: Attached) -> (Started, OwnedFd) {
    let (ours, theirs) = wire::pair().unwrap();
    let adopt = |prepared| adopting(prepared, limited(ours), state);
    (
        started_as(HeartbeatRule::DEFAULT, false, |_| {}, adopt),
        theirs,
    )
}

/// An instance that adopts `process`.
fn attached(rule: HeartbeatRule, process: VmmProcess) -> Started {
    let adopt = |prepared| adopting(prepared, process, Attached::default());
    started_as(rule, false, |_| {}, adopt)
}

fn adopting(prepared: PreparedInstance, process: VmmProcess, state: Attached) -> PreparedInstance {
    let history = RestartHistory {
        generation: 1,
        running: true,
        ..RestartHistory::default()
    };
    let attached = Attached {
        generation: 1,
        ..state
    };
    prepared.attached(history, process, attached)
}

impl Started {
    /// The first event of the timeline for which `wanted` is true.
    async fn event(&mut self, wanted: impl Fn(&EventKind) -> bool) -> EventKind {
        let found = async {
            loop {
                let event = self.events.next().await.expect("the instance runs");
                if wanted(&event.kind) {
                    return event.kind;
                }
            }
        };
        let limit = Duration::from_secs(20);
        tokio::time::timeout(limit, found).await.unwrap()
    }

    async fn end(self) {
        self.handle.send(Request::Kill).await;
        self.task.await.unwrap();
    }
}

/// The log of the VMM process is a pipe without a reader: its open hangs.
fn hanging() -> Started {
    started(|dir| mkfifo(&dir.join("vmm.log"), Mode::S_IRUSR | Mode::S_IWUSR).unwrap())
}

/// Ends the hang, and every later one of the same instance.
fn let_go(started: &Started) {
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(libc::O_NONBLOCK);
    let reader = options.open(started.dir.path().join("instance/vmm.log"));
    std::mem::forget(reader.unwrap());
}

#[tokio::test(flavor = "current_thread")]
async fn no_guest_starts_after_a_stop_in_its_preparation() {
    for request in [Request::Stop, Request::Kill] {
        let mut started = hanging();
        started.handle.send(request).await;
        (&mut started.task).await.unwrap();
        let_go(&started);
        let mut kinds = Vec::new();
        while let Some(event) = started.events.next().await {
            kinds.push(event.kind);
        }
        assert!(kinds.contains(&EventKind::Stopped { clean: true }));
        for kind in &kinds {
            let ends = matches!(kind, EventKind::Stopping | EventKind::Stopped { .. });
            let late = kind.to_string().contains("not ready after");
            assert!(ends || late, "{kinds:?}");
        }
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_preparation_that_hangs_holds_up_no_other_instance() {
    let hanging = hanging();
    let mut other = started(|_| {});
    while let Some(event) = other.events.next().await {
        if matches!(event.kind, EventKind::Restarting { .. }) {
            break;
        }
    }
    for started in [hanging, other] {
        started.handle.send(Request::Stop).await;
        let_go(&started);
        started.task.await.unwrap();
    }
}

/// Channels of a boot, and the guest's end of a connection to *status*.
struct Guest {
    _dir: TempDir,
    stream: UnixStream,
    events: mpsc::Receiver<(u64, ChannelEvent)>,
    open: mpsc::Receiver<std::convert::Infallible>,
}

fn guest() -> Guest {
    let dir = tempfile::tempdir().unwrap();
    let log = |name| Arc::new(QueuedWriter::open_log(&dir.path().join(name)).unwrap());
    let image = image(dir.path());
    let (sender, events) = mpsc::channel(1);
    let (alive, open) = mpsc::channel(1);
    let channels = Arc::new(GuestChannels {
        generation: 1,
        interval: Duration::from_secs(5),
        hello_limit: Duration::from_secs(10),
        events: sender,
        goal: watch::channel(spec(dir.path(), &image).goal).1,
        shutdown: watch::channel(None).1,
        program: image.agent,
        offers: watch::channel(None).1,
        role_log: log("role.log"),
        agent_log: log("agent.log"),
        alive,
        sequence: AtomicU64::new(0),
        budget: Arc::default(),
        closer: Closer::default(),
    });
    let (mut stream, theirs) = UnixStream::pair().unwrap();
    channels.accept(Channel::Status.port(), 700, theirs.into());
    let hello = Hello {
        channel: Channel::Status,
        versions: SUPPORTED.to_vec(),
        boot_id: "boot".into(),
        agent: "test".into(),
    };
    stream.write_all(&frame::encode(&hello).unwrap()).unwrap();
    Guest {
        _dir: dir,
        stream,
        events,
        open,
    }
}

fn status(killed: bool) -> Status {
    Status {
        incarnation: 1,
        applied: 1,
        state: RoleState::Stopped,
        detail: String::new(),
        recycles: 0,
        last_exit: None,
        retry_in_ms: None,
        killed,
    }
}

#[tokio::test(flavor = "current_thread")]
async fn the_last_status_counts_before_the_power_off() {
    let mut life = Lifecycle::new(LIMITS);
    let mut on = |input| life.on(input, Duration::ZERO, 0.5);
    on(Input::Start);
    on(Input::Spawned { pid: 1 });
    on(Input::Connected);
    on(Input::Stop);
    // Everything is in the sockets before the host looks at any of them.
    let mut guest = guest();
    for killed in [false, false, true] {
        let message = frame::encode(&ToHost::Status(status(killed))).unwrap();
        guest.stream.write_all(&message).unwrap();
    }
    guest.stream.shutdown(Shutdown::Write).unwrap();
    let mut seen = 0;
    let limit = Duration::from_secs(600);
    let whole = drain(&mut guest.events, &mut guest.open, limit, |_, event| {
        if let ChannelEvent::Status(status) = event {
            seen += 1;
            on(Input::Status(status));
        }
        true
    });
    assert!(whole.await);
    assert_eq!(seen, 3);
    let effects = on(Input::Ended(ExitReason::PowerOff));
    let unclean = Effect::Report(EventKind::Stopped { clean: false });
    assert!(effects.contains(&unclean), "{effects:?}");
}

#[tokio::test(flavor = "current_thread")]
async fn a_connection_that_stays_open_is_not_waited_for() {
    let mut guest = guest();
    let limit = Duration::from_millis(1);
    assert!(drain(&mut guest.events, &mut guest.open, limit, |_, _| true).await);
    assert!(guest.open.try_recv() == Err(mpsc::error::TryRecvError::Empty));
    drop(guest.stream);
}

#[tokio::test(flavor = "current_thread")]
async fn an_adopted_guest_whose_writes_fail_when_full_is_reported() {
    let (mut started, _theirs) = adopted(Attached {
        fails_when_full: true,
        ..Attached::default()
    });
    let warned = |kind: &EventKind| matches!(kind, EventKind::Warning { text } if text.contains("fails instead of pausing"));
    started.event(warned).await;
    started.end().await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_guest_has_two_connections_for_each_channel_at_most() {
    let (mut started, theirs) = running();
    let open = || {
        let (guest, host) = UnixStream::pair().unwrap();
        let opened = Event::Opened {
            port: Channel::Heartbeat.port(),
            source_port: 7,
        };
        wire::send(theirs.as_fd(), &opened, &[host.as_fd()]).unwrap();
        guest
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        guest
    };
    let mut guests: Vec<UnixStream> = (0..14).map(|_| open()).collect();
    let mut excess = open();
    let warned = |kind: &EventKind| kind.to_string().contains("too many connections");
    started.event(warned).await;
    let closed = tokio::task::spawn_blocking(move || excess.read(&mut [0]));
    assert_eq!(closed.await.unwrap().unwrap(), 0);
    for guest in &guests {
        guest.set_nonblocking(true).unwrap();
        let mut stream = guest;
        let open = stream.read(&mut [0]).unwrap_err();
        assert_eq!(open.kind(), std::io::ErrorKind::WouldBlock);
    }
    // The end of one makes space for another.
    drop(guests.pop());
    let hello = Hello {
        channel: Channel::Heartbeat,
        versions: SUPPORTED.to_vec(),
        boot_id: "boot".into(),
        agent: "test".into(),
    };
    let hello = frame::encode(&hello).unwrap();
    let served = async {
        loop {
            let mut guest = open();
            // Fails if the connection is closed already.
            let _ = guest.write_all(&hello);
            let read = tokio::task::spawn_blocking(move || guest.read(&mut [0; 64]));
            if read.await.unwrap().unwrap_or(0) > 0 {
                return;
            }
        }
    };
    let limit = Duration::from_secs(20);
    tokio::time::timeout(limit, served).await.unwrap();
    started.end().await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_guest_that_floods_is_ended_and_restarted() {
    let (mut started, theirs) = running();
    std::thread::spawn(move || {
        let event = wire::encode(&Event::Pong { id: 1 }).unwrap();
        while wire::send_bytes(theirs.as_fd(), &event, &[]).is_ok() {}
    });
    let verdict = |kind: &EventKind| matches!(kind, EventKind::Verdict { .. });
    let EventKind::Verdict { verdict, .. } = started.event(verdict).await else {
        panic!("not a verdict");
    };
    assert_eq!(verdict, Verdict::Floods);
    let restarting = |kind: &EventKind| matches!(kind, EventKind::Restarting { .. });
    let restarting = started.event(restarting).await;
    let text = restarting.to_string();
    assert!(text.contains("floods the host agent"), "{text}");
    started.end().await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_preparation_that_hangs_is_reported_once() {
    let mut started = hanging();
    let late = |kind: &EventKind| kind.to_string().contains("are not ready after");
    started.event(late).await;
    let_go(&started);
    // The boot goes on, and fails without disks.
    let restarting = |kind: &EventKind| {
        assert!(!late(kind));
        matches!(kind, EventKind::Restarting { .. })
    };
    started.event(restarting).await;
    started.end().await;
}

#[tokio::test(flavor = "current_thread")]
async fn the_last_record_of_a_stopped_instance_says_so() {
    let mut started = started_as(HeartbeatRule::DEFAULT, true, |_| {}, |prepared| prepared);
    let restarting = |kind: &EventKind| matches!(kind, EventKind::Restarting { .. });
    started.event(restarting).await;
    started.handle.send(Request::Stop).await;
    (&mut started.task).await.unwrap();
    let record = InstanceRecord::read(&started.dir.path().join("instance")).unwrap();
    assert_eq!(record.history.generation, 1);
    assert!(!record.history.running);
    // Neither does a restart wait that a stop has ended.
    assert_eq!(record.history.restart_at, None);
}

#[tokio::test(flavor = "current_thread")]
async fn only_the_closer_closes_an_excess_connection() {
    let (ours, theirs) = wire::pair().unwrap();
    let process = limited(ours);
    let busy = busy(process.closer());
    let mut started = attached(HeartbeatRule::DEFAULT, process);
    let open = |_| {
        let (guest, host) = UnixStream::pair().unwrap();
        let opened = Event::Opened {
            port: Channel::Heartbeat.port(),
            source_port: 7,
        };
        wire::send(theirs.as_fd(), &opened, &[host.as_fd()]).unwrap();
        guest
    };
    let guests: Vec<UnixStream> = (0..15).map(open).collect();
    let warned = |kind: &EventKind| kind.to_string().contains("too many connections");
    started.event(warned).await;
    assert!(guests.iter().all(is_open));
    drop(busy);
    started.end().await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_guest_that_runs_has_headroom() {
    let (ours, _theirs) = wire::pair().unwrap();
    let started = started_as(
        HeartbeatRule::DEFAULT,
        false,
        |dir| fs::write(guest::diff_path(dir), "diff").unwrap(),
        |prepared| adopting(prepared, limited(ours), Attached::default()),
    );
    let dir = started.dir.path().join("instance");
    if keeps_blocks(&dir) {
        let kept = async {
            while fs::metadata(guest::diff_path(&dir)).unwrap().blocks() < 16 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let limit = Duration::from_secs(20);
        tokio::time::timeout(limit, kept).await.unwrap();
    }
    started.end().await;
}

/// A rule that condemns a guest after a second of silence and a probe.
fn hasty() -> HeartbeatRule {
    let second = Duration::from_secs(1);
    HeartbeatRule::new(second / 4, second, second).unwrap()
}

/// What a VMM process sends that finds no space for a write of a byte.
fn no_space() -> Event {
    Event::NoSpace(control::NoSpace {
        disk: "os".into(),
        needed: 1,
        quota: false,
    })
}

fn is_refuted(kind: &EventKind) -> bool {
    kind.to_string()
        .contains("the guest's silence counts again")
}

#[tokio::test(flavor = "current_thread")]
async fn a_shortage_that_is_only_claimed_does_not_excuse_silence() {
    let (ours, theirs) = wire::pair().unwrap();
    let mut started = attached(hasty(), limited(ours));
    wire::send(theirs.as_fd(), &no_space(), &[]).unwrap();
    started.event(is_refuted).await;
    // It is not believed again.
    wire::send(theirs.as_fd(), &no_space(), &[]).unwrap();
    let again = |kind: &EventKind| kind.to_string().contains("says again that the host has no");
    started.event(again).await;
    started
        .event(|kind| matches!(kind, EventKind::Verdict { .. }))
        .await;
    started.end().await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_shortage_that_has_ended_is_not_refuted() {
    let (ours, theirs) = wire::pair().unwrap();
    let mut started = attached(hasty(), limited(ours));
    for event in [no_space(), Event::SpaceBack {}] {
        wire::send(theirs.as_fd(), &event, &[]).unwrap();
    }
    // The verdict takes longer than all looks.
    let verdict = |kind: &EventKind| {
        assert!(!is_refuted(kind));
        matches!(kind, EventKind::Verdict { .. })
    };
    started.event(verdict).await;
    started.end().await;
}

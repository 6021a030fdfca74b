//! Supervisors that come and go, against a guest that is not a machine.

mod attaching;

use std::os::fd::{AsFd, AsRawFd as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, bind, connect, socket};
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::vmm::control::{NoSpace, VERSIONS};
use crate::vmm::outbox::Outbox;
use crate::vmm::virtio::blk::EnospcHold;
use crate::vmm::wire;

/// Longest time that a test waits for an event.
const LIMIT: Duration = Duration::from_secs(20);

/// What was asked of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Asked {
    Pause,
    Resume,
    Dial(u64),
    Probe(u64),
    Stop,
}

struct FakeGuest {
    asked: mpsc::Sender<Asked>,
    reports: mpsc::Receiver<VcpuReport>,
    /// Ends when the host's disk is flushed.
    flush: mpsc::Receiver<()>,
    disks: Vec<DiskState>,
    exits: Arc<Mutex<u64>>,
    /// A processor leaves the guest late.
    late: Arc<AtomicBool>,
    /// The guest breaks a device again and again.
    breaks: Arc<AtomicBool>,
}

impl FakeGuest {
    fn ask(&self, asked: Asked) {
        // The test may have ended.
        let _ = self.asked.send(asked);
    }
}

impl Guest for FakeGuest {
    fn report(&mut self) -> Option<VcpuReport> {
        self.reports.try_recv().ok()
    }
    fn disks(&self) -> &[DiskState] {
        &self.disks
    }
    fn broken_devices(&mut self) -> Vec<Event> {
        let event = Event::DeviceNeedsReset {
            device: "rng".into(),
            reason: "test".into(),
        };
        vec![event; usize::from(self.breaks.load(Ordering::SeqCst))]
    }
    fn pause(&self) {
        self.ask(Asked::Pause);
    }
    fn is_paused(&self) -> bool {
        !self.late.load(Ordering::SeqCst)
    }
    fn resume(&self) {
        self.ask(Asked::Resume);
    }
    fn dial(&self, number: u64, _: u32, _: Vec<u8>, _: OwnedFd) {
        self.ask(Asked::Dial(number));
    }
    fn probe(&self, number: u64, _: u32) {
        self.ask(Asked::Probe(number));
    }
    fn stats(&self) -> Stats {
        let mut exits = self.exits.lock().unwrap();
        *exits += 1;
        Stats {
            exits: vec![*exits],
            ..Stats::default()
        }
    }
    fn stop(self) {
        self.ask(Asked::Stop);
        let _ = self.flush.recv();
    }
}

/// A running loop, seen from outside.
struct Fixture {
    dir: tempfile::TempDir,
    outbox: Outbox,
    wake: EventFd,
    asked: mpsc::Receiver<Asked>,
    report: mpsc::Sender<VcpuReport>,
    flush: Option<mpsc::Sender<()>>,
    hold: Arc<EnospcHold>,
    late: Arc<AtomicBool>,
    breaks: Arc<AtomicBool>,
    ended: JoinHandle<ExitReason>,
}

fn event() -> EventFd {
    EventFd::new(libc::EFD_NONBLOCK).unwrap()
}

/// A loop and its first supervisor.
fn start(outlives: bool) -> (Fixture, Supervisor) {
    start_with(outlives, |_| {})
}

fn start_with(outlives: bool, change: impl FnOnce(&mut Peers)) -> (Fixture, Supervisor) {
    start_limited(outlives, STOP_LIMIT, change)
}

fn start_limited(
    outlives: bool,
    stop_limit: Duration,
    change: impl FnOnce(&mut Peers),
) -> (Fixture, Supervisor) {
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = wire::pair().unwrap();
    let mut peers = Peers::new(ours, event()).unwrap();
    if outlives {
        let listener = seqpacket();
        let address = UnixAddr::new(&path(dir.path())).unwrap();
        bind(listener.as_raw_fd(), &address).unwrap();
        peers.listen(listener).unwrap();
    }
    change(&mut peers);
    let hold = Arc::new(EnospcHold::new(peers.wake().try_clone().unwrap(), event()));
    let (asked_sender, asked) = mpsc::channel();
    let (report, reports) = mpsc::channel();
    let (flush, flush_receiver) = mpsc::channel();
    let guest = FakeGuest {
        asked: asked_sender,
        reports,
        flush: flush_receiver,
        disks: vec![DiskState {
            serial: "os".into(),
            counters: Arc::default(),
            hold: Arc::clone(&hold),
        }],
        exits: Arc::default(),
        late: Arc::default(),
        breaks: Arc::default(),
    };
    let (late, breaks) = (Arc::clone(&guest.late), Arc::clone(&guest.breaks));
    let boot = Boot {
        name: "A_IN_0".into(),
        generation: 3,
        started: Instant::now(),
        setup_us: 5,
        outlives,
    };
    let (outbox, wake) = (peers.outbox().clone(), peers.wake().try_clone().unwrap());
    let done = wake.try_clone().unwrap();
    let teardown = Teardown::start(FakeGuest::stop, done).unwrap();
    let mut event_loop = EventLoop::new(peers, guest, boot, teardown);
    event_loop.stop_limit = stop_limit;
    let ended = std::thread::spawn(move || event_loop.run());
    let fixture = Fixture {
        dir,
        outbox,
        wake,
        asked,
        report,
        flush: Some(flush),
        hold,
        late,
        breaks,
        ended,
    };
    (fixture, Supervisor(theirs))
}

fn seqpacket() -> OwnedFd {
    let flags = SockFlag::SOCK_CLOEXEC;
    socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap()
}

fn path(dir: &Path) -> PathBuf {
    dir.join("vmm.sock")
}

impl Fixture {
    fn connect(&self) -> Supervisor {
        let socket = seqpacket();
        let address = UnixAddr::new(&path(self.dir.path())).unwrap();
        connect(socket.as_raw_fd(), &address).unwrap();
        Supervisor(socket)
    }

    fn attach(&self) -> (Supervisor, Attached) {
        let supervisor = self.connect();
        let answer = supervisor.ask_to_attach(VERSIONS);
        let Event::Attached(attached) = answer else {
            panic!("{answer:?}");
        };
        (supervisor, *attached)
    }

    fn asked(&self) -> Asked {
        self.asked.recv_timeout(LIMIT).unwrap()
    }

    fn report(&self, report: VcpuReport) {
        self.report.send(report).unwrap();
        self.wake.write(1).unwrap();
    }

    fn end(mut self) -> ExitReason {
        self.flush = None;
        self.ended.join().unwrap()
    }
}

/// One end of a control socket. Dropped, the supervisor is gone.
struct Supervisor(OwnedFd);

impl Supervisor {
    fn send(&self, command: &Command) {
        wire::send(self.0.as_fd(), command, &[]).unwrap();
    }

    fn next(&self) -> Option<Event> {
        let received = wire::recv::<Event>(self.0.as_fd()).unwrap();
        received.map(|(event, _)| event)
    }

    fn ask_to_attach(&self, versions: &[u32]) -> Event {
        let versions = versions.to_vec();
        self.send(&attach(versions));
        self.next().unwrap()
    }

    /// Everything before this was handled.
    fn ping(&self, id: u64) {
        self.send(&Command::Ping { id });
        assert_eq!(self.next(), Some(Event::Pong { id }));
    }
}

const fn attach(versions: Vec<u32>) -> Command {
    Command::Attach {
        versions,
        takes_listeners: false,
    }
}

#[test]
fn each_supervisor_gets_the_state_that_the_last_one_left() {
    let (fixture, first) = start(true);
    first.send(&Command::Pause {});
    assert_eq!(first.next(), Some(Event::Paused { paused: true }));
    first.send(&Command::FailWhenFull {});
    // Its last commands count.
    drop(first);
    let (second, attached) = fixture.attach();
    assert_eq!((attached.name.as_str(), attached.generation), ("A_IN_0", 3));
    assert!(attached.paused && attached.fails_when_full);
    assert_eq!(attached.version, 1);
    assert_eq!((attached.setup_us, attached.exit), (5, None));
    assert_eq!(attached.stats.exits, [1]);
    second.ping(1);
    second.send(&Command::Resume {});
    assert_eq!(second.next(), Some(Event::Paused { paused: false }));
    drop(second);
    let (third, attached) = fixture.attach();
    assert!(!attached.paused);
    assert_eq!(attached.stats.exits, [2]);
    third.send(&Command::Stop {});
    assert_eq!(
        [fixture.asked(), fixture.asked(), fixture.asked()],
        [Asked::Pause, Asked::Resume, Asked::Stop]
    );
    assert_eq!(fixture.end(), ExitReason::Stopped);
}

#[test]
fn a_guest_that_may_not_outlive_its_supervisor_ends_with_it() {
    let (fixture, first) = start(false);
    first.ping(1);
    drop(first);
    assert_eq!(fixture.asked(), Asked::Stop);
    assert_eq!(fixture.end(), ExitReason::Stopped);
}

#[test]
fn connections_that_do_not_attach_are_dropped() {
    let short = Duration::from_millis(50);
    let (fixture, first) = start_with(true, |peers| peers.set_attach_limit(short));
    drop(first);
    // More than are accepted at a time, and silent.
    let silent: Vec<_> = (0..8).map(|_| fixture.connect()).collect();
    let wrong = fixture.connect();
    wrong.send(&Command::Ping { id: 1 });
    assert_eq!(wrong.next(), None);
    let garbage = fixture.connect();
    wire::send(garbage.0.as_fd(), &"garbage", &[]).unwrap();
    assert_eq!(garbage.next(), None);
    fixture.attach();
    assert!(silent.iter().all(|silent| silent.next().is_none()));
}

#[test]
fn garbage_and_unknown_commands_are_counted_and_ignored() {
    let (fixture, first) = start(true);
    wire::send(first.0.as_fd(), &"garbage", &[]).unwrap();
    let future = br#"{"command":"future","with":{"fields":1}}"#;
    wire::send_bytes(first.0.as_fd(), future, &[]).unwrap();
    let more = br#"{"command":"ping","id":7,"more":true}"#;
    wire::send_bytes(first.0.as_fd(), more, &[]).unwrap();
    assert_eq!(first.next(), Some(Event::Pong { id: 7 }));
    drop(first);
    let (_second, attached) = fixture.attach();
    assert_eq!(attached.ignored_commands, 2);
}

#[test]
fn answers_to_a_supervisor_that_left_reach_nobody() {
    let (fixture, first) = start(true);
    first.send(&Command::Probe { id: 7, port: 1 });
    let Asked::Probe(before) = fixture.asked() else {
        panic!("no probe");
    };
    drop(first);
    let (second, _) = fixture.attach();
    second.send(&Command::Probe { id: 7, port: 1 });
    let Asked::Probe(after) = fixture.asked() else {
        panic!("no probe");
    };
    assert!(!fixture.outbox.dialed(before, DialOutcome::Connected));
    assert!(fixture.outbox.dialed(after, DialOutcome::Refused));
    let outcome = DialOutcome::Refused;
    assert_eq!(second.next(), Some(Event::Dialed { id: 7, outcome }));
}

#[test]
fn a_connection_of_the_guest_without_a_supervisor_is_reset() {
    let (fixture, first) = start(true);
    let opened = Event::Opened {
        port: 1,
        source_port: 1,
    };
    // One that the supervisor never received, one after its end.
    let (ours, guest) = wire::pair().unwrap();
    assert!(fixture.outbox.send(&opened, vec![ours]));
    drop(first);
    assert!(wire::recv::<Event>(guest.as_fd()).unwrap().is_none());
    let (second, _) = fixture.attach();
    second.ping(1);
    drop(second);
    let (third, _) = fixture.attach();
    assert!(fixture.outbox.send(&opened, vec![]));
    assert_eq!(third.next(), Some(opened));
}

#[test]
fn a_dial_without_its_descriptor_is_answered() {
    let (_fixture, first) = start(true);
    first.send(&Command::Dial {
        id: 7,
        port: 1,
        first: Vec::new(),
    });
    let outcome = DialOutcome::Unavailable;
    assert_eq!(first.next(), Some(Event::Dialed { id: 7, outcome }));
}

#[test]
fn a_wait_for_space_is_state_and_its_end_an_event() {
    let (fixture, first) = start(true);
    let quota = io::Error::from_raw_os_error(libc::EDQUOT);
    fixture.hold.begin(512, &quota);
    let no_space = NoSpace {
        disk: "os".into(),
        needed: 512,
        quota: true,
    };
    assert_eq!(first.next(), Some(Event::NoSpace(no_space.clone())));
    drop(first);
    let (second, attached) = fixture.attach();
    assert_eq!(attached.no_space, [no_space]);
    assert!(!attached.paused);
    fixture.hold.end();
    assert_eq!(second.next(), Some(Event::SpaceBack {}));
    assert_eq!(
        [fixture.asked(), fixture.asked()],
        [Asked::Pause, Asked::Resume]
    );
}

#[test]
fn a_space_shortage_that_no_supervisor_saw_is_not_reported_late() {
    let (fixture, first) = start(true);
    drop(first);
    let full = io::Error::from_raw_os_error(libc::ENOSPC);
    fixture.hold.begin(512, &full);
    assert_eq!(fixture.asked(), Asked::Pause);
    fixture.hold.end();
    assert_eq!(fixture.asked(), Asked::Resume);
    let (second, attached) = fixture.attach();
    assert_eq!(attached.no_space, []);
    second.ping(1);
}

#[test]
fn a_panic_without_a_supervisor_is_state() {
    let (fixture, first) = start(true);
    drop(first);
    fixture.report(VcpuReport::Panicked);
    // Attached only after the report was read.
    let (second, attached) = fixture.attach();
    let panicked = attached.panicked || second.next() == Some(Event::GuestPanicked {});
    assert!(panicked);
    drop(second);
    let (third, attached) = fixture.attach();
    assert!(attached.panicked);
    // It is not reported to it again.
    third.ping(1);
}

#[test]
fn a_supervisor_can_attach_while_the_disks_are_flushed() {
    let (fixture, first) = start(true);
    drop(first);
    fixture.report(VcpuReport::Exit(ExitReason::PowerOff));
    assert_eq!(fixture.asked(), Asked::Stop);
    let (second, attached) = fixture.attach();
    assert_eq!(attached.exit, Some(ExitReason::PowerOff));
    second.ping(1);
    // No further command has an effect on a guest that has ended.
    for command in [
        Command::Pause {},
        Command::Resume {},
        Command::FailWhenFull {},
        Command::Stop {},
    ] {
        second.send(&command);
    }
    second.send(&Command::Probe { id: 2, port: 1 });
    let outcome = DialOutcome::Unavailable;
    assert_eq!(second.next(), Some(Event::Dialed { id: 2, outcome }));
    second.send(&Command::Stats {});
    assert!(matches!(second.next(), Some(Event::Stats(stats)) if stats.exits == [1]));
    // The supervisor may leave too.
    drop(second);
    assert_eq!(fixture.end(), ExitReason::PowerOff);
}

#[test]
fn a_panic_is_reported_once_the_outbox_has_space() {
    let (fixture, supervisor) = start(false);
    while fixture.outbox.send(&Event::SpaceBack {}, vec![]) {}
    fixture.report(VcpuReport::Panicked);
    fixture.report(VcpuReport::Panicked);
    // The reports are read before a command, and the outbox is full.
    supervisor.send(&Command::Probe { id: 7, port: 1 });
    assert!(matches!(fixture.asked(), Asked::Probe(_)));
    let mut event = supervisor.next().unwrap();
    while event == (Event::SpaceBack {}) {
        event = supervisor.next().unwrap();
    }
    assert_eq!(event, Event::GuestPanicked {});
    supervisor.ping(1);
}

#[test]
fn devices_that_break_again_and_again_are_reported_rarely() {
    let (fixture, supervisor) = start(false);
    fixture.breaks.store(true, Ordering::SeqCst);
    let mut reported = 0;
    for id in 0..1000 {
        supervisor.send(&Command::Ping { id });
        while supervisor.next() != Some(Event::Pong { id }) {
            reported += 1;
        }
    }
    // Ten at once, then one a minute.
    assert!((10..=12).contains(&reported), "{reported}");
}

#[test]
fn a_pause_is_confirmed_once_every_processor_is_out() {
    let (fixture, supervisor) = start(false);
    fixture.late.store(true, Ordering::SeqCst);
    supervisor.send(&Command::Pause {});
    supervisor.ping(1);
    supervisor.ping(2);
    fixture.late.store(false, Ordering::SeqCst);
    assert_eq!(supervisor.next(), Some(Event::Paused { paused: true }));
    // Confirmed once.
    supervisor.ping(3);
    // A pause that ends before it was confirmed never is.
    fixture.late.store(true, Ordering::SeqCst);
    supervisor.send(&Command::Pause {});
    supervisor.send(&Command::Resume {});
    assert_eq!(supervisor.next(), Some(Event::Paused { paused: false }));
    fixture.late.store(false, Ordering::SeqCst);
    supervisor.ping(4);
}

#[test]
fn a_guest_whose_disks_are_not_flushed_in_time_has_failed() {
    let (fixture, _supervisor) = start_limited(false, Duration::from_millis(10), |_| {});
    fixture.report(VcpuReport::Exit(ExitReason::PowerOff));
    // `flush` stays open: the disk never answers.
    let reason = fixture.ended.join().unwrap();
    let detail = "PowerOff, and the disks were not flushed within 10ms".into();
    assert_eq!(reason, ExitReason::Failed { detail });
}

#[test]
fn a_supervisor_that_never_reads_does_not_stop_the_loop() {
    let (fixture, first) = start(true);
    while fixture.outbox.send(&Event::SpaceBack {}, vec![]) {}
    first.send(&Command::Pause {});
    assert_eq!(fixture.asked(), Asked::Pause);
    drop(first);
    // The next one gets its state first, and nothing of what waited.
    let (second, attached) = fixture.attach();
    assert!(attached.paused);
    second.ping(1);
}

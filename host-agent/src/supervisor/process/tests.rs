use std::os::unix::net::UnixStream as Blocking;
use std::sync::mpsc::RecvTimeoutError;
use std::time::Instant;

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use tokio::time::timeout;

use super::*;
use crate::closer::tests::{LINGER, busy, is_open, lingering};
use crate::event_budget::PAUSE;
use crate::token_bucket::Rate;
use crate::vmm::control::MAX_LISTENERS;

/// A process that speaks on the other end of `ours` whatever the test sends there.
pub(in crate::supervisor) fn process(program: &mut Program, ours: OwnedFd) -> VmmProcess {
    fcntl(&ours, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    let control = ControlSocket::new(UnixStream::from_std(ours.into()).unwrap());
    let child = program.spawn().unwrap();
    VmmProcess::new(ProcessHandle::child(child).unwrap(), control, None)
}

/// As [`process`], with a small budget of events.
pub(in crate::supervisor) fn limited(ours: OwnedFd) -> VmmProcess {
    let mut process = process(Program::new("sleep").arg("1000"), ours);
    let rate = |burst| Rate::new(burst, std::time::Duration::from_secs(1));
    process.control.budget = Arc::new(EventBudget::new(rate(50), rate(20)));
    process
}

/// As [`limited`], of a process that may outlive this one and has its directory `dir`.
pub(in crate::supervisor) fn outliving(ours: OwnedFd, dir: &Path) -> VmmProcess {
    let mut process = limited(ours);
    process.exit = Some(attach::exit_path(dir));
    process
}

/// Sends the commands that wait, of which the socket takes at least one.
async fn send_waiting(process: &mut VmmProcess) {
    let limit = std::time::Duration::from_millis(1);
    assert!(timeout(limit, process.next()).await.is_err());
}

#[tokio::test(flavor = "current_thread")]
async fn many_client_requests_do_not_delay_own_commands() {
    let (ours, theirs) = wire::pair().unwrap();
    let mut process = process(Program::new("sleep").arg("1000"), ours);
    let mut dialed = 0;
    while !process.is_behind() {
        let dial = Command::Dial {
            id: dialed,
            port: 1,
            first: Vec::new(),
        };
        process.send(&dial, Vec::new()).unwrap();
        dialed += 1;
    }
    let own = [
        Command::Ping { id: 7 },
        Command::Resume {},
        Command::Stop {},
    ];
    for command in &own {
        process.send(command, Vec::new()).unwrap();
    }
    // Everything arrives in order once the other end reads.
    let mut taken = Vec::new();
    while taken.len() < dialed as usize + own.len() {
        send_waiting(&mut process).await;
        taken.push(wire::recv::<Command>(theirs.as_fd()).unwrap().unwrap().0);
    }
    assert_eq!(taken[dialed as usize..], own);
    assert!(!process.is_behind());
}

#[tokio::test(flavor = "current_thread")]
async fn last_events_are_read_before_the_end_of_the_process() {
    let (ours, theirs) = wire::pair().unwrap();
    let sent = [Event::GuestPanicked {}, Event::Exited(ExitReason::PowerOff)];
    for event in &sent {
        wire::send(theirs.as_fd(), event, &[]).unwrap();
    }
    wire::send(ours.as_fd(), &Command::Stats {}, &[]).unwrap();
    drop(theirs);
    let mut process = process(Program::new("sleep").arg("1000"), ours);
    // The runtime has seen neither the socket nor the pidfd when the process ends.
    process.kill();
    while process.id().runs() {
        std::thread::yield_now();
    }
    for event in sent {
        assert!(matches!(process.next().await, VmmEvent::Event(heard, _) if heard == event));
    }
    for _ in 0..2 {
        let VmmEvent::Ended(ending) = process.next().await else {
            panic!("no end");
        };
        assert_eq!(ending.how.unwrap(), "was killed by signal 9");
        assert_eq!(ending.reason, None);
    }
}

#[tokio::test(flavor = "current_thread")]
async fn garbage_and_unknown_events_do_not_end_the_process() {
    let (ours, theirs) = wire::pair().unwrap();
    let mut process = process(Program::new("sleep").arg("1000"), ours);
    let (carried, far) = wire::pair().unwrap();
    wire::send_bytes(theirs.as_fd(), b"garbage", &[carried.as_fd()]).unwrap();
    let future = br#"{"event":"future","id":1}"#;
    wire::send_bytes(theirs.as_fd(), future, &[carried.as_fd()]).unwrap();
    wire::send(theirs.as_fd(), &Event::Pong { id: 1 }, &[]).unwrap();
    assert!(matches!(process.next().await, VmmEvent::Garbled(_)));
    assert!(matches!(
        process.next().await,
        VmmEvent::Event(Event::Unknown, _)
    ));
    assert!(matches!(
        process.next().await,
        VmmEvent::Event(Event::Pong { id: 1 }, _)
    ));
    assert!(process.id().runs());
    // Their files are closed.
    drop(carried);
    assert!(wire::recv::<Event>(far.as_fd()).unwrap().is_none());
    process.kill();
    assert!(matches!(process.next().await, VmmEvent::Ended(_)));
}

#[tokio::test(flavor = "current_thread")]
async fn descriptors_are_taken_only_where_they_belong() {
    let (ours, theirs) = wire::pair().unwrap();
    let mut process = process(Program::new("sleep").arg("1000"), ours);
    let opened = wire::encode(&Event::Opened {
        port: 10,
        source_port: 7,
    })
    .unwrap();
    let (stream, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    wire::send_bytes(theirs.as_fd(), &opened, &[stream.as_fd()]).unwrap();
    assert!(matches!(
        process.next().await,
        VmmEvent::Event(Event::Opened { .. }, Some(_))
    ));
    // Of another family, of another type, and no socket.
    let (tcp, _peer) = lingering();
    let (packets, _far) = wire::pair().unwrap();
    let file = tempfile::tempfile().unwrap();
    for wrong in [tcp.as_fd(), packets.as_fd(), file.as_fd()] {
        wire::send_bytes(theirs.as_fd(), &opened, &[wrong]).unwrap();
        assert!(matches!(process.next().await, VmmEvent::Garbled(_)));
    }
    wire::send_bytes(theirs.as_fd(), &opened, &[stream.as_fd(); 2]).unwrap();
    assert!(matches!(process.next().await, VmmEvent::Garbled(_)));
    wire::send_bytes(theirs.as_fd(), &opened, &[]).unwrap();
    assert!(matches!(
        process.next().await,
        VmmEvent::Event(Event::Opened { .. }, None)
    ));
}

#[tokio::test(flavor = "current_thread")]
async fn listeners_come_with_the_answer_to_attach_only() {
    let (ours, theirs) = wire::pair().unwrap();
    let mut process = process(Program::new("sleep").arg("1000"), ours);
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let file = tempfile::tempfile().unwrap();
    let attached = wire::encode(&Event::Attached(Box::default())).unwrap();
    let files = [file.as_fd(), listener.as_fd(), listener.as_fd()];
    wire::send_bytes(theirs.as_fd(), &attached, &files).unwrap();
    let (event, mut handed_over) = process.control.answer().await.unwrap().unwrap();
    assert!(matches!(event, Ok(Event::Attached(_))));
    assert_eq!(handed_over.foreign(&[address]), 1);
    assert!(handed_over.take(address).is_some());
    // More than a service has, and with another event.
    let many = vec![listener.as_fd(); MAX_LISTENERS + 1];
    wire::send_bytes(theirs.as_fd(), &attached, &many).unwrap();
    let (event, handed_over) = process.control.answer().await.unwrap().unwrap();
    assert!(event.is_err());
    assert_eq!(handed_over.foreign(&[]), 0);
    wire::send(theirs.as_fd(), &Event::Pong { id: 1 }, &files[1..2]).unwrap();
    let (_, handed_over) = process.control.answer().await.unwrap().unwrap();
    assert_eq!(handed_over.foreign(&[]), 0);
    // Later it is an event without descriptors.
    wire::send_bytes(theirs.as_fd(), &attached, &files[1..]).unwrap();
    assert!(matches!(
        process.next().await,
        VmmEvent::Event(Event::Attached(_), None)
    ));
}

#[tokio::test(flavor = "current_thread")]
async fn descriptors_that_close_slowly_stop_no_supervisor() {
    let (ours, theirs) = wire::pair().unwrap();
    let mut process = process(Program::new("sleep").arg("1000"), ours);
    let mut peers = Vec::new();
    let started = Instant::now();
    // With an event, with garbage, and more than an event may carry.
    for (bytes, count) in [
        (&br#"{"event":"pong","id":1}"#[..], 1),
        (&b"garbage"[..], 1),
        (&br#"{"event":"pong","id":1}"#[..], 100),
    ] {
        let (slow, peer) = lingering();
        let copies = vec![slow.as_fd(); count];
        wire::send_bytes(theirs.as_fd(), bytes, &copies).unwrap();
        drop(slow);
        peers.push(peer);
        process.next().await;
    }
    // And one that is never read.
    let (slow, peer) = lingering();
    wire::send_bytes(theirs.as_fd(), b"garbage", &[slow.as_fd()]).unwrap();
    drop((slow, theirs, process));
    assert!(started.elapsed() < LINGER / 4);
    drop((peer, peers));
}

#[tokio::test(flavor = "current_thread")]
async fn only_the_closer_closes_what_the_process_has_had() {
    let (ours, theirs) = wire::pair().unwrap();
    let mut process = process(Program::new("sleep").arg("1000"), ours);
    let busy = busy(process.closer());
    // A socket of a client that was sent, and that the process has closed already.
    let (client, sent) = Blocking::pair().unwrap();
    let dial = |id| Command::Dial {
        id,
        port: 1,
        first: Vec::new(),
    };
    process.send(&dial(0), vec![sent.into()]).unwrap();
    send_waiting(&mut process).await;
    drop(wire::recv::<Command>(theirs.as_fd()).unwrap());
    // One where another kind of socket belongs.
    let opened = Event::Opened {
        port: 10,
        source_port: 7,
    };
    let (wrong, far) = wire::pair().unwrap();
    wire::send(theirs.as_fd(), &opened, &[wrong.as_fd()]).unwrap();
    drop(wrong);
    assert!(matches!(process.next().await, VmmEvent::Garbled(_)));
    // One of a command that waits when the socket ends.
    let mut waits = None;
    while !process.is_behind() {
        let (client, socket) = Blocking::pair().unwrap();
        process.send(&dial(1), vec![socket.into()]).unwrap();
        waits = Some(client);
    }
    drop((process, theirs));
    let ends = [client, Blocking::from(far), waits.unwrap()];
    assert!(ends.iter().all(is_open));
    drop(busy);
    let started = Instant::now();
    while ends.iter().any(is_open) {
        assert!(started.elapsed() < LINGER / 2);
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "current_thread")]
async fn an_exit_file_that_hangs_delays_neither_tasks_nor_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let exit = attach::exit_path(dir.path());
    // Its open waits for a writer.
    mkfifo(&exit, Mode::S_IRWXU).unwrap();
    let ended = async |writer: Option<tokio::task::JoinHandle<()>>| {
        let (ours, _theirs) = wire::pair().unwrap();
        let mut process = process(Program::new("sleep").arg("1000"), ours);
        process.exit = Some(exit.clone());
        process.kill();
        let VmmEvent::Ended(ending) = process.next().await else {
            panic!("no end");
        };
        if let Some(writer) = writer {
            writer.await.unwrap();
        }
        ending.reason
    };
    // Lets readers and writers go: at the end, or if the runtime's thread waits for one.
    let (of_watch, started) = (exit.clone(), Instant::now());
    let (done, is_done) = std::sync::mpsc::channel::<()>();
    let watch = std::thread::spawn(move || {
        let let_go = || File::options().read(true).write(true).open(&of_watch);
        while is_done.recv_timeout(LINGER / 4) == Err(RecvTimeoutError::Timeout) {
            drop(let_go());
        }
        drop(let_go());
    });
    let of_writer = exit.clone();
    let writer = tokio::spawn(async move {
        let write = move || std::fs::write(of_writer, r#"{"reason":"power-off"}"#);
        tokio::task::spawn_blocking(write).await.unwrap().unwrap();
    });
    assert_eq!(ended(Some(writer)).await, Some(ExitReason::PowerOff));
    // Nobody writes.
    assert_eq!(ended(None).await, None);
    assert!(started.elapsed() < LINGER / 4);
    drop(done);
    watch.join().unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn a_flood_of_events_is_read_slowly_and_then_not_at_all() {
    let (ours, theirs) = wire::pair().unwrap();
    let mut process = limited(ours);
    std::thread::spawn(move || {
        let panicked = wire::encode(&Event::GuestPanicked {}).unwrap();
        while wire::send_bytes(theirs.as_fd(), &panicked, &[]).is_ok() {}
    });
    // Another guest's task gets its turn while there are always events.
    let turns = Arc::new(std::sync::atomic::AtomicU32::new(0));
    let of_task = Arc::clone(&turns);
    tokio::spawn(async move {
        loop {
            of_task.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            tokio::task::yield_now().await;
        }
    });
    let mut events = 0;
    let limit = std::time::Duration::from_secs(20);
    let started = Instant::now();
    while !process.budget().floods() {
        let event = timeout(limit, process.next()).await.unwrap();
        assert!(matches!(event, VmmEvent::Event(Event::GuestPanicked {}, _)));
        events += 1;
        if events == 50 {
            assert!(turns.load(std::sync::atomic::Ordering::Relaxed) >= 3);
        }
    }
    assert!((70..100).contains(&events), "{events}");
    // A pause after each of the 20 events beyond the budget.
    let took = started.elapsed();
    assert!(took >= PAUSE * 15, "{took:?}");
    // Nothing more is read.
    assert!(timeout(PAUSE * 10, process.next()).await.is_err());
    process.kill();
    let event = timeout(limit, process.next()).await.unwrap();
    assert!(matches!(event, VmmEvent::Ended(_)), "{event:?}");
}

#[tokio::test(flavor = "current_thread")]
async fn events_in_a_row_leave_other_tasks_their_turn() {
    let (ours, theirs) = wire::pair().unwrap();
    let mut process = process(Program::new("sleep").arg("1000"), ours);
    for id in 0..64 {
        wire::send(theirs.as_fd(), &Event::Pong { id }, &[]).unwrap();
    }
    process.next().await;
    let turns = Arc::new(std::sync::atomic::AtomicU32::new(0));
    let of_task = Arc::clone(&turns);
    tokio::spawn(async move {
        loop {
            of_task.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            tokio::task::yield_now().await;
        }
    });
    for _ in 1..64 {
        process.next().await;
    }
    assert!(turns.load(std::sync::atomic::Ordering::Relaxed) >= 3);
}

#[tokio::test(flavor = "current_thread")]
async fn each_descriptor_that_does_not_belong_counts_as_an_event() {
    let (ours, theirs) = wire::pair().unwrap();
    let mut process = limited(ours);
    let (carried, _far) = wire::pair().unwrap();
    let pong = wire::encode(&Event::Pong { id: 1 }).unwrap();
    wire::send_bytes(theirs.as_fd(), &pong, &[carried.as_fd(); 100]).unwrap();
    assert!(matches!(process.next().await, VmmEvent::Garbled(_)));
    assert!(process.budget().floods());
}

#[tokio::test(flavor = "current_thread")]
async fn answers_to_own_commands_are_no_flood() {
    let (ours, theirs) = wire::pair().unwrap();
    let mut process = process(Program::new("sleep").arg("1000"), ours);
    let none = Rate::new(0, std::time::Duration::from_secs(1));
    process.control.budget = Arc::new(EventBudget::new(none, none));
    for id in 0..100 {
        process.send(&Command::Ping { id }, Vec::new()).unwrap();
        send_waiting(&mut process).await;
        wire::recv::<Command>(theirs.as_fd()).unwrap().unwrap();
        wire::send(theirs.as_fd(), &Event::Pong { id }, &[]).unwrap();
        assert!(matches!(
            process.next().await,
            VmmEvent::Event(Event::Pong { .. }, None)
        ));
    }
    assert!(!process.budget().floods());
    // One that was not asked for counts.
    wire::send(theirs.as_fd(), &Event::Pong { id: 7 }, &[]).unwrap();
    process.next().await;
    assert!(process.budget().floods());
}

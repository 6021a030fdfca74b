use std::time::Instant;

use tokio::time::timeout;

use super::*;
use crate::closer::tests::{LINGER, lingering};
use crate::token_bucket::Rate;

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
    while !process.budget().floods() {
        let event = timeout(limit, process.next()).await.unwrap();
        assert!(matches!(event, VmmEvent::Event(Event::GuestPanicked {}, _)));
        events += 1;
        if events == 50 {
            assert!(turns.load(std::sync::atomic::Ordering::Relaxed) >= 3);
        }
    }
    assert!((70..100).contains(&events), "{events}");
    process.kill();
    let event = timeout(limit, process.next()).await.unwrap();
    assert!(matches!(event, VmmEvent::Ended(_)), "{event:?}");
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

use super::*;

fn process(program: &mut Program, ours: OwnedFd) -> VmmProcess {
    fcntl(&ours, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    let control = UnixStream::from_std(ours.into()).unwrap();
    let child = program.spawn().unwrap();
    VmmProcess::new(ProcessHandle::child(child).unwrap(), control, None)
}

#[tokio::test(flavor = "current_thread")]
async fn many_client_requests_do_not_delay_own_commands() {
    let (ours, theirs) = wire::pair().unwrap();
    let mut process = process(&mut Program::new("true"), ours);
    let mut dialed = 0;
    while !process.is_behind() {
        let dial = Command::Dial {
            id: dialed,
            port: 1,
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
        process.control.writable().await.unwrap();
        process.flush().unwrap();
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

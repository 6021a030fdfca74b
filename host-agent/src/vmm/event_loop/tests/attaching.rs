//! Which supervisor is attached, and what it gets.

use std::net::{TcpListener, TcpStream};

use super::*;

#[test]
fn a_second_supervisor_is_refused_while_the_first_lives() {
    let (fixture, first) = start(true);
    for _ in 0..10 {
        let second = fixture.connect();
        let refused = second.ask_to_attach(VERSIONS);
        let versions = VERSIONS.to_vec();
        assert_eq!(
            refused,
            Event::Refused {
                versions,
                busy: true
            }
        );
        assert_eq!(second.next(), None);
        first.ping(1);
    }
    drop(first);
    fixture.attach();
}

#[test]
fn of_two_that_ask_at_once_one_is_attached() {
    let (fixture, first) = start(true);
    let candidates = [fixture.connect(), fixture.connect()];
    drop(first);
    for candidate in &candidates {
        let versions = VERSIONS.to_vec();
        candidate.send(&attach(versions));
    }
    let answers = candidates.map(|candidate| (candidate.next(), candidate));
    let count = |wanted: fn(&Event) -> bool| {
        let answers = answers.iter().filter_map(|(answer, _)| answer.as_ref());
        answers.filter(|answer| wanted(answer)).count()
    };
    assert_eq!(count(|event| matches!(event, Event::Attached(_))), 1);
    assert_eq!(
        count(|event| matches!(event, Event::Refused { busy: true, .. })),
        1
    );
}

#[test]
fn a_supervisor_of_another_version_learns_our_versions() {
    let (fixture, first) = start(true);
    drop(first);
    let other = fixture.connect();
    let versions = VERSIONS.to_vec();
    assert_eq!(
        other.ask_to_attach(&[99]),
        Event::Refused {
            versions,
            busy: false
        }
    );
    assert_eq!(other.next(), None);
    let newer = fixture.connect();
    assert!(matches!(
        newer.ask_to_attach(&[99, 1]),
        Event::Attached(attached) if attached.version == 1
    ));
}

#[test]
fn a_process_of_another_user_is_not_heard() {
    let (fixture, first) = start_with(true, |peers| {
        let user = nix::unistd::geteuid().as_raw();
        peers.set_user(user + 1);
    });
    drop(first);
    let other = fixture.connect();
    let _ = wire::send(other.0.as_fd(), &attach(VERSIONS.to_vec()), &[]);
    assert_eq!(other.next(), None);
}

#[test]
fn held_listeners_reach_each_supervisor_that_takes_them() {
    let (fixture, first) = start(true);
    let hold = |supervisor: &Supervisor, listener: &TcpListener| {
        let files = [listener.as_fd()];
        wire::send(supervisor.0.as_fd(), &Command::HoldListeners {}, &files).unwrap();
    };
    let [old, new] = [0; 2].map(|_| TcpListener::bind(("127.0.0.1", 0)).unwrap());
    let address = new.local_addr().unwrap();
    hold(&first, &old);
    hold(&first, &new);
    first.ping(1);
    drop((first, old, new));
    // Open although no supervisor is left.
    let _client = TcpStream::connect(address).unwrap();
    for takes_listeners in [true, false, true] {
        let supervisor = fixture.connect();
        let versions = VERSIONS.to_vec();
        supervisor.send(&Command::Attach {
            versions,
            takes_listeners,
        });
        let answer = wire::recv::<Event>(supervisor.0.as_fd()).unwrap();
        let Some((Event::Attached(attached), files)) = answer else {
            panic!("{answer:?}");
        };
        assert!(attached.holds_listeners);
        assert_eq!(files.len(), usize::from(takes_listeners));
        for file in files {
            assert_eq!(TcpListener::from(file).local_addr().unwrap(), address);
        }
    }
    // They close with the process.
    let (third, _) = fixture.attach();
    third.send(&Command::Stop {});
    fixture.end();
    assert!(TcpStream::connect(address).is_err());
}
